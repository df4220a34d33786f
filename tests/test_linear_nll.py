"""linear_nll against its float64 specification, on every backend that can run here."""

import threading

import pytest
import torch
from cases import CASES, DTYPES, Case, assert_gradients, bound, draws, eager_logits, make, runners
from torch.utils._python_dispatch import TorchDispatchMode

from vig_kernels import gaussian_blur, linear_cross_entropy, linear_nll, linear_vig, reference
from vig_kernels.kernels.torch import linear_cross_entropy as linear_cross_entropy_torch
from vig_kernels.kernels.torch import linear_nll as linear_nll_torch
from vig_kernels.kernels.torch import precision
from vig_kernels.ops.linear_nll import with_lse_lo
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

STATS = ("lse", "entropy", "argmax")
RUNNERS = runners("linear_nll")
every = pytest.mark.parametrize(("backend", "device"), RUNNERS)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, backend, device):
    inputs = make(case, dtype, device)
    args = (inputs.hidden, inputs.weight, inputs.target)
    nll, values = linear_nll(*args, **inputs.options, stats=STATS, backend=backend)
    exact, exact_stats = reference.linear_nll(*args, **inputs.options, stats=STATS)
    limit = bound(inputs)
    assert nll.dtype == values["lse"].dtype == values["entropy"].dtype == torch.float32
    assert ((nll - exact).abs() <= limit).all()
    assert ((values["lse"] - exact_stats["lse"]).abs() <= limit).all()
    # d entropy = sum p (z - <z>) dz: at most twice the bound times the spread of z under p
    assert ((values["entropy"] - exact_stats["entropy"]).abs() <= 4 * limit).all()
    ignored = inputs.target == inputs.options.get("ignore_index", -100)
    assert (nll[ignored] == 0).all() and (values["argmax"][ignored] == -1).all()
    assert_argmax(inputs, values["argmax"], limit)
    assert torch.equal(nll, linear_nll(*args, **inputs.options, backend=backend)), "values change bits"


def assert_argmax(inputs, argmax, limit):
    """The chosen column is the best one, up to the promised error, and the first of equal columns."""
    live = argmax >= 0
    options = {k: v for k, v in inputs.options.items() if k != "ignore_index"}
    logits = reference.linear_logits(inputs.hidden, inputs.weight, **options)[live]
    chosen = logits.gather(1, argmax[live].unsqueeze(1)).squeeze(1)
    assert (chosen >= logits.amax(1) - 2 * limit[live]).all()


@every
@pytest.mark.parametrize("V", [40, 512])
def test_argmax_of_a_row_of_nan_is_a_column(V, backend, device):
    """Whoever gathers by it must not read out of bounds."""
    hidden, weight = torch.randn(3, 16, device=device), torch.randn(V, 16, device=device)
    hidden[1] = torch.nan
    target = torch.zeros(3, dtype=torch.long, device=device)
    nll, values = linear_nll(hidden, weight, target, stats=("argmax",), backend=backend)
    assert nll[1].isnan() and values["argmax"][1] in range(V)


@every
@pytest.mark.parametrize("equal", [[17, 40, 2600], slice(17, None)], ids=["some", "all from 17 on"])
def test_argmax_takes_the_first_of_equal_columns(equal, backend, device):
    hidden = torch.ones(3, 16, device=device)
    weight = torch.zeros(5000, 16, device=device)
    weight[equal] = 1.0
    _, values = linear_nll(
        hidden, weight, torch.zeros(3, dtype=torch.long, device=device), stats=("argmax",), backend=backend
    )
    assert values["argmax"].tolist() == [17, 17, 17]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "logits-1e4"], ids=str)
def test_gradients_with_random_upstream(case, dtype, backend, device):
    def draw(seed):
        return _gradients_of_a_draw(make(case, dtype, device, seed, grad=True), backend)

    assert_gradients(*map(draw, draws(case)))


def _gradients_of_a_draw(inputs, backend):
    """Found, exact and eager: of nll, lse and entropy under a random upstream."""

    def gradients(values, inputs):
        draw = torch.Generator().manual_seed(7)
        loss = sum((v * torch.randn(v.shape, generator=draw).to(v)).sum() for v in values)
        return torch.autograd.grad(loss, inputs.leaves())

    args = (inputs.hidden, inputs.weight, inputs.target)
    stats = ("lse", "entropy")
    nll, values = linear_nll(*args, **inputs.options, stats=stats, backend=backend)
    precise = inputs.double()
    exact, exact_stats = reference.linear_nll(
        precise.hidden, precise.weight, precise.target, **precise.options, stats=stats
    )
    log_p = eager_logits(inputs).log_softmax(-1)
    ignored = inputs.target == inputs.options.get("ignore_index", -100)
    eager = (
        -log_p.gather(1, inputs.target.masked_fill(ignored, 0).unsqueeze(1))
        .squeeze(1)
        .masked_fill(ignored, 0),
        eager_logits(inputs).logsumexp(-1).masked_fill(ignored, 0),
        -(log_p.exp() * log_p).sum(-1).masked_fill(ignored, 0),
    )
    return (
        gradients((nll, values["lse"], values["entropy"]), inputs),
        gradients((exact, exact_stats["lse"], exact_stats["entropy"]), precise),
        gradients(eager, inputs),
    )


@every
def test_huge_logits_have_finite_gradients(backend, device):
    inputs = make(Case("huge", N=6, D=32, V=90, scale=2000.0), torch.float32, device, grad=True)
    args = (inputs.hidden, inputs.weight, inputs.target)
    found = torch.autograd.grad(linear_nll(*args, backend=backend).sum(), inputs.leaves())
    exact = torch.autograd.grad(reference.linear_nll(*args).sum(), inputs.leaves())
    for mine, truth in zip(found, exact, strict=True):
        assert (mine - truth).norm() <= 5e-3 * truth.norm()


@every
def test_shapes_and_integer_targets(backend, device):
    hidden = torch.randn(2, 3, 8, device=device)
    weight = torch.randn(11, 8, device=device)
    target = torch.tensor([[1, -100, 10], [0, 4, -100]], device=device)
    nll, values = linear_nll(hidden, weight, target.int(), stats=("lse",), backend=backend)
    assert nll.shape == values["lse"].shape == (2, 3)
    assert torch.equal(nll[target == -100], torch.zeros(2, device=device))
    flat = linear_nll(hidden.reshape(6, 8), weight, target.reshape(6), backend=backend)
    assert torch.equal(flat.reshape(2, 3), nll)
    one = linear_nll(hidden[0, 0], weight, target[0, 0], backend=backend)
    assert one.shape == () and abs(one - nll[0, 0]) < 1e-5
    turned = linear_nll(hidden.transpose(0, 1), weight.T.contiguous().T, target.T, backend=backend)
    torch.testing.assert_close(turned.T, nll)
    spaced = target[..., None].repeat(1, 1, 2)[..., 0]
    assert torch.equal(linear_nll(hidden, weight, spaced, backend=backend), nll)


@every
def test_only_what_needs_a_gradient_gets_one(backend, device):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    weight = torch.randn(11, 8, device=device)
    target = torch.tensor([1, 2, -100, 3], device=device)
    linear_nll(hidden, weight, target, backend=backend).sum().backward()
    assert weight.grad is None and hidden.grad[2].abs().sum() == 0 and hidden.grad[0].abs().sum() > 0


@every
def test_ignored_rows_may_hold_anything(backend, device):
    hidden, weight = torch.randn(37, 24, device=device), torch.randn(51, 24, device=device).requires_grad_()
    target = torch.arange(37, device=device)
    target[::3] = -100
    found = []
    for filler in (0.0, float("nan"), float("inf")):
        spoiled = hidden.clone()
        spoiled[::3] = filler
        nll = linear_nll(spoiled.requires_grad_(), weight, target, backend=backend)
        found.append((nll.detach(), *torch.autograd.grad(nll.sum(), (spoiled, weight))))
        torch.testing.assert_close(spoiled[::3], torch.full((13, 24), filler, device=device), equal_nan=True)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@every
def test_nothing_to_learn_gives_zero_gradients(backend, device):
    for size in (0, 3):
        hidden = torch.randn(size, 8, device=device, requires_grad=True)
        weight = torch.randn(11, 8, device=device, requires_grad=True)
        target = torch.full((size,), -100, device=device)
        linear_nll(hidden, weight, target, backend=backend).sum().backward()
        assert not hidden.grad.any() and not weight.grad.any()


@every
def test_minus_infinity_masks_words(backend, device):
    inputs = make(Case("masked", N=5, D=16, V=70, bias=True), torch.float32, device)
    inputs.options["bias"][:64] = float("-inf")
    hidden, weight, bias = (leaf.requires_grad_() for leaf in inputs.leaves())
    target = torch.full((5,), 66, device=device)
    nll, values = linear_nll(hidden, weight, target, bias=bias, stats=("entropy",), backend=backend)
    exact, exact_stats = reference.linear_nll(
        hidden, weight[64:], target - 64, bias=bias[64:], stats=("entropy",)
    )
    found = (
        nll,
        values["entropy"],
        *torch.autograd.grad((nll + values["entropy"]).sum(), inputs.leaves()),
    )
    loss = (exact + exact_stats["entropy"]).sum()
    truth = (exact, exact_stats["entropy"], *torch.autograd.grad(loss, inputs.leaves()))
    for mine, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("size", [-3.4e38, -3.2e38, -1e38, 1e38, 3.2e38, 3.4e38])
def test_logits_as_large_as_float32_holds(size, backend, device):
    hidden, target = torch.full((3, 1), size, device=device), torch.tensor([0, 2, 69], device=device)
    weight = torch.full((70, 1), 1.0, device=device)
    nll, values = linear_nll(hidden, weight, target, stats=("lse", "entropy", "argmax"), backend=backend)
    for flat in (nll, values["entropy"]):
        torch.testing.assert_close(flat, torch.full_like(flat, 70.0).log())
    torch.testing.assert_close(values["lse"], hidden[:, 0])
    assert not values["argmax"].any()
    weight[40] = 0.999  # far the best word of negative logits, far the worst of positive ones
    nll, values = linear_nll(hidden, weight, target, stats=("entropy", "argmax"), backend=backend)
    best, words = (40, 1.0) if size < 0 else (0, 69.0)
    assert (values["argmax"] == best).all()
    torch.testing.assert_close(values["entropy"], torch.full_like(nll, words).log())


@every
def test_the_lowest_finite_logit_beats_minus_infinity(backend, device):
    bias = torch.full((70,), float("-inf"), device=device)
    bias[37] = torch.finfo(torch.float32).min
    hidden, weight = torch.zeros(2, 4, device=device), torch.ones(70, 4, device=device)
    target = torch.tensor([37, 0], device=device)
    nll, values = linear_nll(hidden, weight, target, bias=bias, stats=("entropy", "argmax"), backend=backend)
    assert nll.tolist() == [0.0, float("inf")]
    assert values["argmax"].tolist() == [37, 37] and values["entropy"].tolist() == [0.0, 0.0]


@every
def test_nll_is_no_difference_of_large_numbers(backend, device):
    """Logits of 2^20 and some are exact here, but float32 holds their log-sum-exp to 1/32."""
    draw = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 16, generator=draw).round().to(device) for n in (5, 70))
    bias = torch.full((70,), 2.0**20, device=device)
    target = torch.arange(5, device=device)
    nll = linear_nll(hidden, weight, target, bias=bias, backend=backend)
    exact = reference.linear_nll(hidden, weight, target)
    assert (nll - exact).abs().max() <= 1e-5


@every
def test_nan_is_shown_and_stays_in_its_row(backend, device):
    inputs = make(Case("nan", ignored="none"), torch.float32, device)
    clean = linear_nll(inputs.hidden, inputs.weight, inputs.target, backend=backend)
    inputs.hidden[2, 3] = float("nan")
    nll = linear_nll(inputs.hidden, inputs.weight, inputs.target, backend=backend)
    rest = [0, 1, 3, 4]
    assert nll[2].isnan() and torch.equal(nll[rest], clean[rest])


@every
def test_runs_repeat_bit_by_bit(backend, device):
    inputs = make(Case("again", N=50, D=100, V=700), torch.float32, device, grad=True)

    def run():
        nll = linear_nll(inputs.hidden, inputs.weight, inputs.target, backend=backend)
        return [nll.detach(), *torch.autograd.grad(nll.square().sum(), inputs.leaves())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(("backend", "device"), [r for r in RUNNERS if r[0] in ("cpu", "triton")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, backend, device):
    inputs = make(Case("rows", N=41, D=300, V=1003, ignored="none"), dtype, device)
    whole = linear_nll(inputs.hidden, inputs.weight, inputs.target, backend=backend)
    for rows in ([0], [40], [3, 17, 18, 29], list(range(7, 30))):
        part = linear_nll(inputs.hidden[rows], inputs.weight, inputs.target[rows], backend=backend)
        assert torch.equal(part, whole[rows])


def test_float32_products_survive_global_tf32(monkeypatch):
    inputs = make(Case("tf32", N=6, D=700, V=50), torch.float32)
    args = (inputs.hidden, inputs.weight, inputs.target)
    before = linear_nll(*args, backend="torch")
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(linear_nll(*args, backend="torch"), before)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("limit", [1 << 30, 4000, 100], ids=["rows outside", "columns outside", "two sweeps"])
def test_every_order_of_sums(limit, monkeypatch):
    """16-bit gradients choose the loop order by what can be buffered; the result may not depend on it."""
    monkeypatch.setattr(linear_nll_torch, "BUFFER_BYTES", limit)
    monkeypatch.setattr(linear_nll_torch, "tile_shape", lambda width: (7, 11))
    inputs = make(Case("orders", N=20, D=32, V=90, bias=True), torch.bfloat16, grad=True)
    args = (inputs.hidden, inputs.weight, inputs.target)
    found = torch.autograd.grad(linear_nll(*args, **inputs.options, backend="torch").sum(), inputs.leaves())
    exact = torch.autograd.grad(reference.linear_nll(*args, **inputs.options).sum(), inputs.leaves())
    for mine, truth in zip(found, exact, strict=True):
        assert (mine.double() - truth.double()).norm() <= 3e-3 * truth.double().norm()


def test_reference_passes_gradcheck():
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((4, 3), (6, 3)))
    bias = torch.randn(6, generator=draw, dtype=torch.float64)
    target = torch.tensor([0, 5, -100, 2])

    def values(hidden, weight, bias):
        nll, values = reference.linear_nll(
            hidden, weight, target, bias=bias, logit_scale=0.8, logit_softcap=2.0, stats=("lse", "entropy")
        )
        return nll, values["lse"], values["entropy"]

    assert torch.autograd.gradcheck(values, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_forward_mode_raises_instead_of_giving_zero():
    hidden, weight, target = torch.randn(5, 8), torch.randn(9, 8), torch.arange(5)
    calls = [
        lambda x: linear_nll(x, weight, target),
        lambda x: linear_cross_entropy(x, weight, target),
        lambda x: linear_vig(x, hidden, weight, target).vig,
        lambda x: gaussian_blur(x, 1.0),
        lambda x: gaussian_blur(x, 1.0, backend="reference"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(call, (hidden,), (torch.ones_like(hidden),))
    _, found = torch.func.jvp(
        lambda x: linear_nll(x, weight, target, backend="reference"), (hidden,), (torch.ones_like(hidden),)
    )
    assert found.any()


def test_meta_tensors_have_shapes():
    hidden, weight = torch.empty(2, 5, 8, device="meta"), torch.empty(9, 8, device="meta")
    target = torch.empty(2, 5, dtype=torch.long, device="meta")
    nll, stats = linear_nll(hidden, weight, target, stats=("lse", "argmax"), backend="torch")
    assert nll.shape == (2, 5) == stats["argmax"].shape and nll.is_meta
    with pytest.raises(ValueError, match="expected hidden on cpu"):
        linear_nll(hidden, torch.empty(9, 8), target)


@every
def test_certain_rows_have_no_gradient_however_few(backend, device):
    """The backward forms the logits as the forward did, or exp(logit - lse) would miss 1."""
    for rows in (1, 31, 32, 40):
        weight = torch.randn(512, 1024, device=device).bfloat16()
        target = torch.randint(0, 512, (rows,), device=device)
        hidden = (weight[target].float() * 2).bfloat16().requires_grad_()
        linear_nll(hidden, weight, target, backend=backend).sum().backward()
        assert not hidden.grad.any(), rows


def test_logits_are_summed_in_blocks():
    """The promise: at most 256 steps at a time. The GEMM of one machine may keep it by itself, another's may not."""

    seen = set()

    class Steps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.add(args[-1].shape[0])
            return func(*args, **(kwargs or {}))

    with Steps():
        linear_nll_torch.forward(HeadProblem(torch.randn(3, 700), torch.randn(9, 700), torch.arange(3)), ())
    assert seen == {256, 700 - 512}


@pytest.mark.parametrize("given", ["nll", "lse", "entropy", "all"])
def test_the_low_part_of_lse_goes_into_every_upstream(given):
    """What a backward makes of lse alone, with the upstreams of `with_lse_lo`, is the gradient at lse + lse_lo."""
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(5, 7, generator=draw).double()
    lse_lo = torch.randn(5, generator=draw).double() / 10
    lse, entropy = z.logsumexp(1) - lse_lo, -(z.softmax(1) * z.log_softmax(1)).sum(1)
    hit = torch.nn.functional.one_hot(torch.arange(5), 7)
    grads = [torch.randn(5, generator=draw).double() for _ in range(3)]
    if given != "all":
        grads = [
            g if name == given else None for g, name in zip(grads, ("nll", "lse", "entropy"), strict=True)
        ]

    def gradient(grads, log_p, entropy):
        nll, lse, spread = (torch.zeros(5, 1).double() if g is None else g[:, None] for g in grads)
        entropy = 0.0 if entropy is None else entropy[:, None]
        return log_p.exp() * (nll + lse - spread * (log_p + entropy)) - hit * nll

    upstream, saved = with_lse_lo(Upstream(*grads), Saved(lse, entropy), lse_lo)
    found = gradient(upstream, z - saved.lse[:, None], saved.entropy)
    torch.testing.assert_close(found, gradient(grads, z.log_softmax(1), entropy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ignored_rows_where_counting_them_would_stall(softcap, monkeypatch):
    """On a GPU that is not told `num_kept` the torch backend takes all rows along: they may hold anything."""
    for module in (linear_nll_torch, linear_cross_entropy_torch):
        monkeypatch.setattr(module, "compact", lambda problem: None)
    inputs = make(Case("dead", N=9, D=16, V=50, bias=True), torch.float32)
    hidden, weight, target, bias = inputs.hidden, inputs.weight, inputs.target, inputs.options["bias"]
    live = target != -100
    bias += 100.0 if softcap is None else 0.0  # e^100 is infinite
    hidden[~live], bias[0] = float("nan"), -float("inf")
    target[live] = target[live].clamp_min(1)
    upstream = torch.rand(3, 9, generator=torch.Generator().manual_seed(2))
    problem = HeadProblem(hidden, weight, target, bias, 1.3, softcap)
    stats, needs = ("lse", "entropy"), Needs()

    leaves = [x.double().requires_grad_() for x in (hidden[live], weight[1:], bias[1:])]  # word 0 is masked
    exact_options = {"bias": leaves[2], "logit_scale": 1.3, "logit_softcap": softcap}
    if softcap is not None:  # a cap makes -inf a word like others
        leaves = [x.double().requires_grad_() for x in (hidden[live], weight, bias.clamp_min(-1e30))]
        exact_options["bias"] = leaves[2]
    first = 50 - len(leaves[1])
    exact, values = reference.linear_nll(*leaves[:2], target[live] - first, stats=stats, **exact_options)

    def compare(found, loss):
        rows, *rest = torch.autograd.grad(loss, leaves, retain_graph=True)
        for mine, truth in zip(found, (rows, *rest), strict=True):
            mine = mine[live] if mine is found[0] else mine[first:]
            torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)
        assert not found[0][~live].any() and not found[1][:first].any()

    nll, saved = linear_nll_torch.forward(problem, stats)
    for mine, truth in zip((nll, *saved.values()), (exact, *values.values()), strict=True):
        torch.testing.assert_close(mine[live], truth.float(), rtol=1e-5, atol=3e-5)
        assert not mine[~live].any()
    found = linear_nll_torch.backward(Upstream(*upstream), Saved(*saved.values()), problem, needs)
    compare(
        found,
        sum((x * up[live]).sum() for x, up in zip((exact, *values.values()), upstream, strict=True)),
    )
    loss, *found = linear_cross_entropy_torch.forward_backward(problem, upstream[0], 0.01, needs)
    wanted = (upstream[0, live] * (exact + 0.01 * values["lse"].square())).sum()
    torch.testing.assert_close(loss, wanted.float())
    compare(found, wanted)


def test_one_thread_does_not_end_anothers_exact_products():
    class Switch:
        fp32_precision = "tf32"

    switch = Switch()
    exact = precision.held(switch, "fp32_precision", "ieee", "none")
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with exact:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with exact:
        assert switch.fp32_precision == "ieee"
    assert switch.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert switch.fp32_precision == "tf32"
    switch.fp32_precision = "none"
    with exact:
        assert switch.fp32_precision == "none"  # harmless as it is


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(8).to_sparse(), "to_dense"),
        (torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]), "nested"),
        (torch.eye(8).numpy(), "torch.Tensor"),
    ],
    ids=["sparse", "nested", "numpy"],
)
def test_hidden_states_that_are_no_dense_tensors(value, message):
    with pytest.raises(TypeError, match=message):
        linear_nll(value, torch.randn(9, 8), torch.arange(8))


@pytest.mark.parametrize("stats", [None, "lse", 3])
def test_stats_that_are_no_tuple(stats):
    with pytest.raises(TypeError, match="stats"):
        linear_nll(torch.randn(2, 8), torch.randn(9, 8), torch.arange(2), stats=stats)
