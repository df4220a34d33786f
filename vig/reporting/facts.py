"""What the scores say as a whole, read in streams: figures from every row, and which samples to show.

Three passes in constant memory but for 8 bytes a sample, which an exact tau takes: sample values and errors; strata;
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vig.data.error_log import group_of
from vig.reporting.counters import Counter
from vig.reporting.keep import Keeper, Rules
from vig.reporting.strata import Light, Picker, Pool
from vig.reporting.views import ErrorGroup, KeepCurve
from vig.selection.rule import row_kinds, sample_draws, token_and_sample_vig
from vig.selection.sources import Sources
from vig.store.scores import read_scores
from vig.store.selections import hash_keys
from vig.store.token_stats import TOKEN_STATS, stat_columns

WORD_ROWS = 20_000  # rows whose words are counted, of more a seeded sample
MOST_SOURCES = 64  # told apart; the rest stand together
EXAMPLES = 3  # keys and messages shown of each group

# Answer lengths and token positions, in ranges that double: (label, last value).
LENGTHS = [("1", 1), ("2", 2), ("3-4", 4), ("5-8", 8), ("9-16", 16), ("17-32", 32), ("33-64", 64)]
LENGTHS += [("65-128", 128), ("129-256", 256), ("257-512", 512), ("over 512", 2**62)]
POSITIONS = [("first", 1), ("2nd", 2), ("3rd", 3), ("4th", 4), *LENGTHS[3:]]
# By position in the turn, from 0; the last value stands for all beyond. A look-up is ten times as fast as a search.
RANGE_OF_POSITION = np.searchsorted([last for _, last in POSITIONS], np.arange(1, POSITIONS[-2][1] + 2))


class WordRow(NamedTuple):
    """Answer tokens of one row, for the figures of words."""

    ids: np.ndarray  # (n,) int32
    vig: np.ndarray  # (n,) float64, nats
    nll_null: np.ndarray  # (n,) float32, nats


@dataclass
class Facts:
    """Counts and distributions of a whole folder of scores, and the rows picked to be shown."""

    sources: Sources = field(default_factory=lambda: Sources(MOST_SOURCES))
    samples: Counter = field(default_factory=lambda: Counter(len(LENGTHS)))  # sample VIG by answer length
    tokens: Counter = field(
        default_factory=lambda: Counter(len(POSITIONS))
    )  # token VIG by place in the answer
    by_source: Counter = field(default_factory=Counter)  # sample VIG
    # Samples and tokens by the VIG that tau is compared with: the two above, unless the selection has its own mean.
    compared: tuple[Counter, Counter] | None = None
    text_only: int = 0
    text_only_tokens: int = 0
    n_errors: int = 0
    errors: dict[str, ErrorGroup] = field(default_factory=dict)
    tau: float | None = None  # in use: the selection's, or that of p = 70
    keep: KeepCurve | None = None
    picked: dict[int, list[str]] = field(default_factory=dict)  # row -> names of its strata
    strata: dict[str, int] = field(default_factory=dict)  # name -> samples on the page
    rows: dict[int, dict] = field(default_factory=dict)  # the picked rows of the scores
    # of the picked rows, where it is not their `vig`
    selected_vig: dict[int, float] = field(default_factory=dict)
    words: list[WordRow] = field(default_factory=list)
    stats: dict[str, tuple[float, int]] = field(default_factory=dict)  # label -> sum, tokens

    @property
    def multimodal(self) -> int:
        return self.samples.count


def gather(scores, n_samples: int, seed: int = 0, rules: Rules | None = None) -> Facts:
    """Read the scores. rules: what the slider follows, `select`'s defaults unless given."""
    rules = rules or Rules()
    facts = Facts()
    facts.compared = (Counter(), Counter()) if rules.own_mean else (facts.samples, facts.tokens)
    vig = _sample_pass(scores, facts, rules)
    keeper = Keeper(rules, vig, facts.sources)
    facts.tau = keeper.tau
    picker, word_rows = Picker(n_samples, facts.tau, facts.sources), Pool(WORD_ROWS)
    for batch in _light(scores, facts.sources, seed, vig[0]):
        picker.offer(batch)
        ok = ~np.isnan(batch.vig)
        word_rows.offer(batch.draws[ok].astype(np.float64), batch.rows[ok])
    facts.picked, facts.strata = picker.picks()
    _token_pass(scores, facts, keeper, np.sort(word_rows.rows))
    facts.keep = keeper.curve()
    return facts


def _light(scores, sources: Sources, seed: int, selected: np.ndarray):
    """selected: VIG (M,) of the multimodal samples as the selection takes it."""
    start = done = 0
    columns = ["key", "source", "status", "n_tokens", "vig"]
    for batch in read_scores(scores, columns, batch_size=1 << 16):
        ok, text_only, _ = row_kinds(batch)
        vig = np.full(batch.num_rows, np.nan)
        vig[ok] = selected[done : (done := done + int(ok.sum()))]
        rows = np.arange(start, start + batch.num_rows)
        codes, draws = sources.codes(batch["source"]), sample_draws(hash_keys(batch["key"]), seed)
        yield Light(rows, vig, codes, text_only, ~ok & ~text_only, draws)
        start += batch.num_rows


def _sample_pass(scores, facts: Facts, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Sample VIG (M,) of multimodal samples, as `select` takes it, and the codes of their sources (M,) uint8."""
    values, codes = [np.empty(0)], [np.empty(0, np.uint8)]
    columns, stops = ["key", "source", "status", "n_tokens", "vig"], rules.stops
    if rules.own_mean:
        columns += ["token_nll_image", "token_nll_null", *(stops.columns if stops.ids else ())]
    for batch in read_scores(scores, columns, batch_size=1 << 13 if rules.own_mean else 1 << 16):
        ok, text_only, lengths = row_kinds(batch)
        vig = batch["vig"].to_numpy(zero_copy_only=False)[ok]
        of_source = facts.sources.codes(batch["source"])[ok]
        facts.samples.add(vig, _ranges(LENGTHS, lengths[ok]))
        if len(facts.sources.names) > len(facts.by_source.grid):
            facts.by_source = facts.by_source.grown(len(facts.sources.names))
        facts.by_source.add(vig, of_source)
        facts.text_only += int(text_only.sum())
        facts.text_only_tokens += int(lengths[text_only].sum())
        _add_errors(facts, batch, ~ok & ~text_only)
        if rules.own_mean:
            vig = token_and_sample_vig(batch, ok, lengths[ok], rules.clip, stops)[1]
            facts.compared[0].add(vig)
        values.append(vig)
        codes.append(of_source.astype(np.uint8))
    return np.concatenate(values), np.concatenate(codes)


def _ranges(ranges: list[tuple[str, int]], values: np.ndarray) -> np.ndarray:
    return np.searchsorted([last for _, last in ranges], values)


def _add_errors(facts: Facts, batch: pa.RecordBatch, lost: np.ndarray) -> None:
    if not lost.any():
        return
    rows = batch.filter(pa.array(lost))
    facts.n_errors += rows.num_rows
    for key, status in zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True):
        message = status.removeprefix("error: ")
        reason = group_of(message, facts.errors)
        group = facts.errors.setdefault(reason, ErrorGroup(reason, 0, []))
        group.count += 1
        if len(group.examples) < EXAMPLES:
            group.examples.append((key, message))


def _token_pass(scores, facts: Facts, keeper: Keeper, word_rows: np.ndarray) -> None:
    start = 0
    for batch in read_scores(scores):
        ok, _, lengths = row_kinds(batch)
        lengths = lengths[ok]
        token_vig, _ = token_and_sample_vig(batch, ok, lengths, None)
        mine = batch if ok.all() else batch.filter(pa.array(ok))
        _add_stats(facts, mine)
        places = np.minimum(mine["positions"].flatten().to_numpy(), len(RANGE_OF_POSITION) - 1)
        facts.tokens.add(token_vig, RANGE_OF_POSITION[places])
        selected_tokens, selected = keeper.add(mine, lengths, facts.sources.codes(mine["source"]))
        if keeper.rules.own_mean:
            facts.compared[1].add(selected_tokens)
        place = np.cumsum(ok) - 1  # among the rows with VIG
        first, last = np.searchsorted(word_rows, (start, start + batch.num_rows))
        facts.words += take_words(mine, lengths, token_vig, place[word_rows[first:last] - start])
        for row in facts.picked.keys() & range(start, start + batch.num_rows):
            facts.rows[row] = batch.slice(row - start, 1).to_pylist()[0]
            if keeper.rules.own_mean and ok[row - start]:
                facts.selected_vig[row] = float(selected[place[row - start]])
        start += batch.num_rows


def _add_stats(facts: Facts, rows: pa.RecordBatch) -> None:
    for column in stat_columns(TOKEN_STATS):
        if column.name in rows.schema.names:
            values = rows[column.name].flatten().to_numpy()
            total, count = facts.stats.get(column.label, (0.0, 0))
            facts.stats[column.label] = (total + float(values.sum(dtype=np.float64)), count + len(values))


def take_words(
    rows: pa.RecordBatch,  # multimodal ones alone
    lengths: np.ndarray,  # their answer tokens
    vig: np.ndarray,  # of the tokens
    wanted: np.ndarray,  # places among the rows of those whose words are counted
) -> list[WordRow]:
    """Copies of the tokens of the wanted rows."""
    values = rows["token_ids"].flatten().to_numpy(), vig, rows["token_nll_null"].flatten().to_numpy()
    ends, found = np.cumsum(lengths), []
    for row in wanted.tolist():
        part = slice(ends[row] - lengths[row], ends[row])
        found.append(WordRow(*(value[part].copy() for value in values)))
    return found
