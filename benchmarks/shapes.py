"""Shapes of LM heads and images, named after the models they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    name: str  # whose head it is
    N: int  # rows: answer tokens in a batch
    D: int  # hidden width
    V: int  # vocabulary

    def __str__(self) -> str:
        return f"{self.N} x {self.D} x {self.V}"

    @property
    def gemm_flops(self) -> int:
        """Floating-point operations of hidden @ weight.T."""
        return 2 * self.N * self.D * self.V


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

# The shapes of the library's promises, in both precisions...
SCORE = (
    Shape("32k vocabulary, 2048 wide", 512, 2048, 32000),
    Shape("Qwen2.5 1.5B, Open-Qwen2VL", 256, 1536, 151936),
    Shape("SmolVLM-256M", 4096, 576, 49152),
)
# ...and heads of further models with one small batch, in the precision they are used in.
MODELS = (
    Shape("LLaVA-1.5 7B", 128, 4096, 32000),
    Shape("Qwen2.5-VL-3B", 128, 2048, 151936),
    Shape("Gemma 3 4B", 128, 2560, 262208),
)
TRAIN = (
    Shape("32k vocabulary, 2048 wide", 512, 2048, 32000),
    Shape("65k vocabulary, 1536 wide", 256, 1536, 65536),
)
TRAIN_MANY_ROWS = SCORE[2:]  # the suite `memory` only: many rows are where logits are large
QUICK = (Shape("a small head", 192, 576, 16384),)
GPU_HEADS = (
    Shape("LLaVA-1.5 7B", 8192, 4096, 32000),
    Shape("Qwen2.5-VL-3B", 8192, 2048, 151936),
    Shape("SmolVLM-256M", 16384, 576, 49152),
    Shape("Gemma 3 4B", 8192, 2560, 262208),
    Shape("Qwen2.5-VL-7B width, 152k vocabulary", 8192, 4096, 151936),
)


@dataclass(frozen=True)
class Picture:
    """A batch of images to blur."""

    B: int
    H: int
    W: int
    sigma: float

    def __str__(self) -> str:
        batch = f"{self.B} x " if self.B > 1 else ""
        return f"{batch}3 x {self.H} x {self.W}, sigma {self.sigma:g}"


BLUR = tuple(Picture(1, 336, 336, sigma) for sigma in (2.0, 8.0, 20.0))
GPU_BLUR = tuple(Picture(64, size, size, 0.1 * size) for size in (336, 672))


def score_cases(quick: bool) -> list[tuple[Shape, torch.dtype]]:
    if quick:
        return [(shape, dtype) for shape in QUICK for dtype in (FLOAT32, BFLOAT16)]
    return [(shape, dtype) for shape in SCORE for dtype in (FLOAT32, BFLOAT16)] + [
        (s, BFLOAT16) for s in MODELS
    ]


def train_cases(quick: bool) -> list[tuple[Shape, torch.dtype]]:
    return [(shape, dtype) for shape in (QUICK if quick else TRAIN) for dtype in (FLOAT32, BFLOAT16)]
