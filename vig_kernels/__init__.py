"""Fused ops for Visual Information Gain: per-token values of an LM head without (N, V) logits, and Gaussian blur.

Four ops, each on several backends (`python -m vig_kernels` shows which can run here):

    linear_nll            per-token negative log-likelihood, with gradients for any upstream
    linear_vig            the same for an image pass and a null pass, in one sweep of the weight
    linear_cross_entropy  masked, weighted loss
    gaussian_blur         separable blur, for null images
"""

from vig_kernels.dispatch import BackendUnavailable, backends
from vig_kernels.ops.gaussian_blur import gaussian_blur
from vig_kernels.ops.linear_cross_entropy import linear_cross_entropy
from vig_kernels.ops.linear_nll import linear_nll
from vig_kernels.ops.linear_vig import TokenVIG, linear_vig


def __getattr__(name: str) -> str:
    """`__version__`, of the installed package."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib.metadata

    return importlib.metadata.version("vig-kernels")


__all__ = [
    "BackendUnavailable",
    "TokenVIG",
    "backends",
    "gaussian_blur",
    "linear_cross_entropy",
    "linear_nll",
    "linear_vig",
]
