"""The lean training loop: a model, data and a selection in, a checkpoint out. Reads from top to bottom.

For FSDP, DeepSpeed, evaluation during training or other optimisers use `vig.trainer.SelectiveTrainer`.
"""

from __future__ import annotations

import math
import os
import re
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

from vig.families import LoadedModel, load
from vig.loss import selective_loss, unwrap
from vig.samples import SampleError, read_samples
from vig.select import Selection
from vig.train_batches import ReadableCollator, plan_batches
from vig.train_folder import check_space, prepare_folder, save
from vig.train_settings import TrainError, TrainProgress, TrainResult, TrainSettings
from vig.trainer import Record, Selected, SelectiveCollator, keep_samples, open_selection

# The vision tower, as the families name it; Qwen's merger is the projector and trains.
VISION_TOWER = (
    r"(^|\.)(vision_tower|vision_model|vision_encoder)\.",
    r"(^|\.)visual\.(?!merger|deepstack_merger)",
)


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
    settings: the fields of `TrainSettings`.

    Samples that cannot be encoded (no image, image tokens beyond max_length) are left out: no loss, no count, their
    errors in the result. Ctrl-C ends the run after the current step and saves what there is; a second one stops at
    once. The folder is complete when it holds train.json. Same inputs, settings, machine and thread count give the
    same weights.
    Under ``accelerate launch`` or torchrun it runs on several devices, with the same loss.
    Raises TrainError, StoreError (the folder cannot be written), SampleError (by key, for samples that do not fit the
    selection) and HeadError.
    """
    settings = TrainSettings(**settings)
    processes = _processes()
    name, model, processor = _model(model, processor, settings, processes.device)
    out = None if out is None else prepare_folder(out, overwrite, processes.is_main_process)
    torch.manual_seed(settings.seed)
    model = _trainable(model, settings)
    if out is not None and processes.is_main_process:
        check_space(model, out)

    table = open_selection(selection)
    records = data
    if isinstance(data, str | Path):
        records = read_samples(data, image_root=image_root, limit=limit)
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
        max_length=settings.max_length or _context(model),
        image_root=image_root,
        counts=True,
    )
    plan = plan_batches(len(kept.samples), settings, processes.num_processes, processes.process_index)
    loader = DataLoader(
        kept.samples,
        batch_sampler=plan,
        collate_fn=ReadableCollator(collator),
        num_workers=settings.workers,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
    )

    progress, losses, left_out, interrupted = _run(processes, model, loader, settings, on_progress)
    if left_out and not progress.tokens and not interrupted:
        raise TrainError(
            f"nothing to train on: {len(left_out)} samples were unusable. The first: {left_out[0]}"
        )
    result = TrainResult(
        model=model.eval(),
        out=out,
        steps=progress.step,
        interrupted=interrupted,
        losses=losses,
        samples=progress.samples,
        tokens=progress.tokens,
        truncated=progress.truncated,
        kept=len(kept.samples),
        dropped=kept.dropped,
        broken=kept.broken,
        left_out=len(left_out),
        errors=[str(error) for error in (*kept.errors, *left_out)],
        seconds=progress.seconds,
    )
    if out is not None and processes.is_main_process:
        made_of = {"model": name, "data": str(data) if isinstance(data, str | Path) else None}
        save(result, processor, made_of | {"selection": getattr(table, "metadata", None)}, settings)
    processes.wait_for_everyone()
    return result


def _run(
    processes: PartialState,
    model: nn.Module,
    loader: DataLoader,
    settings: TrainSettings,
    on_progress: Callable[[TrainProgress], None] | None,
) -> tuple[TrainProgress, list[float], list[SampleError], bool]:
    """The loop: one optimiser step a turn.

    Returns where it ended, the loss of each step, why samples were left out (an error each), and if it was stopped.
    """
    steps = len(loader) // settings.accumulate
    model, world = _on_device(model, processes), processes.num_processes
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_groups(model, settings), lr=settings.lr, betas=settings.betas)
    schedule = transformers.get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=round(settings.warmup * steps),
        num_training_steps=steps,
    )
    progress, losses, stopped = TrainProgress(steps), [], False
    left_out: dict[str, SampleError] = {}
    arriving = iter(loader)
    model.train()
    with _stop_on_ctrl_c() as stop:
        for step in range(steps):
            micro_batches = list(islice(arriving, settings.accumulate))
            for misfit in (batch for batch in micro_batches if isinstance(batch, SampleError)):
                raise misfit
            kept = [batch.pop("num_kept") for batch in micro_batches]
            truncated = sum(batch.pop("num_truncated") for batch in micro_batches)
            unusable = [error for batch in micro_batches for error in batch.pop("left_out")]
            left_out |= {str(error): error for error in unusable}
            tokens, truncated, missing, stopped = _over_all(
                processes, [sum(kept), truncated, len(unusable), stop.is_set()]
            )
            if stopped:
                break
            if not tokens:  # on every process; without gradients AdamW leaves the weights alone
                micro_batches, kept = [], []
            loss = torch.zeros((), device=processes.device)
            for number, (batch, num_kept) in enumerate(zip(micro_batches, kept, strict=True), 1):
                last = number == settings.accumulate  # DDP exchanges gradients once a step
                batch = send_to_device(batch, processes.device)
                with nullcontext() if last or world == 1 else model.no_sync():
                    with _autocast(settings, processes.device):
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
            if progress.step % settings.log_every == 0 or progress.step == steps:
                _report(processes, progress, loss, norm, on_progress)
    losses = reduce(torch.stack(losses), "sum").tolist() if losses else []
    everywhere = gather_object(list(left_out.values()))  # the same sample may come to several processes
    return progress, losses, list({str(error): error for error in everywhere}.values()), bool(stopped)


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


def _on_device(model: nn.Module, processes: PartialState) -> nn.Module:
    """Text-only samples leave the projector unused, so DDP must look for parameters without a gradient."""
    model = model.to(processes.device)
    if processes.num_processes == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def _model(
    model: Any, processor: Any, settings: TrainSettings, device: torch.device
) -> tuple[str, nn.Module, Any]:
    """Its name, the model with float32 weights (16-bit ones stay only where LoRA freezes them), its processor."""
    if isinstance(model, str | Path):
        frozen = settings.lora_rank and _computes_in(settings, device) == torch.bfloat16
        model = load(model, dtype="bfloat16" if frozen else "float32", device=device)
    if isinstance(model, LoadedModel):
        return model.name, model.model, processor or model.processor
    if processor is None:
        raise TrainError("a loaded model was given without its processor. Give processor=")
    return model.config.name_or_path or type(model).__name__, model, processor


def _trainable(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Freezes what `settings` say, or puts LoRA adapters around the frozen model."""
    if settings.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise TrainError('LoRA needs peft: pip install "vig-kernels[trl]"') from error
        alpha = settings.lora_alpha or 2 * settings.lora_rank
        model = get_peft_model(
            model, LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules=settings.lora_targets)
        )
    for pattern in VISION_TOWER if settings.freeze is None else settings.freeze:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found and settings.freeze is not None:
            names = ", ".join(list(dict(model.named_parameters()))[:3])
            raise TrainError(f"freeze = {pattern!r} matches no parameter. They are called {names}, ...")
        for parameter in found:
            parameter.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise TrainError("every parameter is frozen: nothing to train")
    for name, parameter in trained:
        if parameter.dtype != torch.float32:
            raise TrainError(
                f"{name} is {parameter.dtype}: AdamW's small steps would be rounded away. Load the model with "
                "dtype float32; the forward still runs in bfloat16"
            )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _context(model: nn.Module) -> int | None:
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


# --- in the loop ---


def _computes_in(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if able else torch.float32
    return getattr(torch, settings.dtype)


def _autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(
        device.type, torch.bfloat16, enabled=_computes_in(settings, device) == torch.bfloat16
    )


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
