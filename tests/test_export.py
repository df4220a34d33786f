"""The kept records on their own: what is written is what the data holds, in order, or nothing at all."""

from __future__ import annotations

import io
import json
import math
import shlex
from contextlib import nullcontext
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import save_picture
from tiny_formats import WRITERS

from vig import export_records
from vig.data.files import StoreError
from vig.data.reading import Reading, Source
from vig.data.samples import read_samples
from vig.selection.export import how_to_read
from vig.selection.select import select
from vig.store.fingerprints import data_fingerprint, data_settings
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
                values, id = rng.gamma(1, 1, (2, 3)), record(row)["id"]
                if row % 7 == 0:
                    rows.append(ScoreRow(f"{name}#{row}", "", name, "error: lost"))
                elif row % 5 == 0:
                    rows.append(
                        ScoreRow(f"{name}#{row}", id, name, "text_only", range(3), range(3), values[0])
                    )
                else:
                    rows.append(ScoreRow(f"{name}#{row}", id, name, "ok", range(3), range(3), *values))
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


def all_kept(data, folder, image_root=None, **reading):
    """A selection of every sample of the data, as scoring and selecting would leave it."""
    source = Source(data, Reading(**reading))
    about = {"model": "m", "data": str(data), "data_fingerprint": data_fingerprint(source), "window": 16}
    about |= data_settings(source) | {"image_root": image_root and str(image_root)}
    samples = list(read_samples(source, image_root=image_root))
    with ScoreWriter(folder, about) as writer:
        values = np.ones((2, 3))
        rows = [ScoreRow(one.key, one.id, one.source, "ok", range(3), range(3), *values) for one in samples]
        writer.write(0, rows)
        writer.mark_complete()
    return select(folder, 100), samples


def seen_by_a_model(samples) -> list:
    pictures = [
        [(open_one(image).size, open_one(image).tobytes()) for image in one.images] for one in samples
    ]
    return list(zip([one.messages for one in samples], pictures, strict=True))


def open_one(image):
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


@pytest.mark.parametrize("form", WRITERS)
def test_records_of_every_format_are_written_with_their_fields_and_read_again(tmp_path, form):
    (tmp_path / "in #1").mkdir()
    chosen, samples = all_kept(WRITERS[form](tmp_path / "in #1"), tmp_path / "scores")
    out, inside = tmp_path / "kept.jsonl", form in ("Parquet", "Arrow", "WebDataset")
    with (
        pytest.warns(UserWarning, match="3 of the 3 records .* written as data URIs")
        if inside
        else nullcontext()
    ):
        assert export_records(chosen, out) == 3
    assert shlex.split(how_to_read(chosen)[0]) == ["--image-root", str(tmp_path / "in #1")]
    again = list(read_samples(out, image_root=tmp_path / "in #1"))
    assert seen_by_a_model(again) == seen_by_a_model(samples)
    assert ("data:image/png;base64," in out.read_text()) is inside


def test_a_row_of_csv_keeps_the_names_of_its_columns(tmp_path):
    save_picture(tmp_path / "0.png", 0)
    rows = [f"0.png,What {row}?,naïve,,{row}" for row in range(12)]
    for name, sep in (("data.csv", ","), ("data.tsv", "\t")):
        header = "img_path,q,ans,note,n"
        (tmp_path / name).write_text("\n".join([header, *rows]).replace(",", sep))
        columns = {"images": ["img_path"], "question": ["q"], "answer": ["ans"]}
        chosen, samples = all_kept(tmp_path / name, tmp_path / f"{name}-scores", columns=columns)
        assert export_records(chosen, tmp_path / "kept.json") == 12
        first, *_ = json.loads((tmp_path / "kept.json").read_text())
        assert first == {"img_path": "0.png", "q": "What 0?", "ans": "naïve", "note": None, "n": "0"}
        assert how_to_read(chosen)[0].endswith(" --columns answer=ans,images=img_path,question=q")
        again = list(read_samples(tmp_path / "kept.json", columns=columns))
        assert seen_by_a_model(again) == seen_by_a_model(samples)


def test_photographs_and_imagefolders_name_their_images_from_the_root_on(tmp_path):
    for folder in ("photographs/a#b", "table/sub"):
        (tmp_path / folder).mkdir(parents=True)
        save_picture(tmp_path / folder / "0#1.png", 0)
    (tmp_path / "photographs/a#b/0#1.txt").write_text("red")
    (tmp_path / "table/sub/metadata.jsonl").write_text(json.dumps({"file_name": "0#1.png", "text": "red"}))
    expected = {
        "photographs": {"id": "a#b/0#1.png", "image": "photographs/a#b/0#1.png", "caption": "red"},
        "table": {"text": "red", "images": ["table/sub/0#1.png"]},
    }
    for data, record in expected.items():
        chosen, _ = all_kept(tmp_path / data, tmp_path / f"{data}-scores", image_root=tmp_path)
        export_records(chosen, tmp_path / "kept.jsonl")
        assert json.loads((tmp_path / "kept.jsonl").read_text()) == record


def test_what_json_lacks_is_written_as_text_or_null(tmp_path):
    row = {
        "image": b"GIF89a",
        "caption": "red",
        "at": datetime(2026, 1, 2),
        "price": Decimal("1.50"),
        "p": math.nan,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    chosen, _ = all_kept(tmp_path / "data.parquet", tmp_path / "scores")
    with pytest.warns(UserWarning, match="vig train --selection"):
        export_records(chosen, tmp_path / "kept.jsonl")
    found = json.loads((tmp_path / "kept.jsonl").read_text())
    assert found == row | {
        "image": "data:image/gif;base64,R0lGODlh", "at": "2026-01-02T00:00:00", "price": "1.50", "p": None
    }  # fmt: skip


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
