"""What each null image makes of the miniature's words: `python -m vig.demo.nulls` prints the table as Markdown.

The samples are those of the demo's tuning data whose answers were given by someone who looked; the model is the
shipped checkpoint. `python -m vig.demo.nulls docs/null-images.md` puts the table into the page, between its
`<!-- nulls -->` marks.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import DATA_SEED, SAMPLES, Record, tuning_records, write_records
from vig.demo.measures import CLASSES, chance_above, words_of
from vig.demo.scenes import CANONICAL, COLOUR_WORDS, OBJECT_WORDS
from vig.models.null_image import BLUR_SIGMA, NullSettings
from vig.models.null_image import NULLS as KINDS
from vig.store.rows import ScoreRow

SIGMAS = (0.02, 0.05, BLUR_SIGMA, 0.2, 0.4)  # of the nulls that have one
NULLS = tuple(
    NullSettings(kind, sigma)
    for kind, row in KINDS.items()
    for sigma in (SIGMAS if "sigma" in row.parameters else (BLUR_SIGMA,))
)
MARKS = re.compile(r"(?<=<!-- nulls -->\n).*?(?=<!-- /nulls -->)", re.DOTALL)


class NullFigures(NamedTuple):
    """AUROC of token VIG against the words that are neither colour nor object; mean VIG in nats."""

    contrary: float  # of colours that are not the object's usual one
    canonical: float  # of those that are
    object: float
    vig: dict[str, float]  # "colour", "object", "function" -> mean


def measure(null: NullSettings, data: Path) -> NullFigures:
    """Score the data with the shipped checkpoint under one null image."""
    from vig.data.samples import read_samples
    from vig.scoring.scorer import Scorer

    scorer = Scorer(str(CHECKPOINT), dtype="float32", null=null.kind, sigma=null.sigma)
    words = words_of(scorer.loaded.processor.tokenizer)
    return figures(scorer.score(read_samples(data)), words)


def answered_by_looking(count: int, seed: int) -> list[Record]:
    """Those of the tuning data that have a picture and were not answered from habit."""
    records = tuning_records(count, seed)
    return [record for record in records if record.scene is not None and not record.turn.blind]


def figures(rows: Iterable[ScoreRow], words: Sequence[str]) -> NullFigures:
    """words: the word that each token id stands for."""
    said, vig, contrary = [], [], []
    for row in rows:
        answer = [words[id] for id in row.token_ids]
        said += answer
        contrary += against_habit(answer)
        vig.append(np.asarray(row.token_nll_null, float) - np.asarray(row.token_nll_image, float))
    vig, contrary = np.concatenate(vig), np.array(contrary)
    is_a = {name: np.isin(said, sorted(members)) for name, members in CLASSES.items()}
    other = vig[~(is_a["colour"] | is_a["object"])]
    return NullFigures(
        chance_above(vig[contrary], other),
        chance_above(vig[is_a["colour"] & ~contrary], other),
        chance_above(vig[is_a["object"]], other),
        {name: float(vig[member].mean()) for name, member in is_a.items()},
    )


def against_habit(answer: Sequence[str]) -> list[bool]:
    """Which words are colours that their object does not usually have: "a red cup", "the cup is red"."""
    found = []
    for place, word in enumerate(answer):
        after = answer[place + 1 : place + 2]
        near = [*after, *reversed(answer[:place])]
        thing = next((other for other in near if other in OBJECT_WORDS), None)
        found.append(word in COLOUR_WORDS and thing is not None and CANONICAL[thing] != word)
    return found


def table(found: Iterable[tuple[NullSettings, NullFigures]]) -> str:
    """Markdown: one row a null image, the default in bold."""
    lines = [
        "| null | AUROC of colours: contrary / usual | AUROC of objects | VIG: colour / object / function word |",
        "|---|---|---|---|",
    ]
    for null, each in found:
        name = f"{null.kind}, sigma {null.sigma:g}" if "sigma" in KINDS[null.kind].parameters else null.kind
        means = " / ".join(f"{each.vig[kind]:.2f}" for kind in CLASSES)
        cells = [name, f"{each.contrary:.3f} / {each.canonical:.3f}", f"{each.object:.3f}", means]
        mark = "**" if null == NullSettings() else ""
        lines.append(f"| {' | '.join(f'{mark}{cell}{mark}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import torch

    from vig.terminal import quiet_libraries

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, nargs="?", help="a page to put the table into")
    page = parser.parse_args().page
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_records(Path(folder), "seen", answered_by_looking(SAMPLES, DATA_SEED))
        text = table((null, measure(null, data)) for null in NULLS)
    print(text, end="")
    if page is not None:
        page.write_text(MARKS.sub(lambda _: text, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
