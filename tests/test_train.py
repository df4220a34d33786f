"""The lean training loop: its steps, its checkpoints, its refusals."""

from __future__ import annotations

import copy
import importlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from ranks import take_place
from safetensors.torch import load_file
from test_trainer import masked_cross_entropy, samples, selection, stock_gradients
from tiny import MARKED, llava_model, llava_processor, weights
from transformers import LlavaForConditionalGeneration

from vig.data.files import StoreError
from vig.data.sample import SampleError
from vig.models.families import ModelError
from vig.models.launch import PATIENCE
from vig.models.loading import load
from vig.scoring.scorer import Scorer
from vig.store.folder import SettingsDiffer
from vig.training.batches import plan_batches
from vig.training.collator import SelectiveCollator
from vig.training.settings import SCHEDULES, TrainError, TrainSettings
from vig.training.train import train


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def base():
    return copy.deepcopy(llava_model())


def encoded(processor, count: int = 8):
    collator = SelectiveCollator(processor)
    return [collator.encode(sample) for sample in samples(count)]


# --- the steps ---


def test_one_step_is_adamw_on_the_stock_gradient(processor):
    items = samples(8)
    chosen = selection(processor, items)
    expected = base()
    for name, parameter in expected.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    loss, _ = stock_gradients(expected, SelectiveCollator(processor, chosen)(items))
    masked_cross_entropy(expected, SelectiveCollator(processor, chosen)(items)).backward()
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
    torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0).step()
    seen = []
    result = train(
        base(),
        items,
        chosen,
        None,
        processor=processor,
        on_progress=lambda progress: seen.append(str(progress)),
        lr=1e-3,
        warmup=0.0,
        max_steps=1,
        max_grad_norm=0.5,
    )
    assert result.losses == [pytest.approx(loss, rel=1e-5)]
    assert norm > 0.5 and f"grad norm {norm:.3g}" in seen[0]
    moved, should = weights(result.model) - weights(base()), weights(expected) - weights(base())
    assert (moved - should).norm() < 2e-3 * should.norm()  # Adam divides tiny gradients by themselves
    same = [
        torch.equal(a, b)
        for (name, a), (_, b) in zip(result.model.named_parameters(), base().named_parameters(), strict=True)
        if "vision_tower" in name
    ]
    assert same and all(same)
    assert (result.kept, result.dropped, result.samples, result.steps) == (8, 0, 8, 1)
    tokens = sum(int(np.sum(entry.token_keep)) for entry in chosen.values())
    assert result.tokens == tokens


def test_every_setting_of_the_optimiser_is_used(processor):
    """Two steps of warmup and two of decay, against AdamW with the rates written out."""
    items, expected = samples(4), base()
    batch = SelectiveCollator(processor)(items)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    at, answer = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    for name, parameter in expected.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    decay = [
        {"params": [p for p in trained if (p.ndim > 1) == matrix], "weight_decay": 20.0 * matrix}
        for matrix in (1, 0)
    ]
    optimizer, losses = torch.optim.AdamW(decay, betas=(0.5, 0.6)), []
    for rate in (0.0, 1e-3, 2e-3, 1e-3):
        logits = expected(**inputs).logits[:, :-1][at]
        nll = torch.nn.functional.cross_entropy(logits, answer[at])
        loss = nll + 0.02 * logits.logsumexp(-1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    rates = []
    result = train(
        base(), items, None, None, processor=processor, on_progress=lambda progress: rates.append(progress.lr),
        max_steps=4, batch_size=4, log_every=1, schedule="linear", lr=2e-3, warmup=0.5, max_grad_norm=0.0,
        weight_decay=20.0, betas=(0.5, 0.6), z_loss=0.02,
    )  # fmt: skip
    assert rates == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])
    assert result.losses == pytest.approx(losses, rel=1e-4)
    moved, should = weights(result.model) - weights(base()), weights(expected) - weights(base())
    assert (moved - should).norm() < 1e-2 * should.norm()
    for (name, found), wanted in zip(result.model.named_parameters(), expected.parameters(), strict=True):
        assert found.ndim > 1 or torch.allclose(found, wanted, atol=1e-4), name  # norms do not decay


def test_accumulation_does_not_change_the_steps(processor):
    items = encoded(processor)
    chosen = selection(
        processor, samples(8), lambda row, n: np.arange(n) < (0 if row == 6 else 1 if row % 2 else n)
    )
    runs = [
        train(
            base(),
            items,
            chosen,
            None,
            processor=processor,
            lr=1e-3,
            max_steps=3,
            batch_size=8 // split,
            accumulate=split,
        )
        for split in (1, 4)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    moved = [weights(run.model) - weights(base()) for run in runs]
    assert (moved[0] - moved[1]).norm() < 5e-3 * moved[0].norm()
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].dropped == 1  # it has no selected token


def test_same_seed_same_bits_and_it_learns(processor):
    items = encoded(processor)
    runs = [
        train(base(), items, None, None, processor=processor, lr=3e-3, epochs=6, batch_size=4, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert not torch.equal(weights(runs[0].model), weights(runs[2].model))
    assert runs[0].steps == 12 and runs[0].losses[-1] < 0.8 * runs[0].losses[0]


def test_plan_visits_every_sample_once_an_epoch_whatever_the_split():
    whole = plan_batches(10, TrainSettings(batch_size=4, epochs=2))
    order = [index for batch in whole for index in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    split = TrainSettings(batch_size=1, accumulate=2, epochs=2)
    ranks = [plan_batches(10, split, world=2, rank=rank) for rank in range(2)]
    for step in range(5):
        parts = [index for rank in ranks for batch in rank[2 * step : 2 * step + 2] for index in batch]
        assert sorted(parts) == sorted(whole[step])
    assert len(plan_batches(3, TrainSettings(batch_size=8))[0]) == 8


# --- checkpoints ---


def test_checkpoint_round_trip_and_record(processor, tmp_path):
    out = tmp_path / "out"
    chosen = selection(processor, samples(4))
    result = train(base(), samples(4), chosen, out, processor=processor, max_steps=1, batch_size=4)
    again = LlavaForConditionalGeneration.from_pretrained(out)
    assert torch.equal(weights(again), weights(result.model))
    assert type(processor).from_pretrained(out).chat_template == processor.chat_template
    record = json.loads((out / "train.json").read_text())
    assert record["settings"]["lr"] == 2e-5 and record["steps"] == 1 and record["tokens"] == result.tokens
    assert record["losses"] == result.losses and not record["interrupted"]
    assert not list(out.glob(".*"))
    with pytest.raises(TrainError, match="holds a checkpoint already"):
        train(base(), samples(4), chosen, out, processor=processor)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    train(base(), samples(4), chosen, out, processor=processor, max_steps=1, overwrite=True, lr=1e-2)
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not torch.equal(weights(LlavaForConditionalGeneration.from_pretrained(out)), weights(again))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_finished_run_gives_its_result_again(processor, tmp_path, rank):
    out, model = tmp_path / "out", tmp_path / "model"
    base().save_pretrained(model)
    processor.save_pretrained(model)
    run = {"max_steps": 2, "lr": 1e-2, "warmup": 0.0, "lora_rank": rank}
    items = without_pictures(samples(4), [1])
    result = train(model, items, None, out, **run)
    again = train(model, items, None, out, **run)
    assert again.was_finished and not result.was_finished and not again.model.training
    moved = result.model.state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in again.model.state_dict().items())
    names = ("losses", "steps", "samples", "tokens", "errors", "seconds", "kept", "out")
    assert all(getattr(again, name) == getattr(result, name) for name in names) and again.resumed == 2
    with pytest.raises(
        SettingsDiffer, match=r"samples: the folder has '4 \(.*, this run has '3 \(.*\n.*--overwrite"
    ):
        train(model, items[:3], None, out, **run)
    other = base()
    with torch.no_grad():
        other.lm_head.weight[5] += 1
    other.save_pretrained(model)
    with pytest.raises(SettingsDiffer, match="revision: the folder has"):
        train(model, items, None, out, **run)
    (out / "train.json").write_text("{")
    with pytest.raises(
        TrainError, match=r"holds a checkpoint already \(train.json\), which no run .*--overwrite"
    ):
        train(model, items, None, out, **run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint(processor, tmp_path, number):
    out = tmp_path / "out"

    def interrupt(progress):
        if progress.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = train(
        base(),
        encoded(processor, 4),
        None,
        out,
        processor=processor,
        on_progress=interrupt,
        max_steps=50,
        batch_size=2,
        log_every=1,
    )
    assert result.interrupted and result.steps == 2 == len(result.losses)
    assert json.loads((out / "train.json").read_text())["interrupted"]
    assert torch.equal(weights(LlavaForConditionalGeneration.from_pretrained(out)), weights(result.model))
    assert signal.getsignal(number) is before
    with pytest.raises(TrainError, match=r"stopped after step 2, and no checkpoint .*--save-every N"):
        train(base(), encoded(processor, 4), None, out, processor=processor, max_steps=50, batch_size=2)


def test_ctrl_c_behind_the_last_step_does_not_cost_the_run(processor, tmp_path, monkeypatch):
    module = importlib.import_module("vig.training.train")

    def interrupted_save(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    save = module.save
    monkeypatch.setattr(module, "save", interrupted_save)
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    result = train(base(), encoded(processor, 4), None, out, processor=processor, max_steps=1, batch_size=2)
    assert not result.interrupted and not json.loads((out / "train.json").read_text())["interrupted"]
    assert signal.getsignal(signal.SIGINT) is before


def test_lora_trains_and_saves_the_adapter_alone(processor, tmp_path):
    out = tmp_path / "out"
    model = base()
    result = train(
        model, samples(4), None, out, processor=processor, max_steps=2, lr=1e-2, warmup=0.0, lora_rank=2
    )
    saved = load_file(out / "adapter_model.safetensors")
    assert saved and all("lora_" in name and "vision" not in name for name in saved)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    assert torch.equal(model.lm_head.weight, llava_model().lm_head.weight)
    assert result.losses[1] < result.losses[0]
    assert result.model.peft_config["default"].lora_alpha == 4
    other = train(
        base(), samples(1), None, None, processor=processor, max_steps=1, lora_rank=2, lora_alpha=3.0
    )
    assert other.model.peft_config["default"].lora_alpha == 3


def test_the_models_context_is_the_longest_sequence_unless_given(processor):
    model, items = base(), samples(2)
    whole = [len(item.input_ids) for item in encoded(processor, 2)]
    model.config.text_config.max_position_embeddings = max(whole) - 20
    for max_length, truncated in ((None, 1), (max(whole), 0)):
        result = train(
            model, items, None, None, processor=processor, max_steps=1, batch_size=2, max_length=max_length
        )
        assert (result.truncated, result.left_out) == (truncated, 0)


def test_gradient_checkpointing_changes_no_step(processor):
    plain, checkpointed = (
        train(base(), samples(2), None, None, processor=processor, max_steps=2, gradient_checkpointing=on)
        for on in (False, True)
    )
    found = [
        any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())
        for run in (plain, checkpointed)
    ]
    assert found == [False, True]
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("ranks", [(2, 0), (0, 2)])
def test_an_adapter_and_a_full_checkpoint_replace_each_other(processor, tmp_path, ranks):
    out, model = tmp_path / "out", tmp_path / "model"
    base().save_pretrained(model)
    processor.save_pretrained(model)
    for rank in ranks:
        train(model, samples(4), None, out, max_steps=1, lora_rank=rank, overwrite=rank == ranks[1])
        if rank == ranks[0]:
            with pytest.raises(SettingsDiffer, match=f"lora_rank: the folder has {rank}, this run has 1"):
                train(model, samples(4), None, out, max_steps=1, lora_rank=1)
            (out / "model.safetensors.index.json").write_text("{}")  # of a sharded one
    (out / "train.json").unlink()  # what stands beside the weights is what is loaded
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    full = {"config.json", "generation_config.json", "model.safetensors"}
    left = {file.name for file in out.iterdir()} & (adapter | full | {"model.safetensors.index.json"})
    assert left == (adapter if ranks[1] else full)
    if not ranks[1]:
        assert load(out).model.lm_head.weight.shape[0] == 261


def test_an_adapter_is_refused_as_a_model_with_the_way_to_merge_it(processor, tmp_path):
    out, model, merged = tmp_path / "out", tmp_path / "model", tmp_path / "merged"
    base().save_pretrained(model)
    processor.save_pretrained(model)
    trained = train(model, samples(4), None, out, max_steps=1, lora_rank=2, lr=1e-2, warmup=0.0).model
    with pytest.raises(ModelError, match=f"PEFT adapter of {re.escape(str(model))}, not a model") as refused:
        load(out)
    cure = str(refused.value).partition("Merge it once: ")[2].replace("'merged'", repr(str(merged)))
    exec("from peft import PeftModel; from transformers import *; " + cure)
    expected = trained.merge_and_unload().model.language_model.layers[0].self_attn.q_proj.weight
    found = load(merged).model.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.equal(found, base().model.language_model.layers[0].self_attn.q_proj.weight)


def test_a_disk_that_fills_up_while_saving_is_explained_and_leaves_nothing_behind(processor, tmp_path):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    train(base(), samples(2), None, out, processor=processor, max_steps=1)
    before = weights(LlavaForConditionalGeneration.from_pretrained(out))

    def fill_up(progress):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))

    try:
        with pytest.raises(StoreError, match=r"out: the trained weights were not saved .*Free some space"):
            train(
                base(), samples(2), None, out, processor=processor, max_steps=1, overwrite=True,
                on_progress=fill_up, lr=1e-2,
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob(".*"))
    assert torch.equal(weights(LlavaForConditionalGeneration.from_pretrained(out)), before)


def test_too_little_space_is_seen_before_the_first_step(processor, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainError, match=r"out: the checkpoint takes \d+ MiB, 0 MiB are free"):
        train(base(), samples(2), None, tmp_path / "out", processor=processor, max_steps=1)


def test_bfloat16_runs_over_float32_weights(processor):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        result = train(base(), samples(4), None, None, processor=processor, max_steps=2, dtype=dtype)
        losses[dtype] = result.losses[0]
        assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)


def test_from_files_with_a_truncated_answer(processor, tmp_path):
    """As `vig train MODEL DATA` runs it: a checkpoint folder, a JSON file, a worker process."""
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    base().save_pretrained(folder)
    processor.save_pretrained(folder)
    with data.open("w") as file:
        for answer in ("short", "a rather long answer, much longer than the others are"):
            turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": "a", "conversations": turns}) + "\n")
        file.write("{broken\n")
    result = train(folder, data, None, None, max_steps=1, batch_size=2, max_length=50, workers=1)
    assert (result.kept, result.broken, result.truncated) == (2, 1, 1)
    assert len(result.errors) == 1 and "data.jsonl#2" in result.errors[0]


# --- what cannot be used ---


def without_pictures(items, rows):
    """The samples, those of `rows` with an image that is not there."""
    return [
        replace(item, images=(Path("nowhere.png"),) * len(item.images)) if row in rows else item
        for row, item in enumerate(items)
    ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_unreadable_samples_are_left_out_of_the_step(processor, tmp_path, accumulate, workers):
    """Row by row, half of a micro-batch, or a whole one: the step is that of the samples that can be read."""
    chosen = selection(processor, samples(4))
    options = {"processor": processor, "lr": 1e-3, "max_steps": 1}
    expected = train(base(), [samples(4)[row] for row in (0, 2, 3)], chosen, None, batch_size=3, **options)
    result = train(
        base(), without_pictures(samples(4), [1]), chosen, tmp_path / "out",
        batch_size=4 // accumulate, accumulate=accumulate, workers=workers, **options,
    )  # fmt: skip
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    moved, should = weights(result.model) - weights(base()), weights(expected.model) - weights(base())
    assert (moved - should).norm() < 5e-3 * should.norm()
    assert (result.kept, result.samples, result.left_out, result.tokens) == (4, 3, 1, expected.tokens)
    assert result.errors == ["data.json#1 (id 'id1'): no image at nowhere.png. Check --image-root"]
    assert json.loads((tmp_path / "out" / "train.json").read_text())["errors"] == result.errors


def test_a_step_of_unreadable_samples_moves_nothing_and_errors_are_told_once(processor):
    plan = [index for [index] in plan_batches(3, TrainSettings(batch_size=1, epochs=2))]
    items = without_pictures([samples(4)[row] for row in (0, 1, 3)], plan[1:2])
    model, seen, after = base(), [], []

    def look(progress):
        seen.append(str(progress))
        after.append(weights(model))

    result = train(
        model, items, None, None, processor=processor, batch_size=1, epochs=2, lr=1e-2, warmup=0.0, log_every=1,
        on_progress=look,
    )  # fmt: skip
    empty = [step for step in range(6) if plan[step] == plan[1]]
    assert len(empty) == 2 and [step for step in range(6) if result.losses[step] == 0] == empty
    still = [step for step in range(1, 6) if torch.equal(after[step], after[step - 1])]
    assert still == empty  # Adam's momentum is under way by then
    assert (result.left_out, len(result.errors), result.samples) == (1, 1, 4)
    assert "left out" not in seen[0] and "1 samples left out" in seen[1] and "2 samples left out" in seen[5]


def test_too_long_prompts_are_left_out_and_nothing_left_is_refused(processor):
    items = samples(3)[::2]  # one with an image, one of text alone
    lengths = [len(SelectiveCollator(processor).encode(item).input_ids) for item in items]
    options = {"processor": processor, "max_steps": 1, "batch_size": 2, "max_length": lengths[1]}
    assert lengths[1] < lengths[0]
    result = train(base(), items, None, None, **options)
    assert (result.left_out, result.samples) == (1, 1) and f"it has {lengths[0]} tokens" in result.errors[0]
    with pytest.raises(
        TrainError, match=r"1 samples were unusable. The first: data.json#0 .*Raise max_length"
    ):
        train(base(), items[:1], None, None, **options)


def test_what_a_template_refuses_is_left_out_as_scoring_leaves_it_out(tmp_path):
    """A system turn under a template that has none, as Gemma's; in training and in held-out data."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    processor = llava_processor(refuses + MARKED)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    items = samples(4)
    items[1] = replace(items[1], messages=(system, *items[1].messages))
    [row] = Scorer(base(), processor=processor).score([items[1]])
    assert row.status.startswith("error: it cannot be prepared (TemplateError: System role not supported)")
    run = {"processor": processor, "max_steps": 1, "batch_size": 4}
    with pytest.warns(UserWarning, match=r"1 held-out samples .*data.json#1 .*System role not supported"):
        result = train(base(), items, None, tmp_path / "out", eval_data=items, **run)
    expected = train(base(), [items[row] for row in (0, 2, 3)], None, None, **run | {"batch_size": 3})
    assert (result.samples, result.left_out) == (3, 1) and result.losses == pytest.approx(expected.losses)
    assert result.errors == [f"data.json#1 (id 'id1'): {row.status.removeprefix('error: ')}"]
    with pytest.raises(SampleError, match=r"^data.json#1 \(id 'id1'\): it cannot be prepared"):
        SelectiveCollator(processor)(items)


# --- refusals ---


@pytest.mark.parametrize("workers", [0, 1])
def test_a_selection_of_another_tokenizer_is_refused_by_key(processor, workers):
    chosen = selection(processor, samples(4))
    chosen["data.json#1"] = chosen["data.json#1"]._replace(token_ids=chosen["data.json#1"].token_ids[::-1])
    with pytest.raises(SampleError, match=r"^data.json#1 \(id 'id1'\): its answer has"):
        train(base(), samples(4), chosen, None, processor=processor, workers=workers)


def test_wrong_settings_are_refused(processor, tmp_path):
    def attempt(model=None, data=None, out=None, chosen=None, **settings):
        return train(model or base(), data or samples(2), chosen, out, processor=processor, **settings)

    with pytest.raises(TrainError, match="batch_size = 0"):
        attempt(batch_size=0)
    with pytest.raises(TrainError, match="dtype = 'int8'"):
        attempt(dtype="int8")
    with pytest.raises(TrainError, match=r"'visoin' matches no parameter\. They are called model"):
        attempt(freeze=("visoin",))
    with pytest.raises(TrainError, match=r"frozen, by freeze = 'vis', '\.': nothing to train\. Give fewer"):
        attempt(freeze=("vis", "."))
    with pytest.raises(TrainError, match=r"freeze = '\(' is not a regular expression: missing"):
        attempt(freeze=("(",))
    with pytest.raises(TrainError, match=r"torch.bfloat16: AdamW's small steps"):
        attempt(model=base().bfloat16())
    nothing = selection(processor, samples(2), lambda row, n: np.zeros(n, bool))
    with pytest.raises(
        TrainError, match=r"nothing to train on: 2 samples not selected, 0 broken\. .*lower --p"
    ):
        attempt(chosen=nothing)
    with pytest.raises(TrainError, match="without its processor"):
        train(base(), samples(2), None, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        attempt(out=tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("epochs", value, "more than 0") for value in (0, -1, math.nan, math.inf)),
        *(("warmup", value, "a share of the steps, 0 to 1") for value in (3, -0.1, math.nan)),
        *(("schedule", value, "one of cosine, linear") for value in ("reduce_lr_on_plateau", "fast")),
        *(("lr", value, "at least 0") for value in (-1e-5, math.nan, math.inf)),
        ("max_steps", 0, "at least 1"),
        ("max_grad_norm", math.nan, "at least 0"),
        ("workers", -1, "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(name, value, expected):
    with pytest.raises(TrainError, match=re.escape(f"{name} = {value!r}, expected {expected}")):
        TrainSettings(**{name: value})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_the_error_offers_runs(processor, schedule):
    result = train(base(), samples(2), None, None, processor=processor, schedule=schedule, max_steps=2)
    assert result.steps == 2


def test_too_little_memory_is_explained_with_the_settings_that_help(processor, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    run = {"processor": processor, "max_steps": 2, "batch_size": 4}
    for name in ("vig.training.loop.selective_loss", "vig.training.held_out.row_losses"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(
                TrainError, match=r"step 1 does not fit into .* of cpu \(CUDA .*2 GiB\), with batch_size = 4"
            ):
                train(base(), samples(4), None, None, eval_data=samples(1), **run)


def test_a_diverging_run_stops_with_its_step(processor):
    model = base()
    with torch.no_grad():
        model.model.language_model.norm.weight[5] = float("nan")
    with pytest.raises(
        TrainError, match=r"step 1: the loss is nan, .*with lr = 2e-05 and warmup = 0.03\. Lower"
    ):
        train(model, samples(2), None, None, processor=processor, max_steps=3, log_every=1)


# --- where the model comes from ---


def scored_at(chosen, model: str, revision: str):
    chosen = Chosen(chosen)
    chosen.metadata = {"model": model, "revision": revision}
    return chosen


class Chosen(dict):
    """A selection with the settings of its scores."""


def test_the_model_is_loaded_as_it_was_scored(processor, tmp_path, monkeypatch):
    """Not at the hub's main branch, and with the code and attention that were asked for."""
    base().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    seen = []

    def fake(name, **options):
        seen.append((name, options))
        return replace(load(tmp_path / "model"), name=name, revision=options["revision"])

    monkeypatch.setattr("vig.training.model.load", fake)
    chosen = scored_at(selection(processor, samples(2)), "us/llava", "abc123")
    asked = {"max_steps": 1, "attn": "eager", "trust_remote_code": True, "device": "cpu"}
    train("us/llava", samples(2), chosen, tmp_path / "out", **asked)
    train("us/llava", samples(2), chosen, None, max_steps=1, revision="abc123")
    train("us/other", samples(2), chosen, None, max_steps=1)
    train("us/llava", samples(2), None, None, max_steps=1, revision="v2")
    assert [options["revision"] for _, options in seen] == ["abc123", "abc123", None, "v2"]
    assert seen[0][1]["attn"] == "eager" and seen[0][1]["trust_remote_code"]
    assert str(seen[0][1]["device"]) == "cpu" and not seen[1][1]["trust_remote_code"]
    assert json.loads((tmp_path / "out" / "train.json").read_text())["revision"] == "abc123"
    with pytest.raises(
        TrainError,
        match=r"revision = 'v2', but the selection was scored with us/llava at 'abc123'\. Leave it out",
    ):
        train("us/llava", samples(2), chosen, None, revision="v2")
    assert len(seen) == 4  # refused before it is loaded


def test_a_model_of_the_hub_is_recorded_at_its_commit(processor, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--us--llava" / "snapshots" / commit
    base().save_pretrained(snapshot)
    processor.save_pretrained(snapshot)
    (tmp_path / "models--us--llava" / "refs").mkdir()
    (tmp_path / "models--us--llava" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("us/llava").revision == commit and load(snapshot).revision is None
    run = {"max_steps": 1, "batch_size": 2}
    train("us/llava", samples(2), None, tmp_path / "out", **run)
    assert json.loads((tmp_path / "out" / "train.json").read_text())["revision"] == commit
    assert train("us/llava", samples(2), None, tmp_path / "out", **run).was_finished
    with pytest.raises(ModelError, match="cannot load us/other: "):
        load("us/other")


def test_the_device_is_chosen_or_refused(processor):
    for device, error, message in (
        ("gpu", TrainError, r"device = 'gpu': .*Use cuda, cuda:1, cpu"),
        ("cuda:99", ModelError, "device = 'cuda:99', but torch .* finds"),
    ):
        with pytest.raises(error, match=message):
            train("nowhere", samples(2), None, None, device=device)


def two_with_a_device(rank: int, folder, processor):
    with pytest.raises(TrainError, match=r"device = 'cpu', but each of the 2 processes has .*Leave it out"):
        train(base(), samples(2), None, None, processor=processor, device="cpu")
    torch.save(True, folder.with_suffix(f".{rank}"))


def test_a_device_for_two_processes_is_refused(processor, tmp_path):
    assert run_on_two(two_with_a_device, tmp_path / "out", processor) == [True, True]


# --- two processes ---


TWO_STEPS = {"lr": 1e-3, "max_steps": 2, "log_every": 1}


def run_on_two(work, folder: Path, *arguments) -> list:
    """What work(rank, folder, *arguments) saved into folder.<rank>, in two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, port, work, folder, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder.with_suffix(f".{rank}")) for rank in range(2)]


def run_rank(rank: int, port: int, work, *arguments):
    take_place(rank, 2, port)
    PartialState._reset_state()
    torch.set_num_threads(1)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()


def two_steps(rank: int, folder, items, chosen, processor):
    norms = []
    out = train(
        base(), items, chosen, folder, processor=processor, batch_size=2, accumulate=2,
        on_progress=lambda progress: norms.append(progress.grad_norm), **TWO_STEPS,
    )  # fmt: skip
    torch.save(
        (out.losses, norms, out.tokens, out.samples, weights(out.model), out.errors),
        folder.with_suffix(f".{rank}"),
    )


@pytest.mark.parametrize("unreadable", [[], [4, 6], [0, 2, 4, 6]])
def test_two_processes_take_the_steps_of_one(processor, tmp_path, unreadable):
    """Uneven kept tokens on the ranks; both end with the same weights, those of a single process.

    unreadable: places in the first step; 4 and 6 are rank 0's last micro-batch, the even ones all it has."""
    order = plan_batches(8, TrainSettings(batch_size=8, max_steps=1))[0]
    items = without_pictures(samples(8), [order[place] for place in unreadable])
    lost = sum(bool(item.images) for item in items if item.images[:1] == (Path("nowhere.png"),))
    chosen = selection(processor, samples(8), lambda row, n: np.arange(n) < (1 if row % 2 else n))
    norms = []  # Adam does not see a gradient's scale, but its norm shows it
    one = train(
        base(), items, chosen, None, processor=processor, batch_size=8,
        on_progress=lambda progress: norms.append(progress.grad_norm), **TWO_STEPS,
    )  # fmt: skip
    folder = tmp_path / "out"
    results = run_on_two(two_steps, folder, items, chosen, processor)
    assert results[0][1] == pytest.approx(norms, rel=1e-4)
    for losses, _, tokens, seen, _, errors in results:
        assert sorted(errors) == sorted(one.errors) and len(errors) == lost
        assert losses == pytest.approx(one.losses, rel=1e-5)
        assert (tokens, seen) == (one.tokens, one.samples)
    assert torch.equal(results[0][4], results[1][4])
    moved, should = results[0][4] - weights(base()), weights(one.model) - weights(base())
    assert (moved - should).norm() < 5e-3 * should.norm()
    assert torch.equal(weights(LlavaForConditionalGeneration.from_pretrained(folder)), results[0][4])


def patience(rank: int, folder):
    with mock.patch.object(
        torch.distributed, "init_process_group", wraps=torch.distributed.init_process_group
    ) as made:
        train(base(), samples(2), None, None, processor=llava_processor(), max_steps=1, batch_size=1)
    torch.save(made.call_args.kwargs["timeout"].total_seconds(), folder.with_suffix(f".{rank}"))


def test_processes_wait_for_a_checkpoint_as_long_as_scoring_waits(tmp_path):
    """The main one alone writes it; NCCL's own limit is 10 minutes."""
    assert run_on_two(patience, tmp_path / "out") == [PATIENCE.total_seconds()] * 2


def checkpointed_steps(rank: int, folder, items, processor):
    result = train(
        base(), items, None, None, processor=processor, batch_size=1, gradient_checkpointing=True, **TWO_STEPS
    )
    torch.save((result.losses, weights(result.model)), folder.with_suffix(f".{rank}"))


def test_gradient_checkpointing_with_a_process_of_text_alone(processor, tmp_path):
    """Its vision tower and projector get no gradient in the first step."""
    picture, text = samples(3)[1:]
    order = [index for batch in plan_batches(2, TrainSettings(batch_size=2, max_steps=2)) for index in batch]
    items = [picture, text] if order[0] == 0 else [text, picture]  # rank 1 takes the second place of a step
    one = train(base(), items, None, None, processor=processor, batch_size=2, **TWO_STEPS)
    results = run_on_two(checkpointed_steps, tmp_path / "out", items, processor)
    for losses, found in results:
        assert losses == pytest.approx(one.losses, rel=1e-5)
        assert torch.equal(found, results[0][1])
