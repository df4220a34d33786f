"""The two passes of the model over one batch, and the answer tokens' likelihoods from them.

No (B, T, V) logits exist: at the model's own call of its LM head the hidden states of the answer rows are taken,
and one sweep of the head's weight serves both passes (`vig_kernels.linear_vig`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vig.families import LoadedModel, hidden_at_head
from vig.loss import HeadTransform, find_head, shifted_rows
from vig.null_image import NullSettings, PixelRange, null_pictures
from vig.pixels import Sizes
from vig.prompts import Encoded, Encoder
from vig_kernels import linear_nll, linear_vig


class TokenNLL(NamedTuple):
    """Of one sample's answer tokens, float32, (n,) each; `null` is None for a text-only sample."""

    image: np.ndarray
    null: np.ndarray | None


class TwoPasses:
    """Scores batches of encoded samples with a loaded model and one kind of null image."""

    def __init__(self, loaded: LoadedModel, encoder: Encoder, null: NullSettings, backend: str = "auto"):
        self.loaded, self.encoder, self.null, self.backend = loaded, encoder, null, backend
        self.model, self.head = loaded.model, find_head(loaded.model)
        self.pixel_range = PixelRange.of(loaded.processor)
        self.transform = HeadTransform()

    @torch.inference_mode()
    def score(
        self,
        samples: Sequence[Encoded],
        nulls: Sequence[Encoded] | None = None,
        hashes: Sequence[Sequence[str]] = (),
    ) -> list[TokenNLL]:
        """One result a sample. Samples of a batch are all multimodal or all text-only.

        nulls: the samples as they are without sight, for nulls that are not made of pixels.
        hashes: the content hash of each sample's images, which seed the noise null.
        """
        batch = self.inputs(samples)
        labels = batch.pop("labels")
        image = self._answer_rows(batch, labels)
        if not samples[0].sample.images:
            nll = linear_nll(image.hidden, self._weight, image.target, **self._head_options)
            return [TokenNLL(values, None) for values in _per_sample(nll, samples)]
        if nulls is not None:
            batch = self.inputs(nulls)
            labels = batch.pop("labels")
        else:
            sizes = [sample.sizes for sample in samples]
            batch = self.null_pixels(batch, sizes, [content for sample in hashes for content in sample])
        null = self._answer_rows(batch, labels)
        pair = linear_vig(image.hidden, null.hidden, self._weight, image.target, **self._head_options)
        columns = (_per_sample(pair.nll_image, samples), _per_sample(pair.nll_null, samples))
        return [TokenNLL(*values) for values in zip(*columns, strict=True)]

    def inputs(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch on the model's device, pixels still float32, cut behind its last answer."""
        batch = self.encoder.collate(samples, until_last_answer=True)
        return {name: value.to(self.model.device) for name, value in batch.items()}

    def null_pixels(
        self, pixels: dict[str, Tensor], sizes: Sizes, hashes: Sequence[str]
    ) -> dict[str, Tensor]:
        """The pixel inputs of the null batch, made on the device from the clean ones; all else as it is.

        sizes: (height, width) of each sample's images. hashes: the content hash of each image of the batch.
        """
        seeds = [int(content, 16) for content in hashes]

        def make(pictures: Tensor, images: list[int]) -> Tensor:
            return null_pictures(pictures, self.null, self.pixel_range, [seeds[image] for image in images])

        return self.loaded.family.null_pixels(pixels, sizes, make)

    @property
    def _weight(self) -> Tensor:
        return self.head.weight

    @property
    def _head_options(self) -> dict:
        return {
            "bias": self.head.bias,
            "logit_scale": self.transform.scale,
            "logit_softcap": self.transform.softcap,
            "backend": self.backend,
        }

    def _answer_rows(self, batch: dict[str, Tensor], labels: Tensor) -> _AnswerRows:
        """Runs the model and keeps, of its last hidden states (B, T, D), the rows that predict an answer token."""
        rows = shifted_rows(labels)
        return _AnswerRows(hidden_at_head(self.model, batch, rows.index), rows.target)


class _AnswerRows(NamedTuple):
    hidden: Tensor  # (N, D)
    target: Tensor  # (N,)


def _per_sample(values: Tensor, samples: Sequence[Encoded]) -> list[np.ndarray]:
    """Cuts (N,) values of a batch, in reading order, into one array a sample."""
    lengths = [len(sample.answer_index) for sample in samples]
    return np.split(values.float().cpu().numpy(), np.cumsum(lengths)[:-1])
