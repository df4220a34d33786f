"""Suite `gpu`: the same contests on a GPU. Without one it prints its plan and measures nothing.

Rented machines end in the midst of things: each case is stored as it is done, and the same command goes on with the
rest. What matters most comes first: heads in bfloat16, pictures, then two heads in float32.

Times are CUDA events around a call, after a buffer larger than the L2 cache was overwritten; memory is the peak of
torch's allocator beyond what stood before and the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from benchmarks import blur, harness, peers, score, train
from benchmarks.harness import Contender
from benchmarks.heads import ScoreJudge, TrainJudge, make_inputs
from benchmarks.memory import MIB, output_bytes
from benchmarks.shapes import BFLOAT16, FLOAT32, GPU_BLUR, GPU_HEADS, GPU_QUICK, GPU_WIDE, Picture, Shape

DEVICE = "cuda"
FLUSH_BYTES = 256 * MIB
ROUNDS = 25
CASE_SECONDS = 5.0  # of timing; verification and compilation come on top


def why_not() -> str | None:
    """None where torch sees a GPU."""
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm GPU on this machine"


def plan(quick: bool, console: Console) -> None:
    """Says that nothing was measured, and what a GPU would be asked to do."""
    console.print(f"Nothing was measured: {why_not()}.", style="bold")
    console.print("On a machine with one, `python -m benchmarks gpu` would verify and then time:")
    shapes = GPU_QUICK if quick else GPU_HEADS
    sets = (
        ("score", [f"{s} ({s.name})" for s in shapes], score_field()),
        (
            "train",
            [f"{s} ({s.name})" for s in shapes],
            [*peers.bare_products(torch.empty(0)), *train_field()],
        ),
        ("blur", [str(picture) for picture in GPU_BLUR], blur_field(FLOAT32)),
    )
    for name, cases, field in sets:
        console.print(f"[bold]{name}[/]: " + "; ".join(cases), highlight=False)
        for contender in field:
            reason = contender.why_not()
            console.print(
                f"  {contender.name}" + (f" (here: {reason})" if reason else ""),
                markup=False,
                highlight=False,
            )
    console.print(
        f"{ROUNDS} interleaved rounds each, about {CASE_SECONDS:.0f} s a case; heads in bfloat16, "
        f"{' and '.join(shape.name for shape in GPU_WIDE)} in float32 too; nothing is stored without a GPU.",
        soft_wrap=True,
    )


def score_field() -> list[Contender]:
    return [*peers.score_peers(gpu=True), *peers.score_ours("triton", DEVICE)]


def train_field() -> list[Contender]:
    return [*peers.train_peers(gpu=True), *peers.train_ours("triton", DEVICE)]


def blur_field(dtype: torch.dtype) -> list[Contender]:
    field = [
        Contender(
            "bare copy", lambda inputs: inputs.images.clone, output="chw", exactness="any", baseline=True
        )
    ]
    if dtype != torch.uint8:
        field += [
            Contender("torchvision", _torchvision, peers.installed("torchvision", "torchvision"), "chw"),
            Contender("kornia", blur.kornia, peers.installed("kornia", "kornia"), "chw"),
            Contender("depthwise conv2d", blur.depthwise, output="chw"),
        ]
    return [*field, blur.ours("triton", DEVICE), blur.ours("triton", DEVICE, "fast")]


def _torchvision(inputs: blur.BlurInputs) -> Callable:
    from torchvision.transforms.functional import gaussian_blur

    size, sigma = [2 * inputs.radius + 1] * 2, [inputs.picture.sigma] * 2
    return lambda: gaussian_blur(inputs.images, size, sigma)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)


def event_clock(run: Callable, calls: int) -> float:
    """Milliseconds of device time a call; the cache is flushed before each."""
    pairs = []
    for _ in range(calls):
        _flush_buffer().zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        run()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / calls


def extra_mib(run: Callable) -> float:
    """Peak of the allocator during a call, less what stood before and the outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - output_bytes(output)) / MIB


def tasks(quick: bool, say: Callable[[str], None]) -> dict[str, Callable[[], dict]]:
    """What measures each case of the suite, by its name."""
    measure = {"rounds": 7 if quick else ROUNDS, "say": say}
    found: dict[str, Callable[[], dict]] = {}

    def add_heads(shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        for shape in shapes:
            for suite, case in (("score", _score_case), ("train", _train_case)):
                found[f"{suite}: {shape}, {dtype}"] = functools.partial(case, shape, dtype, **measure)

    add_heads(GPU_QUICK if quick else GPU_HEADS, BFLOAT16)
    for dtype in (FLOAT32, BFLOAT16, torch.uint8):
        for picture in GPU_BLUR:
            found[f"blur: {picture}, {dtype}"] = functools.partial(_blur_case, picture, dtype, **measure)
    add_heads(() if quick else GPU_WIDE, FLOAT32)
    return found


def _measure(field, inputs, judge, rounds: int, say) -> dict:
    result = harness.measure(
        field,
        inputs,
        judge,
        rounds=rounds,
        seconds=CASE_SECONDS,
        timer=event_clock,
        extra_mib=extra_mib,
        settle_s=0.0,
        say=say,
    )
    torch.cuda.empty_cache()
    return result


def _blur_case(picture: Picture, dtype: torch.dtype, rounds: int, say) -> dict:
    inputs = blur.make_inputs(picture, dtype, DEVICE)
    result = _measure(blur_field(dtype), inputs, blur.BlurJudge(inputs), rounds, say)
    return blur.describe(picture, dtype, "copy", result) | {"suite": "blur"}


def _score_case(shape: Shape, dtype: torch.dtype, rounds: int, say) -> dict:
    inputs = make_inputs(shape, dtype, DEVICE)
    result = _measure(score_field(), inputs, ScoreJudge(inputs), rounds, say)
    return score.describe(shape, dtype, result, score.COMPARISONS) | {"suite": "score"}


def _train_case(shape: Shape, dtype: torch.dtype, rounds: int, say) -> dict:
    inputs = make_inputs(shape, dtype, DEVICE)
    upstream = torch.rand(shape.N, shape.V, device=DEVICE, dtype=dtype)
    field = [*peers.bare_products(upstream), *train_field()]
    result = _measure(field, inputs, TrainJudge(inputs, upstream), rounds, say)
    return score.describe(shape, dtype, result, train.COMPARISONS) | {"suite": "train"}
