"""Rows of a batch in one sequence: the attention of a dense mask, by every kernel, in every family that allows it."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import tiny_families
import torch
from naive_families import SAMPLES, WITH_IMAGES, scorer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlavaForConditionalGeneration

from vig.models.families import FAMILIES
from vig.scoring import attention_kernels, packed_attention, segments
from vig.scoring.attention_kernels import AUTO, KERNELS, Attention
from vig.scoring.loader import load_record
from vig.scoring.scorer import Scorer
from vig.scoring.segments import Segment, SegmentLayout, groups, packs

# alone, three branches behind a prefix, alone, two branches behind a longer one
FOUND = [
    Segment(0, 5),
    Segment(5, 4), Segment(9, 3, 5, 4), Segment(12, 30, 5, 4), Segment(42, 2, 5, 4),
    Segment(44, 40),
    Segment(84, 7), Segment(91, 1, 84, 7), Segment(92, 6, 84, 7),
]  # fmt: skip
LENGTH = 98


def dense(found: list[Segment], length: int, window: int | None = None) -> torch.Tensor:
    """(L, L) bool: what each token sees, written down place by place."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for one in found:
        before = list(range(one.prefix_start, one.prefix_start + one.prefix))
        for place in range(one.start, one.start + one.length):
            keys = [*before, *range(one.start, place + 1)]
            seen[place, keys[-window:] if window else keys] = True
    return seen


def block_diagonal(query, key, value, query_ends, key_ends, most_queries, most_keys, scale, window_size):
    """What both functions for segments of any lengths promise, by one block-diagonal SDPA mask.

    query (queries, heads, d), key and value (keys, key heads, d). Causal means aligned at the end of each block.
    """
    left, right = window_size
    assert right == 0 and query_ends.dtype == key_ends.dtype == torch.int32
    mask = torch.zeros(len(query), len(key), dtype=torch.bool)
    bounds = [zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True) for ends in (query_ends, key_ends)]
    longest = [0, 0]
    for (first, last), (top, end) in zip(*bounds, strict=True):
        more = end - top - (last - first)
        block = torch.ones(last - first, end - top, dtype=torch.bool).tril(more)
        mask[first:last, top:end] = block if left < 0 else block.triu(more - left)
        longest = [max(longest[0], last - first), max(longest[1], end - top)]
    assert [most_queries, most_keys] == longest
    heads = [part.transpose(0, 1)[None] for part in (query, key, value)]
    mixed = scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def flash_attn_varlen_func(*tensors, softmax_scale, causal, window_size):
    assert causal
    return block_diagonal(*tensors, softmax_scale, window_size)


class Varlen:
    """torch's varlen_attn: its arguments as torch 2.13 or 2.11 takes them, its calls counted."""

    def __init__(self):
        self.calls = 0

    def of_2_13(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert num_splits == 1 and enable_gqa == (query.shape[1] != key.shape[1])
        return self.of_2_11(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
        )

    def of_2_11(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1),
    ):  # fmt: skip
        self.calls += 1
        return block_diagonal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def replace_varlen(monkeypatch, function) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=function))


@pytest.fixture
def varlen(monkeypatch) -> Varlen:
    """The functions for segments of any lengths are the block-diagonal mask: torch's, and that of flash_attn."""
    stand_in = Varlen()
    replace_varlen(monkeypatch, stand_in.of_2_13)
    flash = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    return stand_in


def attended(kernel: str, found: list[Segment], *tensors: torch.Tensor, **options) -> torch.Tensor:
    layout = SegmentLayout([], kernel)
    layout.segments = found
    token = packed_attention._layout.set(layout)
    try:
        return packed_attention.attend(None, *tensors, **options)[0]
    finally:
        packed_attention._layout.reset(token)


def bound(monkeypatch, keys: int, key_heads: int = 2, dim: int = 8) -> None:
    """At most so many keys of float32 are gathered for one call."""
    monkeypatch.setattr(segments, "KEYS", keys)
    monkeypatch.setattr(attention_kernels, "GATHERED_BYTES", keys * 2 * key_heads * dim * 4)


@pytest.mark.parametrize("window", [None, 1, 5, 20, 44, 1000])
@pytest.mark.parametrize("keys", [8192, 50, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_of_a_dense_mask(kernel, keys, window, monkeypatch, varlen):
    bound(monkeypatch, keys)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, LENGTH, 8) for heads in (6, 2, 2))
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=dense(FOUND, LENGTH, window), scale=0.4, enable_gqa=True
    )
    found = attended(kernel, FOUND, query, key, value, scaling=0.4, sliding_window=window)
    assert (found - expected.transpose(1, 2)).abs().max() < 1e-6


def test_varlen_attn_as_torch_2_11_takes_it(varlen, monkeypatch):
    replace_varlen(monkeypatch, varlen.of_2_11)
    query, key, value = (torch.randn(1, heads, LENGTH, 8) for heads in (6, 2, 2))
    expected = attended("sdpa", FOUND, query, key, value)
    assert (attended("varlen_attn", FOUND, query, key, value) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("keys", [8192, 50, 1])
def test_every_token_is_attended_once_and_keys_stay_within_the_bound(keys, monkeypatch):
    bound(monkeypatch, keys)
    places = torch.cat([part.places for part in groups(FOUND)])
    assert sorted(places.tolist()) == list(range(LENGTH))
    for group in groups(FOUND):
        assert group.n == 1 or len(group.keys) <= keys
    parts = packs(FOUND, keys)
    assert [place for part in parts for place in range(LENGTH)[part.queries]] == list(range(LENGTH))
    for part in parts:
        assert len(part.query_ends) == 2 or part.key_ends[-1] <= keys
        assert part.keys is None or len(part.keys) == part.key_ends[-1]


def test_samples_alone_are_attended_where_they_lie():
    """No key is copied, and no value."""
    alone = [Segment(0, 5), Segment(5, 90), Segment(95, 3)]
    (part,) = packs(alone, 8192)
    assert part.keys is None and part.queries == slice(0, 98) and part.longest == (90, 90)
    assert part.query_ends.tolist() == part.key_ends.tolist() == [0, 5, 95, 98]


def test_a_value_that_is_not_finite_stays_in_its_segment():
    query, key, value = (torch.randn(1, 2, LENGTH, 8) for _ in range(3))
    value[:, :, 92] = float("nan")  # the first token of the last branch
    out = attended("sdpa", FOUND, query, key, value)
    assert out[:, :92].isfinite().all() and out[:, 92:].isnan().all()


@pytest.mark.parametrize(
    "family", [name for name, row in FAMILIES.items() if row.shares_prefix and not row.two_way_images]
)
def test_a_packed_batch_equals_its_samples_alone(family, varlen):
    """Shared rows, samples alone and several images in one sequence; every kernel."""
    one = scorer(family)
    items = [load_record(sample, one.encoder, "pixels") for sample in SAMPLES if sample.images]
    items.sort(key=lambda item: item.hashes)
    views = [item.view for item in items]
    rows = one.passes.rows(views)
    assert sum(len(row.members) > 1 for row in rows) == 2 and sum(len(row.members) == 1 for row in rows) > 2
    alone = scorer(family, share=False).passes
    expected = [alone.score([view])[0] for view in views]
    for kernel in KERNELS:
        one.passes.kernel, varlen.calls = kernel, 0
        found = one.passes.score(views)
        layers = 2 * one.loaded.model.config.get_text_config().num_hidden_layers  # of both passes
        assert varlen.calls == (layers if kernel == "varlen_attn" else 0)
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
    text = {"_attn_implementation": "sdpa", "sliding_window": 64}
    decoder = torch.nn.Module()
    decoder._supports_flash_attn = True  # transformers hands the window to its attention function
    model = SimpleNamespace(
        config=SimpleNamespace(model_type="llava", get_text_config=lambda: SimpleNamespace(**text)),
        get_decoder=lambda: decoder,
    )
    assert packed_attention.why_not(model) is None
    decoder._supports_flash_attn = False
    assert "a window of tokens" in packed_attention.why_not(model)
    text |= {"sliding_window": None, "attn_logit_softcapping": 50.0}
    assert "cap the scores" in packed_attention.why_not(model)
    text["attn_logit_softcapping"] = None
    assert packed_attention.why_not(model) is None
    decoder.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "sinks" in packed_attention.why_not(model)
    text["_attn_implementation"] = "eager"
    assert "eager" in packed_attention.why_not(model)


@pytest.mark.parametrize("option", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}])
def test_attention_of_another_kind_is_refused(option):
    tensors = [torch.randn(1, 2, LENGTH, 8) for _ in range(3)]
    assert attended("sdpa", FOUND, *tensors, dropout=0.0, softcap=None, s_aux=None).isfinite().all()
    with pytest.raises(ValueError, match=f"without {next(iter(option))}. Use --no-share"):
        attended("sdpa", FOUND, *tensors, **option)


@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_windows_of_the_text_model_are_kept(text_type, varlen):
    """Samples far longer than the window, against each alone under transformers' own mask."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_families.model("llava").config)
    options = tiny_families.TEXT | {"vocab_size": config.text_config.vocab_size, "sliding_window": 7}
    if text_type == "qwen2":
        options |= {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    config.text_config = AutoConfig.for_model(text_type, **options)
    model = LlavaForConditionalGeneration(config).eval()
    one, alone = (
        Scorer(model, tiny_families.processor("llava"), device="cpu", share=share) for share in (True, False)
    )
    assert packed_attention.why_not(model) is None
    views = [load_record(sample, one.encoder, "pixels").view for sample in WITH_IMAGES]
    expected = [alone.passes.score([view])[0] for view in views]
    for kernel in KERNELS:
        one.passes.kernel = kernel
        for value, other in zip(one.passes.score(views), expected, strict=True):
            assert abs(value.image - other.image).max() < 2e-4 and abs(value.null - other.null).max() < 2e-4
    model.config.text_config.sliding_window = 1000
    assert (
        abs(alone.passes.score(views[:1])[0].image - expected[0].image).max() > 1e-3
    )  # the window does matter


def test_which_kernel_is_taken(monkeypatch):
    """Asked for by name: that one. Else the first that can, on a GPU of compute capability 9.0 or another."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.version, "hip", None)
    replace_varlen(monkeypatch, Varlen().of_2_13)
    monkeypatch.setitem(sys.modules, "flash_attn", None)

    def taken(dtype=torch.bfloat16, dim=128, value_dim=None, key_heads=4, device="cuda", asked=AUTO) -> str:
        sizes = ((8, dim), (key_heads, dim), (key_heads, value_dim or dim))
        with FakeTensorMode():
            tensors = [torch.empty(10, *size, dtype=dtype, device=device) for size in sizes]
        return attention_kernels.chosen(asked, Attention(*tensors))

    assert (
        taken()
        == taken(torch.float16)
        == taken(dim=256)
        == taken(dim=72)
        == taken(key_heads=8)
        == "varlen_attn"
    )
    for other in (
        {"dtype": torch.float32}, {"dim": 264}, {"dim": 100}, {"value_dim": 64}, {"key_heads": 3}, {"device": "cpu"},
    ):  # fmt: skip
        assert taken(**other) == "sdpa", other
    assert taken(asked="sdpa") == "sdpa" and taken(asked="flash_attention_2") == "flash_attention_2"
    capability[0] = (7, 5)
    assert taken() == "sdpa"
    capability[0] = (9, 0)

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    for function in (None, of_2_10):
        if function is None:
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
        else:
            replace_varlen(monkeypatch, function)
        with pytest.raises(ImportError, match=r"has no .*Use torch 2\.11 or newer"):
            attention_kernels.varlen_kernel()
        assert taken() == "sdpa"
    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    )
    assert taken() == "flash_attention_2" and taken(torch.float32) == "sdpa"
    replace_varlen(monkeypatch, Varlen().of_2_13)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert taken() == "flash_attention_2"


def test_an_attention_implementation_that_is_asked_for_is_taken():
    model = tiny_families.model("llava")
    assert packed_attention.kernel_of(model, None) == AUTO
    assert packed_attention.kernel_of(model, "sdpa") == "sdpa"
    assert scorer("llava").passes.kernel == AUTO and scorer("llava", attn="sdpa").passes.kernel == "sdpa"


def test_the_installed_torch_takes_the_call():
    """torch's own varlen_attn on tensors without values: one op, bfloat16, grouped heads, a window."""
    pytest.importorskip("torch.nn.attention.varlen")
    if attention_kernels._not_importable(attention_kernels.varlen_kernel):
        pytest.skip("this torch's varlen_attn knows no windows")
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.inference_mode(), Ops():
        query, key, value = (
            torch.empty(1, heads, LENGTH, 64, dtype=torch.bfloat16, device="meta") for heads in (6, 2, 2)
        )
        out = attended("varlen_attn", FOUND, query, key, value, scaling=0.1, sliding_window=9)
    assert out.shape == (1, LENGTH, 6, 64) and out.dtype == torch.bfloat16
    assert [name for name in called if "attn" in name] == ["torch_attn._varlen_attn.default"]


def test_without_the_package_the_cure_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        attention_kernels.flash_kernel()


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
