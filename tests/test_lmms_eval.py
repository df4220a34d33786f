"""The command around lmms-eval, with a stand-in for its environment, and MMHal-Bench's answers in their form.

What lmms-eval itself does with a checkpoint of ours was tried by hand: docs/probes.md says with which versions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import tiny_families
from typer.testing import CliRunner

from vig.cli import app
from vig.data.sample import DataError
from vig.demo.arms import CHECKPOINT
from vig.evaluation import lmms_eval
from vig.evaluation.lmms_eval import LmmsEvalError, LmmsRun, figures, ready_env, run_lmms_eval
from vig.evaluation.mmhal import FIELDS, find_image, read_questions, write_mmhal
from vig.models.families import FAMILIES, ModelError
from vig.scoring.scorer import Scorer

VERSIONS = {"lmms-eval": "0.7.3", "torch": "2.13.0+cpu", "transformers": "5.1.0", "filelock": "3.32.7"}
STAND_IN = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    print(json.dumps({versions}))
    sys.exit()
assert words[:2] == ["-m", "lmms_eval"], words
given = dict(zip(words[2:-1:2], words[3::2]))
print("PYTHONPATH", os.environ.get("PYTHONPATH"), flush=True)
said = {{"gone": "Tasks not found: gone. Try another", "net": "RetryError[raised ConnectionError>]", "odd": "it hurts"}}
for task in given["--tasks"].split(","):
    if task in said:
        print(f"Error during evaluation: {{said[task]}}. Please set `--verbosity=DEBUG` to get more information.")
        sys.exit(0)  # as lmms-eval does
if "silent" not in given["--tasks"]:
    folder = pathlib.Path(given["--output_path"]) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    result = {{"alias": "x", "exact_match,none": 0.25 + number, "exact_match_stderr,none": 0.125, "n,none": "N/A"}}
    stored = {{"results": {{given["--tasks"].split(",")[0]: result}}, "group_subtasks": {{"several": ["scenes"]}}}}
    (folder / f"2026_{{number}}_results.json").write_text(json.dumps(stored))
"""


@pytest.fixture
def env(tmp_path) -> Path:
    """What looks like an environment that has lmms-eval."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(python=sys.executable, versions=VERSIONS))
    python.chmod(0o755)
    return tmp_path / "env"


def run_of(*tasks: str, **options) -> LmmsRun:
    return LmmsRun(str(CHECKPOINT), tasks, device="cpu", **options)


def test_results_log_and_provenance_are_stored(env, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    shown = []
    out = tmp_path / "out"
    found = run_lmms_eval(run_of("scenes"), out, env, say=pytest.fail, show=shown.append)
    assert found["results"]["scenes"]["exact_match,none"] == 0.25
    assert list(figures(found["results"])) == [("scenes", "exact_match", 0.25, 0.125)]
    assert json.loads((out / "lmms-eval.json").read_text()) == found
    assert (out / found["results_file"]).is_file()
    assert (out / "lmms-eval.log").read_bytes() == b"".join(shown) == b"PYTHONPATH None\n", (
        "our packages stay ours"
    )
    about = found["provenance"]
    assert (
        about["versions"] == VERSIONS and about["lmms_model"] == "llava_hf" and len(about["revision"]) == 16
    )
    assert about["untried"] == ["transformers==5.1.0"]
    assert about["command"][0] == str(env / "bin" / "python")
    # again: of two results files the new one counts
    assert run_lmms_eval(run_of("scenes"), out, env)["results"]["scenes"]["exact_match,none"] == 1.25


def test_the_command_line_of_lmms_eval(tmp_path):
    words = run_of("a", "b", include_path=tmp_path, limit=5, batch_size=2).command(Path("py"), tmp_path / "o")
    given = dict(zip(words[3:-1:2], words[4::2], strict=True))
    assert words[:3] == ["py", "-m", "lmms_eval"] and words[-1] == "--log_samples"
    assert given == {
        "--model": "llava_hf", "--model_args": f"pretrained={CHECKPOINT.resolve()},device_map=cpu", "--tasks": "a,b",
        "--batch_size": "2", "--device": "cpu", "--output_path": str(tmp_path / "o"), "--include_path": str(tmp_path),
        "--limit": "5",
    }  # fmt: skip
    words = run_of("a", model="eye", model_args="device_map=auto,dtype=float32").command(Path("py"), tmp_path)
    assert words[4] == "eye"
    assert words[6] == f"pretrained={CHECKPOINT.resolve()},device_map=auto,dtype=float32"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_model_of_lmms_eval(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert lmms_eval.lmms_model(str(tmp_path)) in {*lmms_eval.MODELS.values(), "huggingface"}
    assert set(lmms_eval.MODELS) <= set(FAMILIES)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "gone",
            "(exit code 0): Tasks not found: gone. Try another. `{python} -m lmms_eval tasks list` shows them",
        ),
        ("net", "The task's data are not in the hub's cache"),
        ("odd", "it hurts. The last lines of"),
        ("silent", "it says no reason. The last lines of"),
    ],
)
def test_a_run_without_results_failed_though_it_ends_with_0(env, tmp_path, task, said):
    with pytest.raises(LmmsEvalError) as error:
        run_lmms_eval(run_of(task), tmp_path / "out", env)
    assert said.format(python=env / "bin" / "python") in str(error.value) and "lmms-eval.log" in str(
        error.value
    )
    assert not (tmp_path / "out" / "lmms-eval.json").exists()


def test_every_task_that_was_asked_for_must_have_results(env, tmp_path):
    with pytest.raises(LmmsEvalError, match="lmms-eval left no results of other"):
        run_lmms_eval(run_of("scenes", "other"), tmp_path / "out", env)
    run_lmms_eval(run_of("scenes", "several"), tmp_path / "out", env)  # a group of tasks


def test_checkpoints_that_it_cannot_read_are_refused_before_anything_is_installed(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eye"}))
    (tmp_path / "empty").mkdir()
    for checkpoint, said in (
        (adapter, "it is a PEFT adapter of base, not a model. Merge it once: merged = PeftModel"),
        (tmp_path, "model_type 'eye' is not supported"),
        (tmp_path / "empty", "holds no config.json that can be read"),
    ):
        with pytest.raises(ModelError, match=said):
            run_lmms_eval(
                LmmsRun(str(checkpoint), ("a",)), tmp_path / "out", tmp_path / "no-env", say=pytest.fail
            )
    with pytest.raises(ValueError, match="no task was named"):
        LmmsRun("m", ())
    with pytest.raises(ValueError, match="expected a folder of task files"):
        LmmsRun("m", ("a",), include_path=tmp_path / "gone")


def install(tmp_path, monkeypatch, script: str) -> Path:
    """Stands in for Python: `-m venv FOLDER` copies it there, where `-m pip install` runs `script`."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"; '
        f"exit 0; fi\n{script}\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(lmms_eval.sys, "executable", str(python))
    return tmp_path / "env"


def test_an_environment_is_made_once_with_the_pins(tmp_path, monkeypatch):
    env = install(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; exit 0')
    told = []
    for _ in range(2):
        assert ready_env(env, tmp_path / "log", told.append) == env / "bin" / "python"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if "pip" in call] == [f"-m pip install {' '.join(lmms_eval.PINS)}"]
    assert len(told) == 1 and "lmms-eval==0.7.3" in told[0]


def test_a_torchvision_that_breaks_transformers_is_taken_out(tmp_path, monkeypatch):
    broken = 'case "$*" in *"import torchvision"*) echo "torchvision::nms" >&2; exit 1;; esac'
    script = f'echo "$@" >> {tmp_path}/calls; {broken}'
    env = install(tmp_path, monkeypatch, script)
    told = []
    ready_env(env, tmp_path / "log", told.append)
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "-m pip uninstall -y torchvision"
    assert told[-1] == "its torchvision is of another build than its torch: uninstalled"


def test_a_failed_installation_says_so_and_is_tried_again(tmp_path, monkeypatch):
    env = install(tmp_path, monkeypatch, "echo No space left; exit 1")
    for _ in range(2):
        with pytest.raises(
            LmmsEvalError, match=r"(?s)pip install lmms-eval==.* failed. Repair.*No space left"
        ):
            ready_env(env, tmp_path / "log", lambda text: None)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("")
    with pytest.raises(LmmsEvalError, match="is no virtual environment, and not empty"):
        ready_env(other, tmp_path / "log", lambda text: None)


def test_the_command(env, tmp_path):
    words = ["lmms-eval", str(CHECKPOINT), "--tasks", "scenes", "--env", str(env), "--device", "cpu", "-o"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "scenes exact_match: 0.2500 +- 0.1250 (standard error)" in done.stdout
    assert "note: tried with another version than transformers==5.1.0" in done.stdout
    done = CliRunner().invoke(app, [*words, str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout)["results"]["scenes"]["exact_match,none"] == 1.25
    done = CliRunner().invoke(
        app, [*words[:2], "--tasks", ",", "-o", str(tmp_path / "out")], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 2 and "no task was named" in done.output


# --- MMHal-Bench ---


@pytest.fixture
def template(tmp_path) -> Path:
    """Three records as published, with a field of its own beside the first."""
    records = []
    for number in range(3):
        tiny.save_picture(tmp_path / f"{number}_b.png", number)
        records.append(
            {
                "question_type": "attribute", "question_topic": "food", "image_id": f"id{number}",
                "image_src": f"https://x.y/{number}/{number}_b.png", "image_content": ["Apple", "Pear"],
                "question": f"What colour is number {number}?", "gt_answer": "Red.", "model_answer": "old",
            }
        )  # fmt: skip
    records[0]["more"] = 1
    (tmp_path / "response_template.json").write_text(json.dumps(records))
    return tmp_path / "response_template.json"


@pytest.fixture(scope="module")
def scorer():
    return Scorer(tiny_families.model("llava"), tiny_families.processor("llava"))


def test_answers_stand_in_the_published_form(template, scorer, tmp_path):
    out = tmp_path / "answers.json"
    write_mmhal(scorer, template, out, max_new_tokens=4)
    before, after = json.loads(template.read_text()), json.loads(out.read_text())
    assert [list(record)[:8] for record in after] == [[*FIELDS, "model_answer"]] * 3
    for old, new in zip(before, after, strict=True):
        assert new | {"model_answer": ""} == old | {"model_answer": ""} and new["model_answer"] != "old"
    model, encoder = scorer.loaded.model, scorer.encoder
    _, samples = read_questions(template)
    assert samples[1].messages[0]["content"][-1]["text"].strip() == "What colour is number 1?"
    encoded = encoder.encode(samples[1])
    start = encoded.answer_index[0]
    inputs = encoder.collate([encoded])
    ids = model.generate(
        input_ids=inputs["input_ids"][:, :start], attention_mask=inputs["attention_mask"][:, :start],
        pixel_values=inputs["pixel_values"], max_new_tokens=4, do_sample=False,
    )  # fmt: skip
    assert (
        after[1]["model_answer"] == encoder.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    )
    about = json.loads((tmp_path / "answers.json.provenance.json").read_text())
    assert about["max_new_tokens"] == 4 and about["data"] == str(template)


def test_pictures_are_found_by_the_end_of_their_address_or_their_id(tmp_path):
    record = {"image_src": "https://x.y/a/b.jpg", "image_id": "c"}
    assert find_image(record, tmp_path) is None
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "c.png").write_text("")
    assert find_image(record, tmp_path) == tmp_path / "images" / "c.png"
    (tmp_path / "b.jpg").write_text("")
    assert find_image(record, tmp_path) == tmp_path / "b.jpg"
    (tmp_path / "secret.png").write_text("")
    assert find_image({"image_src": "", "image_id": "../secret"}, tmp_path / "images") is None


def test_what_the_judge_could_not_read_is_not_written(template, scorer, tmp_path):
    out = tmp_path / "answers.json"
    records = json.loads(template.read_text())
    for broken, said in (
        (
            lambda: os.remove(tmp_path / "1_b.png"),
            "1 of 3 pictures are not in .*1_b.png .id1.. Download them there",
        ),
        (lambda: (tmp_path / "1_b.png").write_text("no picture"), "1 of 3 questions could not be answered"),
        (
            lambda: template.write_text(json.dumps([{"question": "?"}])),
            "record 0 of .* has no question_type, expected",
        ),
        (lambda: template.write_text("{}"), "holds no list of records"),
        (lambda: template.write_text("["), "cannot be read"),
    ):
        broken()
        with pytest.raises(DataError, match=said):
            write_mmhal(scorer, template, out, max_new_tokens=4)
        assert not out.exists()
    template.write_text(json.dumps(records))


def test_the_mmhal_command(template, tmp_path):
    records = json.loads(template.read_text())
    for record in records:
        record["question"] = "what is in the picture?"
    template.write_text(json.dumps(records))
    words = [
        "mmhal",
        str(CHECKPOINT),
        str(template),
        "-o",
        str(tmp_path / "a.json"),
        "--max-new-tokens",
        "20",
        "--json",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"answers": 3, "out": str(tmp_path / "a.json")}
    answers = [record["model_answer"] for record in json.loads((tmp_path / "a.json").read_text())]
    assert all("things:" in answer for answer in answers)
