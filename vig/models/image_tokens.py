"""How image placeholders stand in the token ids, where a family does it in a way of its own."""

from __future__ import annotations

import re
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaProcessor

# PaliGemma's checkpoints carry no chat template. Its format: images, <bos>, the question, a newline, the answer,
# <eos>; further turns follow in the same way, without images.
PREFIX_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}<image>"
    "{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ part['text'] + '\n' }}{% endif %}{% endfor %}{% endfor %}"
)


def image_token_id(processor: Any) -> int:
    """The id that stands for image features in input_ids; -1 for a processor that takes no images."""
    ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return -1 if ids[0] is None else ids[0]


def placeholders(processor: Any) -> list[str]:
    """The texts that stand for pixels, before the processor expands them and after. No message may hold one."""
    tokens = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    id = image_token_id(processor)
    if id >= 0:
        tokens.append(processor.tokenizer.convert_ids_to_tokens(id))
    return [token for token in dict.fromkeys(tokens) if token]


# --- PaliGemma: attention is bidirectional over image and question, causal over the answer ---


def has_bidirectional_prefix(processor: Any) -> bool:
    return isinstance(processor, PaliGemmaProcessor)


def prefix_inputs(processor: PaliGemmaProcessor, text: str, images: list[Image.Image]) -> dict[str, Any]:
    """What the processor would return for a whole conversation.

    Called itself, it writes <bos> and a newline into the text, wants the answer apart, and refuses text alone.
    """
    token, expanded = processor.image_token, processor.image_token * processor.image_seq_length
    starts = [match.start() for match in re.finditer(re.escape(token), text)]
    if len(starts) != len(images):
        raise ValueError(f"{len(images)} images for {len(starts)} image tokens")
    gain = len(expanded) - len(token)
    replaced = [
        {
            "span": (start, start + len(token)),
            "new_span": (start + number * gain, start + number * gain + len(expanded)),
        }
        for number, start in enumerate(starts)
    ]
    outputs = dict(
        processor.tokenizer(
            [text.replace(token, expanded)],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
    )
    outputs["text_replacement_offsets"] = [replaced]
    if images:
        outputs |= processor.image_processor(images, return_tensors="pt")
    return outputs


def prefix_marks(n_tokens: int, first_answer: int) -> dict[str, Tensor]:
    """token_type_ids (1, T): 0 on the bidirectional prefix, 1 from the first answer on, where no token sees later ones.

    Without them an earlier answer token sees the later ones.
    """
    return {"token_type_ids": (torch.arange(n_tokens) >= first_answer).long()[None]}
