"""The loop of `vig.train`: one optimiser step a turn, the same loss for any split of a step over processes."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from vig.models.lm_head import is_sharded, unwrap
from vig.scoring.batch import on_device
from vig.scoring.memory import is_out_of_memory
from vig.training import sharding
from vig.training.checkpoint import Checkpoints, RunState
from vig.training.held_out import HeldOut
from vig.training.loss import selective_loss
from vig.training.model import computes_in
from vig.training.settings import TrainError, TrainProgress, TrainSettings, mean_loss
from vig.training.trackers import Trackers


class Watchers(NamedTuple):
    """Who follows a run's steps."""

    on_progress: Callable[[TrainProgress], None] | None = None
    trackers: Trackers = Trackers()
    held_out: HeldOut | None = None

    def tell(self, progress: TrainProgress) -> None:
        """For the main process."""
        self.trackers.log(progress)
        if self.on_progress is not None:
            self.on_progress(progress)


def run(
    processes: PartialState,
    stepper: Stepper,
    batches: Iterator[dict[str, Any]],  # the micro-batches still to come
    checkpoints: Checkpoints,
    watchers: Watchers,
) -> bool:
    """Trains to the end, or to Ctrl-C or SIGTERM. Leaves `stepper.state` where it ended; returns if it was stopped."""
    state, settings = stepper.state, stepper.settings
    progress, steps = state.progress, state.progress.steps
    checkpoints.restore(state)
    watchers.trackers.begin(progress)
    losses: list[Tensor] = []  # since the last gathering
    unusable, stopped = dict.fromkeys(state.left_out), False  # their errors, each once
    stepper.model.train()
    with stop_on_signals() as stop:
        if watchers.held_out is not None and settings.eval_on_start and not progress.step:
            stepper.evaluate(watchers.held_out)
            if processes.is_main_process:
                watchers.tell(progress)
        for step in range(progress.step, steps):
            micro_batches = list(islice(batches, settings.accumulate))
            kept = [batch.pop("num_kept") for batch in micro_batches]
            truncated = sum(batch.pop("num_truncated") for batch in micro_batches)
            errors = [str(error) for batch in micro_batches for error in batch.pop("left_out")]
            tokens, truncated, missing, stopped = _over_all(
                processes, [sum(kept), truncated, len(errors), stop.is_set()]
            )
            if stopped:
                break
            unusable |= dict.fromkeys(errors)
            loss, norm = stepper.step(micro_batches, kept, tokens)
            losses.append(loss)
            progress.step = step + 1
            progress.samples += settings.batch_size * settings.accumulate * processes.num_processes - missing
            progress.left_out += missing
            progress.tokens += tokens
            progress.truncated += truncated
            saves = _is_due(settings.save_every, progress) and progress.step < steps
            evaluates = watchers.held_out is not None and (
                progress.step == steps or _is_due(settings.eval_every, progress)
            )
            if evaluates:
                stepper.evaluate(watchers.held_out)
            if saves or evaluates or progress.step == steps or _is_due(settings.log_every, progress):
                _gather_losses(state, losses)
                _report(processes, stepper, norm, watchers)
            if saves:
                _gather_errors(state, unusable)
                checkpoints.save(state)
    _gather_losses(state, losses)
    _gather_errors(state, unusable)
    if stopped and settings.save_every:
        checkpoints.save(state)
    return bool(stopped)


def _is_due(every: int, progress: TrainProgress) -> bool:
    return bool(every) and progress.step % every == 0


class Stepper:
    """The model on its device, AdamW and its schedule: what a step changes, in `state`."""

    def __init__(
        self,
        processes: PartialState,
        device: torch.device,
        model: nn.Module,
        steps: int,
        settings: TrainSettings,
    ):
        self.device, self.settings, self.world = device, settings, processes.num_processes
        self.model = _on_device(model, processes, device, settings.fsdp)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(_groups(model, settings), lr=settings.lr, betas=settings.betas)
        schedule = transformers.get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=round(settings.warmup * steps),
            num_training_steps=steps,
        )
        self.state = RunState(unwrap(self.model), optimizer, schedule, TrainProgress(steps))

    def step(
        self,
        micro_batches: Sequence[dict[str, Any]],
        kept: Sequence[int],  # tokens of each
        tokens: int,  # of all processes
    ) -> tuple[Tensor, Tensor]:
        """One step of AdamW; its loss on this process, and the norm of its gradient."""
        with self._memory_explained():
            loss = self._backward(micro_batches, kept, tokens)
            norm = self._clip()
            self.state.progress.lr = self.state.schedule.get_last_lr()[0]
            self.state.optimizer.step()
        self.state.schedule.step()
        self.state.optimizer.zero_grad()
        return loss, norm

    def _backward(self, micro_batches: Sequence[dict[str, Any]], kept: Sequence[int], tokens: int) -> Tensor:
        loss = torch.zeros((), device=self.device)
        if not tokens:  # on every process; without gradients AdamW leaves the weights alone
            return loss
        for number, (batch, num_kept) in enumerate(zip(micro_batches, kept, strict=True), 1):
            # DDP exchanges gradients once a step; FSDP, where no process could hold them whole, every time
            exchanges = self.settings.fsdp or self.world == 1 or number == self.settings.accumulate
            batch = on_device(batch, self.device)
            with nullcontext() if exchanges else self.model.no_sync():
                with self._autocast():
                    part = selective_loss(
                        self.model, batch, num_items=tokens, num_kept=num_kept, z_loss=self.settings.z_loss
                    )
                if self.settings.fsdp:
                    part = part + sharding.nothing(self.model)
                # DDP and FSDP average the gradients over the processes; tokens counts those of all of them
                (part * self.world).backward()
            loss += part.detach()
        if self.settings.fsdp:
            sharding.drop_unused(self.model)
        return loss

    def _clip(self) -> Tensor:
        """Bounds the gradient; its norm before that."""
        limit = self.settings.max_grad_norm or math.inf
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def evaluate(self, held_out: HeldOut) -> None:
        """The loss on the held-out data, into the state."""
        began, progress = time.monotonic(), self.state.progress
        with self._memory_explained():
            loss = held_out.loss(self.model if self.settings.fsdp else self.state.model, self._autocast())
        if self.settings.fsdp:  # what only a backward would have freed
            self.model.reshard()
        progress.eval_step, progress.eval_loss = progress.step, loss
        progress.evaluating += time.monotonic() - began
        self.state.evals.append([progress.step, loss])

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        """Raises TrainError, with the settings that help, where the memory is too small."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            settings, reason = self.settings, str(error).partition("\n")[0].rstrip(". ")
            raise TrainError(
                f"step {self.state.progress.step + 1} does not fit into the memory of {self.device} ({reason}), with "
                f"batch_size = {settings.batch_size} and accumulate = {settings.accumulate}. Halve batch_size and "
                "double accumulate, which changes no step; gradient_checkpointing and lora_rank need less memory too"
            ) from error

    def _autocast(self) -> torch.autocast:
        enabled = computes_in(self.settings, self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def _on_device(model: nn.Module, processes: PartialState, device: torch.device, fsdp: bool) -> nn.Module:
    """Text-only samples leave the projector unused, so DDP must look for parameters without a gradient."""
    if fsdp:
        return sharding.shard(model, device)
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


def _gather_losses(state: RunState, losses: list[Tensor]) -> None:
    """Moves the losses since the last time into the state, over all processes."""
    if losses:
        state.losses += reduce(torch.stack(losses), "sum").tolist()
        losses.clear()


def _gather_errors(state: RunState, unusable: dict[str, None]) -> None:
    """Puts the errors of all processes into the state."""
    everywhere = gather_object(list(unusable))  # the same sample may come to several processes
    state.left_out = list(dict.fromkeys(everywhere))


def _over_all(processes: PartialState, counts: list[int]) -> list[int]:
    """The sums of counts over all processes."""
    if processes.num_processes == 1:
        return counts
    return reduce(torch.tensor(counts, device=processes.device), "sum").tolist()


def _report(processes: PartialState, stepper: Stepper, norm: Tensor, watchers: Watchers) -> None:
    """The mean loss of the last steps, to those who follow them. Raises TrainError where one of them diverged."""
    progress, settings, losses = stepper.state.progress, stepper.settings, stepper.state.losses
    recent = losses[-settings.log_every :]
    progress.loss, progress.averaged, progress.grad_norm = mean_loss(recent), len(recent), norm.item()
    before = progress.step - len(recent)
    lost = next((step for step, loss in enumerate(recent, before + 1) if not math.isfinite(loss)), None)
    if lost is not None or not math.isfinite(progress.grad_norm):
        at = progress.step if lost is None else lost
        raise TrainError(
            f"step {at}: the loss is {losses[at - 1]}, the gradient norm of step {progress.step} is "
            f"{progress.grad_norm}, with lr = {settings.lr} and warmup = {settings.warmup}. Lower lr or lengthen warmup"
        )
    if processes.is_main_process:
        watchers.tell(progress)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM (a scheduler's warning) sets; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
