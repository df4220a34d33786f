"""Step: the README's Python blocks, from scoring to both trainers, as written, with the demo's checkpoint.

What a reader copies must run on a GPU too: there the blocks score in bfloat16 and train with bf16=True, which no CPU
test does. One namespace, one model; nothing is changed but the checkpoint's name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.gpu.environment import value_row
from benchmarks.gpu.session import Session
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import tuning_records, write_records

PAGE = Path(__file__).resolve().parents[2] / "README.md"
PUBLISHED = '"llava-hf/llava-1.5-7b-hf"'
RECORDS = 12
OWN, TRL = "SelectiveTrainer", "TRL's SFTTrainer with FusedLossMixin"


def blocks(page: str) -> tuple[str, str, str]:
    """Scoring and selecting, the package's own trainer, TRL's: the Python blocks of "In Python", in their order."""
    part = page.partition("## In Python")[2].partition("\n## ")[0]
    scoring, own, trl = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    if scoring.count(PUBLISHED) != 1:
        raise ValueError(
            f"{PAGE}: expected {PUBLISHED} once in the first block, found {scoring.count(PUBLISHED)}"
        )
    return scoring.replace(PUBLISHED, repr(str(CHECKPOINT))), own, trl


def readme_step(session: Session) -> None:
    """A row a trainer: its training loss; "wrong" where that is no number or the head stayed as it was."""
    if session.rehearse:
        os.environ["VIG_BACKEND"] = "torch"  # the interpreter has its turn in the other steps
    scoring, *trainers = blocks(PAGE.read_text(encoding="utf-8"))
    names: dict = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_records(Path(folder), "data", tuning_records(RECORDS, 0))
        exec(scoring, names)
        rows = [_row(name, block, names) for name, block in zip((OWN, TRL), trainers, strict=True)]
    label = f"the README's blocks as written, the demo's checkpoint, {session.device}"
    session.case({"label": label, "unit": "training loss, nats", "rows": rows})


def _row(name: str, block: str, names: dict) -> dict:
    if name == TRL and find_spec("trl") is None:
        return _other(name, "cannot run", "trl is not installed")
    model = names.get("model") or AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32")
    before = model.lm_head.weight.detach().cpu().clone()
    exec(block, names)
    trainer = names["trainer"]
    head, loss = trainer.model.lm_head.weight.detach().cpu(), trainer.state.log_history[-1]["train_loss"]
    if not math.isfinite(loss):
        return _other(name, "wrong", f"its training loss is {loss}")
    if torch.equal(before, head):
        return _other(name, "wrong", "the weights of its head are those from before")
    kind = "bf16" if trainer.args.bf16 else "float32"
    return value_row(name, loss, ours=True, note=f"{trainer.state.global_step} steps, {kind}")


def _other(name: str, status: str, reason: str) -> dict:
    return {"name": name, "ours": True, "baseline": False, "status": status, "reason": reason, "note": ""}
