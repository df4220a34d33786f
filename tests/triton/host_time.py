"""`python tests/triton/host_time.py`: what a call of an op costs the host beyond its launches, without a GPU.

The host code runs on small CPU tensors under the driver of launches.py and takes every turn that it takes for a GPU's.
Launches of Triton kernels and the vendor's two products do nothing, and what their stand-ins take is subtracted: the
launches of a call are made once more, on their own, behind it. Left are the checks, the dispatch through torch.library
and autograd, the allocations, and the small torch operations of a call. Prints, for each op, its launches, the median
microseconds of a call, and those that were subtracted.

A virtual machine's core slows down by half while its neighbours work, for seconds at a time. So a fixed piece of Python
is timed before and behind each call, and `quiet` is the median over the rounds in which that took at most a tenth more
than the least of it in the whole run; `quiet_rounds` says how many there were.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import NamedTuple

import launches
import torch
from triton.runtime.jit import JITFunction

import vig_kernels
from vig_kernels import check
from vig_kernels.kernels.triton import logit_gradients
from vig_kernels.ops import linear_cross_entropy

N, D, V = 8, 64, 304
NOISE = 1.1  # times the yardstick's least


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


class Round(NamedTuple):
    """Microseconds."""

    call: float
    launches: float  # the stand-ins' part of it
    yardstick: float  # the slower of two


def yardstick() -> float:
    began = time.perf_counter()
    [str(number) for number in range(100)]
    return 1e6 * (time.perf_counter() - began)


def rounds_of(call, seen: Launches, count: int) -> list[Round]:
    rounds = []
    for _ in range(count):
        before, began = yardstick(), time.perf_counter()
        call()
        between = time.perf_counter()
        seen.again()
        ended = time.perf_counter()
        rounds.append(Round(1e6 * (between - began), 1e6 * (ended - between), max(before, yardstick())))
    return rounds


def beyond_launches(rounds: list[Round]) -> dict[str, float]:
    launches = statistics.median(r.launches for r in rounds)
    return {"microseconds": statistics.median(r.call for r in rounds) - launches, "subtracted": launches}


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_on_a_gpu()
    seen = Launches()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    found = {}
    for name, call in calls().items():
        for _ in range(20):
            call()
        found[name] = seen.record(call), rounds_of(call, seen, rounds)
    least = min(r.yardstick for _, timed in found.values() for r in timed)
    for name, (names, timed) in found.items():
        quiet = [r for r in timed if r.yardstick <= NOISE * least]
        row = {"op": name, "launches": names} | beyond_launches(timed) | {"quiet_rounds": len(quiet)}
        print(json.dumps(row | ({"quiet": beyond_launches(quiet)["microseconds"]} if quiet else {})))
