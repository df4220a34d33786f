"""The options of ``vig train`` as a YAML file: read with --config, written beside the checkpoint.

    model: llava-hf/llava-1.5-7b-hf
    data: data.json
    selection: selection/
    out: out/
    lr: 2e-5
    lora-rank: 64

Options on the command line come before those of the file.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vig.data.files import write_atomically
from vig.training.settings import WrongSetting

if TYPE_CHECKING:
    import typer

SAVED = "train.yaml"  # beside train.json
NOT_SAVED = ("overwrite", "json")  # the first would overwrite the checkpoint whose file is taken


def take_options(context: typer.Context, path: Path) -> None:
    """Makes the options of a file the defaults of a command's. Raises WrongSetting as `read_config` does."""
    names = _names(context)
    context.default_map = {names[name]: value for name, value in read_config(path, names).items()}


def write_options(context: typer.Context, folder: Path) -> None:
    """Writes what the command line or its file gave, as such a file."""
    given = {
        name: _plain(context.params[parameter])
        for name, parameter in _names(context).items()
        if name not in NOT_SAVED and _is_given(context, parameter)
    }
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    write_atomically(folder / SAVED, text.encode())


def _names(context: typer.Context) -> dict[str, str]:
    """Each option as it is typed, without dashes in front and with underscores -> the name of its parameter."""
    return {
        written.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for written in parameter.opts
        if len(written.lstrip("-")) > 1 and parameter.name not in ("config", "help")
    }


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT" and context.params[parameter] is not None


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a file, among those `known`, by name.

    Names may be written with dashes, as on the command line. Raises WrongSetting for what is no such file or option.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise WrongSetting(f"{path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise WrongSetting(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise WrongSetting(f"{path} holds a {type(found).__name__}, expected `option: value` lines")
    options = {str(name).lstrip("-").replace("-", "_"): value for name, value in found.items()}
    for name in options:
        if name not in known:
            raise WrongSetting(f"{path}: there is no option {name!r}. There are {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)
