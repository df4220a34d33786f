"""The language model of a LLaVA on stored features of its vision tower.

The tower is frozen in training, as `vig train` has it, so that its features of a picture need to be computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


class Item(NamedTuple):
    """One sample, encoded: T tokens, n of them in the answer; the P patches of its picture, D wide."""

    ids: Tensor  # (T,) int64
    answer: Tensor  # (n,) int64, positions of the answer's tokens
    features: Tensor | None  # (P, D) float32; None: text only

    @property
    def answer_ids(self) -> np.ndarray:
        """(n,) int64."""
        return self.ids[self.answer].numpy()


class Batch(NamedTuple):
    """B samples, right-padded to T tokens; M of them have a picture."""

    ids: Tensor  # (B, T) int64
    target: Tensor  # (B, T - 1) int64: the token that place t is asked for; IGNORE where none is
    features: Tensor | None  # (M, P, D)


def load(base: Path):
    """The checkpoint as a LlavaForConditionalGeneration in float32, in evaluation mode."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(base, dtype="float32").eval()


@torch.no_grad()
def tower_features(model, pixel_values: Tensor, at_once: int = 128) -> list[Tensor]:
    """(P, D) of each picture (N, 3, H, W), in storage of its own."""
    if (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) != (-1, "default"):
        raise ValueError("features are stored for the last layer, without the class token, alone")
    parts = [
        model.model.vision_tower(part, output_hidden_states=True).hidden_states[-1][:, 1:]
        for part in pixel_values.split(at_once)
    ]
    return [row.clone() for part in parts for row in part]


def collate(items: Sequence[Item], masks: Sequence[Tensor] | None = None) -> Batch:
    """masks: (n,) bool of each item, which of its answer tokens are asked for; all unless given."""
    length = max(len(item.ids) for item in items)
    ids = torch.zeros((len(items), length), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = item.ids
        asked = item.answer if masks is None else item.answer[masks[row]]
        labels[row, asked] = item.ids[asked]
    features = [item.features for item in items if item.features is not None]
    return Batch(ids, labels[:, 1:], torch.stack(features) if features else None)


def hidden_states(model, ids: Tensor, features: Tensor | None, **options) -> Tensor:
    """(B, T, hidden) before the LM head. The model is causal, so that padding on the right changes nothing.

    options: of the language model, such as past_key_values.
    """
    embeddings = model.get_input_embeddings()(ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features)
        places = (ids == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, projected.reshape(-1, projected.shape[-1]))
    options = {"use_cache": False} | options
    return model.model.language_model(inputs_embeds=embeddings, **options).last_hidden_state


def asked_rows(model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (N, hidden) of the places that are asked for, and their targets (N,)."""
    asked = batch.target != IGNORE
    hidden = hidden_states(model, batch.ids, batch.features)[:, :-1]
    return hidden[asked], batch.target[asked]
