"""A GPU's clock, memory and kernels; in a rehearsal the CPU's clock stands in."""

from __future__ import annotations

import functools
import gc
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness

FLUSH_BYTES = 256 * 2**20  # larger than any L2 cache
CYCLES_S = 2.0e9  # of torch.cuda._sleep: no GPU runs faster, so a sleep is never shorter than asked for
SLEEP_S, LONGEST_SLEEP_S = 1e-3, 60e-3
CALLS = 5
SHOWN = 6  # kernels named in a row
DATA_MOVES = re.compile(r"^(Memcpy|Memset)|memcpy|memset", re.I)


class DeviceLost(BaseException):
    """The device's context is broken, by an illegal access for one: nothing more can run in this process."""


def lost() -> str | None:
    """None, or what the device says where it takes no more work."""
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def guarded(function: Callable) -> Callable:
    """The function; DeviceLost where it leaves a broken device behind."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except Exception as error:
            if lost():
                raise DeviceLost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
            raise

    return call


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


class EventClock:
    """Milliseconds of device time a call, the L2 cache overwritten before each.

    The device sleeps while the host enqueues the call, so that it never waits for a launch in between. The sleep
    follows the host's time of the callable's last call; a callable that itself waits for the device keeps its gaps.
    """

    def __init__(self):
        self.host_s: OrderedDict[int, float] = OrderedDict()

    def __call__(self, run: Callable[[], Any], calls: int) -> float:
        return sum(self._one(run) for _ in range(calls)) / calls

    def _one(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep_s = min(LONGEST_SLEEP_S, max(SLEEP_S, 1.5 * self.host_s.get(id(run), 0.0)))
        _flush_buffer().zero_()
        torch.cuda._sleep(int(sleep_s * CYCLES_S))
        start.record()
        begun = time.perf_counter()
        run()
        self.host_s[id(run)] = time.perf_counter() - begun
        end.record()
        self._wait()
        return start.elapsed_time(end)

    @staticmethod
    def _wait() -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error).strip().splitlines()[0]) from error


def clock(kind: str) -> Callable[[Callable[[], Any], int], float]:
    return EventClock() if kind == "cuda" else harness.wall_clock


def call_ms(run: Callable[[], Any]) -> float:
    """The clock's time of one call on an idle device, to its end: launches, gaps and host work included. Median."""
    samples = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) * 1e3)
    return harness.quantile(samples, 0.5)


def peak_mib(run: Callable[[], Any]) -> float:
    """Peak of the allocator during a call, less what stood before and the outputs."""
    from benchmarks.memory import MIB, output_bytes

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes(output)) / MIB


def kernels(run: Callable[[], Any]) -> list[str]:
    """Names of the kernels that took longest in one call, longest first; [] where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        events = found.key_averages()
    except Exception as error:  # without CUPTI, or beside another profiler
        print(f"no profile: {type(error).__name__}: {error}", flush=True)
        return []
    timed = [(event.device_time_total, event.key) for event in events if not DATA_MOVES.search(event.key)]
    return [name[:120] for spent, name in sorted(timed, reverse=True) if spent > 0][:SHOWN]


def path_of(names: list[str]) -> str:
    """Which code a row really ran, by its kernels: "CuTe path", "Triton path" or "vendor and torch kernels"."""
    if not names:
        return ""
    if any(name.startswith("kernel_cutlass") or "cute_dsl" in name for name in names):
        return "CuTe path"
    if any(re.fullmatch(r"[a-z_]\w*", name) and not _vendor(name) for name in names):
        return "Triton path"
    return "vendor and torch kernels"


def _vendor(name: str) -> bool:
    return re.match(r"(sm\d+_|nvjet|ampere_|hopper_|cutlass|cublas|gemm|Cijk)", name) is not None


def beside(kind: str, peaks: bool = True) -> dict[str, Callable[[Callable[[], Any]], Any]]:
    """Further fields of a row that was timed."""
    if kind != "cuda":
        return {"call_ms": lambda run: harness.wall_clock(run, 1), "kernels": lambda run: []}
    return {"call_ms": call_ms, "kernels": kernels} | ({"peak_mib": peak_mib} if peaks else {})


def release(kind: str) -> None:
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()


def wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
