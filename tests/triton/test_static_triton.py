"""The stored static counts hold the rules, belong to these kernels, and a compiler makes the same ones again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

ROOT = Path(__file__).parents[2]
AGAIN = """
import json, sys
from benchmarks import static
known = {static.key(entry): entry for entry in static.stored()["rows"]}
for wanted in json.loads(sys.argv[1]):
    entry = next(e for e in static.rows() if [e["target"], e["kernel"], e["dtype"]] == wanted)
    again = static.compile_row(entry)["counts"]
    print(json.dumps([static.title(entry), again, known[static.key(entry)]["counts"]]))
"""
SAMPLE = (
    ("sm_80", "blur write", "uint8"), ("sm_90", "fold", "bfloat16"), ("sm_100", "combine", "float32"),
    ("gfx942", "gradient", "float32"),
)  # fmt: skip


def compiler(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own: this one has the interpreter in the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_stored_counts_hold():
    """No local memory traffic in a main loop, at most 64 bytes outside, tensor instructions, shared memory."""
    done = compiler("-m", "benchmarks.static", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


COUNTED_WITH = json.loads((ROOT / "benchmarks/results/static.json").read_text())["triton"]


@pytest.mark.skipif(
    triton.__version__ != COUNTED_WITH,
    reason=f"Triton {triton.__version__} is here, another compiler than {COUNTED_WITH}, which counted",
)
def test_counts_are_found_again():
    """One row a target, compiled anew."""
    done = compiler("-c", AGAIN, json.dumps(SAMPLE))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(SAMPLE)
    for title, again, stored in found:
        assert again == stored, title


SPILLING = """
import json
from benchmarks import static
entry = next(e for e in static.rows() if e["target"] == "sm_90" and e["options"]["entropy"])
tile = entry["tile"] | {"block_n": 128, "block_v": 256, "block_k": 32, "num_warps": 4, "parts": 1, "num_stages": 2}
broken = static.compile_row(entry | {"tile": tile})
print(json.dumps([broken["counts"], static.static_counts.faults(broken)]))
"""


def test_a_tile_that_spills_is_seen():
    """The whole epilogue of a 128 x 256 tile at once, in four warps, has more values than registers."""
    done = compiler("-c", SPILLING)
    assert done.returncode == 0, done.stderr
    counts, faults = json.loads(done.stdout)
    assert counts["stack_bytes"] > 0 and counts["local_bytes_in_loop"] > 0
    assert any("local memory traffic in the main loop" in fault for fault in faults)


FAULTS = [
    ({"local_bytes_in_loop": 4}, "main loop"),
    ({"local_bytes_outside": 68}, "outside the loop"),
    ({"shared_bytes": 300 * 1024}, "shared memory"),
    ({"tensor_kinds": ["HMMA.16816.F32.BF16"]}, "no tensor instruction"),
    ({"resident_warps": 0}, "no block fits"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=lambda value: str(value)[:30])
def test_rules_see_what_they_are_for(change, message):
    sys.path.insert(0, str(ROOT))
    from benchmarks import static_counts

    stored = json.loads((ROOT / "benchmarks" / "results" / "static.json").read_text())["rows"]
    row = next(r for r in stored if r["target"] == "sm_90" and r["products"] == "bfloat16")
    assert static_counts.faults(row) == []
    found = static_counts.faults(row | {"counts": row["counts"] | change})
    assert len(found) == 1 and message in found[0]


def test_amd_rules_see_spills():
    sys.path.insert(0, str(ROOT))
    from benchmarks import static_counts

    stored = json.loads((ROOT / "benchmarks" / "results" / "static.json").read_text())["rows"]
    row = next(r for r in stored if r["target"] == "gfx942" and r["products"] == "bfloat16")
    assert static_counts.faults(row) == []
    for name in ("vgpr_spills", "stack_bytes"):
        assert static_counts.faults(row | {"counts": row["counts"] | {name: 1}})


def test_local_traffic_is_read_from_assembly():
    from benchmarks import static_counts

    lines = [
        "        STL.64 [R1+0x8], R4 ;", ".L_x_1:", "        LDL R2, [R1] ;", "        HGMMA.64x128x16.F32.BF16 R24 ;",
        "        @P0 BRA `(.L_x_1) ;", "        LDL.128 R4, [R1+0x10] ;",
    ]  # fmt: skip
    assert static_counts.main_loop(lines, [3]) == {1, 2, 3, 4}
    sizes = [int(m.group(2) or 32) // 8 if (m := static_counts.LOCAL.search(line)) else 0 for line in lines]
    assert sizes == [8, 0, 4, 0, 0, 16]


def test_an_epilogue_begins_behind_the_main_loop():
    """Where the loop's own branch leads back over a product; a last turn set behind it counts as epilogue. Its shortest
    path jumps over what few tiles need, and a conditional end is none."""
    from benchmarks import static_counts

    lines = [
        "  /*0000*/ LDC R1, c[0x0][0x28] ;", ".L_x_0:", "  /*0010*/ SYNCS.PHASECHK P0, [R2] ;",
        "  /*0020*/ @!P0 BRA `(.L_x_0) ;", ".L_x_1:", "  /*0030*/ HGMMA.64x128x16.F32.BF16 R24 ;",
        "  /*0040*/ IADD3 R3, R3, 0x1, RZ ;", "  /*0050*/ @P0 BRA `(.L_x_1) ;", "  /*0060*/ FMNMX R4, R4, R5, !PT ;",
        "  /*0070*/ @P2 BRA `(.L_x_2) ;", "  /*0080*/ @P1 MUFU.EX2 R6, R7 ;", "  /*0090*/ FADD R6, R6, R7 ;",
        ".L_x_2:", "  /*00a0*/ NOP ;", "  /*00b0*/ @P3 EXIT ;", "  /*00c0*/ STG.E [R8], R6 ;", "  /*00d0*/ EXIT ;",
        "  /*00e0*/ BRA `(.L_x_0) ;",
    ]  # fmt: skip
    found = static_counts.after_loop(lines, [5], static_counts.SASS)
    paths = {"shortest_instructions": 5, "shortest_special": 0}  # FMNMX, BRA, EXIT, STG, EXIT
    assert found == {"epilogue_instructions": 8, "epilogue_special": 1} | paths
    assert static_counts.after_loop(lines, [], static_counts.SASS)["shortest_instructions"] == 14
    amd = [
        ".LBB0_1:", "  v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]", "  s_cbranch_scc1 .LBB0_1",
        "  v_exp_f32_e32 v1, v2", "  s_nop 0", "  s_cbranch_execz .LBB0_2", "  v_add_f32_e32 v1, v1, v1", ".LBB0_2:",
        "  global_store_dword v0, v1, s[0:1]", "  s_endpgm",
    ]  # fmt: skip
    found = static_counts.after_loop(amd, [1], static_counts.GCN)
    paths = {"shortest_instructions": 4, "shortest_special": 1}
    assert found == {"epilogue_instructions": 5, "epilogue_special": 1} | paths
    with pytest.raises(ValueError, match="no way from line 3"):
        static_counts.shortest_path(["a"] * 4, 3, static_counts.GCN)


SERIAL = """
import json
from benchmarks import static
entry = next(e for e in static.rows() if e["target"] == "sm_90" and e["kernel"] == "fold" and e["products"] == "tf32x3")
counted = static.compile_row(entry)
known = static.static_counts.faults(counted)
print(json.dumps([counted["counts"]["waits_in_step"], known,
    static.static_counts.faults(counted | {"products": "bfloat16"})]))
"""


def test_products_of_a_step_that_wait_for_one_another_are_seen():
    """tf32x3's two waits are known; in a row of bfloat16 they would be a fault."""
    done = compiler("-c", SERIAL)
    assert done.returncode == 0, done.stderr
    waits, known, faults = json.loads(done.stdout)
    assert waits == 2 and not known
    assert "2 waits for all wgmma inside a K step" in faults


def test_a_pair_waits_where_its_products_do():
    """Twice tf32x3's waits and one between the products; one where loads are of single elements; else none."""
    from benchmarks import static_counts

    rows = json.loads((ROOT / "benchmarks/results/static.json").read_text())["rows"]
    known = {(True, "bfloat16"): 0, (True, "tf32x3"): 5, (False, "bfloat16"): 1, (False, "tf32x3"): 5}
    for (aligned, products), waits in known.items():
        row = next(r for r in rows if (r["kernel"], r["target"], r["products"], r["options"]["aligned"])
                   == ("pair", "sm_90", products, aligned))  # fmt: skip
        assert row["counts"]["waits_in_step"] == waits and not static_counts.faults(row)
        more = row | {"counts": row["counts"] | {"waits_in_step": waits + 1}}
        assert static_counts.faults(more) == [f"{waits + 1} waits for all wgmma inside a K step"]


def test_an_epilogue_beyond_its_budget_is_seen():
    from benchmarks import static_counts

    rows = json.loads((ROOT / "benchmarks/results/static.json").read_text())["rows"]
    held = [row for row in rows if static_counts.epilogue_budget(row)]
    assert {row["kernel"] for row in held} == {"fold", "store", "gradient", "pair"} and len(held) >= 72
    worst = {}
    for row in held:
        variant = row["variant"].removesuffix(static_counts.MASKED)
        what = row["kernel"], variant, row["dtype"] == "float32", row["target"]
        used = static_counts.epilogue_per_logit(row) / static_counts.epilogue_budget(row)
        worst[what] = max(used, worst.get(what, 0.0))
        more = row["counts"] | {"epilogue_instructions": int(1.4 * row["counts"]["epilogue_instructions"])}
        assert any("the budget is" in fault for fault in static_counts.faults(row | {"counts": more}))
    assert min(worst.values()) > 0.9, "a budget is loose"


ACCESSES = """
import json, re, triton
from benchmarks import static, static_kernels
found = []
for divisor in (16, 1):
    for entry in static.rows():
        if entry["target"] == "sm_90" and entry["kernel"].startswith("blur") and entry["dtype"] == "uint8":
            source = static.ast_source(entry)
            names = source.fn.arg_names
            for name in ("SOURCE_DIVISOR", "OUT_DIVISOR"):
                source.constants[(names.index(name),)] = divisor
            options = static.TileConfig(**entry["tile"]).launch_options
            ptx = triton.compile(source, target=static.TARGETS["sm_90"], options=options).asm["ptx"]
            single = re.findall(r"(?:ld|st)[.]global[.](?:b8|b16)\\b", ptx)
            wide = re.findall(r"cp[.]async[.]cg[.]shared[.]global|st[.]global[.]v4[.]b32", ptx)
            found.append([divisor, static.title(entry), len(single), len(wide)])
print(json.dumps(found))
"""


def test_samples_of_a_blur_go_by_16_bytes():
    """Bytes too, where planes and lines start on 16-byte borders; elsewhere they go one by one."""
    done = compiler("-c", ACCESSES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for divisor, title, single, wide in found:
        assert wide > 0 and (single == 0) == (divisor == 16), (title, single, wide)


def test_what_divides_the_addresses_of_samples():
    from vig_kernels.kernels.triton.gaussian_blur import patch_addresses, strided_addresses

    cpu = torch.device("cpu")
    for view, divisor in (
        (torch.empty(2, 3, 48, 32), 16),
        (torch.empty(2, 3, 48, 40), 8),
        (torch.empty(2, 3, 48, 33), 1),
        (torch.empty(2, 3, 48, 64)[..., 4:20], 16),  # from an odd place, which its data pointer tells
        (torch.empty(2, 48, 32, 3).movedim(-1, 1), 1),
    ):
        at = strided_addresses(tuple(view.shape), view.stride(), cpu)
        assert at.divisor == divisor and not any((o % divisor).any() for o in at[:2])
        assert at.unit == (view.stride(3) == 1)
    assert patch_addresses((1, 4, 4), 14, 2, 3, 2, 0, cpu).divisor == 1
