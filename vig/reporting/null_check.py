"""Is the null image blind? A null that shows the image hides VIG, and one that says something else invents it.

Looked at are the words w of the answers that name a colour, a number, a size, a place, an object or an action
(`word_classes.txt`), where an answer says them for the first time, and which the image makes likely:

    NLL(w | image) < log 2        the NLL of a word is the sum over its tokens, nats

A blind reader of the question would say such a word about as often as the answers do, among the words of its kind k:

    chance(w) = -log(n_w / sum of n_v over the words v of k)        n: first mentions in the answers that are read

    likely = share of these words with NLL(w | null) < log 2              the null shows them, or the text gives them
    wrong  = share of these words with NLL(w | null) > chance(w) + 2      the null says something else: 7 times less
                                                                          likely than by chance is not blind

Kinds of which the answers hold fewer than 3 different words are left out: to guess among them takes no luck. Words that
the image does not make likely are too, since their answers may be wrong. Answers are read from a seeded sample of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vig.models.null_image import NULLS
from vig.reporting.facts import WORD_ROWS, WordRow, take_words
from vig.reporting.strata import Pool
from vig.reporting.views import NullCheck, NullRow
from vig.reporting.words import OTHER, SPECIAL, Words, class_of, parts, word_classes
from vig.selection.advice import share_of
from vig.selection.rule import row_kinds, sample_draws, token_and_sample_vig
from vig.store.scores import open_scores, read_scores, score_metadata
from vig.store.selections import hash_keys

LIKELY = math.log(2)  # nats: said with a probability above one half
FAR = 2.0  # nats above chance
MOST_LIKELY, MOST_WRONG = 1 / 2, 1 / 3  # shares above which a warning is due
FEWEST_WORDS = 50  # to be warned by
FEWEST_KINDS = 3  # different words of a kind
KINDS = tuple(name for name in dict.fromkeys(word_classes().values()) if name not in ("function", OTHER))


class _Mentions(NamedTuple):
    """First mentions of words of KINDS, one a word and answer."""

    words: np.ndarray  # (n,) int64 numbers of the words
    nll_null: np.ndarray  # (n,) nats
    nll_image: np.ndarray


def check_null(rows: Sequence[WordRow], tokenizer: Any, null: dict[str, Any]) -> NullCheck | None:
    """rows: answers with an image. null: kind and params, as the scores name them.

    None without a tokenizer, and where the answers have no such words. Warns from FEWEST_WORDS words on, and says of
    fewer that they are too few to tell.
    """
    if tokenizer is None:
        return None
    words = Words(tokenizer)
    kinds = np.empty(0, np.int64)
    found = []
    for part in parts(rows):
        numbers, starts = words.find(part)
        kinds = np.append(kinds, [_kind(text) for text in words.texts[len(kinds) :]]).astype(np.int64)
        found.append(_first_mentions(part, numbers, starts, kinds))
    if not found:
        return None
    return _judge(_Mentions(*map(np.concatenate, zip(*found, strict=True))), kinds, null)


def _kind(text: str) -> int:
    """Its place in KINDS; -1 for all other words."""
    name = OTHER if SPECIAL.fullmatch(text) else class_of(text)
    return KINDS.index(name) if name in KINDS else -1


def _first_mentions(
    rows: Sequence[WordRow], numbers: np.ndarray, starts: np.ndarray, kinds: np.ndarray
) -> _Mentions:
    if not len(starts):
        return _Mentions(numbers, np.empty(0), np.empty(0))
    null = np.add.reduceat(np.concatenate([row.nll_null for row in rows]).astype(np.float64), starts)
    image = null - np.add.reduceat(np.concatenate([row.vig for row in rows]), starts)
    owners = np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows])[starts]
    first = np.unique(owners * len(kinds) + numbers, return_index=True)[1]
    first = first[kinds[numbers[first]] >= 0]
    return _Mentions(numbers[first], null[first], image[first])


def _judge(said: _Mentions, kinds: np.ndarray, null: dict[str, Any]) -> NullCheck | None:
    counts = np.bincount(said.words, minlength=len(kinds))
    of_kind = [kinds == kind for kind in range(len(KINDS))]
    told = [kind for kind, mask in enumerate(of_kind) if np.count_nonzero(counts[mask]) >= FEWEST_KINDS]
    chances = np.full(len(kinds), np.nan)  # of the words, nats
    for kind in told:
        some = of_kind[kind] & (counts > 0)
        chances[some] = -np.log(counts[some] / counts[some].sum())
    chance, kind_of = chances[said.words], kinds[said.words]
    known = (said.nll_image < LIKELY) & ~np.isnan(chance)

    def row(name: str, mask: np.ndarray) -> NullRow:
        blind, by_chance = said.nll_null[mask], chance[mask]
        means = (float(values.mean()) for values in (said.nll_image[mask], blind, by_chance))
        shares = (float(np.mean(one)) for one in (blind < LIKELY, blind > by_chance + FAR))
        return NullRow(name, int(mask.sum()), *means, *shares)

    if not known.any():
        return None
    total = row("all of these", known)
    rows = [row(KINDS[kind], known & (kind_of == kind)) for kind in told if (known & (kind_of == kind)).any()]
    few = total.words < FEWEST_WORDS
    remark = f"these are too few to tell, under {FEWEST_WORDS} words" if few else ""
    return NullCheck(total, rows, [] if few else _warnings(total, null), remark)


def _warnings(total: NullRow, null: dict[str, Any]) -> list[str]:
    kind, params = null.get("kind", "unknown"), null.get("params") or {}
    said = f"null {kind}" + (f", sigma {params['sigma']:g}" if "sigma" in params else "")
    stronger = "a larger --sigma, or --null mean" if "sigma" in params else "--null mean or blur"
    found = []
    if total.likely > MOST_LIKELY:
        shown = "it shows the image, or " if "sigma" in params else ""
        found.append(
            f"{said} leaves {100 * total.likely:.0f} % of the words that need sight likely: {shown}the text gives them "
            f"away. VIG hardly tells such words apart. Look at the null (vig inspect), and try {stronger}"
        )
    if total.wrong > MOST_WRONG:
        another = kind in NULLS and NULLS[kind].stage == "image"
        cure = "Compare its VIG by rank, not in nats, or try" if another else "Try"
        found.append(
            f"{said} makes {100 * total.wrong:.0f} % of the words that need sight over 7 times less likely than by "
            f"chance: it says something else with confidence, and VIG is too high for them. {cure} {stronger}"
        )
    return found


# ---- after scoring


class ScoresCheck(NamedTuple):
    """What a scoring run says at its end of what it scored. null: None without words to judge by."""

    samples: int  # scored, with and without an image
    text_only: int
    tokens: int  # answer tokens
    text_only_tokens: int
    null: NullCheck | None

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        lines = []
        if self.text_only:
            lines.append(
                f"text-only: {share_of(self.text_only, self.samples)} samples, "
                f"{share_of(self.text_only_tokens, self.tokens)} answer tokens"
            )
        if self.null is not None:
            lines += [
                f"null check: {summary(self.null)}",
                *(f"warning: {line}" for line in self.null.warnings),
            ]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = self._asdict() | {"null": None}
        if self.null is not None:
            rows = {
                name: getattr(self.null.total, name)
                for name in NullRow.__dataclass_fields__
                if name != "name"
            }
            named["null"] = rows | {"warnings": self.null.warnings}
        return named


NOTHING = ScoresCheck(0, 0, 0, 0, None)  # of no scores


def summary(check: NullCheck) -> str:
    """One line."""
    total = check.total
    return (
        f"of {total.words:,} words that need sight the null leaves {100 * total.likely:.1f} % likely and makes "
        f"{100 * total.wrong:.1f} % far less likely than chance"
        + (f": {check.remark}" if check.remark else "")
    )


def check_scores(scores: Any, tokenizer: Any, seed: int = 0) -> ScoresCheck:
    """The shares of text-only samples, of every row, and `check_null` of at most WORD_ROWS answers, a seeded sample.

    Two passes in constant memory: one over keys and lengths, one over the tokens.
    """
    scores = open_scores(scores)
    pool, start, counts = Pool(WORD_ROWS), 0, np.zeros(4, np.int64)
    for batch in read_scores(scores, ["key", "status", "n_tokens", "vig"], batch_size=1 << 16):
        ok, text_only, lengths = row_kinds(batch)
        draws = sample_draws(hash_keys(batch["key"]), seed).astype(np.float64)
        pool.offer(draws[ok], np.flatnonzero(ok) + start)
        counts += (ok.sum() + text_only.sum(), text_only.sum(), lengths.sum(), lengths[text_only].sum())
        start += batch.num_rows
    rows = _rows(scores, np.sort(pool.rows)) if tokenizer is not None and len(pool.rows) else []
    null = score_metadata(scores).get("null") or {}
    return ScoresCheck(*counts.tolist(), check_null(rows, tokenizer, null))


def _rows(scores: Any, wanted: np.ndarray) -> list[WordRow]:
    """The tokens of the wanted rows, by number."""
    found, start = [], 0
    columns = ["key", "status", "n_tokens", "vig", "token_ids", "token_nll_image", "token_nll_null"]
    for batch in read_scores(scores, columns):
        first, last = np.searchsorted(wanted, (start, start + batch.num_rows))
        mine = batch.take(wanted[first:last] - start)
        start += batch.num_rows
        if mine.num_rows:
            ok, _, lengths = row_kinds(mine)
            vig, _ = token_and_sample_vig(mine, ok, lengths, None)
            found += take_words(mine, lengths, vig, np.arange(mine.num_rows))
    return found
