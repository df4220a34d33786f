"""The table of null images: what the model sees when it is not to see.

VIG compares the answer's likelihood with the image and with a null image in its place (arXiv 2602.17186,
section 3, uses a Gaussian blur). Each null is one row of `NULLS`: its name, the stage at which it takes effect
and a function.

    pixels  on the float pixels that the processor made, on the model's device
    image   another picture goes through the processor
    prompt  the image tokens are left out

A null replaces all images of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vig_kernels import gaussian_blur

BLUR_SIGMA = 0.1  # of the picture's shorter side; see docs/null-images.md for what other values do


@dataclass(frozen=True)
class PixelRange:
    """What the processor made of black (0) and white (255), a channel: (0 - mean) / std and (1 - mean) / std."""

    black: tuple[float, ...]
    white: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> PixelRange:
        images = getattr(processor, "image_processor", processor)
        scale = 1.0 if getattr(images, "do_rescale", True) else 255.0
        if not getattr(images, "do_normalize", True):
            return cls((0.0,) * 3, (scale,) * 3)
        pairs = list(zip(images.image_mean, images.image_std, strict=True))
        return cls(
            tuple((0.0 - mean) / std for mean, std in pairs),
            tuple((scale - mean) / std for mean, std in pairs),
        )


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


def as_image(picture: Tensor, pixel_range: PixelRange) -> Image.Image:
    """A processed picture (C, H, W) as it would look, for reports: black and white mapped back to 0 and 255."""
    black = torch.tensor(pixel_range.black)[:, None, None]
    white = torch.tensor(pixel_range.white)[:, None, None]
    levels = ((picture.detach().float().cpu() - black) / (white - black) * 255).round().clamp(0, 255)
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())


def null_pictures(
    pictures: Tensor,  # (n, C, H, W) float, processed
    settings: NullSettings,
    pixel_range: PixelRange,
    seeds: Sequence[int],  # (n,) one a picture, from its content
) -> Tensor:
    """The null of each picture, same shape, dtype and device. For nulls of the "pixels" stage."""
    return NULLS[settings.kind].function(pictures, settings, pixel_range, seeds)


def blur(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Gaussian blur, sigma = settings.sigma x shorter side in pixels, radius ceil(3 sigma), reflected border."""
    return gaussian_blur(pictures, settings.sigma * min(pictures.shape[-2:]))


def mean(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Each picture's own mean colour."""
    return pictures.mean(dim=(-2, -1), keepdim=True).expand_as(pictures).contiguous()


def black(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """What the processor makes of a black picture."""
    return pictures.new_tensor(pixel_range.black)[:, None, None].expand_as(pictures).contiguous()


def noise(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Uniform noise between black and white, seeded by the picture's content."""
    low = torch.tensor(pixel_range.black)[:, None, None]
    high = torch.tensor(pixel_range.white)[:, None, None]
    drawn = [torch.rand(pictures.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (low + (high - low) * torch.stack(drawn)).to(pictures)


class Null(NamedTuple):
    stage: str
    function: Callable[..., Tensor] | None
    parameters: tuple[str, ...] = ()
    fixed: dict[str, Any] = {}  # noqa: RUF012 - never written to


NULLS: dict[str, Null] = {
    "blur": Null("pixels", blur, ("sigma",), {"truncate": 3.0, "border": "reflect"}),
    "mean": Null("pixels", mean),
    "black": Null("pixels", black),
    "noise": Null("pixels", noise),
    "shuffle": Null("image", None, (), {"donor": "next different image of the window"}),
    "drop": Null("prompt", None),
}
