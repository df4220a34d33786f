"""Every family under Hugging Face's and TRL's trainers, heads tied and not: the step of stock masked cross-entropy."""

from __future__ import annotations

import copy
import functools

import datasets
import numpy as np
import pytest
import tiny_families
import torch
import trl
from test_trainer import (
    SelectiveSFT,
    arguments,
    assert_step,
    logged,
    records,
    samples,
    selection,
    stock_gradients,
)

from vig import SelectiveCollator, SelectiveTrainer


def build(family: str, tied: bool):
    torch.manual_seed(0)
    entry, named = tiny_families.FAMILIES[family], tiny_families.tokenizer(family)
    text = tiny_families.TEXT | {"vocab_size": len(named), "tie_word_embeddings": tied}
    ids = {token: id for token, id in named.get_vocab().items() if token.startswith("<")}
    config = entry.config(text, ids)
    config.tie_word_embeddings = tied
    model = entry.model(config).eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():  # larger weights than transformers draws, so that pictures change the logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def few(row: int, n: int) -> np.ndarray:
    """Of the answers all tokens, one, or none."""
    return np.arange(n) < (0 if row == 6 else 1 if row % 2 else n)


def hugging_face(model, processor, collator, folder, **more) -> SelectiveTrainer:
    return SelectiveTrainer(
        model=model, args=arguments(folder, **more), train_dataset=samples(8), data_collator=collator
    )


def of_trl(model, processor, collator, folder, **more) -> SelectiveSFT:
    own = {"max_length": None, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SelectiveSFT(
        model=model, args=trl.SFTConfig(**arguments(folder, **more).to_dict() | own), data_collator=collator,
        train_dataset=datasets.Dataset.from_list(records(8)), processing_class=processor,
    )  # fmt: skip


@functools.cache
def stock(family: str, tied: bool):
    """The model before its step, and stock's loss and gradients of all eight samples in one batch."""
    processor, base = tiny_families.processor(family), build(family, tied)
    collator = SelectiveCollator(processor, selection(processor, samples(8), few), cut=False)
    return base, *stock_gradients(copy.deepcopy(base), collator(samples(8)))


@pytest.mark.parametrize("make", [hugging_face, of_trl])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_step_of_stock_masked_cross_entropy(family, tied, make, tmp_path):
    """Eight samples as 1 x 8, 4 x 2 and 8 x 1 micro-batches: uneven counts, text alone, one that keeps nothing."""
    processor, (base, loss, gradients) = tiny_families.processor(family), stock(family, tied)
    collator = SelectiveCollator(processor, selection(processor, samples(8), few))
    for accumulate in (1, 4, 8):
        model, size = copy.deepcopy(base), 8 // accumulate
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        trainer = make(model, processor, collator, tmp_path, **more)
        trainer.train()
        assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5), accumulate
        assert_step(base, model, gradients, tolerance=2e-5)
