"""Samples that share their images and the prompt up to them lie in one row: the prefix is computed once for all.

    input_ids   p0 p1 p2 p3   a4 a5 a6   b4 b5        images are in p; a and b: what follows in two samples
    branch       0  0  0  0    1  1  1    2  2
    position     0  1  2  3    4  5  6    4  5        as if each sample stood alone

A token attends to earlier tokens of branch 0 and of its own branch. So every sample sees exactly what it sees alone,
in one forward pass of the model, and no keys and values are stored or repeated. Where attention over the prefix is
not causal for all of it (PaliGemma), what stands in the prefix depends on what follows, and nothing is shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vig.models.families import family_of
from vig.models.prompts import TOKEN_LEVEL, Encoded, Encoder
from vig.models.transfer import to_device

MASKED_ATTENTION = ("sdpa", "eager")  # attention implementations that take a mask of their own


def why_not(model: PreTrainedModel) -> str | None:
    """None where samples may share a row; else the reason."""
    if not family_of(model.config).shares_prefix:
        return f"attention of {model.config.model_type} is not causal over the images and the question"
    text = model.config.get_text_config()
    if text._attn_implementation not in MASKED_ATTENTION:
        return f"attention implementation {text._attn_implementation} takes no mask. Use --attn sdpa"
    return None


class View(NamedTuple):
    """One sample as one pass sees it: its tokens and pixels, and the content hash of each of its images.

    The hashes tell which images are equal, and seed the noise null. A text-only sample has none.
    """

    encoded: Encoded
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class SharedRow:
    """Views in one row: their first `prefix` tokens and their images are the same. A lone one has prefix 0."""

    members: tuple[View, ...]
    prefix: int = 0

    @property
    def first(self) -> Encoded:
        return self.members[0].encoded

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of the images that all members have."""
        return self.members[0].hashes

    @property
    def lengths(self) -> list[int]:
        """Tokens of each member alone, as far as they are fed."""
        return [member.encoded.n_fed for member in self.members]

    @property
    def n_tokens(self) -> int:
        return self.prefix + sum(length - self.prefix for length in self.lengths)

    def joined(self) -> Encoded:
        """The row as one sample: the prefix, then what follows it in each member, as far as it is fed."""
        first = self.first
        if len(self.members) == 1:
            return first
        input_ids, answer_index = list(first.input_ids[: self.prefix]), []
        members = [member.encoded for member in self.members]
        for member in members:
            shift = len(input_ids) - self.prefix
            answer_index += [index + shift for index in member.answer_index]
            input_ids += member.input_ids[self.prefix : member.n_fed]
        pixels = {
            name: torch.cat(self._pieces([member.pixels[name] for member in members]), dim=-1)
            if name in TOKEN_LEVEL
            else value
            for name, value in first.pixels.items()
        }
        return replace(first, input_ids=input_ids, answer_index=answer_index, pixels=pixels)

    def _pieces(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Token-level values (..., T) of each member, cut like the row's tokens."""
        cut = [value[..., self.prefix : end] for value, end in zip(values, self.lengths, strict=True)]
        return [values[0][..., : self.prefix], *cut]

    def branches(self) -> Tensor:
        """(L,) int64: 0 on the prefix, i on the tokens of member i, counted from 1."""
        lengths = [self.prefix, *(length - self.prefix for length in self.lengths)]
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def positions(self, whole: Sequence[Tensor]) -> Tensor:
        """(..., L) positions of the row's tokens from those of each member alone, (..., T) each."""
        return torch.cat(self._pieces(whole), dim=-1)


def prefix_length(sample: Encoded, image_token_id: int) -> int:
    """Tokens up to and with the last image token, if the first answer is predicted behind them; else 0."""
    if not sample.sample.images:
        return 0
    first_answer = sample.answer_index[0]
    if image_token_id in sample.input_ids[first_answer - 1 :]:
        return 0
    return first_answer - 1 - sample.input_ids[first_answer - 2 :: -1].index(image_token_id)


def shared_by(view: View, image_token_id: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What views of one row have in common: content hashes of their images, and the token ids of their prefix."""
    return view.hashes, tuple(view.encoded.input_ids[: prefix_length(view.encoded, image_token_id)])


def rows_of(views: Sequence[View], image_token_id: int, width: int | None, longest: int) -> list[SharedRow]:
    """Puts neighbours that share images and prefix into one row. The order of the views stays.

    longest: tokens of a row. width: the model's hidden size where branches lie in each other's way (a mask of the
    whole row); None where they do not (`vig.scoring.packed_attention`).
    A function of the order alone: a row taken for itself gives that row again.
    """
    rows: list[SharedRow] = []
    last_key = None
    for view in views:
        key = shared_by(view, image_token_id)
        prefix = len(key[1])
        if rows and prefix and key == last_key:
            row = SharedRow((*rows[-1].members, view), prefix)
            most = longest if width is None else min(longest, prefix + _most_branch_tokens(prefix, width))
            if row.n_tokens <= most:
                rows[-1] = row
                continue
        rows.append(SharedRow((view,)))
        last_key = key
    return rows


def _most_branch_tokens(prefix: int, width: int) -> int:
    """From how many tokens S on a second row, with the prefix P computed again, costs less than a longer one.

    Two rows save attention of branches to branches, 4 * width * S^2 / 2 FLOP a layer, and cost about
    24 * width^2 * P for the prefix once more; attention runs at about half the speed of the products. Below 512
    tokens attention is never what counts.
    """
    return max(512, math.isqrt(6 * prefix * width))


def row_inputs(model: PreTrainedModel, encoder: Encoder, rows: Sequence[SharedRow]) -> dict[str, Tensor]:
    """`Encoder.collate` of rows, cut behind their last answers, on the CPU.

    Where a row holds several samples: position_ids (B, L), or (3, B, L) for Qwen, and on the model's device
    attention_mask (B, 1, L, L), added to the scores of attention, one for each type of layer if there are several.
    """
    batch = encoder.collate([row.joined() for row in rows], until_last_answer=True)
    if any(len(row.members) > 1 for row in rows):
        length = batch["input_ids"].shape[1]
        branch = torch.stack([_filled(_branches(row), length, -1) for row in rows])
        positions = [_filled(token_positions(model, encoder, row), length, 0) for row in rows]
        batch["position_ids"] = torch.stack(positions, dim=-2)
        of_mask = (branch, batch["position_ids"], batch["input_ids"])
        batch["attention_mask"] = _masks(model, *(to_device(part, model.device) for part in of_mask))
        batch.pop("token_type_ids", None)  # they only tell Gemma3 how to make the mask
    return batch


def _branches(row: SharedRow) -> Tensor:
    """Of a lone sample too: one branch."""
    return row.branches() if len(row.members) > 1 else torch.zeros(row.n_tokens, dtype=torch.int64)


def _filled(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]), value=fill)


def token_positions(model: PreTrainedModel, encoder: Encoder, row: SharedRow) -> Tensor:
    """(L,), or (3, L) where the model has an index of three axes, which needs the samples whole."""
    if hasattr(model.model, "get_rope_index"):
        batch = encoder.collate([member.encoded for member in row.members], until_last_answer=True)
        batch = {name: value for name, value in batch.items() if name not in ("labels", "pixel_values")}
        index, _ = model.model.get_rope_index(**batch)  # (3, n, T)
        whole = [index[:, place, :end] for place, end in enumerate(row.lengths)]
    else:
        whole = [torch.arange(end) for end in row.lengths]
    return row.positions(whole) if len(row.members) > 1 else whole[0]


def _masks(
    model: PreTrainedModel,
    branch: Tensor,  # (B, L), -1 on padding
    positions: Tensor,  # (B, L) or (3, B, L)
    input_ids: Tensor,  # (B, L)
) -> Tensor | dict[str, Tensor]:
    """(B, 1, L, L): 0 where a token (row) attends to another (column), the least number elsewhere."""
    config = model.config.get_text_config()
    order = torch.arange(branch.shape[1], device=branch.device)
    earlier = order[None, :, None] >= order[None, None, :]
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen = earlier & same
    near = None
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        distance = positions[..., :, None] - positions[..., None, :]
        near = seen & (distance < config.sliding_window)
    if family_of(model.config).two_way_images:
        together = _same_image(input_ids == model.config.image_token_id)
        seen, near = seen | together, None if near is None else near | together
    if near is None:
        return _added(seen, model.dtype)
    return {"full_attention": _added(seen, model.dtype), "sliding_attention": _added(near, model.dtype)}


def _same_image(is_image: Tensor) -> Tensor:  # (B, L) bool
    """(B, L, L): both tokens stand in the same unbroken run of image tokens."""
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    run = torch.where(is_image, starts.cumsum(dim=1), 0)
    return (run[:, :, None] == run[:, None, :]) & is_image[:, :, None]


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:  # (B, L, L) bool
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
