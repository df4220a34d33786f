"""The native kernels where the system says no: no more threads, and Ctrl-C in the middle of a call."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from vig_kernels import gaussian_blur, linear_cross_entropy, linear_nll
from vig_kernels.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.why_not()))

NO_MORE_THREADS = """
import resource, threading
from pathlib import Path
import torch
from vig_kernels import linear_nll

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def call(count):
    torch.set_num_threads(count)
    return linear_nll(hidden, weight, target, backend="cpu")

torch.manual_seed(0)
hidden, weight, target = torch.randn(20, 8), torch.randn(3000, 8), torch.arange(20)
threading.stack_size(0)
expected, before = call(1), threads()
room = [bytearray(1 << 20) for _ in range(3)]
del room  # what the call itself needs
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size() + (4 << 20), hard))  # a thread's stack alone is 8 MiB
for _ in range(3):
    assert torch.equal(call(4), expected)
assert threads() == before, "a thread was started after all"
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert torch.equal(call(4), expected)
assert threads() == before + 3, f"{threads() - before} of 3 workers after the limit was lifted"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_call_goes_on_without_threads_that_cannot_be_started():
    done = subprocess.run([sys.executable, "-c", NO_MORE_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def head(rows):
    """A head whose sweep takes many seconds and hardly any memory: all rows of the weight are one row."""
    return torch.randn(rows, 2048), torch.randn(1, 2048).expand(400_000, 2048), torch.arange(rows)


def forward():
    hidden, weight, target = head(1024)
    return lambda: linear_nll(hidden, weight, target, backend="cpu")


def train():
    hidden, weight, target = head(512)
    return lambda: linear_cross_entropy(hidden.requires_grad_(), weight, target, backend="cpu")


def backward():
    hidden, weight, target = head(128)
    return linear_nll(hidden.requires_grad_(), weight, target, backend="cpu").sum().backward


def blur():
    images = torch.rand(3, 2000, 2000)
    return lambda: gaussian_blur(images, 2000.0, backend="cpu")


@pytest.mark.parametrize("count", [1, 2], ids=lambda count: f"{count}-threads")
@pytest.mark.parametrize("prepare", [forward, train, backward, blur])
def test_ctrl_c_ends_a_long_call(prepare, count):
    """Within 0.3 s on an idle machine; a second is allowed here. Later calls are not disturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    small = torch.randn(20, 8), torch.randn(3000, 8), torch.arange(20)
    expected = linear_nll(*small, backend="cpu")
    work = prepare()
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(0.4, interrupt)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert time.monotonic() - sent[0] < 1.0
        assert torch.equal(linear_nll(*small, backend="cpu"), expected)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
        torch.set_num_threads(before)
