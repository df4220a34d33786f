"""One batch as the model reads it, built once and handed on: its rows, their inputs, and where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vig.models.prompts import Encoder, collate_pixels
from vig.scoring import packed_attention, prefix_sharing
from vig.scoring.prefix_sharing import SharedRow
from vig.scoring.segments import SegmentLayout


@dataclass(frozen=True)
class Batch:
    """B padded rows of T tokens, or with a `layout` all rows in one sequence of L."""

    rows: tuple[SharedRow, ...]
    inputs: dict[str, Any]  # on the model's device, pixels still float32, cut behind the last answers
    labels: Tensor  # (B, T), or (1, L) with a layout
    layout: SegmentLayout | None = None

    @classmethod
    def build(
        cls, rows: Sequence[SharedRow], model: PreTrainedModel, encoder: Encoder, kernel: str | None = None
    ) -> Batch:
        """kernel: of the attention over rows in one sequence (`attention_kernels.KERNELS`); None: rows are padded."""
        if kernel is None:
            inputs, layout = prefix_sharing.row_inputs(model, encoder, rows), None
        else:
            inputs, layout = packed_attention.packed_inputs(model, encoder, rows), SegmentLayout(rows, kernel)
        labels = inputs.pop("labels")
        return cls(tuple(rows), inputs, labels, layout)

    @property
    def answer_lengths(self) -> list[int]:
        """Answer tokens of each sample, in reading order."""
        return [len(view.encoded.answer_index) for row in self.rows for view in row.members]


def pixels_of(rows: Sequence[SharedRow], device: torch.device) -> dict[str, Tensor]:
    """The pixel inputs of some rows' images on `device`, float32."""
    firsts = [row.first for row in rows]
    inputs = collate_pixels([first.pixels for first in firsts], [len(first.input_ids) for first in firsts])
    return {name: value.to(device) for name, value in inputs.items()}
