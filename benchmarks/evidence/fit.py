"""Training on masked answer tokens by the recipe of `vig train`, on stored features.

AdamW, linear warm-up and decay, clipped gradients, the loss of a step divided by its kept tokens, samples without a
kept token left out, the order of the samples by `plan_batches`. tests/test_evidence_runs.py compares the weights with
those of `vig.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.evidence.model import Item, asked_rows, collate
from vig.training.batches import plan_batches
from vig.training.settings import TrainSettings

LAST = 10  # steps, whose mean loss is told


class Fitted(NamedTuple):
    """What a training saw: samples with a kept token; kept tokens of all steps, of them of text-only samples."""

    samples: int
    tokens: int
    text_tokens: int
    loss: float  # mean over the last steps, nats a token


def fit(model, items: Sequence[Item], masks: Sequence[np.ndarray], settings: TrainSettings) -> Fitted:
    """Tune `model` in place, its tower frozen; it ends in evaluation mode. masks: (n,) bool of each item."""
    import transformers

    kept = [place for place, mask in enumerate(masks) if mask.any()]
    kept_masks = [torch.from_numpy(np.asarray(mask)) for mask in masks]
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    schedule = transformers.get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=round(settings.warmup * settings.max_steps),
        num_training_steps=settings.max_steps,
    )
    model.train()
    losses, tokens, text_tokens = [], 0, 0
    for step in plan_batches(len(kept), settings):
        rows = [kept[place] for place in step]
        counts = [int(kept_masks[row].sum()) for row in rows]
        loss = _backward(model, [(items[row], kept_masks[row]) for row in rows], sum(counts))
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
        tokens += sum(counts)
        text_tokens += sum(
            count for count, row in zip(counts, rows, strict=True) if items[row].features is None
        )
    model.eval()
    return Fitted(len(kept), tokens, text_tokens, float(np.mean(losses[-LAST:])))


def _backward(model, step: list[tuple[Item, Tensor]], tokens: int) -> float:
    """Gradients of a step's mean loss; short and long samples go apart, so that less of a batch is padding."""
    total = 0.0
    for part in by_length(step):
        hidden, target = asked_rows(model, collate(*zip(*part, strict=True)))
        loss = cross_entropy(model.get_output_embeddings()(hidden), target, reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def by_length(step: list[tuple[Item, Tensor]]) -> list[list[tuple[Item, Tensor]]]:
    """The step cut in two where that leaves the fewest padded places; not at all where it leaves none fewer."""
    step = sorted(step, key=lambda pair: len(pair[0].ids))
    lengths = [len(item.ids) for item, _ in step]
    cut = min(
        range(len(step), 0, -1), key=lambda cut: cut * lengths[cut - 1] + (len(step) - cut) * lengths[-1]
    )  # of equals the first: no cut
    return [part for part in (step[:cut], step[cut:]) if part]
