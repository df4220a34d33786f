"""A folder whose run is finished: the same command says so, and another one is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from vig.store.folder import SettingsDiffer
from vig.training.checkpoint import FINGERPRINT, MadeWith, run_differences
from vig.training.folder import RECORD
from vig.training.settings import TrainError, TrainResult

HOLDS_A_MODEL = (RECORD, "config.json", "adapter_config.json")
CURE = "Give --overwrite (overwrite=True) to train anew, or another output folder"


def finished_record(out: Path, model: Any) -> dict[str, Any] | None:
    """train.json of the run that was finished in a folder; None where it holds no model.

    model: as `vig.train` takes it. Raises TrainError for a model that this run can neither go on from nor repeat.
    """
    there = next((out / name for name in HOLDS_A_MODEL if (out / name).exists()), None)
    if there is None:
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        steps, interrupted, complete = record["steps"], record["interrupted"], "run" in record
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise TrainError(
            f"{out} holds a checkpoint already ({there.name}), which no run of this version finished. {CURE}"
        )
    if interrupted:
        raise TrainError(
            f"{out} holds the weights of a run that was stopped after step {steps:,}, and no checkpoint to go on from "
            f"(save_every = {record['settings']['save_every']}). {CURE}. With --save-every N a stopped run goes on"
        )
    if not isinstance(model, str | Path):
        raise TrainError(
            f"{out} holds a checkpoint already, of a finished run; whether it began with the model in memory cannot be "
            f"told. {CURE}"
        )
    return record


def refuse_other_run(out: Path, record: dict[str, Any], bound: dict[str, Any]) -> None:
    """Raises SettingsDiffer where the finished run of a folder was not made as this one would be."""
    names = ("model", "revision", "data", FINGERPRINT, "selection")
    provenance = {name: record.get(name) for name in names}
    differences = run_differences(MadeWith(provenance, record["run"]).bound(record["settings"]), bound)
    if differences:
        raise SettingsDiffer(
            f"{out} holds the checkpoint of a finished run, made with other settings",
            ("the folder has", "this run has"),
            differences,
            f"{CURE}.",
        )


def finished_result(out: Path, record: dict[str, Any], model: nn.Module) -> TrainResult:
    """What the run returned when it ended. model: as it left it."""
    known = {field.name: record[field.name] for field in fields(TrainResult) if field.name in record}
    return TrainResult(**known | {"model": model, "out": out, "resumed": record["steps"]})
