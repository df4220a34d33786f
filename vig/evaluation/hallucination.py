"""CHAIR: objects in captions that their images do not hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vig.evaluation.pairs import check_pairs, ratio


class Chair(NamedTuple):
    """chair_s: share of captions with a hallucination. chair_i: share of mentioned objects that are not there."""

    chair_s: float
    chair_i: float


def chair(
    mentioned: Iterable[Sequence[str]],  # a caption's objects, each mention counted
    present: Iterable[Iterable[str]],  # the objects that its image holds, of the same vocabulary
) -> Chair:
    """Hallucinated objects in captions.

        CHAIR_i = |hallucinated mentions| / |mentions|,  CHAIR_s = |captions with one| / |captions|

    Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, section 3.
    """
    mentioned, present = list(mentioned), [set(objects) for objects in present]
    check_pairs(len(mentioned), len(present))
    wrong = [
        sum(name not in truth for name in names) for names, truth in zip(mentioned, present, strict=True)
    ]
    mentions = sum(len(names) for names in mentioned)
    return Chair(sum(count > 0 for count in wrong) / len(wrong), ratio(sum(wrong), mentions))
