"""Scoring: records -> windows -> blocks -> batches -> two passes -> rows. Reads from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vig.data.sample import BrokenRecord, Sample
from vig.models.end_of_turn import DEFAULT
from vig.models.families import ModelError
from vig.models.loading import LoadedModel, as_loaded, check_device, context_length, device_for, load
from vig.models.null_image import BLUR_SIGMA
from vig.models.prompts import Encoder
from vig.scoring import batching
from vig.scoring.dual_pass import TokenNLL, TwoPasses
from vig.scoring.loader import LoadedRecord, load_records, new_pixel_bytes, prefetch_in_thread, workers_beside
from vig.scoring.memory import in_halves, refused_by_ranks
from vig.scoring.prefix_sharing import shared_by
from vig.scoring.self_check import SelfCheck
from vig.scoring.settings import ScoreSettings
from vig.store.fingerprints import (
    data_fingerprint,
    data_settings,
    processor_json,
    text_hash,
    tokenizer_json,
    weights_fingerprint,
)
from vig.store.rows import ScoreRow
from vig_kernels.dispatch import resolve

NOISE_SAMPLES = 16
KEPT_ERRORS = 1000  # messages that are held in memory; all stand in the scores


@dataclass
class Progress:
    """What a scoring run has done so far; handed to the `on_progress` callback after every batch."""

    total: int | None = None  # records of the whole run, if known
    done: int = 0  # records, error rows and rows of finished windows included
    resumed: int = 0  # of them, scored by an earlier run
    tokens: int = 0  # answer tokens scored in this run
    text_only: int = 0
    boundary_tokens: int = 0  # answer tokens that hold characters from outside their answer
    unknown: int = 0  # answer tokens that stand for text which the tokenizer does not know
    splits: int = 0  # batches that did not fit into memory and were halved
    splits_noted: int = 0  # of them, those that the manifest tells of
    failed: int = 0  # records that this run could not score
    failed_before: int = 0  # error rows of earlier runs, known at the end
    errors: list[str] = field(default_factory=list)  # the messages of the first KEPT_ERRORS
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Scorer:
    """Token and sample VIG of a dataset under one model (paper, section 3).

        VIG_t = NLL(a_t | a_<t, Q, null image) - NLL(a_t | a_<t, Q, image),  sample VIG = mean_t VIG_t  [nats]

    model: a checkpoint folder, a name on the hub, or a loaded transformers model (then give `processor` too).
    null, sigma: the null image, a name of `vig.models.null_image.NULLS`, and the blur's sigma as a fraction of the
        picture's shorter side.
    dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    batch_tokens: rows x longest row of a batch; batch_size: at most so many rows.
    end_of_turn: which end-of-turn tokens count as answer (`vig.models.prompts.Encoder`); unless given, as a folder
        recorded that is resumed, else "add".
    max_length: longer samples are error rows; the model's context unless given.
    workers: processes that prefetch (decode and tokenise), and may die of a sample, which is an error row then; None:
        as many as keep the model fed (`vig.scoring.loader.workers_beside`).
    share: samples with the same images and prompt prefix share its computation, where the model's attention allows
        it and it passes its self-check on the first of them (`vig.scoring.prefix_sharing`).
    stats: any of "kl" (KL(p_image || p_null) over the vocabulary) and "entropy" (of both), in nats, for each answer
        token beside its likelihoods, from the same sweep: `ScoreRow.token_stats`.
    tensor_parallel_size: ranks of torchrun that hold a checkpoint together, and all make the same calls; what the
        first of them is given to score is scored (`vig.models.ranks`).
    Raises ModelError for a model that cannot be loaded or does not do what scoring needs.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        null: str = "blur",
        sigma: float = BLUR_SIGMA,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        batch_tokens: int = batching.BATCH_TOKENS,
        batch_size: int | None = None,
        backend: str = "auto",
        end_of_turn: str | None = None,
        max_length: int | None = None,
        workers: int | None = 0,
        revision: str | None = None,
        attn: str | None = None,
        share: bool = True,
        trust_remote_code: bool = False,
        stats: Iterable[str] = (),
        tensor_parallel_size: int = 1,
    ):
        settings = ScoreSettings(
            null=null, sigma=sigma, dtype=dtype, device=device, batch_tokens=batch_tokens, batch_size=batch_size,
            backend=backend, end_of_turn=end_of_turn, max_length=max_length, workers=workers, revision=revision,
            attn=attn, share=share, trust_remote_code=trust_remote_code, stats=stats,
            tensor_parallel_size=tensor_parallel_size,
        )  # fmt: skip
        self.settings, self.null = settings, settings.null_settings
        self.loaded = _loaded(model, processor, settings)
        self.max_length = max_length or context_length(self.loaded)
        self.encoder = Encoder(
            self.loaded.processor, end_of_turn=end_of_turn or DEFAULT, max_length=self.max_length
        )
        self.passes = TwoPasses(self.loaded, self.encoder, settings)
        self.workers = workers_beside(self.loaded.model.device) if workers is None else workers
        self.self_check = SelfCheck(self.loaded, self.passes, self.encoder.image_token_id)
        self._memory_probed = False

    # --- one window ---

    def score(
        self, samples: Iterable[Sample | BrokenRecord], on_progress: Callable[[Progress], None] | None = None
    ) -> list[ScoreRow]:
        """Scores samples in memory, one row each, in order. What cannot be scored is a row with its error."""
        progress = Progress()
        rows: list[ScoreRow] = []
        for window in batching.chunks(samples, batching.WINDOW):
            rows += self.score_window(window, progress, on_progress)
        return rows

    def score_window(
        self,
        records: Sequence[Sample | BrokenRecord],
        progress: Progress | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        window: Sequence[Sample | BrokenRecord] | None = None,
    ) -> list[ScoreRow]:
        """Scores one window. Its rows, bits included, are a function of its records and the settings alone.

        window: all of its records, where `records` are those to be scored again.
        """
        progress = progress or Progress()
        self.passes.features.clear()
        rows: list[ScoreRow | None] = [None] * len(records)
        loading = load_records(records, self.encoder, self.null.stage, self.workers, window)
        blocks = batching.blocks(loading, new_pixel_bytes())
        blocks = prefetch_in_thread(blocks) if self.workers else blocks
        for block in self.loaded.ranks.each(blocks):
            block.sort(key=lambda item: item.place)
            self.self_check.run(block)
            for item, row in zip(block, self._score_block(block, progress, on_progress), strict=True):
                rows[item.place] = row
        return rows

    def _score_block(self, block: Sequence[LoadedRecord], progress: Progress, on_progress) -> list[ScoreRow]:
        rows: list[ScoreRow | None] = [error_row(item) for item in block]
        tally(progress, [row for row in rows if row is not None], on_progress)
        for multimodal in (True, False):  # a batch is all one or all the other
            items = [
                place
                for place, item in enumerate(block)
                if item.encoded is not None and item.is_multimodal == multimodal
            ]
            for places in self._batches(block, items):
                scored = self._score_batch([block[place] for place in places], progress)
                for place, row in zip(places, scored, strict=True):
                    rows[place] = row
                tally(progress, scored, on_progress)
        progress.boundary_tokens += sum(
            item.encoded.boundary_tokens for item in block if item.encoded is not None
        )
        progress.unknown += sum(item.encoded.unknown for item in block if item.encoded is not None)
        return rows

    def _batches(self, block: Sequence[LoadedRecord], places: Sequence[int]) -> list[list[int]]:
        """Cuts `places` into batches. What shares a row stays together; rows of a batch are of similar length."""
        together: dict[tuple, list[int]] = {}
        for place in places:
            key = shared_by(block[place].view, self.encoder.image_token_id)
            together.setdefault(key, []).append(place)
        order = [place for places in together.values() for place in places]
        rows = self.passes.rows([block[place].view for place in order])
        of_row, start = [], 0
        for row in rows:
            of_row.append(order[start : start + len(row.members)])
            start += len(row.members)
        lengths = [
            max(row.n_tokens, *(longest_pass(block[place]) for place in places))
            for row, places in zip(rows, of_row, strict=True)
        ]
        return [
            [place for number in batch for place in of_row[number]]
            for batch in batching.batches(lengths, self.settings.batch_tokens, self.settings.batch_size)
        ]

    def _score_batch(self, items: Sequence[LoadedRecord], progress: Progress) -> list[ScoreRow]:
        def too_large(item: LoadedRecord, reason: str) -> ScoreRow:
            return _row(item, f"error: {reason}. Score it on a larger device, or lower max_length")

        def count() -> None:
            progress.splits += 1

        return in_halves(self._scored, items, too_large, count)

    def _scored(self, items: Sequence[LoadedRecord]) -> list[ScoreRow]:
        clean = [item.view for item in items]
        null = None if items[0].null is None else [item.null_view for item in items]
        with refused_by_ranks(self.loaded, self.settings.batch_tokens):
            values = self.passes.score(clean, null)
        return [scored_row(item, value) for item, value in zip(items, values, strict=True)]

    def probe_memory(
        self,
        records: Sequence[Sample | BrokenRecord],
        window: Sequence[Sample | BrokenRecord] | None = None,
    ) -> None:
        """The memory probe: scores the largest batch that these records could make, once a process.

        So memory trouble comes before the work. Raises ModelError that says which --batch-tokens fits.
        """
        if self._memory_probed:
            return
        window = records if window is None else window
        few = self._few(records[:NOISE_SAMPLES], window)
        self.self_check.run(few)
        most = min(self.settings.batch_size or len(records), len(records))
        self.self_check.probe_memory(few, self.settings.batch_tokens, most)
        self._memory_probed = True

    def noise_floor(self, records: Sequence[Sample | BrokenRecord]) -> float | None:
        """Largest |VIG_t| in nats of the same image scored twice, alone and in a batch, over the first samples.

        What arithmetic alone makes of a zero; None where there are fewer than two multimodal samples.
        """
        loaded = self._few(records)
        block = [item for item in loaded if item.encoded is not None and item.is_multimodal][:NOISE_SAMPLES]
        if len(block) < 2:
            self.self_check.run(loaded)
            return None
        self.self_check.run(block)
        block = [item for item in block if item.encoded is not None]
        if len(block) < 2:
            return None
        together = self._score_batch(block, Progress())
        alone = []
        for item in block:
            self.passes.features.clear()  # its image is to be encoded in another batch, too
            alone += self._score_batch([item], Progress())
        differences = [
            abs(first - second)
            for left, right in zip(together, alone, strict=True)
            for first, second in zip(left.token_nll_image, right.token_nll_image, strict=True)
        ]
        return float(max(differences, default=0.0))

    def _few(
        self,
        records: Sequence[Sample | BrokenRecord],
        window: Sequence[Sample | BrokenRecord] | None = None,
    ) -> list[LoadedRecord]:
        """Loaded in a process apart where processes are wanted: an image that crashes its decoder costs no run."""
        load = partial(load_records, records, self.encoder, self.null.stage, min(1, self.workers), window)
        return self.loaded.ranks.same(lambda: list(load()))

    def measure_rate(self, block: Sequence[LoadedRecord]) -> tuple[int, float]:
        """(samples, tokens a second) of one batch like those to come, after one to warm up."""
        chosen = [item for item in block if item.is_multimodal] or list(block)
        self.self_check.run(chosen)
        chosen = [item for item in chosen if item.encoded is not None]
        if not chosen:
            return 0, 1.0
        chosen = [chosen[place] for place in self._batches(chosen, range(len(chosen)))[-1]]
        started = 0.0
        for _ in range(2):
            self.passes.features.clear()
            started = time.perf_counter()
            self._score_batch(chosen, Progress())
        passes = 2 if chosen[0].is_multimodal else 1
        tokens = passes * sum(longest_pass(item) for item in chosen)
        return len(chosen), tokens / (time.perf_counter() - started)

    # --- what the scores come from ---

    def provenance(
        self, data: str | Path | None = None, image_root: str | Path | None = None
    ) -> dict[str, Any]:
        """The metadata stored with the scores; a folder with other settings refuses to be resumed."""
        tokenizer, processor = self.encoder.tokenizer, self.loaded.processor
        return {
            "model": str(Path(self.loaded.name).resolve())
            if Path(self.loaded.name).is_dir()
            else self.loaded.name,
            "revision": self.loaded.revision or weights_fingerprint(self.loaded.name),
            "tokenizer_hash": text_hash(tokenizer_json(tokenizer)),
            "processor_hash": text_hash(processor_json(processor)),
            "template_hash": text_hash(self.encoder.template),
            "answers_from": self.encoder.source_of_answers,
            # under the names they were given: what a link's own name says, its target's may not
            "data": None if data is None else str(Path(data).absolute()),
            "data_fingerprint": None if data is None else data_fingerprint(data),
            **({} if data is None else data_settings(data)),
            "image_root": None if image_root is None else str(Path(image_root).absolute()),
            "null": self.null.metadata(),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "backend": resolve("linear_vig", self.settings.backend, self.loaded.model.device),
            "end_of_turn": self.encoder.end_of_turn,
            "stop_ids": [] if self.encoder.end_of_turn == "drop" else self.encoder.stop_ids,
            "max_length": self.max_length,
            "batch_tokens": self.settings.batch_tokens,
            "batch_size": self.settings.batch_size,
            "share": self.settings.share,
            **({"stats": list(self.settings.stats)} if self.settings.stats else {}),
            **({"tensor_parallel_size": self.loaded.ranks.size} if self.loaded.ranks.size > 1 else {}),
        }


def _loaded(model: Any, processor: Any, settings: ScoreSettings) -> LoadedModel:
    """A checkpoint that is loaded, or a model that is in memory already. Raises ModelError."""
    if isinstance(model, str | Path):
        check_device(settings.device)
        resolve("linear_vig", settings.backend, device_for(settings.device))  # before a checkpoint is read
        return load(
            model, dtype=settings.dtype, device=settings.device, revision=settings.revision, attn=settings.attn,
            trust_remote_code=settings.trust_remote_code, tensor_parallel_size=settings.tensor_parallel_size,
        )  # fmt: skip
    if isinstance(model, LoadedModel):
        return model
    if processor is None:
        raise ModelError("a loaded model was given without its processor. Give processor=")
    return as_loaded(model, processor, device=settings.device)


# --- rows ---


def longest_pass(item: LoadedRecord) -> int:
    """Tokens of the longer of its two passes."""
    return max(one.n_fed for one in (item.encoded, item.null) if one is not None)


def _row(item: LoadedRecord, status: str, **columns: Any) -> ScoreRow:
    record = item.record  # a sample made by hand may have numbers for names
    return ScoreRow(str(record.key), str(record.id), str(record.source), status, **columns)


def error_row(item: LoadedRecord) -> ScoreRow | None:
    if item.error is None:
        return None
    return _row(item, f"error: {item.error.reason}. {item.error.cure}")


def scored_row(item: LoadedRecord, value: TokenNLL) -> ScoreRow:
    """The row to store, its token columns as arrays; an error row where a value is not finite."""
    finite = np.isfinite(value.image) & (True if value.null is None else np.isfinite(value.null))
    for values in value.stats.values():
        finite &= np.isfinite(values)
    if not finite.all():
        token = int(finite.argmin())
        null = "" if value.null is None else f", nll_null {value.null[token]}"
        null += "".join(f", {name[6:]} {values[token]}" for name, values in value.stats.items())
        return _row(
            item, f"error: answer token {token}: nll_image {value.image[token]}{null}. Try --dtype float32"
        )
    return _row(
        item,
        "ok" if value.null is not None else "text_only",
        token_ids=np.array(item.encoded.answer_ids, np.int32),
        positions=np.array(item.encoded.turn_position, np.int32),
        token_nll_image=value.image,
        token_nll_null=value.null if value.null is not None else (),
        token_stats=value.stats,
    )


def tally(progress: Progress, rows: Sequence[ScoreRow], on_progress) -> None:
    progress.done += len(rows)
    for row in rows:
        if row.status.startswith("error: "):
            progress.failed += 1
            if len(progress.errors) < KEPT_ERRORS:
                progress.errors.append(f"{row.key} (id {row.id!r}): {row.status.removeprefix('error: ')}")
        else:
            progress.tokens += row.n_tokens
            progress.text_only += row.status == "text_only"
    if on_progress is not None and rows:
        on_progress(progress)
