"""Fingerprints: what scores were made with, short enough to be stored beside them and compared on resuming."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vig.data.locate import locate
from vig.data.photographs import photographs
from vig.data.reading import Source
from vig.data.sample import writable


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_json(tokenizer: Any) -> str:
    """A fast tokenizer's tokenizer.json without its padding and truncation, which every call sets anew.

    They are cut out of the text, where they stand ahead of all else: elsewhere its bytes, and so its hash, are kept.
    """
    text = tokenizer.backend_tokenizer.to_str()
    for name in ("truncation", "padding"):
        before, field, state = text.partition(f'"{name}":')
        _, end = json.JSONDecoder().raw_decode(state)
        text = f"{before}{field}null{state[end:]}"
    return text


def processor_json(processor: Any) -> str:
    settings = json.loads(processor.to_json_string()) if hasattr(processor, "to_json_string") else {}
    for name in ("chat_template", "processor_class", "transformers_version", "_name_or_path", "name_or_path"):
        settings.pop(name, None)
    return json.dumps(settings, sort_keys=True, default=str)


def data_settings(data: str | Path | Source) -> dict[str, Any]:
    """What the metadata of scores say of how their data were read."""
    source = Source.of(data)
    return source.reading.metadata() | {"data_format": locate(source.path, source.reading.split).format.name}


WHOLE = 1 << 30  # bytes; of larger data files a part is read


def weights_fingerprint(name: str) -> str | None:
    """For a local checkpoint: of its config and of 64 MiB of every weight file, spread evenly; None elsewhere."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        _read_parts(digest, file)
    return digest.hexdigest()[:16]


def data_fingerprint(data: str | Path | Source) -> str:
    """Of a data file's content; of the names and sizes of a folder's data files; of the names of its photographs,
    since these and their captions may be repaired between two runs.

    Of a file above 1 GiB: of its size and 64 MiB, spread evenly, so that scoring may begin."""
    source = Source.of(data)
    path = source.path
    if path.is_dir():
        found = locate(path, source.reading.split)
        if found.format.whole_folder:
            names = [file.relative_to(found.root).as_posix() for file in photographs(found.root)]
        else:
            names = [(name, file.stat().st_size) for name, file in zip(found.names, found.paths, strict=True)]
        return text_hash(json.dumps(names))
    digest = hashlib.sha256()
    if path.stat().st_size > WHOLE:
        _read_parts(digest, path)
        return digest.hexdigest()[:16]
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def renamed(key: str, data: str | Path | Source) -> str | None:
    """A sentence where data have another name than those that scores were made of; else None.

    key: of one of the scores. Keys begin with the name of the data's file (or of the folder, of photographs), and what
    is scored or looked up under another name would be another sample.
    """
    source = Source.of(data)
    names = [writable(name) for name in locate(source.path, source.reading.split).names]
    if any(key.startswith(f"{name}#") for name in names):
        return None
    then, now = key.partition("#")[0], names[0]
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return (
        f"the scores are of {then}, whose name their keys begin with ({key}), and {now}{more} is given. If it is the "
        f"same under a new name, rename it back to {then}"
    )


def _read_parts(digest, file: Path, parts: int = 64) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}".encode())
    with file.open("rb") as stream:
        for part in range(parts):
            stream.seek(size * part // parts)
            digest.update(stream.read(1 << 20))
