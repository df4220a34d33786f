"""Misleading text beside the image: the same question, plainly and after a statement that claims a wrong answer.

    flips = |right when asked plainly, and the claimed answer beside the statement| / |right when asked plainly|

By likelihood: an answer is right where the whole of it, end of turn included, is more probable than the claimed one.
By generation: where greedy decoding writes it (exact match, `vig.evaluation.probes.answering.plain`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vig.data.sample import Sample, SampleError, text_of
from vig.evaluation.probes.answering import (
    OnShare,
    answer_of,
    first_exchange,
    greedy_answers,
    with_answer,
)
from vig.evaluation.probes.data import ProbeData, image_name
from vig.evaluation.probes.findings import Findings, Unit, Values
from vig.evaluation.probes.settings import ProbeSettings
from vig.evaluation.probes.table import JUDGES
from vig.evaluation.similarity import plain
from vig.scoring.scorer import Scorer
from vig.store.rows import ScoreRow


class Trial(NamedTuple):
    """One question: as it is, and beside a statement that claims another answer."""

    sample: Sample  # up to its first answer
    misled: Sample
    claim: str

    @property
    def answer(self) -> str:
        return answer_of(self.sample)

    def variants(self) -> list[Sample]:
        """(asked plainly, misled) x (its answer, the claimed one), in this order."""
        return [
            form for asked in (self.sample, self.misled) for form in (asked, with_answer(asked, self.claim))
        ]


def misleading_text(
    scorer: Scorer, data: ProbeData, settings: ProbeSettings, on_share: OnShare = None
) -> Findings:
    """Judges every sample's first question by each of the judges; samples that one of them cannot judge are errors."""
    found = Findings([])
    trials = make_trials(data, settings, found)
    results: list[Verdict | str] = [
        Verdict({}, {"answer": trial.answer, "claim": trial.claim}) for trial in trials
    ]
    judges = [JUDGE[name] for name in JUDGES if name in settings.judges]
    for number, judge in enumerate(judges):

        def tell(share: float, before: int = number) -> None:
            if on_share is not None:
                on_share((before + share) / len(judges))

        for place, verdict in enumerate(judge(scorer, trials, settings, tell)):
            if isinstance(verdict, str):
                results[place] = verdict
            elif not isinstance(results[place], str):
                results[place] = Verdict(
                    results[place].values | verdict.values, results[place].about | verdict.about
                )
    for trial, result in zip(trials, results, strict=True):
        if isinstance(result, str):
            found.errors.append((trial.sample.key, trial.sample.id, result))
        else:
            found.units.append(Unit(trial.sample.key, image_name(trial.sample), *result))
    return found


class Verdict(NamedTuple):
    """What one judge says of a trial."""

    values: Values
    about: dict[str, Any]


def judge_likelihood(
    scorer: Scorer, trials: Sequence[Trial], settings: ProbeSettings, on_share: Callable[[float], None]
) -> Iterator[Verdict | str]:
    """A verdict a trial, or why there is none."""
    samples = [sample for trial in trials for sample in trial.variants()]
    rows = scorer.score(samples, lambda progress: on_share(progress.done / len(samples)))
    for four in batched(rows, 4):
        broken = [row for row in four if row.status.startswith("error: ")]
        if broken:
            yield broken[0].status.removeprefix("error: ")
        else:
            values, nll = by_likelihood(four)
            yield Verdict({"likelihood": values}, {"nll": nll})


def judge_generation(
    scorer: Scorer, trials: Sequence[Trial], settings: ProbeSettings, on_share: Callable[[float], None]
) -> Iterator[Verdict | str]:
    """A verdict a trial, or why there is none."""
    asked = [sample for trial in trials for sample in (trial.sample, trial.misled)]
    written = greedy_answers(scorer, asked, settings.max_new_tokens, on_share)
    for trial, two in zip(trials, batched(written, 2), strict=True):
        broken = [one for one in two if isinstance(one, SampleError)]
        if broken:
            yield f"{broken[0].reason}. {broken[0].cure}"
        else:
            values = by_generation(*two, trial.answer, trial.claim)
            yield Verdict({"generation": values}, {"plain": two[0], "misled": two[1]})


JUDGE = {"likelihood": judge_likelihood, "generation": judge_generation}


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def by_likelihood(rows: Sequence[ScoreRow]) -> tuple[dict[str, float], list[float]]:
    """Measures, and the NLL in nats of (plain, misled) x (answer, claim), each summed over an answer's tokens."""
    nll = [float(np.sum(row.token_nll_image, dtype=np.float64)) for row in rows]
    plain_right, misled_right = nll[0] < nll[1], nll[2] < nll[3]
    return measures(plain_right, misled_right, nll[3] < nll[2]), nll


def by_generation(asked_plainly: str, misled: str, answer: str, claim: str) -> dict[str, float]:
    """Measures of what was written when asked plainly, and beside the statement."""
    right = plain(answer)
    return measures(plain(asked_plainly) == right, plain(misled) == right, plain(misled) == plain(claim))


def measures(plain_right: bool, misled_right: bool, says_claim: bool) -> dict[str, float]:
    """Flips and losses are of samples that were answered right when asked plainly, and undefined for others."""
    found = {"right, plain": float(plain_right), "right, misled": float(misled_right)}
    if plain_right:
        found |= {"flips": float(says_claim), "lost": float(not misled_right)}
    return found


# --- statements ---


def make_trials(data: ProbeData, settings: ProbeSettings, found: Findings) -> list[Trial]:
    """One trial a sample; those that cannot be made are errors of `found`."""
    asked: list[Sample] = []
    for sample in data.samples:
        try:
            asked.append(first_exchange(sample))
        except SampleError as error:
            found.errors.append((error.key, error.id, f"{error.reason}. {error.cure}"))
    pools = None if settings.claim else Pools(asked, data, settings)
    trials = []
    for sample in asked:
        try:
            claim = data.of(sample, settings.claim) if pools is None else pools.draw(sample)
            if plain(claim) == plain(answer_of(sample)):
                cure = f"Correct the field {settings.claim!r}"
                raise SampleError(sample.key, sample.id, f"the claim {claim!r} is its answer", cure)
        except SampleError as error:
            found.errors.append((error.key, error.id, f"{error.reason}. {error.cure}"))
            continue
        trials.append(Trial(sample, misled(sample, settings.statement.replace("{claim}", claim)), claim))
    return trials


def misled(sample: Sample, statement: str) -> Sample:
    """The sample with the statement and a newline before the text of its last question."""
    place = max(place for place, message in enumerate(sample.messages) if message["role"] != "assistant")
    content = list(sample.messages[place]["content"])
    at = next((n for n, part in enumerate(content) if part["type"] == "text"), len(content))
    if at == len(content):
        content.append({"type": "text", "text": statement})
    else:
        text = content[at]["text"]
        start = len(text) - len(text.lstrip("\n"))  # the newline behind an image placeholder stays there
        content[at] = content[at] | {"text": f"{text[:start]}{statement}\n{text[start:]}"}
    messages = list(sample.messages)
    messages[place] = messages[place] | {"content": content}
    return replace(sample, messages=tuple(messages))


class Pools:
    """Wrong answers for each sample: the answers of other samples of its kind that differ from its own.

    Of the kind, first those to the same question with as many words, then to the same question, then with as many
    words, then any. A function of the data, the seed and the sample's key.
    """

    def __init__(self, samples: Sequence[Sample], data: ProbeData, settings: ProbeSettings):
        self.data, self.by, self.seed = data, settings.by, settings.seed
        pools: dict[tuple, dict[str, str]] = {}
        for sample in samples:
            try:
                levels = self._levels(sample)
            except SampleError:
                continue  # `draw` says so
            answer = answer_of(sample)
            for level in levels:
                pools.setdefault(level, {}).setdefault(plain(answer), answer)
        self.pools: Mapping[tuple, list[tuple[str, str]]] = {
            level: sorted(answers.items()) for level, answers in pools.items()
        }

    def _levels(self, sample: Sample) -> list[tuple]:
        kind = self.data.of(sample, self.by)
        question = plain(" ".join(text_of(message) for message in sample.messages[:-1]))
        words = len(answer_of(sample).split())
        return [(kind, question, words), (kind, question), (kind, None, words), (kind,)]

    def draw(self, sample: Sample) -> str:
        """Raises SampleError where no sample of its kind has another answer."""
        own = plain(answer_of(sample))
        for level in self._levels(sample):
            others = [answer for name, answer in self.pools[level] if name != own]
            if others:
                return random.Random(f"{self.seed} {sample.key}").choice(others)
        reason = f"no other answer of {self.by} {self.data.of(sample, self.by)!r} could be claimed"
        raise SampleError(
            sample.key, sample.id, reason, "Give a field with claims (--claim), or another --by"
        )
