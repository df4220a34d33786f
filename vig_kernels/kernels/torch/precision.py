"""Float32 products and sums, whatever torch's process-wide switches say."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable

import torch

NOTHING = contextlib.nullcontext()


class Held:
    """One of torch's process-wide switches, at `needed` while any thread needs it so; one that is harmless stays."""

    def __init__(self, read: Callable, write: Callable, needed, harmless: tuple):
        self.read, self.write, self.needed, self.harmless = read, write, needed, harmless
        self.lock, self.users, self.before = threading.Lock(), 0, needed

    def where_needed(self):
        """A context that holds the switch, or does nothing where it is harmless as it stands."""
        return NOTHING if not self.users and self.read() in self.harmless else self

    def __enter__(self):
        with self.lock:
            if self.users == 0:
                self.before = self.read()
                if self.before not in self.harmless:
                    self.write(self.needed)
            self.users += 1

    def __exit__(self, *_):
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.before not in self.harmless:
                self.write(self.before)


def held(switch, name: str, needed, *harmless) -> Held:
    """Of an attribute of torch.backends."""
    read, write = functools.partial(getattr, switch, name), functools.partial(setattr, switch, name)
    return Held(read, write, needed, (needed, *harmless))


CUDA_PRODUCTS = torch.backends.cuda.matmul
if hasattr(CUDA_PRODUCTS, "fp32_precision"):
    EXACT_CUDA = held(CUDA_PRODUCTS, "fp32_precision", "ieee", "none")
    EXACT_CPU = held(torch.backends.mkldnn.matmul, "fp32_precision", "ieee", "none")
else:  # torch 2.8: one switch for all devices
    precision = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    EXACT_CUDA = EXACT_CPU = Held(*precision, "highest", ("highest",))
FLOAT32_SUMS = held(
    CUDA_PRODUCTS, "allow_fp16_accumulation", False
)  # of float16 products; cuBLAS refuses otherwise
WIDE_SUMS = held(
    CUDA_PRODUCTS, "allow_bf16_reduced_precision_reduction", False
)  # partial sums of bfloat16 products are joined in float32


@contextlib.contextmanager
def float32_products(dtype: torch.dtype):
    """Float32 products of float32 inputs, whatever the global TF32 settings, restored on the way out.

    Upcast 16-bit inputs may use TF32 as they come: it holds every bfloat16 and float16 exactly.
    """
    with EXACT_CPU, EXACT_CUDA if dtype == torch.float32 else contextlib.nullcontext():
        yield
