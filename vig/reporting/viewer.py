"""From a row of scores to a SampleView: token texts, question, image and null image as the model sees them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vig.data.images import open_images
from vig.data.reading import Reading, Source
from vig.data.sample import BrokenRecord, Sample, SampleError, is_answer, text_of
from vig.data.samples import read_samples
from vig.reporting.facts import Facts
from vig.reporting.views import SampleView, Word
from vig.scoring import batching

WORDS = 14  # rows of each table of words


class Viewer:
    """Turns score rows into views with whatever can be had: without a tokenizer ids stand for words, without
    the data there are no questions and pictures; ``notes`` says what is missing and why."""

    def __init__(self, metadata: dict, *, processor: Any = None, data=None, image_root=None):
        self.metadata, self.data, self.notes = metadata, data, []
        self.image_root = image_root or metadata.get("image_root")
        self.processor = processor or self._load_processor()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.samples: dict[str, Sample | BrokenRecord] = {}
        self.null = metadata.get("null") or {}
        self.others: dict[str, Image.Image] = {}  # null shuffle: what stands in for the first image, by key

    def _load_processor(self) -> Any:
        from transformers import AutoProcessor

        try:
            revision = (
                self.metadata.get("revision") if not Path(str(self.metadata["model"])).is_dir() else None
            )
            return AutoProcessor.from_pretrained(self.metadata["model"], revision=revision)
        except Exception as error:  # whatever a foreign checkpoint raises: the page is still worth having
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.notes.append(f"Words are shown as token ids: the processor could not be loaded ({reason}).")
            return None

    def find(self, keys: Iterable[str]) -> None:
        """Read the data up to the last of the samples that are shown."""
        missing = set(keys)
        if self.data is None:
            self.notes.append(
                "Questions and pictures are missing: the scores do not name their data. Give data."
            )
            return
        size, limit = 1, None
        shuffled = self.null.get("kind") == "shuffle"
        if shuffled:  # it takes its pictures from the whole window
            size, limit = self.metadata.get("window") or batching.WINDOW, self.metadata.get("limit")
        try:
            source = Source(Path(self.data), Reading.stored(self.metadata))
            records = read_samples(source, image_root=self.image_root, limit=limit)
            for window in batching.chunks(records, size):
                for record in window:
                    if record.key in missing:
                        missing.discard(record.key)
                        self.samples[record.key] = record
                        if shuffled:
                            self._find_other(record, window)
                if not missing:
                    return
        except (OSError, ValueError) as error:
            self.notes.append(f"Questions and pictures are missing: {error}")
            return
        if missing:
            self.notes.append(f"{len(missing)} of the samples shown are not in {self.data} any more.")

    def _find_other(self, record: Sample | BrokenRecord, window: list[Sample | BrokenRecord]) -> None:
        from vig.scoring.loader import Donors, content_hash

        if isinstance(record, BrokenRecord) or not record.images:
            return
        with suppress(SampleError):  # the page says that it is not shown
            images = open_images(record)
            hashes, sizes = [content_hash(image) for image in images], [image.size for image in images]
            self.others[record.key] = Donors(window).pictures(record, hashes, sizes)[0]

    def view(self, row: dict, kept: np.ndarray | None) -> SampleView:
        ids = row["token_ids"] or []
        null, image = row["token_nll_null"] or [], row["token_nll_image"] or []
        view = SampleView(
            row["key"],
            row["id"] or "",
            "",
            token_texts(self.tokenizer, ids),
            [second - first for first, second in zip(image, null, strict=True)] if null else [],
            image,
            null,
            kept=None if kept is None else [bool(value) for value in kept],
        )
        record = self.samples.get(row["key"])
        if isinstance(record, BrokenRecord):
            view.note = f"{record.error.reason}"
        elif record is None:
            view.note = "sample not found"
        else:
            questions = questions_of(record)
            starts = [index for index, position in enumerate(row["positions"] or []) if position == 0]
            view.question = questions[0] if questions else ""
            view.turns = list(zip(starts[1:], questions[1:], strict=False))
            self._add_pictures(view, record)
        return view

    def _add_pictures(self, view: SampleView, sample: Sample) -> None:
        if not sample.images:
            view.note = "text only"
            return
        try:
            images = open_images(sample)
        except SampleError as error:
            view.note = error.reason
            return
        view.image = images[0]
        more = f"first of {len(images)} images" if len(images) > 1 else ""
        try:
            view.image, view.null_image, why = self._as_the_model_sees(sample, images)
        except Exception as error:  # pictures adorn the page: a processor that fails must not cost the report
            why = f"the null image could not be made ({str(error).partition(chr(10))[0]})"
        view.note = "; ".join(part for part in (why, more) if part)

    def _as_the_model_sees(self, sample: Sample, images: list[Image.Image]):
        """The picture made back from the processor's pixels, its null, and why there is none."""
        if self.processor is None:
            return images[0], None, "not made without the processor"
        from vig.models.null_image import NullSettings
        from vig.models.null_pixels import PixelRange, as_image, null_pictures
        from vig.scoring.loader import content_hash

        span, shown = PixelRange.of(self.processor), self._first_pixels(sample, images)
        clean = as_image(shown, span)
        settings = NullSettings(self.null.get("kind", "blur"), **_sigma(self.null))
        if settings.stage == "prompt":
            return clean, None, "no image at all"
        if settings.stage == "image":
            other = self.others.get(sample.key)
            if other is None:
                return clean, None, "another sample’s image, which could not be found"
            return clean, as_image(self._first_pixels(sample, [other, *images[1:]]), span), ""
        seed = int(content_hash(images[0]), 16)
        return clean, as_image(null_pictures(shown[None], settings, span, [seed])[0], span), ""

    def _first_pixels(self, sample: Sample, images: list[Image.Image]):
        """(C, H, W) of the first image as the processor makes it: the whole picture, not its thumbnail."""
        encoded = self._encoder.encode(sample, images)
        pictures = self._pixels.pictures(encoded.pixels, [encoded.sizes])
        first = [picture.pixels for picture in pictures if picture.image == 0]
        return max(first, key=lambda picture: picture.numel())

    @cached_property
    def _encoder(self):
        from vig.models.prompts import Encoder

        return Encoder(self.processor)

    @cached_property
    def _pixels(self):
        """By the model's config, or, where the model has moved, by the one beside the given processor."""
        from transformers import AutoConfig

        from vig.models.pixels import FamilyPixels

        try:
            return FamilyPixels.of(AutoConfig.from_pretrained(self.metadata["model"]), self.processor)
        except (OSError, ValueError, KeyError):
            return FamilyPixels.of(AutoConfig.from_pretrained(self.tokenizer.name_or_path), self.processor)


def _sigma(null: dict) -> dict[str, float]:
    params = null.get("params") or {}
    return {"sigma": params["sigma"]} if "sigma" in params else {}


def questions_of(sample: Sample) -> list[str]:
    """What was asked before each answer, image marks left out."""
    questions, said = [], []
    for message in sample.messages:
        if is_answer(message):
            questions.append("\n".join(said))
            said = []
        else:
            said.append(text_of(message).replace("<image>", "").strip())
    return questions


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the answer; the pieces of a split character stand with its last token."""
    if tokenizer is None:
        return [f"{'' if index == 0 else ' '}{id}" for index, id in enumerate(ids)]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        elif text.startswith(shown):
            texts.append(text[len(shown) :])
            shown = text
        else:
            texts.append(decode(ids[end - 1 : end]))
            shown = text
    return texts


def words(facts: Facts, tokenizer: Any) -> tuple[list[Word], list[Word]]:
    """Tokens with the highest and the lowest mean VIG, among those that are not too rare to judge."""
    least = max(3, int(facts.word_count.sum() ** 0.5 / 20))
    ids = np.flatnonzero(facts.word_count >= least)
    means = facts.word_sum[ids] / facts.word_count[ids]
    order = np.argsort(-means, kind="stable")
    half = min(WORDS, len(order) // 2)

    def word(place: int) -> Word:
        id = int(ids[place])
        text = str(id) if tokenizer is None else tokenizer.decode([id])
        return Word(text.strip() or repr(text).strip("'"), float(means[place]), int(facts.word_count[id]))

    return [word(place) for place in order[:half]], [word(place) for place in order[::-1][:half]]
