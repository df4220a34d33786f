"""Each launch of each op is bound and compiled for a GPU target, with the arguments that the ops give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static_kernels import TARGETS

SCRIPT = Path(__file__).with_name("launches.py")


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_is_bound_and_compiled(target, tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, target], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    kernels = (
        "fold_kernel", "combine_kernel", "finish_kernel", "gradient_kernel", "correct_hidden_kernel",
        "correct_weight_kernel", "gather_kernel", "order_kernel", "band_kernel", "pair_kernel",
        "pair_combine_kernel",
    )  # fmt: skip
    assert set(compiled) == set(kernels) and min(compiled.values()) > 0
