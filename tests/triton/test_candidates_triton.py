"""The candidates of the GPU suite compile for the GPU that they are written for, without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("gluon_candidates.py")


def test_the_gluon_fold_compiles_for_sm_90(tmp_path):
    """Warp-specialised with its own registers a role, loads by TMA, nothing spilled, launched as the host code does."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["stack_bytes"] == counts["local_bytes_in_loop"] == counts["local_bytes_outside"] == 0
    assert counts["setmaxnreg"] >= 2 and counts["bulk_loads"] == 2 and counts["wgmma"] == 16
    assert counts["tensor_kinds"] == ["HGMMA.64x256x16.F32.BF16"]
    assert counts["shared_bytes"] <= 227 * 1024
    assert counts["bound"] == ["fold_kernel"]
