"""A rank of a tensor-parallel model, run as `python tensor_parallel.py RANK RANKS FOLDER PORT`; what it finds is saved.

tests/test_tensor_parallel.py starts the ranks and compares with one process that has the model whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import ParallelismConfig
from ranks import take_place
from tiny import llava_processor, picture
from transformers import AutoModelForImageTextToText, TrainingArguments

from vig import Scorer, SelectiveCollator, SelectiveTrainer
from vig.data.records import sample_from_record
from vig.data.sample import Sample
from vig.training.loss import row_losses, selective_loss

V, IMAGE = 261, 3


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, V, (2, 40), generator=draw)
    ids[:, 2:18] = IMAGE
    labels = ids.masked_fill(torch.arange(40) < 20, -100)
    pixels = torch.randn(2, 3, 32, 32, generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
    }


def samples() -> list[Sample]:
    """Two questions of one picture, which share their prefix, another picture, and one of text alone."""
    rows = [(0, "red"), (0, "a blue cup, and a long tail of words"), (1, "no"), (None, "two green pans")]
    records = [
        {
            "image": None if seed is None else picture(seed),
            "conversations": [
                {"from": "human", "value": "What is it?" if seed is None else "<image>\nWhat is it?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for seed, answer in rows
    ]
    return [sample_from_record(record, key=f"data.json#{row}") for row, record in enumerate(records)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def results(model: torch.nn.Module) -> dict:
    """Loss, gradients, evaluation, scores and a short training of one model, whole or tensor-parallel."""
    loss = selective_loss(model, batch(), z_loss=0.01)
    loss.backward()
    found = {
        "loss": loss.detach(),
        "rows": row_losses(model, batch()),
        "gradients": {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }
    model.zero_grad()
    scored = Scorer(model, llava_processor(), device="cpu").score(samples())
    found["scores"] = [(row.status, row.token_nll_image, row.token_nll_null) for row in scored]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found["losses"] = []
    for _ in range(3):
        loss = selective_loss(model, batch(), num_items=17)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    found["weights"] = {n: whole(p) for n, p in model.named_parameters()}
    return found


class Trainer(SelectiveTrainer):
    log_token_stats = True


def trained(model: torch.nn.Module, folder: Path) -> dict:
    """Four steps of Trainer on four samples, evaluated before and after on five, the last of which is alone in its
    batch; what it logs."""
    records = samples()
    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4,
        gradient_accumulation_steps=2, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, seed=0, max_grad_norm=1.0,
    )  # fmt: skip
    collator = SelectiveCollator(llava_processor())
    trainer = Trainer(
        model, arguments, train_dataset=records, eval_dataset=[*records, records[1]], data_collator=collator
    )
    before = trainer.evaluate()
    trainer.train()
    logs = [
        {name: value for name, value in line.items() if not name.endswith(("_second", "_time", "runtime"))}
        for line in [before, *trainer.state.log_history[1:-1], trainer.evaluate()]
    ]
    return {"logs": logs, "weights": {n: whole(p) for n, p in model.named_parameters()}}


def run(rank: int, ranks: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    take_place(rank, ranks, port)
    model = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto")
    assert model.get_output_embeddings().weight.to_local().shape[0] < V
    found = results(model.eval())
    ParallelismConfig._validate_accelerator = lambda *_: None  # which refuses tensor parallelism on CPUs
    model = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto")
    torch.save(found | {"trainer": trained(model, folder)}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
