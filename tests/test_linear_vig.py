"""linear_vig against float64, and its promises: bits of linear_nll, exact zero for equal passes."""

import pytest
import torch
from cases import CASES, DTYPES, bound, make, runners

from vig_kernels import linear_nll, linear_vig, reference

RUNNERS = runners("linear_vig")
every = pytest.mark.parametrize(("backend", "device"), RUNNERS)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, backend, device):
    inputs = make(case, dtype, device)
    null = make(case, dtype, device, seed=1).hidden
    args = (inputs.weight, inputs.target)
    found = linear_vig(inputs.hidden, null, *args, **inputs.options, backend=backend)
    vig, nll_image, nll_null = reference.linear_vig(inputs.hidden, null, *args, **inputs.options)
    image_limit, null_limit = bound(inputs), bound(inputs, null)
    assert {t.dtype for t in found} == {torch.float32}
    assert ((found.nll_image - nll_image).abs() <= image_limit).all()
    assert ((found.nll_null - nll_null).abs() <= null_limit).all()
    assert ((found.vig - vig).abs() <= image_limit + null_limit).all()
    assert torch.equal(found.vig, found.nll_null - found.nll_image)
    alone = linear_nll(inputs.hidden, *args, **inputs.options, backend=backend)
    assert torch.equal(found.nll_image, alone), "the bits of linear_nll"


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_passes_give_exactly_zero(dtype, backend, device):
    for case in CASES:
        inputs = make(case, dtype, device)
        copy = torch.empty(inputs.hidden.numel() + 1, dtype=dtype, device=device)[1:].view(
            inputs.hidden.shape
        )
        copy.copy_(inputs.hidden)  # another alignment, other strides
        found = linear_vig(
            inputs.hidden, copy, inputs.weight, inputs.target, **inputs.options, backend=backend
        )
        assert torch.equal(found.vig, torch.zeros_like(found.vig)), case.name


@every
def test_equal_passes_give_zero_for_an_impossible_token_too(backend, device):
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(11, 8, device=device)
    bias = torch.zeros(11, device=device)
    bias[4] = float("-inf")
    target = torch.tensor([4, 0, -100], device=device)
    for name in (backend, "reference"):
        found = linear_vig(hidden, hidden.clone(), weight, target, bias=bias, backend=name)
        assert found.nll_image[0] == float("inf") and found.vig.tolist() == [0.0, 0.0, 0.0]


@every
def test_shape_and_no_gradient(backend, device):
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(11, 8, device=device, requires_grad=True)
    target = torch.tensor([[1, -100, 10], [0, 4, -100]], device=device)
    found = linear_vig(hidden, hidden + 1, weight, target, backend=backend)
    assert all(t.shape == (2, 3) and not t.requires_grad for t in found)
    assert (found.vig[target == -100] == 0).all() and (found.vig[target >= 0] != 0).all()
