"""Which answer tokens each arm trains on: (n,) bool of each sample. Text-only samples are kept whole by every arm.

Where `vig.select` can make the choice, it makes it, with its defaults: end-of-turn tokens of kept samples are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from benchmarks.evidence.data import Tuning
from benchmarks.evidence.design import EASY_NATS, P
from vig import select

Masks = list[np.ndarray]


def masks_of(arm: str, tuning: Tuning, seed: int) -> Masks:
    """The masks of an arm of `design.NAMES`. seed: of its random choices."""
    masks = _ARMS[arm](tuning, seed)
    return [
        mask if multimodal else np.ones(len(mask), bool)
        for mask, multimodal in zip(masks, tuning.multimodal, strict=True)
    ]


def selected(scores: pa.Table, level: str = "both", seed: int = 0) -> Masks:
    """What `vig.select` keeps of scores that end turns with a known token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about p, in every selection
        selection = select(scores, P, level=level, seed=seed)
    return [
        np.array(row["token_keep"], bool) & row["keep"]
        for batch in selection.batches()
        for row in batch.to_pylist()
    ]


def _all(tuning: Tuning, seed: int) -> Masks:
    return [np.ones(len(ids), bool) for ids in tuning.content]


def _by_vig(level: str, null: str = "blur") -> Callable[[Tuning, int], Masks]:
    return lambda tuning, seed: selected(tuning.scores[null], level, seed)


def _easy(tuning: Tuning, seed: int) -> Masks:
    """What VIG keeps, and in every sample the tokens that are likely without sight: the language around it."""
    kept = selected(tuning.scores["blur"])
    return [
        mask | (null < EASY_NATS) if len(null) else mask
        for mask, null in zip(kept, tuning.nll("null"), strict=True)
    ]


def _loss_filter(tuning: Tuning, seed: int) -> Masks:
    """As many samples as VIG keeps, those of the lowest mean loss with the image; all of their tokens."""
    multimodal = tuning.multimodal
    count = sum(mask.any() for mask in _of(selected(tuning.scores["blur"]), multimodal))
    losses = np.array([values.mean() for values in tuning.nll("image")])
    losses[~multimodal] = np.inf
    chosen = np.zeros(len(losses), bool)
    chosen[np.argsort(losses, kind="stable")[:count]] = True
    return _whole(tuning, chosen)


def _oracle(tuning: Tuning, seed: int) -> Masks:
    """All tokens of the answers that someone gave who looked."""
    return _whole(tuning, np.array([not record.turn.blind for record in tuning.records]))


def _words(tuning: Tuning, seed: int) -> Masks:
    """Colours, objects and numbers, by a list of words, and the end of the turn; in every sample."""
    return [content | stop for content, stop in zip(tuning.content, tuning.stops, strict=True)]


def _permuted(tuning: Tuning, seed: int) -> Masks:
    return selected(permuted(tuning, np.random.default_rng([seed, 1])))


def permuted(tuning: Tuning, rng: np.random.Generator) -> pa.Table:
    """The scores with the token values of each sample in another order; those of the end of the turn stay.

    Sample VIG, the samples kept and the number of tokens kept in each stay as they are: what is lost is which token.
    """
    table = tuning.scores["blur"]
    columns = {name: table[name].to_pylist() for name in ("token_nll_image", "token_nll_null")}
    for place, stop in enumerate(tuning.stops):
        if columns["token_nll_null"][place] is None:
            continue
        order = np.arange(len(stop))
        order[~stop] = rng.permutation(order[~stop])
        for values in columns.values():
            values[place] = [values[place][index] for index in order]
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.list_(pa.float32())))
    return table


def _whole(tuning: Tuning, chosen: np.ndarray) -> Masks:
    return [np.full(len(ids), take) for ids, take in zip(tuning.content, chosen, strict=True)]


def _of(masks: Masks, rows: np.ndarray) -> Masks:
    return [mask for mask, wanted in zip(masks, rows, strict=True) if wanted]


_ARMS: dict[str, Callable[[Tuning, int], Masks]] = {
    "all": _all,
    "vig": _by_vig("both"),
    "easy": _easy,
    "random": _by_vig("random"),
    "loss filter": _loss_filter,
    "permuted": _permuted,
    "oracle": _oracle,
    "words": _words,
    "sample": _by_vig("sample"),
    "token": _by_vig("token"),
    "mean": _by_vig("both", "mean"),
}


def counts(tuning: Tuning, masks: Masks) -> dict[str, int]:
    """Of the samples with a picture: how many samples, tokens and wrong tokens an arm keeps, and of how many."""
    rows = tuning.multimodal
    kept, wrong = _of(masks, rows), _of(tuning.wrong, rows)
    return {
        "samples_kept": sum(bool(mask.any()) for mask in kept),
        "samples_total": len(kept),
        "tokens_kept": sum(int(mask.sum()) for mask in kept),
        "tokens_total": sum(len(mask) for mask in kept),
        "wrong_kept": sum(int((mask & bad).sum()) for mask, bad in zip(kept, wrong, strict=True)),
        "wrong_total": sum(int(bad.sum()) for bad in wrong),
    }
