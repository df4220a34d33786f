"""Samples for all families, and the naive loop: each alone, transformers' own inputs, full logits, null by scipy."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tiny
import tiny_families
import torch
from scipy.ndimage import gaussian_filter
from tiny_families import TILE

from vig.data.sample import Sample, text_of
from vig.models.prompts import Encoder
from vig.scoring.scorer import Scorer


def sample(
    number: int, turns: list[tuple[str, str]], *sizes: tuple[int, int], like: int | None = None
) -> Sample:
    """A conversation about one picture for each size (width, height), the pictures of sample `like` if given."""
    seed = 10 * (number if like is None else like)
    pictures = tuple(tiny.picture(seed + place, size) for place, size in enumerate(sizes))
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
    sample(8, [("How many?", "three")], (40, 25), like=0),
    sample(9, [("And what?", "the ball"), ("Sure?", "yes")], (40, 25), like=0),
    sample(10, [("Which one?", "left")], (30, 30), (40, 17), like=3),
]


WITH_IMAGES = [one for one in SAMPLES if one.images]


def asked_last(number: int, n_before: int, *sizes: tuple[int, int]) -> Sample:
    """A conversation whose last turn is a question: n_before pictures before the answer, the others in that turn."""
    one = sample(number, [("What?", "blue ball")], *sizes)
    parts = [{"type": "image"}] * len(sizes)
    question, answer = ({"type": "text", "text": text} for text in ("What?", "blue ball"))
    messages = (
        {"role": "user", "content": [*parts[:n_before], question]},
        {"role": "assistant", "content": [answer]},
        {"role": "user", "content": [*parts[n_before:], {"type": "text", "text": "and this one?"}]},
    )
    return replace(one, messages=messages)


ASKED_LAST = [
    asked_last(20, 1, (40, 25), (30, 30)),
    asked_last(21, 0, (20, 43)),
    asked_last(22, 0, (17, 16), (33, 32)),
    asked_last(23, 1, (64, 12)),
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
    return [naive_score(family, one) for one in SAMPLES]


def naive_score(family: str, one: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    clean, null, is_answer = inputs_of(family, one)
    return (
        naive_nll(family, clean, is_answer),
        None if null is None else naive_nll(family, null, is_answer),
    )


def scorer(family: str, **options) -> Scorer:
    return Scorer(tiny_families.model(family), tiny_families.processor(family), device="cpu", **options)


def pixels_of(family: str, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], list]:
    encoder = Encoder(tiny_families.processor(family))
    encoded = [encoder.encode(one) for one in samples]
    return encoder.collate(encoded), [item.sizes for item in encoded]
