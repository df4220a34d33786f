"""The table of probes: names, what each measures and needs. Help, errors, docs and what is printed are made from it.

It imports neither torch nor transformers, since the command line reads it; functions are named by import path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MATCHES = ("match", "partly", "conflict")  # how a picture of a triple fits its text
NEAR_ZERO = 0.05  # nats


class Measure(NamedTuple):
    """One column of a probe's figures: a mean over samples, in nats, or a share that is shown in per cent."""

    name: str
    unit: str  # "nats" or "share"
    says: str


class Probe(NamedTuple):
    """One probe."""

    question: str  # what it asks of the model
    groups: str  # what the rows of its figures are
    measures: tuple[Measure, ...]
    needs: str  # of the data
    settings: tuple[str, ...]  # fields of `ProbeSettings` that it depends on
    function: str  # import path of f(scorer, data, settings, on_share) -> Findings


PROBES: dict[str, Probe] = {
    "misleading-text": Probe(
        "does a false statement beside the image change the answer?",
        "how answers are judged: likelihood or generation",
        (
            Measure("right, plain", "share", "answered right when asked plainly"),
            Measure("right, misled", "share", "answered right beside the statement"),
            Measure("flips", "share", "of those right when asked plainly: now give the claimed answer"),
            Measure("lost", "share", "of those right when asked plainly: now wrong, whatever they answer"),
        ),
        "questions with an image and a known answer",
        ("by", "claim", "statement", "judges", "max_new_tokens", "seed"),
        "vig.evaluation.probes.misleading_text:misleading_text",
    ),
    "attention": Probe(
        "how much attention do the answer's tokens pay to the image, layer by layer?",
        "the layers of the decoder",
        (
            Measure("on image tokens", "share", "attention mass on image tokens, mean over heads and answer rows"),
            Measure("image tokens", "share", "of the tokens that an answer row sees: what even attention would give"),
        ),
        "samples with an image",
        (),
        "vig.evaluation.probes.attention:attention",
    ),
    "match": Probe(
        "does VIG follow how well the picture fits the text?",
        "groups of pictures, then their differences within a pair",
        (
            Measure("VIG", "nats", "mean sample VIG of a group, and of the difference of two within a pair"),
            Measure("in order", "share", "pairs whose VIG falls from group to group"),
        ),
        "the same text beside several pictures: a field that names the group, and one that names the pair",
        ("group", "pair", "order"),
        "vig.evaluation.probes.match:match",
    ),
    "modality": Probe(
        "which sources can be answered without the image?",
        "the sources",
        (
            Measure("VIG", "nats", "mean sample VIG"),
            Measure("near zero", "share", f"sample VIG within {NEAR_ZERO} nats of 0, or --near-zero"),
            Measure("right, image", "share", "whole answer right, as greedy decoding writes it, with the image"),
            Measure("right, null", "share", "the same with the null image"),
            Measure("gain", "share", "right with the image less right with the null"),
        ),
        "samples with an image and a known answer",
        ("by", "near_zero"),
        "vig.evaluation.probes.modality:modality",
    ),
}  # fmt: skip

JUDGES = ("likelihood", "generation")


def check_probes(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of the table, each once. Raises ValueError for one that it does not have, or none."""
    names = list(names)
    for name in names:
        if name not in PROBES:
            raise ValueError(f"probe = {name!r}, expected one of {', '.join(PROBES)}")
    if not names:
        raise ValueError(f"no probe was named, expected one or more of {', '.join(PROBES)}")
    return tuple(name for name in PROBES if name in names)
