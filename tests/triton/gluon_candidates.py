"""`python tests/triton/gluon_candidates.py`: compiles the candidates for sm_90 without a GPU and prints their counts.

Runs as a process of its own under Triton 3.6 or 3.9: the interpreter must not be in the compiler's place.
"""

from __future__ import annotations

import json
from unittest.mock import patch

import launches
import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from benchmarks import static_counts
from benchmarks.gpu_candidates import fold_sm90
from benchmarks.static_kernels import TARGETS


def fold_source() -> GluonASTSource:
    """fold_kernel with the arguments that linear_nll launches it with on an H100."""
    sizes = {
        "PROGRAMS": 132, "GROUP": fold_sm90.GROUP, "BLOCK_N": fold_sm90.BLOCK_N, "BLOCK_V": fold_sm90.BLOCK_V,
        "BLOCK_K": fold_sm90.BLOCK_K, "STAGES": fold_sm90.STAGES, "CONSUMER": fold_sm90.CONSUMER_REGISTERS,
        "PRODUCER": fold_sm90.PRODUCER_REGISTERS,
    }  # fmt: skip
    types = {
        name: f"tensordesc<bf16[{block}, {fold_sm90.BLOCK_K}],{fold_sm90.layout(block)!r}>"
        for name, block in (("hidden", fold_sm90.BLOCK_N), ("weight", fold_sm90.BLOCK_V))
    }
    types |= {"target": "*i64"} | dict.fromkeys(("partial_max", "partial_sum", "target_logit"), "*fp32")
    names = fold_sm90.fold_kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "D"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return GluonASTSource(fold_sm90.fold_kernel, signature, sizes, attributes)


def bound() -> list[str]:
    """Names of the kernels that linear_nll launches, bound and compiled with the arguments that it really gives."""
    triton.runtime.driver.set_active(launches.Driver("sm_90"))
    names, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        names.append(self.fn.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    hidden, weight = (torch.zeros(rows, 128, dtype=torch.bfloat16) for rows in (200, 1000))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(fold_sm90, "_processors", lambda _: 132),
    ):
        fold_sm90.linear_nll(hidden, weight, torch.zeros(200, dtype=torch.long))
    return names


if __name__ == "__main__":
    compiled = triton.compile(fold_source(), target=TARGETS["sm_90"], options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    print(
        json.dumps(
            static_counts.count("sm_90", compiled)
            | {
                "triton": triton.__version__,
                "bound": bound(),
                "setmaxnreg": ptx.count("setmaxnreg"),
                "bulk_loads": ptx.count("cp.async.bulk.tensor"),
                "wgmma": ptx.count("wgmma.mma_async"),
            }
        )
    )
