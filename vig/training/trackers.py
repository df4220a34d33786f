"""Where a run reports to besides its log lines: TensorBoard, trackio, W&B, by accelerate's own trackers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from vig.training.settings import TrainError, TrainProgress, WrongSetting

LOGS = "logs"  # in the folder of the checkpoint, for trackers that write files


def check_trackers(names: Sequence[str], out: Path | None) -> None:
    """Raises WrongSetting for a name that accelerate does not know, TrainError for a package that is not there."""
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise WrongSetting(
                f"report_to = {name!r}, expected one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in available:
            raise TrainError(f"report_to = {name!r}, but its package is not installed: pip install {name}")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and out is None:
            raise TrainError(f"report_to = {name!r} writes files, and there is no folder for them. Give out")


class Trackers:
    """Those of one run. Only the main process reports."""

    def __init__(self, trackers: Sequence[GeneralTracker] = ()):
        self.trackers = trackers
        self._before = (0, 0.0)  # kept tokens and seconds of training at the last report

    def begin(self, progress: TrainProgress) -> None:
        """Where a run begins, or goes on: its rates are those from here on."""
        self._before = (progress.tokens, progress.training_seconds)

    def log(self, progress: TrainProgress) -> None:
        """Reports a step, under the names that Hugging Face's Trainer reports under.

        The loss is the mean over the steps since the last report, tokens per second are those since then.
        """
        if not self.trackers:
            return
        tokens, seconds = self._before
        self._before = (progress.tokens, progress.training_seconds)
        values = {}
        if progress.step:
            values = {
                "train/loss": progress.loss,
                "train/learning_rate": progress.lr,
                "train/grad_norm": progress.grad_norm,
                "train/num_kept_tokens": progress.tokens,
                "train/num_samples": progress.samples,
            }
        if progress.step and progress.training_seconds > seconds:
            rate = (progress.tokens - tokens) / (progress.training_seconds - seconds)
            values["train/kept_tokens_per_second"] = rate
        if progress.eval_step == progress.step:
            values["eval/loss"] = progress.eval_loss
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers if finite else ():
            tracker.log(finite, step=progress.step)


@contextmanager
def trackers_of(
    names: Sequence[str], out: Path | None, processes: PartialState, configuration: dict[str, Any]
) -> Iterator[Trackers]:
    """The trackers of a run, started with its configuration and finished at its end, however it ends."""
    if not names or not processes.is_main_process:
        yield Trackers()
        return
    run = "vig-train" if out is None else out.resolve().name
    made = []
    for name in dict.fromkeys(names):
        tracker = LOGGER_TYPE_TO_CLASS[name]
        made.append(tracker(run, out / LOGS) if tracker.requires_logging_directory else tracker(run))
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in configuration.items()
        if value is not None
    }
    for tracker in made:
        tracker.start()
        tracker.store_init_configuration(plain)
    try:
        yield Trackers(made)
    finally:
        for tracker in made:
            tracker.finish()
