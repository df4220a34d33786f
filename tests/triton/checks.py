"""What the Triton kernels must do, as functions of a package that holds them.

The tests call them with `vig_kernels.kernels.triton`, the mutation check with copies of it
that have one seeded fault each.
Exact values come from the float64 specification.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

from vig_kernels import reference
from vig_kernels.ops.linear_nll import with_lse_lo
from vig_kernels.problem import Gaussian, HeadProblem, Needs, Saved, Upstream

STATS = ("lse", "entropy", "argmax")
BUDGET = 256 * 2**20
OPTIONS = {"bias": None, "logit_scale": 1.0, "logit_softcap": None}


def load(package: str) -> SimpleNamespace:
    """The modules of a package of kernels."""
    names = ("linear_nll", "linear_vig", "linear_cross_entropy", "logit_fold", "logit_gradients", "target_residual",
             "kept_block", "loss_sum", "pair_fold", "row_order", "gaussian_blur")  # fmt: skip
    found = {name: importlib.import_module(f"{package}.{name}") for name in names}
    return SimpleNamespace(**found, tile_configs=importlib.import_module(f"{package}.tile_configs"))


def problem(N=21, D=50, V=75, dtype=torch.float32, seed=0, spread=1.0, ignored=True, bias=False):
    """hidden, weight, target, bias; in row 0 every logit is near -300."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=draw) * spread
    weight = torch.randn(V, D, generator=draw) * D**-0.5
    weight[:, 0], hidden[:, 0], hidden[0, 0] = 1.0, 0.0, -300.0
    target = torch.randint(0, V, (N,), generator=draw)
    target[1], target[2] = V - 1, 0
    if ignored:
        target[4::3] = -100
    return (
        hidden.to(dtype),
        weight.to(dtype),
        target,
        torch.randn(V, generator=draw).to(dtype) if bias else None,
    )


def bound(hidden, weight, options) -> torch.Tensor:
    """The promised error of a per-token value, (N,)."""
    products = hidden.double().abs() @ weight.double().abs().T * abs(options["logit_scale"])
    if options["bias"] is not None:
        products = products + options["bias"].double().abs()
    return 1e-5 + 1e-6 * products.amax(1)


def assert_forward(k, hidden, weight, target, options):
    """nll, lse, entropy and argmax against float64, and linear_vig with the bits of linear_nll."""
    arguments = (options["bias"], options["logit_scale"], options["logit_softcap"], -100)
    nll, values = k.linear_nll.forward(HeadProblem(hidden, weight, target, *arguments), STATS)
    exact, exact_stats = reference.linear_nll(hidden, weight, target, **options, stats=STATS)
    limit = bound(hidden, weight, options)
    assert nll.dtype == torch.float32
    assert ((nll - exact).abs() <= limit).all(), "nll"
    assert ((values["lse"] - exact_stats["lse"]).abs() <= limit).all(), "lse"
    assert ((values["entropy"] - exact_stats["entropy"]).abs() <= 4 * limit).all(), "entropy"
    live = target != -100
    logits = reference.linear_logits(hidden, weight, **options)
    chosen = logits[live].gather(1, values["argmax"][live, None]).squeeze(1)
    assert (chosen >= logits[live].amax(1) - 2 * limit[live]).all(), "argmax"
    assert (nll[~live] == 0).all() and (values["argmax"][~live] == -1).all(), "ignored rows"
    other = hidden.new_empty(len(hidden), hidden.shape[1] + 8)[:, : hidden.shape[1]].copy_(hidden.flip(0))
    vig, image, null, _ = k.linear_vig.with_stats(HeadProblem(hidden, weight, target, *arguments), other, ())
    assert torch.equal(vig, null - image), "vig"
    assert torch.equal(image, nll), "nll_image has other bits than linear_nll"
    alone = k.linear_nll.forward(HeadProblem(other, weight, target, *arguments), ())[0]
    assert torch.equal(null, alone), "nll_null has other bits than linear_nll"


def between_nans(x) -> torch.Tensor:
    """x (rows, D) in wider storage, with NaN behind each row and for two rows after the last."""
    rows, D = x.shape
    return x.new_full((rows + 2, D + 8), torch.nan)[:rows, :D].copy_(x)


def contiguous_product(a, b, dtype, product=np.matmul):
    """The interpreter's product. BLAS sums a transposed view, as a descriptor's block is, in another order."""
    return product(np.ascontiguousarray(a), np.ascontiguousarray(b), dtype=dtype)


@patch("triton.runtime.interpreter.np.matmul", contiguous_product)
def check_width_that_cuts_a_block(k, dtype=torch.bfloat16, D=72, block_k=64):
    """Where D is no multiple of BLOCK_K, a descriptor's zeros beyond D give the bits that masks give, in every kernel.

    NaN beyond D, of hidden or weight, is read by neither.
    """
    hidden, null, weight, target, bias = pair_problem(dtype, True, N=9, D=D, V=40)
    hidden, null, weight = map(between_nans, (hidden, null, weight))
    head = HeadProblem(hidden, weight, target, bias, 0.7, 4.0)
    tiles, kept, found = k.tile_configs, k.tile_configs.INTERPRETER, []
    try:
        for descriptor in (False, True):
            tile = {"block_n": 16, "block_v": 32, "block_k": block_k, "descriptor": descriptor}
            tiles.INTERPRETER = replace(kept, **tile)
            assert descriptor == tiles.regular(D, tiles.fits_descriptor(weight), tiles.INTERPRETER)
            nll, values = k.linear_nll.forward(head, STATS)
            *pair, more = k.linear_vig.with_stats(head, null, ("kl", "entropy_null"))
            upstream, saved = Upstream(nll * 0 + 1), Saved(values["lse"])
            recomputed = k.linear_nll.backward(upstream, saved, head, Needs())
            trained = formed_gradients(k, head, None, 1e-3)
            found.append([nll, *values.values(), *pair[:3], *more.values(), *recomputed, *trained])
    finally:
        tiles.INTERPRETER = kept
    assert not any(x.isnan().any() for x in found[1]), "what lies beyond D is read"
    assert all(map(torch.equal, *found)), "a descriptor changes bits"
    exact = reference.linear_nll(hidden, weight, target, bias=bias, logit_scale=0.7, logit_softcap=4.0)
    options = {"bias": bias, "logit_scale": 0.7}
    assert ((found[1][0] - exact).abs() <= bound(hidden, weight, options)).all()


def check_fold_and_combine(k, dtype=torch.float32):
    for bias, scale, cap in ((False, 0.7, None), (True, 1.5, 4.0)):
        hidden, weight, target, b = problem(dtype=dtype, bias=bias)
        assert_forward(k, hidden, weight, target, {"bias": b, "logit_scale": scale, "logit_softcap": cap})
    hidden, weight, target, b = problem(dtype=dtype, bias=True)
    row = int((target != -100).nonzero()[0])
    b[target[row]] = -torch.inf
    vig, *passes, _ = k.linear_vig.with_stats(HeadProblem(hidden, weight, target, b), hidden.flip(0), ())
    assert passes[0][row] == passes[1][row] == torch.inf and vig[row] == 0, "infinite in both passes"


def pair_problem(dtype=torch.float32, bias=False, N=21, D=50, V=75):
    """hidden, null, weight, target, bias: passes that are equal in row 3, near in some rows and far in others.

    The null rows lie apart from one another in another way than the image rows.
    """
    hidden, weight, target, b = problem(N, D, V, dtype, bias=bias)
    share = torch.linspace(0, 1, N)[:, None]
    mixed = hidden.float() * (1 - share) + problem(N, D, V, seed=1)[0] * share
    mixed[3] = hidden[3].float()
    null = hidden.new_empty(N, D + 8)[:, :D].copy_(mixed)
    return hidden, null, weight, target, b


def assert_divergence(k, hidden, null, weight, target, options):
    """KL of linear_vig against float64 within the promise, and all else as it is without."""
    arguments = (options["bias"], options["logit_scale"], options["logit_softcap"], -100)
    head = HeadProblem(hidden, weight, target, *arguments)
    *found, values = k.linear_vig.with_stats(head, null, ("kl", "entropy_image", "argmax_null"))
    *plain, others = k.linear_vig.with_stats(head, null, ("entropy_image", "argmax_null"))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), "KL changes VIG"
    assert values.keys() == {"kl", *others}
    assert all(torch.equal(values[name], others[name]) for name in others), "KL changes other statistics"
    _, exact = reference.linear_vig(hidden, null, weight, target, **options, stats=("kl",))
    limit = 2 * (bound(hidden, weight, options) + bound(null, weight, options)) - 3e-5
    kl = values["kl"]
    assert kl.dtype == torch.float32 and (kl >= 0).all()
    used = ((kl - exact["kl"]).abs() / limit).max()
    assert used <= 1, f"KL errs by {used:.1e} of its bound"
    assert not kl[target == -100].any(), "ignored rows"
    return kl


def check_divergence(k, dtype=torch.float32):
    for bias, scale, cap in ((False, 0.7, None), (True, 1.5, 4.0), (True, -0.5, None)):
        hidden, null, weight, target, b = pair_problem(dtype, bias)
        target[3] = 5
        options = {"bias": b, "logit_scale": scale, "logit_softcap": cap}
        kl = assert_divergence(k, hidden, null, weight, target, options)
        assert kl[3] == 0 and (kl[target != -100] > 0).sum() > 5


def check_divergence_of_many_parts(k):
    """More parts than `pair_combine_kernel` takes at a time, and maxima that rise from part to part."""
    hidden, null, weight, target, bias = pair_problem(bias=True, N=6, D=8, V=2100)
    bias.copy_(torch.linspace(0, 30, 2100))
    assert_divergence(k, hidden, null, weight, target, OPTIONS | {"bias": bias})


def check_divergence_where_words_are_ruled_out(k):
    """Words that the bias masks, more than a part of them, and a part whose weights underflow in one pass alone."""
    hidden, null, weight, target, bias = pair_problem(bias=True)
    bias[:40], bias[60] = -torch.inf, -torch.inf
    target[:] = torch.where(target >= 0, 50, target)
    assert_divergence(k, hidden, null, weight, target, OPTIONS | {"bias": bias})


def check_divergence_of_shifted_logits(k):
    """Every logit of the image pass 4096 above the null pass's: KL is that of the passes without the shift, to 1e-4.

    The products are exact, so that nothing but the reduction errs; the promise alone would allow 8e-3.
    """
    draw = torch.Generator().manual_seed(6)
    words = torch.randint(-8, 9, (75, 16), generator=draw) / 4.0
    rows = torch.randint(-4, 5, (12, 16), generator=draw) / 4.0
    words[:, 0], rows[:, 0] = 1.0, 0.0
    image, null = rows.clone(), rows.flip(0)
    image[:, 0] = 4096.0
    target = torch.zeros(12, dtype=torch.long)
    kl = k.pair_fold.divergence(HeadProblem(image, words, target), null)
    _, exact = reference.linear_vig(image, null, words, target, stats=("kl",))
    assert ((kl - exact["kl"]).abs() <= 2e-6 * (1 + exact["kl"])).all(), "a shift of all logits"


def check_chunks_and_company_of_a_pair(k):
    """The bits of a row's KL depend on neither the chunk it falls in nor the rows beside it."""
    hidden, null, weight, target, _ = pair_problem(N=40)
    whole = k.pair_fold.divergence(HeadProblem(hidden, weight, target), null)
    kept, k.pair_fold.PARTIALS_BYTES = k.pair_fold.PARTIALS_BYTES, 2500
    try:
        again = k.pair_fold.divergence(HeadProblem(hidden, weight, target), null)
    finally:
        k.pair_fold.PARTIALS_BYTES = kept
    assert torch.equal(whole, again), "chunks change bits"
    for some in (slice(3, 4), slice(7, 30)):
        part = k.pair_fold.divergence(HeadProblem(hidden[some], weight, target[some]), null[some])
        assert torch.equal(part, whole[some]), "company changes bits"


def check_first_of_equal_maxima(k):
    weight = torch.zeros(75, 16)
    weight[[17, 20, 40, 70]] = 1.0
    target = torch.zeros(2, dtype=torch.long)
    values = k.linear_nll.forward(HeadProblem(torch.ones(2, 16), weight, target), ("argmax",))[1]
    assert values["argmax"].tolist() == [17, 17]


def check_bad_targets_and_masked_words(k):
    hidden, weight, target, bias = problem(bias=True, ignored=False)
    bias[:40] = -torch.inf  # more than a part of the vocabulary
    target[:] = 60
    exact = reference.linear_nll(hidden, weight[40:], target - 40, bias=bias[40:])
    target[5], target[6] = 75, -7
    nll, values = k.linear_nll.forward(HeadProblem(hidden, weight, target, bias), STATS)
    assert nll[[5, 6]].isnan().all() and not values["lse"].isnan().any()
    fine = [n for n in range(len(nll)) if n not in (5, 6)]
    options = OPTIONS | {"bias": bias[40:]}
    assert ((nll - exact).abs() <= bound(hidden, weight[40:], options))[fine].all()


def check_order(k):
    """Kept rows first, each group in its own order: none, all, some, several blocks, more than one program takes."""
    module, draw = k.row_order, torch.Generator().manual_seed(4)
    small, block = module.SMALL_ROWS, module.ORDER_BLOCK
    module.ORDER_BLOCK = 16
    try:
        for n, share in ((1, 0.0), (1, 1.0), (16, 0.5), (53, 0.4), (53, 1.0), (40, 0.0)):
            target = torch.randint(0, 9, (n,), generator=draw)
            target[torch.rand(n, generator=draw) >= share] = -100
            exact = torch.sort((target == -100).int(), stable=True).indices
            for module.SMALL_ROWS in (small, 0):
                order, count = module.compaction_order(target, -100)
                assert torch.equal(order, exact) and count == (target != -100).sum() and count.shape == ()
    finally:
        module.SMALL_ROWS, module.ORDER_BLOCK = small, block


def check_chunks_and_company(k):
    """The bits of a row depend on neither the chunk it falls in nor the rows beside it."""
    hidden, weight, target, _ = problem(N=40)
    whole, values = k.linear_nll.forward(HeadProblem(hidden, weight, target), STATS)
    kept, k.logit_fold.PARTIALS_BYTES = k.logit_fold.PARTIALS_BYTES, 2000
    try:
        again, again_stats = k.linear_nll.forward(HeadProblem(hidden, weight, target), STATS)
        _, image, *_ = k.linear_vig.with_stats(HeadProblem(hidden, weight, target), hidden + 1, ())
    finally:
        k.logit_fold.PARTIALS_BYTES = kept
    assert torch.equal(whole, again) and torch.equal(image, whole), "chunks change bits"
    assert all(torch.equal(values[name], again_stats[name]) for name in STATS)
    for some in (slice(3, 4), slice(7, 30)):
        part = k.linear_nll.forward(HeadProblem(hidden[some], weight, target[some]), ())[0]
        assert torch.equal(part, whole[some]), "company changes bits"


def norm_error(found, exact) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


CEILING = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def assert_gradient(name, found, exact, eager, dtype, cap) -> None:
    """The promise, norm-wise: twice the error of same-dtype eager PyTorch, or of rounding the exact result to `dtype`.

    And never more than CEILING, which float32 without a cap may pass: row 0 has logits near -400 there, which
    float32 holds to 3e-5, and an entropy beside them.
    """
    ceiling = CEILING[dtype] if cap or dtype != torch.float32 else 5e-4
    allowed = 2 * max(norm_error(eager, exact), norm_error(exact.to(dtype), exact)) + 1e-7
    error = norm_error(found, exact)
    assert error <= min(allowed, ceiling), (
        f"gradient of {name}: {error:.1e} over {allowed:.1e}, {ceiling:.0e}"
    )


def eager_gradients(loss, hidden, weight, bias, target, scale, cap):
    """Gradients of loss(nll, lse, entropy) of the rows that are not ignored, by PyTorch in the inputs' dtype."""
    live = target != -100
    leaves = [hidden[live].requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    logits = torch.nn.functional.linear(*leaves) * scale
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)).float()
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, target[live, None]).squeeze(1)
    rows, *rest = torch.autograd.grad(loss(nll, logits.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)), leaves)
    return torch.zeros_like(hidden).masked_scatter_(live[:, None].expand_as(hidden), rows), *rest


def check_gradients(k, dtype=torch.float32, kinds=("nll", "lse", "entropy"), cap=4.0, chunks=True):
    """The recomputing backward against float64, for random upstream gradients, in blocks of rows and vocabulary."""
    hidden, weight, target, bias = problem(dtype=dtype, bias=True, V=160)
    assert target[4] == -100
    hidden[4] = 1e4  # an ignored row whose exp overflows
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    options = {"bias": leaves[2], "logit_scale": 1.3, "logit_softcap": cap}
    nll, values = reference.linear_nll(*leaves[:2], target, **options, stats=("lse", "entropy"))
    values = {"nll": nll, **values}
    draw = torch.Generator().manual_seed(3)
    up = {kind: torch.randn(len(target), generator=draw) if kind in kinds else None for kind in values}
    exact = torch.autograd.grad(sum((values[kind] * up[kind]).sum() for kind in kinds), leaves)
    live = target != -100

    def upstream(*found):
        pairs = zip(values, found, strict=True)
        return sum((value * up[kind][live]).sum() for kind, value in pairs if kind in kinds)

    eager = eager_gradients(upstream, hidden, weight, bias, target, 1.3, cap)
    stats = ("lse", "entropy", "lse_lo")
    head = HeadProblem(hidden, weight, target, bias, 1.3, cap)
    found = k.linear_nll.forward(head, stats)[1]
    up = with_lse_lo(Upstream(*up.values()), Saved(found["lse"], found["entropy"]), found["lse_lo"])
    module = k.linear_nll
    limits = (module.HIDDEN_BYTES, module.row_chunk, module.vocab_chunk)
    try:
        if chunks:  # 3 chunks of the vocabulary, 3 of the rows, and no room for both float32 sums
            module.HIDDEN_BYTES = 4 * 50 * 9
            module.row_chunk, module.vocab_chunk = lambda *_: 8, lambda V, D, taken: 64
        found = module.backward(*up, head, Needs())
    finally:
        module.HIDDEN_BYTES, module.row_chunk, module.vocab_chunk = limits
    names = ("hidden", "weight", "bias")
    for name, mine, truth, theirs, leaf in zip(
        names, found, exact, eager, (hidden, weight, bias), strict=True
    ):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        assert_gradient(name, mine, truth, theirs, dtype, cap)
    assert not found[0][~live].any(), "an ignored row has a gradient"
    told = module.backward(*up, head._replace(num_kept=int(live.sum())), Needs())
    for name, mine, truth, theirs in zip(names, told, exact, eager, strict=True):
        assert_gradient(f"{name}, rows gathered", mine, truth, theirs, dtype, cap)
    assert not told[0][~live].any(), "an ignored row has a gradient"
    few = head._replace(num_kept=int(live.sum()) - 1)
    assert all(x.isnan().any() for x in module.backward(*up, few, Needs()))
    only = module.backward(*up, head, Needs(False, True, False))
    assert only[0] is None and only[2] is None
    assert_gradient("weight alone", only[1], exact[1], eager[1], dtype, cap)


def formed_gradients(k, head, row_weight, z_loss, needs=None, factor=1.0, budget=BUDGET):
    """[loss, gradients of hidden, weight and bias], of the kept block where there is one."""
    module, needs = k.linear_cross_entropy, needs or Needs()
    formed = module.forward_backward(head, row_weight, z_loss, needs, budget)
    found = list(formed[:4])
    if formed.block is not None:
        assert formed.grad_hidden is formed.grad_weight is None
        upstream = torch.tensor(2 * factor), 0.5
        found[1:3] = module.block_gradients(formed[4:], head.hidden, head.weight, *upstream, needs.hidden)
    return found


def check_kept_block(k):
    """The gradients from a kept block, in bfloat16: norm-wise, and the weight's without the rounding at the targets.

    The roundings of 1024 columns cancel in their mean, that of the target's entry of the block does not.
    """
    N, D, V = 14, 1024, 90
    hidden, weight, _, _ = problem(N, D, V, torch.bfloat16)
    target = torch.arange(N) * 6
    target[3:6], target[9] = -100, V
    hidden[0] = hidden[7]  # no logits near -300
    leaf = weight.double().requires_grad_()
    known = (target >= 0) & (target < V)
    head = HeadProblem(hidden, weight, target)
    hidden[4] = torch.nan  # of an ignored row
    logits = hidden.double()[target != -100] @ leaf.T
    nll = logits.logsumexp(1).sum() - logits[known[target != -100]].gather(1, target[known, None]).sum()
    once = torch.autograd.grad(nll, leaf)[0]
    for num_kept, factor in ((None, 3.4567), (N - 3, 1.0)):  # hidden rows times 1 are not rounded
        exact, needs = once * factor, Needs(True, True, False)
        some = head._replace(num_kept=num_kept)
        _, of_hidden, found, _ = formed_gradients(k, some, None, 0.0, needs, factor)
        chunked = k.linear_cross_entropy.forward_backward(some, None, 0.0, Needs(True, False, False), BUDGET)
        assert of_hidden.dtype == torch.bfloat16 and not of_hidden[target == -100].any()
        assert norm_error(of_hidden, chunked.grad_hidden * factor) < 3e-3, "hidden"
        alone = formed_gradients(k, some, None, 0.0, Needs(False, True, False), factor)
        assert alone[1] is None and torch.equal(alone[2], found), "weight alone"
        assert found.dtype == torch.bfloat16 and found.shape == weight.shape
        assert norm_error(found, exact) <= 2 * norm_error(exact.to(torch.bfloat16), exact), "weight"
        words = target[known]
        mean, truth = ((x.double()[words] * hidden[known].double()).sum(1) for x in (found, exact))
        assert ((mean - truth).abs() <= 6e-4 * truth.abs()).all(), "rounded at the target"


def check_large_offsets_of_gathered_rows(k):
    """Rows of hidden that lie far apart, gathered and scaled: the fifth of six begins beyond 2^31, the last is not
    live."""
    near = torch.arange(48.0).reshape(6, 8).sin().bfloat16()
    far = far_apart(6, 8, BEYOND * 5 // 4, torch.bfloat16).copy_(near)
    assert far.stride(0) * 4 > 2**31
    gathered = torch.full((6, 8), torch.nan).bfloat16()
    k.kept_block.rows_kernel[(6, 1)](
        far,
        None,
        torch.tensor([0, 1, 2, 3, 4, 5, 5]),  # the sixth is not live
        torch.tensor(4.0),
        torch.ones(6),
        gathered,
        None,
        far.stride(0),
        0.5,
        6,
        6,
        8,
        BLOCK_D=8,
    )
    assert torch.equal(gathered[:5], near[:5] * 2) and not gathered[5].any()


def check_loss_sum(k):
    """Sums of several blocks, with all that goes into one, against float64."""
    N, draw = 2 * k.loss_sum.SUM_BLOCK + 77, torch.Generator().manual_seed(9)
    nll, lse, row_weight = (torch.rand(N, generator=draw) + 0.5 for _ in range(3))
    target = torch.randint(0, 5, (N,), generator=draw)
    target[::3], row_weight[1::7] = -100, 0.0
    live = target != -100
    nll[~live], lse[~live], nll[1::7] = (
        0.0,
        0.0,
        torch.inf,
    )  # a row of weight 0 costs nothing, whatever it holds
    values = {"nll": nll, "lse": lse}
    head = HeadProblem(torch.empty(N, 1), torch.empty(5, 1), target, num_kept=int(live.sum()))
    counted = live & (row_weight != 0)
    exact = (row_weight.double() * (nll.double() + 0.1 * lse.double().square()))[counted].sum()
    reciprocal = torch.tensor(0.25)

    def found(count=None, divisor=(1.0, None), z_loss=0.1):
        return k.loss_sum.loss_of(head, row_weight, z_loss, values, count, divisor)

    assert abs(found() - exact) <= 1e-6 * exact, "weights and z_loss"
    assert abs(found(divisor=(0.5, reciprocal)) - exact / 8) <= 1e-6 * exact, "divisor"
    for divisor in ((0.0, None), (0.5, torch.tensor(0.0))):
        assert found(divisor=divisor) == 0 == found(live.sum() + 1, divisor), "a divisor of 0"
    assert abs(found(live.sum()) - exact) <= 1e-6 * exact and found(live.sum() + 1).isnan(), (
        "more kept than told"
    )
    plain = k.loss_sum.loss_of(head, None, 0.0, {"nll": nll.clamp(max=2.0)}, None, (1.0, None))
    assert abs(plain - nll.clamp(max=2.0).double().sum()) <= 1e-6 * plain, "no weights"


def check_training(k, dtype=torch.float32, num_kept=True, cap=4.0, chunk_rows=16):
    """Loss and formed gradients of linear_cross_entropy against float64, in several chunks."""
    hidden, weight, target, bias = problem(N=45, dtype=dtype, bias=True)
    draw = torch.Generator().manual_seed(5)
    row_weight = torch.rand(45, generator=draw) + 0.5
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    options = {"bias": leaves[2], "logit_scale": 0.8, "logit_softcap": cap}
    exact_loss = reference.linear_cross_entropy(
        *leaves[:2], target, token_weight=row_weight, z_loss=0.02, reduction="sum", **options
    )
    exact = torch.autograd.grad(exact_loss, leaves)
    live_weight = row_weight[target != -100]
    eager = eager_gradients(
        lambda nll, lse, _: (live_weight * (nll + 0.02 * lse.square())).sum(),
        hidden, weight, bias, target, 0.8, cap,
    )  # fmt: skip
    kept = int((target != -100).sum()) if num_kept else None
    head, terms = HeadProblem(hidden, weight, target, bias, 0.8, cap, num_kept=kept), (row_weight, 0.02)
    module = k.linear_cross_entropy
    kept_rule, module.chunk_rows = module.chunk_rows, lambda kept, *_: min(kept, chunk_rows)
    one_block = dtype == torch.bfloat16 and chunk_rows >= 45
    try:
        loss, *found = formed_gradients(k, head, *terms)
        if num_kept:
            few = head._replace(num_kept=kept - 1)
            assert module.forward_backward(few, *terms, Needs(True, False, False), BUDGET)[0].isnan()
    finally:
        module.chunk_rows = kept_rule
    assert abs(loss.double() - exact_loss) <= 2e-6 * exact_loss.abs() + 1e-4
    for name, mine, truth, theirs in zip(("hidden", "weight", "bias"), found, exact, eager, strict=True):
        assert mine.dtype == (torch.bfloat16 if name != "bias" and one_block else torch.float32)
        assert_gradient(name, mine, truth, theirs, dtype, cap)
    alone, *nothing = module.forward_backward(head, *terms, Needs(False, False, False), BUDGET)
    assert nothing == [None] * 6 and abs(alone - loss) <= 1e-6 * abs(loss) + 1e-4


def check_target_residual(k):
    """The correction kernels against float64: targets that repeat, are ignored or unknown, several blocks of D."""
    draw, module = torch.Generator().manual_seed(6), k.target_residual
    N, D, V = 56, 20, 40
    target = torch.randint(0, V, (N,), generator=draw)
    target[10:30] = 17  # more rows than a program adds at a time
    assert module.BLOCK_R < 20
    target[[3, 40]], target[[4, 41]], target[5] = 7, -1, V
    hidden, weight = (torch.randn(n + 2, D, generator=draw).bfloat16()[1:-1] for n in (N, V))
    kept, module.block_of = module.block_of, lambda D, most=16: 16
    try:
        residual = module.TargetResidual(target, 7)
        residual.lost.copy_(torch.randn(N, generator=draw))
        lost = residual.lost.double().masked_fill((target == 7) | (target < 0) | (target >= V), 0.0)[:, None]
        at = target.clamp(0, V - 1)
        total = torch.randn(N, D, generator=draw)
        found = total.clone()
        residual.correct_hidden(found[:19], weight)
        residual.correct_hidden(found[19:], weight, 19)
        assert norm_error(found, total + lost * weight.double()[at]) < 1e-6, "hidden"
        for first, last in ((0, V), (9, 30)):
            total = torch.randn(V, D, generator=draw)
            exact = total.double().index_add(0, at, lost * hidden.double())[first:last]
            found = total.clone()[: last - first].copy_(total[first:last])  # with room behind it for a fault
            residual.correct_weight(found, hidden, first_vocab=first)
            assert norm_error(found, exact) < 1e-6, "weight"
        rows = torch.randperm(N, generator=draw)  # the residual's rows stand elsewhere in `hidden`
        found, elsewhere = torch.zeros(V, D), torch.empty_like(hidden)
        elsewhere[rows] = hidden
        residual.correct_weight(found, elsewhere, rows)
        exact = torch.zeros(V, D, dtype=torch.float64).index_add(0, at, lost * hidden.double())
        assert norm_error(found, exact) < 1e-6, "weight, rows elsewhere"
    finally:
        module.block_of = kept


def check_what_16_bits_lose(k):
    """Formed and recomputed bfloat16 blocks: what the target's entry loses comes back to both gradients.

    The sums are taken before they are cast: what is left are the roundings of the other words.
    """
    hidden, weight, target, _ = problem(N=6, V=200, dtype=torch.bfloat16, ignored=False)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_nll(*exact, target).sum(), exact)
    module = k.linear_cross_entropy
    kept, module.kept_rows = module.kept_rows, lambda *_: 0
    head, needs = HeadProblem(hidden, weight, target), Needs(True, True, False)
    formed = module.forward_backward(head, None, 0.0, needs, BUDGET)[1:3]
    module.kept_rows = kept
    saved = k.linear_nll.forward(HeadProblem(hidden, weight, target), ("lse",))[1]["lse"]
    sums = []
    module = k.linear_nll
    kept, module.settle = module.settle, lambda gradient, total, unscale: sums.append(total.clone())
    try:
        module.backward(
            Upstream(torch.ones(6)),
            Saved(saved),
            HeadProblem(hidden, weight, target),
            Needs(True, True, False),
        )
    finally:
        module.settle = kept
    for name, found in (("formed", formed), ("recomputed", sums[::-1])):
        for part, mine, truth in zip(("hidden", "weight"), found, exact, strict=True):
            error = norm_error(mine, truth)
            assert error < 4e-4, (
                f"{name} gradient of {part}: {error:.1e}"
            )  # 8e-4 and more without the residual


def check_low_part_of_lse(k):
    """lse + lse_lo is the log-sum-exp far beyond float32, and formed gradients use both."""
    words = torch.linspace(0.01, 1.0, 9)[:, None]
    shift = torch.full((2,), -(2.0**20))  # float32 steps by 1/16 around there
    _, values = k.linear_nll.forward(
        HeadProblem(words, torch.ones(2, 1), torch.zeros(9).long(), shift), ("lse", "lse_lo")
    )
    exact = (words[:, 0] + shift[0]).double() + torch.tensor(2.0).double().log()
    found = values["lse"].double() + values["lse_lo"]
    assert (found - exact).abs().max() < 1e-6, "lse_lo"

    block, one, two = torch.ones(2, 8), torch.ones(2), torch.full((2,), 2.0)
    k.linear_cross_entropy.finish_kernel[(1,)](
        block, block, torch.zeros(1, 2), None, one, two, -one, None, torch.tensor([3, 9]), torch.arange(2),
        torch.tensor(2), None, None, None, None, 1.0, 8, 0, 2, 1, 8, 0.0, PART=8, BLOCK_N=16, SOFTCAP=False,
    )  # fmt: skip
    exact = torch.full((2, 8), -1.0).exp()
    exact[0, 3] -= 1.0  # nll = 1; the other row's target is no word
    assert (block - exact).abs().max() < 1e-6, "low part of lse in a formed gradient"


def check_blur(k, dtype=torch.float32, precision="float32", shape=(2, 2, 45, 38), border="reflect"):
    """Two sigmas, one a leading image, channels-last input, float64 truth."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
    images = images if dtype == torch.uint8 else (images.float() / 64 - 1).to(dtype)
    images = images.to(memory_format=torch.channels_last)
    sigma_y, sigma_x = torch.tensor([[2.0, 5.5], [4.0, 0.7]], dtype=torch.float64)[:, : shape[0]]
    out = torch.empty(shape, dtype=dtype)
    k.gaussian_blur.forward(images, Gaussian(sigma_y, sigma_x, 3.0, border, precision), out)
    pairs = zip(images, sigma_y.tolist(), sigma_x.tolist(), strict=True)
    exact = torch.stack([reference.gaussian_blur(image, (y, x), border=border) for image, y, x in pairs])
    span = float(images.double().max() - images.double().min())
    limit = 2e-6 if precision == "float32" else 1e-3
    if dtype == torch.uint8:
        assert (out.int() - exact.int()).abs().max() <= (precision == "fast")
        assert (out != exact).double().mean() <= (0.05 if precision == "fast" else 0.0)
        return
    rounding = (
        exact.abs().max() * {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    )
    assert (out.double() - exact).abs().max() <= limit * span + rounding


def far_apart(rows: int, D: int, total: int, dtype=torch.float32) -> torch.Tensor:
    """(rows, D) whose rows lie `total` elements apart from first to last; memory is taken only where it is written."""
    stride = -(-total // max(1, rows - 1) // 16) * 16
    return torch.empty(stride * (rows - 1) + D, dtype=dtype).as_strided((rows, D), (stride, 1))


BEYOND = 2**31 + 2**20


def check_large_offsets_of_operands(k):
    hidden, weight, target, _ = problem(N=5, D=8, V=40, ignored=False)
    exact = reference.linear_nll(hidden, weight, target)
    for where in ("hidden", "weight"):
        h, w = hidden, weight
        if where == "hidden":
            h = far_apart(5, 8, BEYOND, torch.bfloat16).copy_(hidden.bfloat16())
            w = weight.bfloat16()
            exact = reference.linear_nll(h, w, target)
        else:
            w = far_apart(40, 8, BEYOND, torch.bfloat16).copy_(weight.bfloat16())
            h = hidden.bfloat16()
        nll, values = k.linear_nll.forward(HeadProblem(h, w, target), ("lse",))
        assert (nll - exact).abs().max() <= 1e-3, f"offsets of {where}"
        upstream, saved, needs = Upstream(torch.ones(5)), Saved(values["lse"]), Needs(True, False, False)
        far, near = HeadProblem(h, w, target), HeadProblem(h.clone(), w.clone(), target)
        gradient = k.linear_nll.backward(upstream, saved, far, needs)[0]
        assert torch.equal(gradient, k.linear_nll.backward(upstream, saved, near, needs)[0])


def check_large_offsets_of_partials(k):
    """Partials whose rows lie so far apart that part 1 and later start beyond 2^31 elements."""
    module, config = k.logit_fold, k.tile_configs.INTERPRETER
    hidden, weight, target, _ = problem(N=3, D=8, V=40, ignored=False)
    order, count = torch.arange(3), torch.tensor(3)
    rows = 2**30 + 16  # of which the three that `count` names exist
    storage = torch.empty(3 * rows)
    partials = SimpleNamespace(max=storage, sum=storage[100:], dot=None, arg=None, target=torch.empty(2, 64))
    partials.part, partials.parts = config.block_v // config.parts, 3
    assert partials.part * 3 >= 40
    kernel, combine = module.fold_kernel, module.combine_kernel
    common = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_K": config.block_k}
    kernel[(2,)](
        hidden, hidden, weight, None, target, order, count, partials.max, partials.sum, None, None, partials.target,
        None, 8, 8, 8, 0, 0, rows, 1, 1, 2, 40, 8, 1.0, 0.0, **common, PARTS=2, GROUP=2, EVEN_K=False,
        DESCRIPTOR=False, UNIT=1, SOFTCAP=False, FOLDED=True, FAST_EXP2=False, PRECISION="ieee",
    )  # fmt: skip
    nll = torch.empty(3)
    combine[(1,)](
        partials.max, partials.sum, None, None, partials.target, target, order, count, nll, None, None, None,
        None, None, None, 0, 3, 0, rows, 3, 40, PART=partials.part, BLOCK_N=16, BLOCK_T=32,
    )  # fmt: skip
    assert (
        (nll - reference.linear_nll(hidden, weight, target)).abs() <= bound(hidden, weight, OPTIONS)
    ).all()


def check_large_offsets_of_a_pair(k):
    """Rows of either pass, or of the weight, that lie far apart, and partials that do."""
    hidden, null, weight, target, _ = pair_problem(torch.bfloat16, N=5, D=8, V=40)
    target[4] = 0  # the last row is read
    near = k.pair_fold.divergence(HeadProblem(hidden, weight, target), null)
    for where in range(3):
        operands = [hidden, null, weight]
        operands[where] = far_apart(len(operands[where]), 8, BEYOND, torch.bfloat16).copy_(operands[where])
        found = k.pair_fold.divergence(HeadProblem(operands[0], operands[2], target), operands[1])
        assert torch.equal(found, near), f"offsets of {('hidden', 'null', 'weight')[where]}"
    config = k.tile_configs.INTERPRETER
    rows, part = 2**28 + 16, config.block_v // config.parts  # part 2 starts beyond 2^31
    partials, kl, order, count = torch.empty(15 * rows), torch.zeros(16), torch.arange(16), torch.tensor(3)
    assert part * 3 >= 40
    k.pair_fold.pair_kernel[(2,)](
        hidden, null, weight, None, order, count, partials, hidden.stride(0), null.stride(0), weight.stride(0),
        0, rows, 1, 2, 40, 8, 1.0, 0.0, BLOCK_N=config.block_n, BLOCK_V=config.block_v, BLOCK_K=config.block_k,
        PARTS=2, GROUP=2, EVEN_K=False, DESCRIPTOR=False, UNIT=1, SOFTCAP=False, FOLDED=True,
        FAST_EXP2=False, PRECISION="ieee",
    )  # fmt: skip
    k.pair_fold.pair_combine_kernel[(1,)](partials, order, count, kl, 0, rows, 3, BLOCK_N=16, BLOCK_T=32)
    assert torch.equal(kl[:3], near[:3]) and not kl[3:].any()


def check_large_offsets_of_blocks(k):
    """finish_kernel on a block whose rows lie far apart, and the blur on planes that do."""
    draw = torch.Generator().manual_seed(2)
    image = torch.randn(2, 1, 9, 8, generator=draw)
    far = torch.empty(BEYOND + 72).as_strided((2, 1, 9, 8), (BEYOND, 72, 8, 1)).copy_(image)
    sigma = torch.tensor([1.0, 1.0], dtype=torch.float64)
    near_out = k.gaussian_blur.forward(image, Gaussian(sigma, sigma), torch.empty_like(image))
    assert torch.equal(k.gaussian_blur.forward(far, Gaussian(sigma, sigma), far), near_out)

    rows, V, part = 5, 40, 16
    stride = 2**29 + 16
    block = torch.empty(4 * stride + V).as_strided((rows, V), (stride, 1)).fill_(0.5)
    near, top = torch.full((rows, V), 0.5), torch.zeros(3, rows)
    lse, target, order = torch.ones(rows), torch.arange(rows), torch.arange(rows)
    for b in (block, near):
        k.linear_cross_entropy.finish_kernel[(3,)](
            b, b, top, None, lse, lse, torch.zeros(rows), None, target, order, torch.tensor(rows),
            torch.tensor(1.0), None, None, None, 9.0, b.stride(0), 0, rows, 3, V, 0.0, PART=part, BLOCK_N=16,
            SOFTCAP=False,
        )  # fmt: skip
    assert torch.equal(block, near)


def check_large_offsets_of_residuals(k):
    """The correction kernels on gradients, weights and hidden states whose rows lie far apart."""
    target = torch.tensor([0, 4, 4])
    near = torch.arange(40.0).reshape(5, 8).sin()
    for far_source in (False, True):
        source = far_apart(5, 8, BEYOND, torch.bfloat16) if far_source else torch.empty(5, 8).bfloat16()
        source.copy_(near)
        residual = k.target_residual.TargetResidual(target, -100)
        residual.lost.copy_(torch.tensor([1.0, 2.0, 3.0]))
        for size in (5, 3):
            total = torch.zeros(size, 8) if far_source else far_apart(size, 8, BEYOND).fill_(0.0)
            exact = torch.zeros(size, 8, dtype=torch.float64)
            if size == 3:
                residual.correct_hidden(total, source)
                exact += residual.lost.double()[:, None] * source.double()[target]
            else:
                rows = torch.tensor([0, 1, 4])
                residual.correct_weight(total, source, rows)
                exact.index_add_(0, target, residual.lost.double()[:, None] * source.double()[rows])
            assert norm_error(total, exact) < 1e-6, "offsets of residuals"
