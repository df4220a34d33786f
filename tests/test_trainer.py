"""The collator's labels, and the loss under Hugging Face's and TRL's trainers."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_families
import torch
import torch.nn.functional as F
import trl
from PIL import ExifTags, Image
from tiny import byte_tokenizer, llava_model, llava_processor, picture
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from vig import keep_samples, read_samples, read_selection, report
from vig.data.files import StoreError
from vig.data.records import sample_from_record
from vig.data.sample import BrokenRecord, Sample, SampleError, answers
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import tuning_records, write_records
from vig.models.prompts import Encoder
from vig.scoring.scorer import Scorer
from vig.selection.select import Selection, select
from vig.store.selections import Entry
from vig.training.collator import SelectiveCollator
from vig.training.labels import open_selection
from vig.training.trainer import FusedLossMixin, SelectiveTrainer

ANSWERS = (
    "red",
    "a blue cup, and a very long tail of words",
    "no",
    "two green pans",
    "yes",
    "a",
    "it is",
    "sea",
)


def records(count: int = 8) -> list[dict]:
    return [
        {
            "key": f"data.json#{row}",
            "id": f"id{row}",
            "image": picture(row) if row != 2 else None,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?" if row != 2 else "What is it?"},
                {"from": "gpt", "value": ANSWERS[row % len(ANSWERS)]},
            ],
        }
        for row in range(count)
    ]


def samples(count: int = 8):
    return [sample_from_record(record, key=record["key"]) for record in records(count)]


def selection(processor, items, keep=lambda row, n: np.arange(n) % 3 != row % 3):
    """Uneven choices: by default about two thirds of each answer's tokens."""
    encoder, chosen = Encoder(processor), {}
    for row, sample in enumerate(items):
        ids = np.array(encoder.encode(sample).answer_ids, np.int32)
        chosen[sample.key] = Entry(True, ids, keep(row, len(ids)))
    return chosen


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


# --- collator ---


def test_labels_are_the_answer_and_the_selection(processor):
    items = samples(4)
    chosen = selection(processor, items)
    chosen[items[3].key] = chosen[items[3].key]._replace(keep=False)
    plain = SelectiveCollator(processor)(items)["labels"]
    batch = SelectiveCollator(processor, chosen, counts=True)(items)
    for row, sample in enumerate(items):
        at = (plain[row] != -100).nonzero()[:, 0]
        expected = np.array(chosen[sample.key].token_keep) & chosen[sample.key].keep
        assert torch.equal(batch["labels"][row, at] != -100, torch.from_numpy(expected))
        kept = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][kept], batch["input_ids"][row][kept])
    assert batch["num_kept"] == int((batch["labels"] != -100).sum()) > 0
    assert batch["num_truncated"] == 0
    assert batch["pixel_values"].shape[0] == 3  # one sample is text-only


def test_dicts_and_encoded_samples_give_the_same_batch(processor):
    chosen = selection(processor, samples(3))
    collator = SelectiveCollator(processor, chosen)
    expected = collator(samples(3))
    for given in (records(3), [collator.encode(sample) for sample in samples(3)]):
        batch = collator(given)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_truncation_is_counted_and_keeps_the_prefix(processor):
    items = samples(2)
    chosen = selection(processor, items)
    full = SelectiveCollator(processor, chosen)(items[1:])["labels"][0]
    collator = SelectiveCollator(processor, chosen, max_length=len(full) - 20, counts=True)
    batch = collator(items)
    assert (batch["num_truncated"], collator.truncated) == (1, 1)
    assert torch.equal(batch["labels"][1], full[:-20])
    assert SelectiveCollator(processor, chosen, counts=True)(items)["num_truncated"] == 0


def test_another_tokenizer_is_refused_by_key(processor):
    items = samples(3)
    chosen = selection(processor, items)
    ids = chosen["data.json#1"].token_ids.copy()
    ids[4] = 77
    there = SelectiveCollator(processor).encode(items[1]).answer_ids[4]
    chosen["data.json#1"] = chosen["data.json#1"]._replace(token_ids=ids)
    with pytest.raises(SampleError, match=rf"data.json#1 .*token 4 is {there} here and 77 there.*tokenizer"):
        SelectiveCollator(processor, chosen)(items)


@pytest.mark.parametrize("cut", [1, -1])
def test_answers_of_another_length_are_refused(processor, cut):
    """Shorter here without truncation (cut = 1), or longer than what was scored (cut = -1)."""
    items = samples(2)
    chosen = selection(processor, items)
    entry = chosen["data.json#1"]
    ids = np.append(entry.token_ids, 9).astype(np.int32) if cut > 0 else entry.token_ids[:-2]
    chosen["data.json#1"] = Entry(True, ids, np.ones(len(ids), bool))
    with pytest.raises(SampleError, match=r"data.json#1 .*tokens here and"):
        SelectiveCollator(processor, chosen)(items)


def test_what_select_returns_is_a_selection(processor, monkeypatch):
    chosen = selection(processor, samples(2))
    made = Selection.__new__(Selection)
    monkeypatch.setattr(made, "table", lambda: chosen)
    assert (
        open_selection(made) is chosen and open_selection(chosen) is chosen and open_selection(None) is None
    )
    assert SelectiveCollator(processor, made).selection is chosen


def test_end_of_turn_is_the_selections_own(processor):
    class Table(dict):
        metadata = {"end_of_turn": "drop"}  # noqa: RUF012

    assert SelectiveCollator(processor, Table()).encoder.end_of_turn == "drop"
    assert SelectiveCollator(processor, Table(), end_of_turn="add").encoder.end_of_turn == "add"


def test_keep_samples(processor):
    items = samples(4)
    chosen = selection(processor, items)
    chosen[items[0].key] = chosen[items[0].key]._replace(keep=False)
    none = np.zeros(len(chosen[items[1].key].token_ids), bool)
    chosen[items[1].key] = chosen[items[1].key]._replace(token_keep=none)
    broken = BrokenRecord("data.json#9", "x", "data.json", SampleError("data.json#9", "x", "bad", "mend it"))
    kept = keep_samples([*items, broken], chosen)
    assert ([sample.key for sample in kept.samples], kept.dropped, kept.broken) == (
        ["data.json#2", "data.json#3"],
        2,
        1,
    )
    assert kept.errors == [broken.error]
    assert len(keep_samples(items, None).samples) == 4
    del chosen[items[3].key]
    with pytest.raises(SampleError, match=r"data.json#3 \(id 'id3'\): it is not in the selection"):
        keep_samples(items, chosen)
    with pytest.raises(SampleError, match="no key"):
        keep_samples([{"id": "a", "conversations": []}], chosen)


# --- trainers ---


def arguments(folder, **more) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
    }
    return TrainingArguments(**options | more)


def logged(trainer) -> dict[str, float]:
    """What the trainer logged for its first step."""
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def masked_cross_entropy(model, batch, num_items=None):
    """The stock loss: the model's own logits, F.cross_entropy in float32."""
    labels = batch["labels"]
    inputs = {
        name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"
    }
    logits = model(**inputs).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss / (int((labels[:, 1:] != -100).sum()) if num_items is None else num_items)


def stock_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = masked_cross_entropy(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_step(before, after, gradients, tolerance=1e-5):
    """One step of plain SGD at rate 1 has moved each parameter by minus its gradient."""
    before, after = dict(before.named_parameters()), dict(after.named_parameters())
    least = 1e-3 * max(grad.norm() for grad in gradients.values())
    for name, grad in gradients.items():
        moved = (before[name] - after[name]).detach()
        rounding = 1e-7 * before[name].detach().norm()  # of the subtraction in the optimiser
        assert (moved - grad).norm() <= tolerance * grad.norm().clamp(min=least) + rounding, name


def test_selective_trainer_equals_stock_masked_cross_entropy(processor, tmp_path):
    items = samples(4)
    chosen = selection(processor, items)
    model = copy.deepcopy(llava_model())
    collator = SelectiveCollator(processor, chosen)
    loss, gradients = stock_gradients(copy.deepcopy(model), collator(items))
    trainer = SelectiveTrainer(
        model=model, args=arguments(tmp_path), train_dataset=items, eval_dataset=items, data_collator=collator
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert_step(llava_model(), model, gradients)


def test_token_weights_and_z_loss_reach_the_loss(processor, tmp_path):
    class Regularised(SelectiveTrainer):
        z_loss = 0.1

    model, batch = copy.deepcopy(llava_model()), SelectiveCollator(processor)(samples(4))
    trainer = Regularised(model=model, args=arguments(tmp_path))
    weight = torch.rand(batch["labels"].shape)
    kept = batch["labels"][:, 1:] != -100
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1][kept]
    losses = F.cross_entropy(logits, batch["labels"][:, 1:][kept], reduction="none")
    losses = losses + 0.1 * logits.logsumexp(-1).square()
    expected = (losses * weight[:, 1:][kept]).sum() / 7
    found = trainer.compute_loss(model, batch | {"token_weight": weight}, num_items_in_batch=7)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llava", "no loss kwargs"])
def test_gradient_accumulation_does_not_change_the_step(processor, tmp_path, kind):
    """8 samples as 1 x 8, 4 x 2 and 8 x 1 micro-batches, kept tokens uneven, one micro-batch with none."""
    items = samples(8)
    few = lambda row, n: np.arange(n) < (0 if row == 6 else 1 if row % 2 else n)  # noqa: E731
    chosen = selection(processor, items, few)
    base = copy.deepcopy(llava_model())
    if kind == "no loss kwargs":  # as Qwen2.5-VL, Qwen3-VL, Gemma3, PaliGemma say
        base.accepts_loss_kwargs = False
    loss, gradients = stock_gradients(copy.deepcopy(base), SelectiveCollator(processor, chosen)(items))
    for accumulate in (1, 4, 8):
        model = copy.deepcopy(base)
        args = arguments(
            tmp_path, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
        )
        trainer = SelectiveTrainer(
            model=model,
            args=args,
            train_dataset=items,
            data_collator=SelectiveCollator(processor, chosen),
        )
        trainer.train()
        assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
        assert_step(base, model, gradients)


def test_evaluation_is_the_mean_over_tokens_and_can_give_logits(processor, tmp_path):
    items = samples(6)
    model = copy.deepcopy(llava_model())
    collator = SelectiveCollator(processor, selection(processor, items))
    expected = masked_cross_entropy(model, collator(items)).item()
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    for compute_metrics in (None, metrics):
        trainer = SelectiveTrainer(
            model=model,
            args=arguments(tmp_path, per_device_eval_batch_size=4),
            eval_dataset=items,
            data_collator=collator,
            compute_metrics=compute_metrics,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert shapes[0][0] == 6 and shapes[0][2] == 261


def test_dict_records_keep_their_columns_and_truncation_is_logged(processor, tmp_path):
    chosen = selection(processor, samples(4))
    trainer = SelectiveTrainer(
        model=copy.deepcopy(llava_model()),
        args=arguments(tmp_path, remove_unused_columns=True),
        train_dataset=records(4),
        data_collator=SelectiveCollator(processor, chosen, max_length=70),
    )
    trainer.train()
    assert logged(trainer)["truncated_samples"] == 1


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_unreadable_samples_can_be_skipped(processor, tmp_path, accumulate):
    """Row by row, half of a micro-batch, or a whole one: the step is that of the samples that can be read."""
    items = samples(4)
    chosen = selection(processor, items)
    broken = [
        item if row != 1 else replace(item, images=(Path("nowhere.png"),)) for row, item in enumerate(items)
    ]
    loss, gradients = stock_gradients(
        copy.deepcopy(llava_model()), SelectiveCollator(processor, chosen)([items[row] for row in (0, 2, 3)])
    )
    model = copy.deepcopy(llava_model())
    args = arguments(
        tmp_path, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate
    )
    collator = SelectiveCollator(processor, chosen, skip_unreadable=True)
    trainer = SelectiveTrainer(model=model, args=args, train_dataset=broken, data_collator=collator)
    with pytest.warns(
        UserWarning, match=r"left out of its batch: data.json#1 \(id 'id1'\): no image at nowhere"
    ):
        trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged(trainer)["unreadable_samples"] == 1
    assert_step(llava_model(), model, gradients)
    with pytest.raises(SampleError, match="no image at nowhere"):
        SelectiveCollator(processor, chosen)(broken)


def test_a_step_of_skipped_samples_alone_moves_nothing(processor, tmp_path):
    broken = [replace(samples(1)[0], images=(Path("nowhere.png"),))] * 2
    model = copy.deepcopy(llava_model())
    collator = SelectiveCollator(processor, skip_unreadable=True)
    trainer = SelectiveTrainer(
        model=model, args=arguments(tmp_path), train_dataset=broken, data_collator=collator
    )
    with pytest.warns(UserWarning, match="left out of its batch"):
        trainer.train()
    assert logged(trainer)["loss"] == 0 and logged(trainer)["unreadable_samples"] == 2
    for name, parameter in llava_model().named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_what_the_loss_lacks_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0.1. Turn it off"):
        SelectiveTrainer(
            model=copy.deepcopy(llava_model()),
            args=arguments(tmp_path, label_smoothing_factor=0.1),
            data_collator=SelectiveCollator(processor),
        )


def test_a_loss_function_beside_the_fused_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without compute_loss_func"):
        SelectiveTrainer(
            model=copy.deepcopy(llava_model()), args=arguments(tmp_path), compute_loss_func=lambda *_: 0.0
        )


# --- TRL ---


class SelectiveSFT(FusedLossMixin, trl.SFTTrainer):
    pass


def text_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sft_trainer(tmp_path, accumulate):
    rows = [{"prompt": "Say: ", "completion": answer} for answer in ANSWERS]
    base, model = text_model(), text_model()
    config = trl.SFTConfig(
        **arguments(tmp_path, per_device_train_batch_size=8 // accumulate).to_dict()
        | {"gradient_accumulation_steps": accumulate, "max_length": None, "bf16": False}
    )
    trainer = SelectiveSFT(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert (batch["labels"] == -100).any()  # completions alone are trained
    loss, gradients = stock_gradients(base, batch)
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert_step(text_model(), model, gradients)


def test_sft_trainer_with_a_selection(processor, tmp_path):
    items = samples(4)
    chosen = selection(processor, items)
    model = copy.deepcopy(llava_model())
    collator = SelectiveCollator(processor, chosen)
    loss, gradients = stock_gradients(copy.deepcopy(model), collator(items))
    config = trl.SFTConfig(
        **arguments(tmp_path).to_dict()
        | {"max_length": None, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    )
    trainer = SelectiveSFT(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(records(4)),
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train()
    assert logged(trainer)["loss"] == pytest.approx(loss, rel=1e-5)
    assert_step(llava_model(), model, gradients)


def test_a_dataset_of_the_kept_samples_gives_their_batches(processor, tmp_path):
    """Images as PIL, bytes and paths, and none; dicts and encoded samples."""
    items = samples(4)
    file = io.BytesIO()
    items[0].images[0].save(file, "PNG")
    items[1].images[0].save(tmp_path / "1.png")
    items[0] = replace(items[0], images=(file.getvalue(),))
    items[1] = replace(items[1], images=(tmp_path / "1.png",))
    chosen = selection(processor, items)
    collator = SelectiveCollator(processor, chosen)
    given = [*items[:2], records(4)[2], collator.encode(items[3])]
    data = keep_samples(given, chosen).dataset()
    assert data.column_names == ["key", "id", "images", "messages", "length"] and data["id"][1] == "id1"
    expected = collator(items)
    batch = collator(list(data))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert keep_samples([items[2]], chosen).dataset().features == data.features  # also without any image


def test_a_dataset_knows_turns_that_are_not_trained_and_tools():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]
    asked = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    records = [{"messages": said + asked, "tools": [{"name": "f"}]}, {"messages": asked}]
    given = [sample_from_record(record, key=f"d.json#{n}") for n, record in enumerate(records)]
    for sample, row in zip(given, keep_samples(given, None).dataset(), strict=True):
        found = sample_from_record(row, key=row["key"])
        assert answers(found) == answers(sample) == ["b"]
        assert (found.messages, found.tools) == (sample.messages, sample.tools)


def test_batches_are_balanced_by_what_is_left(processor, tmp_path):
    """Two long answers of which the first token is kept go with the short ones."""
    texts = ("a" * 60, "b" * 60, "c" * 60, "d" * 60, "e", "f", "g", "h")
    items = [
        sample_from_record(
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]},
            key=f"data.json#{row}",
        )
        for row, text in enumerate(texts)
    ]
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (1 if row < 2 else n))
    data = keep_samples(items, chosen).dataset()
    assert data["length"] == [1, 1, 61, 61, 2, 2, 2, 2]
    encoded = [SelectiveCollator(processor).encode(item) for item in items[1:3]]
    lengths = keep_samples(encoded, chosen).dataset()["length"]
    assert lengths[1] - lengths[0] == 60 and lengths[0] > 1  # the prompt is known too
    trainer = SelectiveTrainer(
        model=text_model(), args=arguments(tmp_path, train_sampling_strategy="group_by_length"),
        train_dataset=data, data_collator=SelectiveCollator(processor, chosen),
    )  # fmt: skip
    assert list(trainer._get_train_sampler().lengths) == data["length"][:]
    trainer.train()


def test_the_length_of_a_sample_follows_the_size_of_its_images(tmp_path):
    """Of a family whose images differ: as its processor makes them, turned ones and unreadable ones too."""
    qwen, turned = tiny_families.processor("qwen2_5_vl"), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (56, 112)).save(tmp_path / "upright.png")
    Image.new("RGB", (224, 56)).save(tmp_path / "turned.png", exif=turned)
    images = (
        Image.new("RGB", (56, 56)),
        tmp_path / "upright.png",
        tmp_path / "turned.png",
        tmp_path / "none.png",
    )
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    told = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    items = [Sample(f"d#{n}", str(n), (image,), (asked, told), "") for n, image in enumerate(images)]
    data = keep_samples(items, None)
    found = data.dataset(image_tokens=qwen)["length"]
    exact = [len(SelectiveCollator(qwen).encode(item).input_ids) for item in items[:3]]
    assert len(set(exact)) == 3 and found[3] == 1
    assert [n - found[0] for n in found[:3]] == [n - exact[0] for n in exact]
    assert data.dataset()["length"] == [577] * 4 and data.dataset(image_tokens=5)["length"] == [6] * 4
    for wrong in (-1, "many", None):
        with pytest.raises(
            ValueError, match=f"image_tokens = {wrong!r}, expected a number .* or the model's processor"
        ):
            data.dataset(image_tokens=wrong)


def test_what_one_step_returns_is_what_the_next_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path, "data", tuning_records(12, 0))
    items = list(read_samples("data.json"))
    rows = Scorer(CHECKPOINT).score(items)
    chosen = select(rows, 50, out="selection")
    assert {row.status for row in rows} == {"ok", "text_only"}
    for row in rows:
        expected = None if row.vig is None else [row.n_tokens, pytest.approx(row.vig)]
        assert expected == (None if row.token_vig is None else [len(row.token_vig), row.token_vig.mean()])
    some = [sample.key for sample in keep_samples(items, chosen).samples]
    assert 0 < len(some) < len(items)
    for given in ("selection", chosen.table(), read_selection("selection")):
        assert [sample.key for sample in keep_samples(items, given).samples] == some
    page = report(rows, "report.html", data="data.json", processor=AutoProcessor.from_pretrained(CHECKPOINT))
    assert "highest VIG" in page.read_text() and "data:image/webp" in page.read_text()
    for nothing in (select, report):
        with pytest.raises(StoreError, match="no scores were given"):
            nothing([])


def test_the_stock_trainer_would_weight_micro_batches_wrongly(processor, tmp_path):
    """Why the mixin exists: without it a model that takes no loss kwargs gets the mean of micro-batch means."""
    items = samples(8)
    chosen = selection(processor, items, lambda row, n: np.arange(n) < (1 if row % 2 else n))
    model = copy.deepcopy(llava_model())
    model.accepts_loss_kwargs = False
    collator = SelectiveCollator(processor, chosen)
    loss = masked_cross_entropy(model, collator(items)).item()
    args = arguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, remove_unused_columns=False
    )
    trainer = Trainer(model=model, args=args, train_dataset=items, data_collator=collator)
    trainer.train()
    assert logged(trainer)["loss"] != pytest.approx(loss, rel=1e-3)
