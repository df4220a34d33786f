"""Every family under Hugging Face's and TRL's trainers, heads tied and not: the step of stock masked cross-entropy."""

from __future__ import annotations

import copy

import datasets
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_step_of_stock_masked_cross_entropy(family, tied, tmp_path):
    processor, items = tiny_families.processor(family), samples(4)
    chosen = selection(processor, items)
    collator = SelectiveCollator(processor, chosen)
    base = build(family, tied)
    loss, gradients = stock_gradients(
        copy.deepcopy(base), SelectiveCollator(processor, chosen, cut=False)(items)
    )
    model = copy.deepcopy(base)
    trainer = SelectiveTrainer(
        model=model, args=arguments(tmp_path), train_dataset=items, data_collator=collator
    )
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert_step(base, model, gradients, tolerance=2e-5)
    model = copy.deepcopy(base)
    config = trl.SFTConfig(
        **arguments(tmp_path).to_dict()
        | {"max_length": None, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    )
    trainer = SelectiveSFT(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(records(4)), data_collator=collator,
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert_step(base, model, gradients, tolerance=2e-5)
