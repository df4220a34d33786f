"""The table of model families: one row is all that the rest of the package knows of a family.

The model itself is transformers' own class, which runs its own forward. A row says where pictures lie in the
processor's pixel inputs, what samples may share, and how the parameters of the vision tower are called. Help and error
texts, training and the tests read the table. It imports neither torch nor transformers: `vig --help` reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOWER = r"(^|\.)(vision_tower|vision_model|vision_encoder)\."
QWEN_TOWER = r"(^|\.)visual\.(?!merger|deepstack_merger)"  # the merger is the projector, and trains

ONE_PICTURE = "`(images, 3, H, W)`"
THUMBNAIL_FIRST = "`(images, 1 + tiles, 3, H, W)`, thumbnail first"
THUMBNAIL_LAST = "`(tiles, 3, H, W)`, each image's tiles and then its thumbnail"
PATCHES = "`(patches, 3 * 2 * p * p)`, merge x merge neighbours together"
TILES_OF_SAMPLES = "`(samples, tiles, 3, H, W)`, each image's tiles and then its thumbnail"
CANVAS = "the canvas around the picture, tiles that fill up the batch"
MASKED = "what `pixel_attention_mask` leaves out"


class ModelError(ValueError):
    """The model cannot be loaded, or does not do what scoring needs; says what, and what helps."""


@dataclass(frozen=True)
class Family:
    """One model_type of transformers."""

    name: str
    model_type: str
    layout: str  # import path of where pictures lie in its pixel inputs: a `PixelLayout` of vig.models.pixels
    shape: str  # of its pixel inputs, for docs/families.md
    padding: str = "nothing is padded"  # what a null leaves alone, likewise
    # attention over images and question is causal: samples may share them in one row
    shares_prefix: bool = True
    two_way_images: bool = False  # the tokens of one image see each other
    # the vision tower gives features and nothing else, so they may be kept for later rows
    features_apart: bool = True
    vision_tower: str = TOWER  # pattern of its parameters' names: frozen in training unless asked otherwise


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "LLaVA-1.5, ShareGPT4V", "llava", "vig.models.pixels:PLAIN", ONE_PICTURE,
            "the square's edges, with `do_pad`",
        ),
        Family("LLaVA-NeXT", "llava_next", "vig.models.pixels:ANY_RESOLUTION", THUMBNAIL_FIRST, CANVAS),
        Family(
            "LLaVA-OneVision", "llava_onevision", "vig.models.pixels:ANY_RESOLUTION",
            f"{THUMBNAIL_FIRST}; several images in a sample: one padded square each", f"{CANVAS}, the squares' edges",
        ),
        Family("Qwen2-VL", "qwen2_vl", "vig.models.pixels:PATCHES", PATCHES, vision_tower=QWEN_TOWER),
        Family("Qwen2.5-VL", "qwen2_5_vl", "vig.models.pixels:PATCHES", PATCHES, vision_tower=QWEN_TOWER),
        # its tower also feeds layers of the text model
        Family(
            "Qwen3-VL", "qwen3_vl", "vig.models.pixels:PATCHES", PATCHES, vision_tower=QWEN_TOWER,
            features_apart=False,
        ),
        Family("Idefics3", "idefics3", "vig.models.pixels:MASKED_TILES", TILES_OF_SAMPLES, MASKED),
        Family("SmolVLM", "smolvlm", "vig.models.pixels:MASKED_TILES", TILES_OF_SAMPLES, MASKED),
        Family("InternVL", "internvl", "vig.models.pixels:OPTIMAL_CANVAS", THUMBNAIL_LAST),
        Family("Aya Vision", "aya_vision", "vig.models.pixels:OPTIMAL_CANVAS", THUMBNAIL_LAST),
        Family("Gemma 3", "gemma3", "vig.models.pixels:PLAIN", ONE_PICTURE, two_way_images=True),
        # bidirectional over images and question: what stands in the prefix depends on what follows it
        Family("PaliGemma, PaliGemma 2", "paligemma", "vig.models.pixels:PLAIN", ONE_PICTURE, shares_prefix=False),
    )
}  # fmt: skip


def family_of(config: Any) -> Family:
    """The family of a checkpoint's config. Raises ModelError where none fits."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(f"{family.model_type} ({family.name})" for family in FAMILIES.values())
        raise ModelError(
            f"model_type {config.model_type!r} is not supported; supported: {known}. "
            "CONTRIBUTING.md says how a family is added"
        )
    return family


def vision_tower_patterns(model_type: str) -> tuple[str, ...]:
    """How the parameters of the vision tower may be called: as the family says, or as any does for other models."""
    if model_type in FAMILIES:
        return (FAMILIES[model_type].vision_tower,)
    return tuple(dict.fromkeys(family.vision_tower for family in FAMILIES.values()))
