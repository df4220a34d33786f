"""The tuning data of a share of blind answers and a seed: drawn, encoded, scored by the project's own `Scorer`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.evidence import design
from benchmarks.evidence.model import Item, tower_features
from vig import Scorer, read_samples, score_dataset
from vig.demo import scenes
from vig.demo.dataset import Record, tuning_records, write_records
from vig.demo.measures import words_of
from vig.models.prompts import Encoder
from vig.store.rows import METADATA_KEY
from vig.store.scores import open_scores, read_scores, score_metadata

NULLS = ("blur", "mean")  # the first is that of every arm but `mean`
CONTENT = frozenset({*scenes.COLOURS, *scenes.OBJECTS, *scenes.NUMBERS})


@dataclass(frozen=True)
class Tuning:
    """What a training may take: the samples, what is known of them, and their scores."""

    items: list[Item]
    records: list[Record]
    wrong: list[np.ndarray]  # (n,) bool of each sample: where the answer differs from the true one
    content: list[np.ndarray]  # (n,) bool: colours, objects and numbers
    stops: list[np.ndarray]  # (n,) bool: the end of the turn
    scores: dict[str, pa.Table]  # by null; rows in the order of the samples

    def nll(self, side: str, null: str = NULLS[0]) -> list[np.ndarray]:
        """(n,) float64 of each sample, nats: of the answer's tokens with the "image", or the "null" in its place.

        Of text-only samples there is no null: an empty array.
        """
        column = self.scores[null][f"token_nll_{side}"].to_pylist()
        return [np.array(values or [], float) for values in column]

    @property
    def multimodal(self) -> np.ndarray:
        """(samples,) bool."""
        return np.array([item.features is not None for item in self.items])


class Drawn:
    """Draws, encodes and scores for one base model."""

    def __init__(self, base: Path, model, processor):
        self.base, self.model, self.processor = base, model, processor
        self.encoder = Encoder(processor)
        self.words = words_of(processor.tokenizer)
        self.content = np.isin(self.words, sorted(CONTENT))  # (V,)
        self.scorers: dict[str, Scorer] = {}

    def tuning(self, share: float, seed: int, nulls: Sequence[str] = NULLS[:1]) -> Tuning:
        """The data of a share of blind answers and a seed, with scores of these nulls."""
        records = tuning_records(design.SAMPLES, seed, blind=share)
        with tempfile.TemporaryDirectory(prefix="vig-evidence-") as folder:
            data = write_records(Path(folder), "tune", records)
            items = self.encoded(data)
            scores = {null: self._scored(data, Path(folder) / f"scores-{null}", null) for null in nulls}
        ids = [item.answer_ids for item in items]
        for table in scores.values():
            _check_scores(table, ids, records)
        stop = self.processor.tokenizer.eos_token_id
        return Tuning(
            items,
            records,
            [self._wrong(record, answer) for record, answer in zip(records, ids, strict=True)],
            [self.content[answer] for answer in ids],
            [answer == stop for answer in ids],
            scores,
        )

    def encoded(self, data: Path) -> list[Item]:
        """The samples of a file as items, with the tower's features of their pictures."""
        encoded = [self.encoder.encode(sample) for sample in read_samples(data)]
        pixels = [item.pixels["pixel_values"] for item in encoded if item.pixels]
        features = iter(tower_features(self.model, torch.cat(pixels)) if pixels else ())
        return [
            Item(
                torch.tensor(item.input_ids),
                torch.tensor(item.answer_index),
                next(features) if item.pixels else None,
            )
            for item in encoded
        ]

    def records(self, records: Sequence[Record]) -> list[Item]:
        """Records, drawn and encoded."""
        with tempfile.TemporaryDirectory(prefix="vig-evidence-") as folder:
            return self.encoded(write_records(Path(folder), "exam", records))

    def _scored(self, data: Path, out: Path, null: str) -> pa.Table:
        if null not in self.scorers:
            self.scorers[null] = Scorer(str(self.base), null=null)
        score_dataset(self.scorers[null], data, out, progress_bar=False)
        scores = open_scores(out)
        table = pa.Table.from_batches(read_scores(scores))
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(score_metadata(scores))})

    def _wrong(self, record: Record, answer: np.ndarray) -> np.ndarray:
        tokenizer = self.processor.tokenizer
        truth = [*tokenizer.encode(record.turn.truth, add_special_tokens=False), tokenizer.eos_token_id]
        return np.array(truth) != answer


def _check_scores(table: pa.Table, ids: Sequence[np.ndarray], records: Sequence[Record]) -> None:
    """Every sample scored, in order, on the tokens that are trained."""
    for row, answer, record in zip(table.to_pylist(), ids, records, strict=True):
        status = "text_only" if record.scene is None else "ok"
        if (row["id"], row["status"], row["token_ids"]) != (record.id, status, answer.tolist()):
            raise RuntimeError(
                f"{record.id}: scored as {row['id']}, {row['status']}, other tokens than are trained"
            )
