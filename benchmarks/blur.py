"""Suite `blur`: Gaussian blur of model pixels against OpenCV and others, each in the layout it likes best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vig_kernels
from benchmarks import harness, peers
from benchmarks.harness import Check, Contender
from benchmarks.heads import compare
from benchmarks.shapes import BLUR, Picture
from vig_kernels import reference

TRUNCATE = 3.0
ALLOWED = {  # of the value range, against float64
    "promise": 2e-6,
    "own": 2e-5,
    "levels": 3 / 255,  # fixed-point arithmetic
    "approximate": 0.3,  # stacked boxes, border repeated
    "any": math.inf,  # a bare copy, for the time it takes
}
GAUSSIAN, SEPARABLE = "OpenCV GaussianBlur", "OpenCV sepFilter2D"
ROUNDING = 0.5 / 255  # uint8 results are compared with the unrounded truth


@dataclass
class BlurInputs:
    picture: Picture
    images: Tensor  # (B, 3, H, W) float32 in [0, 1] or uint8

    @property
    def radius(self) -> int:
        return math.ceil(TRUNCATE * self.picture.sigma)

    def as_hwc(self):
        """(H, W, 3) contiguous numpy array of the first image."""
        return self.images[0].permute(1, 2, 0).contiguous().cpu().numpy()


def make_inputs(picture: Picture, dtype: torch.dtype, device: str = "cpu") -> BlurInputs:
    """White noise: the hardest case for an approximation."""
    draw = torch.Generator(device).manual_seed(0)
    noise = torch.rand(picture.B, 3, picture.H, picture.W, generator=draw, device=device)
    return BlurInputs(picture, (noise * 255).round().byte() if dtype == torch.uint8 else noise.to(dtype))


class BlurJudge:
    """Compares the first image of a "chw" or "hwc" output with float64, in parts of the value range."""

    def __init__(self, inputs: BlurInputs):
        self.top = 255.0 if inputs.images.dtype == torch.uint8 else 1.0
        self.truth = reference.gaussian_blur(inputs.images[0].double(), inputs.picture.sigma) / self.top
        self.dtype = inputs.images.dtype

    def __call__(self, contender: Contender, output) -> Check:
        found = output if isinstance(output, Tensor) else torch.from_numpy(output.copy())
        found = (
            found.permute(2, 0, 1) if contender.output == "hwc" else found.reshape(-1, *self.truth.shape)[0]
        )
        allowed = torch.as_tensor(ALLOWED[contender.exactness] + self._rounding(contender.exactness))
        return compare(found.to(self.truth.device).double() / self.top, self.truth, allowed)

    def _rounding(self, exactness: str) -> float:
        """What storing the result costs; a peer may round its intermediate to 16 bits too."""
        if self.dtype == torch.uint8:
            return ROUNDING
        steps = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps
        return 2 * steps if exactness == "own" else steps / 2


def opencv(inputs: BlurInputs) -> Callable:
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    image, size = inputs.as_hwc(), (2 * inputs.radius + 1,) * 2
    sigma = inputs.picture.sigma
    return lambda: cv2.GaussianBlur(image, size, sigma, borderType=cv2.BORDER_REFLECT_101)


def opencv_separable(inputs: BlurInputs) -> Callable:
    """OpenCV's separable filter with the same taps: for uint8 exact, and faster than GaussianBlur's fixed point."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    image = inputs.as_hwc()
    taps = cv2.getGaussianKernel(2 * inputs.radius + 1, inputs.picture.sigma, cv2.CV_32F)
    return lambda: cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)


def pillow(inputs: BlurInputs) -> Callable:
    import numpy
    from PIL import Image, ImageFilter

    image, blur = Image.fromarray(inputs.as_hwc()), ImageFilter.GaussianBlur(inputs.picture.sigma)
    return lambda: numpy.asarray(image.filter(blur))


def scipy(inputs: BlurInputs) -> Callable:
    from scipy import ndimage

    image, sigma, radius = inputs.images[0].numpy(), inputs.picture.sigma, inputs.radius
    return lambda: ndimage.gaussian_filter(image, sigma, axes=(1, 2), mode="mirror", radius=radius)


def kornia(inputs: BlurInputs) -> Callable:
    from kornia.filters import gaussian_blur2d

    size, sigma = (2 * inputs.radius + 1,) * 2, (inputs.picture.sigma,) * 2
    return torch.no_grad()(lambda: gaussian_blur2d(inputs.images, size, sigma, border_type="reflect"))


def depthwise(inputs: BlurInputs) -> Callable:
    """Two depthwise convolutions after a reflecting pad, as a model's author would write them."""
    radius, images = inputs.radius, inputs.images
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64, device=images.device)
    taps = torch.exp(-(steps**2) / (2 * inputs.picture.sigma**2))
    taps = (taps / taps.sum()).to(images.dtype)
    column = taps.view(1, 1, -1, 1).repeat(3, 1, 1, 1)
    row = taps.view(1, 1, 1, -1).repeat(3, 1, 1, 1)

    @torch.no_grad()
    def run():
        padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
        return F.conv2d(F.conv2d(padded, column, groups=3), row, groups=3)

    return run


def ours(backend: str, device: str = "cpu", precision: str = "float32") -> Contender:
    """The library's blur on one backend."""

    def make(inputs: BlurInputs):
        sigma = inputs.picture.sigma
        return lambda: vig_kernels.gaussian_blur(inputs.images, sigma, backend=backend, precision=precision)

    label = "gaussian_blur" if precision == "float32" else f"gaussian_blur, {precision}"
    label = f"{label}, torch backend" if backend == "torch" else label
    exactness = "promise" if precision == "float32" else "levels"
    return Contender(
        label, make, peers.backend("gaussian_blur", backend, device), "chw", exactness, ours=True
    )


def contenders(dtype: torch.dtype) -> list[Contender]:
    cv2 = peers.installed("cv2", "opencv-python-headless")
    if dtype == torch.uint8:
        return [
            Contender(SEPARABLE, opencv_separable, cv2, "hwc", "promise", baseline=True),
            Contender(GAUSSIAN, opencv, cv2, "hwc", "levels", note="fixed point, inexact"),
            Contender("Pillow", pillow, output="hwc", exactness="approximate", note="stacked boxes, inexact"),
            ours("cpu"),
        ]
    return [
        # in float32 sepFilter2D gives the bits of GaussianBlur in the same time
        Contender(GAUSSIAN, opencv, cv2, "hwc", baseline=True),
        Contender("kornia", kornia, peers.installed("kornia", "kornia"), "chw"),
        Contender("SciPy", scipy, peers.installed("scipy", "scipy"), "chw"),
        Contender("depthwise conv2d", depthwise, output="chw"),
        ours("cpu"),
        ours("torch"),
    ]


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """The cases of the suite, measured."""
    cases = []
    for dtype in (torch.float32, torch.uint8):
        for picture in BLUR:
            inputs = make_inputs(picture, dtype)
            result = harness.measure(
                contenders(dtype), inputs, BlurJudge(inputs), rounds=7 if quick else 31, say=say
            )
            cases.append(describe(picture, dtype, SEPARABLE if dtype == torch.uint8 else GAUSSIAN, result))
    return cases


def describe(picture: Picture, dtype: torch.dtype, baseline: str, result: dict) -> dict:
    """A case as it is stored."""
    name = str(dtype).removeprefix("torch.")
    return {
        "model": "images as CLIP ViT-L/14-336 sees them" if picture.H == 336 else "large images",
        "label": f"{picture}, {name}",
        "sigma": picture.sigma,
        "dtype": name,
        "ratio_to": f"/ {baseline}",
        "rows": result["rows"],
    }
