"""What a training run takes, reports and returns."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

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
    log_every: int = 10  # steps between two calls of on_progress, which read the loss back from the device
    save_every: int = 0  # steps between two checkpoints, from which the same call goes on; 0: none
    eval_every: int = 0  # steps between two evaluations on held-out data; 0: only at the end

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
        for pattern in (*(self.freeze or ()), self.lora_targets):
            try:
                re.compile(pattern)
            except re.error as error:
                raise WrongSetting(f"{pattern!r} is not a pattern: {error}") from None


@dataclass
class TrainProgress:
    """Where a run stands; handed to the `on_progress` callback. str() gives a log line."""

    steps: int
    step: int = 0
    loss: float = math.nan  # of the last step, nats a token
    lr: float = 0.0
    grad_norm: float = math.nan
    samples: int = 0  # trained on so far, on all devices
    left_out: int = 0  # unusable ones met so far, repetitions included
    tokens: int = 0  # kept tokens trained on so far
    truncated: int = 0  # answers cut short so far
    eval_loss: float = math.nan  # of the last evaluation, nats a held-out answer token
    eval_step: int = 0  # after which it was
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(self.step, 1) * (self.steps - self.step)

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.seconds_left), 60)
        unusable = f"  {self.left_out:,} samples left out" if self.left_out else ""
        held_out = f"  eval loss {self.eval_loss:.4f}" if self.eval_step else ""
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}{held_out}  lr {self.lr:.2e}  "
            f"grad norm {self.grad_norm:.3g}  {self.samples / max(self.seconds, 1e-9):.1f} samples/s  "
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
