"""A run of the experiment, made small: its data, masks, training and exams against the project's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from benchmarks.evidence import design, fit, masks, model, runs
from benchmarks.evidence.data import NULLS
from benchmarks.evidence.design import Run
from benchmarks.evidence.exams import Exams, unpacked
from vig import read_samples, select, train
from vig.demo import scenes
from vig.demo.dataset import test_records as anti_prior_records
from vig.demo.dataset import tuning_records, write_records
from vig.demo.evaluate import Exam
from vig.training.settings import TrainSettings

SAMPLES, SEED, SHARE = 160, 7, 0.5
SIZES = {"test": (3, 40), "validation": (4, 10), "prior": (5, 10), "captions": (6, 12)}


@pytest.fixture(scope="module")
def laboratory():
    patch = pytest.MonkeyPatch()
    patch.setattr(design, "SAMPLES", SAMPLES)
    patch.setitem(design.TRAINING, "max_steps", 3)
    patch.setattr(runs, "Exams", lambda drawn: Exams(drawn, SIZES))
    yield runs.Laboratory("shipped")
    patch.undo()


@pytest.fixture(scope="module")
def tuning(laboratory):
    return laboratory.drawn.tuning(SHARE, SEED, NULLS)


def test_stored_features_give_the_models_own_logits(laboratory, tmp_path):
    records = tuning_records(12, SEED)
    data = write_records(tmp_path, "tune", records)
    items = laboratory.drawn.encoded(data)
    encoder = laboratory.drawn.encoder
    encoded = [encoder.encode(sample) for sample in read_samples(data)]
    batch = encoder.collate(encoded)
    with torch.no_grad():
        logits = laboratory.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        found = model.collate(items)
        ours = laboratory.model.get_output_embeddings()(
            model.hidden_states(laboratory.model, found.ids, found.features)
        )
    asked = found.target != model.IGNORE
    assert torch.equal(found.target, batch["labels"][:, 1:])
    torch.testing.assert_close(ours[:, :-1][asked], logits[:, :-1][asked], rtol=1e-4, atol=1e-4)


def test_features_of_a_picture_have_storage_of_their_own(tuning):
    features = next(item.features for item in tuning.items if item.features is not None)
    assert features.untyped_storage().nbytes() == features.numel() * 4


@pytest.mark.parametrize("level", ["both", None])
def test_training_is_that_of_vig_train(laboratory, tuning, tmp_path, level):
    records = tuning_records(SAMPLES, SEED, blind=SHARE)
    data = write_records(tmp_path, "tune", records)
    selection = select(tuning.scores["blur"], 70, level=level) if level else None
    theirs = copy.deepcopy(laboratory.model)
    result = train(
        theirs, data, selection, None, processor=laboratory.drawn.processor, seed=SEED, **design.TRAINING
    )
    ours = copy.deepcopy(laboratory.model)
    kept = masks.masks_of("vig" if level else "all", tuning, SEED)
    found = fit.fit(ours, tuning.items, kept, TrainSettings(seed=SEED, **design.TRAINING))
    assert (found.samples, found.tokens) == (result.kept, result.tokens)
    assert found.loss == pytest.approx(np.mean(result.losses), rel=1e-4)
    weights = [dict(of.named_parameters()) for of in (laboratory.model, theirs, ours)]
    moved = apart = 0.0  # AdamW moves a weight by the sign of a gradient near 0, so single weights may differ
    for name in weights[0]:
        start, other, mine = (weights[place][name].detach() for place in range(3))
        moved += float((other - start).square().sum())
        apart += float((mine - other).square().sum())
        assert "vision_tower" not in name or torch.equal(mine, start)
    assert moved > 0.1 and apart < 1e-6 * moved


def test_a_step_is_cut_where_it_pads_least(tuning):
    step = [(item, torch.ones(len(item.answer), dtype=torch.bool)) for item in tuning.items[:32]]
    parts = fit.by_length(step)
    sizes = [len(part) * max(len(item.ids) for item, _ in part) for part in parts]
    assert sum(map(len, parts)) == 32 and len(parts) == 2
    assert sum(sizes) < 32 * max(len(item.ids) for item, _ in step)
    assert len(fit.by_length(step[:1] * 4)) == 1


def test_every_arm_keeps_what_its_name_says(tuning):
    kept = {arm: masks.masks_of(arm, tuning, SEED) for arm in (*design.ARMS, *design.VARIANTS)}
    counts = {arm: masks.counts(tuning, found) for arm, found in kept.items()}
    rows = np.flatnonzero(tuning.multimodal)
    text = np.flatnonzero(~tuning.multimodal)
    for found in kept.values():
        assert [len(mask) for mask in found] == [len(item.answer) for item in tuning.items]
        assert all(found[row].all() for row in text)
    blind = np.array([record.turn.blind for record in tuning.records])
    selection = select(tuning.scores["blur"], 70)
    assert counts["vig"]["tokens_kept"] == selection.counts["tokens_kept"]
    for arm in ("random", "permuted"):
        assert counts[arm]["samples_kept"] == counts["vig"]["samples_kept"]
        assert counts[arm]["tokens_kept"] == counts["vig"]["tokens_kept"]
        assert any((kept[arm][row] != kept["vig"][row]).any() for row in rows)
    assert [mask.sum() for mask in kept["permuted"]] == [mask.sum() for mask in kept["vig"]]
    for row in rows:
        null = tuning.nll("null")[row]
        assert (kept["easy"][row] == (kept["vig"][row] | (null < 0.5))).all()
        assert (kept["words"][row] == (tuning.content[row] | tuning.stops[row])).all()
        assert (kept["oracle"][row] == (not blind[row])).all()
        assert kept["sample"][row].all() == kept["vig"][row].any() == kept["sample"][row].any()
    chosen = [row for row in rows if kept["loss filter"][row].all()]
    left = [row for row in rows if not kept["loss filter"][row].any()]
    assert len(chosen) == counts["vig"]["samples_kept"] and len(chosen) + len(left) == len(rows)
    loss = [values.mean() for values in tuning.nll("image")]
    assert max(loss[row] for row in chosen) <= min(loss[row] for row in left)
    assert counts["token"]["tokens_kept"] > counts["vig"]["tokens_kept"] - counts["vig"]["samples_kept"]
    assert any((kept["mean"][row] != kept["vig"][row]).any() for row in rows)
    assert counts["oracle"]["wrong_kept"] == 0 < counts["vig"]["wrong_total"]


def test_wrong_tokens_are_those_that_differ_from_the_truth(tuning):
    for record, wrong, content in zip(tuning.records, tuning.wrong, tuning.content, strict=True):
        assert record.turn.blind or not wrong.any()
        assert (content | ~wrong).all()


def test_the_exams_agree_with_the_demos(laboratory, tmp_path):
    found = laboratory.exams.sit(laboratory.model, ("test", "captions", "text"))
    data = write_records(tmp_path, "test", anti_prior_records(40, 3))
    theirs = Exam(data, laboratory.drawn.processor).sit(laboratory.model)
    assert (found["test_colour"], found["test_exact"]) == pytest.approx((theirs.colour, theirs.exact))
    assert 100 * unpacked(found["test_colour_bits"], 40).mean() == pytest.approx(found["test_colour"])


def test_captions_are_what_the_model_generates(laboratory):
    exam = laboratory.exams.exams["captions"]
    written = laboratory.exams._written(laboratory.model, exam.items)
    tokenizer = laboratory.drawn.processor.tokenizer
    for record, item, said in zip(exam.records[:4], exam.items, written, strict=False):
        prompt = item.ids[: int(item.answer[0])]
        pixels = laboratory.drawn.processor.image_processor(
            images=scenes.draw(record.scene), return_tensors="pt"
        )["pixel_values"]
        whole = laboratory.model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            pixel_values=pixels,
            max_new_tokens=32,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        assert said == [token for token in whole if token != tokenizer.eos_token_id]


def test_chair_counts_the_objects_that_are_not_there(laboratory, monkeypatch):
    exam = laboratory.exams.exams["captions"]
    ids = laboratory.exams.colour_ids
    there = [{item.name for item in record.scene.items} for record in exam.records]
    absent = [next(name for name in scenes.OBJECTS if name not in objects) for objects in there]
    said = [
        [ids["a"], ids["red"], *(ids[name] for name in sorted(objects)), *([ids[other]] if place < 3 else [])]
        for place, (objects, other) in enumerate(zip(there, absent, strict=True))
    ]
    monkeypatch.setattr(laboratory.exams, "_written", lambda *_: said)
    found = laboratory.exams.sit(laboratory.model, ("captions",))
    named = sum(map(len, there)) + 3
    assert found["chair_i"] == pytest.approx(100 * 3 / named, abs=1e-5)
    assert (found["chair_s"], found["recall"]) == (25.0, 100.0)
    assert found["captions_absent"] == "111" + 9 * "0"


def test_the_same_run_gives_the_same_line(laboratory):
    run = Run("shipped", SHARE, SEED, "vig")
    first = laboratory.line(run)
    laboratory._data = None
    laboratory.line(run._replace(arm="all"))
    again = laboratory.line(run)
    assert runs.repeated(first) == runs.repeated(again)
    assert runs.SECONDS in first and Run.of(first) == run
    other = laboratory.line(run._replace(seed=SEED + 1))
    assert runs.repeated(other) != runs.repeated(first)


def test_a_rate_check_sits_the_validation_exam_alone(laboratory):
    line = laboratory.line(Run("shipped", SHARE, design.RATE_SEEDS[0], "all", 2.0))
    assert "validation_colour" in line and "test_colour" not in line


def test_a_base_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setitem(design.BASES, "habit", tmp_path)
    with pytest.raises(runs.MissingBase, match="holds no checkpoint"):
        runs.Laboratory("habit")
