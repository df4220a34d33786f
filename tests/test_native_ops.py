"""The native kernels on every instruction set of this machine: fuzzed against float64, and equal bit by bit."""

import copy as copy_module
import math
import os
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vig_kernels
from vig_kernels import reference
from vig_kernels.kernels.cpu import gaussian_blur as gaussian_blur_cpu
from vig_kernels.kernels.cpu import linear_cross_entropy as linear_cross_entropy_cpu
from vig_kernels.kernels.cpu import linear_nll as linear_nll_cpu
from vig_kernels.kernels.cpu import linear_vig as linear_vig_cpu
from vig_kernels.kernels.cpu import native
from vig_kernels.problem import Gaussian, HeadProblem, Needs, Saved, Upstream

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.why_not()))
ISAS = [name for name, reason in native.isas().items() if reason is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuzz = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("VIG_FORCE_ISA", request.param)
    assert native.isa() == request.param
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def heads(draw):
    """(hidden, weight, target, bias, scale, cap) of any shape, stride, dtype and size of logits."""
    rows, depth, vocab = (draw(st.integers(1, most)) for most in (60, 700, 300))
    dtype = draw(st.sampled_from(DTYPES))
    gap = draw(st.sampled_from([0, 1, 5]))
    amount = draw(st.sampled_from([0.1, 1.0, 30.0, 3000.0]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = (torch.randn(rows, depth + gap, generator=random) * amount).to(dtype)[:, :depth]
    weight = (torch.randn(vocab, depth + gap, generator=random) * depth**-0.5).to(dtype)[:, :depth]
    target = torch.randint(0, vocab, (rows,), generator=random)
    target[torch.rand(rows, generator=random) < draw(st.sampled_from([0.0, 0.5]))] = -100
    bias = torch.randn(vocab, generator=random).to(dtype) if draw(st.booleans()) else None
    return (
        hidden,
        weight,
        target,
        bias,
        draw(st.sampled_from([1.0, 0.3])),
        draw(st.sampled_from([None, 20.0])),
    )


def bound(hidden, weight, bias, scale):
    """(N,) the promised error of a per-token value: 1e-5 + 1e-6 A."""
    size = hidden.double().abs() @ weight.double().abs().T * scale
    return 1e-5 + 1e-6 * (size if bias is None else size + bias.double().abs()).amax(1)


def test_values_against_float64(isa):
    @fuzz
    @given(heads())
    def run(head):
        hidden, weight, target, bias, scale, cap = head
        stats = ("lse", "entropy", "argmax")
        nll, found = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, bias, scale, cap), stats)
        exact_nll, exact = reference.linear_nll(
            hidden, weight, target, bias=bias, logit_scale=scale, logit_softcap=cap, stats=stats
        )
        allowed = bound(hidden, weight, bias, scale)
        for mine, truth in ((nll, exact_nll), *((found[name], exact[name]) for name in ("lse", "entropy"))):
            assert ((mine.double() - truth).abs() <= allowed).all()
        logits = reference.linear_logits(hidden, weight, bias, scale, cap)
        kept = target != -100
        chosen = logits[kept].gather(1, found["argmax"][kept, None])[:, 0]
        assert (logits[kept].amax(1) - chosen <= 2 * allowed[kept]).all()
        assert (found["argmax"][~kept] == -1).all() and not nll[~kept].any()

    run()


def test_divergences_against_float64(isa):
    """Within 1e-5 + 2e-6 (A_image + A_null), and nll_image as it is without."""

    @fuzz
    @given(heads(), st.sampled_from([0.0, 0.01, 2.0]))
    def run(head, change):
        hidden, weight, target, bias, scale, cap = head
        problem = HeadProblem(hidden, weight, target, bias, scale, cap)
        null = hidden + change * hidden.flip(0)
        _, image, _, found = linear_vig_cpu.with_stats(problem, null, ("kl",))
        assert torch.equal(image, linear_nll_cpu.forward(problem, ())[0])
        options = {"bias": bias, "logit_scale": scale, "logit_softcap": cap}
        _, exact = reference.linear_vig(hidden, null, weight, target, stats=("kl",), **options)
        both = bound(hidden, weight, bias, scale) + bound(null, weight, bias, scale)
        assert ((found["kl"].double() - exact["kl"]).abs() <= 2 * both - 3e-5).all()

    run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_other_rows(isa, dtype, threads):
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(61, 130, generator=random).to(dtype)
    weight = torch.randn(1111, 130, generator=random).to(dtype)
    target = torch.randint(0, 1111, (61,), generator=random)
    target[::7] = -100
    rest = (None, 1.0, None, -100)
    row_weight = torch.rand(61, generator=random)

    def everything():
        nll, stats = linear_nll_cpu.forward(
            HeadProblem(hidden, weight, target, *rest), ("lse", "entropy", "argmax")
        )
        _, *pair, between = linear_vig_cpu.with_stats(
            HeadProblem(hidden, weight, target, *rest), hidden.flip(0), ("kl", "entropy_null")
        )
        formed = linear_cross_entropy_cpu.forward_backward(
            HeadProblem(hidden, weight, target), row_weight, 0.1, Needs(True, True, False)
        )
        again = linear_nll_cpu.backward(
            Upstream(row_weight, None, row_weight),
            Saved(stats["lse"], stats["entropy"]),
            HeadProblem(hidden, weight, target, *rest),
            Needs(),
        )
        return [nll, *stats.values(), *pair, *between.values(), *formed[:3], *again[:2]]

    threads(1)
    alone = everything()
    nll = alone[0]
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))
    assert torch.equal(alone[4], nll)  # linear_vig has the bits of linear_nll
    for rows in (slice(0, 1), slice(3, 20), slice(5, None, 3)):
        subset, _ = linear_nll_cpu.forward(
            HeadProblem(hidden[rows], weight, target[rows].contiguous(), *rest), ()
        )
        assert torch.equal(subset, nll[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_chunk(dtype, monkeypatch):
    """Rows beyond the first chunk have the bits they have alone, and D beyond a panel's words is blocked."""
    monkeypatch.delenv("VIG_FORCE_ISA", raising=False)
    random = torch.Generator().manual_seed(6)
    hidden = torch.randn(4200, 6, generator=random).to(dtype)
    weight = torch.randn(40, 6, generator=random).to(dtype)
    target = torch.randint(0, 40, (4200,), generator=random)
    nll, _ = linear_nll_cpu.forward(HeadProblem(hidden, weight, target), ())
    tail, _ = linear_nll_cpu.forward(HeadProblem(hidden[4190:], weight, target[4190:]), ())
    assert torch.equal(nll[4190:], tail)
    deep, wide = (
        torch.randn(14, 9001, generator=random).to(dtype),
        torch.randn(33, 9001, generator=random).to(dtype),
    )
    nll, _ = linear_nll_cpu.forward(HeadProblem(deep, wide, target[:14] % 33, None, 0.01), ())
    exact = reference.linear_nll(deep, wide, target[:14] % 33, logit_scale=0.01)
    assert ((nll - exact).abs() <= bound(deep, wide, None, 0.01)).all()


# Rows are many from six tiles on: of 4 to 12 rows, with AMX of 48. D = 2113: a group has more panels than fit together.
@pytest.mark.parametrize(
    ("rows", "depth", "vocab"), [(85, 16, 9001), (85, 137, 9001), (85, 4100, 300), (300, 2113, 1000)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleaved_packing_changes_no_bits(isa, dtype, rows, depth, vocab):
    """Few rows and many are packed for in two ways; weight rows with gaps, D of broken lines, a broken last panel."""
    random = torch.Generator().manual_seed(depth)
    hidden = torch.randn(rows, depth, generator=random).to(dtype)
    weight = (torch.randn(vocab, depth + 3, generator=random) * depth**-0.5).to(dtype)[:, :depth]
    target = torch.randint(0, vocab, (rows,), generator=random)
    bias = torch.randn(vocab, generator=random).to(dtype)
    rest = (bias, 0.5, None, -100)
    stats = ("lse", "entropy", "argmax")
    nll, found = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, *rest), stats)
    few, few_found = linear_nll_cpu.forward(HeadProblem(hidden[40:50], weight, target[40:50], *rest), stats)
    assert torch.equal(nll[40:50], few)
    assert all(torch.equal(found[name][40:50], few_found[name]) for name in stats)
    exact = reference.linear_nll(hidden, weight, target, bias=bias, logit_scale=0.5)
    assert ((nll - exact).abs() <= bound(hidden, weight, bias, 0.5)).all()
    ones, zeros = torch.ones(rows), torch.zeros(rows)
    head, needs = HeadProblem(hidden, weight, target, *rest), Needs(True, False, False)
    upstream, saved = Upstream(ones, None, zeros), Saved(found["lse"], found["entropy"])
    grads = linear_nll_cpu.backward(upstream, saved, head, needs)
    some = slice(40, 50)
    few_upstream, few_saved = Upstream(ones[some], None, zeros[some]), Saved(*(x[some] for x in saved))
    few_grads = linear_nll_cpu.backward(few_upstream, few_saved, head.take(some), needs)
    close = torch.testing.assert_close
    close(grads[0][40:50].float(), few_grads[0].float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_more_panels_than_are_packed_together(isa, dtype):
    random = torch.Generator().manual_seed(9)
    hidden, weight = (
        torch.randn(3, 700, generator=random).to(dtype),
        torch.randn(9001, 700, generator=random).to(dtype),
    )
    target, stats = torch.tensor([0, 8999, 4321]), ("lse", "entropy", "argmax")
    nll, found = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, None, 0.1), stats)
    exact_nll, exact = reference.linear_nll(hidden, weight, target, logit_scale=0.1, stats=stats)
    allowed = bound(hidden, weight, None, 0.1)
    assert ((nll - exact_nll).abs() <= allowed).all()
    assert all(((found[name] - exact[name]).abs() <= allowed).all() for name in ("lse", "entropy"))
    assert torch.equal(found["argmax"], exact["argmax"])


def test_gradients_against_float64(isa):
    """Formed in the forward and formed anew, for loss weights, z-loss and every upstream."""
    slack = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

    def compare(found, leaves, dtype):
        for mine, leaf in zip(found, leaves, strict=True):
            error = (mine.to(dtype).double() - leaf.grad).norm()
            assert error <= slack[dtype] * leaf.grad.norm() + 1e-6, (error, leaf.grad.norm())

    @fuzz
    @given(heads())
    def run(head):
        hidden, weight, target, bias, scale, cap = head
        hidden = (
            hidden / hidden.abs().amax().clamp_min(1) * 4
        )  # peaked rows have gradients of rounding errors only
        dtype, needs = hidden.dtype, (True, True, bias is not None)
        leaves = [x.double().requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]))]
        options = {
            "logit_scale": scale,
            "logit_softcap": cap,
            "bias": leaves[2] if bias is not None else None,
        }
        row_weight = torch.rand(len(target), generator=torch.Generator().manual_seed(1))
        loss = reference.linear_cross_entropy(
            *leaves[:2], target, token_weight=row_weight, reduction="sum", z_loss=0.01, **options
        )
        loss.backward()
        found_loss, *found = linear_cross_entropy_cpu.forward_backward(
            HeadProblem(hidden, weight, target, bias, scale, cap), row_weight, 0.01, Needs(*needs)
        )
        assert abs(found_loss - loss) <= 1e-5 + 1e-5 * abs(loss)
        compare(found[: len(leaves)], leaves, dtype)
        for leaf in leaves:
            leaf.grad = None
        upstream = torch.randn(3, len(target), generator=torch.Generator().manual_seed(2))
        stats = ("lse", "entropy")
        exact, values = reference.linear_nll(*leaves[:2], target, stats=stats, **options)
        (torch.stack([exact, *values.values()]) * upstream).sum().backward()
        _, saved = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, bias, scale, cap), stats)
        again = linear_nll_cpu.backward(
            Upstream(*upstream),
            Saved(*saved.values()),
            HeadProblem(hidden, weight, target, bias, scale, cap),
            Needs(*needs),
        )
        compare(again[: len(leaves)], leaves, dtype)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_more_rows_and_words_than_a_chunk(dtype):
    """So many logits that both paths cut rows, and the recomputing one V too: the sums are those of the parts."""
    random = torch.Generator().manual_seed(8)
    hidden, weight = (torch.randn(n, 33, generator=random).div(3).to(dtype) for n in (2300, 20011))
    target = torch.randint(0, 20011, (2300,), generator=random)
    ones = torch.ones(2300)

    def formed(rows):
        return linear_cross_entropy_cpu.forward_backward(
            HeadProblem(hidden[rows], weight, target[rows]), None, 0.0, Needs(True, True, False)
        )

    whole, parts = formed(slice(None)), [formed(slice(0, 1000)), formed(slice(1000, None))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(whole[1], torch.cat([parts[0][1], parts[1][1]]), rtol=1e-4, atol=1e-4)
    rounding = 1e-4 if dtype == torch.float32 else 1e-2  # gradients are stored in the inputs' dtype
    assert whole[2].dtype == dtype
    first, second = parts[0][2].float(), parts[1][2].float()
    stored = 1e-4 if dtype == torch.float32 else 2**-7  # the parts and their sum are rounded
    allowed = stored * (first.abs() + second.abs()) + 1e-4
    assert ((whole[2].float() - first - second).abs() <= allowed).all()
    many = HeadProblem(hidden.repeat(2, 1), weight, target.repeat(2))
    _, stats = linear_nll_cpu.forward(many, ("lse",))
    again = linear_nll_cpu.backward(
        Upstream(ones.repeat(2)), Saved(stats["lse"]), many, Needs(True, True, False)
    )
    torch.testing.assert_close(again[0][:2300].float(), whole[1].float(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(again[0][2300:], again[0][:2300], rtol=rounding, atol=rounding)
    error = (again[1].float() - 2 * whole[2].float()).norm()
    assert error <= rounding * whole[2].float().norm()


def test_every_chunk_takes_its_own_weights_upstreams_and_bias():
    """More rows and words than a chunk, of which so few count that float64 is cheap."""
    random = torch.Generator().manual_seed(10)
    hidden, weight = (torch.randn(n, 9, generator=random) for n in (2300, 20011))
    bias = torch.randn(20011, generator=random)
    target = torch.randint(0, 20011, (2300,), generator=random)
    target[::11] = -100
    some = torch.arange(5, 2300, 57)
    factors = torch.zeros(4, 2300)
    factors[:, some] = torch.rand(4, len(some), generator=random) + 0.5
    options = (1.0, None, -100)
    leaves = [x.double().requires_grad_() for x in (hidden[some], weight, bias)]
    nll, values = reference.linear_nll(*leaves[:2], target[some], bias=leaves[2], stats=("lse", "entropy"))
    values = (nll, values["lse"], values["entropy"], nll + 0.01 * values["lse"].square())
    losses = [(value * factor[some]).sum() for value, factor in zip(values, factors, strict=True)]

    def compare(found, loss):
        rows, *exact = torch.autograd.grad(loss, leaves, retain_graph=True)
        exact.insert(0, torch.zeros(hidden.shape).double().index_copy(0, some, rows))
        for mine, truth in zip(found, exact, strict=True):
            assert (mine.double() - truth).norm() <= 2e-5 * truth.norm()

    loss, *formed = linear_cross_entropy_cpu.forward_backward(
        HeadProblem(hidden, weight, target, bias, *options), factors[3], 0.01, Needs()
    )
    assert abs(loss - losses[3]) <= 1e-5 * losses[3]
    compare(formed, losses[3])
    _, saved = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, bias, *options), ("lse", "entropy"))
    again = linear_nll_cpu.backward(
        Upstream(*factors[:3]),
        Saved(*saved.values()),
        HeadProblem(hidden, weight, target, bias, *options),
        Needs(),
    )
    compare(again, sum(losses[:3]))


def test_bias_gradients_of_many_rows(isa):
    """Sums over thousands of rows, most of which cancel, at most twice as far off as eager PyTorch's."""
    random = torch.Generator().manual_seed(14)
    hidden = torch.randn(6000, 16, generator=random) * 0.02
    weight, bias = torch.randn(64, 16, generator=random), torch.randn(64, generator=random)
    target = torch.randint(0, 64, (6000,), generator=random)

    def eager(dtype):
        leaf = bias.to(dtype).requires_grad_()
        logits = hidden.to(dtype) @ weight.to(dtype).T + leaf
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target, reduction="sum"), leaf)[
            0
        ]

    options, needs = (1.0, None, -100), (False, False, True)
    ones, exact = torch.ones(6000), eager(torch.float64)
    *_, formed = linear_cross_entropy_cpu.forward_backward(
        HeadProblem(hidden, weight, target, bias, *options), ones, 0.0, Needs(*needs)
    )
    _, stats = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, bias, *options), ("lse",))
    *_, again = linear_nll_cpu.backward(
        Upstream(ones),
        Saved(stats["lse"]),
        HeadProblem(hidden, weight, target, bias, *options),
        Needs(*needs),
    )
    allowed = 2 * (eager(torch.float32) - exact).norm()
    assert all((found - exact).norm() <= allowed for found in (formed, again))


def test_what_bfloat16_loses_of_a_gradient_at_its_target_comes_back(isa):
    """Rows and words that are nearly one: sums over them cancel, the roundings of single logit gradients do not."""
    random = torch.Generator().manual_seed(13)
    hidden, weight = (
        (1 + torch.randint(0, 16, (n, 32), generator=random) / 128).bfloat16() for n in (60, 40)
    )
    target = torch.arange(60) // 2 % 12 * 16 % 40  # the first words of panels, and others
    sign = torch.tensor([1.0, -1.0]).repeat(30)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad((reference.linear_nll(*leaves, target) * sign).sum(), leaves)
    options, needs = (1.0, None, -100), (True, True, False)
    _, stats = linear_nll_cpu.forward(HeadProblem(hidden, weight, target, None, *options), ("lse",))
    again = linear_nll_cpu.backward(
        Upstream(sign),
        Saved(stats["lse"]),
        HeadProblem(hidden, weight, target, None, *options),
        Needs(*needs),
    )
    formed = linear_cross_entropy_cpu.forward_backward(
        HeadProblem(hidden, weight, target, None, *options), sign, 0.0, Needs(*needs)
    )
    for found in (again[:2], formed[1:3]):
        for mine, truth in zip(found, exact, strict=True):
            assert (mine.double() - truth).norm() <= 1e-2 * truth.norm()  # 3e-2 and more without


def test_what_is_not_needed_is_none(isa):
    hidden, weight, target = torch.randn(40, 20), torch.randn(50, 20), torch.arange(40)
    full = linear_cross_entropy_cpu.forward_backward(
        HeadProblem(hidden, weight, target), None, 0.0, Needs(True, True, False)
    )
    for needs in ((True, False, False), (False, True, False), (False, False, False)):
        some = linear_cross_entropy_cpu.forward_backward(
            HeadProblem(hidden, weight, target), None, 0.0, Needs(*needs)
        )
        assert torch.equal(some[0], full[0])
        for wanted, mine, all_of_it in zip(needs, some[1:], full[1:], strict=True):
            assert torch.equal(mine, all_of_it) if wanted else mine is None


def test_blur_against_float64(isa):
    sizes = st.integers(1, 70)
    sigmas = st.sampled_from([0.2, 1.0, 3.7, 40.0])
    layouts = st.sampled_from(["dense", "channels-last", "cropped", "transposed"])
    kinds = st.sampled_from([torch.uint8, *DTYPES])

    @fuzz
    @given(sizes, sizes, sigmas, sigmas, layouts, kinds, st.sampled_from(["reflect", "replicate"]))
    def run(height, width, down, across, layout, dtype, border):
        random = torch.Generator().manual_seed(height * 71 + width)
        images = torch.rand(2, 3, height + 2, width + 2, generator=random).mul(
            255 if dtype == torch.uint8 else 1
        )
        images = images.to(dtype)
        if layout == "channels-last":
            images = images.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            images = images.mT.contiguous().mT
        images = images[..., 1:-1, 1:-1] if layout == "cropped" else images
        sigma_y, sigma_x = torch.tensor([down, 1.5]).double(), torch.tensor([across, 2.5]).double()
        out = torch.empty_like(images.mT.contiguous().mT if layout == "cropped" else images)
        found = gaussian_blur_cpu.forward(images, Gaussian(sigma_y, sigma_x, 3.0, border, "float32"), out)
        assert found is out
        for i in range(2):
            sigma = (sigma_y[i].item(), sigma_x[i].item())
            exact = reference.gaussian_blur(images[i], sigma, border=border)
            error = (found[i].double() - exact.double()).abs().max()
            rounding = {torch.uint8: 1, torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
            assert error <= 2e-6 + rounding[dtype]
            if dtype == torch.uint8:
                assert (found[i] != exact).double().mean() < 0.01

    run()


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_16_bits_round_half_to_even(isa, dtype, step):
    sigma = (2 * math.log(2)) ** -0.5  # taps of 1/4, 1/2, 1/4: the mean of two values that take turns
    for width in (3, 40):
        for low, rounded in ((0, 0), (1, 2)):
            images = (1 + step * (low + torch.arange(width) % 2)).to(dtype).expand(2, -1)
            found = vig_kernels.gaussian_blur(images, (0.0, sigma), truncate=1.0, backend="cpu")
            assert torch.equal(found, torch.full_like(found, 1 + step * rounded)), (width, low)


def test_blur_in_place_and_on_threads(isa, threads):
    images = torch.rand(3, 2, 50, 40)
    sigma = torch.full((3,), 4.0, dtype=torch.float64)
    threads(1)
    once = gaussian_blur_cpu.forward(images, Gaussian(sigma, sigma), torch.empty_like(images))
    threads(5)
    assert gaussian_blur_cpu.forward(images, Gaussian(sigma, sigma), images) is images
    assert torch.equal(once, images)


def test_blur_of_more_planes_than_are_held_together(isa):
    """Those beyond 8 MiB come in later batches, each with the sigma of its image."""
    images = torch.rand(5, 1, 720, 720, generator=torch.Generator().manual_seed(11))
    sigma_y, sigma_x = (
        torch.tensor(s).double() for s in ([1.0, 2.0, 0.5, 3.0, 1.5], [2.0, 1.0, 3.0, 0.5, 2.5])
    )

    def blur(part):
        out = torch.empty_like(images[part])
        return gaussian_blur_cpu.forward(images[part], Gaussian(sigma_y[part], sigma_x[part]), out)

    assert torch.equal(blur(slice(None)), torch.cat([blur(slice(i, i + 1)) for i in range(5)]))


def far_apart(near):
    """A copy whose last row begins beyond 2^31 elements; memory is taken only where it is written."""
    rows, width = near.shape
    stride = 2**31 // (rows - 1) + 16
    far = torch.empty(stride * (rows - 1) + width, dtype=near.dtype)
    return far.as_strided((rows, width), (stride, 1)).copy_(near)


def test_offsets_beyond_two_to_the_31st():
    random = torch.Generator().manual_seed(12)
    near = [torch.randn(n, 40, generator=random).bfloat16() for n in (40, 70)]
    target, ones = torch.arange(40), torch.ones(40)
    far = [far_apart(x) for x in near]
    found = []
    for hidden, weight in (near, (far[0], near[1]), (near[0], far[1])):
        head = HeadProblem(hidden, weight, target)
        nll, stats = linear_nll_cpu.forward(head, ("lse",))
        again = linear_nll_cpu.backward(Upstream(ones), Saved(stats["lse"]), head, Needs(True, True, False))
        formed = linear_cross_entropy_cpu.forward_backward(head, None, 0.0, Needs(True, True, False))
        found.append([nll, *again[:2], *formed[:3]])
    for some in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(some, found[0], strict=True))
    images, sigma = torch.rand(2, 1, 8, 8, generator=random), torch.ones(2).double()
    apart = far_apart(images.reshape(2, 64).bfloat16()).unflatten(1, (1, 8, 8))
    blurred = [
        gaussian_blur_cpu.forward(x, Gaussian(sigma, sigma), out)
        for x, out in ((apart, torch.empty(2, 1, 8, 8).bfloat16()), (images.bfloat16(), apart))
    ]
    assert torch.equal(*blurred)
    picture = torch.rand(1, 1, 8, 32, generator=random)
    rows = far_apart(picture[0, 0])[None, None]  # read where they stand
    straight, out = (torch.empty_like(picture) for _ in range(2))
    gaussian_blur_cpu.forward(picture, Gaussian(sigma[:1], sigma[:1]), straight)
    gaussian_blur_cpu.forward(rows, Gaussian(sigma[:1], sigma[:1]), out)
    assert torch.equal(out, straight)


def test_a_forced_instruction_set_that_is_missing_raises(monkeypatch):
    for name, reason in native.isas().items():
        if reason is not None:
            monkeypatch.setenv("VIG_FORCE_ISA", name)
            with pytest.raises(ValueError, match=name):
                native.isa()
    monkeypatch.setenv("VIG_FORCE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"sse9.*portable"):
        linear_nll_cpu.forward(
            HeadProblem(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long)), ()
        )


def test_a_forked_child_has_threads_of_its_own(threads):
    threads(2)
    hidden, weight, target = torch.randn(20, 8), torch.randn(600, 8), torch.arange(20)
    expected, _ = linear_nll_cpu.forward(HeadProblem(hidden, weight, target), ())
    child = os.fork()
    if child == 0:
        found, _ = linear_nll_cpu.forward(HeadProblem(hidden, weight, target), ())
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_peak_is_a_rate():
    assert native.peak_f32(1, 0.01) > 1e9
    assert native.peak_bf16(1, 0.01) > 1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_earlier_call_leaves_no_trace(isa, dtype):
    """Buffers are used again: what a call full of NaN left in them must not show."""
    random = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 150, generator=random).to(dtype) for n in (301, 1003))
    target = torch.randint(0, 1003, (301,), generator=random)
    target[::7] = -100

    def run(hidden):
        options = (None, 1.0, None, -100)
        nll, stats = linear_nll_cpu.forward(
            HeadProblem(hidden, weight, target, *options), ("lse", "entropy", "argmax")
        )
        formed = linear_cross_entropy_cpu.forward_backward(
            HeadProblem(hidden, weight, target), None, 0.0, Needs(True, True, False)
        )
        again = linear_nll_cpu.backward(
            Upstream(nll, nll, nll),
            Saved(stats["lse"], stats["entropy"]),
            HeadProblem(hidden, weight, target, *options),
            Needs(True, True, False),
        )
        return [nll, *stats.values(), *formed[:3], *again[:2]]

    before = run(hidden)
    run(torch.full_like(hidden, float("nan")))
    for mine, truth in zip(run(hidden), before, strict=True):
        assert torch.equal(mine, truth)


def test_large_gradients_reuse_the_memory_of_freed_ones_only(monkeypatch):
    monkeypatch.setattr(native, "KEPT_OUTPUT_BYTES", 0)
    hidden = torch.randn(5, 300).requires_grad_()
    weight = torch.randn(256, 300).requires_grad_()
    target = torch.randint(0, 256, (5,))

    def gradient(scale=1.0):
        loss = vig_kernels.linear_cross_entropy(hidden * scale, weight, target, backend="cpu")
        return torch.autograd.grad(loss, weight)[0]

    monkeypatch.setattr(native, "KEPT_OUTPUT_BYTES", 1 << 40)
    expected = gradient()
    monkeypatch.setattr(native, "KEPT_OUTPUT_BYTES", 0)
    first = gradient()
    second = gradient(2.0)
    assert torch.equal(first, expected)  # and not what the second call wrote
    assert second.data_ptr() != first.data_ptr()
    view, address = first[7:9], first.data_ptr()
    del first
    assert gradient(3.0).data_ptr() != address  # a view still reads it
    assert torch.equal(view, expected[7:9])
    del view
    assert gradient().data_ptr() == address
    again = gradient()
    for copy in (copy_module.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(copy, expected)
    assert torch.equal(again.add_(1.0), expected + 1.0)


def test_a_gradient_is_given_back_by_any_thread(monkeypatch):
    monkeypatch.setattr(native, "KEPT_OUTPUT_BYTES", 0)
    like = torch.empty(300, 300)
    held = [native.empty_gradient(like, torch.float32).fill_(float(i)) for i in range(4)]
    threads = [threading.Thread(target=held.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not held
    assert native.empty_gradient(like, torch.bfloat16).fill_(1.0).sum() == 90000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_hidden_gradient_too_large_to_sum_at_once_has_the_same_bits(dtype):
    """Above 128 MiB of float32 sums the rows come in parts, and the weight's gradient has a sweep of its own."""
    rows, depth, vocabulary = 40_000, 1024, 5
    hidden, weight = torch.randn(rows, depth).to(dtype), torch.randn(vocabulary, depth).to(dtype)
    target = torch.randint(0, vocabulary, (rows,))
    target[::7] = -100

    def gradients(part):
        options = (target[part], None, 0.05, None, -100)
        _, stats = linear_nll_cpu.forward(HeadProblem(hidden[part], weight, *options), ("lse",))
        upstream = torch.ones(target[part].shape)
        return linear_nll_cpu.backward(
            Upstream(upstream),
            Saved(stats["lse"]),
            HeadProblem(hidden[part], weight, *options),
            Needs(True, True, False),
        )

    whole, halves = gradients(slice(None)), [gradients(slice(0, 20_000)), gradients(slice(20_000, None))]
    assert torch.equal(whole[0], torch.cat([half[0] for half in halves]))
    torch.testing.assert_close(whole[1].float(), sum(half[1].float() for half in halves), rtol=0.02, atol=0.5)


def test_the_end_of_a_row_is_not_the_beginning_of_what_follows(isa):
    """An odd D whose last word of two bfloat16 would end a line: infinite memory behind the weight changes no row."""
    vocab, depth, rows = 128_000, 63, 300  # so many that the last panels, too, are packed beside products
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, depth, generator=random).bfloat16()
    memory = torch.full((vocab * depth + 1,), math.inf, dtype=torch.bfloat16)
    memory[:-1] = torch.randn(vocab * depth, generator=random)
    weight = memory[:-1].view(vocab, depth)
    target = torch.full((rows,), vocab - 1)
    nll = linear_nll_cpu.forward(HeadProblem(hidden, weight, target), ())[0]
    logits = hidden.float() @ weight.float().T
    assert (nll - (logits.logsumexp(1) - logits[:, -1])).abs().max() < 1e-4
