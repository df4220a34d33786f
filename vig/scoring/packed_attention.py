"""The rows of a batch one after another in one sequence: no padding, no mask of the whole, prefixes attended once.

    row 0: a sample alone          row 1: two samples that share a prefix (`vig.scoring.prefix_sharing`)
    a0 a1 a2 a3                    p0 p1 p2   b3 b4   c3 c4 c5
    |---------| causal             |------| causal
                                   |------|+|---|     b sees the prefix and itself
                                   |------|+        |------|  so does c

Every segment of tokens attends to itself causally and, where it is a branch, to all of its prefix before that: causal
attention with fewer queries than keys, aligned at the end, which every fast kernel has. The model runs its own
forward; only the attention function of its text layers is exchanged while it runs. By which kernel, says the table of
`vig.scoring.attention_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from vig.models.families import family_of
from vig.models.prompts import TOKEN_LEVEL, Encoder
from vig.scoring.attention_kernels import AUTO, KERNELS, Attention, chosen
from vig.scoring.prefix_sharing import SharedRow, token_positions
from vig.scoring.segments import SegmentLayout

NAME = "vig_packed"  # of the attention function, for transformers
OTHER_ATTENTION = ("softcap", "s_aux", "dropout")  # of transformers' functions: caps, sinks, dropout


def why_not(model: PreTrainedModel) -> str | None:
    """None where the rows of a batch may lie in one sequence; else the reason."""
    family = family_of(model.config)
    if not family.shares_prefix or family.two_way_images:
        return f"attention of {model.config.model_type} is not causal over the images"
    text = model.config.get_text_config()
    if text._attn_implementation not in KERNELS:
        return f"attention implementation {text._attn_implementation} takes no rows of several lengths"
    decoder = model.get_decoder()
    windowed = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if (windowed or getattr(text, "sliding_window", None)) and not decoder._supports_flash_attn:
        return "its text layers attend to a window of tokens that stands in their mask alone"
    if getattr(text, "attn_logit_softcapping", None):
        return "its text layers cap the scores of their attention"
    if any(hasattr(part, "sinks") for part in decoder.modules()):
        return "its text layers attend to sinks"
    return None


def kernel_of(model: PreTrainedModel, attn: str | None) -> str:
    """The kernel that its packed rows attend by: "auto" unless an attention implementation was asked for."""
    found = model.config.get_text_config()._attn_implementation
    return AUTO if attn is None and found == "sdpa" else found


# --- the attention of the text layers ---

_layout: ContextVar[SegmentLayout] = ContextVar("vig_packed_layout")


@contextmanager
def attention(model: PreTrainedModel, layout: SegmentLayout | None) -> Iterator[None]:
    """While it lasts, the text layers attend as `layout` says; without one, as they do by themselves."""
    if layout is None:
        yield
        return
    AttentionInterface.register(NAME, attend)
    every = [model.config.get_text_config(), *(getattr(part, "config", None) for part in text_parts(model))]
    configs = {id(config): config for config in every if config is not None}.values()
    before = [config._attn_implementation for config in configs]
    token = _layout.set(layout)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _layout.reset(token)


def text_parts(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    return model.get_decoder().modules()


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, L, d)
    key: Tensor,  # (1, key heads, L, d)
    value: Tensor,  # (1, key heads, L, d)
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(1, L, heads, d), as transformers' attention functions return it. Raises ValueError for other attention."""
    other = [name for name in OTHER_ATTENTION if torch.is_tensor(options.get(name)) or options.get(name)]
    if other:
        raise ValueError(f"packed rows attend without {' and '.join(other)}. Use --no-share")
    layout = _layout.get()
    heads = (part[0].transpose(0, 1) for part in (query, key, value))
    attention = Attention(*heads, scaling, sliding_window)
    form = tuple((part.device, part.dtype, part.shape) for part in attention[:3])
    name = layout.once(form, lambda: chosen(layout.kernel, attention))
    kernel = KERNELS[name]
    parts = layout.once(
        (name, form, sliding_window),
        lambda: [part.to(query.device) for part in kernel.parts(layout.segments, attention)],
    )
    return kernel.attended(attention, parts)[None], None


# --- the inputs ---


def packed_inputs(model: PreTrainedModel, encoder: Encoder, rows: Sequence[SharedRow]) -> dict[str, Tensor]:
    """`prefix_sharing.row_inputs` as one sequence: input_ids, labels (1, L), position_ids (1, L) or (3, 1, L),
    pixels, all on the CPU."""
    batch = encoder.collate([row.joined() for row in rows], until_last_answer=True)
    del batch["attention_mask"]
    for name in ("input_ids", "labels", *TOKEN_LEVEL):
        if name in batch:
            parts = [value[: row.n_tokens] for value, row in zip(batch[name], rows, strict=True)]
            batch[name] = torch.cat(parts)[None]
    batch["position_ids"] = torch.cat(
        [token_positions(model, encoder, row) for row in rows], dim=-1
    ).unsqueeze(-2)
    return batch
