"""torch.compile(fullgraph=True): the forward for a CUDA target by fake tensors, forward and backward on the CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vig_kernels import gaussian_blur, linear_cross_entropy, linear_nll, linear_vig

OPS = {
    "linear_nll": lambda h, w, t: linear_nll(h, w, t, stats=("lse", "entropy"), backend="triton"),
    "linear_vig": lambda h, w, t: linear_vig(h, h, w, t, backend="triton"),
    "linear_cross_entropy": lambda h, w, t: linear_cross_entropy(h, w, t, backend="triton"),
}


def values(result):
    """The tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result for tensor in (item.values() if isinstance(item, dict) else [item])]


@pytest.mark.parametrize("op", OPS)
def test_forward_is_traced_for_cuda(op):
    with FakeTensorMode():
        hidden = torch.empty(6, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(100, 64, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(6, device="cuda", dtype=torch.long)
        found = values(torch.compile(OPS[op], fullgraph=True, backend="eager")(hidden, weight, target))
    assert all(tensor.device.type == "cuda" and tensor.dtype == torch.float32 for tensor in found)
    assert all(tensor.shape == (() if op == "linear_cross_entropy" else (6,)) for tensor in found)


def test_blur_is_traced_for_cuda():
    with FakeTensorMode():
        images = torch.empty(2, 3, 16, 16, device="cuda", dtype=torch.uint8)
        blur = torch.compile(
            lambda x: gaussian_blur(x, 2.0, backend="triton"), fullgraph=True, backend="eager"
        )
        found = blur(images)
    assert found.shape == images.shape and found.dtype == torch.uint8 and found.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["linear_nll", "linear_cross_entropy"])
def test_forward_and_backward_compile_on_the_cpu(op, dtype):
    """In bfloat16 the loss keeps a block, from which the backward forms the weight's gradient."""
    torch.manual_seed(0)
    drawn, target = torch.randn(30, 16).to(dtype), torch.tensor([1, 29, -100, 4])
    gradients = []
    for function in (OPS[op], torch.compile(OPS[op], fullgraph=True, backend="aot_eager")):
        hidden = torch.arange(64.0).reshape(4, 16).sin().to(dtype).requires_grad_()
        weight = drawn.clone().requires_grad_()
        sum(value.sum() for value in values(function(hidden, weight, target))).backward()
        gradients.append(torch.cat([hidden.grad, weight.grad]))
    assert torch.equal(*gradients) and gradients[0][:4].any() and gradients[0][4:].any()


def test_inductor_compiles_forward_and_backward_on_the_cpu():
    def objective(hidden, weight, target):
        hidden = torch.tanh(hidden)
        return sum(value.sum() for op in OPS for value in values(OPS[op](hidden, weight, target)))

    torch.manual_seed(0)
    weight, target = torch.randn(30, 16), torch.tensor([1, 29, -100, 4])
    gradients = []
    for function in (objective, torch.compile(objective, fullgraph=True)):
        hidden = torch.arange(64.0).reshape(4, 16).sin().requires_grad_()
        function(hidden, weight, target).backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()
