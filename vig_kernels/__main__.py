"""`python -m vig_kernels`: which op runs on which backend and device here, and why not where it does not."""

from __future__ import annotations

import torch

from vig_kernels import dispatch, native


def compiled_part() -> list[str]:
    """What the C++ part of the package offers here, or what is missing."""
    if native.module() is None:
        return [f"compiled part: missing: {native.why_not()}"]
    lines = [f"compiled part: present, uses {native.isa()}"]
    lines += [
        f"  {name}: {'available' if reason is None else reason}" for name, reason in native.isas().items()
    ]
    return lines + ([f"  {native.machine_note()}"] if native.machine_note() else [])


def main() -> None:
    print(f"torch {torch.__version__}; devices: {', '.join(device.type for device in dispatch.devices())}")
    print("\n".join(compiled_part()))
    rows = [("op", "backend", "device", "state"), *_states()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]]))


def _states():
    chosen = set()
    for (op, backend, device), reason in dispatch.backends().items():
        state = f"no: {reason}"
        if reason is None:
            state = "available" if (op, device) in chosen else 'available, taken by "auto"'
            chosen.add((op, device))
        yield op, backend, device, state


if __name__ == "__main__":
    main()
