"""Counts read from compiled GPU code: registers, spills, shared memory, tensor instructions, resident warps."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
LOCAL = re.compile(r"\b(STL|LDL)(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)*\s")


class Assembly(NamedTuple):
    """How a disassembly is read."""

    label: re.Pattern
    jump: re.Pattern
    always: re.Pattern  # of a line: a jump without a condition
    end: re.Pattern  # of a line: the program's end, without a condition
    instruction: re.Pattern
    special: re.Pattern  # of an instruction's name: exponentials and the like


SASS = Assembly(
    re.compile(r"(\.L_\w+):"),
    re.compile(r"BRA.*`\((\.L_\w+)\)"),
    re.compile(r"/\*[0-9a-f]{4,}\*/\s+BRA"),
    re.compile(r"/\*[0-9a-f]{4,}\*/\s+EXIT"),
    re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"),
    re.compile(r"MUFU"),
)
GCN = Assembly(
    re.compile(r"(\.LBB\w+):"),
    re.compile(r"s_c?branch\w*\s+(\.LBB\w+)"),
    re.compile(r"^\s+s_branch\s"),
    re.compile(r"^\s+s_endpgm"),
    re.compile(r"^\s+([vs]_\w+|ds_\w+|buffer_\w+|global_\w+)"),
    re.compile(r"v_(?:exp|log|rcp|rsq|sqrt)_f"),
)
WAIT_FOR_ALL = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")
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
        "waits_in_step": waits_in_step(lines, tensor),
    } | after_loop(lines, tensor, SASS)


def waits_in_step(lines: list[str], tensor: list[int]) -> int:
    """Waits for every tensor instruction under way (wgmma.wait_group 0) that stand between those of one K step: the
    step then runs its products one after the other. Hopper alone has them."""
    between = lines[tensor[0] : tensor[-1]] if tensor else []
    return sum(bool(WAIT_FOR_ALL.search(line)) for line in between)


def after_loop(lines: list[str], tensor: list[int], assembly: Assembly) -> dict:
    """Instructions a warp after the main loop, of all paths and of the shortest, and how many of these take the
    special-function unit.

    The loop ends with the first branch back over a tensor instruction; the compiler may set the last turn of the loop
    behind it. Of a kernel without tensor instructions: all of its instructions. The shortest path is the common one:
    what it jumps over is the mask of the last tile, and the target's logit where a tile has none.
    """
    labels = label_lines(lines, assembly)
    jumps = ((i, jump) for i, line in enumerate(lines) if (jump := assembly.jump.search(line)))
    back = (i for i, jump in jumps if any(labels.get(jump.group(1), i) <= t < i for t in tensor))
    end = next(back, tensor[-1]) if tensor else -1
    names = [name for line in lines[end + 1 :] if (name := instruction_of(line, assembly))]
    common = names
    if tensor:
        path = shortest_path(lines, end + 1, assembly)
        common = [name for i in path if (name := instruction_of(lines[i], assembly))]
    return {
        "epilogue_instructions": len(names),
        "epilogue_special": sum(bool(assembly.special.match(name)) for name in names),
        "shortest_instructions": len(common),
        "shortest_special": sum(bool(assembly.special.match(name)) for name in common),
    }


def instruction_of(line: str, assembly: Assembly) -> str | None:
    """The name of the line's instruction, if it has one that does something."""
    found = assembly.instruction.search(line)
    return None if found is None or found.group(1) in ("NOP", "s_nop") else found.group(1)


def shortest_path(lines: list[str], start: int, assembly: Assembly) -> list[int]:
    """Lines from `start` to an end of the program, by the way with the fewest instructions."""
    labels = label_lines(lines, assembly)
    waiting, came_from = [(0, start, None)], {}
    while waiting:
        length, at, before = heapq.heappop(waiting)
        if at in came_from or at >= len(lines):
            continue
        came_from[at] = before
        if assembly.end.search(lines[at]):
            path = [at]
            while came_from[path[-1]] is not None:
                path.append(came_from[path[-1]])
            return path[::-1]
        length += instruction_of(lines[at], assembly) is not None
        jump = assembly.jump.search(lines[at])
        if jump and jump.group(1) in labels:
            heapq.heappush(waiting, (length, labels[jump.group(1)], at))
        if not assembly.always.search(lines[at]):
            heapq.heappush(waiting, (length, at + 1, at))
    raise ValueError(f"no way from line {start} to the end of the program")


def label_lines(lines: list[str], assembly: Assembly) -> dict[str, int]:
    return {match.group(1): i for i, line in enumerate(lines) if (match := assembly.label.match(line))}


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
    labels = label_lines(lines, SASS)
    span = set(range(tensor[0], tensor[-1] + 1))
    for i, line in enumerate(lines):
        back = SASS.jump.search(line)
        start = labels.get(back.group(1), i) if back else i
        if start < i and any(start <= t <= i for t in tensor):
            span.update(range(start, i + 1))
    return span


def amd(target: str, compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def field(pattern: str) -> int:
        return int(re.search(pattern, text).group(1))

    tensor = MMA[target].findall(text)
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if MMA[target].search(line)]
    return {
        "registers": field(r"\.vgpr_count:\s+(\d+)") + field(r"\.agpr_count:\s+(\d+)"),
        "stack_bytes": field(r"ScratchSize:\s+(\d+)"),
        "vgpr_spills": field(r"\.vgpr_spill_count:\s+(\d+)"),
        "sgpr_spills": field(r"\.sgpr_spill_count:\s+(\d+)"),  # to lanes of vector registers, not to memory
        "tensor_instructions": len(tensor),
        "tensor_kinds": sorted(set(tensor)),
    } | after_loop(lines, places, GCN)


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

# instructions a logit behind the main loop, all paths, on sm_80, sm_90, sm_100: what is known to do, and 5 %. On gfx942
# the compiler sets turns of the main loop behind it, so that the count says little
EPILOGUE_BUDGET = {
    ("fold", "plain", "16-bit"): (23, 15, 17),
    ("fold", "bias, softcap, entropy, argmax", "16-bit"): (66, 56, 55),
    ("fold", "bias, softcap, any D and stride", "16-bit"): (49, 51, 51),
    ("store", "bias, block", "16-bit"): (31, 24, 32),
    ("store", "bias, softcap, block", "16-bit"): (90, 92, 90),
    ("store", "bias, softcap, block, any D and stride", "16-bit"): (101, 106, 96),
    ("gradient", "bias, softcap, entropy, argmax", "16-bit"): (87, 96, 110),
    ("gradient", "bias, softcap, any D and stride", "16-bit"): (83, 95, 113),
    ("pair", "plain", "16-bit"): (27, 27, 34),  # a pair of logits
    ("pair", "bias, softcap", "16-bit"): (88, 87, 82),
    ("pair", "bias, softcap, any D and stride", "16-bit"): (88, 95, 90),
    ("fold", "plain", "float32"): (19, 15, 68),
    ("fold", "bias, softcap, entropy, argmax", "float32"): (60, 56, 115),
    ("fold", "bias, softcap, any D and stride", "float32"): (50, 51, 80),
    ("store", "bias, block", "float32"): (28, 25, 88),
    ("store", "bias, softcap, block", "float32"): (98, 95, 139),
    ("store", "bias, softcap, block, any D and stride", "float32"): (102, 102, 131),
    ("gradient", "bias, softcap, entropy, argmax", "float32"): (85, 84, 123),
    ("gradient", "bias, softcap, any D and stride", "float32"): (83, 85, 94),
    ("pair", "plain", "float32"): (27, 27, 115),
    ("pair", "bias, softcap", "float32"): (88, 86, 165),
    ("pair", "bias, softcap, any D and stride", "float32"): (93, 92, 126),
}
MASKED = ", masks of 16 bytes"  # follows the name of the variant that has the same epilogue, and its budget
# waits that are known: tf32x3 makes three products of one, and the compiler waits for each before it starts the next,
# since they add to one accumulator from operands that it forms in registers
WAITS = {"tf32x3": 2}


def known_waits(row: dict) -> int:
    """Of WAITS, a product. A pair has two products a step: where one waits for itself, as it also does where loads of
    single elements keep it from being pipelined, there is a wait between the two."""
    one = WAITS.get(row["products"], 0)
    if row["kernel"] != "pair":
        return one
    return 2 * one + 1 if one or not row["options"]["aligned"] else 0


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
    if counts.get("waits_in_step", 0) > known_waits(row):
        found.append(f"{counts['waits_in_step']} waits for all wgmma inside a K step")
    budget = epilogue_budget(row)
    per_logit = epilogue_per_logit(row) if budget else 0
    if budget and per_logit > budget:
        found.append(f"{per_logit:.1f} instructions a logit in the epilogue, the budget is {budget}")
    if row["products"]:
        pattern = EXPECTED[target, row["products"]]
        if not any(re.search(pattern, kind) for kind in counts["tensor_kinds"]):
            found.append(f"no tensor instruction like {pattern} among {counts['tensor_kinds']}")
    return found


def epilogue_budget(row: dict) -> float | None:
    """Of EPILOGUE_BUDGET; None where there is none."""
    kind = "float32" if row["dtype"] == "float32" else "16-bit"
    targets = ("sm_80", "sm_90", "sm_100")
    budgets = EPILOGUE_BUDGET.get((row["kernel"], row["variant"].removesuffix(MASKED), kind))
    return budgets[targets.index(row["target"])] if budgets and row["target"] in targets else None


def epilogue_per_logit(row: dict) -> float:
    """Instructions behind the main loop over the logits of a thread; of a pair, over those of one pass."""
    tile = row["tile"]
    logits = tile["block_n"] * tile["block_v"] / (32 * tile["num_warps"])
    return row["counts"]["epilogue_instructions"] / logits
