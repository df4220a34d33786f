"""The table of null images: what the model sees when it is not to see.

VIG compares the answer's likelihood with the image and with a null image in its place (arXiv 2602.17186,
section 3, uses a Gaussian blur). Each null is one row of `NULLS`: its name, the stage at which it takes effect
and a function, named by its import path since the command line reads the table before torch is loaded.

    pixels  on the float pixels that the processor made, on the model's device
    image   another picture goes through the processor
    prompt  the image tokens are left out

A null replaces all images of a sample. Help and error texts, the report, docs/null-images.md and the tests read the
table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

BLUR_SIGMA = 0.1  # of the picture's shorter side; see docs/null-images.md for what other values do


class Null(NamedTuple):
    """One null image."""

    stage: str
    caption: str  # what it is, below its picture in a report
    shows: str  # what the model sees, for docs/null-images.md
    purpose: str  # what it is good for, likewise
    function: str | None = None  # stage "pixels": import path of f(pictures, settings, pixel_range, seeds)
    parameters: tuple[str, ...] = ()  # fields of `NullSettings` that it uses, stored with the scores
    fixed: dict[str, Any] = {}  # noqa: RUF012 - stored beside them; never written to


NULLS: dict[str, Null] = {
    "blur": Null(
        "pixels",
        "blurred",
        f"the image, blurred with sigma = `--sigma` ({BLUR_SIGMA}) of its shorter side in model pixels, radius "
        "ceil(3 sigma), reflected border",
        "scoring; the default",
        "vig.models.null_pixels:blur",
        ("sigma",),
        {"truncate": 3.0, "border": "reflect"},
    ),
    "mean": Null(
        "pixels",
        "its mean colour",
        "the image's own mean colour",
        "a null without any shape",
        "vig.models.null_pixels:mean",
    ),
    "black": Null(
        "pixels",
        "black",
        "what the processor makes of a black picture",
        "comparison with work that uses it",
        "vig.models.null_pixels:black",
    ),
    "noise": Null(
        "pixels",
        "noise",
        "uniform noise, seeded by the image's content",
        "a control; far from what models have seen",
        "vig.models.null_pixels:noise",
    ),
    "shuffle": Null(
        "image",
        "another image",
        "the next different image of the window (8,192 records in reading order; after the last comes the first), "
        "resized to fit; all questions about an image share it",
        "a null that is a natural picture",
        fixed={"donor": "next different image of the window"},
    ),
    "drop": Null(
        "prompt",
        "no image",
        "no image tokens at all",
        "the language prior alone; answers keep their tokens, positions shift",
    ),
}


@dataclass(frozen=True)
class NullSettings:
    """Which null image, and its parameters as they are stored with the scores.

    kind: a name of `NULLS`. sigma: the blur's standard deviation, a fraction of the picture's shorter side in
    model pixels; used by "blur" alone. Raises ValueError for an unknown kind and a sigma that is not positive.
    """

    kind: str = "blur"
    sigma: float = BLUR_SIGMA

    def __post_init__(self):
        if self.kind not in NULLS:
            raise ValueError(f"null = {self.kind!r}, expected one of {', '.join(NULLS)}")
        if not 0 < self.sigma < 10:
            raise ValueError(
                f"sigma = {self.sigma}, expected a fraction of the picture's side, such as {BLUR_SIGMA}"
            )

    @property
    def stage(self) -> str:
        return NULLS[self.kind].stage

    def metadata(self) -> dict[str, Any]:
        params = {key: value for key, value in asdict(self).items() if key in NULLS[self.kind].parameters}
        return {"kind": self.kind, "params": params | NULLS[self.kind].fixed}
