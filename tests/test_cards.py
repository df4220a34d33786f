"""The cards of published models and selections: metadata as the hub reads it, and figures that are those of the run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from typer.testing import CliRunner

from vig import select, train
from vig.cli import app
from vig.demo import dataset
from vig.demo.arms import CHECKPOINT
from vig.reporting import cards
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.store.rows import ScoreRow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with scores, a selection and a model of two steps."""
    folder = tmp_path_factory.mktemp("run")
    data = dataset.write_records(folder, "tune", dataset.tuning_records(24, seed=1))
    score_dataset(Scorer(str(CHECKPOINT), dtype="float32"), data, folder / "scores")
    select(folder / "scores", p=40, out=folder / "selection")
    train(str(CHECKPOINT), data, folder / "selection", folder / "tuned", max_steps=2, batch_size=4)
    return folder


def no_path_of_the_machine(text: str, run) -> bool:
    return str(run) not in text and str(CHECKPOINT.parent) not in text


def test_of_a_model(run):
    text = cards.card(run / "tuned")
    read = ModelCard(text)
    assert read.data.library_name == "transformers" and read.data.pipeline_tag == "image-text-to-text"
    assert set(cards.TAGS) <= set(read.data.tags)
    assert read.data.base_model is None, "a folder is no name of the hub"
    record = json.loads((run / "tuned" / "train.json").read_text())
    chosen = record["selection"]["selection"]
    counts = chosen["counts"]
    for said in (
        f"{record['kept']} samples kept, {record['dropped']} not selected",
        f"{record['samples']} samples and {record['tokens']} answer tokens",
        f"| p | {chosen['p']} % |",
        f"| tau | {chosen['tau']:.6g} nats |",
        f"{counts['tokens_kept']} of {counts['tokens_total']} kept",
        f"loss {record['losses'][0]:.4f} -> {record['losses'][1]:.4f} nats a token (mean of the first and the last 1",
        "max_steps: 2",
        "null image | blur",
    ):
        assert said in text, said
    assert no_path_of_the_machine(text, run) and "tune.json" in text


def test_of_a_model_from_the_hub_and_of_an_adapter(run, tmp_path):
    record = json.loads((run / "tuned" / "train.json").read_text()) | {
        "model": "org/some-vlm",
        "selection": None,
    }
    (tmp_path / "train.json").write_text(json.dumps(record))
    read = ModelCard(cards.card(tmp_path))
    assert (read.data.base_model, read.data.to_dict()["base_model_relation"]) == ("org/some-vlm", "finetune")
    assert "all answer tokens" in read.text and "## Selection" not in read.text
    (tmp_path / "adapter_config.json").write_text("{}")
    read = ModelCard(cards.card(tmp_path))
    assert read.data.library_name == "peft" and read.data.to_dict()["base_model_relation"] == "adapter"


def test_the_losses_on_held_out_data(run, tmp_path):
    record = json.loads((run / "tuned" / "train.json").read_text())
    for evals, said in (
        (
            [[0, 2.5], [10, 2.0], [1200, 1.25]],
            "data: 2.5000 before the first step, 1.2500 after step 1,200 (nats",
        ),
        ([[10, 2.0]], "data: 2.0000 after step 10 (nats"),
    ):
        (tmp_path / "train.json").write_text(json.dumps(record | {"evals": evals}))
        assert said in cards.card(tmp_path)


def test_of_an_adapter_in_the_place_of_pefts_form(run, tmp_path):
    pytest.importorskip("peft")
    tuned, form = tmp_path / "tuned", tmp_path / "tuned" / "README.md"
    given = (str(CHECKPOINT), run / "tune.json", run / "selection", tuned)
    train(*given, max_steps=1, batch_size=2, lora_rank=2)
    assert cards.is_empty_form(form.read_text())
    for edited in (form.read_text() + "\nMine.\n", form.read_text().replace("Model ID", "my adapter")):
        assert not cards.is_empty_form(edited)
    said = CliRunner().invoke(app, ["card", str(tuned)])
    assert said.exit_code == 0 and "replaced the form that PEFT had put there" in " ".join(
        said.output.split()
    )
    assert form.read_text() == cards.card(tuned)
    refused = CliRunner().invoke(app, ["card", str(tuned)])
    assert "somebody may have edited it" in str(refused.exception)
    form.write_text("mine")
    train(*given, max_steps=2, batch_size=2, lora_rank=2, overwrite=True)
    assert form.read_text() == "mine", "training anew keeps what somebody wrote"
    said = CliRunner().invoke(app, ["card", str(tuned), "--overwrite", "--json"])
    assert json.loads(said.stdout)["replaced"] == cards.EARLIER


def test_of_a_selection(run):
    text = cards.card(run / "selection")
    read = DatasetCard(text)
    assert read.data.size_categories == ["n<1K"] and read.data.task_categories == ["image-text-to-text"]
    (config,) = read.data.to_dict()["configs"]
    assert len(list((run / "selection").glob(config["data_files"]))) == 1
    chosen = select(run / "scores", p=40)
    assert f"{len(chosen.table())} rows" in text and f"{chosen.counts['samples_kept']} of" in text
    assert chosen.metadata["data_fingerprint"] in text and no_path_of_the_machine(text, run)


def test_a_tau_that_tells_little_apart_is_on_the_card(run, tmp_path):
    assert "**Warning:**" not in cards.card(run / "selection")
    with pytest.warns(UserWarning, match="tau = "):
        chosen = select(run / "scores", p=100, out=tmp_path / "selection")
    said = [line for line in chosen.warnings if line.startswith("tau = ")]
    assert chosen.tau < 0 and len(said) == 1
    assert f"**Warning:** {said[0]}." in cards.card(tmp_path / "selection")


def test_of_a_selection_by_loss(run, tmp_path):
    """What ranks is what the card names: VIG has no part in a loss filter."""
    select(run / "scores", p=40, by="loss", level="sample", out=tmp_path / "selection")
    text = cards.card(tmp_path / "selection")
    assert "by loss" in text and "have a low loss" in text and "nats of log-likelihood" in text
    assert "Visual Information Gain" not in text


def test_of_a_selection_by_source_whose_scores_say_nothing_of_a_model(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        ScoreRow(f"a#{i}", str(i), source=("one", "two|three")[i % 2], token_ids=[1, 2], positions=[0, 1],
                 token_nll_image=rng.random(2), token_nll_null=1 + rng.random(2))
        for i in range(8)
    ]  # fmt: skip
    select(rows, p=50, by="source", out=tmp_path)
    text = cards.card(tmp_path)
    assert re.search(r"^\| two\\\|three \| [\d.]+ \| 2 \| 4 \|$", text, re.MULTILINE)
    assert "(the lowest of one a source)" in text and "revision unknown" in text
    DatasetCard(text)


def test_the_command(run):
    def call(*words):
        return CliRunner().invoke(app, ["card", *map(str, words)])

    first = call(run / "selection")
    path = run / "selection" / "README.md"
    assert first.exit_code == 0 and "2 places are left for you" in first.output
    assert path.read_text().count("**say it here**") == 2
    path.write_text("mine")
    refused = call(run / "selection")
    assert isinstance(refused.exception, ValueError) and "--overwrite" in str(refused.exception)
    assert path.read_text() == "mine"
    assert json.loads(call(run / "selection", "--overwrite", "--json").output)["left"] == 2
    assert path.read_text() == cards.card(run / "selection")
    nothing = call(run / "scores")
    assert "neither train.json nor a selection" in str(nothing.exception)
