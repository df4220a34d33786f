"""The lean training loop: a model, data and a selection in, a checkpoint out. Reads from top to bottom.

For DeepSpeed, accelerate's FSDP or other optimisers use `vig.training.trainer.SelectiveTrainer`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import nn

from vig.data.locate import Located, locate
from vig.data.reading import Reading, Source
from vig.data.sample import SampleError
from vig.data.samples import read_samples
from vig.models.launch import PATIENCE
from vig.training.batches import MicroBatches, plan_batches
from vig.training.checkpoint import Checkpoints, MadeWith, RunState, run_facts
from vig.training.collator import Kept, Record, SelectiveCollator, keep_samples
from vig.training.finished import finished_record, finished_result, refuse_other_run
from vig.training.folder import check_space, own_folder, prepare_folder, save
from vig.training.held_out import HeldOut
from vig.training.labels import AnySelection, Selected, open_selection
from vig.training.loop import Stepper, Watchers, run, stop_on_signals
from vig.training.model import (
    choose_device,
    computes_in,
    context,
    load_model,
    load_trained,
    prepare,
    revision_here,
)
from vig.training.same_data import check_same_data, renamed_since
from vig.training.settings import TrainError, TrainProgress, TrainResult, TrainSettings, WrongSetting
from vig.training.sharding import whole
from vig.training.stop_check import warn_if_nothing_stops
from vig.training.trackers import check_trackers, trackers_of


def train(
    model: Any,
    data: str | Path | Iterable[Record],
    selection: AnySelection | None,
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
    eval_data: str | Path | Iterable[Record] | None = None,
    report_to: Sequence[str] = (),
    on_progress: Callable[[TrainProgress], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Trains a model on the selected answer tokens with AdamW, and saves model, processor and ``train.json``.

    model: a checkpoint folder, a name on the hub, a `LoadedModel`, or a transformers model (then give `processor`
        too). A model in memory is trained in place.
    data: a file or folder as `vig.data.samples.read_samples` takes, or an iterable of Samples or Encoded samples.
    selection: a folder of ``vig select``, what `vig.select` returned, a mapping key -> (keep, token_ids,
        token_keep), or None for all tokens.
    out: folder of the checkpoint, None to save nothing. One whose run is finished gives its result again, without
        training, where model, data, selection and settings are the same; any other checkpoint there is refused unless
        `overwrite`, and so is one where the model is given in memory.
    device: the GPU where there is one unless given; not for several processes, which have one each.
    revision, attn, trust_remote_code: for a model given by name, as `families.load` takes them. The revision is the
        one that the selection was scored at unless given; another one of the same model is refused.
    eval_data: held-out data, as `data`. The loss on all its answer tokens is taken before the first step (unless
        ``eval_on_start`` is False), every ``eval_every`` steps and at the end (`evals` of the result, "eval/loss" of
        the trackers).
    report_to: "tensorboard", "trackio", "wandb", ...: accelerate's trackers; those that write files write below
        ``out/logs``.
    settings: the fields of `TrainSettings`.

    Samples that cannot be encoded (no image, image tokens beyond max_length) are left out: no loss, no count, their
    errors in the result. So are those that crash a decoder, with `workers`, and without in the run after. Ctrl-C and
    SIGTERM end the run after the current step and save what there is; a second one stops at once. The folder is
    complete when it holds train.json. Same inputs, settings, machine and thread count give the same weights.
    With ``save_every`` a run that was killed goes on from its last checkpoint when it is called again in the same way,
    and ends with the weights and losses of an uninterrupted one; Ctrl-C and SIGTERM save such a checkpoint too.
    Settings that shape the steps must be the same; ``overwrite`` starts anew. One run at a time writes to a folder.
    Under ``accelerate launch`` or torchrun it runs on several devices, with the same loss. With ``fsdp`` they hold one
    model together, which none of them could hold alone; each process reads it into the memory of its host first.
    Raises TrainError, also where the data changed since they were scored; StoreError (the folder cannot be written),
    FolderInUse (another run is writing there), SettingsDiffer (it holds a checkpoint of another run), SampleError (by
    key, for samples that do not fit the selection), ModelError and HeadError.
    """
    settings = TrainSettings(**settings)
    out = None if out is None else Path(out)
    _check_arguments(settings, out, eval_data, report_to)
    processes = _processes(settings.fsdp)
    device = choose_device(device, processes)
    with own_folder(out, processes) as after_death:
        checkpoints = Checkpoints(out, overwrite, processes, device)
        goes_on = out is None or overwrite or checkpoints.found is not None
        finished = None if goes_on else finished_record(out, model)
        if out is not None and processes.is_main_process:
            prepare_folder(out)
        table = open_selection(selection)
        metadata = getattr(table, "metadata", {})
        records = data
        reading = data.reading if isinstance(data, Source) else Reading.stored(metadata)
        source, located, fingerprint = None, None, None
        if isinstance(data, str | os.PathLike):  # raises for data that is not there, before a model is loaded
            source = Source(Path(data), reading)
            located = locate(source.path, reading.split)
            fingerprint = check_same_data(source, located, table)
            records = read_samples(source, image_root=image_root, limit=limit, located=located)
        kept = _kept(records, table, limit, source, located)
        facts = run_facts(settings, kept.samples, computes_in(settings, device), processes.num_processes)
        about_data = {"data": source and str(source), "data_fingerprint": fingerprint}
        provenance = {"model": None, "revision": None, **about_data, "selection": metadata or None}
        made_with = MadeWith(provenance, facts)
        options = {"revision": revision, "attn": attn, "trust_remote_code": trust_remote_code}
        if finished is not None:
            name = str(model)
            provenance.update(model=name, revision=revision_here(name, revision, metadata))
            refuse_other_run(out, finished, made_with.bound(asdict(settings)))
            trained = load_trained(out, name, settings, device, metadata, options)
            return finished_result(out, finished, trained)

        loaded = load_model(model, processor, settings, device, metadata, options)
        provenance.update(model=loaded.name, revision=loaded.revision)
        checkpoints.bind(made_with.bound(asdict(settings)))
        torch.manual_seed(settings.seed)
        model, processor = prepare(loaded.model, settings), loaded.processor
        collator = SelectiveCollator(
            processor, table, end_of_turn=settings.end_of_turn, max_length=settings.max_length or context(model),
            image_root=image_root, counts=True,
        )  # fmt: skip
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

        held_out = _held_out(_read_alike(eval_data, reading), collator, settings, processes, device)
        stepper = Stepper(processes, device, model, steps, settings)
        with stop_on_signals():  # a first Ctrl-C behind the last step does not cost the run
            with trackers_of(report_to, out, processes, asdict(settings)) as trackers:
                watchers = Watchers(on_progress, trackers, held_out)
                interrupted = run(processes, stepper, batches, checkpoints, watchers)
            result = _result(model.eval(), out, kept, resumed, stepper.state, interrupted)
            main = processes.is_main_process
            weights = whole(result.model.state_dict(), main) if settings.fsdp and out is not None else None
            if out is not None and main:
                save(result, processor, made_with, settings, weights)
                if not interrupted:
                    checkpoints.clear()
            processes.wait_for_everyone()
    return result


def _check_arguments(
    settings: TrainSettings, out: Path | None, eval_data: Any, report_to: Sequence[str]
) -> None:
    """Raises TrainError for arguments that lack others, before a model is loaded."""
    if out is None and settings.save_every:
        raise TrainError(f"save_every = {settings.save_every}, but there is no folder to save in. Give out")
    if settings.eval_every and eval_data is None:
        raise TrainError(
            f"eval_every = {settings.eval_every}, but there is no held-out data. Give --eval (eval_data)"
        )
    check_trackers(report_to, out)


def _kept(
    records: Iterable[Record],
    table: Selected | None,
    limit: int | None,
    source: Source | None,
    located: Located | None,
) -> Kept:
    """The samples to train on, of which there is at least one. source, located: where they come from, for the error."""
    try:
        kept = keep_samples(islice(records, limit), table)
    except SampleError as error:
        problem = None if source is None else renamed_since(source, located, table)
        if problem is None:
            raise
        raise TrainError(f"{source}: {problem}") from error
    if kept.samples:
        return kept
    if kept.broken:
        cure = f"The first: {kept.errors[0]}"
    elif kept.dropped:
        cure = "vig select with a lower --p keeps more; without a selection all answer tokens are trained on"
    else:
        cure = "It has no records"
    where = "" if source is None else f"{source}: "
    raise TrainError(
        f"{where}nothing to train on: {kept.dropped} samples not selected, {kept.broken} broken. {cure}"
    )


def _read_alike(data: Any, reading: Reading) -> Any:
    """Held-out data on disk, whose columns and roles have the names of the trained data's unless they say otherwise."""
    if isinstance(data, Source) or not isinstance(data, str | os.PathLike):
        return data
    return Source(Path(data), replace(reading, split=None))


def _held_out(
    data: str | Path | Iterable[Record] | None,
    trained: SelectiveCollator,
    settings: TrainSettings,
    processes: PartialState,
    device: torch.device,
) -> HeldOut | None:
    """The held-out samples, encoded as those that are trained on."""
    if data is None:
        return None
    name = "the held-out data (eval_data)"
    if isinstance(data, str | os.PathLike):
        name += f" {data}"
        data = read_samples(data, image_root=trained.image_root)
    kept = keep_samples(data, None)
    if not kept.samples:
        first = "".join(f". The first of {kept.broken}: {error}" for error in kept.errors[:1])
        raise TrainError(f"{name} holds no sample that can be read{first or '. Give another file as --eval'}")
    encoder = trained.encoder
    collator = SelectiveCollator(
        encoder.processor, end_of_turn=encoder.end_of_turn, max_length=encoder.max_length,
        image_root=trained.image_root, counts=True,
    )  # fmt: skip
    return HeldOut(kept, collator, settings, processes, device)


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
        evals=state.evals,
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


def _processes(fsdp: bool) -> PartialState:
    """This process among the others. (An Accelerator would also carry over the precision of an earlier one.)"""
    # They wait while the main process writes a checkpoint, to a slow disk perhaps: longer than NCCL's 10 minutes.
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if processes.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise TrainError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate was set up for {processes.num_processes} "
            "processes earlier in this one. Call train() first"
        )
    sharded = processes.distributed_type == DistributedType.DEEPSPEED
    if sharded or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise TrainError(
            "this loop takes no FSDP or DeepSpeed configuration of accelerate. Launch it with torchrun and --fsdp, "
            "which shards the model by FSDP2, or use SelectiveTrainer under accelerate launch"
        )
    if fsdp and processes.num_processes == 1:
        raise WrongSetting(
            "fsdp spreads the model over several processes, but this one stands alone. Start one a GPU: "
            "torchrun --nproc-per-node 8 -m vig train ..."
        )
    return processes
