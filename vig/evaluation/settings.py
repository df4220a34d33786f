"""What an evaluation is asked for, as two values: how a model answers, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vig.data.reading import Source
from vig.data.sample import DataError
from vig.evaluation.figures import RESAMPLES
from vig.evaluation.questions import DataSpec
from vig.evaluation.tasks import Task, task_named
from vig.models.loading import DTYPES, device_for, device_named
from vig.store.fingerprints import data_fingerprint, weights_fingerprint
from vig_kernels.dispatch import named

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class AnswerSettings:
    """How a model answers. Raises ValueError for a value that means nothing on any machine.

    dtype: "auto" is bfloat16 on a GPU and what the checkpoint is stored in elsewhere. batch_tokens: rows x (longest
    prompt + max_new_tokens) of a batch. temperature: 0 decodes greedily; else every batch draws from a generator
    seeded by `seed` and its first key, so that a resumed run draws the same.
    """

    dtype: str = "auto"
    device: str | torch.device | None = None
    batch_tokens: int = BATCH_TOKENS
    batch_size: int | None = None
    max_new_tokens: int | None = None  # the task's, unless given
    temperature: float = 0.0
    seed: int = 0
    max_length: int | None = None
    workers: int | None = 0
    backend: str = "auto"
    revision: str | None = None
    attn: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype = {self.dtype!r}, expected auto, {', '.join(DTYPES)}")
        if self.device is not None:
            device_named(self.device)
        named(self.backend)
        for name in ("batch_tokens", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}, expected at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}, expected 0 (greedy) or more")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length}, expected at least 2 tokens")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers = {self.workers}, expected at least 0 processes")

    @property
    def load_dtype(self) -> str:
        """What the checkpoint is loaded in."""
        return "bfloat16" if self.dtype == "auto" and device_for(self.device).type != "cpu" else self.dtype


@dataclass(frozen=True)
class EvalSpec:
    """A task, its data, and how its answers are read. Raises ValueError for what the task does not take."""

    task: str
    data: str | Path | Source
    way: str | None = None  # of Task.ways: the first unless given
    rule: str | None = None  # of Task.rules: the first unless given
    prompt: str | None = None  # the task's unless given
    image_root: str | Path | None = None
    limit: int | None = None
    synonyms: Path | None = None
    captions: Path | None = None
    rotate: bool | None = None  # each multiple-choice question once a rotation; None: as its benchmark does
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self):
        row = task_named(self.task)
        if self.rule is not None and self.rule not in row.rules:
            raise ValueError(f"rule = {self.rule!r}, but task {row.name} has {', '.join(row.rules)}")
        if self.way is not None and self.way not in row.ways:
            known = ", ".join(row.ways) or "no choice of this"
            raise ValueError(f"by = {self.way!r}, but task {row.name} has {known}")
        for option in row.needs:
            if getattr(self, option) is None:
                raise ValueError(f"task {row.name} needs --{option}: {row.reads}")
        for option in ("synonyms", "captions", "rotate"):
            if getattr(self, option) is not None and option not in row.options:
                name = {"rotate": "circular"}.get(option, option)
                raise ValueError(f"--{name} is not for task {row.name}")
        if self.way == "likelihood" and self.rule is not None:
            raise ValueError(
                f"rule = {self.rule!r}, but by likelihood no answer is written that it could read"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}, expected at least 1 record")
        if self.resamples < 1:
            raise ValueError(f"resamples = {self.resamples}, expected at least 1")
        asks = self.asks
        if "{question}" in row.asks(self.asked_by) and "{question}" not in asks:
            raise ValueError(
                f"prompt = {asks!r}, expected {{question}} in it, which stands for the record's own"
            )

    @property
    def row(self) -> Task:
        return task_named(self.task)

    @property
    def asked_by(self) -> str | None:
        return self.way or next(iter(self.row.ways), None)

    @property
    def read_by(self) -> str | None:
        """The rule; None where no answer is written that it could read."""
        return None if self.asked_by == "likelihood" else self.rule or self.row.rule

    @property
    def asks(self) -> str:
        return self.row.asks(self.asked_by) if self.prompt is None else self.prompt

    @property
    def data_spec(self) -> DataSpec:
        return DataSpec(
            Source.of(self.data), self.asks, self.asked_by, None if self.image_root is None else Path(self.image_root),
            self.limit, self.synonyms, self.captions, self.rotate,
        )  # fmt: skip

    def questions(self):
        """Its questions, read anew. Raises DataError for data that cannot be read."""
        for path in self.data_spec.files():
            if not Path(path).exists():
                raise DataError(f"no such data: {path}. Task {self.task} reads {self.row.reads}")
        return self.row.resolve("questions")(self.data_spec)

    def binding(self, model: str, answers: AnswerSettings) -> dict[str, Any]:
        """What decides the predictions; a folder that holds others refuses to be resumed."""
        folder = Path(model)
        spec = self.data_spec
        greedy = answers.temperature == 0
        return {
            "model": str(folder.resolve()) if folder.is_dir() else model,
            "revision": answers.revision or weights_fingerprint(model),
            "task": self.task,
            "by": self.asked_by,
            "prompt": self.asks,
            "data_fingerprint": data_fingerprint(spec.source),
            **spec.source.reading.metadata(),
            "limit": self.limit,
            "rotate": self.rotate,
            "max_new_tokens": self.new_tokens(answers),
            "temperature": answers.temperature,
            "seed": None if greedy else answers.seed,
            "dtype": answers.load_dtype,
            "max_length": answers.max_length,
        }

    def new_tokens(self, answers: AnswerSettings) -> int:
        """The longest answer; 0 where likelihoods are compared."""
        if self.asked_by == "likelihood":
            return 0
        return answers.max_new_tokens or self.row.max_new_tokens
