"""Parquet, Arrow and WebDataset give the samples that JSON gives, their images as bytes, in constant memory."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from vig.data.formats import format_of
from vig.data.images import open_images
from vig.data.locate import locate
from vig.data.rows import read_rows
from vig.data.sample import BrokenRecord, DataError, Sample, answers
from vig.data.samples import count_records, read_samples
from vig.scoring.scorer import Scorer
from vig.store.fingerprints import data_fingerprint


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


def as_webdataset(path, records, suffix=".tar"):
    with tarfile.open(path.with_suffix(suffix), "w:gz" if suffix == ".tar.gz" else "w") as tar:
        for number, row in enumerate(records):
            fields = {name: value for name, value in row.items() if name != "image"}
            add(tar, f"{number:04}.json", json.dumps(fields).encode())
            add(tar, f"{number:04}.png", row["image"]["bytes"])


def as_compressed_webdataset(path, records):
    as_webdataset(path, records, ".tar.gz")


def add(tar, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


FORMATS = [
    as_parquet,
    as_hub_parquet,
    as_arrow_file,
    as_arrow_stream,
    as_webdataset,
    as_compressed_webdataset,
]
TARS = [as_webdataset, as_compressed_webdataset]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_samples(tmp_path, write):
    folder = tmp_path / "parts"
    folder.mkdir()
    records = [record(number) for number in range(5)]
    write(folder / "b", records[3:])
    write(folder / "a", records[:3])
    samples = list(read_samples(folder))
    suffix = "".join(next(folder.iterdir()).suffixes)
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
    assert count_records(folder) == (None if write in TARS else 5)
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
        add(tar, "y.png", png(2))
        add(tar, "y.txt", b"\xef\xbb\xbfAnother.")  # with the mark that some editors write
    sample, other = read_samples(tmp_path / "a.tar")
    assert answers(sample) == ["Squares of colour."] and sample.id == "x"
    assert answers(other) == ["Another."]


def tar_of(path, members: dict[str, bytes]):
    """A tar file of these members, compressed as its name says."""
    with tarfile.open(path, f"w:{'gz' if path.suffix == '.gz' else ''}") as tar:
        for name, content in members.items():
            add(tar, name, content)


def turns(question="<image>\nWhat?") -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]}


def usual(n: int, **fields) -> dict[str, bytes]:
    """The members of n records with one image each."""
    of_one = [
        {f"s{i:03}.json": json.dumps(turns() | fields).encode(), f"s{i:03}.png": png(i)} for i in range(n)
    ]
    return {name: content for members in of_one for name, content in members.items()}


TWO = json.dumps(turns("<image><image>\nWhat?")).encode()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("at", [1, 8])
@pytest.mark.parametrize(
    "other, n_images",
    [
        ({"json": TWO, "0.png": png(0), "1.png": png(1)}, 2),
        ({"json": TWO, "png": png(0), "1.JPG": png(1)}, 2),
        ({"json": json.dumps(turns()).encode(), "jpg": png(1)}, 1),
        ({"json": json.dumps(turns("What?")).encode()}, 0),
        ({"json": json.dumps(turns() | {"id": "eight", "extra": {"a": 1}}).encode(), "png": png(1)}, 1),
        ({"txt": b"red", "png": png(1), "cls": b"7"}, 1),
    ],
)  # fmt: skip
def test_records_of_a_webdataset_may_differ_in_fields_and_types(tmp_path, name, at, other, n_images):
    members = usual(10, id=7)
    members = {member: content for member, content in members.items() if not member.startswith(f"s{at:03}.")}
    members |= {f"s{at:03}.{field}": content for field, content in other.items()}
    tar_of(tmp_path / name, dict(sorted(members.items())))
    samples = list(read_samples(tmp_path / name))
    assert [sample.key for sample in samples] == [f"{name}#{number}" for number in range(10)]
    assert [len(sample.images) for sample in samples] == [n_images if i == at else 1 for i in range(10)]
    assert {answer for sample in samples for answer in answers(sample)} == {"red"}
    assert {sample.id for number, sample in enumerate(samples) if number != at} == {"7"}


DEEP = b"[" * 100_000


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("at", [0, 3, 8])
@pytest.mark.parametrize(
    "field, content, reason",
    [
        ("json", b"{broken", "is not JSON (Expecting property name"),
        ("json", '{"a": "café"}'.encode("latin-1"), "is not UTF-8 (at byte 10)"),
        ("json", b"[1, 2]", "holds a list, not an object"),
        ("json", DEEP, "cannot be decoded (nested too deeply)"),
        ("json", b'{"id": ' + b"1" * 5000 + b"}", "cannot be decoded (Exceeds the limit"),
        ("txt", "café".encode("latin-1"), "is not UTF-8 (at byte 3)"),
    ],
)
def test_a_bad_member_of_a_webdataset_costs_its_own_record_alone(tmp_path, name, at, field, content, reason):
    members = usual(10)
    members[f"s{at:03}.json"] = b"{}"
    members[f"s{at:03}.{field}"] = content
    tar_of(tmp_path / name, dict(sorted(members.items())))
    found = list(read_samples(tmp_path / name))
    broken = found.pop(at)
    assert [sample.key for sample in found] == [f"{name}#{number}" for number in range(10) if number != at]
    assert broken.key == f"{name}#{at}" and f"the member s{at:03}.{field} {reason}" in broken.error.reason
    assert "the other records are read" in broken.error.cure


def test_links_and_members_that_are_there_twice_cost_their_own_records(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.txt", b"red")
            if number == 1:
                link = tarfile.TarInfo("1.png")
                link.type, link.linkname = tarfile.SYMTYPE, "0.png"
                tar.addfile(link)
                continue
            for _ in range(2 if number == 2 else 1):
                add(tar, f"{number}.png", png(1))
    first, linked, twice, last = read_samples(tmp_path / "a.tar")
    assert answers(first) == answers(last) == ["red"]
    assert linked.error.reason == "the member 1.png is a link or a device"
    assert twice.error.reason == "the member 2.png is there twice"


def test_names_of_a_webdataset_end_at_the_first_dot_of_the_file_name(tmp_path):
    caption = {f"{name}.{field}": content for name in ("a/b.c/x", "a/b.c/y", "./z")
               for field, content in (("txt", b"red"), ("png", png(1)))}  # fmt: skip
    hidden = {".DS_Store": b"", "a/._x.png": b"", "__MACOSX.png": b"", "README": b"hello"}
    tar_of(tmp_path / "a.tar", hidden | caption)
    assert [sample.id for sample in read_samples(tmp_path / "a.tar")] == ["a/b.c/x", "a/b.c/y", "./z"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_webdataset_that_breaks_off_keeps_what_was_before(tmp_path, name):
    """Wherever it is cut, and where a header is damaged: then `tarfile` itself takes it for the end."""
    tar_of(tmp_path / "whole.tar", usual(3))
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = [member.offset for member in tar][2:]  # of the second record and the third
        starts = headers[::2]
        end = tar.offset
    cuts = [*headers, *(at + 100 for at in headers), *(at + 600 for at in headers)]
    variants = [(whole[:at], at) for at in cuts]
    variants += [(whole[:at] + b"damaged" + whole[at + 7 :], at) for at in headers]
    for content, at in variants:
        (tmp_path / name).write_bytes(gzip.compress(content) if name == "a.tar.gz" else content)
        *before, lost = read_samples(tmp_path / name)
        n_whole = 1 + sum(at >= start for start in [*starts, end][1:])
        n_read = sum(isinstance(sample, Sample) for sample in before)
        assert n_read == n_whole and len(before) <= n_whole + 1
        assert f"breaks off after {len(before)} records" in lost.error.reason
        assert lost.key == f"{name}#{len(before)}"


def test_a_caption_that_is_no_text_is_a_broken_record(tmp_path):
    rows = [
        {"id": str(number), "image": {"bytes": png(1)}, "caption": text}
        for number, text in enumerate(("a cat", None))
    ]
    as_parquet(tmp_path / "a", rows)
    first, second = read_samples(tmp_path / "a.parquet")
    assert answers(first) == ["a cat"]
    assert second.id == "1" and second.error.reason == "the field caption is empty"


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


def test_rows_ahead_of_the_damage_in_a_row_group_are_read_and_counted_once(tmp_path):
    """The fields of the last rows of a group of 40 are damaged."""
    path = tmp_path / "a.parquet"
    records = [record(number) | {"extra": f"{number:04d}" * 500} for number in range(60)]
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 2000, "write_batch_size": 1}
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=40, **options)
    content = bytearray(path.read_bytes())
    at = content.index(b"0036" * 500)
    content[at - 100 : at + 6000] = b"\xff" * 6100
    path.write_bytes(content)
    found = list(read_samples(path))
    assert [one.key for one in found] == [f"a.parquet#{number}" for number in range(60)]
    lost = [number for number, one in enumerate(found) if isinstance(one, BrokenRecord)]
    assert lost == list(range(lost[0], 40)) and 0 < lost[0] <= 36


def test_lines_that_are_not_wanted_are_not_decoded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n\n" + json.dumps(record(0, image="0.png")) + "\n")
    first, second = read_samples(path, wanted=lambda number: number == 1)
    assert first is None and second.key == "a.jsonl#1"
    assert isinstance(next(read_samples(path)), BrokenRecord)


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    as_parquet(tmp_path / "a", [record(0)])
    (tmp_path / "._a.parquet").write_bytes(b"of an archiver")
    assert [one.key for one in read_samples(tmp_path)] == ["a.parquet#0"]


def test_links_to_folders_are_followed_once_each(tmp_path):
    """Also by two names, in circles and to nothing. A folder within keeps its own name in keys."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "part1", data / ".store", other / "deep"):
        folder.mkdir(parents=True)
        as_parquet(folder / "a", [record(0)])
    for place, target in {
        data / "also": data / "part1", data / "part1" / "loop": data, data / "up": tmp_path,
        data / "part2": other, data / "part3": other, data / "part4": data / ".store", data / ".hidden": other,
        other / "back": data, other / "deep" / "up": other, other / "self": other / "self",
        data / "gone": tmp_path / "nowhere",
    }.items():  # fmt: skip
        place.symlink_to(target)
    keys = ["part1/a.parquet#0", "part2/deep/a.parquet#0", "part4/a.parquet#0"]
    (tmp_path / "by_link").symlink_to(data)
    for path in (data, tmp_path / "by_link"):
        assert [one.key for one in read_samples(path)] == keys and count_records(path) == 3
        assert data_fingerprint(path) == data_fingerprint(data)
        found = locate(path)
        left = [one.relative_to(path).as_posix() for one in found.unread]
        assert left[:2] == ["gone", "part2/self"]
        assert left[2:] == ["also", "part3", "up", "part1/loop", "part2/back", "part2/deep/up"]
        said = (
            f"{path}: 8 paths not read: gone (a link to nothing), part2/self (a link to nothing), also (read "
        )
        assert found.about_unread().startswith(said)
    before = data_fingerprint(data)
    as_parquet(other / "b", [record(1)])
    assert data_fingerprint(data) != before and count_records(data) == 4


def test_a_data_file_that_is_a_link_to_nothing_is_refused(tmp_path):
    as_parquet(tmp_path / "a", [record(0)])
    (tmp_path / "b.parquet").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b\.parquet is a link to nowhere, which is not there\. Restore it"):
        read_samples(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    as_parquet(tmp_path / "a", [record(0)])
    scan, access = os.scandir, os.access

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read it
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed" and access(path, mode))
    assert locate(tmp_path).about_unread() == f"{tmp_path}: 1 path not read: closed (cannot be read)"


def test_an_empty_folder_names_what_it_could_hold(tmp_path):
    with pytest.raises(DataError, match=r"no photographs and no data files.*\.parquet, \.arrow, \.tar"):
        list(read_samples(tmp_path))


@pytest.mark.parametrize("write", [as_parquet, as_arrow_file, *TARS])
def test_memory_does_not_grow_with_the_file(tmp_path, write):
    """100 MB of pictures pass through a few MB of Python objects."""
    filler = bytes(500_000)
    records = [record(number, image={"bytes": filler, "path": None}) for number in range(200)]
    write(tmp_path / "big", records)
    (path,) = tmp_path.glob("big.*")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        peak = max(pa.total_allocated_bytes() - before for _ in read_samples(path))
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert python < 30e6 and peak < 30e6


@pytest.mark.parametrize("space", ["", " " * (1 << 20)])
def test_what_follows_an_array_is_told(tmp_path, space):
    """Files that were joined end to end: the second array would be lost."""
    (tmp_path / "d.json").write_text(f'[{{"a": 1}}]{space}\n[{{"a": 2}}]')
    first, broken = read_rows(tmp_path / "d.json", format_of("d.json"))
    assert first.record == {"a": 1} and broken.number == 1
    assert broken.problem == """the JSON array ends after 1 records, but more follows ('[{"a": 2}]' ...)"""
    (tmp_path / "d.json").write_text(f'[{{"a": 1}}]{space}\n')
    assert [row.problem for row in read_rows(tmp_path / "d.json", format_of("d.json"))] == [None]
