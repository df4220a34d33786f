"""Images whose bytes lie in the data are held in memory: it is said, and the way out of it works."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_blocks import ROOT, blocks_of
from tiny import picture, save_llava, save_picture

from vig import Scorer, keep_samples, read_samples, score_dataset, select, train
from vig.data.records import sample_from_record
from vig.training import held_images


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [
        {"id": str(row), "image": {"bytes": png(row), "path": None}, "question": "What?", "answer": "a cup"}
        for row in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def test_bytes_of_kept_images_are_counted_and_told_once_before_all_are_read(data, monkeypatch):
    sizes = [len(png(row)) for row in range(4)]
    monkeypatch.setattr(held_images, "MUCH", sizes[0] + sizes[2])
    chosen = {f"data.parquet#{row}": (row != 1, [4], [True]) for row in range(4)}
    read = []
    records = (read.append(record) or record for record in read_samples(data))

    def told(message, *_, **__):
        assert (
            len(read) == 4 and "the images of the first 3 kept samples take 0.0 GiB of memory in" in message
        )
        said.append(message)

    said = []
    monkeypatch.setattr(held_images.warnings, "warn", told)
    assert len(keep_samples(records, chosen).samples) == 3 and len(said) == 1
    monkeypatch.setattr(held_images, "MUCH", sum(sizes))
    keep_samples(read_samples(data), None)
    assert len(said) == 1
    monkeypatch.setattr(held_images, "MUCH", 0)
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    keep_samples(read_samples(data), None)  # its first process says it for all
    assert len(said) == 1


def test_files_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(held_images, "MUCH", 0)
    name = save_picture(tmp_path / "a.png", 1)
    sample = sample_from_record({"image": name, "caption": "a cup"}, key="k", image_root=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(keep_samples([sample], None).samples) == 1


def test_the_pages_way_to_files_trains_the_same(data, tmp_path, monkeypatch):
    """docs/train.md: written to files once, under the same keys."""
    monkeypatch.chdir(tmp_path)
    model = save_llava(tmp_path / "model")
    score_dataset(Scorer(model), data, "scores", progress_bar=False)
    select("scores", 60, out="selection")
    [code] = [one.text for one in blocks_of(ROOT / "docs" / "train.md") if "on_disk" in one.text]
    names = {}
    exec(code.replace("llava-hf/llava-1.5-7b-hf", str(model)), names)
    monkeypatch.setattr(held_images, "MUCH", 0)
    with pytest.warns(UserWarning, match="the images of the first 1 kept samples"):
        expected = train(model, data, "selection", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = keep_samples(names["on_disk"](read_samples(data), Path("images")), "selection")
    assert [one.read_bytes() for sample in kept.samples for one in sample.images]
    assert train(model, kept.samples, "selection", None).losses == expected.losses
    assert (tmp_path / "tuned" / "train.json").exists()
