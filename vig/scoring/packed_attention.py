"""The rows of a batch one after another in one sequence: no padding, no mask of the whole, prefixes attended once.

    row 0: a sample alone          row 1: two samples that share a prefix (`vig.scoring.prefix_sharing`)
    a0 a1 a2 a3                    p0 p1 p2   b3 b4   c3 c4 c5
    |---------| causal             |------| causal
                                   |------|+|---|     b sees the prefix and itself
                                   |------|+        |------|  so does c

Every segment of tokens attends to itself causally and, where it is a branch, to all of its prefix before that: causal
attention with fewer queries than keys, aligned at the end, which every fast kernel has. The model runs its own
forward; only the attention function of its text layers is exchanged while it runs. Segments of similar length are
attended together ("sdpa"), or all at once by flash-attention's kernel for segments of any lengths
("flash_attention_2"; on a CPU the tests put a block-diagonal mask in its place; it has never been run on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from vig.models.families import family_of
from vig.models.prompts import TOKEN_LEVEL, Encoder
from vig.scoring.prefix_sharing import SharedRow, token_positions
from vig.scoring.segments import Group, Packed, SegmentLayout

NAME = "vig_packed"  # of the attention function, for transformers
KERNELS = ("sdpa", "flash_attention_2")


def why_not(model: PreTrainedModel) -> str | None:
    """None where the rows of a batch may lie in one sequence; else the reason."""
    family = family_of(model.config)
    if not family.shares_prefix or family.two_way_images:
        return f"attention of {model.config.model_type} is not causal over the images"
    text = model.config.get_text_config()
    if text._attn_implementation not in KERNELS:
        return f"attention implementation {text._attn_implementation} takes no rows of several lengths"
    windowed = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if windowed or getattr(text, "sliding_window", None):
        return "its text layers attend to a window of tokens"
    return None


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
    **options: Any,
) -> tuple[Tensor, None]:
    """(1, L, heads, d), as transformers' attention functions return it."""
    if options.get("softcap") is not None or options.get("sliding_window") is not None:
        raise ValueError("softcap and sliding windows are for unpacked rows. Use --no-share")
    layout = _layout.get()
    one, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))  # (L, heads, d)
    out = torch.empty_like(one, memory_format=torch.contiguous_format)
    attended = _by_group if layout.kernel == "sdpa" else _by_flash
    for part in layout.on(query.device):
        out[part.places] = attended(one, keys, values, part, scaling)
    return out[None], None


def _by_group(query: Tensor, key: Tensor, value: Tensor, group: Group, scaling: float | None) -> Tensor:
    """(tokens of the group, heads, d). Query heads of one key head stand one after another, as one longer query."""
    heads, key_heads = query.shape[1], key.shape[1]
    queries, keys, values = (
        part.index_select(0, places).unflatten(0, (group.n, -1)).transpose(1, 2)
        for part, places in ((query, group.queries), (key, group.keys), (value, group.keys))
    )  # (n, heads, S or P + S, d)
    if group.mask is None:
        grouped = {"is_causal": True, "enable_gqa": heads != key_heads}
        mixed = scaled_dot_product_attention(queries, keys, values, scale=scaling, **grouped)
    else:
        times = heads // key_heads
        stacked = queries.reshape(group.n, key_heads, -1, queries.shape[-1])
        mask = group.mask.repeat(times, 1)
        mixed = scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scaling)
        mixed = mixed.reshape(queries.shape)
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, group.filled)


# --- flash-attention's kernel ---


def flash_kernel() -> Callable[..., Tensor]:
    """flash-attention 2's function for segments of any lengths. Raises ImportError."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise ImportError(
            "flash_attention_2 needs the package flash-attn. Install it: pip install flash-attn"
        ) from None
    return flash_attn_varlen_func


def _by_flash(query: Tensor, key: Tensor, value: Tensor, part: Packed, scaling: float | None) -> Tensor:
    return flash_kernel()(
        query.index_select(0, part.places), key.index_select(0, part.keys), value.index_select(0, part.keys),
        part.query_ends, part.key_ends, *part.longest, softmax_scale=scaling, causal=True,
    )  # fmt: skip


# --- the inputs ---


def packed_inputs(model: PreTrainedModel, encoder: Encoder, rows: Sequence[SharedRow]) -> dict[str, Tensor]:
    """`prefix_sharing.row_inputs` as one sequence: input_ids, labels (1, L), position_ids (1, L) or (3, 1, L),
    pixels."""
    batch = encoder.collate([row.joined() for row in rows], until_last_answer=True)
    kept = batch.pop("attention_mask").bool()
    for name in ("input_ids", "labels", *TOKEN_LEVEL):
        if name in batch:
            batch[name] = batch[name][kept][None]
    batch["position_ids"] = torch.cat(
        [token_positions(model, encoder, row) for row in rows], dim=-1
    ).unsqueeze(-2)
    return {name: value.to(model.device) for name, value in batch.items()}
