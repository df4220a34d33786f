"""The probes of `vig probe` on the base and on tuned arms: what a model takes from the picture, before and after.

Described on the page and not tested. The models are those of the experiment's runs, trained again; the questions are
the same for all of them, with true answers, and no run is tuned or examined on them:

    misleading-text  a colour question beside a statement that gives the same object a colour that is neither its own
                     nor its usual one, so that it is the text that misleads, and not habit
    attention        on image tokens by layer, of the answers to the same questions
    match            one caption beside a matching, a partly matching and a conflicting picture
    modality         four kinds of question, with the picture and with the null image
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.evidence import design
from benchmarks.evidence.design import UNTUNED, Run
from benchmarks.evidence.runs import SECONDS, Clock, Laboratory
from vig.demo import scenes
from vig.demo.dataset import Record, test_records, triple_records, write_records
from vig.evaluation.probes.run import run_probes
from vig.evaluation.probes.settings import ProbeSettings
from vig.scoring.scorer import Scorer
from vig.scoring.settings import RunSpec

NAME = "evidence-probes.jsonl"
SHARE, SEEDS, ARMS = 0.5, design.SEEDS[:3], ("all", "vig", "easy")
STATEMENT = "the picture: {claim}"  # in words of the demo's tokenizer, which has 77
KINDS = {
    "colour": scenes.name_colour,
    "caption": scenes.caption,
    "look up": scenes.look_up,
    "count": scenes.count,
}
LONGEST_ANSWER = 12  # tokens that are generated; a colour answer has 6
SEED = 6001


class Sizes(NamedTuple):
    """How much is asked."""

    questions: int = 160  # of misleading-text and attention
    triples: int = 80
    of_kind: int = 60


class Part(NamedTuple):
    """Probes that are made on the same data."""

    name: str  # of the file
    probes: tuple[str, ...]
    records: list[Record]
    fields: dict[str, dict[str, str]]  # by id
    settings: dict[str, str] = {}  # noqa: RUF012 - never written to


def plan(seeds: int = len(SEEDS)) -> list[Run]:
    """The base, then the arms of each seed."""
    tuned = [Run("shipped", SHARE, seed, arm) for seed in SEEDS[:seeds] for arm in ARMS]
    return [Run("shipped", 0.0, 0, UNTUNED), *tuned]


class Prober:
    """The data on disk, drawn once, and the probing of models."""

    def __init__(self, laboratory: Laboratory, folder: Path, sizes: Sizes | None = None):
        self.laboratory = laboratory
        self.parts = parts(sizes or Sizes())
        self.folder = folder
        for part in self.parts:
            write_records(folder, part.name, part.records)
            (folder / f"{part.name}.fields.json").write_text(json.dumps(part.fields), encoding="utf-8")

    def line(self, run: Run) -> dict:
        """The run's line: [probe, group, measure, n, value, low, high] of every figure, intervals over pictures."""
        clock = Clock()
        model = self.laboratory.tuned(run)
        clock.lap("tuning")
        scorer = Scorer(model, self.laboratory.drawn.processor)
        figures = [figure for part in self.parts for figure in self._figures(scorer, part)]
        clock.lap("probes")
        return run._asdict() | {"figures": figures, SECONDS: clock.laps}

    def _figures(self, scorer: Scorer, part: Part) -> Iterable[list]:
        fields = self.folder / f"{part.name}.fields.json"
        settings = ProbeSettings(
            fields=fields, statement=STATEMENT, max_new_tokens=LONGEST_ANSWER, **part.settings
        )
        data = RunSpec(self.folder / f"{part.name}.json")
        for result in run_probes(scorer, data, part.probes, settings=settings):
            if result.findings.errors:
                key, _, message = result.findings.errors[0]
                raise RuntimeError(
                    f"{len(result.findings.errors)} samples of {result.probe} failed, first {key}: {message}"
                )
            for group, measure, n, *values in result.figures:
                yield [result.probe, group, measure, n, *(round(value, 6) for value in values)]


def parts(sizes: Sizes) -> list[Part]:
    """What is asked: a function of the sizes alone."""
    rng = random.Random(f"evidence probes {SEED}")
    questions = test_records(sizes.questions, SEED)
    triples = triple_records(sizes.triples, SEED)
    kinds = [
        Record(f"{kind.replace(' ', '-')}-{place:03d}", scene, ask(rng, scene))
        for kind, ask in KINDS.items()
        for place in range(sizes.of_kind)
        for scene in [scenes.random_scene(rng, prior=0.0)]
    ]
    return [
        Part(
            "questions",
            ("misleading-text", "attention"),
            questions,
            {record.id: {"claim": claim(rng, record)} for record in questions},
            {"claim": "claim"},
        ),
        Part(
            "triples",
            ("match",),
            triples,
            {record.id: {"match": record.match, "pair": record.id.rpartition("-")[0]} for record in triples},
        ),
        Part(
            "kinds",
            ("modality",),
            kinds,
            {record.id: {"kind": record.turn.kind} for record in kinds},
            {"by": "kind"},
        ),
    ]


def claim(rng: random.Random, record: Record) -> str:
    """ "the cup is red." -> the cup in a colour that is neither its own nor its usual one."""
    _, name, _, colour = record.turn.truth.rstrip(".").split()
    others = [one for one in scenes.COLOURS if one not in (colour, scenes.CANONICAL[name])]
    return f"the {name} is {rng.choice(others)}."


def lines(runs: Iterable[Run], sizes: Sizes | None = None) -> Iterable[dict]:
    """The line of each run, in order; all in this process, on one thread."""
    with tempfile.TemporaryDirectory(prefix="vig-evidence-probes-") as folder:
        prober = Prober(Laboratory("shipped"), Path(folder), sizes)
        for run in runs:
            yield prober.line(run)
