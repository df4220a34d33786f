"""What a measurement was taken on: processor, memory, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from vig_kernels.kernels.cpu import native

ROOT = Path(__file__).resolve().parent.parent
CODE = ("csrc", "vig_kernels", "benchmarks")
WRITTEN = (
    ":!benchmarks/results",
    ":!docs",
    ":!*.md",
)  # what suites and the report write themselves, and prose
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "asimd", "sve", "bf16",
)  # fmt: skip
PACKAGES = (
    "torch", "triton", "numpy", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "kornia",
    "opencv-python-headless", "opencv-python", "pillow", "scipy", "torchvision",
)  # fmt: skip


def describe() -> dict:
    """Processor, its flags that matter here, cores, memory, GPU, and the instruction set of the native kernels."""
    info = _proc_table(Path("/proc/cpuinfo"))
    flags = (info.get("flags") or info.get("Features") or "").split()
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "gpu": gpu,
        "isa": native.isa(),
        "system": platform.system(),
    }


def slug(machine: dict) -> str:
    """A file name for a machine, such as amd-epyc-2-cores-avx512-bf16."""
    name = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    best = next(
        (
            flag
            for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")
            if flag in machine["flags"]
        ),
        "",
    )
    text = name if machine["gpu"] else f"{name} {machine['cores']} cores {best}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def sentence(result: dict) -> str:
    """One line for a caption."""
    machine = result["machine"]
    if machine["gpu"]:
        return f"{machine['gpu']['name']}, {machine['gpu']['memory_gib']} GiB"
    units = ", ".join(
        label
        for flag, label in (
            ("avx2", "AVX2"),
            ("avx512f", "AVX-512"),
            ("avx512_bf16", "BF16"),
            ("amx_bf16", "AMX"),
            ("asimd", "NEON"),
            ("bf16", "BF16"),
        )
        if flag in machine["flags"]
    )
    return f"{machine['cpu']}, {machine['cores']} cores ({units or 'no vector flags'}), {machine['memory_gib']} GiB"


def place(result: dict) -> str:
    """The machine, and on a CPU how many threads."""
    return sentence(result) if result["machine"]["gpu"] else f"{sentence(result)}, {threads(result)}"


def threads(result: dict) -> str:
    """ "1 thread", "2 threads"."""
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"


def versions() -> dict[str, str]:
    """Installed versions of Python, of this library and of the peers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # it names the build, +cpu or +cu130: the package's metadata need not
    return found


def header(suite: str, threads: int, quick: bool) -> dict:
    """The part of a result that does not depend on the suite."""
    return {
        "suite": suite,
        "quick": quick,
        "command": f"python -m benchmarks {suite}" + (" --quick" if quick else "") + f" --threads {threads}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "threads": threads,
        "machine": describe(),
        "versions": versions(),
    }


def commit() -> str:
    """The commit of the checkout, with "+" when tracked files that are no result and no page of one differ from it;
    "unknown" outside git."""
    head = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
    return "unknown" if head is None or changes is None else head.strip() + ("+" if changes.strip() else "")


def changed_since(commit: str) -> list[str] | None:
    """Top folders whose code differs between the commit of a result and the checkout; None where git cannot say."""
    names = _git("diff", "--name-only", commit.removesuffix("+"), "--", *CODE, *WRITTEN)
    return None if names is None else sorted({name.partition("/")[0] for name in names.splitlines()})


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _proc_table(path: Path) -> dict[str, str]:
    """The first block of a "key : value" file of /proc; {} where there is none."""
    if not path.exists():
        return {}
    block = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _memory_gib() -> float | None:
    if sys.platform != "linux":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
