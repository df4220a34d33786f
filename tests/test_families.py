"""Every family against a naive loop: each sample alone, transformers' own inputs, full logits, the null by scipy."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from tiny_families import FAMILIES, TILE

from vig.families import FAMILIES as FAMILY_TABLE
from vig.families import ModelError, as_loaded, family_of, load, prove
from vig.loader import content_hash
from vig.loss import HeadTransform, count_kept, selective_loss
from vig.null_image import NULLS, PixelRange
from vig.prompts import Encoder
from vig.samples import Sample, SampleError, text_of
from vig.score import Scorer
from vig_kernels import gaussian_blur

NAMES = list(FAMILIES)
TOLERANCE = 2e-4  # nats


def sample(number: int, turns: list[tuple[str, str]], *sizes: tuple[int, int]) -> Sample:
    """A conversation about one picture for each size (width, height)."""
    pictures = tuple(tiny.picture(10 * number + place, size) for place, size in enumerate(sizes))
    messages = []
    for question, answer in turns:
        shown = [] if messages else [{"type": "image"}] * len(pictures)
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample(f"mixed.json#{number}", str(number), pictures, tuple(messages), "mixed.json")


SAMPLES = [
    sample(0, [("What?", "blue ball")], (40, 25)),
    sample(1, [("Say it", "no"), ("Again", "yes it is")]),
    sample(2, [("What?", "the cat sat on it"), ("Sure?", "I am")], (20, 43)),
    sample(3, [("Compare.", "two dogs")], (30, 30), (40, 17)),
    sample(4, [("What?", "a")], (64, 12)),
    sample(5, [("Which?", "red")]),
    sample(6, [("What?", "ü"), ("And?", "a bird"), ("So?", "so")], (17, 16), (16, 40)),
    sample(7, [("What now?", "One bird, two dogs.")], (33, 32)),
]


# --- the naive loop ---


def blurred(picture: np.ndarray, sigma: float = 0.1) -> np.ndarray:
    """(..., H, W), sigma a fraction of the shorter side."""
    side = sigma * min(picture.shape[-2:])
    spread = (0,) * (picture.ndim - 2)
    return gaussian_filter(
        picture.astype(np.float64), (*spread, side, side), mode="mirror",
        radius=(*spread, *[int(np.ceil(3 * side))] * 2),
    )  # fmt: skip


def blurring(images):
    """The image processor, which blurs what it has resized: before it pads, cuts and normalises."""

    class Blurring(type(images)):
        def resize(self, *args, **options):
            return blurred(super().resize(*args, **options)).astype(np.float32)

    class BlurringSplits(type(images)):
        def split_images(self, image, *args, **options):
            tiles, rows, columns = super().split_images(image, *args, **options)
            whole = blurred(image)
            side = tiles[-1].shape[-1]
            for number, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
                tiles[number] = whole[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            tiles[-1] = blurred(tiles[-1])
            return [tile.astype(np.float32) for tile in tiles], rows, columns

    other = copy.copy(images)
    other.__class__ = BlurringSplits if hasattr(images, "split_images") else Blurring
    if hasattr(images, "image_grid_pinpoints"):
        other.do_resize = False  # tiles are not resized again: they have their size
    return other


def squares_blurred(values: torch.Tensor, one: Sample) -> torch.Tensor:
    """Several images to LLaVA-OneVision: each padded to a square of TILE pixels, blurred without the padding."""
    values = values.clone()
    for tile, image in zip(values, one.images, strict=True):
        inside = []
        for length in (image.height, image.width):
            start = (max(image.size) - length) // 2
            scale = TILE / max(image.size)
            inside.append(slice(int(np.ceil(start * scale)), int(np.floor((start + length) * scale))))
        tile[0][(slice(None), *inside)] = torch.from_numpy(
            blurred(tile[0][(slice(None), *inside)].numpy())
        ).float()
    return values


class Inputs(NamedTuple):
    """What the model takes of one sample, without and with sight, and which tokens are answers."""

    clean: dict[str, torch.Tensor]
    null: dict[str, torch.Tensor] | None
    is_answer: torch.Tensor  # (T,) bool


def inputs_by_transformers(family: str, one: Sample) -> Inputs:
    processor = copy.copy(tiny_families.processor(family))
    processor.video_processor = SimpleNamespace(num_frames=1, fps=1)  # asked for, not used
    pictures = iter(one.images)
    messages = [
        message
        | {
            "content": [
                part | {"image": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in one.messages
    ]

    def made(with_processor):
        return dict(
            with_processor.apply_chat_template(
                [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
            )
        )  # fmt: skip

    clean = made(processor)
    is_answer = torch.as_tensor(clean.pop("assistant_masks"))[0].bool()
    if not one.images:
        return Inputs(clean, None, is_answer)
    if family == "llava_onevision" and len(one.images) > 1:
        return Inputs(clean, clean | {"pixel_values": squares_blurred(clean["pixel_values"], one)}, is_answer)
    other = copy.copy(processor)
    other.image_processor = blurring(processor.image_processor)
    null = made(other)
    null.pop("assistant_masks")
    return Inputs(clean, null, is_answer)


def inputs_for_paligemma(one: Sample) -> Inputs:
    processor = tiny_families.processor("paligemma")
    named = processor.tokenizer
    ids = [processor.image_token_id] * processor.image_seq_length * len(one.images) + [named.bos_token_id]
    is_answer = [False] * len(ids)
    for message in one.messages:
        ending = named.eos_token if message["role"] == "assistant" else "\n"
        more = named(text_of(message) + ending, add_special_tokens=False)["input_ids"]
        ids += more
        is_answer += [message["role"] == "assistant"] * len(more)
    suffix = torch.arange(len(ids)) >= is_answer.index(True)
    clean = {"input_ids": torch.tensor([ids]), "token_type_ids": suffix.long()[None]}
    if not one.images:
        return Inputs(clean, None, torch.tensor(is_answer))
    values = [
        maker(list(one.images), return_tensors="pt")["pixel_values"]
        for maker in (processor.image_processor, blurring(processor.image_processor))
    ]
    clean, null = (clean | {"pixel_values": value} for value in values)
    return Inputs(clean, null, torch.tensor(is_answer))


def inputs_of(family: str, one: Sample) -> Inputs:
    return inputs_for_paligemma(one) if family == "paligemma" else inputs_by_transformers(family, one)


@torch.inference_mode()
def naive_nll(family: str, inputs: dict, is_answer: torch.Tensor) -> np.ndarray:
    logits = tiny_families.model(family)(**inputs).logits[0].float()
    logp = torch.log_softmax(logits[:-1], dim=-1)
    taken = -logp.gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)
    return taken[is_answer[1:]].numpy()


@functools.cache
def naive_scores(family: str) -> list[tuple[np.ndarray, np.ndarray | None]]:
    rows = []
    for one in SAMPLES:
        clean, null, is_answer = inputs_of(family, one)
        rows.append(
            (
                naive_nll(family, clean, is_answer),
                None if null is None else naive_nll(family, null, is_answer),
            )
        )
    return rows


def scorer(family: str, **options) -> Scorer:
    return Scorer(tiny_families.model(family), tiny_families.processor(family), device="cpu", **options)


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
            assert moved > 30 * TOLERANCE, one.id  # pictures matter here, or nothing is proven


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
    ):
        with pytest.raises(SampleError, match=re.escape(f"holds the image token {token!r}")):
            Encoder(tiny_families.processor(family)).encode(sample(9, [(f"What {token}?", "a")], (20, 20)))


# --- pixels ---


def pixels_of(family: str, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], list]:
    encoder = Encoder(tiny_families.processor(family))
    encoded = [encoder.encode(one) for one in samples]
    return encoder.collate(encoded), [item.sizes for item in encoded]


WITH_IMAGES = [one for one in SAMPLES if one.images]


@pytest.mark.parametrize("family", NAMES)
def test_pictures_put_back_give_the_same_bits_and_leave_padding_alone(family):
    bound = family_of(tiny_families.model(family).config, tiny_families.processor(family))
    pixels, sizes = pixels_of(family, WITH_IMAGES)
    before = pixels["pixel_values"].clone()
    pictures = bound.pictures(pixels, sizes)
    assert {picture.image for picture in pictures} == set(range(sum(map(len, sizes))))
    again = bound.put_back(pixels, sizes, [picture.pixels for picture in pictures])
    assert torch.equal(again["pixel_values"], before) and again.keys() == pixels.keys()
    moved = bound.put_back(pixels, sizes, [picture.pixels + 7 for picture in pictures])["pixel_values"]
    assert torch.equal(pixels["pixel_values"], before)  # the clean batch is not written to
    changed = moved != before
    frames = 2 if "qwen" in family else 1
    assert changed.sum() == frames * sum(picture.pixels.numel() for picture in pictures)
    assert torch.allclose(moved[changed], before[changed] + 7)
    if "pixel_attention_mask" in pixels:
        assert torch.equal(changed.any(2), pixels["pixel_attention_mask"].bool())


@pytest.mark.parametrize("family", [name for name in NAMES if name != "paligemma"])
def test_null_pixels_are_those_of_a_processor_that_blurs(family):
    """The blur of tiles and patches is the blur of the picture they were cut from."""
    samples = [one for one in WITH_IMAGES if family != "llava_onevision" or len(one.images) == 1]
    passes = scorer(family).passes
    for one in samples:
        encoded = passes.encoder.encode(one)
        ours = passes.null_pixels(encoded.pixels, [encoded.sizes], ["ab"] * len(one.images))["pixel_values"]
        theirs = inputs_of(family, one).null["pixel_values"]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 2e-5
        assert (ours - encoded.pixels["pixel_values"]).abs().max() > 0.1


PUBLISHED = {  # the image processors as checkpoints carry them
    "llava_next": lambda: transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ),
    "llava_onevision": transformers.LlavaOnevisionImageProcessorPil,
    "qwen2_5_vl": transformers.Qwen2VLImageProcessorPil,
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_null_pixels_at_the_sizes_of_published_checkpoints(family):
    images, photograph = PUBLISHED[family](), tiny.picture(1, (500, 333))
    clean, null = (maker([[photograph]], return_tensors="pt") for maker in (images, blurring(images)))
    bound = dataclasses.replace(FAMILY_TABLE[family], processor=images)
    ours = bound.null_pixels(
        clean, [[(333, 500)]], lambda stack, _: gaussian_blur(stack, 0.1 * min(stack.shape[-2:]))
    )
    assert (ours["pixel_values"] - null["pixel_values"]).abs().max() < 1e-5


def test_a_tile_that_is_blurred_alone_would_be_noticed():
    passes = scorer("llava_next").passes
    encoded = passes.encoder.encode(SAMPLES[0])
    ours = passes.null_pixels(encoded.pixels, [encoded.sizes], ["ab"])["pixel_values"][0]
    alone = torch.from_numpy(blurred(encoded.pixels["pixel_values"][0].numpy())).float()
    assert torch.allclose(ours[0], alone[0], atol=1e-5)  # the thumbnail is a picture of its own
    assert (ours[1:] - alone[1:]).abs().flatten(1).max(1).values.min() > 0.1


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm", "internvl"])
def test_nulls_of_a_picture_do_not_depend_on_the_batch(family):
    pixels, sizes = pixels_of(family, WITH_IMAGES)
    hashes = [content_hash(image) for one in WITH_IMAGES for image in one.images]
    bound = family_of(tiny_families.model(family).config, tiny_families.processor(family))
    span = PixelRange.of(tiny_families.processor(family))
    for null in ("blur", "mean", "black", "noise"):
        passes = scorer(family, null=null).passes
        together = bound.pictures(passes.null_pixels(pixels, sizes, hashes), sizes)
        clean = bound.pictures(pixels, sizes)
        for one, own, content in (
            (WITH_IMAGES[0], 0, hashes[:1]),
            (WITH_IMAGES[-1], len(hashes) - 1, hashes[-1:]),
        ):
            alone = pixels_of(family, [one])
            nulls = bound.pictures(passes.null_pixels(*alone, content), alone[1])
            same = [
                (picture, was) for picture, was in zip(together, clean, strict=True) if picture.image == own
            ]
            for null_alone, (picture, was) in zip(nulls, same, strict=True):
                assert torch.equal(null_alone.pixels, picture.pixels)
                if null == "mean":
                    assert torch.allclose(picture.pixels, was.pixels.mean((1, 2), keepdim=True), atol=1e-5)
                if null == "black":
                    assert picture.pixels[:, 2, 3].tolist() == pytest.approx(list(span.black))


def test_llava_that_pads_to_squares():
    images = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
    )
    processor = copy.copy(tiny_families.processor("llava"))
    processor.image_processor = images
    bound = family_of(tiny_families.model("llava").config, processor)
    pixels = images([SAMPLES[0].images[0]], return_tensors="pt")
    (picture,) = bound.pictures(pixels, [[(25, 40)]])
    assert torch.equal(picture.pixels, pixels["pixel_values"][0, :, 3:12])  # it reaches from 2.8 to 12.8


def test_a_null_of_zeros_does_not_pass_for_padding(monkeypatch):
    monkeypatch.setitem(NULLS, "mean", NULLS["mean"]._replace(function=lambda pictures, *_: pictures * 0))
    for family in ("idefics3", "smolvlm"):
        rows = scorer(family, null="mean", batch_size=5).score(WITH_IMAGES)
        assert all(row.status == "ok" and np.isfinite(row.token_nll_null).all() for row in rows)


# --- proofs at start, and what is refused ---


def proof(family: str, one: Sample = SAMPLES[0], **changed):
    loaded = as_loaded(tiny_families.model(family), tiny_families.processor(family), device="cpu")
    pixels, sizes = pixels_of(family, [one])
    pixels.pop("labels")
    return prove(loaded, pixels | changed, sizes)


def test_what_the_families_do_to_their_logits():
    assert proof("gemma3") == HeadTransform()  # though its config speaks of a softcap
    assert proof("paligemma") == HeadTransform(softcap=4.0)
    assert proof("qwen3_vl", SAMPLES[3]) == HeadTransform()


def test_an_answer_that_sees_later_tokens_is_refused():
    marks = pixels_of("paligemma", SAMPLES[:1])[0]["token_type_ids"]
    assert marks[0].tolist() == sorted(marks[0].tolist()) and marks.sum() > 1
    with pytest.raises(ModelError, match="changing a later token moves earlier hidden states by"):
        proof("paligemma", token_type_ids=torch.zeros_like(marks))


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
        bound = family_of(tiny_families.model(family).config, processor)
        with pytest.raises(ModelError, match=words):
            bound.pictures(*pixels_of(family, SAMPLES[:1]))


def test_pixels_that_are_not_laid_out_as_the_family_says_are_refused():
    pixels = pixels_of("qwen2_vl", SAMPLES[:1])[0]["pixel_values"]
    with pytest.raises(ModelError, match="not laid out like those of Qwen2-VL"):
        proof("qwen2_vl", pixel_values=torch.randn_like(pixels))  # its two frames differ


def test_crops_shown_as_pictures_are_refused():
    processor = copy.copy(tiny_families.processor("gemma3"))
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(ModelError, match="do_pan_and_scan = False"):
        as_loaded(tiny_families.model("gemma3"), processor)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "smolvlm", "paligemma"])
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
