"""Which samples and which answer tokens to train on.

    tau_p = the (100 - p)-th percentile of sample VIG over the multimodal samples
    keep the samples with VIG >= tau_p, and in them the tokens with VIG_t >= tau_p       (level "both")
    and the end-of-turn tokens of the kept samples, unless the paper's rule is asked for (`vig.selection.stop_tokens`)

Source: "Selective Training for Large Vision Language Models via Visual Information Gain", arXiv 2602.17186,
section 3. Scores are facts, so any p and level can be chosen without scoring again.

Two passes over the shards in constant memory but for 20 bytes a sample: one for tau, one for the tokens.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vig.data.files import StoreError, lock_folder
from vig.selection.stop_tokens import NO_STOPS, Stops
from vig.store.folder import shards_in
from vig.store.rows import METADATA_KEY, list_array, segment_means
from vig.store.scores import count_rows, open_scores, read_scores, score_metadata, unfinished
from vig.store.selections import (
    SELECTION_SCHEMA,
    SelectionTable,
    hash_keys,
    mix64,
    refuse_other_selection,
    write_selection,
)

LEVELS = ("both", "sample", "token", "random")
LOW_TAU = 1e-3  # nats; at or under it tau hardly tells tokens apart
NEAR_FLOOR = 10  # times the noise floor
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Selection:
    """A choice of samples and tokens. ``batches()`` yields its rows, ``table()`` maps keys to them."""

    scores: object
    p: float
    level: str
    tau: float | None  # nats, the threshold in use; None where no sample has an image
    tau_p: float | None  # the percentile alone, before tau_floor
    clip: float | None
    tau_floor: float | None
    seed: int
    counts: dict[str, int]
    metadata: dict = field(repr=False)  # of the scores, with "selection" added
    warnings: list[str]
    unfinished: list[str]  # of the warnings, those about scores that are not there yet
    rule: Rule = field(repr=False)
    out: Path | None = None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows of SELECTION_SCHEMA in the order of the scores, in constant memory."""
        for batch in read_scores(self.scores, self.rule.columns):
            yield self.rule.apply(batch)[0]

    def table(self) -> SelectionTable:
        """The mapping key -> (keep, token_ids, token_keep), in memory."""
        table = pa.Table.from_batches(self.batches(), SELECTION_SCHEMA)
        return SelectionTable(table.replace_schema_metadata({METADATA_KEY: json.dumps(self.metadata)}))

    def summary(self) -> list[str]:
        """Lines for a terminal: the figures, then the warnings."""
        return self.figures() + [f"warning: {line}" for line in self.warnings]

    def figures(self) -> list[str]:
        """Lines for a terminal: tau, and how much is kept."""
        n, text, floor = self.counts, self.counts["text_only_tokens"], noise_floor(self.metadata)
        tau = "none" if self.tau is None else f"{self.tau:.6g} nats"
        if self.tau is not None and self.tau != self.tau_p:
            tau += f" (the floor; the percentile is {self.tau_p:.6g})"
        return [
            f"level {self.level}, p = {self.p:g}: tau = {tau}",
            f"samples kept  {_share(n['samples_kept'], n['samples_total'])} with an image",
            f"tokens kept   {_share(n['tokens_kept'], n['tokens_total'])} of these samples' answers",
            f"text-only     {n['text_only']:,} samples, {n['text_only_tokens']:,} tokens, all kept",
            f"trained on    {_share(n['tokens_kept'] + text, n['tokens_total'] + text)} of all answer tokens",
            f"not scored    {n['errors']:,} samples, none kept",
        ] + ([] if floor is None else [f"noise floor   {floor:.3g} nats: the same image scored twice"])


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole if whole else 0:.1f} %)"


@dataclass(frozen=True)
class Rule:
    """The choice as a function of a batch of scores alone: shards and batch sizes cannot change it."""

    level: str
    tau: float
    clip: float | None = None
    seed: int = 0
    sample_limit: int | None = None  # level "random": the highest draw that is kept; None: nothing is
    token_limit: int | None = None
    stops: Stops = NO_STOPS

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the scores, that it reads."""
        more = ("positions",) if self.stops.ids else ()
        return (
            "key",
            "id",
            "status",
            "n_tokens",
            "vig",
            "token_ids",
            "token_nll_image",
            "token_nll_null",
            *more,
        )

    def apply(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int, int]:
        """Selection rows, the number of multimodal samples kept, and of tokens kept in them."""
        ok, text_only, lengths = read_rows(batch)
        keep = np.zeros(batch.num_rows, bool)
        keep[ok], multimodal_tokens = self._choose(batch, ok, lengths[ok])
        if self.stops.keep:
            multimodal_tokens |= self.stops.mask(batch, ok) & np.repeat(keep[ok], lengths[ok])
        keep |= text_only
        owners_ok = np.repeat(ok, lengths)
        tokens = np.ones(len(owners_ok), bool)
        tokens[owners_ok] = multimodal_tokens
        valid = ok | text_only
        columns = [
            batch["key"],
            batch["id"],
            pa.array(keep),
            batch["token_ids"],
            list_array(tokens, lengths, valid),
        ]
        samples = int(keep[ok].sum())
        return pa.record_batch(columns, schema=SELECTION_SCHEMA), samples, int(multimodal_tokens.sum())

    def _choose(
        self, batch: pa.RecordBatch, ok: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks over the multimodal samples and over their tokens."""
        if self.level == "random":
            if self.sample_limit is None or self.token_limit is None:
                return np.zeros(int(ok.sum()), bool), np.zeros(int(lengths.sum()), bool)
            draw = sample_draws(hash_keys(batch["key"])[ok], self.seed)
            keep = draw <= self.sample_limit
            return keep, (token_draws(draw, lengths) <= self.token_limit) & np.repeat(keep, lengths)
        token_vig, vig = token_and_sample_vig(batch, ok, lengths, self.clip, self.stops)
        passed = token_vig >= self.tau
        if self.level == "token":
            return segment_means(passed, lengths) > 0, passed
        keep = vig >= self.tau
        owners = np.repeat(keep, lengths)
        return keep, owners if self.level == "sample" else owners & passed


def read_rows(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def sample_draws(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 a sample, a function of its key and the seed alone."""
    return mix64(hashes + mix64(np.array([seed], np.int64).astype(np.uint64) * GOLDEN + np.uint64(1)))


def token_draws(draws: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A uniform uint64 a token, a function of its sample's draw and its place in the answer."""
    starts = np.cumsum(lengths) - lengths
    place = (np.arange(lengths.sum()) - np.repeat(starts, lengths) + 1).astype(np.uint64)
    return mix64(np.repeat(draws, lengths) + place * GOLDEN)


@dataclass
class _Facts:
    """What the first pass leaves: one value a multimodal sample, and counts of the rest."""

    vig: np.ndarray  # float64
    n_tokens: np.ndarray  # int32
    hashes: np.ndarray  # uint64 of the keys
    text_only: int
    text_only_tokens: int
    errors: int


def select(
    scores,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    p: float = 70.0,
    *,
    level: str = "both",
    clip: float | None = None,
    tau_floor: float | None = None,
    seed: int = 0,
    stop_tokens: str = "keep",
    mean: str = "all",
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Selection:
    """Choose about p per cent of the samples that have an image, and the tokens in them.

    tau_p is the (100 - p)-th percentile of sample VIG over rows with status "ok", with linear interpolation
    between neighbours (numpy's default). Ties at tau are kept. Text-only samples are kept whole, rows that
    could not be scored never.

    level: "both"; "sample": all tokens of the kept samples; "token": tokens >= tau of every sample;
        "random": as many samples as "both" keeps and as many tokens as pass tau in them, drawn by a hash of key and
        seed; end-of-turn tokens that are kept in any case come on top.
    clip: lowest log-probability in nats (below 0; math.log(0.01), say) that either pass counts with.
    tau_floor: lowest tau in nats.
    stop_tokens: "keep" keeps the end-of-turn tokens of every kept sample, whatever their VIG; "select" only those with
        VIG >= tau, as the paper's rule does. Scores that do not say which tokens these are have the paper's rule.
    mean: "all" answer tokens enter a sample's VIG, as the paper's do; "content" leaves end-of-turn tokens out.
    out: folder to write the selection to, in Parquet. A selection there that was made with the same settings is
        replaced; one of others raises SettingsDiffer, unless overwrite is set.
    progress: called with the share done, 0 to 1.

    Raises ValueError for settings that make no sense, StoreError for scores that cannot be read, FolderInUse where
    another process is writing to ``out``. Scores that are not complete are warned of, and listed in ``unfinished`` of
    the result.
    """
    check_choice(p, level, clip, tau_floor, seed)
    scores = open_scores(scores)
    folder, about = Path(out) if out is not None else None, score_metadata(scores)
    stops = Stops.of(about, stop_tokens, mean)
    choice = {"p": p, "level": level, "clip": clip, "tau_floor": tau_floor, "seed": seed} | stops.settings()
    if folder is not None and shards_in(folder):
        raise StoreError(f"{folder} holds scores. Give the selection a folder of its own")
    with nullcontext() if folder is None else lock_folder(folder):
        if folder is not None and not overwrite:
            refuse_other_selection(folder, {**about, "selection": choice})
        report = _Progress(progress, count_rows(scores), passes=3 if level == "random" else 2)
        facts = _first_pass(scores, clip, stops, report)
        _refuse_duplicates(scores, facts.hashes)
        missing = unfinished(scores)
        notes = list(missing)
        tau_p = float(np.percentile(facts.vig, 100 - p)) if len(facts.vig) else None
        tau = tau_p if tau_p is None or tau_floor is None else max(tau_p, float(tau_floor))
        kind = "both" if level == "random" else level
        rule = Rule(kind, math.inf if tau is None else tau, clip, seed, stops=stops)
        if level == "random" and tau is not None:
            both = _count(scores, replace(rule, stops=stops.by_vig_alone()), report)
            rule = _random_rule(rule, facts, both, notes)
        counts = {
            "samples_total": len(facts.vig),
            "samples_kept": 0,
            "tokens_total": int(facts.n_tokens.sum(dtype=np.int64)),
            "tokens_kept": 0,
            "text_only": facts.text_only,
            "text_only_tokens": facts.text_only_tokens,
            "errors": facts.errors,
        }
        chosen = {**choice, "tau": tau, "tau_p": tau_p}
        metadata = {**about, "selection": {**chosen, "counts": counts}}
        kept = _Kept()
        quiet = _barely_used(facts.vig, about) if clip is None else []  # clipped values are no measure of it

        def final_metadata() -> dict:
            counts.update(samples_kept=kept.samples, tokens_kept=kept.tokens)
            return metadata

        batches = kept.batches(scores, rule, report)
        if folder is not None:
            write_selection(folder, batches, final_metadata)
        else:
            for _ in batches:
                pass
            final_metadata()
        notes += [*tau_warnings(tau, about, counts), *quiet, *_mistaken_share(p)]
    for line in notes:
        warnings.warn(line, stacklevel=2)
    return Selection(
        scores, p, level, tau, tau_p, clip, tau_floor, seed, counts=counts, metadata=metadata, warnings=notes,
        unfinished=missing, rule=rule, out=folder,
    )  # fmt: skip


def check_choice(p: float, level: str, clip: float | None, tau_floor: float | None, seed: int = 0) -> None:
    """Raises ValueError for settings that make no sense, whatever the scores."""
    if not 0 < p <= 100:
        raise ValueError(f"p is the percentage of samples to keep, above 0 and up to 100; got {p!r}")
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if clip is not None and not clip < 0:
        raise ValueError(f"clip is a log-probability in nats, below 0 (log 0.01 = -4.605); got {clip!r}")
    if tau_floor is not None and not math.isfinite(tau_floor):
        raise ValueError(f"tau_floor is a finite number of nats; got {tau_floor!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is an integer of 64 bits; got {seed!r}")


class _Progress:
    def __init__(self, tell: Callable[[float], None] | None, rows: int, passes: int):
        self.tell, self.total, self.done = tell, max(rows * passes, 1), 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.tell is not None:
            self.tell(min(1.0, self.done / self.total))


def _first_pass(scores, clip: float | None, stops: Stops, report: _Progress) -> _Facts:
    columns, from_tokens = ["key", "status", "n_tokens", "vig"], clip is not None or not stops.in_mean
    if from_tokens:
        columns += ["token_nll_image", "token_nll_null", *(stops.columns if stops.ids else ())]
    vigs, sizes, hashes, text_only, text_tokens, errors = [np.empty(0)], [], [], 0, 0, 0
    for batch in read_scores(scores, columns, batch_size=1 << 13 if from_tokens else 1 << 16):
        ok, text, lengths = read_rows(batch)
        if from_tokens:
            vigs.append(token_and_sample_vig(batch, ok, lengths[ok], clip, stops)[1])
        else:
            vigs.append(batch["vig"].to_numpy(zero_copy_only=False)[ok])
        sizes.append(lengths[ok].astype(np.int32))
        hashes.append(hash_keys(batch["key"])[ok])
        text_only += int(text.sum())
        text_tokens += int(lengths[text].sum())
        errors += batch.num_rows - int(ok.sum()) - int(text.sum())
        report(batch.num_rows)
    sizes, hashes = (
        np.concatenate([np.empty(0, t), *x]) for x, t in ((sizes, np.int32), (hashes, np.uint64))
    )
    return _Facts(np.concatenate(vigs), sizes, hashes, text_only, text_tokens, errors)


def _refuse_duplicates(scores, hashes: np.ndarray) -> None:
    """A sample that stands twice in the scores would count twice in tau."""
    ordered = np.sort(hashes)
    suspects = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(suspects):
        return
    seen: set[str] = set()
    for batch in read_scores(scores, ["key"]):
        for key in batch.filter(pa.array(np.isin(hash_keys(batch["key"]), suspects)))["key"].to_pylist():
            if key in seen:
                raise StoreError(
                    f"sample {key!r} stands twice in the scores: were two folders of the same data given?"
                )
            seen.add(key)


def noise_floor(metadata: dict) -> float | None:
    """|VIG_t| in nats that arithmetic alone makes, as the scoring run measured it; None where it could not."""
    return metadata.get("noise_floor", metadata.get("notes", {}).get("noise_floor"))


def _mistaken_share(p: float) -> list[str]:
    return (
        [f"p = {p:g} keeps {p:g} % of the samples with an image. Was --p {100 * p:g} meant?"] if p < 1 else []
    )


def _barely_used(vig: np.ndarray, metadata: dict) -> list[str]:
    """Where half of the samples gain hardly more from their image than arithmetic alone makes."""
    floor = noise_floor(metadata)
    if floor is None or not len(vig):
        return []
    median = float(np.median(np.abs(vig)))
    if median > NEAR_FLOOR * floor:
        return []
    return [
        f"this model barely uses the image: of half of the samples |VIG| is at most {median:.3g} nats, and the noise "
        f"floor is {floor:.3g}"
    ]


def tau_warnings(tau: float | None, metadata: dict, counts: dict[str, int] | None = None) -> list[str]:
    """What a reader of the selection should know of its tau. metadata: of the scores; counts: of the selection."""
    if tau is None:
        return ["no scored sample has an image: there is no tau, and only text-only samples are kept"]
    floor = noise_floor(metadata)
    if tau <= LOW_TAU:
        passing = ""
        if counts is not None:
            kept = _share(counts["tokens_kept"], counts["tokens_total"])
            passing = f": {kept} of the answer tokens with an image are kept"
        return [
            f"tau = {tau:.3g} is at or under {LOW_TAU:g} nats{passing}. --tau-floor (tau_floor=) sets a lowest tau"
        ]
    if floor is not None and tau <= floor:
        return [f"tau = {tau:.3g} is at or under the scores' noise floor, {floor:.3g} nats"]
    return []


class _Kept:
    """Counts of what a rule keeps, filled while its batches pass by."""

    def __init__(self):
        self.samples = self.tokens = 0

    def batches(self, scores, rule: Rule, report: _Progress) -> Iterator[pa.RecordBatch]:
        for batch in read_scores(scores, rule.columns):
            rows, samples, tokens = rule.apply(batch)
            self.samples, self.tokens = self.samples + samples, self.tokens + tokens
            yield rows
            report(batch.num_rows)


def _count(scores, rule: Rule, report: _Progress) -> _Kept:
    kept = _Kept()
    for _ in kept.batches(scores, rule, report):
        pass
    return kept


def _random_rule(rule: Rule, facts: _Facts, both: _Kept, notes: list[str]) -> Rule:
    """Limits that let through exactly as many samples and tokens as "both" does, stop tokens that are kept aside."""
    if both.samples == 0:
        return replace(rule, level="random")
    draws = sample_draws(facts.hashes, rule.seed)
    sample_limit = int(np.partition(draws, both.samples - 1)[both.samples - 1])
    chosen = draws <= sample_limit
    draws, lengths = draws[chosen], facts.n_tokens[chosen].astype(np.int64)
    available = int(lengths.sum())
    if both.tokens > available:
        notes.append(
            f'the random samples have {available:,} tokens, fewer than the {both.tokens:,} that "both" keeps'
        )
    token_limit = _kth_smallest(draws, lengths, min(both.tokens, available))
    return replace(rule, level="random", sample_limit=sample_limit, token_limit=token_limit)


def _kth_smallest(draws: np.ndarray, lengths: np.ndarray, k: int) -> int:
    """The k-th smallest (from 1) of all token draws, exactly, without holding them: the top 16 bits are
    counted first, then the one bucket with the k-th is sorted."""

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(draws), 1 << 14):
            yield token_draws(draws[start : start + (1 << 14)], lengths[start : start + (1 << 14)])

    counts = np.zeros(1 << 16, np.int64)
    for values in chunks():
        counts += np.bincount((values >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    below = np.cumsum(counts)
    bucket = int(np.searchsorted(below, k))
    k -= int(below[bucket - 1]) if bucket else 0
    inside = [values[(values >> np.uint64(48)) == np.uint64(bucket)] for values in chunks()]
    return int(np.partition(np.concatenate(inside), k - 1)[k - 1])
