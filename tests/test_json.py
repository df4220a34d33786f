"""`--json`: one JSON object on standard output, of any command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parent.parent


def run(*words, code=0) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "vig", *map(str, words), "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_every_command_prints_its_summary_as_json(tmp_path):
    tiny.save_llava(tmp_path / "model")
    tiny.save_picture(tmp_path / "0.png", 0)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red [x]"}]
    records = [{"image": f"{n}.png", "conversations": turns} for n in (0, 0, 1)]
    (tmp_path / "d.json").write_text(json.dumps(records))
    data = (tmp_path / "model", tmp_path / "d.json")
    said = run("score", *data, "-o", tmp_path / "scores", "--dry-run", code=3)
    assert said["dry_run"] and said["done"] == 3 and said["failed"] == 1
    said = run("score", *data, "-o", tmp_path / "scores", code=3)
    assert said["scores"] == str(tmp_path / "scores") and said["tokens"] == 16
    assert said["errors"][0]["count"] == 1 and said["errors"][0]["examples"][0]["key"] == "d.json#2"
    said = run("select", tmp_path / "scores", "--p", "0.5", "-o", tmp_path / "selection")
    assert (
        said["p"] == 0.5
        and said["counts"]["samples_total"] == 2
        and "Was --p 50 meant" in said["warnings"][-1]
    )
    selection = ("--selection", tmp_path / "selection")
    said = run("train", *data, *selection, "-o", tmp_path / "out", "--max-steps", "1", code=0)
    assert said["steps"] == 1 and said["out"] == str(tmp_path / "out")
    assert run("report", tmp_path / "scores", "-o", tmp_path / "r.html") == {
        "report": str(tmp_path / "r.html")
    }
    said = run("inspect", *data, "-o", tmp_path / "p.png")
    assert "".join(said["tokens"]) == "red [x]</s>" and len(said["token_nll_null"]) == 8
