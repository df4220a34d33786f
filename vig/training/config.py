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

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from vig.data.files import write_atomically
from vig.training.settings import WrongSetting

SAVED = "train.yaml"  # beside train.json


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


def write_config(folder: Path, options: Mapping[str, Any]) -> None:
    """Writes options, by the names that `read_config` takes, to ``train.yaml``."""
    plain = {name: _plain(value) for name, value in options.items() if value is not None}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_atomically(folder / SAVED, text.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)
