"""`python tests/triton/host_time.py`: what a call of an op costs the host beyond its launches, without a GPU.

The host code runs on small CPU tensors under the driver of launches.py and takes every turn that it takes for a GPU's.
Launches of Triton kernels and the vendor's two products do nothing, and what their stand-ins take is subtracted: left
are the checks, the dispatch through torch.library and autograd, the allocations, and the small torch operations of a
call. Prints, for each op, its launches and the median microseconds of a call. Medians of a quiet machine; the lowest
tenth beside them says how quiet it was.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import launches
import torch
from triton.runtime.jit import JITFunction

import vig_kernels
from vig_kernels import check
from vig_kernels.kernels.triton import logit_gradients
from vig_kernels.ops import linear_cross_entropy

N, D, V = 8, 64, 304


class Launches:
    """Takes the place of every launch: keeps the names, and the time that the stand-in itself takes."""

    def __init__(self):
        self.names, self.seconds, self.launchers = [], 0.0, {}
        JITFunction.__getitem__ = lambda kernel, grid: self.launcher_of(kernel)
        for name in ("addmm_16_bit", "mm_bfloat16"):
            setattr(logit_gradients, name, lambda *arguments, name=name: self.take(name, arguments))

    def launcher_of(self, kernel: JITFunction):
        """What stands for kernel[grid], whose own layers of Python are part of a launch."""
        if id(kernel) not in self.launchers:  # its own hash is a hash of its source
            name = kernel.fn.__name__
            self.launchers[id(kernel)] = lambda *arguments, **_: self.take(name, arguments)
        return self.launchers[id(kernel)]

    def take(self, name: str, arguments: tuple) -> None:
        began = time.perf_counter()
        self.names.append(name)
        if name == "order_kernel":  # the one kernel whose result the host code needs in range
            _, order, count, *_ = arguments
            torch.arange(len(order), out=order)
            count.fill_(len(order))
        self.seconds += time.perf_counter() - began


def calls() -> dict:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D).bfloat16() for n in (N, V))
    target = torch.randint(0, V, (N,))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]

    def train():
        for leaf in leaves:
            leaf.grad = None
        vig_kernels.linear_cross_entropy(
            *leaves, target, num_kept=N, num_items=N, backend="triton"
        ).backward()

    return {
        "linear_nll": lambda: vig_kernels.linear_nll(hidden, weight, target, backend="triton"),
        "linear_vig": lambda: vig_kernels.linear_vig(hidden, hidden, weight, target, backend="triton"),
        "linear_cross_entropy, forward and backward": train,
    }


def as_on_a_gpu() -> None:
    """No value is looked at, and budgets and divisors are those of a GPU."""
    launches.pretend("sm_90")
    check.on_cpu = lambda value: False
    linear_cross_entropy._fast_budget = lambda device: linear_cross_entropy.GPU_MIB << 20


def measured(call, seen: Launches, rounds: int) -> dict:
    for _ in range(20):
        call()
    seen.names.clear()
    call()
    names, microseconds = list(seen.names), []
    for _ in range(rounds):
        seen.seconds, began = 0.0, time.perf_counter()
        call()
        microseconds.append(1e6 * (time.perf_counter() - began - seen.seconds))
    lowest = sorted(microseconds)[rounds // 10]
    return {"launches": names, "microseconds": statistics.median(microseconds), "lowest_tenth": lowest}


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_on_a_gpu()
    seen = Launches()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name, call in calls().items():
        print(json.dumps({"op": name} | measured(call, seen, rounds)))
