"""How data are read where they do not say it themselves: the split, and the names of their columns and roles."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vig.data.formats import FIELDS

SPEAKERS = ("assistant", "system", "tool", "user")
IGNORE = "ignore"  # what a column maps to that is not to be read


def names_of(given: Mapping[str, str | list[str]]) -> dict[str, list[str]]:
    """Ours -> the data's, in a list also where one name was given."""
    return {ours: [theirs] if isinstance(theirs, str) else list(theirs) for ours, theirs in given.items()}


def _inverted(what: str, given: Mapping[str, str | list[str]]) -> dict[str, str]:
    """The data's name -> ours. Raises ValueError for a name that is given for two."""
    found: dict[str, str] = {}
    for ours, several in names_of(given).items():
        for name in several:
            if found.setdefault(name, ours) != ours:
                raise ValueError(f"{what}: {name!r} is given for {found[name]} and for {ours}. Give it once")
    return found


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing: tables have each field in each record."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


@dataclass(frozen=True)
class Reading:
    """split: of a folder that holds several. columns: our field -> the data's. roles: our role -> the data's.

    A value may be a list of names; columns["ignore"] are not read at all. Raises ValueError for a field or role that
    is not known, and for a name that is given for two.
    """

    split: str | None = None
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    roles: Mapping[str, str | list[str]] = field(default_factory=dict)

    def __post_init__(self):
        for what, given, known in (
            ("columns", self.columns, (*FIELDS, IGNORE)),
            ("roles", self.roles, SPEAKERS),
        ):
            wrong = [name for name in given if name not in known]
            if wrong:
                raise ValueError(
                    f"{what}: {wrong[0]!r} is none of {', '.join(known)}. Write {known[0]}=NAME, the data's name last"
                )
        object.__setattr__(self, "column_of", _inverted("columns", self.columns))
        object.__setattr__(self, "role_of", _inverted("roles", self.roles))

    def metadata(self) -> dict[str, Any]:
        """What is stored with scores: nothing of what is as usual."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name in ("split", "columns", "roles")
            if (value := getattr(self, name))
        }

    @classmethod
    def stored(cls, metadata: Mapping[str, Any]) -> Reading:
        """As scores were read that have this metadata."""
        return cls(**{name: metadata[name] for name in ("split", "columns", "roles") if metadata.get(name)})

    def renamed(self, record: Any) -> Any:
        """A record whose fields have our names, without those that are to be ignored.

        A given name is read in the place of the record's own field of our name. Raises Unusable where that leaves a
        choice: `_chosen`.
        """
        if not self.columns or not isinstance(record, dict):
            return record
        named = {name: value for name, value in record.items() if name not in self.column_of}
        for ours, names in names_of(self.columns).items():
            found = {name: record[name] for name in names if name in record}
            if ours != IGNORE and found:
                named[ours] = _chosen(ours, found, named.get(ours))
        return named


def _chosen(ours: str, found: Mapping[str, Any], own: Any) -> Any:
    """What a record holds under the names that are given for a field of ours. own: under ours, unless that is given.

    Raises Unusable where two of them hold different values, and where they hold nothing and `own` does.
    """
    from vig.data.turns import Unusable  # loads PIL, which the command line's help has no need of

    held = [name for name in found if not is_blank(found[name])]
    if not held and not is_blank(own):
        name = next(iter(found))
        raise Unusable(
            f"the field {name} is empty, which --columns reads as {ours}, and the field {ours} is not",
            f"Fill it, or drop {ours}={name} from --columns, or add ignore={ours} to it",
        )
    others = [name for name in held[1:] if found[name] != found[held[0]]]
    if others:
        cure = f"Give one of them, such as --columns {ours}={held[0]},ignore={others[0]}"
        raise Unusable(
            f"the fields {held[0]} and {others[0]} differ, and --columns reads both as {ours}", cure
        )
    return found[held[0]] if held else next(iter(found.values()))


@dataclass(frozen=True)
class Source(os.PathLike):
    """Data on disk and how they are read. It stands for its path wherever a path is taken."""

    path: Path
    reading: Reading = Reading()

    @classmethod
    def of(cls, data: str | os.PathLike) -> Source:
        return data if isinstance(data, cls) else cls(Path(data))

    def absolute(self) -> Source:
        return Source(self.path.absolute(), self.reading)

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__


def parse_names(given: Iterable[str], option: str) -> dict[str, list[str]]:
    """["messages=conv,images=pics"] -> {"messages": ["conv"], "images": ["pics"]}. Raises ValueError."""
    found: dict[str, list[str]] = {}
    for pair in (pair for text in given for pair in text.split(",")):
        ours, sign, theirs = pair.strip().partition("=")
        if not (ours and sign and theirs):
            raise ValueError(
                f"{option} {pair!r}, expected OURS=THEIRS, such as {option} messages=conv,images=pics"
            )
        found.setdefault(ours.strip(), []).append(theirs.strip())
    return found
