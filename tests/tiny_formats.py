"""Small files of every format: for each row of `vig.data.formats.FORMATS` one writer of the same name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiny

CAPTIONS = ("red squares", "a grey field", "nothing")


def png(number: int) -> bytes:
    file = io.BytesIO()
    tiny.picture(number).save(file, "PNG")
    return file.getvalue()


def records(inline: bool) -> list[dict]:
    """Three captioned pictures; their bytes inside, or the names of files beside the data."""
    return [
        {
            "id": f"n{n}",
            "image": {"bytes": png(n), "path": None} if inline else f"{n}.png",
            "caption": caption,
        }
        for n, caption in enumerate(CAPTIONS)
    ]


def pictures_beside(folder: Path) -> None:
    for number in range(len(CAPTIONS)):
        (folder / f"{number}.png").write_bytes(png(number))


def json_array(folder: Path) -> Path:
    pictures_beside(folder)
    (folder / "data.json").write_text(json.dumps(records(False)))
    return folder / "data.json"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(records(True)), folder / "data.parquet")
    return folder / "data.parquet"


def arrow(folder: Path) -> Path:
    table = pa.Table.from_pylist(records(True))
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "data.arrow"


def webdataset(folder: Path) -> Path:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for number, row in enumerate(records(True)):
            for field, content in (("png", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"n{number}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "data.tar"


def photographs(folder: Path) -> Path:
    pictures_beside(folder)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.txt").write_text(caption)
    return folder


def imagefolder(folder: Path) -> Path:
    pictures_beside(folder)
    lines = [json.dumps({"file_name": row["image"], "text": row["caption"]}) for row in records(False)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def csv(folder: Path) -> Path:
    pictures_beside(folder)
    lines = ["id,image,caption", *(",".join(row.values()) for row in records(False))]
    (folder / "data.csv").write_text("\n".join(lines))
    return folder / "data.csv"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "imagefolder": imagefolder,
    "JSON": json_array,
    "Parquet": parquet,
    "Arrow": arrow,
    "WebDataset": webdataset,
    "CSV": csv,
    "photographs": photographs,
}  # what each writes into a folder and returns is the data
