"""Split products, emulated: the interpreter multiplies float32 exactly, a tensor core does not.

tf32x3 forms a float32 product from three products of 11-bit significands, big x big + big x small + small x big,
summed in float32. These tests hold that arithmetic against the promise of linear_nll, and plain TF32 too, which
must break it, or the test would prove nothing.
"""

import numpy as np
import pytest
import torch

from vig_kernels.kernels.triton import gaussian_blur as gaussian_blur_triton
from vig_kernels.kernels.triton import launch

STEP = 32  # BLOCK_K of the float32 tiles


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 with the 13 low bits of the significand cut, as Triton's split takes its big part."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def product(a: np.ndarray, b: np.ndarray, terms) -> np.ndarray:
    """sum over K in float32, block after block of STEP, of the given products of parts of a (M, K) and b (N, K)."""
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for start in range(0, a.shape[1], STEP):
        part = slice(start, start + STEP)
        for left, right in terms(a[:, part], b[:, part]):
            total += left @ right.T
    return total


def tf32x3(a, b):
    big_a, big_b = tf32(a), tf32(b)
    small_a, small_b = tf32(a - big_a), tf32(b - big_b)
    return [(small_a, big_b), (big_a, small_b), (big_a, big_b)]


def errors(terms, D: int, spread: float) -> np.ndarray:
    """Error of every nll over its promise, 1e-5 + 1e-6 A + 2e-9 D A."""
    draw = np.random.default_rng(D)
    hidden = (draw.standard_normal((16, D)) * spread).astype(np.float32)
    weight = (draw.standard_normal((500, D)) * D**-0.5).astype(np.float32)
    exact = hidden.astype(np.float64) @ weight.astype(np.float64).T
    logits = product(hidden, weight, terms).astype(np.float64)

    def nll(z):
        top = z.max(1, keepdims=True)
        return top[:, 0] - z[:, 0] + np.log(np.exp(z - top).sum(1))

    largest = (np.abs(hidden).astype(np.float64) @ np.abs(weight).T.astype(np.float64)).max(1)
    return np.abs(nll(logits) - nll(exact)) / (1e-5 + (1e-6 + 2e-9 * D) * largest)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "xpu"])
def test_float32_is_never_plain_tf32(target, monkeypatch):
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    expected = "tf32x3" if target.startswith("sm_") else "ieee"
    assert launch.compute_precision(torch.ones(1)) == expected
    assert launch.compute_precision(torch.ones(1).bfloat16()) == "ieee"


@pytest.mark.parametrize("D", [576, 2048, 4096])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_tf32x3_keeps_the_promise_and_tf32_breaks_it(D, spread):
    assert errors(tf32x3, D, spread).max() <= 1.0
    assert errors(lambda a, b: [(tf32(a), tf32(b))], D, spread).max() > 4.0


@pytest.mark.parametrize("sigma", [2.0, 33.6])
def test_blur_by_tf32x3_keeps_the_promise_and_tf32_breaks_it(sigma):
    image = np.random.default_rng(1).uniform(0, 255, (80, 336)).astype(np.float32)
    matrix = gaussian_blur_triton.band_matrix(336, sigma, 3.0, "reflect")[0].numpy()
    exact = matrix @ image.astype(np.float64).T
    narrow = matrix.astype(np.float32)
    error = np.abs(product(narrow, image, tf32x3) - exact).max() / 255
    plain = np.abs(product(narrow, image, lambda a, b: [(tf32(a), tf32(b))]) - exact).max() / 255
    assert error <= 2e-6 < plain


@pytest.mark.parametrize("sigma", [2.0, 33.6])
def test_fast_blur_by_float16_is_within_a_thousandth(sigma):
    """Both products with float16 operands and float32 sums; the intermediate is rounded to float16."""
    image = np.random.default_rng(2).integers(0, 256, (336, 336)).astype(np.float64)
    matrix = gaussian_blur_triton.band_matrix(336, sigma, 3.0, "reflect")[0].numpy()
    half = torch.from_numpy(matrix).half().float().numpy()
    centred = ((image - 127.5) / 127.5).astype(np.float16).astype(np.float32)
    middle = (half @ centred.T).astype(np.float16).astype(np.float32)
    found = (half @ middle.T).astype(np.float64) * 127.5 + 127.5
    exact = matrix @ image @ matrix.T
    assert np.abs(found - exact).max() <= 1e-3 * 255
