"""`python -m vig_kernels`: which op runs on which backend and device here, and why not where it does not."""

from __future__ import annotations

import argparse
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import vig_kernels
from vig_kernels import backend_table


def compiled_part() -> list[str]:
    """What the C++ part of the package offers here, or what is missing."""
    from vig_kernels.kernels.cpu import native

    if native.module() is None:
        return [f"compiled part: missing: {native.why_not()}"]
    try:
        lines = [f"compiled part: present, uses {native.isa()}"]
    except ValueError as error:
        lines = [f"compiled part: present, but every call raises: {error}"]
    lines += [
        f"  {name}: {'available' if reason is None else reason}" for name, reason in native.isas().items()
    ]
    return lines + ([f"  {native.machine_note()}"] if native.machine_note() else [])


def environment() -> list[str]:
    """What VIG_BACKEND does to backend="auto", if it is set."""
    from vig_kernels import dispatch

    if not os.environ.get("VIG_BACKEND"):
        return []
    try:
        dispatch.named("auto")
    except ValueError as error:
        return [f'{error}: every call with backend="auto" raises']
    return [f'VIG_BACKEND={os.environ["VIG_BACKEND"]} stands for "auto"']


def foreign_vig() -> list[str]:
    """Who else has a package `vig`, the name of the pipeline's: nothing, or what to do about it."""
    ours = Path(vig_kernels.__file__).resolve().parents[1] / "vig"
    spec = find_spec("vig")
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if found is not None and found.parent != ours:
        return [
            f"package vig: `import vig` finds {found}, not this project's {ours}. Remove it from the path, or work in "
            "an environment of its own"
        ]
    others = sorted(set(metadata.packages_distributions().get("vig", ())) - {"vig-kernels"})
    return [
        f"package vig: {name} installs one too, into the same folder, and one has overwritten the other: `pip "
        f"uninstall {name}`, then `pip install --force-reinstall --no-deps vig-kernels`"
        for name in others
    ]


def backend_lines() -> str:
    """The backends and where they run, best first."""
    return "backends, best first:\n" + "\n".join(
        f"  {backend.name:<10} {backend.runs_on}" for backend in backend_table.BACKENDS.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m vig_kernels",
        description=__doc__.partition(": ")[2].capitalize(),
        epilog=backend_lines(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vig-kernels {vig_kernels.__version__}")
    parser.parse_args()
    import torch  # help and version do not wait for it

    from vig_kernels import dispatch

    devices = ", ".join(device.type for device in dispatch.devices())
    lines = [f"torch {torch.__version__}; devices: {devices}"]
    lines += compiled_part() + environment() + foreign_vig() + [backend_lines(), str(dispatch.backends())]
    print("\n".join([*lines, ""]), end="")  # one write: `| head` then closes no pipe between two lines


if __name__ == "__main__":
    main()
