"""Suite `trainers`: a training step under Hugging Face's and TRL's trainers, stock and with the fused masked loss.

A text tower of 12 layers, 576 wide, with a vocabulary of 49,152, in float32. Rows have a prompt of 96 tokens and an
answer of 32, of which 34 % are kept, spread evenly. All contenders train on the same labels. Each runs in a process of
its own: one step that is not timed, then three. Times are processor times, which the load of the machine leaves alone;
memory is the growth of the resident set from before the first step to the peak of the timed ones.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, ANSWER, KEPT = 96, 32, 0.34
TIMED = 3  # steps
PAIRS = {"Hugging Face": ("Trainer", "SelectiveTrainer"), "TRL": ("SFTTrainer", "FusedLossMixin, SFTTrainer")}
CASES = ((2048, "Hugging Face"), (768, "Hugging Face"), (2048, "TRL"))  # tokens of a step, whose trainers
STOCK = {ours: stock for stock, ours in PAIRS.values()}
BOUNDS = {  # (tokens, contender, figure): largest ratio to the stock trainer
    (2048, "SelectiveTrainer", "processor_s"): 0.70,
    (2048, "FusedLossMixin, SFTTrainer", "processor_s"): 0.50,
    (2048, "SelectiveTrainer", "peak_mib"): 0.85,
    (768, "SelectiveTrainer", "peak_mib"): 1.0,
}
CLOSE = 1e-4  # relative difference of the first step's loss to the stock trainer's


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """A case each: a stock trainer and ours at a number of tokens."""
    cases = ((256, "Hugging Face"), (256, "TRL")) if quick else CASES
    return [case(tokens, trainers, threads, quick, say) for tokens, trainers in cases]


def case(tokens: int, trainers: str, threads: int, quick: bool, say: Callable[[str], None]) -> dict:
    """A row a contender."""
    rows = []
    for name in PAIRS[trainers]:
        say(f"{tokens:,} tokens: {name}")
        row = _in_process(name, tokens, threads, quick)
        rows.append({"name": name, "ours": name in STOCK} | row)
    _compare(*rows, tokens)
    return {"label": f"{trainers}, {tokens:,} tokens a step", "tokens": tokens, "rows": rows}


def _in_process(name: str, tokens: int, threads: int, quick: bool) -> dict:
    order = {"name": name, "tokens": tokens, "threads": threads, "layers": 2 if quick else 12}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trainers", json.dumps(order)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "reason": f"{lines[-1]:.200}"}
    return {"status": "ok"} | json.loads(done.stdout.strip().splitlines()[-1])


def _compare(theirs: dict, ours: dict, tokens: int) -> None:
    """Adds our ratios to the stock trainer, and what is asked of them. With another loss our row is wrong."""
    if not theirs["status"] == ours["status"] == "ok":
        return
    if abs(ours["first_loss"] - theirs["first_loss"]) > CLOSE * theirs["first_loss"]:
        reason = f"loss {ours['first_loss']:.6g}, {theirs['name']} has {theirs['first_loss']:.6g}"
        ours |= {"status": "wrong", "reason": reason}
        return
    ours["to_stock"] = {figure: ours[figure] / theirs[figure] for figure in ("processor_s", "peak_mib")}
    ours["promised"] = {
        figure: bound for (of, name, figure), bound in BOUNDS.items() if (of, name) == (tokens, ours["name"])
    }


def broken_bounds(cases: Sequence[dict]) -> list[str]:
    """Which ratios to a stock trainer are larger than promised."""
    return [
        f"{case['label']}: {row['name']}: {figure} is {row['to_stock'][figure]:.2f} of the stock trainer's, promised "
        f"{bound:.2f}"
        for case in cases
        for row in case["rows"]
        for figure, bound in row.get("promised", {}).items()
        if not row["to_stock"][figure] <= bound
    ]


def tables(cases: Sequence[dict]) -> list[list[list[str]]]:
    """One table, a list of rows, the first of them the head."""
    head = ["tokens a step", "trainer", "processor time, s", "of stock", "peak memory, MiB", "of stock"]
    rows = []
    for case in cases:
        for row in case["rows"]:
            if row["status"] != "ok":
                rows.append([f"{case['tokens']:,}", row["name"], row["status"], "", row["reason"], ""])
                continue
            shares = [
                f"{row['to_stock'][figure]:.2f}" if "to_stock" in row else "1"
                for figure in ("processor_s", "peak_mib")
            ]
            name = f"**{row['name']}**" if row["ours"] else row["name"]
            rows.append(
                [f"{case['tokens']:,}", name, f"{row['processor_s']:.2f}", shares[0], f"{row['peak_mib']:,.0f}",
                 shares[1]]
            )  # fmt: skip
    return [[head, *rows]]


# --- in a process of its own ---


def records(tokens: int) -> tuple[list[dict], dict]:
    """Rows of random ids whose answers are supervised, and a selection of 34 % of them, spread evenly."""
    draw = np.random.default_rng(0)
    kept = np.zeros(ANSWER, bool)
    count = round(KEPT * ANSWER)
    kept[((np.arange(count) + 0.5) * ANSWER / count).astype(int)] = True
    rows, selection = [], {}
    for number in range(tokens // (PROMPT + ANSWER)):
        ids = draw.integers(10, 49_000, PROMPT + ANSWER).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:], "key": str(number)})
        selection[str(number)] = (True, ids[PROMPT:], kept)
    return rows, selection


class _Steps:
    """Processor seconds of each step, and the peak of the resident set over the timed ones."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak = 0.0

    def callback(self) -> Any:
        import transformers

        steps = self

        class Callback(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **more):
                if state.global_step == 1:  # the first step is not timed
                    Path("/proc/self/clear_refs").write_text("5")
                steps.begun = time.process_time()

            def on_step_end(self, args, state, control, **more):
                steps.seconds.append(time.process_time() - steps.begun)

        return Callback()


def child(order: dict) -> dict:
    """The figures of one contender."""
    import datasets
    import torch
    import transformers
    import trl
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from vig import FusedLossMixin, SelectiveLabels, SelectiveTrainer, mask_row

    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=order["layers"],
        num_attention_heads=9, num_key_value_heads=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rows, selection = records(order["tokens"])
    base = DataCollatorForLanguageModeling(pad_token_id=0)
    if order["name"] in STOCK:
        collator = SelectiveLabels(base, selection)
    else:
        collator = base
        for row in rows:
            row["labels"] = mask_row(row["labels"], row.pop("key"), selection)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "max_steps": 1 + TIMED, "per_device_train_batch_size": len(rows), "use_cpu": True,
            "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False,
            "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        steps = _Steps()
        given = {
            "model": model, "train_dataset": datasets.Dataset.from_list(rows), "data_collator": collator,
            "callbacks": [steps.callback()],
        }  # fmt: skip
        if "SFT" in order["name"]:
            args = trl.SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            given |= {"args": args, "processing_class": _tokenizer()}
            bases = (FusedLossMixin, trl.SFTTrainer) if order["name"] in STOCK else (trl.SFTTrainer,)
            trainer = type("SFT", bases, {})(**given)
        else:
            stock = order["name"] not in STOCK
            args = transformers.TrainingArguments(**options)
            trainer = (transformers.Trainer if stock else SelectiveTrainer)(args=args, **given)
        gc.collect()
        before = _status_mib("VmRSS")
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "processor_s": statistics.median(steps.seconds[1:]),
        "peak_mib": _status_mib("VmHWM") - before,
        "first_loss": losses[0],
    }


def _tokenizer() -> Any:
    """A tokenizer that TRL may ask for its special tokens; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
