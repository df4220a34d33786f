"""Step: README's block for Hugging Face's Trainer and docs/trainers.md's for TRL, as written, on the demo's checkpoint.

What a reader copies must run on a GPU too: there they train with bf16=True, on data scored in bfloat16, which no CPU
test does. Nothing is changed but the checkpoint's name.
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
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.gpu.environment import value_row
from benchmarks.gpu.session import Session
from vig import Scorer, score_dataset, select
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import tuning_records, write_records

ROOT = Path(__file__).resolve().parents[2]
README, TRAINERS = ROOT / "README.md", ROOT / "docs" / "trainers.md"
PUBLISHED = '"llava-hf/llava-1.5-7b-hf"'
RECORDS = 12
OWN, TRL = "SelectiveTrainer", "TRL's SFTTrainer with FusedLossMixin"


def blocks_under(page: Path, title: str) -> list[str]:
    """The Python blocks under a heading of a page."""
    part = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    if not found:
        raise ValueError(f"{page}: no Python block under '## {title}'")
    return found


def own_block() -> str:
    """README's block for Hugging Face's Trainer, with the demo's checkpoint in place of the published one."""
    block = blocks_under(README, "Train")[0]
    if block.count(PUBLISHED) != 1:
        raise ValueError(f"{README}: expected {PUBLISHED} once under Train, found {block.count(PUBLISHED)}")
    return block.replace(PUBLISHED, repr(str(CHECKPOINT)))


def trl_block() -> str:
    """docs/trainers.md's block for TRL, behind the one that makes its data set."""
    return blocks_under(TRAINERS, "The data")[0] + blocks_under(TRAINERS, "TRL")[0]


def readme_step(session: Session) -> None:
    """A row a trainer: its training loss; "wrong" where that is no number or the head stayed as it was."""
    if session.rehearse:
        os.environ["VIG_BACKEND"] = "torch"  # the interpreter has its turn in the other steps
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_records(Path(folder), "data", tuning_records(RECORDS, 0))
        dtype = "bfloat16" if session.device.startswith("cuda") else "float32"
        score_dataset(Scorer(str(CHECKPOINT), dtype=dtype), "data.json", "scores/")
        select("scores/", p=70, out="selection/")
        rows = [_row(OWN, own_block(), {}), _row(TRL, trl_block(), _given())]
    label = f"the README's blocks as written, the demo's checkpoint, {session.device}"
    session.case({"label": label, "unit": "training loss, nats", "rows": rows})


def _given() -> dict:
    """What a reader of docs/trainers.md has by then."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32")
    return {"torch": torch, "processor": AutoProcessor.from_pretrained(CHECKPOINT), "model": model}


def _row(name: str, block: str, names: dict) -> dict:
    if name == TRL and find_spec("trl") is None:
        return _other(name, "cannot run", "trl is not installed")
    untuned = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32")
    before = untuned.lm_head.weight.detach()
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
