"""One sample seen closely: prompt, answer mask, clean and null image, and the VIG of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vig.data.records import IMAGE_MARK, sample_from_record
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError
from vig.data.samples import read_samples
from vig.data.turns import CAPTION_QUESTION
from vig.models.null_pixels import as_image
from vig.models.prompts import Encoded
from vig.models.token_texts import token_texts
from vig.scoring import batching
from vig.scoring.loader import Donors, load_record
from vig.scoring.scorer import Scorer
from vig.store.rows import ScoreRow


@dataclass
class Inspection:
    """What the model sees of one sample, and what it makes of it.

    tokens: (text, is_answer) of the whole prompt, a run of image placeholders written as one. answer: the text of
    each answer token, aligned with `row`'s token lists. images, nulls: pictures as the model sees them; empty for a
    text-only sample, nulls also where the null leaves the images out. row: the scores. unknown: how many answer tokens
    stand for text that the tokenizer does not know.
    """

    sample: Sample
    tokens: list[tuple[str, bool]]
    answer: list[str]
    images: list[Image.Image]
    nulls: list[Image.Image]
    row: ScoreRow
    answers_from: str
    unknown: int = 0


def find_sample(
    data: str | Path,
    *,
    index: int = 0,
    key: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    image_root: str | Path | None = None,
) -> Sample:
    """Record `index` (or the one with `key`) of a dataset; or a photograph with a question and an answer.

    Raises DataError where there is no such record, SampleError where it is broken.
    """
    if Path(data).is_file() and answer is not None:
        data = Path(data)
        turns = [("human", f"{IMAGE_MARK}\n{question or CAPTION_QUESTION}"), ("gpt", answer)]
        record = {
            "id": data.name,
            "image": str(data),
            "conversations": [{"from": role, "value": text} for role, text in turns],
        }
        return sample_from_record(record, key=data.name, source=data.name)
    for number, record in enumerate(read_samples(data, image_root=image_root)):
        if record.key == key or (key is None and number == index):
            if isinstance(record, BrokenRecord):
                raise record.error
            return record
    raise DataError(f"{data} has no record {key if key is not None else f'number {index}'}")


def window_of(
    data: str | Path, sample: Sample, *, image_root: str | Path | None = None
) -> list[Sample | BrokenRecord]:
    """All records of the sample's window, of which null shuffle takes images; itself for a photograph."""
    if sample.key != sample.source:
        for window in batching.chunks(read_samples(data, image_root=image_root), batching.WINDOW):
            if any(record.key == sample.key for record in window):
                return window
    return [sample]


def inspect(
    scorer: Scorer, sample: Sample, window: Sequence[Sample | BrokenRecord] | None = None
) -> Inspection:
    """Encodes and scores one sample. Raises SampleError where it cannot be scored.

    window: the records beside it (`window_of`), for null shuffle.
    """
    row = scorer.score_window([sample], window=window)[0]
    if row.status.startswith("error: "):
        raise SampleError(
            sample.key, sample.id, row.status.removeprefix("error: ").rstrip("."), "Repair the sample"
        )
    encoded = scorer.encoder.encode(sample)
    tokenizer = scorer.encoder.tokenizer
    answer_index = set(encoded.answer_index)
    texts = token_texts(tokenizer, encoded.input_ids)
    pieces = [
        (texts[place], place in answer_index, id == scorer.encoder.image_token_id)
        for place, id in enumerate(encoded.input_ids)
    ]
    images, nulls = pictures(scorer, sample, window)
    return Inspection(
        sample,
        list(_folded(pieces)),
        [texts[place] for place in encoded.answer_index],
        images,
        nulls,
        row,
        scorer.encoder.source_of_answers,
        encoded.unknown,
    )


def pictures(
    scorer: Scorer, sample: Sample, window: Sequence[Sample | BrokenRecord] | None = None
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The sample's images and their nulls as the model sees them; no nulls for "drop". window: as for `inspect`."""
    loaded = load_record(sample, scorer.encoder, "pixels")
    if loaded.error is not None:
        raise loaded.error
    if not loaded.is_multimodal:
        return [], []
    passes = scorer.passes
    device = scorer.loaded.model.device

    def on_device(encoded: Encoded) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in encoded.pixels.items()}

    def shown(pixels: dict[str, Tensor], encoded: Encoded) -> list[Image.Image]:
        found = scorer.loaded.pixels.pictures(pixels, [encoded.sizes])
        return [as_image(picture.pixels, passes.pixel_range) for picture in found]

    pixels = on_device(loaded.encoded)
    images = shown(pixels, loaded.encoded)
    if scorer.null.stage == "pixels":
        return images, shown(
            passes.null_pixels(pixels, [loaded.encoded.sizes], loaded.hashes), loaded.encoded
        )
    if scorer.null.stage != "image":
        return images, []
    Donors(window or [sample]).give([loaded], scorer.encoder)
    if loaded.error is not None:
        raise loaded.error
    return images, shown(on_device(loaded.null), loaded.null)


def sheet(images: list[Image.Image], nulls: list[Image.Image], *, side: int = 336) -> Image.Image:
    """One picture for the eye: the images in a row, their nulls below, small ones enlarged with nearest neighbour."""
    rows = [row for row in (images, nulls) if row]
    cells = [[_enlarged(image, side) for image in row] for row in rows]
    gap = 8
    width = max(sum(cell.width + gap for cell in row) for row in cells) - gap
    height = sum(max(cell.height for cell in row) + gap for row in cells) - gap
    picture = Image.new("RGB", (width, height), "white")
    top = 0
    for row in cells:
        left = 0
        for cell in row:
            picture.paste(cell, (left, top))
            left += cell.width + gap
        top += max(cell.height for cell in row) + gap
    return picture


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    factor = side // max(image.size)
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        if factor > 1
        else image
    )


def _folded(pieces: list[tuple[str, bool, bool]]) -> Iterator[tuple[str, bool]]:
    """Writes a run of image placeholders as one piece that says how many they are."""
    run: list[Any] = []
    for text, is_answer, is_image in [*pieces, ("", False, False)]:
        if is_image:
            run.append(text)
            continue
        if run:
            yield f"{run[0]} x {len(run)}", False
            run = []
        if text:
            yield text, is_answer
