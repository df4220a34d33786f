"""`vig train` beside its steps: held-out loss, trackers, options from a file."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from test_cli import call
from test_train import base, run_on_two, weights, without_pictures
from test_train_checkpoint import STEPS, Killed, killed_at, with_dropout
from test_trainer import masked_cross_entropy, samples, selection
from tiny import llava_processor, save_picture

from vig.training.batches import plan_batches
from vig.training.collator import SelectiveCollator
from vig.training.settings import TrainError, TrainSettings, WrongSetting, loss_ends
from vig.training.train import train


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


# --- held-out data ---


def test_the_held_out_loss_is_that_of_all_answer_tokens_and_changes_no_step(processor):
    """Taken of a model with dropout, before the first step, every second one and at the end; they keep their bits."""
    items, held_out, models = samples(6), samples(5), []
    run = {"processor": processor, "lr": 1e-2, "max_steps": 3, "batch_size": 2, "log_every": 1}
    alone = train(with_dropout(), items, selection(processor, items), None, **run)

    def keep(progress):
        models.append((progress.step, base()))
        models[-1][1].load_state_dict(model.state_dict())

    model, seen = with_dropout(), []
    result = train(
        model, items, selection(processor, items), None, eval_data=held_out, eval_every=2,
        on_progress=lambda progress: (keep(progress), seen.append(str(progress))), **run,
    )  # fmt: skip
    assert torch.equal(weights(result.model), weights(alone.model)) and result.losses == alone.losses
    assert alone.evals == [] and [step for step, _ in result.evals] == [0, 2, 3]
    batch, models = SelectiveCollator(processor)(held_out), dict(models)
    for step, loss in result.evals:
        assert loss == pytest.approx(masked_cross_entropy(models[step].eval(), batch).item(), rel=1e-5), step
    before, then, after = (f"eval loss {loss:.4f}" for _, loss in result.evals)
    assert seen[0] == f"step 0/3  {before} before the first step" and f"{before} (step 0)  lr" in seen[1]
    assert f"{then}  lr" in seen[2] and f"{after}  lr" in seen[3]
    assert result.eval_ends == (result.evals[0][1], result.evals[2][1])
    late = train(model, items, None, None, eval_data=held_out, eval_on_start=False, **run)
    assert [step for step, _ in late.evals] == [3] and late.eval_ends[0] is None


def test_the_loss_that_is_reported_is_a_mean_over_steps(processor, tmp_path):
    """Over the last log_every steps, those before a kill too; a step without a token is in none."""
    plan = [index for [index] in plan_batches(4, TrainSettings(batch_size=1, max_steps=8))]
    items = without_pictures([samples(6)[row] for row in (0, 1, 3, 4)], plan[1:2])
    run = {
        "processor": processor,
        "batch_size": 1,
        "max_steps": 8,
        "log_every": 3,
        "save_every": 4,
        "lr": 1e-2,
    }
    seen, again = {}, {}
    whole = train(
        base(), items, None, None, on_progress=lambda at: seen.update({at.step: (at.loss, str(at))}),
        **run | {"save_every": 0},
    )  # fmt: skip
    assert sorted(seen) == [3, 6, 8] and len(set(whole.losses)) > 5
    for step, (loss, line) in seen.items():
        window = [one for one in whole.losses[step - 3 : step] if one]
        assert loss == pytest.approx(np.mean(window)) and f"loss {loss:.4f} (mean of 3 steps)" in line
    assert 0 in whole.losses[:3], "the second step has no token"
    with pytest.raises(Killed):
        train(base(), items, None, tmp_path, on_progress=killed_at(6), **run)
    train(base(), items, None, tmp_path, on_progress=lambda at: again.update({at.step: at.loss}), **run)
    assert again == {step: seen[step][0] for step in (6, 8)}
    _, last, steps = whole.loss_ends
    assert steps == 4 and last == pytest.approx(np.mean([one for one in whole.losses[4:] if one]))
    assert loss_ends([3.0]) == (3.0, 3.0, 1) and loss_ends([]) is None
    assert loss_ends([*range(100, 0, -1)]) == (95.5, 5.5, 10)


def test_a_resumed_run_has_the_evaluations_of_a_whole_one(processor, tmp_path):
    items, run = (
        samples(8),
        STEPS | {"processor": processor, "eval_data": samples(3), "eval_every": 2, "workers": 1},
    )
    whole = train(base(), items, None, tmp_path / "whole", **run)
    with pytest.raises(Killed):
        train(base(), items, None, tmp_path / "out", on_progress=killed_at(5), **run)
    resumed = train(base(), items, None, tmp_path / "out", **run)
    assert resumed.resumed == 4 and [step for step, _ in whole.evals] == [0, 2, 4, 6]
    assert resumed.evals == whole.evals and torch.equal(weights(resumed.model), weights(whole.model))
    assert json.loads((tmp_path / "out" / "train.json").read_text())["evals"] == whole.evals


def evaluated(rank, folder, items, held_out, processor):
    run = {"processor": processor, "batch_size": 1, "max_steps": 1, "eval_data": held_out}
    torch.save(train(base(), items, None, None, **run).evals, folder.with_suffix(f".{rank}"))


def test_two_processes_share_the_held_out_samples(processor, tmp_path):
    items, held_out = samples(2), samples(5)
    one = train(base(), items, None, None, processor=processor, batch_size=2, max_steps=1, eval_data=held_out)
    for found in run_on_two(evaluated, tmp_path / "out", items, held_out, processor):
        assert found == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in one.evals]


def test_held_out_samples_that_cannot_be_used_are_told_once(processor, tmp_path):
    held_out = without_pictures(samples(3), [1])
    run = {"processor": processor, "max_steps": 2, "eval_every": 1}
    with pytest.warns(UserWarning, match=r"1 held-out samples are left out .*data.json#1 .*no image") as told:
        result = train(base(), samples(2), None, None, eval_data=held_out, **run)
    assert len([one for one in told if "held-out" in str(one.message)]) == 1 and len(result.evals) == 3
    with pytest.warns(UserWarning, match="held-out"):
        nothing = train(base(), samples(2), None, None, eval_data=without_pictures(samples(1), [0]), **run)
    assert all(math.isnan(loss) for _, loss in nothing.evals)
    with pytest.raises(TrainError, match="eval_every = 1, but there is no held-out data"):
        train(base(), samples(2), None, None, **run)
    with pytest.raises(
        TrainError, match=r"\(eval_data\) holds no sample that can be read\. Give another file"
    ):
        train(base(), samples(2), None, None, eval_data=[], **run)
    (tmp_path / "held.jsonl").write_text('{"id": 1, "conversations": [{"from": "human", "value": "q"}, '
                                         '{"from": "gpt", "value": "a"}]}\n{broken\n')  # fmt: skip
    with pytest.warns(UserWarning, match=r"1 held-out samples are left out .*held.jsonl#1"):
        train(base(), samples(2), None, None, eval_data=tmp_path / "held.jsonl", **run)
    (tmp_path / "held.jsonl").write_text("{broken\n")
    with pytest.raises(TrainError, match=r"held.jsonl holds no sample .*The first of 1: held.jsonl#0"):
        train(base(), samples(2), None, None, eval_data=tmp_path / "held.jsonl", **run)


# --- trackers ---


class Told(GeneralTracker):
    """A tracker of accelerate's that keeps what it is told."""

    name, requires_logging_directory, told = "told", True, []

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.told.append(("made", run_name, str(logging_dir)))

    @property
    def tracker(self):
        return self

    def start(self):
        self.told.append("start")

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step=None, **more):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finish")


def test_trackers_are_told_what_a_trainer_would_tell_them(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "told", Told)
    monkeypatch.setattr("vig.training.trackers.get_available_trackers", lambda: ["told"])
    monkeypatch.setattr(Told, "told", [])
    result = train(
        base(), samples(4), None, tmp_path / "out", processor=processor, report_to=["told"], max_steps=2,
        batch_size=2, log_every=1, eval_data=samples(2), freeze=("vision",),
    )  # fmt: skip
    made, start, configuration, before, (first, one), (second, two), finish = Told.told
    assert made == ("made", "out", str(tmp_path / "out" / "logs")) and (start, finish) == ("start", "finish")
    assert (
        configuration["lr"] == 2e-5
        and configuration["freeze"] == "('vision',)"
        and "max_length" not in configuration
    )
    assert (first, second) == (1, 2) and one["train/loss"] == pytest.approx(result.losses[0])
    assert two["train/num_kept_tokens"] == result.tokens and two["train/kept_tokens_per_second"] > 0
    assert before == (0, {"eval/loss": result.evals[0][1]})
    assert "eval/loss" not in one and two["eval/loss"] == result.evals[1][1]
    assert one["train/kept_tokens_per_second"] > 0
    assert {"train/learning_rate", "train/grad_norm", "train/num_samples"} <= one.keys()


def test_trackers_finish_where_a_run_dies(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "told", Told)
    monkeypatch.setattr("vig.training.trackers.get_available_trackers", lambda: ["told"])
    monkeypatch.setattr(Told, "told", [])
    with pytest.raises(Killed):
        train(
            base(), samples(4), None, tmp_path, processor=processor, report_to=["told"], max_steps=2, log_every=1,
            on_progress=killed_at(1),
        )  # fmt: skip
    assert Told.told[-1] == "finish"


def test_trackers_that_cannot_report_are_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(WrongSetting, match=r"report_to = 'paper', expected one of .*tensorboard.*wandb"):
        train("nowhere", samples(1), None, None, report_to=["paper"])
    monkeypatch.setattr("vig.training.trackers.get_available_trackers", list)
    with pytest.raises(
        TrainError, match="report_to = 'wandb', but its package is not installed: pip install wandb"
    ):
        train("nowhere", samples(1), None, None, report_to=["wandb"])
    monkeypatch.setattr("vig.training.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(TrainError, match="writes files, and there is no folder"):
        train("nowhere", samples(1), None, None, report_to=["tensorboard"])


def test_tensorboard_itself(processor, tmp_path):
    pytest.importorskip("tensorboard")
    train(base(), samples(2), None, tmp_path, processor=processor, report_to=["tensorboard"], max_steps=1)
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_wandb_itself(processor, tmp_path, monkeypatch):
    """Offline: what it would send lies in one file."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = {"processor": processor, "report_to": ["wandb"], "max_steps": 2, "log_every": 1}
    train(base(), samples(4), None, tmp_path / "out", eval_data=samples(2), **run)
    [kept] = tmp_path.rglob("offline-run-*/*.wandb")
    sent = kept.read_bytes()
    for name in ("train/loss", "train/learning_rate", "train/num_kept_tokens", "eval/loss", "batch_size"):
        assert name.encode() in sent, name


# --- options from a file ---


@pytest.fixture
def files(tmp_path):
    base().save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(row), "image": save_picture(tmp_path / f"{row}.png", row), "conversations": turns}
               for row in range(4)]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def test_options_come_from_a_file_and_are_saved_with_the_checkpoint(files):
    options = {"model": str(files / "model"), "data": str(files / "data.json"), "out": str(files / "out"),
               "lr": "1e-3", "batch-size": 2, "max_steps": 2, "freeze": ["vision", "projector"],
               "gradient-checkpointing": True, "eval": str(files / "data.json"), "schedule": None}  # fmt: skip
    (files / "run.yaml").write_text(yaml.safe_dump(options) + "\n# a comment\n")
    said = call("train", "--config", files / "run.yaml", "--max-steps", "1")
    assert "trained 1 step on 2 samples" in said and "step 0/1 eval loss" in said
    before, after = (loss for _, loss in json.loads((files / "out" / "train.json").read_text())["evals"])
    assert f"loss on the held-out data {before:.4f} -> {after:.4f} nats an answer token" in said
    assert "(before the first step, after step 1)" in said
    record = json.loads((files / "out" / "train.json").read_text())
    settings = record["settings"]
    assert (settings["lr"], settings["batch_size"], settings["max_steps"]) == (1e-3, 2, 1)
    assert settings["freeze"] == ["vision", "projector"] and settings["gradient_checkpointing"]
    saved = yaml.safe_load((files / "out" / "train.yaml").read_text())
    assert saved == {
        "model": options["model"], "data": options["data"], "out": options["out"], "lr": 1e-3, "batch_size": 2,
        "max_steps": 1, "freeze": ["vision", "projector"], "gradient_checkpointing": True, "eval": options["eval"],
    }  # fmt: skip
    again = call("train", "--config", files / "out" / "train.yaml", "-o", files / "again")
    assert "trained 1 step on" in again
    losses = [json.loads((files / name / "train.json").read_text())["losses"] for name in ("out", "again")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", r"there is no option 'learning_rate'. There are accumulate, .*, lr, "),
        ("[1, 2]", "holds a list, expected `option: value` lines"),
        ("a: [", "is not YAML"),
        (None, "cannot be read"),
        ("lr: fast\nmodel: m\ndata: d\nout: o", r"Invalid value for '--lr'"),
    ],
)
def test_files_that_hold_no_options_are_wrong_usage(tmp_path, text, message, monkeypatch):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("COLUMNS", "400")
    given = [] if "model" in (text or "") else ["m", "d", "-o", "o"]
    said = call("train", *given, "--config", path, code=2)
    plain = " ".join(said.replace("│", " ").split())
    assert re.search(message, plain), plain
