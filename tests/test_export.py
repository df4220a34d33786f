"""The kept records on their own: what is written is what the data holds, in order, or nothing at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vig import export_records
from vig.data.files import StoreError
from vig.data.samples import read_samples
from vig.selection.select import select
from vig.store.fingerprints import data_fingerprint
from vig.store.rows import ScoreRow
from vig.store.scores import ScoreWriter
from vig.training.collator import keep_samples

N = 40


def record(row: int) -> dict:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"naïve {row}"}]
    return {"id": f"same {row // 2}", "more": {"score": row / 7, "none": None}, "conversations": turns}


def scored(folder, name: str, window: int = 16):
    """Scores of a data file, as `vig score` would leave them; every seventh record failed, every fifth is text."""
    path = folder / name
    rng = np.random.default_rng(len(name))
    settings = {"model": "m", "data": str(path), "window": window}
    if path.is_file():
        settings["data_fingerprint"] = data_fingerprint(path)
    with ScoreWriter(folder / f"{name}-scores", settings) as writer:
        for first in range(0, N, window):
            rows = []
            for row in range(first, min(first + window, N)):
                values = rng.gamma(1, 1, (2, 3))
                if row % 7 == 0:
                    rows.append(ScoreRow(f"{name}#{row}", "", name, "error: lost"))
                elif row % 5 == 0:
                    rows.append(
                        ScoreRow(f"{name}#{row}", "", name, "text_only", range(3), range(3), values[0])
                    )
                else:
                    rows.append(ScoreRow(f"{name}#{row}", f"{row}", name, "ok", range(3), range(3), *values))
            writer.write(first // window, rows)
        writer.mark_complete()
    return folder / f"{name}-scores"


def write_data(folder, name: str, records) -> None:
    lines = [json.dumps(one) for one in records]
    text = "[" + ",".join(lines) + "]" if name.endswith(".json") else "\n\n".join(lines)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("out", ["kept.json", "kept.jsonl"])
@pytest.mark.parametrize("level", ["both", "token"])
def test_kept_records_are_written_as_they_are(tmp_path, name, out, level):
    records = [record(row) for row in range(N)]
    records[11]["odd"] = "\ud800"  # a field that nobody reads
    write_data(tmp_path, name, records)
    chosen = select(scored(tmp_path, name), 40, level=level)
    kept = keep_samples(read_samples(tmp_path / name), chosen).samples
    expected = [records[int(sample.key.rpartition("#")[2])] for sample in kept]
    assert export_records(chosen, tmp_path / out) == len(expected) and 0 < len(expected) < N
    text = (tmp_path / out).read_text()
    found = json.loads(text) if out == "kept.json" else [json.loads(line) for line in text.splitlines()]
    assert found == expected and "naïve" in text


def test_records_of_other_formats_are_named(tmp_path):
    write_data(tmp_path, "data.json", [record(row) for row in range(N)])
    scores = [scored(tmp_path, name) for name in ("images.parquet", "data.json")]
    chosen = select(scores, 50)
    count = export_records(chosen, tmp_path / "kept.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    named = [line for line in lines if "key" in line]
    assert count == len(lines) == sum(bool(e.keep and e.token_keep.any()) for e in chosen.table().values())
    assert 0 < len(named) < count
    assert all(line["key"] == f"{line['file']}#{line['row']}" for line in named)


def test_data_that_is_gone_or_changed_is_refused_and_the_old_export_stays(tmp_path):
    records = [record(row) for row in range(N)]
    write_data(tmp_path, "data.json", records)
    chosen, out = select(scored(tmp_path, "data.json"), 50), tmp_path / "kept.json"
    export_records(chosen, out)
    before = out.read_bytes()
    (tmp_path / "data.json").rename(tmp_path / "moved.json")
    with pytest.raises(StoreError, match=r"not at .*data.json. Give it with --data"):
        export_records(chosen, out)
    with pytest.raises(
        StoreError, match=r"scores are of data\.json, .* and moved\.json is given.*rename it back to data"
    ):
        export_records(chosen, out, data=tmp_path / "moved.json")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved.json").rename(tmp_path / "elsewhere" / "data.json")
    export_records(chosen, out, data=tmp_path / "elsewhere" / "data.json")
    assert out.read_bytes() == before
    write_data(tmp_path, "data.json", records[1:])
    with pytest.raises(StoreError, match="changed since it was scored"):
        export_records(chosen, out)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*.tmp"))
    records_before = (tmp_path / "elsewhere" / "data.json").read_bytes()
    with pytest.raises(StoreError, match="is the scored data itself"):
        export_records(
            chosen, tmp_path / "elsewhere" / "data.json", data=tmp_path / "elsewhere" / "data.json"
        )
    assert (tmp_path / "elsewhere" / "data.json").read_bytes() == records_before
    with pytest.raises(ValueError, match="not the name of a"):
        export_records(chosen, tmp_path / "kept.csv")
    with pytest.raises(StoreError, match="do not name their data"):
        export_records(select([ScoreRow("a#0", "", "", "ok", [1], [0], [0.0], [1.0])]), out)


@pytest.mark.parametrize("out, text", [("kept.json", []), ("kept.jsonl", "")])
def test_nothing_kept_is_an_empty_file(tmp_path, out, text):
    write_data(tmp_path, "data.json", [record(row) for row in range(N)])
    rows = [ScoreRow("data.json#0", "", "", "ok", [1], [0], [0.0], [1.0])]
    chosen = select(rows, tau_floor=9)
    assert export_records(chosen, tmp_path / out, data=tmp_path / "data.json") == 0
    found = (tmp_path / out).read_text()
    assert (json.loads(found) if out == "kept.json" else found) == text
