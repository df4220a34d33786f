"""The two passes of the model over one batch, and the answer tokens' likelihoods from them.

No (B, T, V) logits exist: at the model's own call of its LM head the hidden states of the answer rows are taken,
and one sweep of the head's weight serves both passes (`vig_kernels.linear_vig`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vig.models import image_features
from vig.models.image_features import ImageFeatures
from vig.models.lm_head import HeadTransform, find_head, head_replaced, hidden_at_head, shifted_rows
from vig.models.loading import LoadedModel
from vig.models.null_image import NullSettings
from vig.models.null_pixels import PixelRange, null_pictures
from vig.models.pixels import Sizes
from vig.models.prompts import Encoded, Encoder, collate_pixels
from vig.scoring import packed_attention, prefix_sharing
from vig.scoring.batching import BATCH_TOKENS
from vig_kernels import linear_nll, linear_vig


class TokenNLL(NamedTuple):
    """Of one sample's answer tokens, float32, (n,) each; `null` is None for a text-only sample."""

    image: np.ndarray
    null: np.ndarray | None

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.image).all() and (self.null is None or np.isfinite(self.null).all()))


class TwoPasses:
    """Scores batches of encoded samples with a loaded model and one kind of null image.

    share: neighbours that share images and prompt prefix are computed in one row (`prefix_sharing`), where the model's
    attention allows it. longest: tokens of such a row.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        encoder: Encoder,
        null: NullSettings,
        backend: str = "auto",
        *,
        share: bool = True,
        longest: int = BATCH_TOKENS,
    ):
        self.loaded, self.encoder, self.null, self.backend = loaded, encoder, null, backend
        self.model, self.head = loaded.model, find_head(loaded.model)
        self.pixel_range = PixelRange.of(loaded.processor)
        self.transform = HeadTransform()
        self._packs = packed_attention.why_not(loaded.model) is None
        self.share = share and (self._packs or prefix_sharing.why_not(loaded.model) is None)
        self.kernel = loaded.model.config.get_text_config()._attn_implementation
        self.longest = longest
        self._last = last_feed_forward(loaded.model)
        self.features = ImageFeatures(self.model)
        self._keeps_features = image_features.why_not(self.model) is None

    @torch.inference_mode()
    def score(
        self,
        samples: Sequence[Encoded],
        nulls: Sequence[Encoded] | None = None,
        hashes: Sequence[Sequence[str]] = (),
        null_hashes: Sequence[Sequence[str]] | None = None,
    ) -> list[TokenNLL]:
        """One result a sample. Samples of a batch are all multimodal or all text-only.

        nulls: the samples as they are without sight, for nulls that are not made of pixels.
        hashes: the content hash of each sample's images, which seed the noise null and tell which images are equal.
        null_hashes: the same of the nulls' images; as `hashes` unless given.
        """
        rows = self.rows(samples, hashes)
        null_hashes = hashes if null_hashes is None else null_hashes
        values = self._score_rows(rows, samples, nulls, hashes, null_hashes)
        members = [len(row.members) for row in rows for _ in row.members]
        for place, value in enumerate(values):
            if members[place] > 1 and not value.is_finite():
                # a NaN of one member reaches all others of its row
                alone = slice(place, place + 1)
                values[place] = self.score(
                    samples[alone], nulls and nulls[alone], hashes[alone], null_hashes[alone]
                )[0]
        return values

    def _score_rows(
        self,
        rows: Sequence[prefix_sharing.Row],
        samples: Sequence[Encoded],
        nulls: Sequence[Encoded] | None,
        hashes: Sequence[Sequence[str]],
        null_hashes: Sequence[Sequence[str]],
    ) -> list[TokenNLL]:
        batch = self._laid_out(rows)
        content = (
            {id(sample): tuple(names) for sample, names in zip(samples, hashes, strict=True)}
            if hashes
            else {}
        )
        seen = [content.get(id(row.members[0]), ()) for row in rows]
        image = self._answer_rows(self._pictured(batch, rows, seen, "image"))
        if not samples[0].sample.images:
            nll = linear_nll(image.hidden, self._weight, image.target, **self._head_options)
            return [TokenNLL(values, None) for values in _per_sample(nll, samples)]
        if nulls is None:
            null = self._answer_rows(self._pictured(batch, rows, seen, "null"))
        else:
            rows = self.rows(nulls, null_hashes)
            content = {id(twin): tuple(names) for twin, names in zip(nulls, null_hashes, strict=True)}
            seen = [content[id(row.members[0])] for row in rows]
            batch = self._laid_out(rows)
            null = self._answer_rows(self._pictured(batch, rows, seen, "other image"))
        pair = linear_vig(image.hidden, null.hidden, self._weight, image.target, **self._head_options)
        columns = (_per_sample(pair.nll_image, samples), _per_sample(pair.nll_null, samples))
        return [TokenNLL(*values) for values in zip(*columns, strict=True)]

    def _laid_out(self, rows: Sequence[prefix_sharing.Row]) -> _Batch:
        """The rows in one sequence where the model allows it, else padded to the longest."""
        if not (self.share and self._packs):
            inputs = prefix_sharing.row_inputs(self.model, self.encoder, rows)
            return _Batch(inputs, inputs.pop("labels"))
        inputs = packed_attention.packed_inputs(self.model, self.encoder, rows)
        return _Batch(inputs, inputs.pop("labels"), packed_attention.Layout(rows, self.kernel))

    def _pictured(
        self,
        batch: _Batch,
        rows: Sequence[prefix_sharing.Row],
        hashes: Sequence[tuple[str, ...]],
        kind: str,
    ) -> _Batch:
        """The batch with the images of one pass: their pixels, or the features that are computed once for each.

        hashes: of the images of each row. kind: "image", "null" (made of the pixels) or "other image".
        """
        firsts = [row.members[0] for row in rows]
        if "pixel_values" not in batch.inputs:
            return batch
        if not (self.share and self._keeps_features and all(hashes)):
            if kind != "null":
                return batch
            seeds = [one for row in hashes for one in row]
            nulls = self.null_pixels(batch.inputs, [first.sizes for first in firsts], seeds)
            return batch._replace(inputs=nulls)

        def pixels(places: list[int]) -> dict[str, Tensor]:
            chosen = [firsts[place] for place in places]
            inputs = collate_pixels(
                [first.pixels for first in chosen], [len(first.input_ids) for first in chosen]
            )
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            if kind != "null":
                return inputs
            seeds = [one for place in places for one in hashes[place]]
            return self.null_pixels(inputs, [first.sizes for first in chosen], seeds)

        n_tokens = [first.input_ids.count(self.encoder.image_token_id) for first in firsts]
        outputs = self.features.of([(kind, *row) for row in hashes], n_tokens, pixels)
        rest = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
        return batch._replace(inputs=rest | {"mm_encoder_outputs": outputs})

    def rows(
        self, samples: Sequence[Encoded], hashes: Sequence[Sequence[str]] = ()
    ) -> list[prefix_sharing.Row]:
        """The rows that a batch of these samples has: one each, or one for neighbours that share a prefix."""
        if not self.share or len(hashes) != len(samples):
            return [prefix_sharing.Row((sample,)) for sample in samples]
        width = None if self._packs else self.model.config.get_text_config().hidden_size
        return prefix_sharing.rows_of(samples, hashes, self.encoder.image_token_id, width, self.longest)

    @torch.inference_mode()
    def sharing_error(self, rows: Sequence[prefix_sharing.Row]) -> float:
        """How far these rows move their members' clean NLL, in nats: the most in float32, the mean in 16 bit."""
        apart = self.inputs([member for row in rows for member in row.members])
        images = [row.members[0].sample.images for row in rows]
        names = [("proof", images.index(one)) for one in images]  # equal where the images are
        batches = [
            _Batch(apart, apart.pop("labels")),
            self._pictured(self._laid_out(rows), rows, names, "image"),
        ]
        values = []
        for batch in batches:
            found = self._answer_rows(batch)
            values.append(linear_nll(found.hidden, self._weight, found.target, **self._head_options))
        self.features.clear()
        moved = (values[0] - values[1]).abs()
        moved = moved[moved.isfinite()]  # of others `score` takes care
        if not moved.numel():
            return 0.0
        return float(moved.max() if self.model.dtype == torch.float32 else moved.mean())

    def inputs(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch on the model's device, one row a sample, pixels still float32, cut behind its last answer."""
        return prefix_sharing.row_inputs(
            self.model, self.encoder, [prefix_sharing.Row((sample,)) for sample in samples]
        )

    def null_pixels(
        self, pixels: dict[str, Tensor], sizes: Sizes, hashes: Sequence[str]
    ) -> dict[str, Tensor]:
        """The pixel inputs of the null batch, made on the device from the clean ones; all else as it is.

        sizes: (height, width) of each sample's images. hashes: the content hash of each image of the batch.
        """
        seeds = [int(content, 16) for content in hashes]

        def make(pictures: Tensor, images: list[int]) -> Tensor:
            return null_pictures(pictures, self.null, self.pixel_range, [seeds[image] for image in images])

        return self.loaded.pixels.null_pixels(pixels, sizes, make)

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

    def _answer_rows(self, batch: _Batch) -> _AnswerRows:
        """Runs the model and keeps, of its last hidden states (B, T, D), the rows that predict an answer token.

        Behind its attention the last layer is computed on these rows alone.
        """
        rows = shifted_rows(batch.labels)
        with packed_attention.attention(self.model, batch.layout), on_rows(self._last, rows.index):
            return _AnswerRows(hidden_at_head(self.model, batch.inputs, rows.index), rows.target)

    @torch.inference_mode()
    def last_layer_error(self, sample: Encoded) -> float:
        """How far the last layer on answer rows alone moves their hidden states, as a part of their norm."""
        batch = self.inputs([sample])
        rows = shifted_rows(batch.pop("labels")).index
        whole = hidden_at_head(self.model, batch, rows).float()
        with on_rows(self._last, rows):
            part = hidden_at_head(self.model, batch, rows).float()
        return float((whole - part).norm() / whole.norm())

    def last_layer_whole(self) -> None:
        """From now on the last layer is computed on all rows."""
        self._last = None


class _Batch(NamedTuple):
    """What the model reads, where the answers are, and how its rows lie where they are not padded."""

    inputs: dict[str, Any]
    labels: Tensor  # (B, T), or (1, L) with a layout
    layout: packed_attention.Layout | None = None


def last_feed_forward(model: Any) -> torch.nn.Module | None:
    """The feed-forward part of the last text layer, which computes every row for itself; None where it is not found."""
    layers = getattr(model.get_decoder(), "layers", None)
    return None if not layers else getattr(layers[-1], "mlp", None)


@contextmanager
def on_rows(part: torch.nn.Module | None, rows: Tensor) -> Iterator[None]:
    """While it lasts, `part` computes the flat rows (N,) of its input (B, T, D) and gives zeros for the others."""
    if part is None:
        yield
        return

    def chosen(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = rows.to(hidden.device)
        out = torch.zeros_like(flat)
        out[index] = forward(flat[index][None])[0]
        return out.reshape(hidden.shape)

    with head_replaced(part, chosen):
        yield


class _AnswerRows(NamedTuple):
    hidden: Tensor  # (N, D)
    target: Tensor  # (N,)


def _per_sample(values: Tensor, samples: Sequence[Encoded]) -> list[np.ndarray]:
    """Cuts (N,) values of a batch, in reading order, into one array a sample."""
    lengths = [len(sample.answer_index) for sample in samples]
    return np.split(values.float().cpu().numpy(), np.cumsum(lengths)[:-1])
