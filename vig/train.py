"""The lean training loop: a model, data and a selection in, a checkpoint out. Reads from top to bottom.

For FSDP, DeepSpeed, evaluation during training or other optimisers use `vig.trainer.SelectiveTrainer`.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vig.loss import selective_loss, unwrap, verify_head
from vig.samples import SampleError, read_samples
from vig.select import Selection
from vig.train_batches import ReadableCollator, plan_batches
from vig.train_checkpoint import Checkpoints, RunState, made_with
from vig.train_folder import check_space, prepare_folder, save
from vig.train_model import choose_device, computes_in, context, load_model, prepare
from vig.train_settings import TrainError, TrainProgress, TrainResult, TrainSettings
from vig.trainer import Record, Selected, SelectiveCollator, keep_samples, open_selection


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
    data: a file or folder as `vig.samples.read_samples` takes, or an iterable of Samples or Encoded samples.
    selection: a folder of ``vig select``, what `vig.select.select` returned, a mapping key -> (keep, token_ids,
        token_keep), or None for all tokens.
    out: folder of the checkpoint, None to save nothing. One that holds a checkpoint is refused unless `overwrite`.
    device: the GPU where there is one unless given; not for several processes, which have one each.
    revision, attn, trust_remote_code: for a model given by name, as `vig.families.load` takes them. The revision is the
        one that the selection was scored at unless given; another one of the same model is refused.
    settings: the fields of `TrainSettings`.

    Samples that cannot be encoded (no image, image tokens beyond max_length) are left out: no loss, no count, their
    errors in the result. Ctrl-C ends the run after the current step and saves what there is; a second one stops at
    once. The folder is complete when it holds train.json. Same inputs, settings, machine and thread count give the
    same weights.
    With ``save_every`` a run that was killed goes on from its last checkpoint when it is called again in the same way,
    and ends with the weights and losses of an uninterrupted one; Ctrl-C saves such a checkpoint too. Settings that
    shape the steps must be the same; ``overwrite`` starts anew.
    Under ``accelerate launch`` or torchrun it runs on several devices, with the same loss.
    Raises TrainError, StoreError (the folder cannot be written), SettingsDiffer (it holds a checkpoint of another run),
    SampleError (by key, for samples that do not fit the selection), ModelError and HeadError.
    """
    settings = TrainSettings(**settings)
    out = None if out is None else Path(out)
    if out is None and settings.save_every:
        raise TrainError(f"save_every = {settings.save_every}, but there is no folder to save in. Give out")
    processes = _processes()
    device = choose_device(device, processes)
    table = open_selection(selection)
    metadata = getattr(table, "metadata", {})
    records = data
    if isinstance(data, str | Path):
        records = read_samples(data, image_root=image_root, limit=limit)
    options = {"revision": revision, "attn": attn, "trust_remote_code": trust_remote_code}
    loaded = load_model(model, processor, settings, device, metadata, options)
    checkpoints = Checkpoints(out, overwrite, processes, device)
    if out is not None:
        prepare_folder(out, overwrite or checkpoints.found is not None, processes.is_main_process)
    torch.manual_seed(settings.seed)
    model, processor = prepare(loaded.model, settings), loaded.processor

    kept = keep_samples(islice(records, limit), table)
    if not kept.samples:
        raise TrainError(
            f"nothing to train on: {kept.dropped} samples not selected, {kept.broken} broken"
            + "".join(f". The first: {error}" for error in kept.errors[:1])
        )
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
        "data": str(data) if isinstance(data, str | Path) else None,
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
    loader = DataLoader(
        kept.samples,
        batch_sampler=plan[checkpoints.step * settings.accumulate :],
        collate_fn=ReadableCollator(collator),
        num_workers=settings.workers,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
    )

    resumed, steps = checkpoints.step, len(plan) // settings.accumulate
    state, interrupted = _run(processes, device, model, loader, steps, settings, checkpoints, on_progress)
    progress, left_out = state.progress, state.left_out
    if left_out and not progress.tokens and not interrupted:
        raise TrainError(
            f"nothing to train on: {len(left_out)} samples were unusable. The first: {left_out[0]}"
        )
    result = TrainResult(
        model=model.eval(),
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
    if out is not None and processes.is_main_process:
        save(result, processor, made_of, settings)
        if not interrupted:
            checkpoints.clear()
    processes.wait_for_everyone()
    return result


def _run(
    processes: PartialState,
    device: torch.device,
    model: nn.Module,
    loader: DataLoader,
    steps: int,
    settings: TrainSettings,
    checkpoints: Checkpoints,
    on_progress: Callable[[TrainProgress], None] | None,
) -> tuple[RunState, bool]:
    """The loop: one optimiser step a turn. Returns where it ended, and if it was stopped."""
    model, world = _on_device(model, processes, device), processes.num_processes
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_groups(model, settings), lr=settings.lr, betas=settings.betas)
    schedule = transformers.get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=round(settings.warmup * steps),
        num_training_steps=steps,
    )
    state = RunState(unwrap(model), optimizer, schedule, TrainProgress(steps))
    progress, losses, stopped, proven = state.progress, [], False, False
    arriving = iter(loader)  # draws a number, so the random state comes after it
    checkpoints.restore(state)
    unusable = dict.fromkeys(state.left_out)  # their errors, each once
    model.train()
    with _stop_on_ctrl_c() as stop:
        for step in range(progress.step, steps):
            micro_batches = list(islice(arriving, settings.accumulate))
            for misfit in (batch for batch in micro_batches if isinstance(batch, SampleError)):
                raise misfit
            kept = [batch.pop("num_kept") for batch in micro_batches]
            truncated = sum(batch.pop("num_truncated") for batch in micro_batches)
            errors = [str(error) for batch in micro_batches for error in batch.pop("left_out")]
            tokens, truncated, missing, stopped = _over_all(
                processes, [sum(kept), truncated, len(errors), stop.is_set()]
            )
            if stopped:
                break
            unusable |= dict.fromkeys(errors)
            if not tokens:  # on every process; without gradients AdamW leaves the weights alone
                micro_batches, kept = [], []
            loss = torch.zeros((), device=device)
            for number, (batch, num_kept) in enumerate(zip(micro_batches, kept, strict=True), 1):
                last = number == settings.accumulate  # DDP exchanges gradients once a step
                batch = send_to_device(batch, device)
                if not proven:
                    proven = _prove_head(model, batch, settings, device)
                with nullcontext() if last or world == 1 else model.no_sync():
                    with _autocast(settings, device):
                        part = selective_loss(
                            model, batch, num_items=tokens, num_kept=num_kept, z_loss=settings.z_loss
                        )
                    # DDP averages the gradients over the processes; tokens counts those of all of them
                    (part * world).backward()
                loss += part.detach()
            norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
            progress.lr = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
            progress.step = step + 1
            progress.samples += settings.batch_size * settings.accumulate * world - missing
            progress.left_out += missing
            progress.tokens += tokens
            progress.truncated += truncated
            saves = settings.save_every and progress.step % settings.save_every == 0 and progress.step < steps
            if saves or progress.step % settings.log_every == 0 or progress.step == steps:
                _report(processes, progress, loss, norm, on_progress)
            if saves:
                _gather(state, losses, unusable)
                checkpoints.save(state)
    _gather(state, losses, unusable)
    if stopped and settings.save_every:
        checkpoints.save(state)
    return state, bool(stopped)


# --- before the loop ---


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


def _on_device(model: nn.Module, processes: PartialState, device: torch.device) -> nn.Module:
    """Text-only samples leave the projector unused, so DDP must look for parameters without a gradient."""
    model = model.to(device)
    if processes.num_processes == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


# --- in the loop ---


def _gather(state: RunState, losses: list[Tensor], unusable: dict[str, None]) -> None:
    """Moves the losses since the last time, and the errors, into the state, from all processes."""
    if losses:
        state.losses += reduce(torch.stack(losses), "sum").tolist()
        losses.clear()
    everywhere = gather_object(list(unusable))  # the same sample may come to several processes
    state.left_out = list(dict.fromkeys(everywhere))


def _autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(
        device.type, torch.bfloat16, enabled=computes_in(settings, device) == torch.bfloat16
    )


def _prove_head(
    model: nn.Module, batch: dict[str, Tensor], settings: TrainSettings, device: torch.device
) -> bool:
    """What the first loss would do, but drawing no number: a resumed run proves it too, at a later step."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type), _autocast(settings, device):
        verify_head(model, inputs)
    return True


def _over_all(processes: PartialState, counts: list[int]) -> list[int]:
    """The sums of counts over all processes."""
    if processes.num_processes == 1:
        return counts
    return reduce(torch.tensor(counts, device=processes.device), "sum").tolist()


def _report(
    processes: PartialState,
    progress: TrainProgress,
    loss: Tensor,
    norm: Tensor,
    on_progress: Callable[[TrainProgress], None] | None,
) -> None:
    progress.loss, progress.grad_norm = reduce(loss, "sum").item(), norm.item()
    if not (math.isfinite(progress.loss) and math.isfinite(progress.grad_norm)):
        raise TrainError(
            f"step {progress.step}: the loss is {progress.loss}, the gradient norm {progress.grad_norm}. "
            "Lower lr or lengthen warmup"
        )
    if on_progress is not None and processes.is_main_process:
        on_progress(progress)


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
