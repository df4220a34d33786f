"""Data as people have it: each small input of cases_data gives samples with what it says, or an error that helps."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from vig.data.images import open_images
from vig.data.locate import locate, split_of
from vig.data.reading import Reading, parse_names
from vig.data.records import check_sample, sample_from_record
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, answers, text_of
from vig.data.samples import count_records, read_samples
from vig.models.prompts import Encoder

CASES = Path(__file__).parent / "cases_data"


def only(*arguments, **options) -> Sample:
    (sample,) = read_samples(*arguments, **options)
    assert isinstance(sample, Sample), sample
    return sample


def shape(sample: Sample) -> list[list[str]]:
    """Role, then each part: its text, or "[image]"."""
    return [
        [message["role"], *(part.get("text", "[image]") for part in message["content"])]
        for message in sample.messages
    ]


# --- the cases ---


@pytest.mark.parametrize(
    "name, turns",
    [
        ("hf_inline_image.json", [["user", "[image]", "q"], ["assistant", "A cat"]]),
        ("openai_image_url.json", [["user", "[image]", "q"], ["assistant", "A cat"]]),
        ("trl_no_mark.json", [["user", "[image]", "What color?"], ["assistant", "Blue"]]),
        ("trl_prompt_completion.json", [["user", "[image]", "What color?"], ["assistant", "Blue"]]),
        ("pretty_dict.json", [["user", "[image]", "What color?"], ["assistant", "Blue"]]),
        ("onepretty.json", [["user", "[image]", "What?"], ["assistant", "A player."]]),
        ("UP.JSON", [["user", "[image]", "What?"], ["assistant", "A player."]]),
        ("x.ndjson", [["user", "[image]", "What?"], ["assistant", "A player."]]),
        ("z.jsonl.gz", [["user", "[image]", "What?"], ["assistant", "A player."]]),
        ("qwenvl_img_tag.json", [["user", "Picture 1: ", "[image]", "\nWhat?"], ["assistant", "A player."]]),
        ("two_text_parts.json", [["user", "[image]", "q"], ["assistant", "A cat"]]),
    ],
)
def test_a_record_with_one_image(name, turns):
    sample = only(CASES / name)
    assert shape(sample) == turns
    assert open_images(sample)[0].size == (64, 48) or open_images(sample)[0].width > 1
    assert sample.images == ((CASES / "ok.jpg").resolve(),)
    assert count_records(CASES / name) == 1


def test_a_system_field_is_the_system_turn():
    first, second = read_samples(CASES / "sharegpt_system_field.json")
    assert shape(first) == [["system", "Answer like a pirate."], *shape(second)]


def test_turns_without_loss_are_no_answers():
    sample = only(CASES / "swift_loss_false.json")
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 2
    assert answers(sample) == ["A cat"]


@pytest.mark.parametrize(
    "name, medium",
    [
        ("audio_llamafactory.json", "audio"),
        ("video_llamafactory.json", "video"),
        ("video_plus_image.json", "video"),
    ],
)
def test_videos_and_sound_are_refused(name, medium):
    (broken,) = read_samples(CASES / name)
    assert isinstance(broken, BrokenRecord)
    assert f"the field {medium}s holds {medium}" in str(broken.error) and "Only images are scored" in str(
        broken.error
    )


def test_utf_16_is_a_stop_that_says_how_to_make_utf_8_of_it():
    with pytest.raises(DataError, match=r"utf16\.json is UTF-16.*iconv -f UTF-16 -t UTF-8"):
        list(read_samples(CASES / "utf16.json"))


@pytest.mark.parametrize(
    "folder, keys, answer",
    [
        ("ext", ["UP.JPG", "a.avif", "ok.jpg", "z.jfif"], "cap"),
        ("nested", ["y.jpg", "a/x.jpg"], "A player"),
    ],
)
def test_folders_of_photographs(folder, keys, answer):
    samples = list(read_samples(CASES / "folders" / folder))
    assert [sample.key for sample in samples] == [f"{folder}#{key}" for key in keys]
    assert all(answers(sample) == [answer] and open_images(sample)[0].width > 1 for sample in samples)
    assert count_records(CASES / "folders" / folder) == len(keys)


@pytest.mark.parametrize("folder", ["jsonls", "jsonls_only"])
def test_folders_of_json_lines(folder):
    first, second = read_samples(CASES / "folders" / folder)
    assert (first.key, second.key) == ("train-00000.jsonl#0", "train-00001.jsonl#0")
    assert locate(CASES / "folders" / folder).unread == ()


def test_an_imagefolder():
    sample = only(CASES / "folders" / "imgfolder")
    assert shape(sample)[1] == ["assistant", "A player."] and shape(sample)[0][1] == "[image]"
    assert open_images(sample)[0].width > 1


def test_a_folder_of_several_kinds_is_a_stop_that_names_them():
    with pytest.raises(DataError) as error:
        read_samples(CASES / "folders" / "mix")
    said = str(error.value)
    assert "1 Parquet file (2 rows)" in said and "1 WebDataset file" in said and "1 image" in said
    assert "Give one of them, such as" in said and str(CASES / "folders" / "mix" / "a.parquet") in said


def test_a_folder_of_several_splits_asks_for_one():
    folder = CASES / "folders" / "splits"
    with pytest.raises(DataError, match=r"several splits: test, train, validation\. .* --split"):
        read_samples(folder)
    assert count_records(folder, "validation") == 1
    sample = only(folder, split="train")
    assert sample.key == "data/train-00000-of-00001.parquet#0"
    with pytest.raises(DataError, match=r"no split 'dev'\. It holds test, train, validation"):
        read_samples(folder, split="dev")


# images, turns and answer tokens of each sample; a token a byte, and one for the end of a turn
COUNTS = {
    "hf_inline_image.json": [(1, 2, 6)],
    "openai_image_url.json": [(1, 2, 6)],
    "trl_no_mark.json": [(1, 2, 5)],
    "trl_prompt_completion.json": [(1, 2, 5)],
    "pretty_dict.json": [(1, 2, 5)],
    "onepretty.json": [(1, 2, 10)],
    "UP.JSON": [(1, 2, 10)],
    "x.ndjson": [(1, 2, 10)],
    "z.jsonl.gz": [(1, 2, 10)],
    "qwenvl_img_tag.json": [(1, 2, 10)],
    "two_text_parts.json": [(1, 2, 6)],
    "sharegpt_system_field.json": [(1, 3, 6), (1, 2, 6)],
    "swift_loss_false.json": [(1, 4, 6)],
    "llava15_template.json": [(1, 2, 4), (1, 4, 8)],
    "folders/ext": [(1, 2, 4)] * 4,
    "folders/nested": [(1, 2, 9)] * 2,
    "folders/jsonls": [(1, 2, 10)] * 2,
    "folders/jsonls_only": [(1, 2, 10)] * 2,
    "folders/imgfolder": [(1, 2, 10)],
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_images_turns_and_answer_tokens(name, relative, monkeypatch):
    monkeypatch.chdir(CASES.parent)
    root = CASES if name == "folders/jsonls_only" else None  # its photograph lies elsewhere
    samples = list(read_samples(Path(CASES.name, name) if relative else CASES / name, image_root=root))
    encoder = Encoder(tiny.llava_processor())
    found = [(len(one.images), len(one.messages), len(encoder.encode(one).answer_index)) for one in samples]
    assert found == COUNTS[name]


# --- more of each kind ---


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    tiny.picture(number).save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "value",
    [
        {"type": "image", "image": BASE64},
        {"type": "image", "image": f"data:image/png;base64,{BASE64}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "path": "0.png"},
        {"type": "image", "url": "0.png"},
        {"type": "image", "image": {"bytes": None, "path": "0.png"}},
        {"type": "image", "image": {"bytes": png(), "path": "elsewhere.png"}},
        {"type": "image", "image": png()},
        {"type": "image", "image": tiny.picture(0)},
        {"image": "0.png"},
    ],
)
def test_images_within_the_parts(tmp_path, value):
    (tmp_path / "0.png").write_bytes(png())
    messages = [
        {"role": "user", "content": [value, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "red"},
    ]
    sample = sample_from_record({"messages": messages}, key="k", image_root=tmp_path)
    assert shape(sample)[0] == ["user", "[image]", "What?"]
    assert open_images(sample)[0].tobytes() == tiny.picture(0).tobytes()


def test_file_addresses_and_columns_that_hold_json(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    turns = json.dumps([{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}])
    for images in (f"file://{tmp_path}/a%20b.png", '["a b.png"]', ["a b.png"]):
        record = {"images": images, "conversations": turns}
        sample = sample_from_record(record, key="k", image_root=tmp_path)
        assert sample.images == ((tmp_path / "a b.png").resolve(),)
        assert shape(sample) == [["user", "[image]", "What?"], ["assistant", "red"]]


def test_images_of_parts_and_of_the_column_stand_in_their_order(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    sample = sample_from_record({"images": ["b.png"], "messages": messages}, key="k", image_root=tmp_path)
    assert [path.name for path in sample.images] == ["a.png", "b.png"]
    marks = [{"role": "user", "content": [{"type": "text", "text": "<image>What?"}]}, messages[1]]
    sample = sample_from_record({"images": ["b.png"], "messages": marks}, key="k", image_root=tmp_path)
    assert shape(sample)[0] == ["user", "[image]", "What?"]


@pytest.mark.parametrize(
    "record, turns",
    [
        ({"prompt": "Q?", "completion": "A."}, [["user", "[image]", "Q?"], ["assistant", "A."]]),
        ({"query": "<image>Q?", "response": "A."}, [["user", "[image]", "Q?"], ["assistant", "A."]]),
        (
            {"query": "Q?", "response": "A.", "history": [["<image>P?", "B."]], "system": "S."},
            [["system", "S."], ["user", "[image]", "P?"], ["assistant", "B."], ["user", "Q?"], ["assistant", "A."]],
        ),
        ({"question": "Q?", "answer": "A."}, [["user", "[image]", "Q?"], ["assistant", "A."]]),
        (
            {"instruction": "Q?", "input": "more", "output": "A."},
            [["user", "[image]", "Q?\nmore"], ["assistant", "A."]],
        ),
        (
            {"texts": [{"user": "Q?", "assistant": "A."}, {"user": "R?", "assistant": "B.", "source": "x"}]},
            [["user", "[image]", "Q?"], ["assistant", "A."], ["user", "R?"], ["assistant", "B."]],
        ),
        ({"caption": "A cat."}, [["user", "[image]", "Describe the image."], ["assistant", "A cat."]]),
        ({"text": "A cat."}, [["user", "[image]", "Describe the image."], ["assistant", "A cat."]]),
        (
            {"captions": ["A cat.", "A chair."]},
            [
                ["user", "[image]", "Describe the image."],
                ["assistant", "A cat."],
                ["user", "Describe the image."],
                ["assistant", "A chair."],
            ],
        ),
        (
            {"conversations": [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]},
            [["user", "[image]", "Q?"], ["assistant", "A."]],
        ),
        (
            {"messages": [{"from": "Human", "value": "<image>Q?"}, {"from": "bot", "value": "A."}]},
            [["user", "[image]", "Q?"], ["assistant", "A."]],
        ),
        (
            {"messages": [
                {"role": "user", "content": "Q?", "images": ["a.png"]},
                {"role": "assistant", "content": "A."},
             ],
             "images": None},
            [["user", "[image]", "Q?"], ["assistant", "A."]],
        ),
    ],
)  # fmt: skip
def test_every_form_of_record(record, turns):
    sample = sample_from_record({"images": ["a.png"]} | record, key="k")
    assert shape(sample) == turns and len(sample.images) == 1
    check_sample(sample)


def test_only_the_completion_is_an_answer():
    prompt = [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "draft"},
        {"role": "user", "content": "again"},
    ]
    sample = sample_from_record({"prompt": prompt, "completion": "A."}, key="k")
    assert answers(sample) == ["A."] and text_of(sample.messages[1]) == "draft"


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": False}])
def test_a_record_without_a_trained_answer_is_refused(mark):
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."} | mark]
    with pytest.raises(SampleError, match="no answer is trained"):
        sample_from_record({"messages": turns}, key="k")
    turns += [
        {"role": "user", "content": "R?"},
        {"role": "assistant", "content": "B.", "loss": None, "weight": 1},
    ]
    assert answers(sample_from_record({"messages": turns}, key="k")) == ["B."]


TURNS = {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}
ASKED = {"question": "Q?", "answer": "A."}


@pytest.mark.parametrize(
    "record, reason, cure",
    [
        (ASKED | {"image": "https://a.b/c.jpg"}, "is a web address", "Download it first"),
        (ASKED | {"image": "data:image/png;base64,@@"}, "is not base64", "in base64"),
        (TURNS | {"img": "a.jpg"}, "the field img seems to hold images (a.jpg)", "--columns images=img"),
        (TURNS | {"photos": ["a.PNG"]}, "the field photos seems to hold images", "--columns images=photos"),
        (TURNS | {"left": {"bytes": b"x", "path": None}}, "the field left seems to hold images", "ignore=left"),
        (TURNS | {"coco_url": "http://a.b/c.jpg"}, "the field coco_url seems to hold images", "ignore=coco_url"),
        (TURNS | {"video": "a.mp4"}, "the field video holds video", "Only images are scored"),
        (TURNS | {"audios": ["a.mp3"]}, "the field audios holds audio", "Only images are scored"),
        (TURNS | {"tools": "no JSON"}, "the tools are text, but not JSON", "JSON"),
        (TURNS | {"messages": [{}]}, "both conversations and messages", "--columns ignore=messages"),
        (TURNS | {"image": "a.jpg", "images": ["b.jpg"]}, "images in the fields images and image", "ignore=image"),
        ({"messages": [{"role": "user", "content": "a <video> of it"}]}, "the mark <video> of video", "Only images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            "a content part is video",
            "Only images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<audio>"}]}]},
            "the mark <audio> of audio",
            "Only images",
        ),
        (
            {"messages": [{"role": "user", "content": "Q?", "videos": ["a.mp4"]}]},
            "the field videos of a turn holds video",
            "Only images",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            "calls tools in the field tool_calls",
            "Write the call as the text",
        ),
        (ASKED | {"choices": ["a", "b"]}, "the question has the fields choices", "--columns ignore=choices"),
        (ASKED | {"A": "x", "B": "y"}, "the question has the fields A, B", "Write what they hold into the question"),
        (ASKED | {"answer": 3}, "a assistant turn's content is int", "Give text"),
        (
            {"system": "S", "messages": [{"role": "system", "content": "T"}, *TURNS["conversations"]]},
            "a system turn and another text in the field system",
            "Leave one",
        ),
        (
            {"messages": [{"role": "user", "content": "<bbox>?"}, {"role": "assistant", "content": "A"}],
             "objects": {"bbox": [[1, 2, 3, 4]]}},
            "the field objects, which is not read",
            "Write it out",
        ),
        ({"conversations": "[{'from': 1}]"}, "the turns are text, but not JSON", "JSON"),
        ({"captions": []}, "the captions is an empty list", "remove the record"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(record, reason, cure):
    with pytest.raises(SampleError) as error:
        sample_from_record(record, key="k")
    assert reason in error.value.reason and cure in error.value.cure
    assert len(str(error.value)) < 700


def test_three_image_fields_that_differ_are_refused_together(monkeypatch):
    monkeypatch.setattr("vig.data.records.IMAGE_FIELDS", ("images", "image", "input"))
    record = {
        "question": "<image>Q?",
        "answer": "A.",
        "images": ["a.jpg"],
        "image": "a.jpg",
        "input": "b.jpg",
    }
    with pytest.raises(SampleError, match="in the fields images and image and input"):
        sample_from_record(record, key="k")
    sample = sample_from_record(record | {"input": "a.jpg"}, key="k")
    assert len(sample.images) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"video": None, "videos": [], "audios": "", "tools": [], "audio": [None]},
        {"source": "vqa/a.jpg", "topic": "cats", "score": 3, "meta": {"a": 1}},
        {"image": "a.jpg", "url": "http://a.b/c.jpg", "conversations": [
            {"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A."}]},
    ],
)  # fmt: skip
def test_empty_fields_and_what_surrounds_a_sample_are_no_reason_to_refuse_it(more):
    assert answers(sample_from_record(TURNS | more, key="k")) == ["A."]


def test_tools_are_kept_for_the_template():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        assert sample_from_record(TURNS | {"tools": given}, key="k").tools == tuple(tools)


# --- other names ---


def test_columns_and_roles_by_other_names(tmp_path):
    record = {
        "conv": [{"role": "client", "content": "<image>Q?"}, {"role": "helper", "content": "A."}],
        "pics": ["a.png"],
        "mask": "m.png",
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    columns = parse_names(["messages=conv,images=pics", "ignore=mask"], "--columns")
    roles = {"user": "client", "assistant": ["helper", "bot"]}
    sample = only(tmp_path / "d.json", columns=columns, roles=roles)
    assert shape(sample) == [["user", "[image]", "Q?"], ["assistant", "A."]] and len(sample.images) == 1
    (broken,) = read_samples(tmp_path / "d.json", columns=columns)
    assert "unknown role 'client'" in str(broken.error) and "--roles assistant=client" in str(broken.error)
    with pytest.raises(ValueError, match="columns: 'turns' is none of id, images"):
        read_samples(tmp_path / "d.json", columns={"turns": "conv"})
    with pytest.raises(ValueError, match="roles: 'robot' is none of assistant"):
        read_samples(tmp_path / "d.json", roles={"robot": "r"})
    with pytest.raises(ValueError, match=r"--columns 'messages', expected OURS=THEIRS"):
        parse_names(["messages"], "--columns")


BOTH = {"question": "Q?", "answer": "SHORT", "long": "LONG"}


@pytest.mark.parametrize(
    ("columns", "record", "read"),
    [
        ({"answer": "long"}, BOTH, "LONG"),
        ({"answer": "long"}, {"question": "Q?", "answer": "SHORT"}, "SHORT"),
        ({"answer": ["long", "other"]}, BOTH | {"other": None}, "LONG"),
        ({"answer": ["long", "other"]}, BOTH | {"other": "LONG"}, "LONG"),
        ({"question": "answer", "answer": "question"}, BOTH, "Q?"),
        ({"answer": "long", "ignore": "answer"}, BOTH, "LONG"),
        ({"id": "long", "answer": "long"}, None, "columns: 'long' is given for id and for answer. Give it once"),
        ({"answer": "long"}, BOTH | {"long": ""}, "the field long is empty, which --columns reads as answer"),
        ({"answer": ["long", "answer"]}, BOTH, "the fields long and answer differ, and --columns reads both as answer"),
        ({"question": "q", "answer": "long"}, BOTH | TURNS | {"q": "?"}, "--columns question=q is not read, since"),
        ({"answer": "gone"}, BOTH | TURNS, "A."),
    ],
)  # fmt: skip
def test_a_mapped_name_wins_whatever_the_order_of_the_fields(columns, record, read):
    if record is None:
        with pytest.raises(ValueError, match=read):
            Reading(columns=columns)
        return
    for fields in (record, dict(reversed(record.items()))):
        try:
            found = answers(
                sample_from_record(fields | {"id": "7"}, key="k", reading=Reading(columns=columns))
            )
        except SampleError as error:
            assert error.reason.startswith(read) and error.id == "7"
        else:
            assert found == [read]


def test_one_of_two_system_prompts_is_not_taken_in_silence():
    alike = sample_from_record(TURNS | {"system": "Be brief.", "system_prompt": "Be brief."}, key="k")
    assert [message["role"] for message in alike.messages] == ["system", "user", "assistant"]
    with pytest.raises(SampleError, match=r"different texts in the fields system and system_prompt.*ignore="):
        sample_from_record(TURNS | {"system": "Be brief.", "system_prompt": "Be long."}, key="k")


# --- files and folders ---


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    names, cells, file = (
        ["question", "answer", "", "answer", ""],
        ["Q?", "first", "", "second", ""],
        tmp_path / f"d.{suffix}",
    )
    if suffix in ("csv", "tsv"):
        separator = "," if suffix == "csv" else "\t"
        file.write_text("".join(separator.join(row) + "\n" for row in (names, cells)))
    else:
        table = pa.Table.from_arrays([pa.array([cell]) for cell in cells], names=names)
        if suffix == "parquet":
            pq.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    with pytest.raises(DataError, match=f"d.{suffix} has two columns 'answer'.*Rename one of them"):
        list(read_samples(file))


LINE = json.dumps(TURNS)


@pytest.mark.parametrize(
    "name, text, count",
    [
        ("a.json", f"[{LINE},\n{LINE}]", 2),
        ("a.json", f"{LINE}\n{LINE}\n", 2),
        ("a.json", f"{LINE}\n", 1),
        ("a.json", json.dumps({"data": [TURNS, TURNS]}), 2),
        ("a.json", json.dumps({"version": 1, "data": [TURNS, TURNS], "n": [1, 2]}, indent=1), 2),
        ("a.json", json.dumps(TURNS, indent=2), 1),
        ("a.json", json.dumps({"images": [{"path": "a"}], "texts": [{"user": "Q", "assistant": "A"}]}, indent=1), 1),
        ("a.NDJSON", f"{LINE}\n\n{LINE}", 2),
        ("a.Json", "\ufeff" + f"[{LINE}]", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_shapes_of_json(tmp_path, name, text, count, compressed):
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    samples = list(read_samples(path))
    assert [sample.key for sample in samples] == [f"{path.name}#{n}" for n in range(count)]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert count_records(path) == count


def test_a_second_array_of_an_object_is_told(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"images": [], "rows": [TURNS], "annotations": [{"a": 1}]}, indent=1)
    )
    good, broken = read_samples(tmp_path / "a.json")
    assert isinstance(good, Sample)
    assert "'rows' and 'annotations' of the JSON object only the first is read" in str(broken.error)


@pytest.mark.parametrize("at", [40, 90])
def test_an_object_that_breaks_off_is_told(tmp_path, at):
    text = json.dumps({"data": [TURNS, TURNS]}, indent=1)
    (tmp_path / "a.json").write_text(text[:at])
    *_, broken = read_samples(tmp_path / "a.json")
    assert "breaks off" in str(broken.error)


def test_a_compressed_file_that_breaks_off_is_told(tmp_path):
    content = gzip.compress(b"".join(f"{LINE}\n".encode() for _ in range(5)))
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-12])
    *_, broken = read_samples(tmp_path / "a.jsonl.gz")
    assert "the JSON file breaks off" in str(broken.error)


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_csv_with_a_header(tmp_path, suffix, separator):
    import csv

    (tmp_path / "0.png").write_bytes(png())
    with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["id", "image", "question", "answer", "hint"])
        writer.writerow(["1", "0.png", "What,\nthen?", "red", ""])
        writer.writerow(["2", BASE64, "What?", "green", ""])
        writer.writerow(["3", "0.png"])
        writer.writerow(["4", "0.png", "What?", "red", "look"])
        writer.writerow(["5", "0.png", "What?", "", ""])
    first, second, short, hint, empty = read_samples(tmp_path / f"a.{suffix}")
    assert shape(first) == [["user", "[image]", "What,\nthen?"], ["assistant", "red"]] and first.id == "1"
    assert open_images(second)[0].tobytes() == tiny.picture(0).tobytes()
    assert "has 2 cells, the header has 5" in str(short.error) and "the fields hint" in str(hint.error)
    assert "(id '5'): line 7: the field answer is empty. Fill it" in str(empty.error)
    assert count_records(tmp_path / f"a.{suffix}") == 5
    renamed = list(
        read_samples(tmp_path / f"a.{suffix}", columns={"response": "answer", "query": "question"})
    )
    assert "line 7: the field answer is empty" in str(renamed[4].error), "the name that the file has"


def as_dataset(n: int) -> datasets.Dataset:
    rows = [{"id": str(i), "conversations": TURNS["conversations"], "order": -i} for i in range(n)]
    return datasets.Dataset.from_list(rows)


def test_a_saved_dataset_is_what_its_state_lists(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    as_dataset(5).save_to_disk(tmp_path / "d")
    loaded = datasets.load_from_disk(tmp_path / "d")
    loaded.map(lambda row: {"more": row["id"]}).shuffle(seed=1)
    loaded.sort("order")
    assert list((tmp_path / "d").glob("cache-*.arrow"))
    found = locate(tmp_path / "d")
    assert len(list(read_samples(tmp_path / "d"))) == count_records(tmp_path / "d") == 5
    assert all(path.name.startswith("cache-") for path in found.unread) and found.unread
    assert "cache-" in found.about_unread()
    (tmp_path / "d" / found.names[0]).unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow is missing"):
        read_samples(tmp_path / "d")


def test_a_dataset_dict_asks_for_a_split(tmp_path):
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": as_dataset(3), "test": as_dataset(2)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"several splits: train, test\. .* --split"):
        read_samples(tmp_path / "d")
    assert len(list(read_samples(tmp_path / "d", split="test"))) == 2
    datasets.DatasetDict({"all": as_dataset(3)}).save_to_disk(tmp_path / "one")
    assert len(list(read_samples(tmp_path / "one"))) == 3


def test_a_hub_layout_with_one_split_needs_no_question_and_names_what_is_not_read(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist([TURNS]), tmp_path / "data" / f"train_sft-0000{part}-of-00002.parquet"
        )
    for name in ("README.md", "dataset_infos.json", "notes.json", "logo.png"):
        (tmp_path / name).write_text("{}")
    assert len(list(read_samples(tmp_path))) == 2
    found = locate(tmp_path)
    assert [path.name for path in found.unread] == ["README.md", "notes.json"]
    assert found.about_unread() == f"{tmp_path}: 2 files not read: README.md, notes.json"
    assert len(list(read_samples(tmp_path, split="train_sft"))) == 2


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("train_sft-00000-of-00002.parquet", "train_sft"),
        ("val/a.jsonl", "validation"),
        ("llava_dev.json", "validation"),
        ("pretrain.json", None),
        ("contest.json", None),
        ("testing/part-1.parquet", "test"),
    ],
)
def test_splits_by_name(name, split):
    assert split_of(Path(name)) == split


def test_splits_of_photographs_are_folders(tmp_path):
    for name in ("train/a", "test/b", "test/deep/train station"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.save_picture(tmp_path / f"{name}.png", 1)
        (tmp_path / f"{name}.txt").write_text("red")
    with pytest.raises(DataError, match="several splits: test, train"):
        read_samples(tmp_path)
    samples = list(read_samples(tmp_path, split="test"))
    assert [sample.key for sample in samples] == ["test#b.png", "test#deep/train station.png"]
    assert locate(tmp_path, "test").unread[0].name == "a.png"


def test_metadata_of_an_imagefolder_in_every_table(tmp_path):
    rows = [{"file_name": "x.png", "text": "red"}, {"file_name": "in/y.png", "text": "green"}]
    writers = {
        "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows))),
        "csv": lambda path: path.write_text("file_name,text\nx.png,red\nin/y.png,green\n"),
        "parquet": lambda path: pq.write_table(pa.Table.from_pylist(rows), path),
    }
    for suffix, write in writers.items():
        folder = tmp_path / suffix
        (folder / "train" / "in").mkdir(parents=True)
        tiny.save_picture(folder / "train" / "x.png", 1)
        tiny.save_picture(folder / "train" / "in" / "y.png", 2)
        write(folder / "train" / f"metadata.{suffix}")
        first, second = read_samples(folder)
        assert answers(first) == ["red"] and answers(second) == ["green"]
        assert open_images(second)[0].tobytes() == tiny.picture(2).tobytes()
        assert count_records(folder) == 2 and second.key == f"train/metadata.{suffix}#1"


def test_photographs_with_captions_beside_json_are_read_and_the_json_is_named(tmp_path):
    tiny.save_picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("red")
    (tmp_path / "info.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    assert only(tmp_path).key.endswith("#a.png")
    assert [path.name for path in locate(tmp_path).unread] == ["info.json", "notes.txt"]


ROW = {"img_path": "0.png", "q": "What?", "ans": "red", "n": "3"}


@pytest.mark.parametrize(
    "record, columns, reason, option",
    [
        (ROW, {}, "img_path seems to hold images (0.png)", "images=img_path,question=q,answer=ans"),
        (ROW, {"images": "img_path"}, "no turns among", "images=img_path,question=q,answer=ans"),
        (
            ROW,
            {"images": "img_path", "question": ["q"], "answer": "answ"},
            "--columns answer=answ: there is no column answ; the columns are img_path, q, ans, n",
            "images=img_path,question=q,answer=ans",
        ),
        (
            ROW,
            {"images": "imgpath", "question": "q", "answer": "ans"},
            "--columns images=imgpath: there is no column imgpath; the columns are img_path, q, ans, n",
            "images=img_path,question=q,answer=ans",
        ),
        ({"pic": "0.png", "text": "A cat."}, {}, "the field pic seems to hold images", "images=pic"),
        (
            {"pic": "0.png", "alt_text": "A cat."},
            {},
            "pic seems to hold images",
            "images=pic,caption=alt_text",
        ),
        ({"image": "0.png", "question": "Q?", "reply": "A."}, {}, "no turns among", "answer=reply"),
        ({"image": "0.png", "turns": TURNS["conversations"]}, {}, "no turns among", "conversations=turns"),
        ({"image": "0.png", "said": '[{"role": "user"}]'}, {}, "no turns among", "messages=said"),
        (
            {"image": "0.png", "left": "?", "mid": "!", "right": "."},
            {},
            "no turns",
            "question=NAME,answer=NAME",
        ),
    ],
)
def test_one_error_names_all_roles_that_are_missing(record, columns, reason, option):
    with pytest.raises(SampleError) as caught:
        sample_from_record(record, key="k", reading=Reading(columns=columns))
    assert reason in caught.value.reason
    assert option == re.search(r"--columns (\S*[^\s,.])", caught.value.cure)[1]
    if "answer=ans" in option:
        given = (pair.split("=") for pair in option.split(","))
        sample_from_record(record, key="k", reading=Reading(columns=dict(given)))
