"""What a tuned model is asked. The same questions for every run.

    test        colours where no object has its usual colour: habit is always wrong
    validation  other questions of that kind, for the check of the learning rate alone
    prior       colours where every object has its usual colour: habit is always right
    captions    what is in the picture, written out greedily
    text        all questions without a picture, of which there are 32

Answers but captions are judged by one teacher-forced pass, as `vig.demo.evaluate` does: the colour word after the
words before it; the whole answer, end of turn included, which is what greedy decoding would write.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.evidence.data import Drawn
from benchmarks.evidence.design import EXAMS
from benchmarks.evidence.model import IGNORE, Item, collate, hidden_states
from vig.demo import scenes
from vig.demo.dataset import Record, test_records
from vig.demo.scenes import Turn

AT_ONCE = 250  # questions of a forward pass
LONGEST_CAPTION = 32  # tokens; the longest true one has 20


class Exam(NamedTuple):
    records: list[Record]
    items: list[Item]


class Exams:
    """The questions, encoded once for one base model, and the judging."""

    def __init__(self, drawn: Drawn, sizes: dict[str, tuple[int, int]] = EXAMS):
        words = np.array(drawn.words)
        self.words = drawn.words
        self.stop = drawn.processor.tokenizer.eos_token_id
        self.is_colour = torch.from_numpy(np.isin(words, sorted(scenes.COLOURS)))  # (V,)
        self.colour_ids = {word: place for place, word in enumerate(drawn.words)}
        records = {name: _DRAWN[name](seed, size) for name, (seed, size) in sizes.items()}
        records["text"] = text_records()
        self.exams = {name: Exam(drawn_, drawn.records(drawn_)) for name, drawn_ in records.items()}

    @torch.no_grad()
    def sit(self, model, names: Sequence[str]) -> dict:
        """The figures of a run's line, of these exams."""
        found = {}
        for name in names:
            found |= {"captions": self._captions, "text": self._text}.get(name, self._colours)(model, name)
        return found

    def _colours(self, model, name: str) -> dict:
        """Per cent right, and the bits behind them, a question each."""
        usual = torch.tensor(
            [self.colour_ids[scenes.CANONICAL[_asked(record)]] for record in self.exams[name].records]
        )
        colour, exact, habit = [], [], []
        for start in range(0, len(usual), AT_ONCE):
            said, target = self._said(model, self.exams[name].items[start : start + AT_ONCE])
            right = said == target
            is_colour = self.is_colour[target.clamp(min=0)] & (target != IGNORE)
            colour.append((right | ~is_colour).all(1))
            exact.append((right | (target == IGNORE)).all(1))
            habit.append(((said == usual[start : start + AT_ONCE, None]) & is_colour).any(1))
        bits = {
            part: torch.cat(rows).numpy()
            for part, rows in {"colour": colour, "exact": exact, "habit": habit}.items()
        }
        return {f"{name}_{part}": percent(values) for part, values in bits.items()} | (
            {f"{name}_{part}_bits": packed(values) for part, values in bits.items()} if name == "test" else {}
        )

    def _said(self, model, items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely token and the true one at each answer place, (B, T - 1); elsewhere IGNORE."""
        batch = collate(items)
        asked = batch.target != IGNORE
        hidden = hidden_states(model, batch.ids, batch.features)[:, :-1][asked]
        said = torch.full_like(batch.target, IGNORE)
        said[asked] = model.get_output_embeddings()(hidden).argmax(-1)
        return said, batch.target

    def _text(self, model, name: str) -> dict:
        batch = collate(self.exams[name].items)
        asked = batch.target != IGNORE
        hidden = hidden_states(model, batch.ids, batch.features)[:, :-1][asked]
        return {"text_loss": cross_entropy(model.get_output_embeddings()(hidden), batch.target[asked]).item()}

    def _captions(self, model, name: str) -> dict:
        """CHAIR of greedy captions: objects that are named and not there; and of those there, how many are named.

        The counts of each picture stand as one digit each.
        """
        exam = self.exams[name]
        there = [{item.name for item in record.scene.items} for record in exam.records]
        counts = []  # (named, not there, found) of each picture
        for said, objects in zip(self._written(model, exam.items), there, strict=True):
            named = [self.words[token] for token in said if self.words[token] in scenes.CANONICAL]
            counts.append((len(named), sum(name not in objects for name in named), len(objects & set(named))))
        named, absent, found = np.array(counts).T
        return {
            "chair_i": round(float(100 * absent.sum() / max(named.sum(), 1)), 6),
            "chair_s": percent(absent > 0),
            "recall": round(float(100 * found.sum() / sum(map(len, there))), 6),
            "captions_named": digits(named),
            "captions_absent": digits(absent),
        }

    def _written(self, model, items: Sequence[Item]) -> list[list[int]]:
        """Greedy answers, without the end of the turn. All prompts have the same length."""
        from transformers import DynamicCache

        prompt = int(items[0].answer[0])
        cache = DynamicCache()
        ids = torch.stack([item.ids[:prompt] for item in items])
        features = torch.stack([item.features for item in items])
        ended = torch.zeros(len(items), dtype=torch.bool)
        written = []
        for _ in range(LONGEST_CAPTION):
            hidden = hidden_states(model, ids, features, past_key_values=cache, use_cache=True)[:, -1]
            ids = model.get_output_embeddings()(hidden).argmax(-1, keepdim=True)
            ids[ended] = self.stop
            written.append(ids)
            ended |= ids[:, 0] == self.stop
            features = None
            if ended.all():
                break
        rows = torch.cat(written, 1).tolist()
        return [row[: row.index(self.stop)] if self.stop in row else row for row in rows]


def _asked(record: Record) -> str:
    """The object whose colour is asked for: "the cup is red."."""
    return record.turn.truth.split()[1]


def _prior_records(seed: int, count: int) -> list[Record]:
    return _colour_records(f"evidence prior {seed}", count, prior=1.0)


def _colour_records(seed: str, count: int, prior: float) -> list[Record]:
    rng = random.Random(seed)
    drawn = [scenes.random_scene(rng, prior) for _ in range(count)]
    return [
        Record(f"exam-{place:05d}", scene, scenes.name_colour(rng, scene))
        for place, scene in enumerate(drawn)
    ]


def _caption_records(seed: int, count: int) -> list[Record]:
    rng = random.Random(f"evidence captions {seed}")
    drawn = [scenes.random_scene(rng, prior=0.0) for _ in range(count)]
    return [
        Record(f"exam-{place:05d}", scene, scenes.caption(rng, scene)) for place, scene in enumerate(drawn)
    ]


def text_records() -> list[Record]:
    """Every question without a picture that the tuning data may hold."""
    turns = [
        Turn("text only", question.format(name), answer.format(name, colour), answer.format(name, colour))
        for name, colour in scenes.CANONICAL.items()
        for question, answer in (
            ("what colour is a {}?", "usually {1}."),
            ("describe a {}.", "the {0} is {1}."),
        )
    ]
    return [Record(f"exam-{place:05d}", None, turn) for place, turn in enumerate(turns)]


_DRAWN = {
    "test": lambda seed, count: test_records(count, seed),
    "validation": lambda seed, count: test_records(count, seed),
    "prior": _prior_records,
    "captions": _caption_records,
}


# ---- figures of many questions, in a line of JSON


def percent(right: np.ndarray) -> float:
    return round(float(100 * np.mean(right)), 6)


def packed(bits: np.ndarray) -> str:
    """Bits as hexadecimal digits, the first bit the highest of the first digit."""
    return np.packbits(np.asarray(bits, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """(count,) bool. Raises ValueError for a text of another length."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    if not count <= len(bits) < count + 8:
        raise ValueError(f"{len(bits)} bits stored for {count} questions")
    return bits[:count].astype(bool)


def digits(counts: np.ndarray) -> str:
    """Counts from 0 to 9, a digit each; larger ones as 9."""
    return "".join(str(min(int(count), 9)) for count in counts)


def undigits(text: str) -> np.ndarray:
    return np.array(list(text), int)
