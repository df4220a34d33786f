"""Sharded heads by the Triton kernels, in the interpreter: 2 processes against one."""

from __future__ import annotations

import pytest
import sharded_heads
from ranks import launch
from sharded_heads import SHARDED, differing, whole


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return launch(sharded_heads.__file__, 2, tmp_path_factory.mktemp("ranks"), "triton")


@pytest.mark.parametrize("case", SHARDED)
def test_equals_one_process(case, found):
    made, null = sharded_heads.inputs(SHARDED[case], 2)
    one = sharded_heads.results(made, null, "triton")
    parts = [rank["cases"][case, "triton"] for rank in found]
    apart = differing({name: whole(parts, name) for name in parts[0]}, one)
    if case == "bfloat16":  # rounded on each rank, then added
        apart = {name: values for name, values in apart.items() if ".grad_" not in name}
    assert apart == {}
