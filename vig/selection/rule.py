"""The rule of a selection: which samples and tokens of a batch of scores are kept, by that batch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vig.data.files import StoreError
from vig.selection.measures import token_and_sample_values
from vig.selection.stop_tokens import NO_STOPS, Stops
from vig.store.rows import list_array, segment_means
from vig.store.selections import SELECTION_SCHEMA, hash_keys, mix64

KL = "token_kl"
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Applied(NamedTuple):
    """What a rule makes of a batch: its selection rows, and how many multimodal samples and tokens of theirs are kept.

    Of these, easy_samples and easy_tokens are kept as easy alone: by ``keep_easy``, not by the rule of VIG.
    """

    rows: pa.RecordBatch
    samples: int
    tokens: int
    easy_samples: int = 0
    easy_tokens: int = 0


@dataclass(frozen=True)
class Rule:
    """The choice as a function of a batch of scores alone: shards and batch sizes cannot change it."""

    level: str
    tau: float
    clip: float | None = None
    seed: int = 0
    # level "random": the highest draw of a sample that is kept; None: none is
    sample_limit: int | None = None
    token_limit: int | None = None  # of a token in these, beside the end-of-turn tokens
    taus: Mapping[str, float] | None = None  # by source, in place of tau
    stops: Stops = NO_STOPS
    measure: str = "vig"  # of `MEASURES`: what takes the place of VIG
    keep_easy: float | None = (
        None  # nats: tokens with nll_null under it are kept too, in every multimodal sample
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the scores, that it reads."""
        read = (
            "key", "id", "source", "status", "n_tokens", "vig", "token_ids", "token_nll_image", "token_nll_null"
        )  # fmt: skip
        read = (*read, KL) if self.measure == "kl" else read
        return (*read, "positions") if self.stops.ids else read

    def apply(self, batch: pa.RecordBatch) -> Applied:
        """Selection rows and counts, a function of this batch alone."""
        ok, text_only, lengths = row_kinds(batch)
        keep = np.zeros(batch.num_rows, bool)
        kept, chosen = self._choose(batch, ok, lengths[ok])
        if self.stops.keep:
            chosen |= self.stops.mask(batch, ok) & np.repeat(kept, lengths[ok])
        samples_by_vig, tokens_by_vig = int(kept.sum()), int(chosen.sum())
        if self.keep_easy is not None:
            easy = easy_tokens(batch, ok, self.keep_easy)
            kept, chosen = kept | (segment_means(easy, lengths[ok]) > 0), chosen | easy
        keep[ok] = kept
        keep |= text_only
        owners_ok = np.repeat(ok, lengths)
        tokens = np.ones(len(owners_ok), bool)
        tokens[owners_ok] = chosen
        valid = ok | text_only
        columns = [
            batch["key"],
            batch["id"],
            pa.array(keep),
            batch["token_ids"],
            list_array(tokens, lengths, valid),
        ]
        rows, n_samples, n_tokens = (
            pa.record_batch(columns, schema=SELECTION_SCHEMA),
            int(kept.sum()),
            int(chosen.sum()),
        )
        return Applied(rows, n_samples, n_tokens, n_samples - samples_by_vig, n_tokens - tokens_by_vig)

    def _choose(
        self, batch: pa.RecordBatch, ok: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks over the multimodal samples and over their tokens."""
        if self.level == "random":
            keep, tokens = np.zeros(int(ok.sum()), bool), np.zeros(int(lengths.sum()), bool)
            draw = sample_draws(hash_keys(batch["key"])[ok], self.seed)
            if self.sample_limit is not None:
                keep = draw <= self.sample_limit
            if self.token_limit is not None:
                tokens = (token_draws(draw, lengths) <= self.token_limit) & np.repeat(keep, lengths)
            return keep, tokens
        token_vig, vig = self.values(batch, ok, lengths)
        tau = self._taus_of_rows(batch, ok)  # (M,)
        passed = token_vig >= np.repeat(tau, lengths)
        if self.level == "token":
            return segment_means(passed, lengths) > 0, passed
        keep = vig >= tau
        owners = np.repeat(keep, lengths)
        return keep, owners if self.level == "sample" else owners & passed

    @property
    def value_columns(self) -> tuple[str, ...]:
        """Of the scores, that `values` reads beside those of `row_kinds`."""
        ends = self.stops.columns if self.stops.ids and not self.stops.in_mean else ()
        if self.measure != "vig":
            return (KL if self.measure == "kl" else "token_nll_image", *ends)
        return ("token_nll_image", "token_nll_null", *(self.stops.columns if self.stops.ids else ()))

    def values(
        self, batch: pa.RecordBatch, ok: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is compared with tau, float64: of the multimodal samples' tokens, and of the samples."""
        if self.measure == "kl":
            return token_and_sample_values(batch, KL, ok, lengths, self.stops)
        if self.measure == "loss":  # log-likelihoods, so that the samples of the lowest loss have the highest
            tokens, samples = token_and_sample_values(batch, "token_nll_image", ok, lengths, self.stops)
            return -tokens, -samples
        return token_and_sample_vig(batch, ok, lengths, self.clip, self.stops)

    def _taus_of_rows(self, batch: pa.RecordBatch, ok: np.ndarray) -> np.ndarray:
        if self.taus is None:
            return np.full(int(ok.sum()), self.tau)
        names = batch["source"].fill_null("").dictionary_encode()
        taus = np.array([self.taus.get(name, np.inf) for name in names.dictionary.to_pylist()])
        return taus[names.indices.to_numpy(zero_copy_only=False)[ok]]


def row_kinds(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of scored rows with and without an image, and answer tokens a row, (R,) int64; 0 in other rows."""
    status, vig = batch["status"], batch["vig"]
    finite = pc.fill_null(pc.is_finite(vig), False)
    ok = pc.and_(pc.equal(status, "ok"), finite).to_numpy(zero_copy_only=False)
    text_only = pc.equal(status, "text_only").to_numpy(zero_copy_only=False)
    return ok, text_only, np.where(ok | text_only, batch["n_tokens"].to_numpy(), 0).astype(np.int64)


def token_and_sample_vig(
    batch: pa.RecordBatch,
    ok: np.ndarray,  # (R,) bool
    lengths: np.ndarray,  # of the ok rows
    clip: float | None,
    stops: Stops = NO_STOPS,
) -> tuple[np.ndarray, np.ndarray]:
    """VIG_t = nll_null_t - nll_image_t, float64, of the multimodal samples' tokens, and their sample VIG.

    With ``clip`` both log-probabilities are bounded below by it first, and sample VIG is formed anew.
    """
    rows = batch if ok.all() else batch.filter(pa.array(ok))
    image, null = (rows[name].flatten().to_numpy() for name in ("token_nll_image", "token_nll_null"))
    if not len(image) == len(null) == lengths.sum():
        first = rows["key"][0].as_py() if rows.num_rows else "?"
        raise StoreError(
            f"token lists and n_tokens disagree in the batch that begins with {first}: score it again"
        )
    if clip is not None:
        image, null = np.minimum(image, -clip, dtype=np.float64), np.minimum(null, -clip, dtype=np.float64)
    token_vig = np.subtract(null, image, dtype=np.float64)
    if not stops.in_mean:
        return token_vig, stops.sample_vig(batch, ok, lengths, token_vig)
    return token_vig, rows["vig"].to_numpy() if clip is None else segment_means(token_vig, lengths)


def check_easy(nats: float | None) -> None:
    """Raises ValueError for a bound of easy tokens that makes no sense; None is none."""
    if nats is not None and not 0 < nats < np.inf:
        raise ValueError(
            f"keep_easy is a number of nats above 0 under which nll_null is easy (0.5, say); got {nats!r}"
        )


def easy_tokens(batch: pa.RecordBatch, ok: np.ndarray, nats: float) -> np.ndarray:
    """(n,) bool: nll_null_t < nats, as stored and whatever a clip, of the tokens of the multimodal samples (ok)."""
    rows = batch if ok.all() else batch.filter(pa.array(ok))
    return rows["token_nll_null"].flatten().to_numpy() < np.float64(nats)


def sample_draws(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 a sample, a function of its key and the seed alone."""
    return mix64(hashes + mix64(np.array([seed], np.int64).astype(np.uint64) * GOLDEN + np.uint64(1)))


def token_draws(draws: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A uniform uint64 a token, a function of its sample's draw and its place in the answer."""
    starts = np.cumsum(lengths) - lengths
    place = (np.arange(lengths.sum()) - np.repeat(starts, lengths) + 1).astype(np.uint64)
    return mix64(np.repeat(draws, lengths) + place * GOLDEN)


def kth_smallest_draw(
    draws: np.ndarray,  # (M,) uint64, of the samples
    lengths: np.ndarray,  # (M,) int64, tokens of each
    left_out: np.ndarray,  # int64 ascending: places, among all their tokens, of those that do not take part
    k: int,  # from 1
) -> int:
    """The k-th smallest of the token draws, exactly, without holding them: the top 16 bits are counted first,
    then the one bucket with the k-th is sorted."""

    def chunks() -> Iterator[np.ndarray]:
        first = 0
        for start in range(0, len(draws), 1 << 14):
            values = token_draws(draws[start : start + (1 << 14)], lengths[start : start + (1 << 14)])
            inside = slice(*np.searchsorted(left_out, (first, first + len(values))))
            yield np.delete(values, left_out[inside] - first)
            first += len(values)

    counts = np.zeros(1 << 16, np.int64)
    for values in chunks():
        counts += np.bincount((values >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    below = np.cumsum(counts)
    bucket = int(np.searchsorted(below, k))
    k -= int(below[bucket - 1]) if bucket else 0
    inside = [values[(values >> np.uint64(48)) == np.uint64(bucket)] for values in chunks()]
    return int(np.partition(np.concatenate(inside), k - 1)[k - 1])
