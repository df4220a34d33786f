"""The kernels that packed rows attend by, one row of `KERNELS` each; "auto" takes the first that can.

torch's and flash-attention's kernels for segments of any lengths do a layer in one call. On a CPU the tests put a
block-diagonal mask in their places; neither has been run on a GPU by this code. SDPA takes segments of one length, so
it is called for each group of similar ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vig.scoring.segments import Group, Packed, Segment, groups, packs

AUTO = "auto"
GATHERED_BYTES = 1 << 30  # of keys and values that one call of a kernel for any lengths is given
LARGEST_HEAD = 256


class Attention(NamedTuple):
    """What one layer asks for the one sequence of a batch."""

    query: Tensor  # (L, heads, d)
    key: Tensor  # (L, key heads, d)
    value: Tensor  # (L, key heads, d)
    scaling: float | None = None  # of the scores; None: 1 / sqrt(d)
    window: int | None = None  # keys that a token sees, itself included; None: all before it


class AttentionKernel(NamedTuple):
    """One way to attend."""

    # what `attended` wants to know of the segments
    parts: Callable[[Sequence[Segment], Attention], list[Any]]
    attended: Callable[[Attention, list[Any]], Tensor]  # (L, heads, d) from `parts` on the device
    why_not: Callable[[Attention], str | None]  # None where it can do what is asked, else the reason
    takes: str  # for docs/throughput.md
    calls: str  # of one layer, likewise


def chosen(asked: str, attention: Attention) -> str:
    """The name of the kernel: the one asked for, or for "auto" the first that can do it."""
    if asked != AUTO:
        return asked
    return next(name for name, kernel in KERNELS.items() if kernel.why_not(attention) is None)


# --- SDPA ---


def _groups(found: Sequence[Segment], attention: Attention) -> list[Group]:
    return groups(found, attention.window)


def _by_groups(attention: Attention, parts: list[Group]) -> Tensor:
    out = torch.empty_like(attention.query, memory_format=torch.contiguous_format)
    for group in parts:
        out[group.places] = _by_group(attention, group)
    return out


def _by_group(attention: Attention, group: Group) -> Tensor:
    """(tokens of the group, heads, d). Query heads of one key head stand one after another, as one longer query."""
    query, key, value, scaling, _ = attention
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


# --- kernels for segments of any lengths ---


def _packs(found: Sequence[Segment], attention: Attention) -> list[Packed]:
    _, key_heads, dim = attention.key.shape
    return packs(found, GATHERED_BYTES // (2 * key_heads * dim * attention.key.element_size()))


def _by_packs(call: Callable[[Attention, Packed], Tensor]) -> Callable[[Attention, list[Packed]], Tensor]:
    def attended(attention: Attention, parts: list[Packed]) -> Tensor:
        found = [call(_gathered(attention, part), part) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    return attended


def _gathered(attention: Attention, part: Packed) -> Attention:
    """The queries of a part, and the keys and values that they see: views where no prefix is repeated."""
    query, key, value = attention.query[part.queries], attention.key, attention.value
    key, value = (
        one[part.queries] if part.keys is None else one.index_select(0, part.keys) for one in (key, value)
    )
    return attention._replace(query=query, key=key, value=value)


def _left(attention: Attention, part: Packed) -> int:
    """Keys before a token's own that it sees, as both kernels count them: -1 for all."""
    return -1 if attention.window is None or attention.window >= part.longest[1] else attention.window - 1


def _why_not_flash(attention: Attention) -> str | None:
    """What torch's and the package's build of flash-attention have in common."""
    query, key, value, _, _ = attention
    if query.device.type != "cuda":
        return f"it runs on GPUs, not on {query.device.type}"
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16}:
        return f"it takes bfloat16 or float16, not {', '.join(sorted(map(str, dtypes)))}"
    dim = query.shape[-1]
    if dim % 8 or dim > LARGEST_HEAD or value.shape[-1] != dim:
        return f"it takes heads of 8 to {LARGEST_HEAD} in steps of 8, not {dim} and {value.shape[-1]}"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} heads cannot share {key.shape[1]} key heads"
    if not torch.version.hip and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def varlen_kernel() -> Callable[..., Tensor]:
    """torch's function for segments of any lengths. Raises ImportError where this torch's knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise ImportError(f"torch {torch.__version__} has no varlen_attn. Use torch 2.11 or newer") from None
    missing = {"scale", "window_size"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        missing = ", ".join(sorted(missing))
        raise ImportError(
            f"varlen_attn of torch {torch.__version__} has no {missing}. Use torch 2.11 or newer"
        )
    return varlen_attn


def _why_not_varlen(attention: Attention) -> str | None:
    if torch.version.hip:
        return "where causal attention is aligned is not known of its ROCm build"
    return _why_not_flash(attention) or _not_importable(varlen_kernel)


def _by_varlen(attention: Attention, part: Packed) -> Tensor:
    """One split: the bits of a segment do not depend on the others."""
    function = varlen_kernel()
    takes = inspect.signature(function).parameters
    options = {
        "enable_gqa": attention.query.shape[1] != attention.key.shape[1],  # torch 2.11 takes it unsaid
        "num_splits": 1,  # torch 2.11 does not split here
    }
    return function(
        attention.query, attention.key, attention.value, part.query_ends, part.key_ends, *part.longest,
        scale=attention.scaling, window_size=(_left(attention, part), 0),
        **{name: value for name, value in options.items() if name in takes},
    )  # fmt: skip


def flash_kernel() -> Callable[..., Tensor]:
    """flash-attention 2's function for segments of any lengths. Raises ImportError."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise ImportError(
            "flash_attention_2 needs the package flash-attn. Install it: pip install flash-attn"
        ) from None
    return flash_attn_varlen_func


def _by_flash(attention: Attention, part: Packed) -> Tensor:
    return flash_kernel()(
        attention.query, attention.key, attention.value, part.query_ends, part.key_ends, *part.longest,
        softmax_scale=attention.scaling, causal=True, window_size=(_left(attention, part), 0),
    )  # fmt: skip


def _not_importable(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except ImportError as error:
        return str(error)
    return None


KERNELS = {
    "varlen_attn": AttentionKernel(
        _packs, _by_packs(_by_varlen), _why_not_varlen,
        f"16 bits on NVIDIA GPUs of compute capability 8.0 or higher, heads up to {LARGEST_HEAD} in steps of 8, "
        "torch 2.11 or newer",
        "one",
    ),
    "flash_attention_2": AttentionKernel(
        _packs, _by_packs(_by_flash), lambda attention: _why_not_flash(attention) or _not_importable(flash_kernel),
        "the same, and AMD's GPUs, where the package flash-attn is installed", "one",
    ),
    "sdpa": AttentionKernel(
        _groups, _by_groups, lambda attention: None, "everything else", "one for each group of similar segments",
    ),
}  # fmt: skip
