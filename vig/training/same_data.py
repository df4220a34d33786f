"""Whether data on disk are what a selection's scores were made of: keys, being numbers of rows, do not tell it."""

from __future__ import annotations

from typing import Any, NamedTuple

from vig.data.formats import format_of
from vig.data.locate import Located
from vig.data.reading import Source
from vig.data.sample import writable
from vig.store.fingerprints import data_fingerprint, renamed
from vig.training.labels import Selected
from vig.training.settings import TrainError


class Scored(NamedTuple):
    """A data set that a selection's scores are of, as `vig.store.scores.data_sets` describes it."""

    data: str
    data_fingerprint: str
    key: str  # one of its own

    @property
    def is_file(self) -> bool:
        """Else a folder. It need not be there any more."""
        return format_of(self.data) is not None


def check_same_data(source: Source, located: Located, selection: Selected | None) -> str | None:
    """The fingerprint of the data. Raises TrainError where it is not the one of the data that were scored.

    Compared are a file with the scored file that the keys name, and a folder with the scored folder. What the
    fingerprints cannot tell is left to the ids of samples: a file of a folder that was scored as a whole, and what
    belongs to a selection that knows no fingerprint. Photographs, whose keys are their names, have none.
    """
    if located.format.whole_folder:
        return None
    now = data_fingerprint(source)
    scored = _scored(selection)
    if any(one.data_fingerprint == now for one in scored):
        return now
    files = {writable(name): path for name, path in zip(located.names, located.paths, strict=True)}
    named = [(one, _file_of(one.key, files)) for one in scored]
    named = [(one, name) for one, name in named if name is not None]
    folders = sum(not one.is_file for one, _ in named)
    for one, name in named:
        if one.is_file:
            _compare(files[name], now if source.path.is_file() else data_fingerprint(files[name]), one)
        elif source.path.is_dir() and folders == 1:
            _compare(source, now, one)
    return now


def _compare(data: Any, now: str, scored: Scored) -> None:
    if now != scored.data_fingerprint:
        raise TrainError(
            f"{data} changed since it was scored: its fingerprint is {now}, and the selection's, of {scored.data}, "
            f"is {scored.data_fingerprint}. Put the scored data back, or score and select what is there now"
        )


def _scored(selection: Selected | None) -> list[Scored]:
    """The data sets that a selection says it was made of; of several an older version names the first alone."""
    about = getattr(selection, "metadata", {})
    first = {name: about.get(name) for name in ("data", "data_fingerprint")}
    several = about.get("selection", {}).get("data_sets") or [
        first | {"key": next(iter(selection or ()), None)}
    ]
    return [Scored(**one) for one in several if None not in one.values()]


def _file_of(key: str, files: dict[str, Any]) -> str | None:
    return next((name for name in files if key.startswith(f"{name}#")), None)


def renamed_since(source: Source, located: Located, selection: Selected) -> str | None:
    """A sentence where the selection knows no sample of data of this name; else None."""
    ours = tuple(f"{writable(name)}#" for name in located.names)
    key = next(iter(selection), None)
    if key is None or any(key.startswith(ours) for key in selection):
        return None
    problem = renamed(key, source)
    return problem and f"{problem}, or score and select it under its new name"
