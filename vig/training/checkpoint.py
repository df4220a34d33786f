"""Checkpoints of a training run under way: the same command goes on from the newest one, with the same bits.

    out/train-checkpoint-500/
      run.json     what the run was made with, its counts, losses and errors so far
      state.pt     trained weights, optimiser, schedule, and the random state of each process

The main process writes into a folder beside it and renames that, so that a checkpoint is whole or absent; the one
before stays until then. They are gone when the run is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from vig.data.files import sync_folder
from vig.store.folder import SettingsDiffer, settings_differences
from vig.training.settings import TrainError, TrainProgress, TrainSettings
from vig.training.sharding import like, whole

STATE, RUN = "state.pt", "run.json"
NAME = re.compile(r"train-checkpoint-(\d+)")
PARTIAL, GONE = ".train-checkpoint.partial", ".train-checkpoint.gone"
# Settings that may differ between a run and its resumption: the steps stay the same samples at the same rates.
NOT_BINDING = (
    "batch_size",
    "accumulate",
    "dtype",
    "gradient_checkpointing",
    "fsdp",
    "workers",
    "log_every",
    "save_every",
    "eval_every",
    "eval_on_start",
)
COUNTS = ("step", "samples", "left_out", "tokens", "truncated", "evaluating", "seconds")
FINGERPRINT = "data_fingerprint"
EVALS = "evals"  # [step, loss] of each evaluation


@dataclass
class RunState:
    """What changes from step to step, and a checkpoint holds."""

    model: nn.Module  # without the wrapper of DDP
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    progress: TrainProgress
    losses: list[float] = field(default_factory=list)  # of each step, over all processes
    evals: list[list[float]] = field(default_factory=list)  # [step, loss on the held-out data]
    left_out: list[str] = field(default_factory=list)  # the error of each unusable sample, over all processes

    def changing(self) -> dict[str, Tensor]:
        """Trained parameters and buffers by name. What is frozen comes with the model."""
        return {
            name: value.detach()
            for name, value in self.model.state_dict(keep_vars=True).items()
            if value.requires_grad or not isinstance(value, nn.Parameter)
        }


class MadeWith(NamedTuple):
    """What a run is made with besides its settings."""

    provenance: dict[str, Any]  # model, revision, data, data_fingerprint, selection
    run: dict[str, Any]  # samples, processes, samples_per_step, dtype

    def bound(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything that a run must have in common with one that it goes on from, or repeats; as JSON has it."""
        binding = {name: value for name, value in settings.items() if name not in NOT_BINDING}
        return json.loads(json.dumps(self.provenance | self.run | binding))


def run_differences(before: dict[str, Any], bound: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two runs do not have in common, of `MadeWith.bound`.

    Samples made in Python have no fingerprint, and older versions stored none: then keys alone are compared.
    """
    then, now = (one.get(FINGERPRINT) for one in (before, bound))
    rows = settings_differences(before | {FINGERPRINT: None}, bound | {FINGERPRINT: None})
    if None in (then, now) or then == now:
        return rows
    return [(f"fingerprint of {bound['data']}", then, now), *rows]


def run_facts(
    settings: TrainSettings, samples: Iterable[Any], computes_in: torch.dtype, processes: int
) -> dict[str, Any]:
    """`MadeWith.run`."""
    keys = [str(_key(sample)) for sample in samples]
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
    return {
        "samples": f"{len(keys):,} ({digest})",
        "processes": processes,
        "samples_per_step": settings.batch_size * settings.accumulate * processes,
        "dtype": str(computes_in).removeprefix("torch."),
    }


def _key(record: Any) -> str | None:
    record = getattr(record, "sample", record)
    return record.get("key", record.get("id")) if isinstance(record, dict) else record.key


def _all(out: Path) -> list[Path]:
    """The checkpoints of a folder, the newest last."""
    return sorted((path for path in out.glob("train-checkpoint-*") if NAME.fullmatch(path.name)), key=_step)


def _step(checkpoint: Path | None) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1]) if checkpoint else 0


class Checkpoints:
    """Those of one run and its folder: `found` at its start, `restore`d from, `save`d in it, `clear`ed at its end."""

    def __init__(self, out: Path | None, overwrite: bool, processes: PartialState, device: torch.device):
        self.out, self.processes, self.device = out, processes, device
        self.found = next(reversed(_all(out)), None) if out is not None and not overwrite else None
        self.step = _step(self.found)  # of the newest one; 0 without
        self.bound: dict[str, Any] = {}
        if out is not None and processes.is_main_process:
            self._sweep()
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise TrainError(
                f"{out}: the processes find checkpoints of steps {steps}. Give a folder that all of them share"
            )

    def bind(self, bound: dict[str, Any]) -> None:
        """Raises SettingsDiffer where the checkpoint in the folder is of another run. bound: of `MadeWith`."""
        self.bound = bound
        differences = run_differences(self._run()["made_with"], bound) if self.found else []
        if differences:
            raise SettingsDiffer(
                f"{self.out} holds a checkpoint made with other settings",
                ("the folder has", "this run has"),
                differences,
                "Give the same settings and data to resume, --overwrite to start anew, or another output folder.",
            )

    def _run(self) -> dict[str, Any]:
        try:
            return json.loads((self.found / RUN).read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> TrainError:
        reason = str(error).partition("\n")[0].rstrip(". ")
        return TrainError(
            f"{self.found} cannot be read ({reason}). Delete it, or start anew with --overwrite"
        )

    def restore(self, state: RunState) -> None:
        """Puts the state back in place, if the folder holds one."""
        if not self.found:
            return
        run = self._run()
        try:  # beside a device the file is mapped, so that the processes of a machine share its pages
            mapped = self.device.type != "cpu"
            held = torch.load(self.found / STATE, map_location="cpu", mmap=mapped, weights_only=True)
            changing = state.changing()
            if changing.keys() != held["changing"].keys():
                name = sorted(changing.keys() ^ held["changing"].keys())[0]
                raise ValueError(f"{name} is trained only on one side")
            with torch.no_grad():
                for name, value in held["changing"].items():
                    changing[name].copy_(like(value, changing[name]))
            _shard_moments(held["optimizer"], state.optimizer)
            state.optimizer.load_state_dict(held["optimizer"])
            for (
                moments
            ) in state.optimizer.state.values():  # AdamW's step stays on the host: no more of the file
                moments["step"] = moments["step"].clone()
            state.schedule.load_state_dict(held["schedule"])
            self._set_random_state(held["random"][self.processes.process_index])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise self._damaged(error) from error
        state.losses, state.left_out, state.evals = run["losses"], run["left_out"], run.get(EVALS, [])
        if state.evals:
            state.progress.eval_step, state.progress.eval_loss = state.evals[-1]
        counts = run["counts"]
        state.progress.started = time.monotonic() - counts.pop("seconds")
        for name, value in counts.items():
            setattr(state.progress, name, value)

    def save(self, state: RunState) -> None:
        """Makes the state the folder's only checkpoint. Called by all processes.

        Where it cannot be written (a full disk) the run goes on: it warns, and the checkpoint before stays.
        """
        random = gather_object([self._random_state()])
        name = f"train-checkpoint-{state.progress.step}"
        weights = {"changing": state.changing(), "optimizer": state.optimizer.state_dict()}
        weights = whole(weights, self.processes.is_main_process)
        if not self.processes.is_main_process or (self.out / name).exists():
            return
        held = weights | {"schedule": state.schedule.state_dict(), "random": random}
        run = {
            "made_with": self.bound,
            "counts": {count: getattr(state.progress, count) for count in COUNTS},
            "losses": state.losses,
            EVALS: state.evals,
            "left_out": state.left_out,
        }
        before = _all(self.out)
        try:
            self._write(name, held, run)
        except (OSError, RuntimeError) as error:  # torch.save raises either
            kept = (
                f"The run goes on; the checkpoint of step {self.step} stays"
                if self.step
                else "The run goes on"
            )
            reason = str(error).partition("\n")[0].rstrip(". ")
            warnings.warn(
                f"{self.out}: the checkpoint of step {state.progress.step} was not saved ({reason}). {kept}. Free "
                "some space before the next one",
                stacklevel=2,
            )
            return
        self.step = state.progress.step
        for path in before:
            _discard(path)

    def _write(self, name: str, held: dict[str, Any], run: dict[str, Any]) -> None:
        partial = self.out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            torch.save(held, partial / STATE)
            (partial / RUN).write_text(json.dumps(run))
            for file in partial.iterdir():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
            sync_folder(partial)
            partial.rename(self.out / name)
            sync_folder(self.out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def clear(self) -> None:
        """Leaves no checkpoint in the folder. For the main process."""
        for path in _all(self.out):
            _discard(path)

    def _sweep(self) -> None:
        """Removes what a killed run left of a checkpoint."""
        for name in (PARTIAL, GONE):
            shutil.rmtree(self.out / name, ignore_errors=True)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


def _shard_moments(held: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Cuts stored moments as the parameters are that they belong to, so that no device holds them whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in held["state"].items():
        held["state"][place] = {name: like(value, parameters[place]) for name, value in moments.items()}


def _discard(checkpoint: Path) -> None:
    """By way of another name, so that half of one is never taken for whole."""
    gone = checkpoint.with_name(GONE)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
