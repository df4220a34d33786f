"""The pictures in the pixel inputs of one family's processor: taken out, checked, replaced by null images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from vig.models.families import Family, ModelError, family_of
from vig.models.pixels import Picture, PixelInputs, PixelLayout, Sizes


@dataclass(frozen=True)
class FamilyPixels:
    """The pictures in the pixel inputs of one family's processor, whose settings say how they were cut.

    sizes: for each sample of the batch, the (height, width) of its decoded images (`Encoded.sizes`).
    """

    family: Family
    processor: Any

    @classmethod
    def of(cls, config: Any, processor: Any) -> FamilyPixels:
        """Of a checkpoint's config and processor. Raises ModelError for a family that is not in the table."""
        return cls(family_of(config), processor)

    @property
    def layout(self) -> PixelLayout:
        return resolve_name(self.family.layout)

    def pictures(self, pixels: PixelInputs, sizes: Sizes) -> list[Picture]:
        """The pictures (C, H, W) of a batch without their padding, tiles put together; a thumbnail counts as one.

        Raises ModelError where the pixel inputs are not what the processor's settings make of images of such sizes.
        """
        try:
            return self.layout.take(pixels, sizes, self.processor)
        except ValueError as error:
            raise ModelError(f"{self.family.name}: {error}") from error

    def check(self, pixels: PixelInputs, sizes: Sizes) -> None:
        """Raises ModelError where `pictures` would."""
        try:
            self.layout.check(pixels, sizes, self.processor)
        except ValueError as error:
            raise ModelError(f"{self.family.name}: {error}") from error

    def put_back(self, pixels: PixelInputs, sizes: Sizes, pictures: Sequence[Tensor]) -> PixelInputs:
        """The same pixel inputs with other pictures in the places of `pictures`' own; padding stays as it is."""
        return self.layout.put_back(pixels, sizes, self.processor, pictures)

    def null_pixels(
        self, pixels: PixelInputs, sizes: Sizes, make: Callable[[Tensor, list[int]], Tensor]
    ) -> PixelInputs:
        """The pixel inputs with every picture replaced by make(pictures (n, C, H, W), numbers of their images)."""
        pictures = self.pictures(pixels, sizes)
        made: list[Tensor] = [picture.pixels for picture in pictures]
        for places in same_shapes(pictures):
            stacked = torch.stack([pictures[place].pixels for place in places])
            nulls = make(stacked, [pictures[place].image for place in places])
            for place, null in zip(places, nulls, strict=True):
                made[place] = null
        return self.put_back(pixels, sizes, made)


def same_shapes(pictures: Sequence[Picture]) -> list[list[int]]:
    """The places of pictures of equal shape, together, so that one call serves them all."""
    groups: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        groups.setdefault(picture.pixels.shape, []).append(place)
    return list(groups.values())
