"""What `python -m benchmarks gpu` does, in the order of what matters most, and the call that does it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks import machine, results
from benchmarks.gpu.runner import Processes, Step, run_steps
from benchmarks.shapes import GPU_HEADS, Shape

ROOT = Path(__file__).resolve().parents[2]
MAIN = GPU_HEADS[-1]  # 8192 x 4096 x 151936, that of the published comparisons
SMALL = Shape("LLaVA-1.5 7B, one small batch", 256, 4096, 32064)
FIRST = ("bare GEMM", "eager PyTorch", "CCE", "Liger", "quack")
OTHERS = GPU_HEADS[:-1]
WIDE = (GPU_HEADS[0], GPU_HEADS[2])  # in float32 too


def steps() -> list[Step]:
    """Limits add up to more than any budget: a step that hangs must not eat what the next ones need."""
    main, questions = astuple(MAIN), {1: "one question", 6: "six questions"}
    return [
        _step("environment", "environment:environment", limit_s=45, least_s=5),
        _step("correctness", "correctness:correctness", limit_s=120, least_s=30),
        *(_head(name, shape, "bfloat16", FIRST) for shape in (MAIN, SMALL) for name in ("score", "train")),
        _step("tiles of the fold", "tiles:tiles_step", "fold", main, limit_s=80, least_s=25),
        _step("candidates", "tiles:candidates_step", main),
        _step("blur", "blur:blur_step"),
        *(
            _step(f"end to end, {words} an image", "end_to_end:end_to_end", n, limit_s=120, least_s=40)
            for n, words in questions.items()
        ),
        _step("training step", "train_step:training_step", least_s=15),
        _step("counters", "counters:counters", least_s=20),
        _step("tiles of training", "tiles:tiles_step", "store", main, limit_s=90, least_s=40),
        *(
            _head(name, shape, dtype, None)
            for dtype, shapes in (("bfloat16", OTHERS), ("float32", WIDE))
            for shape in shapes
            for name in ("score", "train")
        ),
        _step("README's trainers", "readme:readme_step", limit_s=120, least_s=30),
        *(
            _step(f"torch.compile {shape}", "heads:compiled_step", astuple(shape), limit_s=120, least_s=40)
            for shape in (MAIN, SMALL)
        ),
    ]


def _step(name: str, what: str, *arguments, **limits) -> Step:
    return Step(name, f"{__package__}.{what}", arguments, **limits)


def _head(name: str, shape: Shape, dtype: str, peers: tuple[str, ...] | None) -> Step:
    """`name`: "score" or "train". peers: those that take part; None: all but torch.compile."""
    return _step(f"{name} {shape}, {dtype}", f"heads:{name}_step", astuple(shape), dtype, peers, limit_s=80)


def rehearsed() -> list[Step]:
    """One step of each kind, and both of the end-to-end ones: a rehearsal runs every function once."""
    kinds: dict[tuple, Step] = {}
    for step in steps():
        kind = (step.run, step.arguments if "end_to_end" in step.run else ())
        kinds.setdefault(kind, replace(step, least_s=1.0))
    return list(kinds.values())


def why_not() -> str | None:
    """None where torch sees a GPU."""
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm GPU on this machine"


def show(console: Console) -> None:
    """Says that nothing was measured, and what a GPU would be asked to do."""
    console.print(f"Nothing was measured: {why_not()}.", style="bold")
    console.print(
        "On a machine with one, `python -m benchmarks gpu --minutes M --out DIR` would, in this order:"
    )
    for number, step in enumerate(steps(), 1):
        console.print(f"  {number:2d}. {step.name} (at most {step.limit_s:.0f} s)", highlight=False)
    console.print("--rehearse runs each kind of step on a CPU, on tiny shapes, in Triton's interpreter.")


def install(wheels: Path, folder: Path) -> Path:
    """Installs the wheels of a folder beside what is there, without a package index; returns where they lie."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(
            f"{wheels} has no *.whl: download them with `pip download --no-deps -d {wheels}`"
        )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(folder), *map(str, found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not install {wheels}: {done.stderr.strip()[-500:]}")
    return folder


def environment(rehearse: bool, site: Path | None, cache: Path) -> dict[str, str]:
    """Of the steps' processes: the checkout's code, one cache of compiled kernels for all, no network."""
    paths = [str(path) for path in (site, ROOT) if path] + [os.environ.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1" if rehearse else "2",
    }
    interpreter = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    return os.environ | fixed | interpreter


def measure(
    minutes: float, out: Path, rehearse: bool, wheels: Path | None, say: Callable[[str], None]
) -> tuple[Path, dict]:
    """Runs the steps within the minutes; (where the result lies, the result). It is stored after every step.

    A call with the same code, machine and folder goes on: what was measured before is kept.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        site = install(wheels, Path(scratch) / "site") if wheels else None
        if site:  # the header names the peers' versions
            stack.enter_context(patch.object(sys, "path", [str(site), *sys.path]))
        header = header_of(minutes, rehearse)
        path = results.path_of(header, out)
        launch = Processes(out / "steps", environment(rehearse, site, Path(scratch) / "triton"), rehearse)
        run_steps(
            rehearsed() if rehearse else steps(), 60 * minutes - (time.monotonic() - started), launch,
            lambda records, cases: results.write(header | {"steps": records, "cases": cases}, out),
            done=before(path, header), say=say,
        )  # fmt: skip
    return path, results.read(path)


def header_of(minutes: float, rehearse: bool) -> dict:
    """Of the result. A rehearsal counts as quick: its times are no figures."""
    words = (f"--minutes {minutes:g}", "--rehearse" if rehearse else "")
    command = " ".join(["python -m benchmarks gpu", *filter(None, words)])
    header = machine.header("gpu", 1, quick=rehearse)
    return header | {"minutes": minutes, "rehearsal": rehearse, "command": command}


def before(path: Path, header: dict) -> tuple[list[dict], list[dict]]:
    """What an earlier call of the same code on the same machine has left."""
    if not path.exists():
        return [], []
    earlier = results.read(path)
    fixed = ("commit", "machine", "versions", "rehearsal")
    same = all(earlier.get(name) == results.as_stored(header[name]) for name in fixed)
    commit = header["commit"]
    if (
        not same or commit == "unknown" or commit.endswith("+")
    ):  # with changes, nobody knows which code it was
        return [], []
    return earlier["steps"], earlier["cases"]
