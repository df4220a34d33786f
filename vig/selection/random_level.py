"""The level "random": as many samples and tokens as the level "both" keeps, drawn by a hash of key and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vig.selection.rule import Rule, kth_smallest_draw, row_kinds, sample_draws
from vig.store.scores import read_scores


class Both(NamedTuple):
    """What the level "both" keeps, and where the end-of-turn tokens are that are kept in any case."""

    samples: int
    tokens: int
    stops: np.ndarray  # int64 ascending: places among the answer tokens of all multimodal samples


def count_both(scores, rule: Rule, report: Callable[[int], None]) -> Both:
    """One pass over the scores with the rule of the level "both"."""
    samples = tokens = seen = 0
    stops = [np.empty(0, np.int64)]
    for batch in read_scores(scores, rule.columns):
        more = rule.apply(batch)
        samples, tokens = samples + more.samples, tokens + more.tokens
        if rule.stops.keep:
            ends = rule.stops.mask(batch, row_kinds(batch)[0])
            stops.append(np.flatnonzero(ends) + seen)
            seen += len(ends)
        report(batch.num_rows)
    return Both(samples, tokens, np.concatenate(stops))


def random_rule(
    rule: Rule,
    hashes: np.ndarray,  # (M,) uint64 of the multimodal samples' keys
    n_tokens: np.ndarray,  # (M,) int32
    both: Both,
    notes: list[str],  # warnings are added
) -> Rule:
    """Limits that let through exactly as many samples and tokens as "both" keeps, end-of-turn tokens included."""
    if both.samples == 0:
        return replace(rule, level="random")
    draws = sample_draws(hashes, rule.seed)
    sample_limit = int(np.partition(draws, both.samples - 1)[both.samples - 1])
    chosen = draws <= sample_limit
    stops = _places_within(both.stops, n_tokens.astype(np.int64), chosen)
    draws, lengths = draws[chosen], n_tokens[chosen].astype(np.int64)
    available = int(lengths.sum())
    wanted = min(both.tokens, available) - len(stops)  # tokens to draw
    if both.tokens > available:
        notes.append(
            f'the random samples have {available:,} tokens, fewer than the {both.tokens:,} that "both" keeps'
        )
    if wanted < 0:
        notes.append(
            f"the random samples have {len(stops):,} end-of-turn tokens, which are kept in any case: more than the "
            f'{both.tokens:,} tokens that "both" keeps. --stop-tokens select (stop_tokens=) draws among all tokens'
        )
    token_limit = kth_smallest_draw(draws, lengths, stops, wanted) if wanted > 0 else None
    return replace(rule, level="random", sample_limit=sample_limit, token_limit=token_limit)


def _places_within(places: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Places among the tokens of all samples, those in chosen samples, counted among the tokens of these alone."""
    owners = np.searchsorted(np.cumsum(lengths), places, side="right")
    left_out = np.cumsum(np.where(chosen, 0, lengths))  # tokens of the samples not chosen, up to each sample
    return (places - left_out[owners])[chosen[owners]]
