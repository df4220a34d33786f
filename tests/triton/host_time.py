"""`python tests/triton/host_time.py`: what a call of an op costs the host beyond its launches, without a GPU.

The host code runs on small CPU tensors under the driver of launches.py and takes every turn that it takes for a GPU's.
Launches of Triton kernels and the vendor's two products do nothing, and what their stand-ins take is subtracted: the
launches of a call are made once more, on their own, behind it. Left are the checks, the dispatch through torch.library
and autograd, the allocations, and the small torch operations of a call. Prints, for each op, its launches, the median
microseconds of a call, and those that were subtracted. Medians of a quiet machine; the lowest tenth beside them says
how quiet it was.
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
    """Takes the place of every launch; makes those that it recorded again."""

    def __init__(self):
        self.recorded, self.is_recording, self.launchers = [], False, {}
        JITFunction.__getitem__ = lambda kernel, grid: self.launcher_of(kernel)
        for name in ("addmm_16_bit", "mm_bfloat16"):
            setattr(logit_gradients, name, self.stand_in(name))

    def launcher_of(self, kernel: JITFunction):
        """What stands for kernel[grid], whose own layers of Python are part of a launch."""
        if id(kernel) not in self.launchers:  # its own hash is a hash of its source
            self.launchers[id(kernel)] = self.stand_in(kernel.fn.__name__, kernel)
        return self.launchers[id(kernel)]

    def stand_in(self, name: str, kernel: JITFunction | None = None):
        def launch(*arguments, **options):
            if self.is_recording:
                self.recorded.append((name, kernel, arguments, options))
            if name == "order_kernel":  # the one kernel whose result the host code needs in range
                _, order, count, *_ = arguments
                torch.arange(len(order), out=order)
                count.fill_(len(order))

        return launch

    def record(self, call) -> list[str]:
        """The names of what a call launches."""
        self.recorded, self.is_recording = [], True
        call()
        self.is_recording = False
        return [name for name, *_ in self.recorded]

    def again(self) -> None:
        for name, kernel, arguments, options in self.recorded:
            launch = getattr(logit_gradients, name) if kernel is None else kernel[(1,)]
            launch(*arguments, **options)


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
    names, whole, launching = seen.record(call), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        between = time.perf_counter()
        seen.again()
        whole.append(1e6 * (between - began))
        launching.append(1e6 * (time.perf_counter() - between))
    taken = statistics.median(launching)
    return {
        "launches": names,
        "microseconds": statistics.median(whole) - taken,
        "lowest_tenth": sorted(whole)[rounds // 10] - taken,
        "subtracted": taken,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_on_a_gpu()
    seen = Launches()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name, call in calls().items():
        print(json.dumps({"op": name} | measured(call, seen, rounds)))
