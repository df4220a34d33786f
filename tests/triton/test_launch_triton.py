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
        "correct_weight_kernel", "rows_kernel", "loss_kernel", "order_kernel", "band_kernel", "pair_kernel",
        "pair_combine_kernel",
    )  # fmt: skip
    assert set(compiled) == set(kernels) and min(compiled.values()) > 0


def test_launches_of_a_call_are_few():
    """Counted under a driver that launches nothing: three kernels to score, six of ours and two products to train."""
    script = SCRIPT.with_name("host_time.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [sys.executable, script, "3"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {row["op"]: row["launches"] for row in map(json.loads, done.stdout.splitlines())}
    scored = ["order_kernel", "fold_kernel", "combine_kernel"]
    assert found["linear_nll"] == scored
    assert found["linear_vig"] == [*scored, "combine_kernel"]
    trained = [*scored, "finish_kernel", "loss_kernel", "addmm_16_bit", "rows_kernel", "mm_bfloat16"]
    assert found["linear_cross_entropy, forward and backward"] == trained
