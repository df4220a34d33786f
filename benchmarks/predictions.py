"""What each op should take on a GPU that nobody has timed it on: computed, never measured.

An op is a list of launches. What each of them multiplies, moves and waits for stands here once, in `score`, `train`
and `blur`; registers, resident blocks and instructions come from the compiled code (results/static.json), tiles and
chunks from the tables that the ops read. The time of a launch is the longest of

    waves x (products + epilogue + fill)      a block alone on its multiprocessor cannot hide its epilogue; two can
    bytes / bandwidth
    waves x dependent loads x latency

and a call is the sum of its launches with a gap after each. What is assumed, not counted, is `SUSTAINED` and the
constants below it. The report sets what was measured beside what was predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

from benchmarks import static_floors
from benchmarks.gpu import tables as tables_of_gpu
from benchmarks.results import FOLDER
from benchmarks.static_floors import BLURS, GPU, GPUS, HEADS
from vig_kernels.kernels.triton.linear_cross_entropy import FINISH_ROWS
from vig_kernels.kernels.triton.logit_fold import COMBINE_PARTS, COMBINE_ROWS
from vig_kernels.kernels.triton.row_order import ORDER_BLOCK, SMALL_ROWS
from vig_kernels.kernels.triton.target_residual import BLOCK_W, ENTRIES
from vig_kernels.kernels.triton.tile_configs import BLUR, HEAD, NARROW, TileConfig

SUSTAINED = {  # parts of the data sheet's FLOP/s and bytes/s that long library calls keep under their power limit
    "A100 SXM 80 GB": (0.87, 0.88),
    "H100 SXM": (0.80, 0.90),
    "H200 SXM": (0.80, 0.90),
    "B200": (0.70, 0.90),
    "MI300X": (0.55, 0.80),
}
LOOP = 0.95  # of the vendor's rate in our main loops
FILL_S = 1.0e-6  # until the first products of a block: its launch, addresses, first loads
LATENCY_S = 0.6e-6  # of a load that another one waits for
GAP_S = 1.5e-6  # between two launches of a stream
SMALL_S = 2.0e-6  # a kernel that has next to nothing to do
CASTS = 1  # small kernels of a scalar loss: its sum
ISSUE = {
    "sm_80": 4.0,
    "sm_90": 4.0,
    "sm_100": 4.0,
    "gfx942": 1.0,
}  # warp instructions a cycle and multiprocessor
SPECIAL = {"sm_80": 0.5, "sm_90": 0.5, "sm_100": 0.5, "gfx942": 0.25}  # of them, exponentials and the like
SIZE = {"bfloat16": 2, "float32": 4, "uint8": 1}
OPS = ("linear_nll", "linear_vig", "linear_cross_entropy")


@dataclass(frozen=True)
class Launch:
    """`times` launches of a kernel that are alike. tile: of our own tile kernels; a vendor's product has none."""

    kernel: str
    programs: int = 1
    flop: float = 0.0
    moved: float = 0.0  # bytes
    chain: int = 0  # loads of a program that wait for one another
    tile: TileConfig | None = None
    times: int = 1


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one call. `products_ms`: the vendor's bare products of the same shape, None for a blur."""

    op: str
    gpu: str
    dtype: str
    shape: tuple[int | float, ...]
    floor_ms: float
    predicted_ms: float
    products_ms: float | None
    launches: int


class NotCounted(LookupError):
    """results/static.json has no such row."""


@cache
def counted() -> dict[tuple, dict]:
    """Counts of the leanest variant of each (kernel, target, dtype, tile), without masks along D if there is one."""
    rows = json.loads((FOLDER / "static.json").read_text())["rows"]
    rows.sort(key=lambda row: (row["options"]["even_k"], -sum(v is True for v in row["options"].values())))
    return {_key(row["kernel"], row["target"], row["dtype"], row["tile"]): row["counts"] for row in rows}


def _key(kernel: str, target: str, dtype: str, tile: dict) -> tuple:
    return kernel, target, dtype, *sorted(tile.items())


def counts_of(kernel: str, target: str, dtype: str, tile: TileConfig) -> dict:
    found = counted().get(_key(kernel, target, dtype, asdict(tile)))
    if found is None:
        raise NotCounted(f"{target} {kernel} {dtype} {tile} is not counted: run python -m benchmarks static")
    return found


# --- time ---


def rates(gpu: GPU, dtype: str) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that last."""
    compute, memory = SUSTAINED[gpu.name]
    return compute * (gpu.float32 if dtype == "float32" else gpu.bf16), memory * gpu.bandwidth


def seconds(launch: Launch, gpu: GPU, dtype: str) -> float:
    """Of one of the launches."""
    compute, bandwidth = rates(gpu, dtype)
    by_bytes = launch.moved / bandwidth
    if launch.tile is None:
        waves = math.ceil(launch.programs / (8 * gpu.processors))
        return max(SMALL_S, by_bytes, launch.flop / compute, waves * launch.chain * LATENCY_S)
    counts = counts_of(launch.kernel, gpu.target, dtype, launch.tile)
    blocks = counts["resident_warps"] // launch.tile.num_warps
    waves = math.ceil(launch.programs / (gpu.processors * blocks))
    products = launch.flop / launch.programs * gpu.processors / (LOOP * compute)
    alone = products + epilogue(launch.tile, counts, gpu) + FILL_S
    return max(waves * max(alone, blocks * products), by_bytes)


def epilogue(tile: TileConfig, counts: dict, gpu: GPU) -> float:
    """Seconds of a block after its main loop, as many as the instructions of its shortest path take to issue."""
    cycles = max(
        tile.num_warps * counts["shortest_instructions"] / ISSUE[gpu.target],
        tile.num_warps * counts["shortest_special"] / SPECIAL[gpu.target],
    )
    return cycles / (SUSTAINED[gpu.name][0] * gpu.clock)


def call_ms(launches: list[Launch], gpu: GPU, dtype: str) -> float:
    return 1e3 * sum(launch.times * (seconds(launch, gpu, dtype) + GAP_S) for launch in launches)


# --- the ops, launch by launch ---


def tile_of(kernel: str, target: str, dtype: str, D: int) -> TileConfig:
    return HEAD[kernel, target, "float32" if dtype == "float32" else "16-bit"][D <= NARROW]


def fold(kernel: str, shape: tuple, gpu: GPU, dtype: str, passes: int = 1) -> Launch:
    """One launch over `shape` = (rows, D, V). The weight comes once a group of row tiles; "store" leaves a block."""
    (rows, D, V), size = shape, SIZE[dtype]
    tile = tile_of(kernel, gpu.target, dtype, D)
    row_tiles, vocab_tiles = math.ceil(rows / tile.block_n) * passes, math.ceil(V / tile.block_v)
    moved = size * D * (V * math.ceil(row_tiles / tile.group) + passes * rows)
    moved += 8 * passes * rows * vocab_tiles * tile.parts
    moved += size * rows * V if kernel == "store" else 0
    flop = 2.0 * tile.block_n * tile.block_v * D * row_tiles * vocab_tiles  # ragged tiles are computed whole
    return Launch(kernel, row_tiles * vocab_tiles, flop, moved, tile=tile)


def combine(rows: int, parts: int) -> Launch:
    """Two sweeps over a row's parts, each step waiting for its loads."""
    programs, steps = math.ceil(rows / COMBINE_ROWS), math.ceil(parts / COMBINE_PARTS)
    return Launch("combine", programs, moved=16.0 * rows * parts, chain=2 * steps)


def order(N: int) -> Launch:
    """One program that sees the targets twice, or eight of torch's kernels."""
    if N > SMALL_ROWS:
        return Launch("order", times=8)
    return Launch("order", moved=24.0 * N, chain=2 * math.ceil(N / ORDER_BLOCK))


def parts_of(tile: TileConfig, V: int) -> int:
    return math.ceil(V / tile.block_v) * tile.parts


def score(N: int, D: int, V: int, gpu: GPU, dtype: str, passes: int = 1) -> list[Launch]:
    """linear_nll, or with two passes linear_vig."""
    first = fold("fold", (N, D, V), gpu, dtype, passes)
    joined = combine(N, parts_of(first.tile, V))
    return [order(N), first, *[joined] * passes]


def train(N: int, D: int, V: int, gpu: GPU, dtype: str) -> list[Launch]:
    """linear_cross_entropy with both gradients, memory="fast", all rows kept and told."""
    size = SIZE[dtype]
    rows = static_floors.train_rows(N, D, V, gpu.target, size)
    chunks = math.ceil(N / rows)
    rows = N / chunks  # the last chunk is shorter: their mean
    store = fold("store", (math.ceil(rows), D, V), gpu, dtype)
    parts, block, weight = parts_of(store.tile, V), size * rows * V, size * V * D
    product = 2.0 * rows * D * V
    chunk = [
        store,
        combine(math.ceil(rows), parts),
        Launch("finish", math.ceil(rows / FINISH_ROWS) * parts, moved=2 * block),
        Launch("hidden gradient", flop=product, moved=block + weight + 4 * rows * D),
    ]
    once = [order(N), Launch("small", times=CASTS)]
    if static_floors.kept_whole(N, D, V, gpu.target, size):
        backward = [
            Launch("rows", moved=(4 + 3.0 * size) * N * D),
            Launch("weight gradient", flop=product, moved=block + weight + size * N * D),
        ]
        return [*once, *chunk, *backward]
    once.append(Launch("zeros of the hidden gradient", moved=4.0 * N * D))
    if size == 2:
        once.append(Launch("hidden gradient in the operands' type", moved=(4 + size) * N * D))
    chunk += [Launch("rows out", moved=8 * rows * D, times=2), Launch("rows in", moved=2 * size * rows * D)]
    first = Launch("weight gradient, written", flop=product, moved=block + 4.0 * V * D + size * rows * D)
    more = Launch("weight gradient, added", flop=product, moved=first.moved + 4.0 * V * D, times=chunks - 1)
    if size == 2:
        once.append(Launch("weight gradient in the operands' type", moved=(4 + size) * V * D))
        entries, columns = math.ceil(rows / ENTRIES), math.ceil(D / BLOCK_W)
        chunk += [
            Launch("residual of the hidden rows", moved=10.0 * rows * D),
            Launch("residual of the weight", entries * columns, moved=10.0 * rows * D, chain=3 * ENTRIES),
        ]
    return [*once, *(_times(launch, chunks) for launch in chunk), first, *[more] * (chunks > 1)]


def _times(launch: Launch, chunks: int) -> Launch:
    return Launch(**{**vars(launch), "times": launch.times * chunks})


def blur(planes: int, H: int, W: int, sigma: float, gpu: GPU, dtype: str) -> list[Launch]:
    """gaussian_blur in float32: two products with banded matrices; what lies between them stays in the cache."""
    tile = BLUR[gpu.target, "float32"]
    flop, moved = static_floors.blur(planes, H, W, sigma, gpu.target, SIZE[dtype])
    programs = planes * math.ceil(H / tile.block_n) * math.ceil(W / tile.block_v)
    return [
        Launch(kernel, programs, flop / 2, moved / 2, tile=tile) for kernel in ("blur read", "blur write")
    ]


# --- the table ---


def predictions() -> list[Prediction]:
    """Every op at every shape on every GPU: heads in bfloat16, pictures in float32."""
    found = [head(op, shape, gpu) for op in OPS for *shape, _ in HEADS for gpu in GPUS]
    return found + [picture(shape, gpu) for shape in BLURS for gpu in GPUS]


def head(op: str, shape: list[int], gpu: GPU, dtype: str = "bfloat16") -> Prediction:
    passes = 2 if op == "linear_vig" else 1
    if op == "linear_cross_entropy":
        launches = train(*shape, gpu, dtype)
        work = static_floors.train(*shape, gpu.target, SIZE[dtype])
        products = 3
    else:
        launches = score(*shape, gpu, dtype, passes)
        work = static_floors.score(*shape, gpu.target, SIZE[dtype], passes)
        products = passes
    return _prediction(op, gpu, dtype, tuple(shape), work, launches, products * bare_ms(shape, gpu, dtype))


def picture(shape: tuple, gpu: GPU, dtype: str = "float32") -> Prediction:
    work = static_floors.blur(*shape, gpu.target, SIZE[dtype])
    return _prediction("gaussian_blur", gpu, dtype, shape, work, blur(*shape, gpu, dtype), None)


def _prediction(op, gpu: GPU, dtype: str, shape, work, launches: list[Launch], products_ms) -> Prediction:
    flop, moved = work
    floor = max(flop / (gpu.float32 if dtype == "float32" else gpu.bf16), moved / gpu.bandwidth)
    count = sum(launch.times for launch in launches)
    return Prediction(
        op, gpu.name, dtype, shape, 1e3 * floor, call_ms(launches, gpu, dtype), products_ms, count
    )


def bare_ms(shape: list[int], gpu: GPU, dtype: str) -> float:
    """The vendor's product hidden @ weight.T, logits written."""
    (N, D, V), size = shape, SIZE[dtype]
    product = Launch("bare", flop=2.0 * N * D * V, moved=size * (N * D + V * D + N * V))
    return call_ms([product], gpu, dtype)


def tables() -> Iterator[list[list[str]]]:
    """One table an op, a row a shape, a column a GPU: floor, predicted, and predicted over the bare products."""
    found = predictions()
    for op in dict.fromkeys(p.op for p in found):
        mine = [p for p in found if p.op == op]
        what = "floor, predicted" if mine[0].products_ms is None else "floor, predicted (/ products)"
        table = [[f"{op}, {mine[0].dtype}: {what}, ms", *(gpu.name for gpu in GPUS)]]
        for shape in dict.fromkeys(p.shape for p in mine):
            cells = [_cell(p) for p in mine if p.shape == shape]
            table.append([shape_name(op, shape), *cells])
        yield table


def measured_table(found: list[dict]) -> list[list[str]]:
    """Prediction against measurement, row by row, of every GPU that the suite `gpu` has run on."""
    table = [
        [
            "prediction against measurement, device ms",
            "floor",
            "predicted",
            "measured",
            "measured / predicted",
        ]
    ]
    for result in found:
        gpu = card_of(result["machine"]["gpu"]["name"])
        for op, dtype, shape, ms in tables_of_gpu.measured(result) if gpu else ():
            p = head(op, list(shape), gpu, dtype)
            name = f"{result['machine']['gpu']['name']}: {op}, {shape_name(op, shape)}, {dtype}"
            numbers = (p.floor_ms, p.predicted_ms, ms, ms / p.predicted_ms)
            table.append([name, *(f"{number:.3g}" for number in numbers)])
    if len(table) == 1:
        table.append([f"any GPU: {tables_of_gpu.NOT_MEASURED}", "", "", "", ""])
    return table


def card_of(name: str) -> GPU | None:
    """The row of GPUS that a device's name belongs to, such as "NVIDIA H100 80GB HBM3"; None of others."""
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in name.replace("-", " ").split()), None)


def shape_name(op: str, shape: tuple) -> str:
    if op == "gaussian_blur":
        planes, H, W, sigma = shape
        return f"{planes // 3} × 3 × {H} × {W}, sigma {sigma:g}"
    return " × ".join(map(str, shape))


def _cell(p: Prediction) -> str:
    share = "" if p.products_ms is None else f" ({p.predicted_ms / p.products_ms:.2f})"
    return f"{p.floor_ms:.3g}, {p.predicted_ms:.3g}{share}"
