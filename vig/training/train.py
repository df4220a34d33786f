"""The lean training loop: a model, data and a selection in, a checkpoint out. Reads from top to bottom.

For FSDP, DeepSpeed, evaluation during training or other optimisers use `vig.training.trainer.SelectiveTrainer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import nn

from vig.data.reading import Reading, Source
from vig.data.samples import read_samples
from vig.selection.select import Selection
from vig.training.batches import MicroBatches, plan_batches
from vig.training.checkpoint import Checkpoints, RunState, made_with
from vig.training.collator import Kept, Record, Selected, SelectiveCollator, keep_samples, open_selection
from vig.training.folder import check_space, own_folder, prepare_folder, save
from vig.training.loop import run
from vig.training.model import choose_device, computes_in, context, load_model, prepare
from vig.training.settings import TrainError, TrainProgress, TrainResult, TrainSettings
from vig.training.stop_check import warn_if_nothing_stops


def train(
    model: Any,
    data: str | Path | Iterable[Record],
    selection: Selection | Selected | str | Path | None,
    out: str | Path | None,
    *,
    processor: Any = None,
    image_root: str | Path | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Trains a model on the selected answer tokens with AdamW, and saves model, processor and ``train.json``.

    model: a checkpoint folder, a name on the hub, a `LoadedModel`, or a transformers model (then give `processor`
        too). A model in memory is trained in place.
    data: a file or folder as `vig.data.samples.read_samples` takes, or an iterable of Samples or Encoded samples.
    selection: a folder of ``vig select``, what `vig.select` returned, a mapping key -> (keep, token_ids,
        token_keep), or None for all tokens.
    out: folder of the checkpoint, None to save nothing. One that holds a checkpoint is refused unless `overwrite`.
    device: the GPU where there is one unless given; not for several processes, which have one each.
    revision, attn, trust_remote_code: for a model given by name, as `families.load` takes them. The revision is the
        one that the selection was scored at unless given; another one of the same model is refused.
    settings: the fields of `TrainSettings`.

    Samples that cannot be encoded (no image, image tokens beyond max_length) are left out: no loss, no count, their
    errors in the result. So are those that crash a decoder, with `workers`, and without in the run after. Ctrl-C and
    SIGTERM end the run after the current step and save what there is; a second one stops at once. The folder is
    complete when it holds train.json. Same inputs, settings, machine and thread count give the same weights.
    With ``save_every`` a run that was killed goes on from its last checkpoint when it is called again in the same way,
    and ends with the weights and losses of an uninterrupted one; Ctrl-C and SIGTERM save such a checkpoint too.
    Settings that shape the steps must be the same; ``overwrite`` starts anew. One run at a time writes to a folder.
    Under ``accelerate launch`` or torchrun it runs on several devices, with the same loss.
    Raises TrainError, StoreError (the folder cannot be written), FolderInUse (another run is writing there),
    SettingsDiffer (it holds a checkpoint of another run), SampleError (by key, for samples that do not fit the
    selection), ModelError and HeadError.
    """
    settings = TrainSettings(**settings)
    out = None if out is None else Path(out)
    if out is None and settings.save_every:
        raise TrainError(f"save_every = {settings.save_every}, but there is no folder to save in. Give out")
    processes = _processes()
    device = choose_device(device, processes)
    with own_folder(out, processes) as after_death:
        checkpoints = Checkpoints(out, overwrite, processes, device)
        if out is not None:
            prepare_folder(out, overwrite or checkpoints.found is not None, processes.is_main_process)
        table = open_selection(selection)
        metadata = getattr(table, "metadata", {})
        records = data
        if isinstance(data, str | os.PathLike):  # raises for data that is not there, before a model is loaded
            as_scored = data if isinstance(data, Source) else Source(Path(data), Reading.stored(metadata))
            records = read_samples(as_scored, image_root=image_root, limit=limit)
        options = {"revision": revision, "attn": attn, "trust_remote_code": trust_remote_code}
        loaded = load_model(model, processor, settings, device, metadata, options)
        torch.manual_seed(settings.seed)
        model, processor = prepare(loaded.model, settings), loaded.processor

        kept = _kept(records, table, limit)
        collator = SelectiveCollator(
            processor,
            table,
            end_of_turn=settings.end_of_turn,
            max_length=settings.max_length or context(model),
            image_root=image_root,
            counts=True,
        )
        made_of = {
            "model": loaded.name,
            "revision": loaded.revision,
            "data": str(data) if isinstance(data, str | os.PathLike) else None,
            "selection": metadata or None,
        }
        if settings.save_every or checkpoints.found:
            precision = computes_in(settings, device)
            checkpoints.bind(made_with(made_of, settings, kept.samples, precision, processes.num_processes))
        if out is not None and processes.is_main_process:
            if overwrite:
                checkpoints.clear()
            check_space(model, out, settings.save_every, checkpoints.found is not None)
        plan = plan_batches(len(kept.samples), settings, processes.num_processes, processes.process_index)
        resumed, steps = checkpoints.step, len(plan) // settings.accumulate
        to_come = MicroBatches(kept.samples, plan[resumed * settings.accumulate :], collator)
        # After a death, perhaps at an image that crashed its decoder, a process apart dies alone.
        made = to_come.made(max(settings.workers, int(after_death)))
        batches = warn_if_nothing_stops(made, collator.encoder.stop_ids)

        state, interrupted = run(processes, device, model, batches, steps, settings, checkpoints, on_progress)
        result = _result(model.eval(), out, kept, resumed, state, interrupted)
        if out is not None and processes.is_main_process:
            save(result, processor, made_of, settings)
            if not interrupted:
                checkpoints.clear()
        processes.wait_for_everyone()
    return result


def _kept(records: Iterable[Record], table: Selected | None, limit: int | None) -> Kept:
    """The samples to train on, of which there is at least one."""
    kept = keep_samples(islice(records, limit), table)
    if not kept.samples:
        raise TrainError(
            f"nothing to train on: {kept.dropped} samples not selected, {kept.broken} broken"
            + "".join(f". The first: {error}" for error in kept.errors[:1])
        )
    return kept


def _result(
    model: nn.Module, out: Path | None, kept: Kept, resumed: int, state: RunState, interrupted: bool
) -> TrainResult:
    progress, left_out = state.progress, state.left_out
    if left_out and not progress.tokens and not interrupted:
        raise TrainError(
            f"nothing to train on: {len(left_out)} samples were unusable. The first: {left_out[0]}"
        )
    return TrainResult(
        model=model,
        out=out,
        steps=progress.step,
        resumed=resumed,
        interrupted=interrupted,
        losses=state.losses,
        samples=progress.samples,
        tokens=progress.tokens,
        truncated=progress.truncated,
        kept=len(kept.samples),
        dropped=kept.dropped,
        broken=kept.broken,
        left_out=len(left_out),
        errors=[*map(str, kept.errors), *left_out],
        seconds=progress.seconds,
    )


def _processes() -> PartialState:
    """This process among the others. (An Accelerator would also carry over the precision of an earlier one.)"""
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if processes.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise TrainError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate was set up for {processes.num_processes} "
            "processes earlier in this one. Call train() first"
        )
    sharded = processes.distributed_type == DistributedType.DEEPSPEED
    if sharded or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise TrainError("this loop does not shard the model. For FSDP and DeepSpeed use SelectiveTrainer")
    return processes
