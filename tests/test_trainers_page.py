"""docs/trainers.md as written: every Python block, with a tiny checkpoint, in the frameworks that are installed.

LLaMA-Factory, axolotl and ms-swift are stood in for by datasets in the form that they document.
"""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import weights
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vig import SelectiveCollator, keep_samples, read_samples, read_selection, select
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import tuning_records, write_records
from vig.models.prompts import Encoder
from vig.scoring.scorer import Scorer

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text()


def blocks(title: str) -> list[str]:
    """The Python blocks under a heading."""
    part = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data.json and a selection of it."""
    where = tmp_path_factory.mktemp("page")
    write_records(where, "data", tuning_records(12, 0))
    select(Scorer(CHECKPOINT).score(list(read_samples(where / "data.json"))), 50, out=where / "selection")
    return where


@pytest.fixture
def names(folder, monkeypatch):
    """What a reader has by then: a model, its processor, and the first block's dataset."""
    monkeypatch.chdir(folder)
    found = {
        "torch": torch,
        "processor": AutoProcessor.from_pretrained(CHECKPOINT),
        "model": LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32"),
    }
    exec(blocks("The data")[0], found)
    return found


def test_the_configuration_of_accelerate_has_its_names(tmp_path):
    """Those that it knows: others stop its launcher, or are passed over."""
    part = PAGE.partition("\n## A model larger than one GPU\n")[2].partition("\n## ")[0]
    (tmp_path / "fsdp2.yaml").write_text(re.search(r"```yaml\n(.*?)```", part, re.DOTALL)[1])
    config = load_config_from_file(str(tmp_path / "fsdp2.yaml"))
    assert (config.distributed_type, config.num_processes) == (DistributedType.FSDP, 8)
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config.keys() <= known


def tokenized(folder, processor) -> list[dict]:
    """What a framework's own tokenisation would leave: all records in order, labels of the answers alone."""
    encoder, rows = Encoder(processor), []
    for sample in read_samples(folder / "data.json"):
        item = encoder.encode(sample)
        labels = [-100] * len(item.input_ids)
        for index in item.answer_index:
            labels[index] = item.input_ids[index]
        mask = [1] * len(labels)
        rows.append(
            {"input_ids": item.input_ids, "attention_mask": mask, "labels": labels, "key": sample.key}
        )
    return rows


def expected(folder, processor) -> dict[str, list[int]]:
    """The labels of our own collator, by key, of the samples that are kept."""
    chosen = read_selection(folder / "selection")
    collator = SelectiveCollator(processor, chosen, cut=False)
    kept = keep_samples(read_samples(folder / "data.json"), chosen).samples
    return {sample.key: collator([sample])["labels"][0].tolist() for sample in kept}


def test_every_framework_of_the_table_has_its_block():
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    with_code = [title for title in titles if blocks(title)]
    assert with_code == ["The data", "TRL", "accelerate", "Lightning", "LLaMA-Factory", "axolotl", "ms-swift"]


def test_a_dataset_of_your_own(names, folder):
    records = [{"text": str(row)} for row in range(12)]
    names["own"] = datasets.Dataset.from_list(records)
    exec(blocks("The data")[1], names)
    assert names["own"]["key"] == names["dataset"]["key"] and 0 < len(names["own"]) < 12


@pytest.mark.parametrize("title", ["TRL", "accelerate", "Lightning"])
def test_trainers_that_are_installed(names, title):
    if title == "Lightning":
        pytest.importorskip("lightning")
    before = weights(names["model"])
    [block] = blocks(title)
    exec(block, names)
    assert not torch.equal(weights(names["model"]), before)
    if title == "accelerate":
        assert 0 < names["loss"].item() < 10
    if title == "TRL":
        assert names["trainer"].state.global_step == 2


def test_llama_factorys_saved_dataset(names, folder):
    rows = tokenized(folder, names["processor"])
    keys = [row.pop("key") for row in rows]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk("tokenized")
    [block] = blocks("LLaMA-Factory")
    exec(block, names)
    found = datasets.load_from_disk("selected")["train"]
    kept = expected(folder, names["processor"])
    assert found["labels"][:] == [kept[key] for key in keys if key in kept]
    assert found.column_names == ["input_ids", "attention_mask", "labels"]


def test_axolotls_pretokenized_format(names, folder):
    names["tokenized"] = datasets.Dataset.from_list(tokenized(folder, names["processor"]))
    [block] = blocks("axolotl")
    exec(block, names)
    found = datasets.Dataset.from_json("selected.jsonl", cache_dir=str(folder / "cache"))
    assert sorted(found.column_names) == ["attention_mask", "input_ids", "labels"]
    assert found["labels"][:] == list(expected(folder, names["processor"]).values())


def test_ms_swifts_encoded_dataset(names, folder):
    rows = tokenized(folder, names["processor"])
    names["train_dataset"] = datasets.Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "labels": row["labels"], "length": len(row["labels"])}
            for row in rows
        ]
    )
    [block] = blocks("ms-swift")
    exec(block, names)
    kept = expected(folder, names["processor"])
    for row, labels in zip(rows, names["train_dataset"]["labels"], strict=True):
        assert labels == kept.get(row["key"], [-100] * len(row["labels"]))
