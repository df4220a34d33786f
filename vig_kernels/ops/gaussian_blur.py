"""Gaussian blur of images or model pixels, per-image strength, exact borders."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference
from vig_kernels.ops import registration
from vig_kernels.problem import Gaussian

BORDERS = ("reflect", "replicate")
PRECISIONS = ("float32", "fast")
MAX_RADIUS = 1 << 16  # pixels; taps and border tables of this length are made for every call
DTYPES = (torch.uint8, *check.FLOATS)


def gaussian_blur(
    images: Tensor,  # (..., H, W)
    sigma: float | tuple[float, float] | Tensor,
    *,
    truncate: float = 3.0,
    border: str = "reflect",
    precision: str = "float32",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[i, j] = sum_{k, l} g_y[k] g_x[l] images[i + k, j + l],  g[k] ~ exp(-k^2 / (2 sigma^2)), sum g = 1.

    Args:
        images: (..., H, W) uint8, float32, bfloat16 or float16; any strides.
        sigma: standard deviation in pixels, at least 0 (0 leaves the image as it is). A number; a pair
            (sigma_y, sigma_x) as a tuple or list; or a tensor with one value per leading image, whose shape is the
            beginning of images.shape: (B,) for (B, C, H, W). A tensor on a GPU is read back to the host.
        truncate: the taps reach ceil(truncate * sigma) pixels, which may exceed H or W, and at most 65536.
        border: "reflect" mirrors about the edge sample without repeating it, as often as needed (numpy "reflect",
            scipy "mirror", OpenCV BORDER_REFLECT_101); "replicate" repeats the edge sample.
        precision: "float32" is accurate to 2e-6 of the value range; "fast" may use 16-bit products and is within
            1e-3 of the range, one level of uint8.
        out: a tensor of the same shape, dtype and device to write to; it may be `images` itself.

    Returns:
        A tensor of the shape and dtype of images (`out` if given). uint8 is rounded half to even. No gradient.
        A pixel that is not finite spoils at least what its taps reach, on some backends more.

    Raises:
        ValueError, TypeError: with the offending value. BackendUnavailable: a named backend that cannot run here.
    """
    check.tensor("images", images, DTYPES)
    check.require(images.ndim >= 2, ValueError, f"expected images (..., H, W), got {tuple(images.shape)}")
    check.forward_mode(images, cure="the blur has no gradient, so detach images")
    check.flag("border", border, BORDERS)
    check.flag("precision", precision, PRECISIONS)
    truncate = check.number("truncate", truncate, positive=True)
    if out is not None:
        check.tensor("out", out, DTYPES)
        if (out.shape, out.dtype, out.device) != (images.shape, images.dtype, images.device):
            raise ValueError(
                f"expected out {tuple(images.shape)} {images.dtype} on {images.device}, got {tuple(out.shape)} "
                f"{out.dtype} on {out.device}"
            )
        if any(step == 0 and size > 1 for size, step in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(
                f"out {tuple(out.shape)} with strides {out.stride()} holds elements that share memory: pass out.clone()"
            )
    lead = _lead(images.shape)
    sigma_y, sigma_x = _sigmas(sigma, images.shape, math.prod(lead[:-1]))
    name = dispatch.resolve("gaussian_blur", backend, images.device)
    with torch.no_grad():
        if images.numel() == 0:
            return torch.empty_like(images) if out is None else out
        flat = images.reshape(math.prod(lead[:-1]), lead[-1], *images.shape[-2:])
        options = (sigma_y, sigma_x, truncate, border, precision, name)  # a Gaussian, and the backend
        if out is None:
            return _op(flat, *options).reshape(images.shape)
        if _viewable(out, flat.shape):
            _op_out(flat, *options, out.view(flat.shape))
        else:
            out.copy_(_op(flat, *options).reshape(images.shape))
        return out


def _lead(shape) -> tuple[int, ...]:
    """Leading dimensions with the channels last: (B, C), and (L, 1) for (L, H, W), (1, 1) for (H, W)."""
    lead = tuple(shape[:-2])
    return lead if len(lead) >= 2 else (*lead, 1) if lead else (1, 1)


def _viewable(out: Tensor, shape) -> bool:
    """Whether out can be seen as (L, C, H, W) without a copy."""
    try:
        out.view(shape)
    except RuntimeError:
        return False
    return True


def _sigmas(sigma, shape, leading: int) -> tuple[Tensor, Tensor]:
    """(L,) float64 CPU tensors: vertical and horizontal sigma of each leading image."""
    if isinstance(sigma, Tensor):
        # leading dimensions that may have their own: none of (H, W), L of (L, H, W), B of (B, C, H, W)
        most = max(min(1, len(shape) - 2), len(shape) - 3)
        if sigma.shape != shape[: sigma.ndim] or sigma.ndim > most:
            raise ValueError(
                f"expected sigma as a tensor with one value per leading image of {tuple(shape)}, got "
                f"{tuple(sigma.shape)}"
            )
        values = sigma.detach().to("cpu", torch.float64)
        each = values.reshape(-1, 1).expand(-1, leading // max(1, values.numel())).reshape(-1).contiguous()
        return (each, each) if sigma.ndim else (values.expand(leading).contiguous(),) * 2
    if hasattr(sigma, "__array__") and getattr(sigma, "ndim", 0) > 0:
        raise TypeError(f"sigma is a {type(sigma).__name__}: pass a tensor, torch.as_tensor(sigma)")
    pair = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)
    if len(pair) != 2:
        raise ValueError(
            f"expected sigma as a number, a pair (y, x) or a tensor, got {len(pair)} values: {sigma!r:.80}"
        )
    for name, value in zip(("sigma_y", "sigma_x"), pair, strict=True):
        if check.number(name, value) < 0:
            raise ValueError(f"{name}={value!r} is negative")
    return tuple(torch.full((leading,), float(value), dtype=torch.float64, device="cpu") for value in pair)


def _blur(images: Tensor, gaussian: Gaussian, backend: str, out: Tensor) -> None:
    truncate = gaussian.truncate
    for name, sigma in (("sigma_y", gaussian.sigma_y), ("sigma_x", gaussian.sigma_x)):
        for at, value in enumerate(sigma.tolist()):  # a few numbers: Python is faster than an op
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of image {at} is {value}, not a finite number of at least 0")
            if truncate * value > MAX_RADIUS:
                raise ValueError(
                    f"{name} of image {at} is {value}: with truncate={truncate} its taps would reach "
                    f"{truncate * value:.6g} pixels, at most {MAX_RADIUS} are possible"
                )
    if backend == "reference":
        options = {"truncate": truncate, "border": gaussian.border}
        sigmas = zip(gaussian.sigma_y.tolist(), gaussian.sigma_x.tolist(), strict=True)
        for image, sigma, to in zip(images, sigmas, out, strict=True):
            to.copy_(reference.gaussian_blur(image, sigma, **options))
        return
    run = dispatch.module("gaussian_blur", backend).forward
    with check.no_autocast(images.device):
        run(images, gaussian, out)


SCHEMA = (
    "Tensor images, Tensor sigma_y, Tensor sigma_x, float truncate, str border, str precision, str backend"
)


def _run(images, *args):
    out = images.new_empty(images.shape)
    _blur(images, Gaussian(*args[:5]), args[5], out)
    return out


def _fake(images, *args):
    return images.new_empty(images.shape)


_op = registration.define("gaussian_blur", f"({SCHEMA}) -> Tensor", _run, _fake)


# it mutates an argument: custom_op keeps autograd's count of its versions
@torch.library.custom_op(
    "vig_kernels::gaussian_blur_out", mutates_args=("out",), schema=f"({SCHEMA}, Tensor(a!) out) -> ()"
)
def _op_out(images, *args):
    backend, out = args[5:]
    shared = images.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    # backends never see an out that shares memory with images
    target = torch.empty_like(out) if shared else out
    _blur(images, Gaussian(*args[:5]), backend, target)
    if shared:
        out.copy_(target)
