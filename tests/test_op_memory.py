"""The memory promise, as growth of the resident set of a fresh process: scoring 64 MiB, training 256 MiB."""

import os
import subprocess
import sys

import pytest
from cases import runners

pytest.importorskip("psutil", reason="the program below reads its resident set with psutil")

PROGRAM = """
import resource, sys, threading, time
import psutil, torch
torch.set_num_threads(1)
from vig_kernels import linear_cross_entropy, linear_nll
what, dtype, N, D, V, backend = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:6]), sys.argv[6]
training = what not in ("score", "deep", "rows")
warm = [torch.randn(4, 300).to(dtype).requires_grad_(training), torch.randn(64, 300).to(dtype).requires_grad_(training)]
call = {
    "score": lambda h, w, t: linear_nll(h, w, t, backend=backend),
    "fast": lambda h, w, t: linear_cross_entropy(h, w, t, backend=backend).backward(),
    "low": lambda h, w, t: linear_cross_entropy(h, w, t, memory="low", backend=backend).backward(),
}[{"deep": "score", "rows": "score", "many": "low"}.get(what, what)]
call(*warm, torch.arange(4))
hidden = torch.randn(N, D, dtype=torch.float32).to(dtype).requires_grad_(training)
weight = (torch.randn(V, D, dtype=torch.float32) * 0.02).to(dtype).requires_grad_(training)
target = torch.randint(0, V, (N,))
target[::5] = -100
process = psutil.Process()
before, peak, done = process.memory_info().rss, 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
call(hidden, weight, target)
done = True
watcher.join()
gradients = sum(t.grad.nbytes for t in (hidden, weight)) if training else 0
print((peak - before - gradients) / 2**20)
"""
BUFFER = {"float32": 0, "bfloat16": 4}  # bytes an element of the float32 weight-gradient buffer
# many: the sum of the hidden gradient alone would fill 234 MiB; deep: the packed rows of hidden 102; rows: 32 bytes
# to remember each row by would be 92
SHAPES = {
    "many": (60000, 1024, 64),
    "deep": (4096, 8192, 64),
    "rows": (3_000_000, 2, 8),
    "score": (1000, 128, 40000),
    "fast": (1500, 64, 70000),
    "low": (1500, 64, 70000),
}


@pytest.mark.parametrize("backend", [b for b, device in runners("linear_cross_entropy") if device == "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", SHAPES)
def test_extra_memory(what, dtype, backend):
    """Full logits would take 160 MB to score and 336 to train, several times over."""
    if what == "deep" and backend != "cpu":
        pytest.skip("packs no rows")
    _, width, vocabulary = SHAPES[what]
    arguments = [what, dtype, *map(str, SHAPES[what]), backend]
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    extra = float(run.stdout)
    print(f"{what} {dtype} {backend}: {extra:.0f} MiB")
    allowed = 64 if what in ("score", "deep", "rows") else 256
    if what == "fast":
        allowed += BUFFER[dtype] * vocabulary * width / 2**20
    assert extra <= allowed, f"{extra:.0f} MiB over the promised {allowed:.0f}"
