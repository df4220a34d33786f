"""`vig train --fsdp`: one model over two processes (gloo) takes the steps of one process that has it whole."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from accelerate import PartialState
from ranks import run_command
from test_train import base, run_on_two
from test_trainer import records, samples, selection
from tiny import llava_model, llava_processor, save_llava, weights
from torch.distributed.fsdp import FSDPModule
from transformers import LlavaForConditionalGeneration

from vig.data.records import sample_from_record
from vig.training.batches import plan_batches
from vig.training.settings import TrainError, TrainSettings, WrongSetting
from vig.training.sharding import whole
from vig.training.train import train


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


STEPS = {"lr": 1e-3, "max_steps": 4, "log_every": 1, "save_every": 2, "eval_every": 2, "weight_decay": 0.1}


def items(text: bool = False):
    """Eight samples of which rank 1 gets two of text alone in its first micro-batch of two. text: all of them are."""
    order = plan_batches(8, TrainSettings(batch_size=8, max_steps=1))[0]
    rows = records(8)
    for place in order if text else order[1:4:2]:
        rows[place]["image"], rows[place]["conversations"][0]["value"] = None, "What is it?"
    return [sample_from_record(row, key=row["key"]) for row in rows]


def chosen_of(processor, text):
    return selection(processor, items(text), lambda row, n: np.arange(n) < (1 if row % 2 else n))


def sharded_steps(rank: int, folder, chosen, processor, options, text):
    """A run, one that is stopped after its second step, and its resumption."""
    seen = []

    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = STEPS | options | {"processor": processor, "fsdp": True, "eval_data": samples(5)}
    out = train(
        base(),
        items(text),
        chosen,
        folder,
        on_progress=lambda progress: seen.append(progress.grad_norm),
        **settings,
    )
    assert isinstance(out.model, FSDPModule)
    sharded = sum(p.to_local().numel() for p in out.model.parameters())
    stopped = train(base(), items(text), chosen, folder / "again", on_progress=stop, **settings)
    assert stopped.interrupted and stopped.steps == 2
    again = train(base(), items(text), chosen, folder / "again", **settings)
    state = [whole(result.model.state_dict()) for result in (out, again)]
    torch.save(
        (out.losses, seen, out.evals, sharded, state, again.losses, again.resumed),
        folder.with_suffix(f".{rank}"),
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 2, "accumulate": 2}, False),
        ({"batch_size": 4, "lora_rank": 2}, False),
        ({"batch_size": 4}, True),
    ],
    ids=["full", "lora", "text alone"],
)
def test_two_processes_that_hold_one_model_take_the_steps_of_one(processor, tmp_path, options, text):
    """Text alone on one of them or on both, held-out samples that do not divide, a run that is stopped and goes on."""
    chosen, norms = chosen_of(processor, text), []
    one = train(
        base(), items(text), chosen, None, processor=processor, eval_data=samples(5),
        on_progress=lambda progress: norms.append(progress.grad_norm),
        **STEPS | options | {"batch_size": 8, "accumulate": 1, "save_every": 0},
    )  # fmt: skip
    expected = one.model.state_dict()
    folder = tmp_path / "out"
    for losses, found, evals, sharded, (state, again), losses_again, resumed in run_on_two(
        sharded_steps, folder, chosen, processor, options, text
    ):
        assert losses == pytest.approx(one.losses, rel=1e-5) and losses_again == losses and resumed == 2
        assert [loss for _, loss in evals] == pytest.approx([loss for _, loss in one.evals], rel=1e-5)
        if found:  # of the main process
            assert found == pytest.approx(norms, rel=1e-4, nan_ok=True)  # none before the first step
        assert 0.4 < sharded / weights(one.model).numel() < 0.6
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(again[name], state[name]), name
            assert (state[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name
    if "lora_rank" in options:
        assert sorted(path.name for path in folder.glob("*.safetensors")) == ["adapter_model.safetensors"]
    else:
        saved = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
        assert all(torch.equal(saved[name], state[name]) for name in saved)
        assert not torch.equal(saved["lm_head.weight"], llava_model().lm_head.weight)


def test_the_command_under_torchrun(tmp_path):
    """From files to a checkpoint that is whole; the main process alone tells."""
    save_llava(tmp_path / "model")
    rows = records(4)
    for row in rows:
        if row["image"] is not None:
            row["image"].save(tmp_path / f"{row['id']}.png")
            row["image"] = f"{row['id']}.png"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = [
        "train",
        tmp_path / "model",
        tmp_path / "data.json",
        "-o",
        tmp_path / "out",
        "--fsdp",
        "--lr",
        1e-3,
    ]
    said = run_command(
        [*words, "--batch-size", 1, "--max-steps", 2], 2, tmp_path, lambda rank: PartialState._reset_state()
    )
    assert [code for code, _ in said] == [0, 0], said
    assert "trained 2 steps on 4 samples" in said[0][1] and "trained" not in said[1][1]
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not torch.equal(saved.lm_head.weight, llava_model().lm_head.weight)
    assert "fsdp: true" in (tmp_path / "out" / "train.yaml").read_text()


def test_one_process_alone_is_wrong_usage(processor):
    with pytest.raises(
        WrongSetting, match=r"this one stands alone. Start one a GPU: torchrun --nproc-per-node"
    ):
        train(base(), samples(2), None, None, processor=processor, fsdp=True)


def test_a_configuration_of_accelerate_is_refused_with_the_way(processor, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainError, match=r"Launch it with torchrun and --fsdp.*or use SelectiveTrainer"):
        train(base(), samples(2), None, None, processor=processor)


def test_a_model_in_parts_is_refused(processor):
    model = base()
    model.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}
    with pytest.raises(TrainError, match="is in parts already"):
        train(model, samples(2), None, None, processor=processor)
