"""`python tests/triton/launches.py TARGET`: every Triton launch as a GPU would see it, without a GPU.

The host code of all ops runs on CPU tensors under a driver that claims to be TARGET. Triton binds, specialises and
compiles each launch for it, with the arguments that the ops really give; then nothing is launched. Prints how many
programs were compiled of each kernel. What the kernels compute is the business of the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict

import torch
import triton
from triton.runtime.jit import JITFunction

import vig_kernels
from benchmarks.static_kernels import TARGETS
from vig_kernels.kernels import triton as triton_backend
from vig_kernels.kernels.triton import gaussian_blur as gaussian_blur_triton
from vig_kernels.kernels.triton import (
    kept_block,
    launch,
    logit_fold,
    logit_gradients,
    loss_sum,
    pair_fold,
    row_order,
    target_residual,
    tile_configs,
)
from vig_kernels.kernels.triton import linear_cross_entropy as linear_cross_entropy_triton
from vig_kernels.kernels.triton import linear_nll as linear_nll_triton
from vig_kernels.kernels.triton import linear_vig as linear_vig_triton

MODULES = (
    gaussian_blur_triton, kept_block, launch, linear_cross_entropy_triton, linear_nll_triton, linear_vig_triton,
    logit_fold, logit_gradients, loss_sum, pair_fold, row_order, target_residual, tile_configs, triton_backend,
)  # fmt: skip
HEADS = (  # dtype, N, D, V, elements between rows
    (torch.bfloat16, 40, 64, 304, 0),  # what tensor descriptors and loads without masks are for
    (torch.float16, 9, 33, 130, 3),
    (torch.float32, 5, 1, 9, 0),  # sizes and strides of 1 are constants to Triton
)


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: str):
        self.target = TARGETS[target]

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(target: str) -> dict[str, set[str]]:
    """Makes this process a GPU's; returns the hashes of the programs that get compiled, by kernel."""
    triton.runtime.driver.set_active(Driver(target))
    given = {
        "target_of": lambda device: target,
        "why_not": lambda device: None,
        "device_guard": lambda device: contextlib.nullcontext(),
    }
    for module in MODULES:
        for name in given.keys() & vars(module).keys():
            setattr(module, name, given[name])
    compiled, launch = defaultdict(set), JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        program = launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled[self.fn.__name__].add(program.hash)
        if self.fn.__name__ == "order_kernel":  # the one kernel whose result the host code needs in range
            _, order, count, *_ = arguments
            count.fill_(len(torch.arange(len(order), out=order)))
        return program

    JITFunction.run = compile_only
    return compiled


def heads() -> None:
    for dtype, N, D, V, gap in HEADS:
        hidden = torch.randn(N, D + gap).to(dtype)[:, :D].requires_grad_()
        weight = torch.randn(V, D + gap).to(dtype)[:, :D].requires_grad_()
        target = torch.randint(0, V, (N,))
        target[::3] = -100
        options = {
            "bias": torch.randn(V).to(dtype).requires_grad_(),
            "logit_softcap": 30.0,
            "logit_scale": 0.5,
        }
        vig_kernels.linear_nll(hidden, weight, target, backend="triton").sum().backward()
        stats = ("lse", "entropy", "argmax")
        nll, values = vig_kernels.linear_nll(hidden, weight, target, stats=stats, backend="triton", **options)
        (nll + values["lse"] + values["entropy"]).sum().backward()
        vig_kernels.linear_vig(hidden, hidden, weight, target, stats=("kl",), backend="triton")
        vig_kernels.linear_vig(hidden, hidden, weight, target, stats=("kl",), backend="triton", **options)
        more = {"z_loss": 1e-4, "token_weight": torch.rand(N)} | options
        for memory, extra in (("fast", {}), ("fast", more), ("low", {})):
            loss = vig_kernels.linear_cross_entropy(
                hidden, weight, target, memory=memory, backend="triton", **extra
            )
            loss.backward()


def pictures() -> None:
    for dtype, precision in (
        (torch.uint8, "float32"),
        (torch.float32, "float32"),
        (torch.bfloat16, "fast"),
        (torch.uint8, "fast"),
    ):
        images = (torch.rand(2, 3, 40, 48) * 255).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = images.contiguous(memory_format=layout)
            vig_kernels.gaussian_blur(laid_out, 2.0, precision=precision, backend="triton")


if __name__ == "__main__":
    torch.manual_seed(0)
    programs = pretend(sys.argv[1])
    heads()
    pictures()
    print(json.dumps({name: len(hashes) for name, hashes in programs.items()}))
