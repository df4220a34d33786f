"""Statistics beside VIG against float64: KL between the passes, entropy and argmax of each."""

import pytest
import torch
from cases import CASES, DTYPES, Case, bound, make, runners

from vig_kernels import linear_nll, linear_vig, reference

STATS = ("kl", "entropy_image", "entropy_null", "argmax_image", "argmax_null")
every = pytest.mark.parametrize(("backend", "device"), runners("linear_vig"))


def pair(case, dtype, device):
    """Inputs and hidden states of a null pass that are near the image's in some rows and far in others."""
    inputs = make(case, dtype, device)
    other = make(case, dtype, device, seed=1).hidden
    share = torch.linspace(0, 1, case.N, device=device).unsqueeze(1)
    return inputs, (inputs.hidden.float() * (1 - share) + other.float() * share).to(dtype)


def swept(function, inputs, null, **more):
    return function(inputs.hidden, null, inputs.weight, inputs.target, **inputs.options, stats=STATS, **more)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, backend, device):
    inputs, null = pair(case, dtype, device)
    (found, values), (_, exact) = (
        swept(linear_vig, inputs, null, backend=backend),
        swept(reference.linear_vig, inputs, null),
    )
    plain = linear_vig(inputs.hidden, null, inputs.weight, inputs.target, **inputs.options, backend=backend)
    alone = linear_nll(inputs.hidden, inputs.weight, inputs.target, **inputs.options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    if backend == "cpu":
        assert torch.equal(found.nll_image, alone)
    bounds = {"image": bound(inputs), "null": bound(inputs, null)}
    both = 1e-5 + 2 * (bounds["image"] + bounds["null"] - 2e-5)
    assert values["kl"].dtype == torch.float32 and (values["kl"] >= 0).all()
    assert ((values["kl"].double() - exact["kl"]).abs() <= both).all()
    options = {name: value for name, value in inputs.options.items() if name != "ignore_index"}
    for name, hidden in (("image", inputs.hidden), ("null", null)):
        entropy, argmax = values[f"entropy_{name}"], values[f"argmax_{name}"]
        assert ((entropy.double() - exact[f"entropy_{name}"]).abs() <= bounds[name]).all()
        kept = exact[f"argmax_{name}"] >= 0
        assert torch.equal(argmax >= 0, kept)
        logits = reference.linear_logits(hidden, inputs.weight, **options)[kept]
        if len(logits):
            chosen = logits.gather(1, argmax[kept, None])[:, 0]
            assert (logits.amax(1) - chosen <= 2 * bounds[name][kept]).all()


@every
@pytest.mark.parametrize("stats", [("kl",), ("argmax_null", "kl"), ("entropy_image",)], ids=str)
def test_some_of_them_are_the_same(stats, backend, device):
    """kl as it is with all others to rounding; order, shape and ignored rows as asked."""
    inputs, null = pair(Case("some", N=30, D=70, V=700, bias=True), torch.float32, device)
    _, every_one = swept(linear_vig, inputs, null, backend=backend)
    shape = (5, 6)
    _, found = linear_vig(
        inputs.hidden.reshape(*shape, 70),
        null.reshape(*shape, 70),
        inputs.weight,
        inputs.target.reshape(shape),
        **inputs.options,
        stats=stats,
        backend=backend,
    )
    assert list(found) == list(stats)
    for name, value in found.items():
        assert value.shape == shape
        torch.testing.assert_close(value.flatten(), every_one[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="stats='lse' is not one of 'kl', 'entropy_image'"):
        linear_vig(inputs.hidden, null, inputs.weight, inputs.target, stats=("lse",), backend=backend)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_passes_have_no_divergence(dtype, backend, device):
    inputs = make(Case("equal", N=13, D=300, V=999, scale=9.0, bias=True), dtype, device)
    _, found = swept(linear_vig, inputs, inputs.hidden.clone(), backend=backend)
    assert not found["kl"].any()
    assert torch.equal(found["entropy_image"], found["entropy_null"])


@every
def test_words_that_the_bias_rules_out_add_nothing(backend, device):
    inputs, null = pair(Case("masked", N=9, D=40, V=300, bias=True), torch.float32, device)
    inputs.options["bias"][50:200] = float("-inf")
    inputs.target[:] = torch.where(inputs.target >= 0, inputs.target % 50, inputs.target)
    _, values = swept(linear_vig, inputs, null, backend=backend)
    _, exact = swept(reference.linear_vig, inputs, null)
    torch.testing.assert_close(values["kl"].double(), exact["kl"], rtol=1e-5, atol=3e-5)
    assert exact["kl"].isfinite().all() and exact["kl"].any()


@every
def test_more_rows_than_a_chunk_and_deeper_than_a_panel(backend, device):
    for case in (Case("rows", N=4500, D=5, V=40), Case("deep", N=14, D=9001, V=70)):
        inputs, null = pair(case, torch.float32, device)
        _, values = swept(linear_vig, inputs, null, backend=backend)
        _, exact = swept(reference.linear_vig, inputs, null)
        both = 1e-5 + 2 * (bound(inputs) + bound(inputs, null) - 2e-5)
        assert ((values["kl"].double() - exact["kl"]).abs() <= both).all()
