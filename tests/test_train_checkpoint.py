"""A training run that is killed or stopped, and goes on: the same losses and weights as one that was not."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from killed import die_at_call
from test_cli import call
from test_train import base, encoded, run_on_two, weights, without_pictures
from test_trainer import samples, selection
from tiny import llava_processor
from torch.utils.data import dataloader
from torch.utils.data._utils import worker
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from vig.cli import app
from vig.data.files import FolderInUse, lock_folder
from vig.models.families import ModelError
from vig.store.folder import SettingsDiffer
from vig.training.collator import SelectiveCollator
from vig.training.settings import TrainError
from vig.training.train import train

STEPS = {"lr": 1e-2, "max_steps": 6, "batch_size": 2, "accumulate": 2, "log_every": 1, "save_every": 2}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*train-checkpoint*"))


def killed_at(step: int):
    def on_progress(progress):
        if progress.step == step:
            raise Killed

    return on_progress


def stopped_at(step: int):
    return lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.step == step else None


def with_dropout():
    model = base()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.3
    return model


def same(one, other) -> bool:
    names = ("losses", "samples", "tokens", "truncated", "left_out", "errors", "steps", "kept")
    return torch.equal(weights(one.model), weights(other.model)) and all(
        getattr(one, name) == getattr(other, name) for name in names
    )


# --- the same bits ---


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (base, {}),
        (base, {"lora_rank": 2, "workers": 1}),
        (base, {"gradient_checkpointing": True, "schedule": "linear", "weight_decay": 0.1}),
        (with_dropout, {}),
    ],
    ids=["full", "lora", "checkpointing", "dropout"],
)
def test_a_killed_run_goes_on_with_the_same_bits(processor, tmp_path, make, options):
    """With a sample that cannot be read and answers that are cut short, whose counts go on too."""
    items = without_pictures(samples(8), [1])
    run = STEPS | {"processor": processor, "max_length": 60} | options
    whole = train(make(), items, None, tmp_path / "whole", **run | {"save_every": 0})
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(make(), items, None, out, on_progress=killed_at(5), **run)
    assert checkpoints(out) == ["train-checkpoint-4"] and not (out / "train.json").exists()
    seen = []
    resumed = train(make(), items, None, out, on_progress=lambda progress: seen.append(progress.step), **run)
    assert same(resumed, whole) and resumed.left_out == 1 and resumed.truncated > 0
    assert (resumed.resumed, whole.resumed, seen) == (4, 0, [5, 6])
    assert len(set(whole.losses)) == 6
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    record, expected = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("out", "whole"))
    assert record["losses"] == expected["losses"] and record["errors"] == expected["errors"]
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (out / name).exists():
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def deadly_train(aim: int, out: Path, items, processor):
    torch.set_num_threads(1)
    worker.MP_STATUS_CHECK_INTERVAL = (
        0.05  # s in which processes see that their parent is gone, and the join ends
    )
    if aim:
        die_at_call(aim)
    train(base(), items, None, out, processor=processor, **STEPS)


def test_a_run_killed_at_any_write_goes_on_with_the_same_bits(processor, tmp_path):
    items, fork = encoded(processor), multiprocessing.get_context("fork")
    whole = train(base(), items, None, None, processor=processor, **STEPS | {"save_every": 0})
    landed = 0
    for aims in ((1, 4, 5), (8, 10), (7, 16, 17), (14, 21), (22,)):
        out = tmp_path / f"{aims}"
        for aim in (*aims, 0):
            child = fork.Process(target=deadly_train, args=(aim, out, items, processor))
            child.start()
            child.join(60)
            assert child.exitcode in (0, -signal.SIGKILL)
            landed += child.exitcode != 0
            if (out / "train.json").exists() and not list(out.glob("train-checkpoint*")):
                break
        assert torch.equal(weights(LlavaForConditionalGeneration.from_pretrained(out)), weights(whole.model))
        assert json.loads((out / "train.json").read_text())["losses"] == whole.losses
    assert landed >= 8


def two_steps_and_a_stop(rank: int, folder: Path, items, processor):
    run = STEPS | {"batch_size": 1, "save_every": 5, "processor": processor}
    whole = train(base(), items, None, None, **run | {"save_every": 0})
    stop = stopped_at(3) if rank == 0 else None
    stopped = train(base(), items, None, folder, on_progress=stop, **run)
    resumed = train(base(), items, None, folder, **run)
    found = (same(whole, resumed), stopped.interrupted, stopped.steps, resumed.resumed, checkpoints(folder))
    torch.save(found, folder.with_suffix(f".{rank}"))


def test_two_processes_stop_and_go_on_together(processor, tmp_path):
    items = without_pictures(samples(8), [1])
    for found in run_on_two(two_steps_and_a_stop, tmp_path / "out", items, processor):
        assert found == (True, True, 3, 3, [])


def test_ctrl_c_leaves_a_model_and_a_checkpoint_of_the_same_step(processor, tmp_path):
    items, run = encoded(processor), STEPS | {"processor": processor, "save_every": 2}
    whole = train(base(), items, None, None, **run | {"save_every": 0})
    stopped = train(base(), items, None, tmp_path, on_progress=stopped_at(3), **run)
    assert stopped.interrupted and stopped.steps == 3 and checkpoints(tmp_path) == ["train-checkpoint-3"]
    assert json.loads((tmp_path / "train.json").read_text())["interrupted"]
    resumed = train(base(), items, None, tmp_path, **run)
    assert same(resumed, whole) and resumed.resumed == 3
    assert not json.loads((tmp_path / "train.json").read_text())["interrupted"]
    with pytest.raises(TrainError, match="holds a checkpoint already"):  # a model, none to resume
        train(base(), items, None, tmp_path, **run)


# --- what may differ ---


def test_other_settings_are_refused_with_their_values(processor, tmp_path):
    items = encoded(processor)
    chosen = selection(processor, samples(8))
    run = STEPS | {"processor": processor}
    with pytest.raises(Killed):
        train(base(), items, chosen, tmp_path, on_progress=killed_at(3), **run)
    for other, difference in (
        ({"lr": 2e-2}, "lr: the folder has 0.01, this run has 0.02"),
        ({"accumulate": 4}, "samples_per_step: the folder has 4, this run has 8"),
        ({"dtype": "bfloat16"}, "dtype: the folder has 'float32', this run has 'bfloat16'"),
        ({"lora_rank": 2}, "lora_rank: the folder has 0, this run has 2"),
    ):
        with pytest.raises(SettingsDiffer, match=f"  {difference}\nGive the same settings .*--overwrite"):
            train(base(), items, chosen, tmp_path, **run | other)
    with pytest.raises(SettingsDiffer, match=r"samples: the folder has '8 \(\w+\)', this run has '7 \("):
        train(base(), items[:7], chosen, tmp_path, **run)
    anew = train(base(), items, None, tmp_path, **run | {"lr": 2e-2, "overwrite": True})
    assert anew.resumed == 0 and not checkpoints(tmp_path)


def test_a_step_may_be_cut_into_other_batches_on_resuming(processor, tmp_path):
    """So that a run that ran out of memory goes on."""
    items, run = encoded(processor), STEPS | {"processor": processor}
    whole = train(base(), items, None, None, **run | {"save_every": 0})
    with pytest.raises(Killed):
        train(base(), items, None, tmp_path, on_progress=killed_at(3), **run)
    cut = {"batch_size": 1, "accumulate": 4, "workers": 1, "save_every": 0, "gradient_checkpointing": True}
    resumed = train(base(), items, None, tmp_path, **run | cut)
    assert resumed.resumed == 2 and resumed.samples == whole.samples
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-3)


# --- what goes wrong ---


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(processor, tmp_path):
    limits, seen = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill_up(progress):
        seen.append(checkpoints(tmp_path))
        size = 1 << 14 if progress.step == 4 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with pytest.warns(
            UserWarning,
            match=r"step 4 was not saved \(.*The run goes on; the checkpoint of step 2 stays.*Free",
        ):
            result = train(
                base(), encoded(processor), None, tmp_path, processor=processor, on_progress=fill_up,
                **STEPS | {"max_steps": 7},
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    second, sixth = ["train-checkpoint-2"], ["train-checkpoint-6"]
    assert seen == [[], [], second, second, second, second, sixth] and result.steps == 7


def test_space_for_two_checkpoints_is_asked_for_before_the_first_step(processor, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = 4 * weights(base()).numel()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size))
    with pytest.raises(TrainError, match=r"the checkpoints of save_every and the trained model take \d+ MiB"):
        train(base(), encoded(processor), None, tmp_path, processor=processor, **STEPS)
    train(base(), samples(2), None, tmp_path, processor=processor, max_steps=1)


def test_weights_that_are_no_numbers_are_not_saved(processor, tmp_path):
    model = base()
    run = STEPS | {"processor": processor, "save_every": 1, "log_every": 100}

    def poison(progress):
        with torch.no_grad():
            model.lm_head.weight[5] = math.nan

    with pytest.raises(TrainError, match="step 2: the loss is nan"):
        train(model, encoded(processor), None, tmp_path, on_progress=poison, **run)
    assert checkpoints(tmp_path) == ["train-checkpoint-1"]
    held = torch.load(tmp_path / "train-checkpoint-1" / "state.pt", weights_only=True)
    assert len(held["random"]) == 1 and held["schedule"]["last_epoch"] == 1


def test_a_damaged_checkpoint_and_a_missing_folder_are_explained(processor, tmp_path):
    run = STEPS | {"processor": processor}
    with pytest.raises(TrainError, match="save_every = 2, but there is no folder"):
        train(base(), samples(2), None, None, **run)
    with pytest.raises(Killed):
        train(base(), encoded(processor), None, tmp_path, on_progress=killed_at(3), **run)
    (tmp_path / "train-checkpoint-2" / "state.pt").write_bytes(b"half")
    for name in (
        ".train-checkpoint.partial",
        ".train-checkpoint.gone",
    ):  # of a run that was killed while it saved
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    with pytest.raises(
        TrainError, match=r"train-checkpoint-2 cannot be read \(.*Delete it, or start anew with"
    ):
        train(base(), encoded(processor), None, tmp_path, **run)
    assert checkpoints(tmp_path) == ["train-checkpoint-2"]


# --- one run at a time, and after a death ---


def refused(out: Path, said: Path):
    with pytest.raises(FolderInUse) as raised:
        train("nowhere", "nowhere.json", None, out, overwrite=True)
    said.write_text(str(raised.value))


def test_a_second_run_is_refused_with_the_holder_and_touches_nothing(processor, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    seen = []

    def meet_another(progress):
        if progress.step == 3:
            (out / ".train-checkpoint.partial").mkdir()  # as if it were saving
            other = multiprocessing.get_context("fork").Process(target=refused, args=(out, said))
            other.start()
            other.join(60)
            seen.extend(checkpoints(out))

    result = train(
        base(), encoded(processor), None, out, processor=processor, on_progress=meet_another, **STEPS
    )
    assert seen == [".train-checkpoint.partial", "train-checkpoint-2"]
    assert result.steps == 6 and not (out / ".lock").exists()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert said.read_text() == f"{out} is being written by {holder}. Wait for it, or choose another folder."


def refused_in_both(rank: int, folder: Path, items, processor):
    with pytest.raises(FolderInUse, match="is being written by process"):
        train(base(), items, None, folder, processor=processor, **STEPS)
    torch.save(True, folder.with_suffix(f".{rank}"))


def test_all_processes_of_a_run_are_refused_and_none_by_another(processor, tmp_path):
    with lock_folder(tmp_path / "out"):
        assert run_on_two(refused_in_both, tmp_path / "out", encoded(processor), processor) == [True, True]


def test_a_run_that_cannot_begin_leaves_no_folder(processor, tmp_path):
    with pytest.raises(ModelError):
        train(tmp_path / "no model", samples(2), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def train_with_a_deadly_sample(out: Path, items, processor, options):
    torch.set_num_threads(1)
    asked = dataloader._MultiProcessingDataLoaderIter._try_get_data
    asked.__defaults__ = (0.05,)  # seconds between two looks at the workers
    original = SelectiveCollator.encode

    def deadly(self, record):
        if record.id == items[5].id:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, record)

    SelectiveCollator.encode = deadly
    train(base(), items, None, out, processor=processor, **STEPS | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_crashes_its_decoder_is_left_out(processor, tmp_path, workers):
    """At once where processes decode, and by the next run where the run's own process does."""
    items, out = samples(8), tmp_path / "out"
    whole = train(
        base(), without_pictures(items, [5]), None, None, processor=processor, **STEPS | {"save_every": 0}
    )
    codes = []
    while not codes or (codes[-1] and len(codes) < 3):
        given = (out, items, processor, {"workers": workers})
        child = multiprocessing.get_context("fork").Process(target=train_with_a_deadly_sample, args=given)
        child.start()
        child.join(60)
        codes.append(child.exitcode)
    assert codes == ([0] if workers else [-signal.SIGKILL, 0])
    record = json.loads((out / "train.json").read_text())
    assert record["losses"] == whole.losses and record["left_out"] == 1
    assert len(record["errors"]) == 1 and f"{items[5].key} (id" in record["errors"][0]
    assert "the process that decoded and tokenised it died. Replace its images" in record["errors"][0]


# --- on the command line ---


def test_the_same_command_goes_on(processor, tmp_path):
    base().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    records = [{"id": str(row), "conversations": turns} for row in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    command = [
        *("train", tmp_path / "model", tmp_path / "data.json", "-o", tmp_path / "out", "--save-every", 2),
        *("--batch-size", 2, "--epochs", 2, "--attn", "eager", "--trust-remote-code"),
    ]
    with pytest.raises(Killed):
        run = {"max_length": None, "batch_size": 2, "epochs": 2, "save_every": 2, "log_every": 1}
        train(
            tmp_path / "model",
            tmp_path / "data.json",
            None,
            tmp_path / "out",
            on_progress=killed_at(3),
            **run,
        )
    said = call(*command)
    assert "trained 6 steps on 12 samples" in said and "2 steps were done before" in said
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    said = call(*command, "--workers", 1)  # which changes no step
    assert "trained 6 steps on 12 samples" in said and "nothing is left to do" in said
    assert "checkpoint:" in said and "to train anew: --overwrite, or another folder as -o" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written
    again = json.loads(CliRunner().invoke(app, [*map(str, command), "--json"]).stdout)
    assert (again["steps"], again["resumed"], again["loss_steps"]) == (6, 6, 3) and "eval_loss" not in again
    with pytest.raises(
        SettingsDiffer, match="finished run, made with other settings:\n  lr: the folder has 2e-05"
    ):
        call(*command, "--lr", "1e-3")
    said = call(*command, "--overwrite")
    assert "trained 6 steps on 12 samples" in said and "done before" not in said
