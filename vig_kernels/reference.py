"""The specification: every op in a few lines of float64 PyTorch, under its own name.

Nothing here is fast or frugal: logits are materialised. Every backend is tested against these functions, and
all of them are differentiable by autograd (torch.autograd.gradcheck holds in float64).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def why_not(device: torch.device) -> str | None:
    return None if device.type != "mps" else "Metal has no float64; move the tensors to the CPU"


def linear_logits(hidden, weight, bias=None, logit_scale=1.0, logit_softcap=None) -> Tensor:
    """(..., V) = softcap(scale * (hidden weight^T + bias)), softcap(x) = cap * tanh(x / cap)."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def linear_nll(
    hidden, weight, target, *, bias=None, logit_scale=1.0, logit_softcap=None, ignore_index=-100, stats=()
):
    """nll_n = lse_n - logit_{n, target_n};  lse = log sum_v exp(logit_v);  entropy = -sum_v p_v log p_v."""
    ignored = target == ignore_index
    hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0.0)  # whatever it holds
    logits = linear_logits(hidden, weight, bias, logit_scale, logit_softcap)
    logits = logits.masked_fill(ignored.unsqueeze(-1), 0.0)  # whatever the bias holds: 0 * NaN is no gradient
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, target.long().masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(ignored, 0.0, nll)
    if not stats:
        return nll
    statistics = {
        "lse": lambda: torch.where(ignored, 0.0, logits.logsumexp(-1)),
        "entropy": lambda: torch.where(ignored, 0.0, -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)),
        "argmax": lambda: logits.argmax(-1).masked_fill(ignored, -1),
    }
    return nll, {name: statistics[name]() for name in stats}


def linear_vig(hidden_image, hidden_null, weight, target, *, stats=(), ignore_index=-100, **options):
    """(vig, nll_image, nll_null), vig = nll_null - nll_image = log p(a | image) - log p(a | null).

    With stats ("kl", and "entropy" and "argmax" with "_image" or "_null") also {name: value}:
    kl = sum_v p_v (log p_v - log q_v), p of the image pass and q of the null pass; 0 where p is 0.
    """
    nll_image, image = linear_nll(
        hidden_image, weight, target, ignore_index=ignore_index, stats=("entropy", "argmax"), **options
    )
    nll_null, null = linear_nll(
        hidden_null, weight, target, ignore_index=ignore_index, stats=("entropy", "argmax"), **options
    )
    found = nll_null - nll_image, nll_image, nll_null
    if not stats:
        return found
    values = {f"{name}_image": value for name, value in image.items()}
    values |= {f"{name}_null": value for name, value in null.items()}
    ignored = (target == ignore_index).unsqueeze(-1)
    log_p, log_q = (
        linear_logits(hidden.masked_fill(ignored, 0.0), weight, **options)
        .masked_fill(ignored, 0.0)
        .log_softmax(-1)
        for hidden in (hidden_image, hidden_null)
    )
    terms = log_p.exp() * (log_p - log_q)
    values["kl"] = torch.where(log_p.exp() == 0, 0.0, terms).sum(-1).clamp_min(0.0)
    return found, {name: values[name] for name in stats}


def linear_cross_entropy(
    hidden,
    weight,
    target,
    *,
    token_weight=None,
    reduction="mean",
    num_items=None,
    z_loss=0.0,
    ignore_index=-100,
    stats=(),
    **options,
):
    """sum_n w_n (nll_n + z_loss lse_n^2) / divisor; divisor: num_items, else sum of w over valid rows; 0/0 = 0.

    With stats ("nll", "lse", "entropy", "argmax") also what is known of each row, detached.
    """
    if token_weight is not None and not token_weight.requires_grad:
        target = target.masked_fill(token_weight == 0, ignore_index)  # rows of weight 0 are ignored
    names = tuple(name for name in ("lse", *stats) if name != "nll")
    nll, statistics = linear_nll(hidden, weight, target, ignore_index=ignore_index, stats=names, **options)
    valid = (target != ignore_index).double()
    row_weight = valid if token_weight is None else torch.where(valid > 0, token_weight.double(), 0.0)
    losses = row_weight * (nll + z_loss * statistics["lse"] ** 2)
    divisor = 1.0
    if num_items is not None:
        divisor = float(num_items)
    elif reduction == "mean":
        divisor = row_weight.sum()
    loss = losses if reduction == "none" else losses.sum() / divisor if divisor else losses.sum() * 0.0
    return (loss, {name: {"nll": nll, **statistics}[name].detach() for name in stats}) if stats else loss


def gaussian_blur(images, sigma, *, truncate=3.0, border="reflect"):
    """out = K_y x K_x^T with K[i, edge(i + k)] += g_k, g_k ~ exp(-k^2 / 2 sigma^2), |k| <= ceil(truncate * sigma).

    sigma: a float, (sigma_y, sigma_x), or a tensor with one value per leading image. uint8 is rounded half to
    even; other dtypes give float64.
    """
    if isinstance(sigma, Tensor) and sigma.ndim > 0:
        return torch.stack(
            [
                gaussian_blur(x, s, truncate=truncate, border=border)
                for x, s in zip(images, sigma.tolist(), strict=True)
            ]
        )
    sigma_y, sigma_x = sigma if isinstance(sigma, (tuple, list)) else (float(sigma), float(sigma))
    rows = _blur_matrix(images.shape[-2], sigma_y, truncate, border)
    cols = _blur_matrix(images.shape[-1], sigma_x, truncate, border)
    out = rows.to(images.device) @ images.double() @ cols.to(images.device).T
    return out.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else out


@functools.lru_cache(maxsize=64)
def _blur_matrix(size, sigma, truncate, border) -> Tensor:
    radius = math.ceil(truncate * sigma)
    # products, not powers: k / 1e-300 squared is infinite, not an OverflowError
    taps = [
        math.exp(-(k / sigma) * (k / sigma) / 2) if sigma > 0 else 1.0 for k in range(-radius, radius + 1)
    ]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for k, tap in zip(range(-radius, radius + 1), taps, strict=True):
            matrix[i, edge(i + k, size, border)] += tap / sum(taps)
    return matrix


def edge(index: int, size: int, border: str) -> int:
    """The sample that stands at `index` beyond the border: replicate, or reflect without repeating the edge."""
    if border == "replicate" or size == 1:
        return min(max(index, 0), size - 1)
    index = index % (2 * size - 2)
    return min(index, 2 * size - 2 - index)
