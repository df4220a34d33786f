"""Step: Gaussian blur against a copy of the same pictures, and against torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import blur, peers
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender
from benchmarks.shapes import GPU_BLUR, Picture

TINY = Picture(2, 20, 20, 2.0)
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def field(dtype: torch.dtype, device: str) -> list[Contender]:
    """The copy is the baseline: what a blur that only moves its bytes would take."""
    copy = Contender(
        "bare copy", lambda inputs: inputs.images.clone, output="chw", exactness="any", baseline=True
    )
    ours = [blur.ours("triton", device), blur.ours("triton", device, "fast")]
    if dtype == torch.uint8:
        return [copy, *ours]
    return [
        copy,
        Contender("torchvision", torchvision, peers.installed("torchvision", "torchvision"), "chw"),
        Contender("kornia", blur.kornia, peers.installed("kornia", "kornia"), "chw"),
        Contender("depthwise conv2d", blur.depthwise, output="chw"),
        *ours,
    ]


def torchvision(inputs: blur.BlurInputs) -> Callable:
    from torchvision.transforms.functional import gaussian_blur

    size, sigma = [2 * inputs.radius + 1] * 2, [inputs.picture.sigma] * 2
    return lambda: gaussian_blur(inputs.images, size, sigma)


def blur_step(session: Session) -> None:
    pictures, dtypes = (GPU_BLUR, DTYPES) if not session.rehearse else ((TINY,), DTYPES[::2])
    for picture in pictures:
        for dtype in dtypes:
            inputs = blur.make_inputs(picture, dtype, session.device)
            contenders = field(dtype, session.device)
            result = session.contest(contenders, inputs, blur.BlurJudge(inputs), seconds=1.0)
            session.case(blur.describe(picture, dtype, "copy", result) | {"suite": "blur"})
