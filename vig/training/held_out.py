"""The loss on samples that are held out of training, while it goes on."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn

from vig.scoring.batch import on_device
from vig.training.batches import MicroBatches
from vig.training.collator import Kept, SelectiveCollator
from vig.training.loss import row_losses
from vig.training.settings import TrainSettings


class HeldOut:
    """Held-out samples, divided among the processes; each counts once.

    Their labels are all answer tokens: a selection says nothing of samples that it has not seen.
    """

    def __init__(
        self,
        kept: Kept,
        collator: SelectiveCollator,
        settings: TrainSettings,
        processes: PartialState,
        device: torch.device,
    ):
        samples = kept.samples
        mine = range(processes.process_index, len(samples), processes.num_processes)
        plan = [list(mine[at : at + settings.batch_size]) for at in range(0, len(mine), settings.batch_size)]
        self.own = len(plan)
        if settings.fsdp:  # its forward is a call of all processes, so the last ones of some count nothing
            most = -(-len(samples) // (processes.num_processes * settings.batch_size))
            plan += [[0]] * (most - self.own)
        self.batches = MicroBatches(samples, plan, collator)
        self.workers, self.device, self.processes = settings.workers, device, processes
        self.broken = [str(error) for error in kept.errors]  # in every process the same
        self._told = False

    @torch.no_grad()
    def loss(self, model: nn.Module, precision: AbstractContextManager) -> float:
        """Mean over all held-out answer tokens, nats; NaN without any. Draws no random number. Called by all processes.

        model: without the wrapper of DDP, whose forward would wait for processes with fewer batches; with that of FSDP.
        """
        totals = torch.zeros(2, dtype=torch.float64)
        errors, training = [], model.training
        model.eval()
        with torch.random.fork_rng([]):  # processes that work ahead are given a seed
            for number, batch in enumerate(self.batches.made(self.workers)):
                left_out = map(str, batch.pop("left_out"))
                num_kept, _ = batch.pop("num_kept"), batch.pop("num_truncated")
                with precision:
                    rows = row_losses(model, on_device(batch, self.device), num_kept=num_kept)
                if number < self.own:
                    totals += rows.sum(0).double().cpu()
                    errors += left_out
        model.train(training)
        self._tell(errors)
        if self.processes.num_processes > 1:
            totals = reduce(totals.float().to(self.processes.device), "sum").cpu()
        total, tokens = totals.tolist()
        return total / tokens if tokens else math.nan

    def _tell(self, errors: list[str]) -> None:
        """Warns of what could not be used, once."""
        if self._told:
            return
        self._told = True
        everywhere = self.broken + gather_object(errors)
        if everywhere and self.processes.is_main_process:
            warnings.warn(
                f"{len(everywhere)} held-out samples are left out of the evaluation. The first: {everywhere[0]}",
                stacklevel=2,
            )
