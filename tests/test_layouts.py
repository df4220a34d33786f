"""Eight public layouts in miniature, each through every command: score, select, export, train, report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from typer.testing import CliRunner

from vig.cli import app
from vig.store.scores import read_scores

ANSWERS = ("red squares", "a green field", "nothing at all")


def pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.save_picture(folder / name, number)


def png(number: int) -> bytes:
    file = io.BytesIO()
    tiny.picture(number).save(file, "PNG")
    return file.getvalue()


def write(path: Path, records: list[dict], lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    path.write_text(text)
    return path


def llava(folder: Path) -> list:
    """llava_v1_5_mix665k.json: one image a record, text-only records among them, ids that repeat."""
    names = [f"coco/train2017/{n:012}.jpg" for n in range(3)]
    pictures(folder / "images", names)
    records = [
        {
            "id": names[n][-16:-4],
            "image": names[n],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": answer},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes"},
            ],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    records.append({"id": "wgByO4Y_0", "model": "", "conversations": [
        {"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]})  # fmt: skip
    return [write(folder / "llava_mix.json", records), "--image-root", folder / "images"]


def sharegpt4v(folder: Path) -> list:
    names = [f"sam/images/sa_{n}.jpg" for n in range(3)]
    pictures(folder, names)
    records = [
        {
            "id": f"sa_{n}",
            "image": names[n],
            "conversations": [
                {"from": "human", "value": "Describe the image.\n<image>"},
                {"from": "gpt", "value": answer},
            ],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    return [write(folder / "share-captioner.json", records)]


def llamafactory(folder: Path) -> list:
    """mllm_demo.json: messages, images beside, a system field."""
    names = [f"mllm_demo_data/{n}.jpg" for n in range(3)]
    pictures(folder, names)
    records = [
        {
            "system": "Be brief.",
            "messages": [
                {"content": "<image>Who are they?", "role": "user"},
                {"content": answer, "role": "assistant"},
            ],
            "images": [names[n]],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    return [write(folder / "mllm_demo.json", records)]


def ms_swift(folder: Path) -> list:
    names = [f"{n}.jpg" for n in range(3)]
    pictures(folder, names)
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>q"},
                {"role": "assistant", "content": "draft", "loss": False},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": answer, "loss": True},
            ],
            "images": [names[n]],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    return [write(folder / "train.jsonl", records, lines=True)]


def qwen_vl(folder: Path) -> list:
    names = [f"{n}.jpg" for n in range(3)]
    pictures(folder, names)
    records = [
        {
            "id": f"identity_{n}",
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>{names[n]}</img>\nWhat is it?"},
                {"from": "assistant", "value": answer},
            ],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    return [write(folder / "finetune.json", records)]


def internvl(folder: Path) -> list:
    """JSON lines with the sizes of the images, several images in a record."""
    names = [f"{n}.jpg" for n in range(4)]
    pictures(folder, names)
    records = [
        {
            "id": n,
            "image": names[n] if n < 2 else names[2:],
            "width": 40,
            "height": 32,
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nq" if n < 2 else "Image-1: <image>\nImage-2: <image>\nq",
                },
                {"from": "gpt", "value": answer},
            ],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    return [write(folder / "data.jsonl", records, lines=True)]


def cauldron(folder: Path) -> list:
    """A hub layout of Parquet: images as bytes, texts of user and assistant, two splits."""
    rows = [
        {
            "images": [{"bytes": png(n), "path": None}],
            "texts": [
                {"user": "q", "assistant": answer, "source": "vqa"},
                {"user": "Sure?", "assistant": "Yes"},
            ],
        }
        for n, answer in enumerate(ANSWERS)
    ]
    (folder / "data").mkdir()
    (folder / "README.md").write_text("a card")
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return [folder, "--split", "train"]


def imagefolder(folder: Path) -> list:
    (folder / "shots").mkdir()
    names = [f"shots/{n}.jpg" for n in range(3)]
    pictures(folder, names)
    records = [{"file_name": names[n], "text": answer} for n, answer in enumerate(ANSWERS)]
    write(folder / "metadata.jsonl", records, lines=True)
    return [folder]


LAYOUTS: dict[str, Callable[[Path], list]] = {
    function.__name__: function
    for function in (llava, sharegpt4v, llamafactory, ms_swift, qwen_vl, internvl, cauldron, imagefolder)
}


def call(*words, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_llava(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_public_layout_through_every_command(tmp_path, model, layout):
    home = tmp_path / "data"
    home.mkdir()
    data = LAYOUTS[layout](home)
    said = call("score", model, *data, "-o", tmp_path / "scores")
    assert ("2 files not read: README.md" in said) == (layout == "cauldron")
    rows = [row for batch in read_scores(tmp_path / "scores") for row in batch.to_pylist()]
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["text_only"] * (len(rows) - 3)
    if layout == "ms_swift":
        assert all(row["positions"].count(0) == 1 for row in rows)  # the answer with loss alone
    call("score", model, *data, "-o", tmp_path / "scores")  # resumes
    call(
        "select",
        tmp_path / "scores",
        "--p",
        "100",
        "-o",
        tmp_path / "selection",
        "--export",
        tmp_path / "kept.json",
    )
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept) == len(rows)
    turns = {"cauldron": "texts", "imagefolder": "text"}  # the others are JSON
    assert kept[0].keys() & ({turns[layout]} if layout in turns else {"conversations", "messages"})
    root = data[1:] if data[1:2] == ["--image-root"] else []
    said = call("train", model, data[0], *root, "--selection", tmp_path / "selection", "-o", tmp_path / "out")
    assert f"{len(rows)} samples kept" in said  # read as they were scored, without --split
    call("report", tmp_path / "scores", "--selection", tmp_path / "selection", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") >= 6 and "are missing" not in page and "sample not found" not in page


def test_other_names_go_from_the_scores_to_training_and_the_report(tmp_path, model):
    pictures(tmp_path, ["0.png", "1.png"])
    records = [
        {
            "conv": [{"role": "client", "content": "<image>q"}, {"role": "helper", "content": answer}],
            "pic": f"{n}.png",
        }
        for n, answer in enumerate(ANSWERS[:2])
    ]
    data = write(tmp_path / "d.json", records)
    names = ("--columns", "messages=conv,images=pic", "--roles", "user=client,assistant=helper")
    call("score", model, data, "-o", tmp_path / "scores", *names)
    call("select", tmp_path / "scores", "--p", "100", "-o", tmp_path / "selection")
    assert "2 samples kept" in call(
        "train", model, data, "--selection", tmp_path / "selection", "-o", tmp_path / "out"
    )
    call("report", tmp_path / "scores", "-o", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("data:image/") >= 4
    assert "--columns 'conv', expected OURS=THEIRS" in " ".join(
        call("score", model, data, "-o", tmp_path / "s", "--columns", "conv", code=2)
        .replace("│", " ")
        .split()
    )
