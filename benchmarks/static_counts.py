"""Counts read from compiled GPU code: registers, spills, shared memory, tensor instructions, resident warps."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
LOCAL = re.compile(r"\b(STL|LDL)(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)*\s")
MMA = {
    "sm_80": re.compile(r"\bHMMA\.[\w.]+"),
    "sm_90": re.compile(r"\bHGMMA\.[\w.]+"),
    "sm_100": re.compile(r"\bUTC\w*MMA\b"),
    "gfx942": re.compile(r"\bv_mfma_\w+"),
}

# shared memory a block may ask for, in bytes. sm_80's rows keep to the 99 KiB of 8.6, 8.9 and 12.x
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_TOTAL = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}


def count(target: str, compiled) -> dict:
    """The counts of one compiled kernel."""
    warps = compiled.metadata.num_warps
    found = nvidia(target, compiled) if target.startswith("sm_") else amd(target, compiled)
    found["shared_bytes"] = compiled.metadata.shared
    found["resident_warps"] = resident_warps(target, warps, found["registers"], compiled.metadata.shared)
    return found


def nvidia(target: str, compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = run("cuobjdump", "-res-usage", path)
        lines = run("nvdisasm", "-c", path).splitlines()
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    tensor = [i for i, line in enumerate(lines) if MMA[target].search(line)]
    loop = main_loop(lines, tensor)
    inside = outside = 0
    for i, line in enumerate(lines):
        local = LOCAL.search(line)
        if local:
            size = int(local.group(2) or 32) // 8
            inside, outside = (inside + size, outside) if i in loop else (inside, outside + size)
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "local_bytes_in_loop": inside,
        "local_bytes_outside": outside,
        "tensor_instructions": len(tensor),
        "tensor_kinds": sorted(
            {MMA[target].search(lines[i]).group(0) for i in tensor} | tensor_kinds(compiled)
        ),
    }


def tensor_kinds(compiled) -> set[str]:
    """tcgen05's number kind stands in the PTX only."""
    return set(re.findall(r"tcgen05\.mma[\w:.]*\.kind::\w+", compiled.asm["ptx"]))


def main_loop(lines: list[str], tensor: list[int]) -> set[int]:
    """Lines of every loop that holds a tensor instruction, and all between the first and the last of these.

    A backward branch from a cold block at the end widens the span: local traffic there counts as inside, so the
    count errs on the strict side.
    """
    if not tensor:
        return set()
    labels = {match.group(1): i for i, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line))}
    span = set(range(tensor[0], tensor[-1] + 1))
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        start = labels.get(jump.group(1), i) if jump else i
        if start < i and any(start <= t <= i for t in tensor):
            span.update(range(start, i + 1))
    return span


def amd(target: str, compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def field(pattern: str) -> int:
        return int(re.search(pattern, text).group(1))

    tensor = MMA[target].findall(text)
    return {
        "registers": field(r"\.vgpr_count:\s+(\d+)") + field(r"\.agpr_count:\s+(\d+)"),
        "stack_bytes": field(r"ScratchSize:\s+(\d+)"),
        "vgpr_spills": field(r"\.vgpr_spill_count:\s+(\d+)"),
        "sgpr_spills": field(r"\.sgpr_spill_count:\s+(\d+)"),  # to lanes of vector registers, not to memory
        "tensor_instructions": len(tensor),
        "tensor_kinds": sorted(set(tensor)),
    }


def resident_warps(target: str, warps: int, registers: int, shared: int) -> int:
    """Warps (gfx942: waves of 64) that fit a multiprocessor by registers, shared memory and the 64 (32) slots."""
    if target == "gfx942":
        per_simd = min(8, 512 // max(8, -(-registers // 8) * 8))
        blocks = per_simd * 4 // warps
        slots = 32 // warps
    else:
        blocks = 65536 // (-(-registers // 8) * 8 * 32 * warps)
        slots = 64 // warps
    reserve = 0 if target == "gfx942" else 1024  # bytes of every block that the system keeps
    by_shared = SHARED_TOTAL[target] // (shared + reserve) if shared else slots
    return max(0, min(blocks, slots, by_shared)) * warps


def run(tool: str, *arguments) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


EXPECTED = {
    # (target, kind of the products): a pattern that some tensor instruction must match
    ("sm_80", "bfloat16"): r"HMMA\.16816\.F32\.BF16",
    ("sm_80", "float16"): r"HMMA\.16816\.F32$",
    ("sm_80", "tf32x3"): r"HMMA\.\d+\.F32\.TF32",
    ("sm_90", "bfloat16"): r"HGMMA\.64x\d+x16\.F32\.BF16",
    ("sm_90", "float16"): r"HGMMA\.64x\d+x16\.F32$",
    ("sm_90", "tf32x3"): r"HGMMA\.64x\d+x8\.F32\.TF32",
    ("sm_100", "bfloat16"): r"kind::f16",
    ("sm_100", "float16"): r"kind::f16",
    ("sm_100", "tf32x3"): r"kind::tf32",
    ("gfx942", "bfloat16"): r"v_mfma_f32_\w+_bf16",
    ("gfx942", "float16"): r"v_mfma_f32_\w+_?f16",
    ("gfx942", "ieee"): r"v_mfma_f32_\w+_?f32",
}
OUTSIDE_LIMIT = 64


def faults(row: dict) -> list[str]:
    """What a row of static.json does that it must not."""
    counts, target = row["counts"], row["target"]
    found = []
    if counts.get("local_bytes_in_loop"):
        found.append(f"{counts['local_bytes_in_loop']} bytes of local memory traffic in the main loop")
    if counts.get("local_bytes_outside", 0) > OUTSIDE_LIMIT:
        found.append(f"{counts['local_bytes_outside']} bytes of local memory traffic outside the loop")
    if target == "gfx942" and (counts["vgpr_spills"] or counts["stack_bytes"]):
        found.append(f"{counts['vgpr_spills']} vector registers spilled, scratch {counts['stack_bytes']}")
    if counts["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{counts['shared_bytes']} bytes of shared memory, the limit is {SHARED_LIMIT[target]}")
    if counts["resident_warps"] == 0:
        found.append("no block fits a multiprocessor")
    if row["products"]:
        pattern = EXPECTED[target, row["products"]]
        if not any(re.search(pattern, kind) for kind in counts["tensor_kinds"]):
            found.append(f"no tensor instruction like {pattern} among {counts['tensor_kinds']}")
    return found
