"""Pictures out of every family's pixel inputs and back; their nulls against blurring before anything is cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers
from naive_families import (
    SAMPLES,
    WITH_IMAGES,
    blurred,
    blurring,
    inputs_of,
    pixels_of,
    scorer,
)
from PIL import Image
from tiny_families import FAMILIES, TILE

from vig.models.families import FAMILIES as FAMILY_TABLE
from vig.models.family_pixels import FamilyPixels
from vig.models.null_image import NULLS, NullSettings
from vig.models.null_pixels import PixelRange
from vig.scoring.loader import content_hash
from vig_kernels import gaussian_blur

NAMES = list(FAMILIES)


@pytest.mark.parametrize("family", NAMES)
def test_pictures_put_back_give_the_same_bits_and_leave_padding_alone(family):
    bound = FamilyPixels.of(tiny_families.model(family).config, tiny_families.processor(family))
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
    bound = FamilyPixels(FAMILY_TABLE[family], images)
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
    samples = WITH_IMAGES[:6]
    pixels, sizes = pixels_of(family, samples)
    hashes = [content_hash(image) for one in samples for image in one.images]
    bound = FamilyPixels.of(tiny_families.model(family).config, tiny_families.processor(family))
    span = PixelRange.of(tiny_families.processor(family))
    for null in (name for name, row in NULLS.items() if row.stage == "pixels"):
        passes = scorer(family, null=null).passes
        together = bound.pictures(passes.null_pixels(pixels, sizes, hashes), sizes)
        clean = bound.pictures(pixels, sizes)
        for one, own, content in (
            (samples[0], 0, hashes[:1]),
            (samples[-1], len(hashes) - 1, hashes[-1:]),
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


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_black_and_white_are_what_the_processor_makes_of_them(do_rescale, do_normalize):
    images = tiny.llava_processor().image_processor
    images.do_rescale, images.do_normalize = do_rescale, do_normalize
    made = images([Image.new("RGB", (32, 32), name) for name in ("black", "white")], return_tensors="pt")
    found = made["pixel_values"][:, :, 0, 0].tolist()
    span = PixelRange.of(images)
    assert found == [pytest.approx(list(span.black)), pytest.approx(list(span.white))]


@pytest.mark.parametrize("sigma", [0.0, -0.1, 10.0, float("nan")])
def test_a_sigma_that_blurs_nothing_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma = {sigma}, expected a fraction"):
        NullSettings(sigma=sigma)


def test_llava_that_pads_to_squares():
    images = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
    )
    processor = copy.copy(tiny_families.processor("llava"))
    processor.image_processor = images
    bound = FamilyPixels.of(tiny_families.model("llava").config, processor)
    pixels = images([SAMPLES[0].images[0]], return_tensors="pt")
    (picture,) = bound.pictures(pixels, [[(25, 40)]])
    assert torch.equal(picture.pixels, pixels["pixel_values"][0, :, 3:12])  # it reaches from 2.8 to 12.8


def test_a_null_of_zeros_does_not_pass_for_padding(monkeypatch):
    monkeypatch.setattr("vig.models.null_pixels.mean", lambda pictures, *_: pictures * 0)
    for family in ("idefics3", "smolvlm"):
        rows = scorer(family, null="mean", batch_size=5).score(WITH_IMAGES)
        assert all(row.status == "ok" and np.isfinite(row.token_nll_null).all() for row in rows)
