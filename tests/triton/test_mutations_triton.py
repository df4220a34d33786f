"""Every seeded fault of mutations.py is caught, and the kernels without a fault pass the same checks."""

import mutations
import pytest


@pytest.mark.parametrize("kernel", mutations.CHECKS)
def test_kernels_without_a_fault_pass(kernel):
    assert mutations.run(None, kernel) is None


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=mutations.key)
def test_fault_is_caught(mutation):
    assert mutations.examine(mutation) is not None, f"not caught: {mutation}"


def test_five_faults_a_kernel():
    counts = {kernel: sum(m.kernel == kernel for m in mutations.MUTATIONS) for kernel in mutations.CHECKS}
    assert min(counts.values()) >= 5, counts
