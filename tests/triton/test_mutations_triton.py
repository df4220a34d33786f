"""Every seeded fault of mutations.py is caught, and the kernels without a fault pass the same checks."""

import os
import subprocess
import sys

import mutations
import pytest


@pytest.mark.parametrize("kernel", mutations.CHECKS)
def test_kernels_without_a_fault_pass(kernel):
    assert mutations.run(None, kernel) is None


@pytest.mark.parametrize("mutation", [m for m in mutations.MUTATIONS if not m.isolated], ids=mutations.key)
def test_fault_is_caught(mutation):
    assert mutations.examine(mutation) is not None, f"not caught: {mutation}"


def test_faults_of_offsets_are_caught():
    """All in one process of their own, which forks for each: they may read memory that is not there."""
    names = [mutations.key(m) for m in mutations.MUTATIONS if m.isolated]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", mutations.__file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(names)} of {len(names)} faults caught\n")


def test_a_fault_that_fits_nowhere_is_an_error():
    with pytest.raises(LookupError, match="is not in"):
        mutations.run(mutations.Mutation("fold", "none", mutations.NLL, "no such line", ""), "fold")


def test_five_faults_a_kernel():
    counts = {kernel: sum(m.kernel == kernel for m in mutations.MUTATIONS) for kernel in mutations.CHECKS}
    assert min(counts.values()) >= 5, counts
