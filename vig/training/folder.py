"""The folder of a training run: locked, tested for writing, and at the end a whole checkpoint or the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata as package_metadata
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn

from vig.data.files import StoreError, explain_write_errors, lock_folder, make_readable, write_atomically
from vig.training.checkpoint import MadeWith
from vig.training.settings import TrainError, TrainResult, TrainSettings

RECORD, CARD = "train.json", "README.md"
# What a checkpoint before may have left, and the loader would take together with the new files.
OF_A_CHECKPOINT = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors*")


@contextmanager
def own_folder(out: Path | None, processes: PartialState) -> Iterator[bool]:
    """Holds the folder for one run, whose main process locks it for all. Yields if the run before died in it.

    Raises FolderInUse and StoreError in every process.
    """
    if out is None:
        yield False
        return
    lock, refusal = None, None
    if processes.is_main_process:
        try:
            lock = lock_folder(out)
        except StoreError as error:
            refusal = error
    try:
        for refused in filter(None, gather_object([refusal])):
            raise refused
        yield any(gather_object([lock is not None and lock.after_death]))
    finally:
        if lock is not None:
            lock.release()


def prepare_folder(out: Path) -> None:
    """Makes the folder and checks, before hours of work, that it can be written. For the main process."""
    with explain_write_errors(out):
        probe = out / ".partial"
        shutil.rmtree(probe, ignore_errors=True)  # of a run that was killed while it saved
        probe.mkdir()
        probe.rmdir()


def check_space(model: nn.Module, out: Path, save_every: int = 0, resumed: bool = False) -> None:
    """Before hours of work, not after them. A checkpoint that is there stays until the next one is written."""
    adapters = hasattr(model, "peft_config")
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapters)
    what = "checkpoint takes"
    if save_every:
        under_way = 3 * sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )  # AdamW's
        size = max(size, under_way) + (0 if resumed else under_way)
        what = "checkpoints of save_every and the trained model take"
    free = shutil.disk_usage(out).free
    if free < size:
        raise TrainError(
            f"{out}: the {what} {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free. Free some space, or "
            "choose another folder"
        )


def save(
    result: TrainResult,
    processor: Any,
    made_with: MadeWith,
    settings: TrainSettings,
    weights: dict[str, Any] | None = None,  # of a sharded model, whole
) -> None:
    """Writes beside the final names, then renames; train.json comes last and says that the rest is whole.

    A README.md that is there stays: somebody may have written it, and peft's is a form to fill in.
    """
    out = result.out
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        result.model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        make_readable(partial)
        (out / RECORD).unlink(missing_ok=True)
        for old in chain.from_iterable(out.glob(pattern) for pattern in OF_A_CHECKPOINT):
            old.unlink()
        if (out / CARD).exists():
            (partial / CARD).unlink(missing_ok=True)
        for file in sorted(partial.iterdir()):
            if (out / file.name).is_dir():
                shutil.rmtree(out / file.name)
            file.replace(out / file.name)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{out}: the trained weights were not saved ({error}). Free some space and run the same command again: "
            "it goes on from the last checkpoint of save_every, or trains again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    versions = {name: package_metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    record = {
        **made_with.provenance,
        "run": made_with.run,
        "settings": asdict(settings),
        "versions": versions,
        **{name: value for name, value in vars(result).items() if name not in ("model", "out")},
    }
    write_atomically(out / RECORD, json.dumps(record, indent=1).encode())
