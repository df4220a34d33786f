"""Image features, computed once a pass for each distinct set of images and handed to the model's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vig.models.families import FAMILIES

KEPT_BYTES = 64 << 20  # of features that later batches may ask for again


def why_not(model: PreTrainedModel) -> str | None:
    """None where features can be computed apart from the model's forward; else the reason."""
    family = FAMILIES.get(model.config.model_type)
    if family is not None and not family.features_apart:
        return f"the tower of {model.config.model_type} gives more than features"
    takes = inspect.signature(type(model).forward).parameters
    if "mm_encoder_outputs" not in takes or not hasattr(model.model, "get_image_features"):
        return f"{type(model).__name__} takes no image features"
    return None


class ImageFeatures:
    """Features by name, the latest KEPT_BYTES of them. What a batch itself needs is always there."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._kept: dict[Hashable, Tensor] = {}  # in the order of their last use
        self._is_list = True

    def clear(self) -> None:
        self._kept.clear()

    def of(
        self,
        names: Sequence[Hashable],
        n_tokens: Sequence[int],
        pixels: Callable[[list[int]], dict[str, Tensor]],
    ) -> dict[str, BaseModelOutputWithPooling]:
        """What `mm_encoder_outputs=` takes: the features of each name, one after another.

        n_tokens: how many image tokens each has. pixels(places): the pixel inputs of names[place] for each place,
        asked for those that are not known yet, and only for the first of equal names.
        """
        missing = {name: names.index(name) for name in dict.fromkeys(names) if name not in self._kept}
        found = {name: self._kept.pop(name) for name in dict.fromkeys(names) if name in self._kept}
        if missing:
            places = list(missing.values())
            flat = self._compute(pixels(places))
            parts = flat.split([n_tokens[place] for place in places])
            found |= {name: part.clone() for name, part in zip(missing, parts, strict=True)}
        joined = torch.cat([found[name] for name in names])
        self._keep(found)
        output = BaseModelOutputWithPooling()
        output.pooler_output = [joined] if self._is_list else joined
        return {"image": output}

    def _compute(self, pixels: dict[str, Tensor]) -> Tensor:
        """(image tokens, D), all images of `pixels` in order."""
        function = self.model.model.get_image_features
        takes = inspect.signature(function).parameters
        given = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value
            for name, value in pixels.items()
            if name in takes
        }
        features: Any = function(**given, return_dict=True).pooler_output
        self._is_list = isinstance(features, list | tuple)
        if self._is_list:
            features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        return features.reshape(-1, features.shape[-1])

    def _keep(self, found: dict[Hashable, Tensor]) -> None:
        self._kept |= found
        held = sum(value.nbytes for value in self._kept.values())
        while held > KEPT_BYTES:
            held -= self._kept.pop(next(iter(self._kept))).nbytes
