"""One batch as the model reads it, built once and handed on: its rows, their inputs, and where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vig.models.lm_head import ShiftedRows, shifted_rows
from vig.models.pixels import TABLES
from vig.models.prompts import Encoder, collate_pixels
from vig.models.transfer import to_device
from vig.scoring import packed_attention, prefix_sharing
from vig.scoring.prefix_sharing import SharedRow
from vig.scoring.segments import SegmentLayout


@dataclass(frozen=True)
class Batch:
    """B padded rows of T tokens, or with a `layout` all rows in one sequence of L."""

    rows: tuple[SharedRow, ...]
    inputs: dict[str, Any]  # on the model's device, pixels still float32, cut behind the last answers
    tables: dict[str, Tensor]  # of them, what tells where pictures lie in the pixels, on the CPU
    answers: ShiftedRows  # of the flat hidden states, on the model's device
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
        answers = shifted_rows(inputs.pop("labels"), sum(_answer_lengths(rows)))
        answers = ShiftedRows(*(to_device(part, model.device) for part in answers))
        return cls(tuple(rows), on_device(inputs, model.device), tables_of(inputs), answers, layout)

    @property
    def answer_lengths(self) -> list[int]:
        """Answer tokens of each sample, in reading order."""
        return _answer_lengths(self.rows)


def _answer_lengths(rows: Sequence[SharedRow]) -> list[int]:
    return [len(view.encoded.answer_index) for row in rows for view in row.members]


def pixels_of(rows: Sequence[SharedRow]) -> dict[str, Tensor]:
    """The pixel inputs of some rows' images on the CPU, float32."""
    firsts = [row.first for row in rows]
    return collate_pixels([first.pixels for first in firsts], [len(first.input_ids) for first in firsts])


def on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Those on the CPU copied to `device`; masks of attention are made there."""
    return {
        name: to_device(value, device) if torch.is_tensor(value) else value for name, value in inputs.items()
    }


def tables_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a `PixelLayout` reads beside the pixels: read on the CPU, so that nobody waits for the device."""
    return {name: inputs[name] for name in TABLES if name in inputs}
