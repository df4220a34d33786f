"""`python -m benchmarks.static`: compile every kernel x shipped tile x target without a GPU, and count.

Prints and stores registers, spills, shared memory, tensor instructions and resident warps of every kernel that the
Triton backends can launch, and the counted floors of time on named GPUs. Nothing here was run on a GPU, and no
time here was measured. `--check` compiles nothing: it holds the stored counts against the rules and against the
kernels of the checkout.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import triton

from benchmarks import static_counts, static_floors, static_kernels
from benchmarks.static_kernels import TARGETS, Variant
from vig_kernels.kernels.triton import gaussian_blur as gaussian_blur_triton
from vig_kernels.kernels.triton import (
    kept_block,
    logit_fold,
    logit_gradients,
    logit_tiles,
    loss_sum,
    pair_fold,
    row_order,
    target_residual,
)
from vig_kernels.kernels.triton import linear_cross_entropy as linear_cross_entropy_triton
from vig_kernels.kernels.triton.tile_configs import BLUR, CUT, HEAD, TileConfig, irregular_tile

STORE = Path(__file__).parent / "results" / "static.json"

PLAIN = Variant("plain")
STATS = Variant("bias, softcap, entropy, argmax", softcap=True, bias=True, entropy=True, argmax=True)
RAGGED = Variant("bias, softcap, any D and stride", softcap=True, bias=True, even_k=False, aligned=False)
TRAIN = Variant("bias, block", bias=True, store=True)
TRAIN_CAPPED = Variant("bias, softcap, block", softcap=True, bias=True, store=True)
TRAIN_RAGGED = Variant(
    "bias, softcap, block, any D and stride", True, True, store=True, even_k=False, aligned=False
)

CAPPED = Variant("bias, softcap", softcap=True, bias=True)
PAIR = Variant("pair", pair=True)
ANY = Variant("any D and stride", even_k=False, aligned=False)
KEPT = Variant("bias, block kept", bias=True, store=True)

# what the wide, narrow and irregular tiles are launched with (tile_configs.head_config); of less code, what the
# predictions read
HEAD_VARIANTS = {
    "fold": ((PLAIN, STATS), (PLAIN, STATS), (RAGGED,)),
    "store": ((TRAIN,), (TRAIN, TRAIN_CAPPED), (TRAIN_RAGGED,)),
    "gradient": ((STATS,), (STATS,), (RAGGED,)),
    "pair": ((PLAIN, CAPPED), (PLAIN, CAPPED), (RAGGED,)),
}
# of the others fold_kernel
FUNCTIONS = {"gradient": logit_gradients.gradient_kernel, "pair": pair_fold.pair_kernel}


WARPS = {
    "order": row_order.ORDER_WARPS,
    "loss": loss_sum.SUM_WARPS,
    "correct weight": target_residual.WEIGHT_WARPS,
}  # of the others 4
DTYPES = {"16-bit": ("bfloat16", "float16"), "float32": ("float32",)}  # by the table's kind


def precision(target: str, dtype: str) -> str:
    return "tf32x3" if dtype == "float32" and target != "gfx942" else "ieee"


def products(target: str, dtype: str) -> str:
    """What the tensor instructions multiply: the 16-bit type, tf32x3 or ieee float32."""
    return precision(target, dtype) if dtype == "float32" else dtype


def rows() -> list[dict]:
    """Every kernel x variant x target x dtype x tile that the tables can launch."""
    found = []
    for (kernel, target, kind), (wide, narrow) in HEAD.items():
        irregular = irregular_tile(kernel, target, kind)
        ways = list(zip((wide, narrow, irregular), HEAD_VARIANTS[kernel], strict=True))
        # of a D that cuts a block: the tiles with descriptors, or where there are none, the one with masks
        cut = [
            (CUT.get((kernel, target, kind), tile), variants) for tile, variants in ways if tile.descriptor
        ]
        cut = cut or ways[-1:]
        ways += [*cut, *((tile, map(masked, variants)) for tile, variants in cut)]
        for tile, variants in ways:
            found += [
                row(kernel, variant, target, dtype, tile) for variant in variants for dtype in DTYPES[kind]
            ]
    for (target, kind), tile in BLUR.items():
        for dtype in ("uint8", "bfloat16", "float16", "float32"):
            for launch in ("blur read", "blur write"):
                found.append(row(launch, PLAIN, target, dtype, tile, fast=kind == "16-bit"))
    for target in TARGETS:
        found += small_rows(target)
    return list({key(entry): entry for entry in found}.values())


def masked(variant: Variant) -> Variant:
    """The variant for a D that is no multiple of BLOCK_K, but of 16 bytes."""
    return replace(variant, name=variant.name + static_counts.MASKED, even_k=False, aligned=True)


def small_rows(target: str) -> list[dict]:
    """The kernels without a product: their one tile, by the parts that the folds leave."""

    def small(kernel, variant, dtype, part=0):
        tile = TileConfig(0, part, 0, WARPS.get(kernel, 4), 3)
        return row(kernel, variant, target, dtype, tile, gemm=False)

    found = []
    for kind, dtypes in DTYPES.items():
        fold, store = (parts(kernel, target, kind) for kernel in ("fold", "store"))
        found += [small("combine", variant, "float32", part) for part in fold for variant in (PAIR, STATS)]
        found += [small("combine", TRAIN_CAPPED, "float32", part) for part in store]
        found += [small("finish", TRAIN_CAPPED, dtype, part) for part in store for dtype in dtypes]
    for kernel in ("correct hidden", "correct weight"):
        found += [small(kernel, variant, dtype) for variant in (PLAIN, ANY) for dtype in DTYPES["16-bit"]]
    found += [small("finish", KEPT, "bfloat16", part) for part in parts("store", target, "16-bit")]
    found += [small("pair combine", PLAIN, "float32"), small("order", PLAIN, "int64")]
    found += [small("rows", variant, "bfloat16") for variant in (PLAIN, ANY)]
    found += [small("loss", variant, "float32") for variant in (PLAIN, STATS)]
    return found


def parts(kernel: str, target: str, kind: str) -> list[int]:
    """The widths of a part under every tile of a kernel, the irregular one too."""
    tiles = [*HEAD[kernel, target, kind], irregular_tile(kernel, target, kind)]
    return sorted({tile.block_v // tile.parts for tile in tiles})


def row(kernel, variant, target, dtype, tile, fast=False, gemm=True) -> dict:
    kind = "float16" if fast else "float32" if kernel.startswith("blur") else dtype
    return {
        "kernel": kernel,
        "variant": variant.name,
        "target": target,
        "dtype": dtype,
        "products": products(target, kind) if gemm else None,
        "tile": asdict(tile),
        "options": asdict(variant),
    }


def ast_source(entry: dict):
    """The Triton source of a row."""
    variant, tile = Variant(**entry["options"]), TileConfig(**entry["tile"])
    target, dtype, kernel = entry["target"], entry["dtype"], entry["kernel"]
    if kernel in HEAD_VARIANTS:
        function = FUNCTIONS.get(kernel, logit_fold.fold_kernel)
        return static_kernels.head_source(
            function, variant, dtype, tile, precision(target, dtype), target.startswith("sm_")
        )
    if kernel.startswith("blur"):
        fast = entry["products"] == "float16"
        how = "ieee" if fast else precision(target, "float32")
        return static_kernels.blur_source(kernel == "blur read", dtype, fast, tile, how)
    if kernel == "combine":
        return static_kernels.combine_source(variant, tile.block_v)
    if kernel == "pair combine":
        return static_kernels.pair_combine_source()
    if kernel.startswith("correct"):
        return static_kernels.correct_source(kernel, variant, dtype)
    if kernel == "order":
        return static_kernels.order_source()
    if kernel == "loss":
        return static_kernels.loss_source(variant)
    if kernel == "rows":
        return static_kernels.rows_source(variant, dtype)
    return static_kernels.finish_source(variant, dtype, tile.block_v)


def compile_row(entry: dict) -> dict:
    """The row with its counts."""
    options = TileConfig(**entry["tile"]).launch_options
    compiled = triton.compile(ast_source(entry), target=TARGETS[entry["target"]], options=options)
    return entry | {
        "counts": static_counts.count(entry["target"], compiled),
        "code": code_of(entry["kernel"]),
    }


MODULES = {
    "fold": (logit_tiles, logit_fold),
    "store": (logit_tiles, logit_fold),
    "gradient": (logit_tiles, logit_gradients),
    "combine": (logit_fold,),
    "pair": (logit_tiles, pair_fold),
    "pair combine": (pair_fold,),
    "finish": (linear_cross_entropy_triton,),
    "correct hidden": (target_residual,),
    "correct weight": (target_residual,),
    "order": (row_order,),
    "rows": (kept_block,),
    "loss": (loss_sum,),
    "blur read": (gaussian_blur_triton,),
    "blur write": (gaussian_blur_triton,),
}


def code_of(kernel: str) -> str:
    """A fingerprint of the kernel's Triton functions, blind to comments, docstrings and layout, and the same under
    every Python."""
    digest = hashlib.sha256()
    for module in MODULES[kernel]:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                node.body = node.body[ast.get_docstring(node) is not None :]
                digest.update(repr(_tree(node)).encode())
    return digest.hexdigest()[:16]


def _tree(node: object) -> object:
    """A syntax tree as tuples. Fields without a value are left out: which there are depends on Python's version."""
    if isinstance(node, list):
        return tuple(map(_tree, node))
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return type(node).__name__, *((name, _tree(value)) for name, value in fields)


def key(entry: dict) -> tuple:
    return tuple(
        json.dumps(entry[name], sort_keys=True)
        for name in ("kernel", "target", "dtype", "products", "tile", "options")
    )


def stored() -> dict:
    return json.loads(STORE.read_text()) if STORE.exists() else {"rows": []}


def check() -> list[str]:
    """What is wrong with the stored counts: a rule broken, a row missing, a row of other code."""
    known = {key(entry): entry for entry in stored()["rows"]}
    problems = []
    for wanted in rows():
        entry = known.get(key(wanted))
        if entry is None:
            problems.append(f"{title(wanted)}: not counted; run python -m benchmarks.static")
        elif entry["code"] != code_of(wanted["kernel"]):
            problems.append(f"{title(wanted)}: the kernel has changed; run python -m benchmarks.static")
        else:
            problems += [f"{title(entry)}: {fault}" for fault in static_counts.faults(entry)]
    return problems


def title(entry: dict) -> str:
    return f"{entry['target']} {entry['kernel']} [{entry['variant']}] {entry['dtype']} {TileConfig(**entry['tile'])}"


def show(entry: dict) -> str:
    c = entry["counts"]
    spills = (
        f"local {c['local_bytes_in_loop']}+{c['local_bytes_outside']} B"
        if "local_bytes_in_loop" in c
        else f"spilled {c['vgpr_spills']} v {c['sgpr_spills']} s"
    )
    return (
        f"{title(entry)}: {c['registers']} registers, {spills}, {c['shared_bytes'] / 1024:.0f} KiB shared, "
        f"{c['tensor_instructions']} x {', '.join(c['tensor_kinds']) or 'no tensor instruction'}, "
        f"{c['resident_warps']} warps resident"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compile nothing; hold the stored counts to the rules"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument(
        "--only", default="", help="only rows whose title holds this text; the others are kept"
    )
    options = parser.parse_args(arguments)
    if options.check:
        problems = check()
        print("\n".join(problems) or f"{len(rows())} rows hold")
        return 1 if problems else 0
    known = {key(entry): entry for entry in stored()["rows"]}
    if (
        stored().get("triton", triton.__version__) != triton.__version__
    ):  # another compiler: all are counted anew
        if options.only:
            parser.error(
                f"the stored rows are of Triton {stored()['triton']}, here is {triton.__version__}: count all"
            )
        known = {}
    todo = [
        entry
        for entry in rows()
        if options.only in title(entry)
        and (options.only or known.get(key(entry), {}).get("code") != code_of(entry["kernel"]))
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, entry in enumerate(pool.map(compile_row, todo), 1):
            known[key(entry)] = entry
            broken = static_counts.faults(entry)
            print(
                f"[{done}/{len(todo)}] {show(entry)}" + "".join(f"\n    BROKEN: {b}" for b in broken),
                flush=True,
            )
            if done % 20 == 0:
                write([known[key(entry)] for entry in rows() if key(entry) in known])
    write([known[key(entry)] for entry in rows() if key(entry) in known])
    for entry in (known[key(e)] for e in rows() if key(e) in known and not todo):
        print(show(entry))
    print("\n".join(static_floors.lines()))
    return 1 if check() else 0


def write(entries: list[dict]) -> None:
    """Store rows and floors, one row a line."""
    STORE.parent.mkdir(exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    floors = ",\n".join("  " + json.dumps(floor) for floor in static_floors.floors())
    head = json.dumps({"triton": triton.__version__, "measured_on_gpu": False})[1:-1]
    STORE.write_text(f'{{{head},\n"rows": [\n{lines}\n],\n"floors": [\n{floors}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
