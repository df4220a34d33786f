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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from vig.models.families import family_of
from vig.models.prompts import TOKEN_LEVEL, Encoder
from vig.scoring.prefix_sharing import SharedRow, token_positions

NAME = "vig_packed"  # of the attention function, for transformers
KERNELS = ("sdpa", "flash_attention_2")
KEYS = 8192  # tokens whose keys are gathered at a time, so that repeated prefixes stay within bounds


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


class Segment(NamedTuple):
    """Tokens that attend to themselves causally, and to a prefix. Places in the sequence, and lengths in tokens."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


def segments(rows: Sequence[SharedRow]) -> list[Segment]:
    """Of rows that lie one after another; together they are the sequence, in order."""
    found, start = [], 0
    for row in rows:
        if len(row.members) == 1:
            found.append(Segment(start, row.n_tokens))
        else:
            found.append(Segment(start, row.prefix))
            place = start + row.prefix
            for length in row.lengths:
                found.append(Segment(place, length - row.prefix, start, row.prefix))
                place += found[-1].length
        start += row.n_tokens
    return found


class Group(NamedTuple):
    """n segments with equal prefixes of P tokens and S tokens at most. Those that are shorter repeat their first."""

    queries: Tensor  # (n * S,) places in the sequence
    keys: Tensor  # (n * (P + S),)
    filled: Tensor  # (tokens of all,) which of the n * S are no filling
    places: Tensor  # (tokens of all,) where those stand in the sequence
    n: int
    mask: Tensor | None  # (S, P + S) bool, what is seen; None where P = 0 and causal attention is meant

    def to(self, device: torch.device) -> Group:
        return Group(*(part.to(device) if torch.is_tensor(part) else part for part in self))


def groups(found: Sequence[Segment]) -> list[Group]:
    """Segments of equal prefix length and similar length together; within KEYS tokens of keys, unless alone."""
    order = sorted(found, key=lambda one: (-one.prefix, -one.length, one.start))
    cut: list[list[Segment]] = []
    for one in order:
        if cut:
            first = cut[-1][0]
            similar = first.prefix == one.prefix and first.length <= one.length + one.length // 8 + 8
            if similar and (len(cut[-1]) + 1) * (first.prefix + first.length) <= KEYS:
                cut[-1].append(one)
                continue
        cut.append([one])
    return [_group(members) for members in cut]


def _group(members: Sequence[Segment]) -> Group:
    longest, prefix = members[0].length, members[0].prefix
    step = torch.arange(longest)
    start, length = (torch.tensor([one[field] for one in members])[:, None] for field in (0, 1))
    inside = step < length  # (n, S)
    queries = start + torch.where(inside, step, 0)
    keys, mask = queries, None
    if prefix:
        before = torch.tensor([one.prefix_start for one in members])[:, None] + torch.arange(prefix)
        keys = torch.cat([before, queries], dim=1)
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)
    filled = inside.flatten().nonzero().squeeze(1)
    places = queries.flatten()[filled]
    return Group(queries.flatten(), keys.flatten(), filled, places, len(members), mask)


class SegmentLayout:
    """Where the segments of one batch lie, as the attention function of kernel `kernel` wants to know it."""

    def __init__(self, rows: Sequence[SharedRow], kernel: str = "sdpa"):
        self.segments, self.kernel = segments(rows), kernel
        self._on: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """[Group] for "sdpa", [Packed] for "flash_attention_2", with their tensors on `device`."""
        if device not in self._on:
            made = groups(self.segments) if self.kernel == "sdpa" else packs(self.segments)
            self._on[device] = [part.to(device) for part in made]
        return self._on[device]


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


class Packed(NamedTuple):
    """Segments with or without a prefix, for a kernel that takes any lengths. Never run on a GPU."""

    places: Tensor  # (queries,) in the sequence
    keys: Tensor  # (keys,)
    query_ends: Tensor  # (n + 1,) int32, from 0
    key_ends: Tensor  # (n + 1,) int32, from 0
    longest: tuple[int, int]  # queries and keys of a segment

    def to(self, device: torch.device) -> Packed:
        return Packed(*(part.to(device) if torch.is_tensor(part) else part for part in self))


def packs(found: Sequence[Segment]) -> list[Packed]:
    """All segments, in parts of at most KEYS tokens of keys unless one has more."""
    cut: list[list[Segment]] = []
    held = 0
    for one in found:
        held += one.prefix + one.length
        if not cut or held > KEYS:
            cut.append([])
            held = one.prefix + one.length
        cut[-1].append(one)
    return [_packed(members) for members in cut]


def _packed(members: Sequence[Segment]) -> Packed:
    own = [torch.arange(one.start, one.start + one.length) for one in members]
    before = [torch.arange(one.prefix_start, one.prefix_start + one.prefix) for one in members]
    both = [torch.cat(pair) for pair in zip(before, own, strict=True)]
    ends = [
        torch.tensor([0, *(len(part) for part in parts)]).cumsum(0, dtype=torch.int32)
        for parts in (own, both)
    ]
    longest = (max(map(len, own)), max(map(len, both)))
    return Packed(torch.cat(own), torch.cat(both), *ends, longest)


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
