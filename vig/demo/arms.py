"""The arms of the miniature's experiment: tuned on all tokens, on a random choice of the same size, or by VIG.

Every arm starts from the shipped checkpoint and takes the same number of steps over batches of the same number of
samples, with the same learning rate. `python -m vig.demo.arms FOLDER ARM:SEED ...` trains some of them in one
process, one thread, and prints one JSON line for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHECKPOINT = Path(__file__).parent / "checkpoint"
ARMS = ("all", "random", "vig")
TRAINING = {"max_steps": 100, "batch_size": 32, "lr": 4e-4, "warmup": 0.1, "schedule": "linear"}


class Job(NamedTuple):
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Job:
        arm, _, seed = text.partition(":")
        if arm not in ARMS or not seed.isdigit():
            raise ValueError(f"job = {text!r}, expected {' | '.join(ARMS)}, a colon and a seed")
        return cls(arm, int(seed))

    def selection(self, folder: Path) -> Path | None:
        """Where its selection lies; the random choice differs from seed to seed, that of VIG does not."""
        places = {"all": None, "random": f"selection-random-{self.seed}", "vig": "selection"}
        return None if places[self.arm] is None else folder / places[self.arm]


def run_jobs(folder: Path, jobs: list[Job]) -> Iterator[dict]:
    """Train and examine each job's model; yields arm, seed, the exam's figures, tokens and seconds of each."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vig.data.samples import read_samples
    from vig.demo.evaluate import Exam
    from vig.models.prompts import Encoder
    from vig.training.train import train

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    encoder = Encoder(processor)
    encoded = [encoder.encode(sample) for sample in read_samples(folder / "tune.json")]
    exam = Exam(folder / "test.json", processor)
    for job in jobs:
        model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32")
        result = train(
            model, encoded, job.selection(folder), None, processor=processor, seed=job.seed, **TRAINING
        )
        figures = exam.sit(result.model)
        yield {
            "arm": job.arm,
            "seed": job.seed,
            **figures._asdict(),
            "tokens": result.tokens,
            "seconds": result.seconds,
        }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("jobs", type=Job.parse, nargs="+", metavar="ARM:SEED")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for figures in run_jobs(args.folder, args.jobs):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
