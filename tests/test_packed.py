"""Rows of a batch in one sequence: the attention of a dense mask, by either kernel, in every family that allows it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import tiny_families
import torch
from naive_families import SAMPLES, scorer
from torch.nn.functional import scaled_dot_product_attention

from vig.models.families import FAMILIES
from vig.scoring import packed_attention, segments
from vig.scoring.loader import load_record
from vig.scoring.segments import Segment, SegmentLayout, groups, packs

# alone, three branches behind a prefix, alone, two branches behind a longer one
FOUND = [
    Segment(0, 5),
    Segment(5, 4), Segment(9, 3, 5, 4), Segment(12, 30, 5, 4), Segment(42, 2, 5, 4),
    Segment(44, 40),
    Segment(84, 7), Segment(91, 1, 84, 7), Segment(92, 6, 84, 7),
]  # fmt: skip
LENGTH = 98


def dense(found: list[Segment], length: int) -> torch.Tensor:
    """(L, L) bool: what each token sees, written down place by place."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for one in found:
        for place in range(one.start, one.start + one.length):
            seen[place, one.start : place + 1] = True
            seen[place, one.prefix_start : one.prefix_start + one.prefix] = True
    return seen


def block_diagonal(query, key, value, query_ends, key_ends, most_queries, most_keys, softmax_scale, causal):
    """What flash-attention's function for segments of any lengths promises, by one block-diagonal SDPA mask.

    query (queries, heads, d), key and value (keys, key heads, d). Causal means aligned at the end of each block.
    """
    assert causal and query_ends.dtype == key_ends.dtype == torch.int32
    mask = torch.zeros(len(query), len(key), dtype=torch.bool)
    bounds = [zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True) for ends in (query_ends, key_ends)]
    longest = [0, 0]
    for (first, last), (top, end) in zip(*bounds, strict=True):
        block = torch.ones(last - first, end - top, dtype=torch.bool)
        mask[first:last, top:end] = block.tril(end - top - (last - first))
        longest = [max(longest[0], last - first), max(longest[1], end - top)]
    assert [most_queries, most_keys] == longest
    heads = [part.transpose(0, 1)[None] for part in (query, key, value)]
    mixed = scaled_dot_product_attention(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


@pytest.fixture
def flash(monkeypatch):
    """A package flash_attn whose kernel is the block-diagonal mask."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=block_diagonal))


def attended(kernel: str, found: list[Segment], *tensors: torch.Tensor, scaling=None) -> torch.Tensor:
    layout = SegmentLayout([], kernel)
    layout.segments = found
    token = packed_attention._layout.set(layout)
    try:
        return packed_attention.attend(None, *tensors, scaling=scaling)[0]
    finally:
        packed_attention._layout.reset(token)


@pytest.mark.parametrize("keys", [segments.KEYS, 50, 1])
@pytest.mark.parametrize("kernel", packed_attention.KERNELS)
def test_attention_of_a_dense_mask(kernel, keys, monkeypatch, flash):
    monkeypatch.setattr(segments, "KEYS", keys)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, LENGTH, 8) for heads in (6, 2, 2))
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=dense(FOUND, LENGTH), scale=0.4, enable_gqa=True
    )
    found = attended(kernel, FOUND, query, key, value, scaling=0.4)
    assert (found - expected.transpose(1, 2)).abs().max() < 1e-6


@pytest.mark.parametrize("keys", [segments.KEYS, 50, 1])
def test_every_token_is_attended_once_and_keys_stay_within_the_bound(keys, monkeypatch):
    monkeypatch.setattr(segments, "KEYS", keys)
    for parts in (groups(FOUND), packs(FOUND)):
        places = torch.cat([part.places for part in parts])
        assert sorted(places.tolist()) == list(range(LENGTH))
    for group in groups(FOUND):
        assert group.n == 1 or len(group.keys) <= keys
    for pack in packs(FOUND):
        assert len(pack.query_ends) == 2 or len(pack.keys) <= keys


def test_a_value_that_is_not_finite_stays_in_its_segment():
    query, key, value = (torch.randn(1, 2, LENGTH, 8) for _ in range(3))
    value[:, :, 92] = float("nan")  # the first token of the last branch
    out = attended("sdpa", FOUND, query, key, value)
    assert out[:, :92].isfinite().all() and out[:, 92:].isnan().all()


@pytest.mark.parametrize(
    "family", [name for name, row in FAMILIES.items() if row.shares_prefix and not row.two_way_images]
)
def test_a_packed_batch_equals_its_samples_alone(family, flash):
    """Shared rows, samples alone and several images in one sequence; both kernels."""
    one = scorer(family)
    items = [load_record(sample, one.encoder, "pixels") for sample in SAMPLES if sample.images]
    items.sort(key=lambda item: item.hashes)
    views = [item.view for item in items]
    rows = one.passes.rows(views)
    assert sum(len(row.members) > 1 for row in rows) == 2 and sum(len(row.members) == 1 for row in rows) > 2
    alone = scorer(family, share=False).passes
    expected = [alone.score([view])[0] for view in views]
    for kernel in packed_attention.KERNELS:
        one.passes.kernel = kernel
        found = one.passes.score(views)
        for value, other in zip(found, expected, strict=True):
            assert abs(value.image - other.image).max() < 2e-4 and abs(value.null - other.null).max() < 2e-4


def test_the_model_attends_by_itself_again_afterwards():
    model = tiny_families.model("llava")
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        packed_attention.attention(model, SegmentLayout([])),
    ):
        assert model.config.text_config._attn_implementation == packed_attention.NAME
        raise RuntimeError("on purpose")
    assert model.config.text_config._attn_implementation == "sdpa"


def test_which_models_are_not_packed():
    assert packed_attention.why_not(tiny_families.model("qwen3_vl")) is None
    for family, words in (
        ("gemma3", "not causal over the images"),
        ("paligemma", "not causal over the images"),
    ):
        assert words in packed_attention.why_not(tiny_families.model(family))
    config = {"text": SimpleNamespace(_attn_implementation="sdpa", sliding_window=64)}
    model = SimpleNamespace(
        config=SimpleNamespace(model_type="llava", get_text_config=lambda: config["text"])
    )
    assert "a window of tokens" in packed_attention.why_not(model)
    config["text"] = SimpleNamespace(_attn_implementation="eager", sliding_window=None)
    assert "eager" in packed_attention.why_not(model)


def test_without_the_package_the_cure_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        packed_attention.flash_kernel()


def test_packing_that_moves_values_is_switched_off_and_said(tmp_path, monkeypatch):
    """Every branch sees the one before it: found by the self-check, on the first samples."""
    own = segments.segments

    def leaking(rows):
        found = own(rows)
        return [one._replace(prefix_start=one.start - one.prefix) if one.prefix else one for one in found]

    monkeypatch.setattr(segments, "segments", leaking)
    one, chosen = scorer("llava"), [sample for sample in SAMPLES if sample.images]
    with pytest.warns(UserWarning, match=r"moves values by \S+ nats, so it is off"):
        rows = one.score(chosen)
    assert not one.passes.share
    expected = scorer("llava", share=False).score(chosen)
    assert max(abs(row.vig - other.vig) for row, other in zip(rows, expected, strict=True)) < 2e-4
