"""What a model is given to write an answer, and how: prompts padded on the left, and transformers' settings.

A prompt is what scoring and training see before the answer's first token (`vig.models.prompts.Encoder`), so a model
is asked as it was tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from vig.models.prompts import TOKEN_LEVEL, Encoded, Encoder, collate_pixels


class Prompt(NamedTuple):
    """What stands before the last answer: T tokens, and the pixel inputs."""

    input_ids: list[int]  # (T,)
    pixels: dict[str, Tensor]


def prompt_before(encoded: Encoded, start: int) -> Prompt:
    """Cuts an encoded sample before its token `start`."""
    pixels = {
        name: value[:, :start] if name in TOKEN_LEVEL else value for name, value in encoded.pixels.items()
    }
    return Prompt(encoded.input_ids[:start], pixels)


def prompt_of(encoded: Encoded) -> Prompt:
    """Cuts an encoded sample before the first token of its last answer."""
    turns = zip(encoded.answer_index, encoded.turn_position, strict=True)
    return prompt_before(encoded, max(index for index, position in turns if position == 0))


def left_padded(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T) int64, what else has a value a token, and the pixel inputs."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        attention_mask[row, start:] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name in TOKEN_LEVEL:
        if any(name in prompt.pixels for prompt in prompts):
            batch[name] = torch.zeros_like(input_ids)
            for row, prompt in enumerate(prompts):
                if name in prompt.pixels:
                    batch[name][row, longest - len(prompt.input_ids) :] = prompt.pixels[name][0]
    pixels = [{k: v for k, v in prompt.pixels.items() if k not in TOKEN_LEVEL} for prompt in prompts]
    return batch | collate_pixels(pixels, [longest] * len(prompts))


def on_device(model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model is; numbers of pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def stop_ids_of(model, encoder: Encoder) -> list[int]:
    """Tokens that end an answer: the checkpoint's own, and those of the template."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or ())
    return sorted({*own, *encoder.stop_ids})


def generation_config(
    new_tokens: int, pad_id: int, stop_ids: Sequence[int], temperature: float = 0.0
) -> GenerationConfig:
    """Every choice is made here: what a checkpoint recommends (sampling, penalties) is not taken over. 0: greedy."""
    warm = temperature > 0
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=warm, temperature=temperature if warm else 1.0,
        top_p=1.0, top_k=0 if warm else 50, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        pad_token_id=pad_id, eos_token_id=list(stop_ids) or None, use_cache=True,
    )  # fmt: skip


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> int | None:
    """Where an answer ends; None where it was still going on."""
    return next((place for place, id in enumerate(ids) if id in stop_ids), None)
