"""gaussian_blur against its float64 specification and against scipy, on every backend that can run here."""

import math

import numpy as np
import pytest
import torch
from cases import runners

from vig_kernels import gaussian_blur, reference

every = pytest.mark.parametrize(("backend", "device"), runners("gaussian_blur"))
SIGMAS = [0.0, 0.3, 1.0, 7.7, 40.0, (0.0, 3.0), (9.0, 0.5)]
SHAPES = [(2, 3, 21, 34), (1, 1), (5, 1), (1, 7), (3, 70, 9), (2, 1, 3, 16, 16)]


def image(shape, dtype, device="cpu", seed=0):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((values * 255).round().to(torch.uint8) if dtype == torch.uint8 else values.to(dtype)).to(device)


def assert_blurred(found, images, sigma, border, precision="float32"):
    assert found.dtype == images.dtype and found.shape == images.shape
    exact = reference.gaussian_blur(images.double(), sigma, border=border)
    error = (found.double() - exact).abs().max() if found.numel() else torch.tensor(0.0)
    if images.dtype == torch.uint8:
        assert error <= (0.5 if precision == "float32" else 1.0) + 255 * 2e-6
    else:
        step = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}[
            images.dtype
        ]  # half an ulp of 1
        assert error <= (2e-6 if precision == "float32" else 1e-3) + step


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("border", ["reflect", "replicate"])
@pytest.mark.parametrize("sigma", SIGMAS, ids=str)
def test_values(sigma, border, dtype, backend, device):
    for shape in SHAPES:
        images = image(shape, dtype, device)
        for precision in ("float32", "fast"):
            found = gaussian_blur(images, sigma, border=border, precision=precision, backend=backend)
            assert_blurred(found, images, sigma, border, precision)


@every
@pytest.mark.parametrize(("border", "mode"), [("reflect", "mirror"), ("replicate", "nearest")])
def test_agrees_with_scipy(border, mode, backend, device):
    images = image((40, 50), torch.float32, device)
    ndimage = pytest.importorskip("scipy.ndimage")  # a source checkout may have no more than torch and pytest
    exact = ndimage.gaussian_filter(images.cpu().double().numpy(), 3.0, mode=mode, radius=9)
    found = gaussian_blur(images, 3.0, border=border, backend=backend)
    np.testing.assert_allclose(found.cpu().numpy(), exact, atol=2e-6)


@every
def test_truncate_sets_the_radius(backend, device):
    line = torch.zeros(1, 41, device=device)
    line[0, 20] = 1.0
    for truncate, radius in ((3.0, 6), (1.0, 2), (2.2, 5)):
        found = gaussian_blur(line, 2.0, truncate=truncate, backend=backend)
        assert int((found > 0).sum()) == 2 * radius + 1 and abs(found.sum() - 1) < 1e-6


@every
def test_constant_images_stay(backend, device):
    for value in (0, 127, 255):
        images = torch.full((3, 50, 31), value, dtype=torch.uint8, device=device)
        assert torch.equal(gaussian_blur(images, 6.0, backend=backend), images)


@every
def test_uint8_rounds_half_to_even(backend, device):
    sigma = (2 * math.log(2)) ** -0.5  # exp(-1 / (2 sigma^2)) = 1/2: the taps are 1/4, 1/2, 1/4
    for row, middle in (
        ((0, 0, 2), 0),
        ((2, 1, 2), 2),
        ((2, 2, 4), 2),
        ((4, 3, 4), 4),
        ((254, 255, 254), 254),
    ):
        images = torch.tensor([row], dtype=torch.uint8, device=device)
        found = gaussian_blur(images, (0.0, sigma), truncate=1.0, backend=backend)
        assert found[0, 1] == middle, row


@every
def test_one_sigma_per_image(backend, device):
    images = image((4, 3, 20, 24), torch.float32, device)
    sigma = torch.tensor([1.0, 5.0, 0.0, 5.0])
    found = gaussian_blur(images, sigma, backend=backend)
    for one, picture, value in zip(found, images, sigma.tolist(), strict=True):
        assert_blurred(one, picture, value, "reflect")
    tiles = image((2, 3, 3, 16, 12), torch.float32, device)
    found = gaussian_blur(tiles, torch.tensor([1.0, 4.0]), backend=backend)
    assert_blurred(found[1], tiles[1], 4.0, "reflect")
    gray = image((3, 20, 24), torch.float32, device)
    assert_blurred(
        gaussian_blur(gray, torch.tensor([1.0, 2.0, 3.0]), backend=backend)[2], gray[2], 3.0, "reflect"
    )


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_any_strides(dtype, backend, device):
    images = image((2, 3, 30, 40), dtype, device)
    expected = gaussian_blur(images, 2.0, backend=backend)
    views = {
        "channels last": images.to(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "cut": torch.nn.functional.pad(images, (3, 5, 2, 1))[..., 2:-1, 3:-5],
        "flipped steps": images.repeat_interleave(2, -1)[..., ::2],
        "expanded": images[:1].expand(2, -1, -1, -1),
    }
    for name, view in views.items():
        wanted = expected[:1].expand(2, -1, -1, -1) if name == "expanded" else expected
        found = gaussian_blur(view, 2.0, backend=backend)
        assert (found.double() - wanted.double()).abs().max() <= (1 if dtype == torch.uint8 else 2e-6), name


@every
def test_out(backend, device):
    images = image((2, 3, 17, 19), torch.float32, device)
    expected = gaussian_blur(images, 2.0, backend=backend)
    for out in (
        torch.full_like(images, 9.0),
        torch.full_like(images, 9.0).to(memory_format=torch.channels_last),
        torch.full((2, 3, 19, 17), 9.0, device=device).transpose(2, 3),
    ):
        assert gaussian_blur(images, 2.0, out=out, backend=backend) is out
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    apart = torch.full((3, 2, 2, 17, 19), 9.0, device=device).permute(
        2, 1, 0, 3, 4
    )  # leading sizes do not merge
    deep = images.unsqueeze(1).expand(2, 2, 3, 17, 19)
    gaussian_blur(deep, 2.0, out=apart, backend=backend)
    torch.testing.assert_close(apart[:, 1], expected, atol=2e-6, rtol=0)
    itself = images.clone()
    gaussian_blur(itself, 2.0, out=itself, backend=backend)
    torch.testing.assert_close(itself, expected, atol=2e-6, rtol=0)


@every
def test_nothing_to_blur(backend, device):
    for shape in ((0, 3, 8, 8), (3, 0, 8), (2, 3, 8, 0)):
        assert gaussian_blur(torch.empty(shape, device=device), 2.0, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -1.0}, "sigma_y=-1.0 is negative"),
        ({"sigma": float("nan")}, "sigma_y=nan is not a finite"),
        ({"sigma": (1.0, 2.0, 3.0)}, "got 3 values"),
        (
            {"sigma": torch.ones(3)},
            r"sigma as a tensor with one value per leading image of \(2, 3, 8, 8\), got \(3,\)",
        ),
        ({"sigma": torch.tensor([1.0, -2.0])}, "sigma_y of image 1 is -2.0"),
        ({"sigma": "2"}, "expected sigma_y to be a number, got str '2'"),
        ({"truncate": 0.0}, "truncate=0.0 is not a finite positive"),
        ({"border": "wrap"}, "border='wrap' is not one of 'reflect', 'replicate'"),
        ({"precision": "best"}, "precision='best' is not one of"),
        ({"images": torch.zeros(4)}, r"expected images \(..., H, W\), got \(4,\)"),
        ({"images": torch.zeros(4, 4, dtype=torch.int32)}, "got int32"),
        ({"out": torch.zeros(2, 3, 8, 9)}, r"expected out \(2, 3, 8, 8\)"),
        ({"out": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "got .*uint8"),
    ],
)
def test_bad_arguments_show_their_value(change, message):
    arguments = {"images": torch.zeros(2, 3, 8, 8), "sigma": 1.0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        gaussian_blur(arguments.pop("images"), arguments.pop("sigma"), **arguments)


@every
def test_a_sigma_tensor_must_fit_the_leading_images(backend, device):
    for shape, sigma in (
        ((9, 12), (9,)),
        ((3, 9, 12), (3, 9)),
        ((2, 3, 9, 12), (2, 3)),
        ((2, 3, 9, 12), (3,)),
    ):
        with pytest.raises(ValueError, match="leading image"):
            gaussian_blur(torch.rand(shape, device=device), torch.full(sigma, 2.0), backend=backend)
    found = gaussian_blur(torch.rand(9, 12, device=device), torch.tensor(2.0), backend=backend)
    assert found.shape == (9, 12)


@every
def test_taps_without_end_are_refused(backend, device):
    for sigma in (1e5, 3.2e18, 1e300, (0.0, 1e19)):
        with pytest.raises(ValueError, match="at most 65536"):
            gaussian_blur(torch.rand(9, 12, device=device), sigma, backend=backend)
    tiny = torch.rand(9, 12, device=device)
    torch.testing.assert_close(gaussian_blur(tiny, 1e-200, backend=backend), tiny, rtol=0, atol=2e-6)


@pytest.mark.skipif("cpu" not in {name for name, _ in runners("gaussian_blur")}, reason="no compiled kernels")
@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6, 2.0, 50.0, (50.0, 0.0)], ids=str)
def test_a_pixel_that_is_not_finite_reaches_as_far_as_the_taps(sigma):
    images = torch.rand(400, 64)
    images[200, 30] = float("inf")
    spoiled = ~gaussian_blur(images, sigma, backend="cpu").isfinite()
    down, across = (math.ceil(3 * s) for s in (sigma if isinstance(sigma, tuple) else (sigma, sigma)))
    expected = torch.zeros(400, 64, dtype=torch.bool)
    expected[200 - down : 201 + down, max(0, 30 - across) : 31 + across] = True
    assert torch.equal(spoiled, expected)


def test_arguments_from_numpy():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(gaussian_blur(images, np.float32(2)), gaussian_blur(images, 2.0))
    with pytest.raises(TypeError, match="pass a tensor"):
        gaussian_blur(images, np.array([1.0, 2.0]))


def test_out_must_not_share_memory_with_itself():
    with pytest.raises(ValueError, match="share memory"):
        gaussian_blur(torch.rand(2, 3, 8, 8), 1.3, out=torch.empty(1, 3, 8, 8).expand(2, 3, 8, 8))


@every
def test_the_smallest_sigmas_leave_the_image_as_it_is(backend, device):
    """Their squares underflow; the specification raised OverflowError."""
    images = torch.rand(1, 5, 6, device=device)
    for sigma in (1e-300, 5e-324):
        assert torch.equal(gaussian_blur(images, sigma, backend=backend), images)
        assert torch.equal(gaussian_blur(images, sigma, backend="reference"), images)
