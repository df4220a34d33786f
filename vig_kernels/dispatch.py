"""Which backend runs an op: one table (backend_table.py), best first, and one rule for choosing.

`backend="auto"` takes the first row whose `why_not(device)` is None. A named backend runs or raises
BackendUnavailable with the reason: it is never replaced in silence. The environment variable VIG_BACKEND
replaces "auto" (and only "auto") by a name.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import torch

from vig_kernels import backend_table


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


@functools.cache
def _package(backend: str) -> ModuleType:
    return importlib.import_module(backend_table.BACKENDS[backend].package)


@functools.cache
def _load(op: str, backend: str) -> ModuleType | str:
    """The module of an op in the package of a backend, or the reason why there is none."""
    package = _package(backend)
    if not hasattr(package, "__path__"):  # a module that holds all ops: the reference
        return package
    name = f"{package.__name__}.{op}"
    if find_spec(name) is None:
        return "not part of this build"
    try:
        return importlib.import_module(name)
    except ImportError as error:  # something that it needs does not fit this machine
        return f"cannot be imported: {error}"


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """None when `backend` can run `op` on tensors of `device`, else the reason."""
    reason = _package(backend).why_not(device)
    if reason is not None:
        return reason
    module = _load(op, backend)
    return module if isinstance(module, str) else None


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
    if backend != "auto" and backend not in backend_table.BACKENDS:
        raise ValueError(f"{source} is not one of 'auto', {', '.join(map(repr, backend_table.BACKENDS))}")
    return backend, source


@torch.compiler.assume_constant_result
def resolve(op: str, backend: str, device: torch.device) -> str:
    """The name of the backend to run `op` with on `device`; BackendUnavailable when there is none."""
    backend, source = named(backend)
    names = backend_table.BACKENDS if backend == "auto" else (backend,)
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
            (op, name, device.type): why_not(op, name, device)
            for op in backend_table.OPS
            for name in backend_table.BACKENDS
            for device in devices()
        }
    )
