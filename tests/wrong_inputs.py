"""Wrong inputs and what each gives: the cases behind docs/wrong-inputs.md.

`python tests/wrong_inputs.py` writes the page anew.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import tiny

PAGE = Path(__file__).parent.parent / "docs" / "wrong-inputs.md"
HEAD = """# Wrong inputs, and what each gives

Every row was tried: `tests/test_wrong_inputs.py` runs it and compares. Exit codes: 0 done, 1 failed, 2 wrong usage,
3 done but some samples could not be scored or are not scored yet. A sample that cannot be scored becomes an error row,
whose status says why; the others are scored. (`DIR` is the folder of the data.)

| | input | command | exit | what it says |
|--:|---|---|--:|---|
"""


class Case(NamedTuple):
    name: str  # of the input
    command: str  # {dir}: the folder of the data
    make: Callable[[Path], None] = lambda folder: None  # changes a good folder into the wrong one


def turns(answer: str, question: str = "<image>\nWhat?") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(number: int, **changes) -> dict:
    return {"id": str(number), "image": f"{number}.png", "conversations": turns(f"red {number}")} | changes


def data(**changes) -> Callable[[Path], None]:
    """A data file whose second record is changed."""
    return lambda folder: write(folder, [record(0), record(1, **changes), record(2)])


def untrained() -> list[dict]:
    asked, said = turns("red")
    return [asked, said | {"loss": False}]


def splits(folder: Path) -> None:
    (folder / "parts").mkdir()
    for name in ("train", "test"):
        (folder / "parts" / f"{name}.json").write_text(json.dumps([record(0)]))


def kinds(folder: Path) -> None:
    (folder / "kinds").mkdir()
    (folder / "kinds" / "a.arrow").write_bytes(b"")
    (folder / "kinds" / "b.tar").write_bytes(b"")


def write(folder: Path, records: list) -> None:
    (folder / "data.json").write_text(json.dumps(records))


def file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def broken_line(folder: Path) -> None:
    good = json.dumps(record(0))
    (folder / "data.jsonl").write_text(good + "\n{'id': 1}\n" + good + "\n")


def bomb(folder: Path) -> None:
    from test_samples import png_bomb

    (folder / "1.png").write_bytes(png_bomb())


def link_out(folder: Path) -> None:
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to("/etc/hostname")


def half(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:90])


def twice(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() * 2)


def scored(folder: Path) -> None:
    run(SCORE, folder)


def scored_in_parts(folder: Path) -> None:
    run(SCORE + " --shard 0/2", folder)


def selected(folder: Path) -> None:
    scored(folder)
    run("select {dir}/scores -o {dir}/selection --p 30", folder)


def damaged_manifest(folder: Path) -> None:
    scored(folder)
    (folder / "scores" / "_manifest.json").write_text("{")


def damaged_shard(folder: Path) -> None:
    scored(folder)
    (folder / "scores" / "scores-00000.parquet").write_bytes(b"PAR1")


def file_in_the_way(folder: Path) -> None:
    (folder / "scores").write_text("a file")


def renamed(folder: Path) -> None:
    scored(folder)
    (folder / "data.json").rename(folder / "other.json")


def empty_cell(folder: Path) -> None:
    (folder / "data.csv").write_text("image,question,answer\n0.png,What?,red\n1.png,What?,\n")


def other_columns(folder: Path) -> None:
    (folder / "data.csv").write_text("img_path,q,ans\n0.png,What?,red\n")


def latin(name: str) -> Callable[[Path], None]:
    """The second record's answer has a byte that UTF-8 does not know."""

    def make(folder: Path) -> None:
        if name.endswith(".csv"):
            lines = ["image,question,answer", *(f"{number}.png,What?,red {number}" for number in range(3))]
        else:
            lines = [json.dumps(record(number)) for number in range(3)]
        (folder / name).write_bytes("\n".join(lines).replace("red 1", "r\xe9d 1").encode("latin-1"))

    return make


SCORE = "score {dir}/model {dir}/data.json -o {dir}/scores"
CASES = (
    Case("a data file that is not there", SCORE.replace("data.json", "nowhere.json")),
    Case("data of an unknown format", SCORE.replace("data.json", "data.docx"), file("data.docx", b"a,b")),
    Case("an empty folder as data", SCORE.replace("data.json", "empty"), lambda f: (f / "empty").mkdir()),
    Case(
        "a folder that holds several splits",
        SCORE.replace("data.json", "parts"),
        splits,
    ),
    Case("a folder that holds data of several kinds", SCORE.replace("data.json", "kinds"), kinds),
    Case("data in UTF-16", SCORE, lambda f: (f / "data.json").write_bytes("[]".encode("utf-16"))),
    Case("a line in Latin-1", SCORE.replace(".json ", ".jsonl "), latin("data.jsonl")),
    Case("a row of a CSV file in Latin-1", SCORE.replace(".json ", ".csv "), latin("data.csv")),
    Case(
        "a CSV file in UTF-16", SCORE.replace(".json ", ".csv "), file("data.csv", "image,q".encode("utf-16"))
    ),
    Case("data without a record", SCORE, file("data.json", b"")),
    Case("a JSON array that breaks off", SCORE, half("data.json")),
    Case("two JSON arrays, one behind the other", SCORE, twice("data.json")),
    Case("a line that is not JSON", SCORE.replace(".json ", ".jsonl "), broken_line),
    Case(
        "a Parquet file that is none", SCORE.replace(".json", ".parquet"), file("data.parquet", b"PAR1 torn")
    ),
    Case(
        "a record with neither conversations nor messages",
        SCORE,
        lambda f: write(f, [record(0), {"text": "hm"}]),
    ),
    Case("columns of other names", SCORE.replace(".json", ".csv"), other_columns),
    Case(
        "a column that is not there",
        SCORE.replace(".json", ".csv") + " --columns images=img_path,question=q,answer=answ",
        other_columns,
    ),
    Case("a role that is not known", SCORE, data(conversations=[{"from": "robot", "value": "<image>"}])),
    Case("no answer", SCORE, data(conversations=turns("")[:1])),
    Case("an empty answer", SCORE, data(conversations=turns(" "))),
    Case("an image without an <image> mark", SCORE, data(conversations=turns("red", "What?"))),
    Case("an image file that is not there", SCORE, data(image="nowhere.png")),
    Case("an image that is text", SCORE, file("1.png", b"hello, I am text")),
    Case("an image that is cut off", SCORE, half("1.png")),
    Case("a decompression bomb: 60,000 x 60,000 pixels in 1 kB", SCORE, bomb),
    Case("an image path that leaves the image root", SCORE, data(image="../../etc/passwd")),
    Case("a symbolic link that leaves the image root", SCORE, link_out),
    Case("a field that holds a video", SCORE, data(video="1.mp4")),
    Case("images in a field that is not known", SCORE, data(image=None, photo="1.png")),
    Case("a turn that no trainer learns from", SCORE, data(conversations=untrained())),
    Case("an image that is a web address", SCORE, data(image="http://example.org/1.png")),
    Case("an answer longer than the model's context", SCORE, data(conversations=turns("long " * 200))),
    Case("an image root that is not there", SCORE + " --image-root {dir}/nowhere"),
    Case("a model that is not there", SCORE.replace("/model", "/nothing")),
    Case("a null image that is not known", SCORE + " --null fog"),
    Case("a backend that is not known", SCORE + " --backend cuda"),
    Case("a dtype that is not known", SCORE + " --dtype fp8"),
    Case("a part that is not there", SCORE + " --shard 4/4"),
    Case("a model for two GPUs in one process", SCORE + " --tensor-parallel-size 2"),
    Case("scores made with other settings in the output folder", SCORE + " --sigma 0.2", scored),
    Case("the parts of a job array in the output folder", SCORE, scored_in_parts),
    Case("a file in the place of the output folder", SCORE, file_in_the_way),
    Case("a damaged manifest", SCORE, damaged_manifest),
    Case("a damaged shard", "select {dir}/scores -o {dir}/selection", damaged_shard),
    Case("a p outside (0, 100]", "select {dir}/scores -o {dir}/selection --p 0", scored),
    Case("a level that is not known", "select {dir}/scores -o {dir}/selection --level foo", scored),
    Case(
        "scores of some jobs of an array alone",
        "select {dir}/scores -o {dir}/selection --tau-floor 1",
        scored_in_parts,
    ),
    Case(
        "a selection made with other settings in the output folder",
        "select {dir}/scores -o {dir}/selection --p 40",
        selected,
    ),
    Case("a learning rate below 0", "train {dir}/model {dir}/data.json -o {dir}/out --lr -1"),
    Case("a model to be spread over one process", "train {dir}/model {dir}/data.json -o {dir}/out --fsdp"),
    Case("an empty cell of a CSV file", SCORE.replace(".json", ".csv"), empty_cell),
    Case("a data file renamed between two runs", SCORE.replace("data.json", "other.json"), renamed),
    Case(
        "a data file renamed before its records are asked for",
        "select {dir}/scores -o {dir}/selection --data {dir}/other.json --export {dir}/kept.json",
        renamed,
    ),
    Case("a selection in the place of scores", "report {dir}/selection -o {dir}/report.html", selected),
    Case("data in the place of scores", "select {dir}/data.json -o {dir}/selection"),
    Case(
        "scores in the place of a selection",
        "report {dir}/scores --selection {dir}/scores -o {dir}/report.html",
        scored,
    ),
    Case("scores in the place of data", SCORE.replace("data.json", "scores"), scored),
    Case("data and model in the wrong order", "score {dir}/data.json {dir}/model -o {dir}/scores"),
    Case(
        "a selection in the place of a model", "score {dir}/selection {dir}/data.json -o {dir}/more", selected
    ),
    Case("a selection in the output folder of scores", SCORE.replace("/scores", "/selection"), selected),
    Case("scores that are not there", "select {dir}/nowhere -o {dir}/selection"),
)


def good_folder(folder: Path, model: Path) -> None:
    """Three samples that can be scored, and the model to score them."""
    for number in range(3):
        tiny.save_picture(folder / f"{number}.png", number)
    write(folder, [record(number) for number in range(3)])
    (folder / "model").symlink_to(model)


def run(command: str, folder: Path) -> tuple[int, str]:
    """(exit code, what it says about the wrong input) of the program `vig`, run in this process."""
    from vig import cli

    words = ["vig", *command.format(dir=folder).split()]
    said, code = io.StringIO(), 0
    with mock.patch.object(sys, "argv", words), redirect_stdout(said), redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, essence(said.getvalue().replace(str(folder), "DIR"))


def essence(said: str) -> str:
    """Without the lines that every run prints."""
    lines = [line.strip(" │╭╮╰╯─") for line in said.splitlines()]
    about = [line for line in lines if re.match(r"vig: |Invalid value|\S+#\d+ \(id ", line)]
    if about and about[0].startswith(("vig: ", "Invalid value")):
        about = lines[lines.index(about[0]) :]
    return " ".join(" ".join(about or lines).split())


def table(model: Path) -> list[tuple[Case, int, str]]:
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            good_folder(folder, model)
            case.make(folder)
            rows.append((case, *run(case.command, folder)))
    return rows


def page(rows: list[tuple[Case, int, str]]) -> str:
    lines = []
    for number, (case, code, said) in enumerate(rows, 1):
        command = "vig " + case.command.format(dir="DIR")
        lines.append(f"| {number} | {escape(case.name)} | `{command}` | {code} | {escape(said)} |")
    return HEAD + "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = page(table(tiny.save_llava(Path(folder))))  # whole before the page is touched
    PAGE.write_text(made, encoding="utf-8")
