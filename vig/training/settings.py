"""What a training run takes, reports and returns."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vig.models.end_of_turn import END_OF_TURN

SCHEDULES = (  # those of transformers.SchedulerType that need no settings of their own
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
LORA_TARGETS = r"(?!.*(vision|visual)).*\.(q|k|v|o|gate|up|down)_proj"
LOSS_ENDS = 10  # steps at each end of a run, whose mean losses are compared
LEAST = {
    "max_steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "log_every": 1,
    "save_every": 0,
    "eval_every": 0,
    "lr": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "z_loss": 0,
    "lora_rank": 0,
    "max_length": 2,
    "workers": 0,
}


class TrainError(ValueError):
    """Training cannot start, or went wrong; says what, and what helps."""


class WrongSetting(TrainError):
    """A value that makes no sense, whatever the model and the data."""

    exit_code = 2  # of the command line: wrong usage


@dataclass(frozen=True)
class TrainSettings:
    """Everything that shapes a run, with the defaults of ``vig train``.

    A step runs over batch_size x accumulate x processes samples. Its loss is divided by its kept tokens, so
    accumulate trades memory for time and nothing else.
    """

    epochs: float = 1.0
    max_steps: int | None = None  # overrides epochs
    batch_size: int = 8  # samples of a micro-batch on one device
    accumulate: int = 1  # micro-batches a step
    lr: float = 2e-5
    schedule: str = "cosine"  # one of SCHEDULES
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0  # on matrices; norms and biases have none
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    dtype: str = (
        "auto"  # of the forward: "bfloat16" (autocast over float32 weights), "float32", auto by device
    )
    freeze: tuple[str, ...] | None = None  # patterns of names; None: the vision tower; ("none",): nothing
    lora_rank: int = 0  # 0: train the weights themselves
    lora_alpha: float | None = None  # 2 * rank unless given
    lora_targets: str = LORA_TARGETS  # pattern that the whole module name matches
    gradient_checkpointing: bool = False
    fsdp: bool = (
        False  # weights, gradients and moments are spread over the processes (`vig.training.sharding`)
    )
    end_of_turn: str | None = None  # what the selection was scored with unless given
    max_length: int | None = None  # the model's context unless given; longer samples lose their end
    workers: int = 0  # processes that decode and tokenise ahead of the model
    seed: int = 0
    log_every: int = 10  # steps between two reports, whose loss is the mean over them
    save_every: int = 0  # steps between two checkpoints, from which the same call goes on; 0: none
    eval_every: int = (
        0  # steps between two evaluations on held-out data; 0: only before the first step and at the end
    )
    eval_on_start: bool = (
        True  # evaluate before the first step too, where there is held-out data to compare on
    )

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:  # a NaN is neither
                raise WrongSetting(f"{name} = {value}, expected at least {least}")
        if not 0 < self.epochs < math.inf:
            raise WrongSetting(f"epochs = {self.epochs}, expected more than 0")
        if not 0 <= self.warmup <= 1:
            raise WrongSetting(f"warmup = {self.warmup}, expected a share of the steps, 0 to 1")
        if self.schedule not in SCHEDULES:
            raise WrongSetting(f"schedule = {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise WrongSetting(f"dtype = {self.dtype!r}, expected auto, float32 or bfloat16")
        if self.end_of_turn not in (None, *END_OF_TURN):
            raise WrongSetting(
                f"end_of_turn = {self.end_of_turn!r}, expected one of {', '.join(END_OF_TURN)}"
            )
        if not 0 <= self.seed < 2**63:
            raise WrongSetting(f"seed = {self.seed}, expected 0 to 2^63 - 1")
        patterns = [("freeze", pattern) for pattern in self.freeze or ()]
        for name, pattern in (*patterns, ("lora_targets", self.lora_targets)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise WrongSetting(f"{name} = {pattern!r} is not a regular expression: {error}") from None


def mean_loss(losses: Sequence[float]) -> float:
    """Mean of the losses of steps, each the mean over its kept tokens; those without a token (0) are left out."""
    taken = [loss for loss in losses if loss]
    return sum(taken) / len(taken) if taken else 0.0


class LossEnds(NamedTuple):
    """Mean losses at both ends of a run, which can be compared as those of single steps cannot."""

    first: float
    last: float
    steps: int  # that each is the mean of: 10, or half of a shorter run


def loss_ends(losses: Sequence[float]) -> LossEnds | None:
    """None of a run without a step."""
    steps = max(1, min(LOSS_ENDS, len(losses) // 2))
    return LossEnds(mean_loss(losses[:steps]), mean_loss(losses[-steps:]), steps) if losses else None


@dataclass
class TrainProgress:
    """Where a run stands; handed to the `on_progress` callback. str() gives a log line."""

    steps: int
    step: int = 0
    loss: float = math.nan  # `mean_loss` of the last `averaged` steps, nats a kept token
    averaged: int = 0  # at most log_every
    lr: float = 0.0
    grad_norm: float = math.nan
    samples: int = 0  # trained on so far, on all devices
    left_out: int = 0  # unusable ones met so far, repetitions included
    tokens: int = 0  # kept tokens trained on so far
    truncated: int = 0  # answers cut short so far
    eval_loss: float = math.nan  # of the last evaluation, nats a held-out answer token
    eval_step: int | None = None  # after which it was; 0: before the first one
    evaluating: float = 0.0  # seconds of evaluations, which rates leave out
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def training_seconds(self) -> float:
        return max(self.seconds - self.evaluating, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Of the steps to come; evaluations are not foreseen."""
        return self.training_seconds / max(self.step, 1) * (self.steps - self.step)

    def __str__(self) -> str:
        if not self.step:
            return f"step 0/{self.steps}  eval loss {self.eval_loss:.4f} before the first step"
        minutes, seconds = divmod(int(self.seconds_left), 60)
        unusable = f"  {self.left_out:,} samples left out" if self.left_out else ""
        mean = f" (mean of {self.averaged} steps)" if self.averaged > 1 else ""
        held_out = "" if self.eval_step is None else f"  eval loss {self.eval_loss:.4f}"
        if self.eval_step not in (None, self.step):
            held_out += f" (step {self.eval_step})"
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}{mean}{held_out}  lr {self.lr:.2e}  "
            f"grad norm {self.grad_norm:.3g}  {self.samples / self.training_seconds:.1f} samples/s  "
            f"{self.tokens:,} tokens  {minutes}:{seconds:02d} left{unusable}"
        )


@dataclass
class TrainResult:
    """What a run did. `model` is the trained model itself, in eval mode, on its device."""

    model: nn.Module = field(repr=False)
    out: Path | None
    steps: int
    resumed: int  # of them, done by earlier runs
    interrupted: bool
    losses: list[float] = field(repr=False)  # one a step: mean over its kept tokens, nats; 0 without any
    samples: int  # trained on, repetitions included
    tokens: int  # kept tokens trained on, repetitions included
    truncated: int  # answers cut short by max_length, repetitions included
    kept: int  # samples with a selected token
    dropped: int  # samples without
    broken: int  # records that never became samples
    left_out: int  # kept samples that could not be used: no image, too long, ...
    evals: list[list[float]] = field(repr=False)  # [step, loss on the held-out data] of each evaluation
    errors: list[str] = field(repr=False)  # of broken records and samples left out: key, id, reason and cure
    seconds: float  # of earlier runs too

    @property
    def was_finished(self) -> bool:
        """Whether there was nothing left to do."""
        return self.resumed == self.steps and not self.interrupted

    @property
    def loss_ends(self) -> LossEnds | None:
        return loss_ends(self.losses)

    @property
    def eval_ends(self) -> tuple[float | None, float | None]:
        """The held-out loss before the first step and after the last; None where it was not taken."""
        before = self.evals[0][1] if self.evals and not self.evals[0][0] else None
        return before, self.evals[-1][1] if self.evals and self.evals[-1][0] else None
