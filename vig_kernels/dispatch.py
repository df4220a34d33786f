"""Which backend runs an op: one table per op, best first, and one rule for choosing.

`backend="auto"` takes the first row whose `why_not(device)` is None. A named backend runs or raises
BackendUnavailable with the reason: it is never replaced in silence. The environment variable VIG_BACKEND
replaces "auto" (and only "auto") by a name.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch

OPS = ("linear_nll", "linear_vig", "linear_cross_entropy", "gaussian_blur")
BACKENDS = ("triton", "cpu", "torch", "reference")  # best first


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


@functools.cache
def _load(op: str, backend: str) -> ModuleType | str:
    """The module `vig_kernels.kernels.<backend>.<op>`, or the reason why there is none."""
    if backend == "reference":
        return importlib.import_module("vig_kernels.reference")
    name = f"vig_kernels.kernels.{backend}.{op}"
    if find_spec(f"vig_kernels.kernels.{backend}") is None or find_spec(name) is None:
        return "not part of this build"
    try:
        return importlib.import_module(name)
    except ImportError as error:  # an optional package (triton) is absent or does not fit this machine
        return f"cannot be imported: {error}"


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """None when `backend` can run `op` on tensors of `device`, else the reason."""
    module = _load(op, backend)
    return module if isinstance(module, str) else module.why_not(device)


def table(op: str) -> list[tuple[str, Callable[[torch.device], str | None], Callable[[], ModuleType | str]]]:
    """Rows (name, why_not, load), best first."""
    return [
        (name, functools.partial(why_not, op, name), functools.partial(_load, op, name)) for name in BACKENDS
    ]


def module(op: str, backend: str) -> ModuleType:
    """The module of a backend that `resolve` has returned."""
    found = _load(op, backend)
    if isinstance(found, str):
        raise BackendUnavailable(f"{op}: backend {backend!r}: {found}")
    return found


def named(backend: str) -> tuple[str, str]:
    """The name that counts, VIG_BACKEND for "auto" where it is set, and who gave it. ValueError for none of them."""
    source = f"backend={backend!r}"
    if backend == "auto" and os.environ.get("VIG_BACKEND"):
        backend = os.environ["VIG_BACKEND"]
        source = f"VIG_BACKEND={backend}"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} is not one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return backend, source


@torch.compiler.assume_constant_result
def resolve(op: str, backend: str, device: torch.device) -> str:
    """The name of the backend to run `op` with on `device`; BackendUnavailable when there is none."""
    backend, source = named(backend)
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = []
    for name in names:
        reason = why_not(op, name, device)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(f"{op} cannot run on {device} with {source}; " + "; ".join(reasons))


def devices() -> list[torch.device]:
    """The CPU and the accelerators that torch sees here."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        found.append(torch.accelerator.current_accelerator())
    return found


class Availability(dict[tuple[str, str, str], str | None]):
    """{(op, backend, device type): None when it can run, else the reason}, best backend first; shown as a table."""

    def __repr__(self) -> str:
        rows = [("op", "backend", "device", "state"), *map(self._row, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows)
        return "\n".join("  ".join([*cells, row[3]]) for cells, row in zip(padded, rows, strict=True))

    def _row(self, key: tuple[str, str, str]) -> tuple[str, str, str, str]:
        op, backend, device = key
        state = "available" if self[key] is None else f"no: {self[key]}"
        return *key, state + (', taken by "auto"' if _taken(op, device) == backend else "")


def _taken(op: str, device: str) -> str | None:
    """What "auto" takes, under VIG_BACKEND if it is set."""
    try:
        return resolve(op, "auto", torch.device(device))
    except (ValueError, BackendUnavailable):
        return None


def backends() -> Availability:
    """Which op runs on which backend and device here, and why not where it does not."""
    return Availability(
        {
            (op, name, device.type): reason_of(device)
            for op in OPS
            for name, reason_of, _ in table(op)
            for device in devices()
        }
    )
