"""The tables of data formats: one row is all that the rest of the package knows of a format of files or of records.

A row of `FORMATS` says how files are called, which function reads their records and how many they are. A row of `FORMS`
says by which fields a record is known and which function makes its turns. Functions are named by their import path, so
that the command line can read the tables before anything heavy is loaded. Help and error texts, docs/formats.md and
the tests read them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


_resolved = functools.cache(resolve_name)  # one look-up a record would take as long as the record


class Format(NamedTuple):
    """One format of files.

    suffixes: in lower case; one that does not begin with a dot is a file's whole name.
    rows: import path of f(path, wanted) -> records in order, each a dict of fields, or `Lost`, or `SKIPPED` (see
        `vig.data.rows`); in a `Named` where the row's number is not its name, in an `OfLine` where it has a line.
    count: import path of f(path) -> number of records, or None where only reading them all would tell.
    whole_folder: `path` is the folder in which files of these suffixes lie, not one of them.
    gives_way: ignored (and listed as not read) in a folder that also holds data of another format.
    as_json: its records are JSON, and exported as they stand in the data.
    absolute_images: its reader makes the paths of images absolute, since they do not start from the data's folder.
    """

    name: str
    suffixes: tuple[str, ...]
    rows: str
    count: str
    holds: str  # for docs/formats.md
    whole_folder: bool = False
    gives_way: bool = False
    as_json: bool = False
    absolute_images: bool = False

    def read(self, path: Path, wanted: Any) -> Any:
        return _resolved(self.rows)(path, wanted)

    def n_records(self, path: Path) -> int | None:
        return _resolved(self.count)(path)

    def fits(self, name: str) -> bool:
        name = name.lower()
        return any(name.endswith(end) if end.startswith(".") else name == end for end in self.suffixes)


FORMATS = (
    Format(
        "imagefolder",
        ("metadata.jsonl", "metadata.csv", "metadata.parquet"),
        "vig.data.imagefolder:imagefolder_rows",
        "vig.data.imagefolder:count_imagefolder",
        "one record per image; `file_name` is its path, relative to this file's folder",
        absolute_images=True,
    ),
    Format(
        "JSON",
        (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"),
        "vig.data.json_rows:json_rows",
        "vig.data.json_rows:count_json",
        "an array of records, one record per line, an object with one array of records, or a single record",
        gives_way=True,
        as_json=True,
    ),
    Format(
        "Parquet",
        (".parquet",),
        "vig.data.tables:parquet_rows",
        "vig.data.tables:count_parquet",
        "one record per row; the columns are its fields",
    ),
    Format(
        "Arrow",
        (".arrow",),
        "vig.data.tables:arrow_rows",
        "vig.data.tables:count_arrow",
        "one record per row; of a `save_to_disk` folder, the files listed in its `state.json`",
    ),
    Format(
        "WebDataset",
        (".tar", ".tar.gz", ".tgz"),
        "vig.data.webdataset:webdataset_rows",
        "vig.data.webdataset:count_webdataset",
        "consecutive members with the same stem are one record: fields in `a.json`, images in `a.jpg` (or `a.0.jpg`, "
        "`a.1.jpg`, ...), or a caption in `a.txt` instead of the JSON",
    ),
    Format(
        "CSV",
        (".csv", ".tsv"),
        "vig.data.csv_rows:csv_rows",
        "vig.data.csv_rows:count_csv",
        "a header, then one record per row; cells hold turns and lists of images as JSON",
        gives_way=True,
    ),
    Format(
        "photographs",
        IMAGES,
        "vig.data.photographs:photograph_rows",
        "vig.data.photographs:count_photographs",
        "a folder with its subfolders; `photo.txt` next to `photo.jpg` holds its caption",
        whole_folder=True,
        absolute_images=True,
    ),
)


class Form(NamedTuple):
    """One form of records.

    fields: a record that has them all is of this form; the first row that fits is taken.
    turns: import path of f(record) -> its turns, each a dict of role and content (see `vig.data.turns`).
    marks_needed: a record with images that says nowhere where they stand is refused; else they stand first.
    """

    name: str
    fields: tuple[str, ...]
    turns: str
    example: dict[str, Any]
    marks_needed: bool = False

    def turns_of(self, record: dict[str, Any]) -> Any:
        return _resolved(self.turns)(record)


FORMS = (
    Form(
        "LLaVA, ShareGPT",
        ("conversations",),
        "vig.data.turns:conversations",
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        marks_needed=True,
    ),
    Form(
        "messages",
        ("messages",),
        "vig.data.turns:messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}],
                },
                {"role": "assistant", "content": "A cat."},
            ],
        },
    ),
    Form(
        "prompt and completion (TRL)",
        ("prompt", "completion"),
        "vig.data.turns:prompt_completion",
        {
            "images": ["a.jpg"],
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": "A cat."}],
        },
    ),
    Form(
        "query and response (ms-swift)",
        ("query", "response"),
        "vig.data.turns:query_response",
        {"images": ["a.jpg"], "query": "<image>What is it?", "response": "A cat."},
    ),
    Form(
        "instruction and output (Alpaca)",
        ("instruction", "output"),
        "vig.data.turns:instruction_output",
        {"image": "a.jpg", "instruction": "What is it?", "input": "", "output": "A cat."},
    ),
    Form(
        "question and answer",
        ("question", "answer"),
        "vig.data.turns:question_answer",
        {"image": "a.jpg", "question": "What is it?", "answer": "A cat."},
    ),
    Form(
        "texts (Cauldron, FineVision)",
        ("texts",),
        "vig.data.turns:texts",
        {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "vqa"}]},
    ),
    Form(
        "caption",
        ("caption",),
        "vig.data.turns:captions",
        {"image": "a.jpg", "caption": "A cat on a chair."},
    ),
    Form(
        "captions",
        ("captions",),
        "vig.data.turns:captions",
        {"image": "a.jpg", "captions": ["A cat on a chair.", "A chair with a cat."]},
    ),
    *(
        Form(
            "image and text",
            (field, "text"),
            "vig.data.turns:captions",
            {field: "a.jpg" if field == "image" else ["a.jpg"], "text": "A cat on a chair."},
        )
        for field in ("image", "images")
    ),
)  # fmt: skip

IMAGE_FIELDS = ("images", "image")
SYSTEM_FIELDS = ("system", "system_prompt")
MEDIA_FIELDS = ("video", "videos", "audio", "audios")
FIELDS = (
    "id",
    *IMAGE_FIELDS,
    *dict.fromkeys(field for form in FORMS for field in form.fields if field not in IMAGE_FIELDS),
    *SYSTEM_FIELDS,
    "input",
    "history",
    "tools",
)  # that are read; what `--columns` may map to


def format_of(path: str | Path) -> Format | None:
    """The format that a file's name says it has; None for any other name, and for images."""
    name = Path(path).name
    return next((row for row in FORMATS if not row.whole_folder and row.fits(name)), None)


def file_suffixes() -> list[str]:
    """How files of records may end."""
    suffixes = (end for row in FORMATS if not row.whole_folder for end in row.suffixes if end.startswith("."))
    return list(dict.fromkeys(suffixes))


def expected() -> str:
    """What data may be, in words, for help and error texts."""
    return f"{', '.join(file_suffixes())}, a folder of these, or a folder of photographs"
