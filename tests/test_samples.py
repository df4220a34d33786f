"""Readers: every record becomes a sample or a broken record that says which, why and what helps."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import tiny
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, features

from vig.data.images import open_image, open_images
from vig.data.locate import locate
from vig.data.printable import printable
from vig.data.records import sample_from_record
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, answers
from vig.data.samples import count_records, read_samples


def record(value="<image>\nWhat is it?", answer="A cat.", image="a.png", **fields):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "7", "image": image, "conversations": turns} | fields


def read(tmp_path, text: str, name="data.json", **options):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return list(read_samples(path, **options))


@pytest.mark.parametrize(
    "value, parts",
    [
        ("<image>\nWhat?", ["image", "What?"]),
        ("What?\n<image>", ["What?", "image"]),
        ("Look: <image> what?", ["Look: ", "image", " what?"]),
        ("<image>\n\nWhat?", ["image", "\nWhat?"]),
        ("No picture", ["No picture"]),
    ],
)
def test_the_image_mark_takes_the_newline_beside_it(value, parts):
    image = [tiny.picture(0)] if "image" in parts else []
    sample = sample_from_record(record(value, image=image), key="k")
    content = sample.messages[0]["content"]
    assert [part.get("text", part["type"]) for part in content] == parts


def test_two_marks_take_two_images_in_order():
    sample = sample_from_record(
        record("<image>\n<image>\nCompare.", image=[tiny.picture(0), tiny.picture(1)]), key="k"
    )
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "image", "text"]


def test_messages_format_and_content_parts(tmp_path):
    data = {
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    }
    (sample,) = read(tmp_path, json.dumps(data), "data.jsonl")
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert answers(sample) == ["A cat."]
    assert sample.id == sample.key == "data.jsonl#0"  # no id given: the key stands for it
    assert sample.images == ((tmp_path / "a.png").resolve(),)


def test_duplicate_ids_are_allowed_and_keys_are_unique(tmp_path):
    samples = read(tmp_path, json.dumps([record(), record(), record()]))
    assert [sample.id for sample in samples] == ["7"] * 3
    assert [sample.key for sample in samples] == ["data.json#0", "data.json#1", "data.json#2"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_an_array_is_read_item_by_item(tmp_path, chunk):
    from vig.data.json_rows import array_rows

    items = [{"a": [1, 2, {"b": "]},[ü😀"}]}, 12345, "x", [], None, {"n": -1.5e-3}]
    path = tmp_path / "array.json"
    path.write_text(json.dumps(items, indent=1, ensure_ascii=False), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        assert list(array_rows(file, chunk)) == items


@pytest.mark.parametrize(
    "broken, reason",
    [
        (record(image=None), "0 images but 1 <image> mark"),
        (record("What?"), "1 image but 0 <image> marks"),
        (record("<image><image>"), "1 image but 2 <image> marks"),
        (record(answer="  "), "an answer is empty"),
        (record(answer="see <image>", image=["a", "b"]), "an answer holds <image>"),
        (record(conversations=[{"from": "human", "value": "<image>"}]), "no answer turn"),
        (record(conversations=[{"from": "robot", "value": "<image>"}]), "unknown role 'robot'"),
        (record(conversations=[{"from": "gpt", "value": 3}]), "a assistant turn's value is int"),
        (record(conversations="hello"), "the turns are not a list"),
        (record(image="http://a/b.png"), "is a web address"),
        (record(image="../secret.png"), "leaves the image root"),
        (record(image=3), "an image is a int"),
        (
            record(answer="a \ud83d cat"),
            r"the assistant turn's value holds the lone surrogate '\ud83d' at character 2",
        ),
        (record(image="\ud83d.png"), r"the image path holds the lone surrogate '\ud83d' at character 0"),
        (record(image="a\0/b.png"), "holds a zero byte"),
        (
            {"id": "7", "messages": [{"role": "user", "content": [{"type": "text", "text": "\udcff"}]}]},
            "the text of a content part is not UTF-8 (byte 0 is 0xff)",
        ),
        ({"id": "7", "text": "hm"}, "no turns among the fields"),
        ("just text", "the record is a str"),
    ],
)
def test_a_broken_record_says_which_why_and_what_helps(tmp_path, broken, reason):
    good = record("Hello", image=None)
    first, second, third = read(tmp_path, json.dumps([good, broken, good]))
    assert isinstance(first, Sample) and isinstance(third, Sample)
    assert isinstance(second, BrokenRecord)
    assert second.key == "data.json#1" and reason in str(second.error)
    assert second.key in str(second.error) and second.error.cure in str(second.error)
    if isinstance(broken, dict):
        assert second.id == "7"


@pytest.mark.parametrize("link", ["a.png", "folder"])
def test_links_that_leave_the_image_root_are_refused_and_those_within_followed(tmp_path, monkeypatch, link):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "inner", outside):
        folder.mkdir(parents=True)
        tiny.save_picture(folder / "a.png", 1)
    (root / link).symlink_to(outside / "a.png" if link == "a.png" else outside)
    name = "a.png" if link == "a.png" else "folder/a.png"
    for _ in range(2):  # a folder seen before is no other
        with pytest.raises(SampleError, match=r"leaves the image root .* by a link, to .*VIG_FOLLOW_LINKS=1"):
            sample_from_record(record(image=name), key="k", image_root=root)
    (tmp_path / "root_by_link").symlink_to(root)
    for value in ("1", "0", "no"):
        monkeypatch.setenv("VIG_FOLLOW_LINKS", value)
        for given, path in (
            (root, name),
            (tmp_path / "root_by_link", name),
            (tmp_path / "root_by_link", str(tmp_path / "root_by_link" / name)),
            (tmp_path / "root_by_link", str(root / name)),
        ):
            if value == "1":
                sample = sample_from_record(record(image=path), key="k", image_root=given)
                assert sample.images == ((outside / "a.png").resolve(),)
                continue
            with pytest.raises(SampleError, match="by a link, to"):
                sample_from_record(record(image=path), key="k", image_root=given)
    monkeypatch.setenv("VIG_FOLLOW_LINKS", "1")
    for name in ("inner/../../outside/a.png", str(outside / "a.png"), "../outside/a.png", "inner/../.."):
        with pytest.raises(SampleError, match="leaves the image root"):
            sample_from_record(record(image=name), key="k", image_root=root)
    (root / "again.png").symlink_to(root / "inner" / "a.png")
    for name in ("again.png", "inner/a.png", "./inner/../inner/a.png", str(root / "inner" / "a.png")):
        sample = sample_from_record(record(image=name), key="k", image_root=root)
        assert sample.images == ((root / "inner" / "a.png").resolve(),)


@pytest.mark.parametrize("below", ["", "images"])
def test_files_of_a_hub_cache_are_links_to_its_blobs_and_read(tmp_path, below):
    """`huggingface_hub.snapshot_download` lays a repository out like this."""
    repository = tmp_path / "datasets--who--what"
    snapshot = repository / "snapshots" / "0123abcd"
    (snapshot / "images").mkdir(parents=True)
    (repository / "blobs").mkdir()
    tiny.save_picture(repository / "blobs" / "a.png", 1)
    (repository / "blobs" / "a.png").rename(repository / "blobs" / "5e1f")
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/5e1f")
    (snapshot / "images" / "out.png").symlink_to("../../../../outside.png")
    (tmp_path / "outside.png").write_bytes(b"")
    name = "a.png" if below else "images/a.png"
    (snapshot / "data.json").write_text(json.dumps([record(image=name)]))
    [sample] = read_samples(snapshot / "data.json", image_root=snapshot / below)
    assert sample.images == ((repository / "blobs" / "5e1f").resolve(),)
    assert open_images(sample)[0].size == tiny.picture(1).size
    for above, name in ((repository, "snapshots/0123abcd/"), (repository / "snapshots", "0123abcd/")):
        sample = sample_from_record(record(image=f"{name}images/a.png"), key="k", image_root=above)
        assert open_images(sample)[0].size == tiny.picture(1).size
    for name in ("images/out.png", "../../../outside.png", "../../refs", "../../blobs/5e1f"):
        with pytest.raises(SampleError, match="leaves the image root"):
            sample_from_record(record(image=name), key="k", image_root=snapshot)
    (snapshot / "other").mkdir()
    with pytest.raises(SampleError, match="leaves the image root"):  # as it would in any other folder
        sample_from_record(record(image="../images/a.png"), key="k", image_root=snapshot / "other")


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_pictures_stand_upright(tmp_path, orientation, name):
    """As `datasets` and transformers show them, whose trainers may train on what is scored here."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    tiny.picture(3, (40, 24)).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
        for source in (tmp_path / name, (tmp_path / name).read_bytes(), opened):
            image = open_image(source, "k", "i")
            assert image.size == upright.size and image.tobytes() == upright.tobytes()


def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path):
    plain = tiny.picture(3, (40, 24))
    plain.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", quality=95)
    plain.save(tmp_path / "b.jpg", quality=95)
    one, other = (open_image(tmp_path / name, "k", "i").tobytes() for name in ("a.jpg", "b.jpg"))
    assert one == other


def test_a_pipe_is_not_waited_for_and_pictures_written_as_text_make_short_messages(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(SampleError, match=r"is not a file\. Replace or remove it"):
            open_image(path, "k", "i")
    text = "A" * 100_000
    with pytest.raises(SampleError, match=r"AAA... \(100,\d+ characters\) is a web address") as raised:
        sample_from_record(record(image=f"https://a.b/{text}"), key="k", image_root=tmp_path)
    assert len(str(raised.value)) < 300
    assert len(str(SampleError("k", text, "no turns", "Write some"))) < 300
    sample = sample_from_record(record(image=text), key="k", image_root=tmp_path)
    with pytest.raises(SampleError, match=r"characters\) cannot be decoded \(File name too long\)") as raised:
        open_image(sample.images[0], "k", "i")
    assert len(str(raised.value)) < 300


def test_files_of_the_system_among_photographs_are_none(tmp_path):
    tiny.save_picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("a ball")
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    (only,) = read_samples(tmp_path)
    assert only.id == "a.png" and count_records(tmp_path) == 1


def test_blank_lines_are_no_records_and_take_no_number(tmp_path):
    lines = ["", json.dumps(record()), " ", json.dumps(record()), ""]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert [one.key for one in read_samples(tmp_path / "d.jsonl")] == ["d.jsonl#0", "d.jsonl#1"]
    second = read_samples(tmp_path / "d.jsonl", wanted=lambda number: number == 1)
    assert [one and one.key for one in second] == [None, "d.jsonl#1"]


def test_an_invalid_json_line_is_reported_and_the_rest_is_read(tmp_path):
    good = json.dumps(record("Hello", image=None))
    first, second, third = read(tmp_path, f"{good}\n{{'id': 3}}\n\n{good}\n", "data.jsonl")
    assert isinstance(first, Sample) and isinstance(third, Sample)
    assert "line 2 is not JSON" in str(second.error) and third.key == "data.jsonl#2"


def test_an_id_that_no_file_takes_is_refused_and_told_with_escapes(tmp_path):
    broken, good = read(tmp_path, json.dumps([record(id="x\ud83d"), record("Hello", image=None)]))
    assert isinstance(good, Sample)
    assert r"the id holds the lone surrogate '\ud83d'" in broken.error.reason
    assert broken.id == r"x\ud83d" and str(broken.error).encode()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names only")
def test_a_file_whose_name_is_not_utf_8_has_keys_that_can_be_written(tmp_path):
    (sample,) = read(tmp_path, json.dumps([record("Hello", image=None)]), "caf\udce9.json")
    assert sample.key == r"caf\udce9.json#0" and sample.source == r"caf\udce9.json"


def test_a_line_that_is_not_utf_8_is_a_broken_record(tmp_path):
    good = json.dumps(record("Hello", image=None))
    latin = good.replace("A cat.", "A café.").encode("latin-1")
    (tmp_path / "data.jsonl").write_bytes(b"\n".join([good.encode(), latin, good.encode()]))
    first, second, third = read_samples(tmp_path / "data.jsonl")
    assert isinstance(first, Sample) and isinstance(third, Sample)
    assert second.error.reason == "the assistant turn's value is not UTF-8 (byte 5 is 0xe9)"
    assert second.error.cure == "Save it as UTF-8: iconv -f LATIN1 -t UTF-8 OLD > NEW"


@pytest.mark.parametrize("header", ["image,question,answer", "image,question,r\xe9ponse"])
def test_a_csv_file_that_is_not_utf_8_is_told_so(tmp_path, header):
    (tmp_path / "data.csv").write_bytes(f"{header}\n,What?,caf\xe9\n".encode("latin-1"))
    (broken,) = read_samples(tmp_path / "data.csv")
    assert "is not UTF-8 (byte " in broken.error.reason and "iconv -f LATIN1" in broken.error.cure
    (tmp_path / "data.csv").write_bytes(header.encode("utf-16"))
    with pytest.raises(DataError, match=r"is UTF-16 or UTF-32, expected UTF-8. .* iconv -f UTF-16"):
        list(read_samples(tmp_path / "data.csv"))


LONG = '{"id": ' + "1" * 5000 + "}"  # more digits than Python makes an integer of
DEEP = '{"a": ' + "[" * 100_000


@pytest.mark.parametrize("line, reason", [(LONG, "4300 digits"), (DEEP, "nested too deeply")])
def test_a_line_that_python_refuses_to_decode_is_a_broken_record(tmp_path, line, reason):
    good = json.dumps(record("Hello", image=None))
    first, second, third = read(tmp_path, f"{good}\n{line}\n{good}\n", "data.jsonl")
    assert isinstance(first, Sample) and isinstance(third, Sample) and third.key == "data.jsonl#2"
    assert "line 2 cannot be decoded" in second.error.reason and reason in second.error.reason


def test_an_item_of_an_array_that_python_refuses_to_decode_is_a_broken_record(tmp_path):
    good = json.dumps(record("Hello", image=None))
    first, second, third = read(tmp_path, f"[{good}, {LONG}, {good}]")
    assert isinstance(first, Sample) and isinstance(third, Sample) and third.key == "data.json#2"
    assert "the record cannot be decoded" in second.error.reason and "4300 digits" in second.error.reason
    first, second = read(tmp_path, f"[{good}, {DEEP}")
    assert isinstance(first, Sample) and "nested too deeply" in second.error.reason


def test_an_array_that_breaks_off_keeps_what_was_before(tmp_path):
    good = json.dumps(record("Hello", image=None))
    first, second = read(tmp_path, f"[{good}, {good[:-9]}")
    assert isinstance(first, Sample) and "breaks off after 1 records" in str(second.error)


def test_data_that_cannot_be_read_at_all(tmp_path):
    with pytest.raises(DataError, match="no such data"):
        read_samples(tmp_path / "none.json")
    (tmp_path / "data.docx").write_text("a,b")
    with pytest.raises(DataError, match=r"got '\.docx'"):
        read_samples(tmp_path / "data.docx")
    with pytest.raises(DataError, match="no such image root"):
        read(tmp_path, "[]", image_root=tmp_path / "nowhere")


def test_a_folder_of_photographs(tmp_path):
    tiny.save_picture(tmp_path / "b.png", 1)
    tiny.save_picture(tmp_path / "a.jpg", 2)
    (tmp_path / "a.txt").write_text("Squares of colour.\n")
    captioned, bare = read_samples(tmp_path)
    assert answers(captioned) == ["Squares of colour."] and captioned.id == "a.jpg"
    assert isinstance(bare, BrokenRecord) and "b.txt" in bare.error.cure


def test_photographs_behind_a_link_to_a_folder(tmp_path, monkeypatch):
    """Counted and read; as everywhere, a link that leaves the folder has to be allowed."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "in", other):
        folder.mkdir(parents=True)
        tiny.save_picture(folder / "a.png", 1)
        (folder / "a.txt").write_text("red")
    (data / "out").symlink_to(other)
    (data / "same").symlink_to("in")
    assert count_records(data) == 2 and locate(data).unread == (data / "same",)
    inner, outer = read_samples(data)
    assert inner.key == "data#in/a.png" and outer.key == "data#out/a.png"
    assert "set VIG_FOLLOW_LINKS=1" in str(outer.error)
    monkeypatch.setenv("VIG_FOLLOW_LINKS", "1")
    _, outer = read_samples(data)
    assert outer.images == ((other / "a.png").resolve(),) and answers(outer) == ["red"]


def test_a_caption_that_is_not_utf_8_is_a_broken_record_that_names_its_file(tmp_path):
    for name, caption in [("a", b"red"), ("b", "caf\xe9".encode("latin-1")), ("c", "\ufeffred".encode())]:
        tiny.save_picture(tmp_path / f"{name}.png", 1)
        (tmp_path / f"{name}.txt").write_bytes(caption)
    first, second, third = read_samples(tmp_path)
    assert answers(first) == answers(third) == ["red"]
    assert f"the caption {tmp_path / 'b.txt'} is not UTF-8 (byte 3 is 0xe9)" in second.error.reason


def png_bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    tiny.picture(3, (200, 200)).save(file, "JPEG")
    return file.getvalue()[:1200]


def damaged_dds() -> bytes:
    """Of a pixel format that Pillow knows no decoder for: it raises NotImplementedError."""
    file = io.BytesIO()
    tiny.picture(3).save(file, "DDS")
    content = bytearray(file.getvalue())
    content[80:88] = struct.pack("<I4s", 4, b"ABCD")
    return bytes(content)


def damaged_avif() -> bytes:
    """Pillow raises RuntimeError."""
    file = io.BytesIO()
    tiny.picture(3, (64, 64)).save(file, "AVIF")
    content = file.getvalue()
    at = content.index(b"mdat") + 8
    return content[:at] + b"\xff" * (len(content) - at)


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no image at"),
        (b"hello, I am text", "is not an image"),
        (truncated_jpeg(), "cannot be decoded"),
        (png_bomb(), "is too large"),
        (damaged_dds(), "cannot be decoded"),
        pytest.param(
            damaged_avif() if features.check("avif") else None,
            "cannot be decoded",
            marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"),
        ),
    ],
    ids=["missing", "text", "truncated", "bomb", "dds", "avif"],
)
def test_images_that_cannot_be_read(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    sample = sample_from_record(record(image="a.jpg"), key="data.json#3", image_root=tmp_path)
    with pytest.raises(SampleError, match=reason) as error:
        open_images(sample)
    assert "data.json#3" in str(error.value) and "a.jpg" in str(error.value)


def test_errors_hold_nothing_that_steers_a_terminal(tmp_path):
    written = record(id="\x1b[31mred", image="\x1b]0;title\x07\x9b2J.png")
    sample = sample_from_record(written, key="\x1b[2J.json#0", image_root=tmp_path)
    with pytest.raises(SampleError, match=r"\\x1b\]0;title\\x07\\x9b2J\.png") as error:
        open_images(sample)
    said = str(error.value) + error.value.reason
    assert not [sign for sign in said if not sign.isprintable()]
    assert error.value.key == "\x1b[2J.json#0", "by which the sample is found again"
    assert printable("two\nlines\tand an é") == "two\nlines\tand an é"


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would start Ghostscript on it."""
    ran, ghostscript = tmp_path / "ran", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\n: > {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for once
    sample = sample_from_record(record(image={"bytes": encoded(tiny.picture(3), "EPS")}), key="k")
    with pytest.raises(SampleError, match=r"is EPS, which another program.*Convert it to PNG"):
        open_images(sample)
    assert not ran.exists()


def test_the_most_pixels_are_those_of_the_whole_image():
    sample = sample_from_record(record(image={"bytes": encoded(tiny.picture(3, (40, 30)), "PNG")}), key="k")
    assert open_images(sample, max_pixels=1200)[0].size == (40, 30)
    with pytest.raises(SampleError, match=r"40 x 30 pixels.*Shrink it below 1,199 pixels"):
        open_images(sample, max_pixels=1199)


def test_the_cure_of_too_large_a_file_names_the_limit_that_it_met():
    header = b"IHDR" + struct.pack(">IIBBBBB", 15000, 12000, 8, 2, 0, 0, 0)  # 180 million pixels
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    sample = sample_from_record(record(image={"bytes": png}), key="k")
    with pytest.raises(SampleError, match=r"limit of 178956970 pixels.*Shrink it below 178,956,970 pixels"):
        open_images(sample)


def test_images_as_bytes_and_with_transparency():
    file = io.BytesIO()
    tiny.picture(3).convert("RGBA").save(file, "PNG")
    sample = sample_from_record(record(image={"bytes": file.getvalue()}), key="k")
    (image,) = open_images(sample)
    assert image.mode == "RGB" and image.size == tiny.picture(3).size


GRADIENT = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def opened(image) -> Image.Image:
    return open_images(sample_from_record(record(image=[image]), key="data.json#3"))[0]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize(
    "made",
    [lambda image: image, lambda image: encoded(image, "PNG"), lambda image: encoded(image, "TIFF")],
    ids=["PIL", "PNG", "TIFF"],
)
def test_16_bits_become_8_by_scaling(made, order):
    values = GRADIENT.astype(order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (64, 64), values.tobytes())
    shown = np.asarray(opened(made(image)))
    expected = np.rint(values / 257)
    assert shown.shape == (64, 64, 3) and 126 < shown.mean() < 129
    for channel in range(3):
        assert (shown[..., channel] == expected).all()


def test_a_16_bit_png_that_opens_in_mode_i_is_one_too():
    """As it does in some versions of Pillow."""
    image = Image.fromarray(GRADIENT.astype(np.int32))
    image.format = "PNG"
    assert (np.asarray(opened(image))[..., 0] == np.rint(GRADIENT.astype(np.int32) / 257)).all()


@pytest.mark.parametrize(
    "mode, values, said",
    [
        ("F", (GRADIENT / 65535).astype(np.float32), "mode F, from 0 to 1"),
        ("I", GRADIENT.astype(np.int32), "mode I, from 0 to 65535"),
    ],
)
@pytest.mark.parametrize(
    "made", [lambda image: image, lambda image: encoded(image, "TIFF")], ids=["PIL", "TIFF"]
)
def test_pixels_whose_range_is_not_known_are_refused(made, mode, values, said):
    image = Image.fromarray(values)
    assert image.mode == mode
    with pytest.raises(SampleError, match=rf"data\.json#3 .*{said}\. Convert it to 8-bit RGB"):
        opened(made(image))


def test_a_picture_opened_by_the_caller_that_cannot_be_decoded_is_a_sample_error():
    with pytest.raises(SampleError, match="the image of 200 x 200 pixels cannot be decoded"):
        opened(Image.open(io.BytesIO(truncated_jpeg())))


def test_the_source_is_what_the_record_says(tmp_path):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this."}]
    texts = [{"user": "what?", "assistant": "this.", "source": "vqa"}]
    records = [
        {"id": "1", "source": "gqa", "conversations": turns},
        {"id": "2", "conversations": turns},
        {"id": "3", "texts": texts},
        {"id": "4", "texts": [*texts, texts[0] | {"source": "ocr"}]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    assert [sample.source for sample in read_samples(path)] == ["gqa", "data.json", "vqa", "data.json"]
