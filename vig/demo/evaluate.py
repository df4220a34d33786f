"""Right answers on a test with known truth: `python -m vig.demo.evaluate MODEL DATA`.

Both measures come from one teacher-forced pass and equal those of greedy decoding. An answer is `exact` when every
token of it, end of turn included, is the most probable one after the tokens before it: by induction greedy decoding
writes just this answer. `colour` asks for the colour word alone, after the words before it, so that a model which
sees the colour but would word its answer otherwise is not called blind.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vig.data.sample import BrokenRecord
from vig.data.samples import read_samples
from vig.demo.scenes import COLOUR_WORDS
from vig.models.prompts import Encoder


class Figures(NamedTuple):
    """Per cent of the `questions` answered with the right colour, and exactly right."""

    questions: int
    colour: float
    exact: float


class Exam:
    """A test, encoded once, to be sat by many models that share a processor."""

    def __init__(self, data: Path, processor, batch_size: int = 64):
        encoder = Encoder(processor)
        samples = list(read_samples(data))
        broken = [sample for sample in samples if isinstance(sample, BrokenRecord)]
        if broken:
            raise broken[0].error
        encoded = [encoder.encode(sample) for sample in samples]
        self.questions = len(encoded)
        self.batches = [
            encoder.collate(encoded[start : start + batch_size])
            for start in range(0, len(encoded), batch_size)
        ]
        words = processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer)))
        self.colour_ids = torch.tensor(
            [id for id, word in enumerate(words) if word.strip("▁") in COLOUR_WORDS]
        )

    @torch.no_grad()
    def sit(self, model) -> Figures:
        """Every question once, in evaluation mode."""
        was_training = model.training
        model.eval()
        results = [result for batch in self.batches for result in self._answers(model, batch)]
        model.train(was_training)
        colour, exact = zip(*results, strict=True)
        return Figures(self.questions, 100 * sum(colour) / len(colour), 100 * sum(exact) / len(exact))

    def _answers(self, model, batch: dict) -> Iterator[tuple[bool, bool]]:
        """For each row of a batch: all colour words right, all tokens right."""
        target = batch["labels"][:, 1:]  # hidden at t predicts token t + 1
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        asked = target != -100
        said = torch.full_like(target, -100)
        said[asked] = model.get_output_embeddings()(hidden[asked]).argmax(-1).cpu()
        right = said == target
        is_colour = torch.isin(target, self.colour_ids)
        for row in range(len(target)):
            yield right[row][is_colour[row]].all().item(), right[row].all().item()


def main() -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    exam = Exam(args.data, AutoProcessor.from_pretrained(args.model))
    figures = exam.sit(LlavaForConditionalGeneration.from_pretrained(args.model))
    print(f"{figures.questions} questions: colour {figures.colour:.1f} %, exact {figures.exact:.1f} %")


if __name__ == "__main__":
    main()
