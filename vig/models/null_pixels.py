"""Null images made on the device from the pixels that the processor made; each is named by a row of `NULLS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vig.models.null_image import NULLS, NullSettings
from vig.models.transfer import to_device
from vig_kernels import gaussian_blur


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
    return resolve_name(NULLS[settings.kind].function)(pictures, settings, pixel_range, seeds)


def blur(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Gaussian blur, sigma = settings.sigma x shorter side in pixels, radius ceil(3 sigma), reflected border."""
    return gaussian_blur(pictures, settings.sigma * min(pictures.shape[-2:]))


def mean(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Each picture's own mean colour."""
    return pictures.mean(dim=(-2, -1), keepdim=True).expand_as(pictures).contiguous()


def black(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """What the processor makes of a black picture."""
    colour = to_device(torch.tensor(pixel_range.black, dtype=pictures.dtype), pictures.device)
    return colour[:, None, None].expand_as(pictures).contiguous()


def noise(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Uniform noise between black and white, seeded by the picture's content."""
    low = torch.tensor(pixel_range.black)[:, None, None]
    high = torch.tensor(pixel_range.white)[:, None, None]
    drawn = [torch.rand(pictures.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return to_device((low + (high - low) * torch.stack(drawn)).to(pictures.dtype), pictures.device)
