"""One step of SelectiveTrainer with Liger's real kernels, in Triton's interpreter: run by tests/test_trainer_steps.py.

    TRITON_INTERPRET=1 python liger_step.py FOLDER llava|text

A process of its own, since Liger changes transformers' modules for good. Prints one JSON line: the loss and the largest
difference of a gradient, both against the stock model's, and what runs Liger's code.
"""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from test_trainer import arguments, logged, samples, selection, stock_gradients, text_model
from tiny import llava_model, llava_processor
from transformers.models.llama import modeling_llama
from triton.runtime import interpreter

from vig import SelectiveCollator, SelectiveTrainer


@triton.jit
def rsqrt(value):
    return tl.rsqrt(value)


def as_on_a_gpu() -> None:
    """Two things that Liger's norms need and the interpreter lacks: scalars that are tensors, and libdevice."""
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = rsqrt


def main(folder: str, kind: str) -> None:
    as_on_a_gpu()
    processor, items = llava_processor(), samples(3)
    items = items[:1] if kind == "llava" else items[2:]  # the third is text alone
    base = llava_model() if kind == "llava" else text_model()
    collator = SelectiveCollator(processor, selection(processor, items))
    loss, gradients = stock_gradients(copy.deepcopy(base), collator(items))
    model, cross_entropy = copy.deepcopy(base), torch.nn.functional.cross_entropy
    rotary = modeling_llama.apply_rotary_pos_emb
    args = arguments(folder, use_liger_kernel=True, report_to=[])
    trainer = SelectiveTrainer(model=model, args=args, train_dataset=items, data_collator=collator)
    trainer.train()
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    least = 1e-3 * max(gradient.norm() for gradient in gradients.values())
    apart = [
        ((before[name] - after[name] - gradient).norm() / gradient.norm().clamp(min=least)).item()
        for name, gradient in gradients.items()
    ]
    ligers = {type(part).__name__ for part in model.modules() if "liger" in part.forward.__module__}
    print(json.dumps({
        "loss": logged(trainer)["loss"] / loss,
        "gradients": max(apart),
        "layers": sorted(ligers),
        "rope": modeling_llama.apply_rotary_pos_emb is not rotary,
        "loss is ours": "forward" not in vars(model) and torch.nn.functional.cross_entropy is cross_entropy,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
