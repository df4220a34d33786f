"""WebDataset: a tar file, compressed or not, streamed through `tarfile`, a record at a time.

Consecutive members of one name, which ends at the first dot of the file's name, are a record: ``<name>.json`` holds its
fields, ``<name>.jpg`` is its image (several: ``<name>.0.jpg``, ``<name>.1.jpg``, ...), and ``<name>.txt`` in the place
of the JSON is a caption. (The reader of `datasets` fixes fields and types on the first 5 records, and loses what
differs later.)
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vig.data.json_rows import why_undecodable
from vig.data.rows import DAMAGE, SKIPPED, Lost, Wanted
from vig.data.sample import SAVE_AS_UTF8

REPAIR_MEMBER = "Repair that member; the other records are read"


class _Member(tarfile.TarInfo):
    """A tar header; `tarfile` takes a damaged one for the end of the file, and says nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in the place of a member or the end mark") from None


def webdataset_rows(file: Path, wanted: Wanted) -> Iterator[Any]:
    """A tar file is read from its beginning, whatever is wanted of it."""
    name, members, number = None, {}, 0  # members: None of a record that is not wanted

    def record() -> Any:
        return SKIPPED if members is None else _record_of_members(name, members)

    with tarfile.open(file, "r|*", tarinfo=_Member) as tar:
        while True:
            try:
                member = tar.next()
            except DAMAGE:
                if name is not None:
                    yield record()  # whole, for all that is known
                raise
            tar.members.clear()  # what tarfile remembers grows with the file
            if member is None:
                break
            stem, field = _name_and_field(member.name)
            if member.isdir() or not stem:
                continue
            if stem != name:
                if name is not None:
                    yield record()
                    number += 1
                name, members = stem, {} if wanted(number) else None
            if members is not None and (field in ("json", "txt") or _is_image(field)):
                members[field] = _content(tar, member, field in members)
    if name is not None:
        yield record()


def count_webdataset(file: Path) -> None:
    """Not known without reading all the images too."""
    return None


def _name_and_field(member: str) -> tuple[str, str]:
    """The name of the record that a member belongs to, "" for none, and which field of it the member is."""
    folder, slash, base = member.rpartition("/")
    stem, _, field = base.partition(".")
    if not (stem and field) or base.startswith("__"):  # what systems and tools leave there
        return "", ""
    return f"{folder}{slash}{stem}", field.lower()


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in _image_suffixes()


@functools.cache
def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, again: bool) -> bytes | Lost:
    if again:
        return Lost(f"the member {member.name} is there twice", "Give each record a name of its own")
    if not member.isreg():
        return Lost(f"the member {member.name} is a link or a device", "Store the file itself")
    return tar.extractfile(member).read()


def _record_of_members(name: str, members: dict[str, bytes | Lost]) -> dict[str, Any] | Lost:
    lost = next((content for content in members.values() if isinstance(content, Lost)), None)
    if lost is not None:
        return lost
    fields, caption, images = {}, {}, []
    for field in sorted(members, key=_natural):
        member, content = f"{name}.{field}", members[field]
        try:
            if field == "txt":
                caption = {"caption": content.decode("utf-8-sig")}
            elif field == "json":
                fields = json.loads(content)
            else:
                images.append({"path": member, "bytes": content})
        except UnicodeDecodeError as error:
            return Lost(
                f"the member {member} is not UTF-8 (at byte {error.start})",
                f"{REPAIR_MEMBER}. {SAVE_AS_UTF8}",
            )
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            return Lost(f"the member {member} is not JSON ({error.msg} at {where})", REPAIR_MEMBER)
        except (ValueError, RecursionError) as error:
            return Lost(f"the member {member} cannot be decoded ({why_undecodable(error)})", REPAIR_MEMBER)
    if not isinstance(fields, dict):
        return Lost(f"the member {name}.json holds a {type(fields).__name__}, not an object", REPAIR_MEMBER)
    if images:
        fields = {field: value for field, value in fields.items() if field != "images"} | {"image": images}
    return {"id": name} | caption | fields


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts "2.jpg" before "10.jpg"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
