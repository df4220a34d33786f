"""What a Trainer with the fused loss does besides the loss: random numbers, evaluation, resuming, processes."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import tiny_families
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from test_loss import FAMILIES, batch, build
from test_train import run_on_two
from test_trainer import (
    ANSWERS,
    SelectiveSFT,
    arguments,
    assert_step,
    logged,
    masked_cross_entropy,
    records,
    samples,
    selection,
    stock_gradients,
    text_model,
)
from tiny import byte_tokenizer, llava_model, llava_processor, weights
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from vig import SelectiveCollator, SelectiveLabels, SelectiveTrainer
from vig.models.lm_head import HeadError, verify_head
from vig.training.loss import row_losses, selective_loss
from vig.training.trainer import COUNTED, COUNTS, load_converted


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def base():
    return copy.deepcopy(llava_model())


def dropped_out(model):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def with_lora(model, dropout=0.3):
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj|.*layers\.\d\.self_attn\.[qv]_proj",
                             lora_dropout=dropout)  # fmt: skip
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


# --- the head's check ---


def test_the_check_of_the_head_draws_no_random_number(processor):
    model, inputs = dropped_out(base()).train(), SelectiveCollator(processor)(samples(2))
    torch.manual_seed(1)
    expected = masked_cross_entropy(model, inputs).item()
    torch.manual_seed(1)
    assert selective_loss(model, inputs).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_of_the_head_runs_the_trunk_on_two_tokens(name):
    model, inputs, seen = build(name), batch(name), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    verify_head(model, inputs)
    assert seen[0] == 2 and all(count < inputs["input_ids"].numel() for count in seen)


def test_a_model_that_needs_its_pictures_is_checked_with_them():
    model, inputs, tried = build("llava"), batch("llava"), []

    def insist(module, args, kwargs):
        tried.append("pixel_values" in kwargs)
        if not tried[-1]:
            raise ValueError("no pictures")

    model.register_forward_pre_hook(insist, with_kwargs=True)
    verify_head(model, inputs)
    assert tried == [False, True]


# --- evaluation ---


def test_an_evaluation_without_kept_tokens_is_nan_and_never_the_best(processor, tmp_path):
    items = samples(4)
    nothing = selection(processor, items, lambda row, n: np.zeros(n, bool))
    trainer = SelectiveTrainer(
        model=base(), args=arguments(tmp_path), eval_dataset=items,
        data_collator=SelectiveCollator(processor, nothing),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_loss"])
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    assert not trainer._determine_best_metric(metrics, None)


def evaluate_on_ranks(rank, folder, items, chosen, processor):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    args = arguments(folder, per_device_eval_batch_size=2)
    trainer = SelectiveTrainer(
        model=base(), args=args, eval_dataset=items, data_collator=SelectiveCollator(processor, chosen)
    )
    assert trainer.args.world_size == 2
    trainer.log_token_stats = True
    metrics = trainer.evaluate()
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    torch.save([metrics[name] for name in names], folder.with_suffix(f".{rank}"))


def test_two_processes_evaluate_every_sample_once(processor, tmp_path):
    """Five samples in batches of 2 x 2: accelerate repeats three of them."""
    items = samples(5)
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (n if row == 0 else 1))
    expected = masked_cross_entropy(base(), SelectiveCollator(processor, chosen)(items)).item()
    found = run_on_two(evaluate_on_ranks, tmp_path / "out", items, chosen, processor)
    figures = token_figures(base(), SelectiveCollator(processor, chosen)(items))
    assert found == [pytest.approx([expected, *figures], rel=1e-5)] * 2


def test_row_losses_are_those_of_each_row_alone(processor):
    items = samples(4)
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (0 if row == 1 else n))
    collator = SelectiveCollator(processor, chosen)
    inputs = collator(items)
    weight = torch.rand(inputs["labels"].shape)
    found = row_losses(base(), inputs, z_loss=0.1, token_weight=weight)
    for row, item in enumerate(items):
        alone = collator([item])
        share = weight[row : row + 1, : alone["labels"].shape[1]]
        expected = selective_loss(base(), alone, z_loss=0.1, token_weight=share)
        assert (found[row, 0] / found[row, 1].clamp(min=1e-9)).item() == pytest.approx(
            expected.item(), rel=1e-4
        )
    flat = {
        "input_ids": torch.cat([inputs["input_ids"][0], inputs["input_ids"][2]])[None],
        "labels": torch.cat([inputs["labels"][0], inputs["labels"][2]])[None],
        "position_ids": torch.arange(inputs["labels"].shape[1]).repeat(2)[None],
        "pixel_values": inputs["pixel_values"][:1],
    }
    assert row_losses(base(), flat)[:, 1].tolist() == [
        float((inputs["labels"][row] != -100).sum()) for row in (0, 2)
    ]


def test_predict_gives_the_logits_of_batches_with_and_without_pictures(processor, tmp_path):
    items = samples(6)  # the third one is text alone
    args = arguments(tmp_path, per_device_eval_batch_size=1)
    trainer = SelectiveTrainer(model=base(), args=args, data_collator=SelectiveCollator(processor))
    found = trainer.predict(items)
    assert found.predictions.shape == (*found.label_ids.shape, 261)
    expected = masked_cross_entropy(base(), SelectiveCollator(processor)(items)).item()
    assert found.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


# --- steps ---


def empty_then_full(processor, items):
    """Selections whose first step keeps nothing: samples 0 and 1."""
    return selection(processor, items, lambda row, n: np.full(n, row > 1))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_without_kept_tokens_leaves_the_weights_alone(processor, tmp_path, clip):
    items, seen = samples(4), []
    args = arguments(
        tmp_path, optim="adamw_torch", weight_decay=0.5, learning_rate=1e-2, max_steps=2, max_grad_norm=clip,
        per_device_train_batch_size=2, train_sampling_strategy="sequential",
    )  # fmt: skip

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **more):
            seen.append(weights(model).clone())

    trainer = SelectiveTrainer(
        model=base(), args=args, train_dataset=items, callbacks=[Look()],
        data_collator=SelectiveCollator(processor, empty_then_full(processor, items)),
    )  # fmt: skip
    trainer.train()
    assert torch.equal(seen[0], weights(base())) and not torch.equal(seen[1], seen[0])


def train_on_ranks(rank, folder, make, items, chosen, processor, more):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)
    model = make()
    before = weights(model)
    trainer = SelectiveTrainer(
        model=model, args=arguments(folder, **more), train_dataset=items,
        data_collator=SelectiveCollator(processor, chosen),
    )  # fmt: skip
    trainer.train()
    torch.save((logged(trainer), weights(model) - before), folder.with_suffix(f".{rank}"))


def compared(processor, tmp_path, items, chosen, more):
    """(what one process logs, its step), and those of two processes with half of the batch each."""
    whole = base()
    size = len(items)
    options = {"train_sampling_strategy": "sequential"} | more
    trainer = SelectiveTrainer(
        model=whole, args=arguments(tmp_path / "one", per_device_train_batch_size=size, **options),
        train_dataset=items, data_collator=SelectiveCollator(processor, chosen),
    )  # fmt: skip
    trainer.train()
    halves = options | {"per_device_train_batch_size": size // 2}
    ranks = run_on_two(train_on_ranks, tmp_path / "out", base, items, chosen, processor, halves)
    return (logged(trainer), weights(whole) - weights(base())), ranks


def test_two_processes_take_the_step_of_one(processor, tmp_path):
    items = samples(4)
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (n if row % 2 else 1))
    (log, step), ranks = compared(processor, tmp_path, items, chosen, {})
    for found, moved in ranks:
        assert found["loss"] == pytest.approx(log["loss"], rel=1e-5)
        assert (moved - step).norm() < 1e-4 * step.norm()
        assert found["num_kept_tokens"] == log["num_kept_tokens"]
        assert 0.9 * log["num_tokens"] < found["num_tokens"] <= log["num_tokens"]  # halves are cut apart
    assert log["num_kept_tokens"] == sum(int(np.sum(entry.token_keep)) for entry in chosen.values())


def test_gradient_checkpointing_with_a_process_of_text_alone(processor, tmp_path):
    """Its vision tower gets no gradient, which DDP would wait for."""
    pictures, text = samples(2), [samples(3)[2]] * 2
    items = [*pictures, *text]
    chosen = selection(processor, items)
    more = {"gradient_checkpointing": True, "max_steps": 2}
    (log, step), ranks = compared(processor, tmp_path, items, chosen, more)
    for found, moved in ranks:
        assert found["loss"] == pytest.approx(log["loss"], rel=1e-5)
        assert (moved - step).norm() < 1e-3 * step.norm()


@pytest.mark.parametrize(
    ("make", "more", "looks"),
    [
        (base, {"gradient_checkpointing": True}, True),
        (
            base,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            False,
        ),
        (base, {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}, False),
        (text_model, {"gradient_checkpointing": True}, False),
    ],
)
def test_unused_parameters_are_looked_for_where_pictures_may_be_missing(tmp_path, make, more, looks):
    trainer = SelectiveTrainer(model=make(), args=arguments(tmp_path, **more))
    assert trainer.accelerator.ddp_handler.find_unused_parameters is looks


def fsdp_on_ranks(rank, folder, inputs):
    model = build("qwen2.5-vl")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.modules():
        if type(layer).__name__.endswith("DecoderLayer"):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = (inputs["labels"][:, 1:] != -100).sum()
    mine = {name: value.chunk(2)[rank] for name, value in inputs.items()}
    loss = selective_loss(model, mine, num_items=int(kept))
    (loss * 2).backward()  # FSDP averages
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    torch.save((total.item(), grads), folder.with_suffix(f".{rank}"))


def test_two_processes_of_fsdp2_equal_one(tmp_path):
    one, other = batch("qwen2.5-vl"), batch("qwen2.5-vl", seed=1)
    inputs = {name: torch.cat([one[name], other[name]]) for name in one}
    model = build("qwen2.5-vl")
    loss = selective_loss(model, inputs)
    loss.backward()
    for total, grads in run_on_two(fsdp_on_ranks, tmp_path / "out", inputs):
        assert total == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-5), name


# --- resuming ---


def three_steps(tmp_path, make, trainer_class, **options):
    """A run of three steps, and one that is resumed after its second: the weights of both, and what they log."""
    found = []
    for name, last in (("whole", None), ("resumed", 2)):
        args = options["args"](tmp_path / name)
        if last:
            trainer_class(model=make(), args=args, **options["more"], callbacks=[StopAfter(last)]).train()
        model = make()
        trainer = trainer_class(model=model, args=args, **options["more"])
        trainer.train(resume_from_checkpoint=True if last else None)
        state = model.state_dict()
        names = ("loss", "num_tokens", "num_kept_tokens")
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((state, [[entry[name] for name in names] for entry in logged]))
    return found


class StopAfter(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **more):
        control.should_training_stop = state.global_step == self.step


def same_bits(found) -> bool:
    (whole, logged), (resumed, again) = found
    return (
        logged == again
        and len(logged) == 3
        and all(torch.equal(whole[name], resumed[name]) for name in whole)
    )


STEPS = {
    "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2,
    "lr_scheduler_type": "linear", "per_device_train_batch_size": 2, "logging_steps": 1, "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_full_fine_tuning_resumes_with_the_same_bits(tmp_path, family):
    """Their checkpoints name the weights in another way than the model."""
    processor = tiny_families.processor(family)
    more = {"train_dataset": samples(6), "data_collator": SelectiveCollator(processor)}

    def make():
        return dropped_out(copy.deepcopy(tiny_families.model(family)))

    found = three_steps(
        tmp_path, make, SelectiveTrainer, args=lambda folder: arguments(folder, **STEPS), more=more
    )
    assert same_bits(found)


@pytest.mark.parametrize("restored", [False, True])
def test_counts_go_on_from_the_checkpoint(processor, tmp_path, restored):
    """Those of samples cut short and unreadable too, also where Trainer makes its callbacks anew."""
    items = samples(6)
    items[1] = replace(items[1], images=(Path("nowhere.png"),))
    steps = STEPS | {"restore_callback_states_from_checkpoint": restored}

    def run(folder, resumes, **more):
        collator = SelectiveCollator(processor, max_length=60, skip_unreadable=True)
        trainer = SelectiveTrainer(
            model=base(), args=arguments(folder, **steps), train_dataset=items, data_collator=collator, **more
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sample that is left out
            trainer.train(resume_from_checkpoint=resumes)
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        return {name: last.get(name, 0) for name in COUNTED}

    whole = run(tmp_path / "whole", False)
    assert whole["truncated_samples"] and whole["unreadable_samples"] == 1
    run(tmp_path / "out", False, callbacks=[StopAfter(1)])
    shutil.copytree(tmp_path / "out", tmp_path / "older")
    assert run(tmp_path / "out", True) == whole
    state = tmp_path / "older" / "checkpoint-1" / "trainer_state.json"
    stored = json.loads(state.read_text())
    assert stored["stateful_callbacks"].pop("TokenCounts")["attributes"]["totals"]["num_tokens"] > 0
    state.write_text(json.dumps(stored))
    assert 0 < run(tmp_path / "older", True)["num_tokens"] < whole["num_tokens"], "which has no counts"


def test_lora_with_dropout_resumes_with_the_same_bits(processor, tmp_path):
    more = {"train_dataset": samples(6), "data_collator": SelectiveCollator(processor)}
    found = three_steps(
        tmp_path,
        lambda: with_lora(base()),
        SelectiveTrainer,
        args=lambda folder: arguments(folder, **STEPS),
        more=more,
    )
    assert same_bits(found)


def test_lora_with_dropout_resumes_under_trl(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "Say: ", "completion": answer} for answer in ANSWERS])

    def args(folder):
        return trl.SFTConfig(**arguments(folder, **STEPS).to_dict() | {"max_length": None, "bf16": False})

    more = {"train_dataset": rows, "processing_class": byte_tokenizer()}
    found = three_steps(tmp_path, lambda: with_lora(text_model()), SelectiveSFT, args=args, more=more)
    assert same_bits(found)


def test_the_best_model_is_loaded_at_the_end(processor, tmp_path):
    """Of LLaVA, whose checkpoint names its weights in another way. Best is what the first step left: the highest."""
    items, kept = samples(4), {}

    class Look(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **more):
            kept[metrics["eval_loss"]] = copy.deepcopy(model.state_dict())

    model = base()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    more = STEPS | best | {"eval_strategy": "steps", "eval_steps": 1}
    SelectiveTrainer(
        model=model, args=arguments(tmp_path, **more), train_dataset=items, eval_dataset=items,
        data_collator=SelectiveCollator(processor), callbacks=[Look()],
    ).train()  # fmt: skip
    assert len(kept) == 3 and max(kept) == next(iter(kept))
    assert all(torch.equal(kept[max(kept)][name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = base()
    model.config.save_pretrained(tmp_path)
    save_file({"x.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"names its weights x\.weight, .* the model a\.weight, .*from_pretrained"
    ):
        load_converted(model, tmp_path, "x.weight", "a.weight")


# --- beside others ---


def test_ligers_kernels_stay_and_its_loss_is_turned_off(processor, tmp_path, monkeypatch):
    """Against a stand-in for what transformers calls to apply them."""
    applied = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config)
    )
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    trainer = SelectiveTrainer(
        model=base(), args=args, train_dataset=samples(4), eval_dataset=samples(4),
        data_collator=SelectiveCollator(processor),
    )  # fmt: skip
    trainer.train()
    assert applied == [{"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("kind", ["llava", "text"])
def test_ligers_real_kernels_take_stocks_step(kind, tmp_path):
    """Its norms, RoPE and SwiGLU run (in Triton's interpreter), and its losses replace nothing."""
    pytest.importorskip("triton")
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed: pip install liger-kernel==0.8.5 --no-deps")
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "liger_step.py", tmp_path, kind],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == ["LlamaMLP", "LlamaRMSNorm"] and found["rope"] and found["loss is ours"]
    assert found["loss"] == pytest.approx(1, rel=1e-5) and found["gradients"] < 1e-4


def test_prompt_tuning_and_adapters_on_the_head_say_what_to_do(processor, tmp_path):
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(text_model(), virtual)
    with pytest.raises(HeadError, match=r"^PROMPT_TUNING: its virtual tokens .*Use LoRA"):
        SelectiveTrainer(model=model, args=arguments(tmp_path))
    tokens = torch.randint(5, 60, (2, 6))
    with pytest.raises(HeadError, match=r"writes 3 virtual tokens in front of each row.*use LoRA"):
        selective_loss(
            model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        )
    head = peft.get_peft_model(text_model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(HeadError, match=r"carries an adapter.*exclude_modules.*modules_to_save"):
        SelectiveTrainer(model=head, args=arguments(tmp_path))


def test_the_log_counts_tokens_under_trls_names(processor, tmp_path):
    items = samples(4)
    chosen = selection(processor, items)
    collator = SelectiveCollator(processor, chosen)
    trainer = SelectiveTrainer(
        model=base(), args=arguments(tmp_path, max_steps=2), train_dataset=items, eval_dataset=items,
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    kept = sum(int(np.sum(entry.token_keep)) for entry in chosen.values())
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (first["num_kept_tokens"], second["num_kept_tokens"]) == (kept, 2 * kept)
    assert first["num_tokens"] == int(collator(items)["attention_mask"].sum())
    assert first["train_tokens_per_second"] > 0
    assert "num_tokens" not in trainer.evaluate()


def token_figures(model, batch) -> tuple[float, float]:
    """Mean entropy and share of hits over the kept tokens, from the model's own logits in float64."""
    inputs = {name: value for name, value in batch.items() if name not in COUNTS}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].double()
    kept = batch["labels"][:, 1:] != -100
    logs, target = logits[kept].log_softmax(-1), batch["labels"][:, 1:][kept]
    return float(-(logs.exp() * logs).sum(1).mean()), float((logs.argmax(1) == target).double().mean())


class WithStats(SelectiveTrainer):
    log_token_stats = True


def test_the_log_has_entropy_and_accuracy_of_the_kept_tokens(processor, tmp_path):
    """Over all tokens of uneven micro-batches, in training and evaluation; the step keeps its bits."""
    items = samples(5)
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (n if row == 0 else 2))
    collator = SelectiveCollator(processor, chosen)
    model = base()
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # some words are right: those of the first sample's logits
        batch = collator(items)
        logits = model(**{name: value for name, value in batch.items() if name not in COUNTS}).logits[:, :-1]
        best = logits[batch["labels"][:, 1:] != -100].argmax(1)[0]
        head[batch["labels"][batch["labels"] != -100][0]] = 1.001 * head[best]
    expected = token_figures(model, batch)
    assert 0 < expected[1] < 1
    found = []
    for trainer_class in (WithStats, SelectiveTrainer):
        args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                         per_device_eval_batch_size=2)  # fmt: skip
        trainer = trainer_class(
            model=copy.deepcopy(model),
            args=args,
            train_dataset=items,
            eval_dataset=items,
            data_collator=collator,
        )
        before = trainer.evaluate()
        trainer.train()
        found.append((trainer, before))
    (trainer, before), (plain, plain_before) = found
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, prefix in ((first, ""), (before, "eval_")):
        assert entry[f"{prefix}entropy"] == pytest.approx(expected[0], rel=1e-4)
        assert entry[f"{prefix}mean_token_accuracy"] == pytest.approx(expected[1], rel=1e-6)
    assert second["entropy"] != first["entropy"]
    assert torch.equal(weights(trainer.model), weights(plain.model))
    assert before["eval_loss"] == plain_before["eval_loss"]
    names = {name for entry in plain.state.log_history for name in entry}
    assert not {"entropy", "mean_token_accuracy", "eval_entropy", "eval_mean_token_accuracy"} & names


def test_token_stats_where_nothing_is_kept(processor, tmp_path):
    items = samples(4)
    nothing = selection(processor, items, lambda row, n: np.zeros(n, bool))
    trainer = WithStats(
        model=base(), args=arguments(tmp_path, max_steps=1), train_dataset=items, eval_dataset=items,
        data_collator=SelectiveCollator(processor, nothing),
    )  # fmt: skip
    trainer.train()
    assert "entropy" not in next(entry for entry in trainer.state.log_history if "loss" in entry)
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_entropy"]) and math.isnan(metrics["eval_mean_token_accuracy"])


# --- selective labels under TRL ---


def test_sft_trainer_with_its_own_collator(processor, tmp_path):
    """The labels of TRL's collator, masked: the step of our collator's."""
    items = samples(4)
    chosen = selection(processor, items)
    rows = []
    for record, item in zip(records(4), items, strict=True):
        messages = [
            message | {"content": [part | {"text": part.get("text")} for part in message["content"]]}
            for message in item.messages
        ]
        rows.append({"key": record["key"], "images": list(item.images), "messages": messages})
    rows = [row for row in rows if row["images"]]
    base_collator = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(
        processor, assistant_only_loss=True
    )
    steps = []
    for collator, data in (
        (SelectiveLabels(base_collator, chosen), datasets.Dataset.from_list(rows)),
        (
            SelectiveCollator(processor, chosen),
            datasets.Dataset.from_list([records(4)[row] for row in (0, 1, 3)]),
        ),
    ):
        model = base()
        config = trl.SFTConfig(
            **arguments(tmp_path).to_dict()
            | {"max_length": None, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        )
        trainer = SelectiveSFT(
            model=model, args=config, train_dataset=data, data_collator=collator, processing_class=processor
        )
        trainer.log_token_stats = True
        trainer.train()
        assert logged(trainer)["entropy"] > 0 and 0 <= logged(trainer)["mean_token_accuracy"] <= 1
        steps.append((logged(trainer)["loss"], weights(model) - weights(base())))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
    assert (steps[0][1] - steps[1][1]).norm() < 1e-4 * steps[1][1].norm()


def test_padding_free_rows_give_the_loss_of_padded_ones(tmp_path):
    tokenizer, model = byte_tokenizer(), text_model()
    rows = [{"input_ids": [1, 70, 71, 72, 2], "labels": [-100, -100, 71, 72, 2], "key": "a"},
            {"input_ids": [1, 80, 81, 2], "labels": [-100, -100, 81, 2], "key": "b"}]  # fmt: skip
    chosen = {"a": (True, [71, 72, 2], [1, 0, 1]), "b": (True, [81, 2], [1, 1])}
    found = []
    for padding_free in (False, True):
        inner = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(0, padding_free=padding_free)
        inputs = SelectiveLabels(inner, chosen, processor=tokenizer)(rows)
        inputs = {
            name: inputs[name]
            for name in ("input_ids", "labels", "position_ids", "attention_mask")
            if name in inputs
        }
        found.append((selective_loss(model, inputs).item(), row_losses(model, inputs)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4)


def test_sft_trainer_without_padding_takes_the_padded_step(tmp_path):
    """Answers of uneven lengths, a row that keeps nothing; stock's loss is of the padded rows."""
    rows, chosen = [], {}
    for row, answer in enumerate(ANSWERS[:6]):
        ids, question = [*byte_tokenizer()(answer)["input_ids"][-12:], 2], [1, 70 + row] * (1 + row % 3)
        rows.append({"input_ids": question + ids, "labels": [-100] * len(question) + ids, "key": answer})
        chosen[answer] = (True, ids, [place % 3 != row % 3 and row != 4 for place in range(len(ids))])
    collators = [
        SelectiveLabels(
            trl.trainer.sft_trainer.DataCollatorForLanguageModeling(0, padding_free=padding_free),
            chosen, processor=byte_tokenizer(),
        )
        for padding_free in (False, True)
    ]  # fmt: skip
    loss, gradients = stock_gradients(text_model(), collators[0](rows))
    assert [len(collator(rows)["labels"]) for collator in collators] == [6, 1]
    for accumulate in (1, 3):
        model = text_model()
        more = {
            "per_device_train_batch_size": 6 // accumulate, "gradient_accumulation_steps": accumulate,
            "per_device_eval_batch_size": 4,
        }  # fmt: skip
        own = {"max_length": None, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        data = datasets.Dataset.from_list(rows)
        trainer = SelectiveSFT(
            model=model, args=trl.SFTConfig(**arguments(tmp_path, **more).to_dict() | own), train_dataset=data,
            eval_dataset=data, data_collator=collators[1], processing_class=byte_tokenizer(),
        )  # fmt: skip
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
        trainer.train()
        assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
        assert_step(text_model(), model, gradients, tolerance=2e-5)
