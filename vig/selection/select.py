"""Which samples and which answer tokens to train on.

    tau_p = the (100 - p)-th percentile of sample VIG over the multimodal samples
    keep the samples with VIG >= tau_p, and in them the tokens with VIG_t >= tau_p       (level "both")
    and the end-of-turn tokens of the kept samples, unless the paper's rule is asked for (`vig.selection.stop_tokens`)
    and, where keep_easy is given, the tokens with nll_null_t < keep_easy of all multimodal samples, dropped ones too

Source: "Selective Training for Large Vision Language Models via Visual Information Gain", arXiv 2602.17186,
section 3. Scores are facts, so any p and level can be chosen without scoring again.

Two passes over the shards in constant memory but for 20 bytes a sample (24 by source): one for tau, one for the tokens.
The level "random" takes one more, and 8 bytes a turn.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from vig.data.files import StoreError, lock_folder
from vig.data.kinds import taken
from vig.selection.advice import barely_used, mistaken_share, noise_floor, share_of, tau_warnings
from vig.selection.by_source import SourceCounts, source_lines, taus_of
from vig.selection.choice import Choice
from vig.selection.measures import MEASURES, measure_of, unit_of
from vig.selection.random_level import count_both, random_rule
from vig.selection.rule import Rule, row_kinds
from vig.selection.sources import Sources
from vig.selection.stop_tokens import Stops
from vig.store.rows import METADATA_KEY
from vig.store.scores import count_rows, data_sets, open_scores, read_scores, score_metadata, unfinished
from vig.store.selections import (
    SELECTION_SCHEMA,
    SelectionTable,
    hash_keys,
    refuse_other_selection,
    write_selection,
)


@dataclass
class Selection:
    """A choice of samples and tokens. ``batches()`` yields its rows, ``table()`` maps keys to them."""

    scores: object
    p: float
    level: str
    tau: (
        float | None
    )  # nats, the threshold in use (by="source": the lowest); None where no sample has an image
    tau_p: float | None  # the percentile alone, before tau_floor
    clip: float | None
    tau_floor: float | None
    seed: int
    by: str | None
    stop_tokens: str  # as asked for; the metadata say what takes effect on these scores
    mean: str
    keep_easy: float | None  # nats
    sources: list[dict]  # by="source": tau and counts of each; else empty
    counts: dict[str, int]
    metadata: dict = field(repr=False)  # of the scores, with "selection" added
    warnings: list[str]
    unfinished: list[str]  # of the warnings, those about scores that are not there yet
    rule: Rule = field(repr=False)
    out: Path | None = None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows of SELECTION_SCHEMA in the order of the scores, in constant memory."""
        for batch in read_scores(self.scores, self.rule.columns):
            yield self.rule.apply(batch).rows

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
        tau = "none" if self.tau is None else f"{self.tau:.6g} {unit_of(self.by)}"
        if self.tau is not None and self.tau != self.tau_p:
            tau += f" (the floor; the percentile is {self.tau_p:.6g})"
        if self.by == "source":
            tau = f"one a source, the lowest {tau}"
        return [
            f"level {self.level}, p = {self.p:g}: tau = {tau}",
            *source_lines(self.sources),
            f"samples kept  {share_of(n['samples_kept'], n['samples_total'])} with an image",
            f"tokens kept   {share_of(n['tokens_kept'], n['tokens_total'])} of these samples' answers",
            *self._easy_lines(),
            f"text-only     {n['text_only']:,} samples, {text:,} tokens, all kept{self._text_only_share()}",
            f"trained on    {share_of(n['tokens_kept'] + text, n['tokens_total'] + text)} of all answer tokens",
            f"not scored    {n['errors']:,} samples, none kept",
        ] + ([] if floor is None else [f"noise floor   {floor:.3g} nats: the same image scored twice"])

    def _text_only_share(self) -> str:
        text = self.counts["text_only_tokens"]
        kept = text + self.counts["tokens_kept"]
        return f": {100 * text / kept:.1f} % of the tokens trained on" if text else ""

    def _easy_lines(self) -> list[str]:
        if self.keep_easy is None:
            return []
        n = self.counts
        by_vig, easy = n["tokens_kept"] - n["tokens_easy"], n["tokens_easy"]
        measure = MEASURES[measure_of(self.by)].label
        return [
            f"  by {measure:11} {n['samples_kept'] - n['samples_easy']:,} samples, {by_vig:,} tokens",
            f"  as easy       {easy:,} more tokens, whose nll_null is under {self.keep_easy:g} nats",
            f"  easy alone    {n['samples_easy']:,} samples, kept for such tokens only",
        ]


@dataclass
class _Facts:
    """What the first pass leaves: one value a multimodal sample, and counts of the rest."""

    vig: np.ndarray  # float64
    n_tokens: np.ndarray  # int32
    hashes: np.ndarray  # uint64 of the keys
    codes: np.ndarray  # uint32 of the sources; by="source" alone
    sources: Sources
    text_only: int
    text_only_tokens: int
    errors: int

    def counts(self) -> dict[str, int]:
        """Of the selection; what is kept is filled in later."""
        return {
            "samples_total": len(self.vig),
            "samples_kept": 0,
            "tokens_total": int(self.n_tokens.sum(dtype=np.int64)),
            "tokens_kept": 0,
            "text_only": self.text_only,
            "text_only_tokens": self.text_only_tokens,
            "errors": self.errors,
        }


def select(
    scores,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    p: float = 70.0,
    *,
    level: str = "both",
    clip: float | None = None,
    tau_floor: float | None = None,
    seed: int = 0,
    by: str | None = None,
    stop_tokens: str = "keep",
    mean: str = "all",
    keep_easy: float | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Selection:
    """Choose about p per cent of the samples that have an image, and the tokens in them.

    tau_p is the (100 - p)-th percentile of sample VIG over rows with status "ok", with linear interpolation
    between neighbours (numpy's default). Ties at tau are kept. Text-only samples are kept whole, rows that
    could not be scored never.

    level: "both"; "sample": all tokens of the kept samples; "token": tokens >= tau of every sample;
        "random": as many samples and tokens as "both" keeps, drawn by a hash of key and seed; where the end-of-turn
        tokens of kept samples are kept in any case, the other tokens are drawn.
    clip: lowest log-probability in nats (below 0; math.log(0.01), say) that either pass counts with.
    tau_floor: lowest tau in nats.
    by: "source" takes p within each source, with a tau of its own; ``sources`` of the result counts them. "kl" ranks
        samples and tokens by KL(p_image || p_null) in place of VIG: how far the image moves the whole distribution,
        for better or worse, not the answer's likelihood alone. It needs scores with `stats=("kl",)`. "loss" is a loss
        filter, for comparison: it keeps the samples of the lowest mean nll_image, whole (level "sample" alone); tau is
        then the lowest mean log-likelihood, -nll_image.
    stop_tokens: "keep" keeps the end-of-turn tokens of every kept sample, whatever their VIG; "select" only those with
        VIG >= tau, as the paper's rule does. Scores that do not say which tokens these are have the paper's rule.
    mean: "all" answer tokens enter a sample's VIG, as the paper's do; "content" leaves end-of-turn tokens out.
    keep_easy: nats, above 0 (0.5, say). The tokens with nll_null_t < keep_easy, which are likely without the image too,
        are kept whatever their VIG, in every multimodal sample: in one that VIG drops they alone are trained on.
        Otherwise an answer loses the words that give it its form. nll_null_t counts as stored, whatever the clip. Off
        by default; not with level "random". The counts ``tokens_easy`` and ``samples_easy`` say how many tokens and
        samples are kept by this alone; ``tokens_kept`` and ``samples_kept`` include them.
    out: folder to write the selection to, in Parquet. A selection there that was made with the same settings is
        replaced; one of others raises SettingsDiffer, unless overwrite is set.
    progress: called with the share done, 0 to 1.

    Raises ValueError for settings that make no sense, StoreError for scores that cannot be read, FolderInUse where
    another process is writing to ``out``. Scores that are not complete are warned of, and listed in ``unfinished`` of
    the result.
    """
    choice = Choice(p, level, clip, tau_floor, seed, by, stop_tokens, mean, keep_easy)
    scores, folder = open_scores(scores), Path(out) if out is not None else None
    about = score_metadata(scores)
    stops = Stops.of(about, stop_tokens, mean)
    other = None if folder is None else taken(folder, "selection")
    if other is not None:
        raise StoreError(other)
    with nullcontext() if folder is None else lock_folder(folder):
        if folder is not None and not overwrite:
            refuse_other_selection(folder, {**about, "selection": choice.recorded(stops)})
        selection = _choose(scores, choice, stops, folder, progress)
    for line in selection.warnings:
        warnings.warn(line, stacklevel=2)
    return selection


def _choose(
    scores, choice: Choice, stops: Stops, folder: Path | None, progress: Callable[[float], None] | None
) -> Selection:
    """One pass over the scores for tau, one to choose by it; the second writes to `folder`."""
    is_random = choice.level == "random"
    report = _Progress(progress, count_rows(scores), passes=3 if is_random else 2)
    facts = _first_pass(scores, choice, stops, report)
    _refuse_duplicates(scores, facts.hashes)
    missing, about = unfinished(scores), score_metadata(scores)
    tau_p = float(np.percentile(facts.vig, 100 - choice.p)) if len(facts.vig) else None
    tau = tau_p if tau_p is None or choice.tau_floor is None else max(tau_p, float(choice.tau_floor))
    taus = None
    if choice.by == "source" and tau is not None:
        taus = taus_of(facts.vig, facts.codes, facts.sources.names, choice.p, choice.tau_floor)
        tau = tau_p = min(taus.values())
    notes = list(missing)
    level = "both" if is_random else choice.level
    rule = Rule(
        level,
        math.inf if tau is None else tau,
        choice.clip,
        choice.seed,
        taus=taus,
        stops=stops,
        measure=measure_of(choice.by),
        keep_easy=choice.keep_easy,
    )
    if is_random and tau is not None:
        both = count_both(scores, rule, report)
        rule = random_rule(rule, facts.hashes, facts.n_tokens, both, notes)
    kept, counts = _Kept(taus), facts.counts()
    sources = kept.sources.table()
    found = {"tau": tau, "tau_p": tau_p, "sources": sources, "counts": counts}
    several = data_sets(scores)
    of_data = {"data_sets": several} if len(several) > 1 else {}  # of one the scores' own metadata say it
    metadata = {**about, "selection": {**choice.recorded(stops), **found, **of_data}}

    def final_metadata() -> dict:
        counts.update(kept.counts)
        return metadata

    batches = kept.batches(scores, rule, report)
    if folder is not None:
        write_selection(folder, batches, final_metadata)
    else:
        for _ in batches:
            pass
        final_metadata()
    notes += [
        *tau_warnings(tau, about, counts, sources, measure_of(choice.by)),
        *(
            barely_used(facts.vig, about) if choice.clip is None and rule.measure == "vig" else ()
        ),  # clipped values, KL and losses are no measure of it
        *mistaken_share(choice.p),
    ]
    return Selection(
        scores,
        **vars(choice),
        **found,
        metadata=metadata,
        warnings=notes,
        unfinished=missing,
        rule=rule,
        out=folder,
    )


class _Progress:
    def __init__(self, tell: Callable[[float], None] | None, rows: int, passes: int):
        self.tell, self.total, self.done = tell, max(rows * passes, 1), 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.tell is not None:
            self.tell(min(1.0, self.done / self.total))


def _first_pass(scores, choice: Choice, stops: Stops, report: _Progress) -> _Facts:
    rule = Rule("both", math.inf, choice.clip, stops=stops, measure=measure_of(choice.by))
    from_tokens = rule.measure != "vig" or choice.clip is not None or not stops.in_mean
    columns, sources, codes = ["key", "source", "status", "n_tokens", "vig"], Sources(), []
    if from_tokens:
        columns += rule.value_columns
    vigs, sizes, hashes, text_only, text_tokens, errors = [np.empty(0)], [], [], 0, 0, 0
    for batch in read_scores(scores, columns, batch_size=1 << 13 if from_tokens else 1 << 16):
        ok, text, lengths = row_kinds(batch)
        if from_tokens:
            vigs.append(rule.values(batch, ok, lengths[ok])[1])
        else:
            vigs.append(batch["vig"].to_numpy(zero_copy_only=False)[ok])
        sizes.append(lengths[ok].astype(np.int32))
        hashes.append(hash_keys(batch["key"])[ok])
        if choice.by == "source":
            codes.append(sources.codes(batch["source"])[ok].astype(np.uint32))
        text_only += int(text.sum())
        text_tokens += int(lengths[text].sum())
        errors += batch.num_rows - int(ok.sum()) - int(text.sum())
        report(batch.num_rows)
    sizes, hashes, codes = (
        np.concatenate([np.empty(0, t), *x])
        for x, t in ((sizes, np.int32), (hashes, np.uint64), (codes, np.uint32))
    )
    return _Facts(np.concatenate(vigs), sizes, hashes, codes, sources, text_only, text_tokens, errors)


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
                    f"sample {key!r} is twice in the scores: were two folders of the same data given?"
                )
            seen.add(key)


class _Kept:
    """Counts of what a rule keeps, filled while its batches pass by."""

    def __init__(self, taus: Mapping[str, float] | None = None):
        self.counts = Counter(samples_kept=0, tokens_kept=0)
        self.sources = SourceCounts(dict(taus or {}))

    def batches(self, scores, rule: Rule, report: _Progress) -> Iterator[pa.RecordBatch]:
        for batch in read_scores(scores, rule.columns):
            found = rule.apply(batch)
            if rule.taus is not None:
                ok, _, lengths = row_kinds(batch)
                self.sources.add(batch, ok, lengths, found.rows)
            self.counts.update(samples_kept=found.samples, tokens_kept=found.tokens)
            if rule.keep_easy is not None:
                self.counts.update(samples_easy=found.easy_samples, tokens_easy=found.easy_tokens)
            yield found.rows
            report(batch.num_rows)
