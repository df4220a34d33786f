"""Every family against a naive loop, the self-check, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from naive_families import (
    ASKED_LAST,
    SAMPLES,
    naive_score,
    naive_scores,
    pixels_of,
    sample,
    scorer,
)
from safetensors.torch import load_file
from tiny import llava_model
from tiny_families import FAMILIES

from vig.data.sample import Sample, SampleError
from vig.models.families import ModelError
from vig.models.family_pixels import FamilyPixels
from vig.models.lm_head import HeadTransform, count_kept
from vig.models.loading import as_loaded, device_for, load
from vig.models.null_image import NULLS
from vig.models.prompts import Encoder
from vig.scoring.inspect import pictures
from vig.scoring.scorer import Scorer
from vig.scoring.self_check import check_model
from vig.training.batches import MicroBatches
from vig.training.collator import SelectiveCollator
from vig.training.loss import selective_loss
from vig.training.train import train

NAMES = list(FAMILIES)
TOLERANCE = 2e-4  # nats


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", NAMES)
def test_both_passes_equal_a_naive_loop(family, batch_size):
    rows = scorer(family, batch_size=batch_size).score(SAMPLES)
    for row, one, (image, null) in zip(rows, SAMPLES, naive_scores(family), strict=True):
        assert row.status == ("ok" if one.images else "text_only")
        np.testing.assert_allclose(row.token_nll_image, image, rtol=0, atol=TOLERANCE)
        if null is not None:
            np.testing.assert_allclose(row.token_nll_null, null, rtol=0, atol=TOLERANCE)
            moved = np.abs(null - image).max()
            assert moved > 30 * TOLERANCE, one.id  # pictures matter here, or nothing is tested


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_an_image_behind_the_last_answer(family, share):
    """Alone, since the model is checked on the first samples; and in a batch with others."""
    for samples in (*([one] for one in ASKED_LAST), ASKED_LAST, [*ASKED_LAST, *SAMPLES[:4]]):
        rows = scorer(family, share=share).score(samples)
        for row, one in zip(rows[: len(ASKED_LAST)], samples, strict=False):
            image, null = naive_score(family, one)
            assert row.status == "ok"
            np.testing.assert_allclose(row.token_nll_image, image, rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(row.token_nll_null, null, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", NAMES)
def test_every_null_image_scores_in_every_family(family):
    chosen = [SAMPLES[0], SAMPLES[1], SAMPLES[3], SAMPLES[4]]
    clean = scorer(family).score(chosen)
    for null in NULLS:
        rows = scorer(family, null=null).score(chosen)
        for row, other in zip(rows, clean, strict=True):
            assert row.status == other.status
            np.testing.assert_allclose(row.token_nll_image, other.token_nll_image, rtol=0, atol=TOLERANCE)
            assert np.isfinite(row.token_nll_null).all()
        assert len({round(row.vig, 6) for row in rows if row.vig is not None}) == 3
        assert {row.status for row in scorer(family, null=null).score(ASKED_LAST)} == {"ok"}


def test_pictures_to_look_at():
    for family, shown in (("llava_next", [(16, 16), (32, 20)]), ("qwen2_5_vl", [(40, 24)])):
        clean, nulls = pictures(scorer(family), SAMPLES[0])
        assert [image.size for image in clean] == [image.size for image in nulls] == shown
        for image, null in zip(clean, nulls, strict=True):
            assert np.asarray(null).std() < np.asarray(image).std()


@pytest.mark.parametrize("family", NAMES)
def test_the_training_loss_of_a_mixed_batch(family):
    """Images, several images and text alone in one batch, as a trainer's collator makes it."""
    model, encoder = tiny_families.model(family), Encoder(tiny_families.processor(family))
    batch = encoder.collate([encoder.encode(one) for one in SAMPLES])
    with torch.no_grad():
        loss = selective_loss(model, batch)
    expected = np.concatenate([image for image, _ in naive_scores(family)])
    assert len(expected) == count_kept(batch["labels"])
    assert loss.item() == pytest.approx(expected.mean(), abs=TOLERANCE)


def test_no_text_may_stand_for_pixels():
    for family, token in (
        ("gemma3", "<image_soft_token>"),
        ("gemma3", "<start_of_image>"),
        ("qwen2_5_vl", "<|video_pad|>"),
        ("internvl", "<IMG_CONTEXT>"),
        ("aya_vision", "<|IMG_PATCH|>"),
    ):
        with pytest.raises(SampleError, match=re.escape(f"holds the image token {token!r}")):
            Encoder(tiny_families.processor(family)).encode(sample(9, [(f"What {token}?", "a")], (20, 20)))


# --- the self-check, and what is refused ---


def checked(family: str, one: Sample = SAMPLES[0], **changed):
    loaded = as_loaded(tiny_families.model(family), tiny_families.processor(family), device="cpu")
    pixels, sizes = pixels_of(family, [one])
    pixels.pop("labels")
    return check_model(loaded, pixels | changed, sizes)


def test_what_the_families_do_to_their_logits():
    assert checked("gemma3") == HeadTransform()  # though its config speaks of a softcap
    assert checked("aya_vision") == HeadTransform()  # though its text config has a scale
    assert checked("paligemma") == HeadTransform(softcap=4.0)
    assert checked("qwen3_vl", SAMPLES[3]) == HeadTransform()


def test_an_answer_that_sees_later_tokens_is_refused():
    marks = pixels_of("paligemma", SAMPLES[:1])[0]["token_type_ids"]
    assert marks[0].tolist() == sorted(marks[0].tolist()) and marks.sum() > 1
    with pytest.raises(ModelError, match="changing a later token moves earlier hidden states by"):
        checked("paligemma", token_type_ids=torch.zeros_like(marks))


def test_pixels_of_another_processor_are_refused():
    for family, setting, value, words in (
        ("internvl", "max_patches", 2, "the processor made 7 tiles, its settings say"),
        (
            "llava_next",
            "image_grid_pinpoints",
            [[64, 64]],
            "the processor made 4 tiles of an image of 25 x 40",
        ),
        ("llava_next", "image_grid_pinpoints", [[24, 24]], r"cannot be cut into tiles of \(16, 16\)"),
        ("smolvlm", "size", {"longest_edge": 96}, "the processor made 7 tiles, its settings say"),
    ):
        processor = copy.copy(tiny_families.processor(family))
        processor.image_processor = copy.copy(processor.image_processor)
        setattr(processor.image_processor, setting, value)
        bound = FamilyPixels.of(tiny_families.model(family).config, processor)
        with pytest.raises(ModelError, match=words):
            bound.pictures(*pixels_of(family, SAMPLES[:1]))


def test_pixels_that_are_not_laid_out_as_the_family_says_are_refused():
    pixels = pixels_of("qwen2_vl", SAMPLES[:1])[0]["pixel_values"]
    with pytest.raises(ModelError, match="not laid out like those of Qwen2-VL"):
        checked("qwen2_vl", pixel_values=torch.randn_like(pixels))  # its two frames differ


def test_crops_shown_as_pictures_are_refused():
    processor = copy.copy(tiny_families.processor("gemma3"))
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(ModelError, match="do_pan_and_scan = False"):
        as_loaded(tiny_families.model("gemma3"), processor)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "aya_vision", "smolvlm", "paligemma"])
def test_a_checkpoint_on_disk_needs_no_torchvision(family, tmp_path):
    tiny_families.model(family).save_pretrained(tmp_path)
    tiny_families.processor(family).save_pretrained(tmp_path)
    rows = Scorer(tmp_path, dtype="float32", device="cpu").score(SAMPLES[:4])
    for row, other in zip(rows, scorer(family).score(SAMPLES[:4]), strict=True):
        assert row.vig == other.vig and row.status == other.status


def test_pickled_weights_are_refused_with_the_cure(tmp_path):
    tiny_families.model("llava").save_pretrained(tmp_path)
    tiny_families.processor("llava").save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"found pytorch_model\.bin.*Only safetensors are read.*save_pretrained"
    ):
        load(tmp_path)


def test_code_of_a_checkpoint_does_not_run_unasked(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    auto = {
        "AutoConfig": "code.Config",
        "AutoModelForImageTextToText": "code.Model",
        "AutoProcessor": "code.P",
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_the_vision_tower_is_frozen_and_the_projector_trains(family):
    model = copy.deepcopy(tiny_families.model(family))
    train(model, SAMPLES[:1], None, None, processor=tiny_families.processor(family), max_steps=1, lr=0.0)
    vision = [
        (name, p) for name, p in model.named_parameters() if not re.search("language|text|lm_head", name)
    ]
    trained = {bool(re.search("merger|projector|connector", name)): p.requires_grad for name, p in vision}
    assert trained == {True: True, False: False}
    assert all(p.requires_grad == bool(re.search("merger|projector|connector", name)) for name, p in vision)


@pytest.mark.parametrize("family", NAMES)
def test_a_batch_of_unreadable_samples_trains_on_nothing(family):
    """Its stand-in goes through the model of every family, and every gradient is zero."""
    processor = tiny_families.processor(family)
    unreadable = replace(SAMPLES[0], images=(Path("nowhere.png"),))
    batch = MicroBatches([unreadable], [[0]], SelectiveCollator(processor, counts=True))[0]
    [error] = batch.pop("left_out")
    assert "no image at nowhere.png" in str(error) and batch.pop("num_truncated") == 0
    model = copy.deepcopy(tiny_families.model(family)).train()
    loss = selective_loss(model, batch, num_items=7, num_kept=batch.pop("num_kept"))
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (
            "cuda:99",
            r"device = 'cuda:99', but torch \S+ finds \d+ cuda devices here\. Use another one \(cpu\)",
        ),
        ("gpu", r"device = 'gpu': Expected one of cpu, cuda.*Use cuda, cuda:1, cpu"),
        ("meta", "device = 'meta': .*Use cuda, cuda:1, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(device, words):
    with pytest.raises(ModelError, match=words):
        load("nowhere", device=device)
    with pytest.raises(ModelError, match=words):
        as_loaded(llava_model(), None, device=device)


@pytest.mark.parametrize(("here", "taken"), [(None, "cpu"), ("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_the_device_is_the_gpu_that_is_there(here, taken, monkeypatch):
    found = None if here is None else torch.device(here)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert device_for(None).type == taken
    assert device_for("cpu").type == "cpu"
