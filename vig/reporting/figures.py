"""Which box plots there are: the page and `vig plot` draw the same."""

from __future__ import annotations

from vig.reporting.facts import LENGTHS, POSITIONS, Facts
from vig.reporting.views import Boxes, WordFigures


def box_figures(facts: Facts, words: WordFigures) -> list[Boxes]:
    """The box plots that there is anything to tell by."""
    sample = f"seeded sample of {words.rows:,} answers" if words.sampled else "all answers"
    figures = [
        Boxes("By source", "sample VIG", "samples", facts.by_source.boxes(facts.sources.names)),
        Boxes("By kind of word", f"VIG of words; English lists; {sample}", "words", words.classes),
        Boxes(
            "By part of speech",
            f"VIG of words; spaCy; {words.tagged_rows:,} answers",
            "words",
            words.parts_of_speech,
        ),
        Boxes(
            "By place in the answer",
            "token VIG",
            "tokens",
            facts.tokens.boxes([name for name, _ in POSITIONS]),
        ),
        Boxes(
            "By length of the answer",
            "sample VIG, by answer tokens",
            "samples",
            facts.samples.boxes([name for name, _ in LENGTHS]),
        ),
    ]
    return [figure for figure in figures if len(figure.rows) > 1 or (figure.rows and figure is figures[0])]
