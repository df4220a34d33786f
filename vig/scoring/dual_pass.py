"""The two passes of the model over one batch, and the answer tokens' likelihoods from them.

No (B, T, V) logits exist: at the model's own call of its LM head the hidden states of the answer rows are taken,
and one sweep of the head's weight serves both passes (`vig_kernels.linear_vig`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vig.models import image_features
from vig.models.image_features import ImageFeatures
from vig.models.lm_head import (
    HeadTransform,
    find_head,
    head_input,
    head_replaced,
    head_weights,
    hidden_at_head,
)
from vig.models.loading import LoadedModel
from vig.models.null_pixels import PixelRange, null_pictures
from vig.models.pixels import Sizes
from vig.models.prompts import Encoder
from vig.scoring import packed_attention, prefix_sharing
from vig.scoring.batch import Batch, on_device, pixels_of, tables_of
from vig.scoring.prefix_sharing import SharedRow, View
from vig.scoring.settings import ScoreSettings
from vig.store.token_stats import stat_columns
from vig_kernels import linear_nll, linear_vig

# Whose images a pass sees: the sample's, what is made of their pixels, or other ones in their place.
ImageKind = Literal["image", "null", "other image"]


class TokenNLL(NamedTuple):
    """Of one sample's answer tokens, float32, (n,) each; `null` is None for a text-only sample."""

    image: np.ndarray
    null: np.ndarray | None
    stats: Mapping[str, np.ndarray] = MappingProxyType({})  # by column of `vig.store.token_stats`, (n,) each

    def is_finite(self) -> bool:
        lists = (self.image, *(() if self.null is None else (self.null,)), *self.stats.values())
        return all(bool(np.isfinite(values).all()) for values in lists)


class TwoPasses:
    """Scores batches of encoded samples with a loaded model and one kind of null image.

    settings: `null`, `backend`; `share`: neighbours that share images and prompt prefix are computed in one row
    (`prefix_sharing`), where the model's attention allows it; `batch_tokens`: the longest such row; `stats`: what is
    taken from the same sweep of the head beside the likelihoods.
    """

    def __init__(self, loaded: LoadedModel, encoder: Encoder, settings: ScoreSettings):
        self.loaded, self.encoder = loaded, encoder
        self.null, self.backend, self.longest = (
            settings.null_settings,
            settings.backend,
            settings.batch_tokens,
        )
        self.stat_columns = stat_columns(settings.stats)
        self.model, self.head = loaded.model, find_head(loaded.model)
        self.pixel_range = PixelRange.of(loaded.processor)
        self.transform = HeadTransform()
        self._packs = packed_attention.why_not(loaded.model) is None
        self.share = settings.share and (self._packs or prefix_sharing.why_not(loaded.model) is None)
        self.kernel = packed_attention.kernel_of(loaded.model, settings.attn)
        self._last = last_feed_forward(loaded.model)
        self.features = ImageFeatures(self.model)
        self._keeps_features = image_features.why_not(self.model) is None

    @torch.inference_mode()
    def score(self, views: Sequence[View], nulls: Sequence[View] | None = None) -> list[TokenNLL]:
        """One result a view, in order. Samples of a batch are all multimodal or all text-only.

        nulls: the samples as they are without sight, for nulls that are not made of the clean pixels.
        """
        rows = self.rows(views)
        values = self._score_rows(rows, nulls)
        members = [len(row.members) for row in rows for _ in row.members]
        for place, value in enumerate(values):
            if members[place] > 1 and not value.is_finite():
                # a NaN of one member reaches all others of its row
                alone = slice(place, place + 1)
                values[place] = self.score(views[alone], nulls and nulls[alone])[0]
        return values

    def _score_rows(self, rows: Sequence[SharedRow], nulls: Sequence[View] | None) -> list[TokenNLL]:
        batch = self._build(rows)
        image = self._answer_rows(self._with_images(batch, "image"))
        if not rows[0].first.sample.images:
            names = {one.name: one.of_nll for one in self.stat_columns if one.of_nll}
            nll, stats = with_stats(
                linear_nll, image.hidden, self._weight, image.target, names=names, **self._head_options
            )
            return _token_values(batch, [nll], stats)
        if nulls is None:
            null = self._answer_rows(self._with_images(batch, "null"))
        else:
            null = self._answer_rows(self._with_images(self._build(self.rows(nulls)), "other image"))
        names = {one.name: one.of_vig for one in self.stat_columns}
        pair, stats = with_stats(
            linear_vig,
            image.hidden,
            null.hidden,
            self._weight,
            image.target,
            names=names,
            **self._head_options,
        )
        return _token_values(batch, [pair.nll_image, pair.nll_null], stats)

    def rows(self, views: Sequence[View]) -> list[SharedRow]:
        """The rows that a batch of these views has: one each, or one for neighbours that share a prefix."""
        if not self.share:
            return [SharedRow((view,)) for view in views]
        width = None if self._packs else self.model.config.get_text_config().hidden_size
        return prefix_sharing.rows_of(views, self.encoder.image_token_id, width, self.longest)

    def _build(self, rows: Sequence[SharedRow]) -> Batch:
        """The rows in one sequence where the model allows it, else padded to the longest."""
        kernel = self.kernel if self.share and self._packs else None
        return Batch.build(rows, self.model, self.encoder, kernel)

    def padded(self, views: Sequence[View]) -> Batch:
        """The batch with nothing shared and nothing packed: a row a sample."""
        return Batch.build([SharedRow((view,)) for view in views], self.model, self.encoder)

    def _with_images(self, batch: Batch, kind: ImageKind) -> Batch:
        """The batch with the images of one pass: their pixels, or the features that are computed once for each."""
        if "pixel_values" not in batch.inputs:
            return batch
        if not (self.share and self._keeps_features):
            nulled = self._nulled(batch.inputs, batch.tables, batch.rows) if kind == "null" else batch.inputs
            return replace(batch, inputs=nulled)

        def pixels(places: list[int]) -> dict[str, Tensor]:
            chosen = [batch.rows[place] for place in places]
            found = pixels_of(chosen)
            inputs = on_device(found, self.model.device)
            return self._nulled(inputs, tables_of(found), chosen) if kind == "null" else inputs

        n_tokens = [row.first.input_ids.count(self.encoder.image_token_id) for row in batch.rows]
        outputs = self.features.of([(kind, *row.hashes) for row in batch.rows], n_tokens, pixels)
        rest = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
        return replace(batch, inputs=rest | {"mm_encoder_outputs": outputs})

    def _nulled(
        self, inputs: dict[str, Tensor], tables: dict[str, Tensor], rows: Sequence[SharedRow]
    ) -> dict[str, Tensor]:
        """The inputs with the pixels of the null; tables: `batch.tables_of` them."""
        hashes = [one for row in rows for one in row.hashes]
        nulled = self.null_pixels(inputs | tables, [row.first.sizes for row in rows], hashes)
        return inputs | {"pixel_values": nulled["pixel_values"]}

    @torch.inference_mode()
    def sharing_error(self, rows: Sequence[SharedRow]) -> float:
        """How far these rows move their members' clean NLL, in nats: the most in float32, the mean in 16 bit."""
        apart = self.padded([view for row in rows for view in row.members])
        values = []
        for batch in (apart, self._with_images(self._build(rows), "image")):
            found = self._answer_rows(batch)
            values.append(linear_nll(found.hidden, self._weight, found.target, **self._head_options))
        self.features.clear()
        moved = (values[0] - values[1]).abs()
        moved = moved[moved.isfinite()]  # of others `score` takes care
        if not moved.numel():
            return 0.0
        return float(moved.max() if self.model.dtype == torch.float32 else moved.mean())

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
        return head_weights(self.head)[0]

    @property
    def _head_options(self) -> dict:
        return {
            "bias": head_weights(self.head)[1],
            "logit_scale": self.transform.scale,
            "logit_softcap": self.transform.softcap,
            "backend": self.backend,
        }

    def _answer_rows(self, batch: Batch) -> _AnswerRows:
        """Runs the model and keeps, of its last hidden states (B, T, D), the rows that predict an answer token.

        Behind its attention the last layer is computed on these rows alone.
        """
        rows = batch.answers
        with packed_attention.attention(self.model, batch.layout), on_rows(self._last, rows.index):
            hidden = hidden_at_head(self.model, batch.inputs, rows.index)
        return _AnswerRows(head_input(hidden, self._weight), rows.target)

    @torch.inference_mode()
    def last_layer_error(self, view: View) -> float:
        """How far the last layer on answer rows alone moves their hidden states, as a part of their norm."""
        batch = self.padded([view])
        rows = batch.answers.index
        whole = hidden_at_head(self.model, batch.inputs, rows).float()
        with on_rows(self._last, rows):
            part = hidden_at_head(self.model, batch.inputs, rows).float()
        return float((whole - part).norm() / whole.norm())

    def last_layer_whole(self) -> None:
        """From now on the last layer is computed on all rows."""
        self._last = None


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


def with_stats(op: Callable, *tensors: Tensor, names: Mapping[str, str], **options: Any) -> tuple[Any, dict]:
    """The op's result, and {column: (N,) tensor} of its statistics. names: column -> the op's name for it."""
    if not names:
        return op(*tensors, **options), {}
    found, values = op(*tensors, stats=tuple(names.values()), **options)
    return found, {column: values[name] for column, name in names.items()}


def _token_values(batch: Batch, passes: list[Tensor], stats: dict[str, Tensor]) -> list[TokenNLL]:
    """One value a sample, from (N,) values of the batch's answer tokens: the passes' (the null's may be missing) and
    the statistics', copied to the host together."""
    together = torch.stack([values.float() for values in (*passes, *stats.values())])
    return [
        TokenNLL(
            values[0],
            values[1] if len(passes) == 2 else None,
            dict(zip(stats, values[len(passes) :], strict=True)),
        )
        for values in _per_sample(together, batch)
    ]


def _per_sample(values: Tensor, batch: Batch) -> list[np.ndarray]:
    """Cuts (columns, N) values of a batch, in reading order, into one array a sample: where the batch is waited for."""
    return np.split(values.cpu().numpy(), np.cumsum(batch.answer_lengths)[:-1], axis=1)
