"""Parquet, Arrow and WebDataset give the samples that JSON gives, their images as bytes, in constant memory."""

from __future__ import annotations

import builtins
import io
import json
import sys
import tarfile
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from vig.samples import BrokenRecord, DataError, answers, count_records, open_images, read_samples
from vig.score import Scorer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(number: int) -> bytes:
    file = io.BytesIO()
    tiny.picture(number).save(file, "PNG")
    return file.getvalue()


def record(number: int, **fields) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"red {number}"}]
    image = {"bytes": png(number), "path": f"{number}.png"}
    return {"id": f"n{number}", "image": image, "conversations": turns} | fields


def as_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"), row_group_size=2)


def as_hub_parquet(path, records):
    """With the Image feature of `datasets`, which decodes unless told not to."""
    table = datasets.Dataset.from_list(
        [row | {"image": tiny.picture(number)} for number, row in enumerate(records)]
    )
    table.to_parquet(str(path.with_suffix(".parquet")))


def as_arrow_file(path, records):
    table = pa.Table.from_pylist(records)
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)


def as_arrow_stream(path, records):
    table = pa.Table.from_pylist(records)
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)


def as_webdataset(path, records):
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for number, row in enumerate(records):
            fields = {name: value for name, value in row.items() if name != "image"}
            add(tar, f"{number:04}.json", json.dumps(fields).encode())
            add(tar, f"{number:04}.png", row["image"]["bytes"])


def add(tar, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


FORMATS = [as_parquet, as_hub_parquet, as_arrow_file, as_arrow_stream, as_webdataset]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_samples(tmp_path, write):
    folder = tmp_path / "parts"
    folder.mkdir()
    records = [record(number) for number in range(5)]
    write(folder / "b", records[3:])
    write(folder / "a", records[:3])
    samples = list(read_samples(folder))
    suffix = next(folder.iterdir()).suffix
    assert [sample.key for sample in samples] == [f"{name}{suffix}#{row}" for name, row in
                                                  [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]]  # fmt: skip
    assert [sample.id for sample in samples] == [f"n{number}" for number in range(5)]
    assert [sample.source for sample in samples] == [f"a{suffix}"] * 3 + [f"b{suffix}"] * 2
    for number, sample in enumerate(samples):
        assert answers(sample) == [f"red {number}"]
        assert isinstance(sample.images[0], bytes)  # not decoded before it is needed
        shown = number if write is not as_hub_parquet else number % 3
        assert open_images(sample)[0].tobytes() == tiny.picture(shown).tobytes()
    assert [sample.key for sample in read_samples(folder, limit=4)] == [sample.key for sample in samples[:4]]
    assert count_records(folder) == (None if write is as_webdataset else 5)
    assert len(list(read_samples(folder / f"b{suffix}"))) == 2


def test_the_scorer_takes_them_like_files(tmp_path):
    records = [record(number) for number in range(3)]
    as_parquet(tmp_path / "a", records)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "a.json").write_text(json.dumps([row | {"image": row["image"]["path"]} for row in records]))
    scorer = Scorer(tiny.llava_model(), tiny.llava_processor())
    bytes_, paths = (scorer.score(read_samples(tmp_path / name)) for name in ("a.parquet", "a.json"))
    assert [row.vig for row in bytes_] == [row.vig for row in paths]


def test_paths_and_turns_in_columns(tmp_path):
    """An Image feature that holds a path alone, and the dict of lists that older files have for turns."""
    (tmp_path / "0.png").write_bytes(png(0))
    turns = {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "red"]}
    good = {"image": {"bytes": None, "path": "0.png"}, "conversations": turns}
    outside = {"image": {"bytes": None, "path": "../0.png"}, "conversations": turns}
    as_parquet(tmp_path / "a", [good, outside])
    first, second = read_samples(tmp_path / "a.parquet")
    assert answers(first) == ["red"] and first.images == ((tmp_path / "0.png").resolve(),)
    assert first.id == first.key == "a.parquet#0"
    assert isinstance(second, BrokenRecord) and "leaves the image root" in second.error.reason


def test_messages_with_parts_and_several_images_in_a_webdataset(tmp_path):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x.2.png", png(2))
        add(tar, "x.10.png", png(10))
        add(tar, "x.json", json.dumps({"id": "7", "messages": messages}).encode())
    (sample,) = read_samples(tmp_path / "a.tar")
    assert answers(sample) == ["no"] and sample.id == "7"
    shown = [image.tobytes() for image in open_images(sample)]
    assert shown == [tiny.picture(2).tobytes(), tiny.picture(10).tobytes()]


def test_a_webdataset_of_captions(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x.png", png(1))
        add(tar, "x.txt", b"Squares of colour.\n")
    (sample,) = read_samples(tmp_path / "a.tar")
    assert answers(sample) == ["Squares of colour."] and sample.id == "x"


def test_a_caption_that_is_no_text_is_a_broken_record(tmp_path):
    rows = [
        {"id": str(number), "image": {"bytes": png(1)}, "caption": text}
        for number, text in enumerate(("a cat", None))
    ]
    as_parquet(tmp_path / "a", rows)
    first, second = read_samples(tmp_path / "a.parquet")
    assert answers(first) == ["a cat"]
    assert second.id == "1" and second.error.reason == "the caption is NoneType"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".tar"])
def test_a_damaged_file_is_a_broken_record_and_the_next_file_is_read(tmp_path, suffix):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / f"a{suffix}").write_bytes(b"PAR1 torn off here" * 50)
    write = {".parquet": as_parquet, ".arrow": as_arrow_file, ".tar": as_webdataset}[suffix]
    write(folder / "b", [record(0)])
    broken, sample = read_samples(folder)
    assert broken.key == f"a{suffix}#0" and "breaks off after 0 records" in broken.error.reason
    assert "Repair the file" in str(broken.error) and sample.key == f"b{suffix}#0"
    assert count_records(folder) is None


@pytest.mark.parametrize("write", [*FORMATS, "array", "lines"])
def test_records_that_are_not_wanted_keep_their_places(tmp_path, write):
    records = [record(number) for number in range(50)]
    folder = tmp_path / "parts"
    folder.mkdir()
    if isinstance(write, str):
        folder = tmp_path / f"{write}.json"
        for row in records:
            row["image"] = "0.png"
        lines = list(map(json.dumps, records))
        folder.write_text(f"[{', '.join(lines)}]" if write == "array" else "\n".join(lines))
    else:
        write(folder / "a", records[:20])
        write(folder / "b", records[20:])
    whole = list(read_samples(folder))
    assert len(whole) == 50
    for chosen in ({0}, {19, 20}, set(range(7, 30)), {49}, set()):
        found = list(read_samples(folder, limit=50, wanted=chosen.__contains__))
        assert found == [one if number in chosen else None for number, one in enumerate(whole)]


def test_row_groups_that_are_not_wanted_are_not_read_and_lost_rows_are_counted(tmp_path):
    """A row group of 5 is damaged: of its rows each says so, those behind are read, and all keep their keys."""
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([record(number) for number in range(20)])
    pq.write_table(table, path, row_group_size=5, compression="none")
    content = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
        at, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    content[at : at + size] = b"\xff" * size
    path.write_bytes(content)
    found = list(read_samples(path))
    assert [one.key for one in found] == [f"a.parquet#{number}" for number in range(20)]
    lost = [number for number, one in enumerate(found) if isinstance(one, BrokenRecord)]
    assert lost == [5, 6, 7, 8, 9]
    assert "row group 1 of the Parquet file cannot be read" in found[5].error.reason
    others = list(read_samples(path, wanted=lambda number: number >= 10))
    assert others == [None] * 10 + found[10:]


def test_lines_that_are_not_wanted_are_not_decoded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n\n" + json.dumps(record(0, image="0.png")) + "\n")
    first, second = read_samples(path, wanted=lambda number: number == 1)
    assert first is None and second.key == "a.jsonl#1"
    assert isinstance(next(read_samples(path)), BrokenRecord)


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    as_webdataset(tmp_path / "a", [record(0)])
    original = builtins.__import__

    def missing(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'a\.tar needs the package datasets.*"vig-kernels\[data\]"'):
        list(read_samples(tmp_path / "a.tar"))


def test_an_empty_folder_names_what_it_could_hold(tmp_path):
    with pytest.raises(DataError, match=r"no photographs and no data files.*\.parquet, \.arrow, \.tar"):
        list(read_samples(tmp_path))


@pytest.mark.parametrize("write", [as_parquet, as_arrow_file, as_webdataset])
def test_memory_does_not_grow_with_the_file(tmp_path, write):
    """100 MB of pictures pass through a few MB of Python objects."""
    filler = bytes(500_000)
    records = [record(number, image={"bytes": filler, "path": None}) for number in range(200)]
    write(tmp_path / "big", records)
    (path,) = (file for file in tmp_path.iterdir() if file.stem == "big")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        peak = max(pa.total_allocated_bytes() - before for _ in read_samples(path))
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert python < 30e6 and peak < 30e6
