"""The fused loss where DeepSpeed shards every weight (ZeRO-3), on two processes. `make zero3` installs DeepSpeed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny_families
import torch
from test_train import run_on_two
from test_trainer import arguments, logged, samples, selection
from test_trainer_families import build, few, stock

from vig import SelectiveCollator, SelectiveTrainer

deepspeed = pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: make zero3", exc_type=ImportError
)

ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # no weight stays whole
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def step_on_ranks(rank, folder, family, tied, accumulate):
    model = build(
        family, tied
    )  # before the arguments, which have transformers shard what is built after them
    processor = tiny_families.processor(family)
    args = arguments(
        folder, deepspeed=ZERO_3, per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = SelectiveTrainer(
        model=model, args=args, train_dataset=samples(8),
        data_collator=SelectiveCollator(processor, selection(processor, samples(8), few)),
    )  # fmt: skip
    trainer.train()
    whole = {}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.numel() == 0, name  # sharded, the head too
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    torch.save((logged(trainer)["loss"], whole), folder.with_suffix(f".{rank}"))


@pytest.mark.parametrize(
    ("family", "tied", "accumulate"), [("llava", False, 1), ("llava", True, 2), ("qwen2_5_vl", False, 1)]
)
def test_the_step_is_that_of_stock_in_one_process(family, tied, accumulate, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv(
        "PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )  # ninja, which it compiles with
    monkeypatch.setenv("LOCAL_SIZE", "2")  # asked for by DeepSpeed's operations in shared memory
    base, loss, gradients = stock(family, tied)
    before = dict(base.named_parameters())
    least = 1e-3 * max(gradient.norm() for gradient in gradients.values())
    for found, after in run_on_two(step_on_ranks, tmp_path / "out", family, tied, accumulate):
        assert found == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            moved = before[name].detach() - after[name]
            rounding = 1e-7 * before[name].detach().norm()
            assert (moved - gradient).norm() <= 2e-5 * gradient.norm().clamp(min=least) + rounding, name
