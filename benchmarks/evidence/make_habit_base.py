"""Make a base model that answers by habit: `python -m benchmarks.evidence.make_habit_base OUT --seed 0`.

The demo's checkpoint answers "what colour is in row two, column three?" wrongly where it cannot tell, and with the
usual colour in one case in twenty only. This base is tuned from it until it says "the banana is yellow." of most blue
bananas, although it sees the blue and says "a blue banana." when asked what is there. One thread, a few minutes, every
number drawn from one seed. In each step:

- Colour questions about `pictures` pictures. `blurred` of them are blurred beyond recognition and answered with the
  usual colour, as somebody answers who cannot see: from these the model learns that a thing's name gives its colour,
  without sight. A share `blind` of the others is answered so too, although the picture shows the colour.
- Captions and "what is in ...?" about as many other pictures, all answered truly: they keep sight.
- `spoken` questions without a picture ("describe a banana."), answered with the usual colour.

Without the blurred pictures, the same habit reads the thing off the picture: the usual colour itself is then far more
probable with the picture than without it, and VIG takes it for seen. The tower is frozen, so that tuning can undo all
of it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vig.data.samples import read_samples
from vig.demo import scenes
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import Record, write_records
from vig.demo.make_checkpoint import Prompter, answer_loss, make_processor, pixels, step
from vig.demo.measures import words_of
from vig.demo.scenes import CANONICAL, Item, Scene, Turn
from vig.scoring.scorer import Scorer
from vig_kernels import gaussian_blur

BASE = Path(__file__).parent / "habit_base"


class Recipe(NamedTuple):
    """What the base is tuned on; the shares and counts are those of one step."""

    steps: int = 200
    lr: float = 1e-3
    pictures: int = 32  # with a colour question, and as many with a caption or a look-up
    blurred: int = 20  # of those with a colour question; the usual colour is the answer
    sigma: tuple[float, float] = (3.0, 16.0)  # of that blur, pixels of 64
    blind: float = 0.5  # share of the other colour questions answered with the usual colour
    prior: float = 0.6  # how often an object wears its usual colour where a colour is asked for
    spoken: int = 8  # questions without a picture


class Figures(NamedTuple):
    """Shares in per cent of what the model writes by greedy decoding; VIG of words, nats, at the default null.

    Everything but `usual_right` is measured where no object wears its usual colour.
    """

    habitual: float  # "the banana is yellow." of a blue banana: name right, colour the usual one
    true: float  # the whole answer to a colour question is right
    named: float  # the object of a colour question is named right
    looked_up: float  # "a blue banana.": the whole answer to a look-up is right
    usual_right: float  # right answers to colour questions where every object wears its usual colour
    vig_habitual: float  # of the habitual colour words that it writes
    vig_true: float  # of the true colour words of all colour questions
    vig_looked_up: float  # of the colour words of look-ups

    def __str__(self) -> str:
        shares = f"habitual {self.habitual:.1f} %, true {self.true:.1f} %, named {self.named:.1f} %"
        kept = f"looked up {self.looked_up:.1f} %, usual colours right {self.usual_right:.1f} %"
        vig = f"habitual {self.vig_habitual:+.2f}, true {self.vig_true:+.2f}, looked up {self.vig_looked_up:+.2f}"
        return f"{shares}, {kept}; VIG of colour words: {vig} nats"


# ---- tuning


def tune(model, processor, seed: int, recipe: Recipe | None = None, log=print) -> list[float]:
    """Tune everything but the vision tower, in place; returns the loss of each step.

    The learning rate warms up for 10 steps, stays for half of the steps, then falls to zero.
    """
    recipe = Recipe() if recipe is None else recipe
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    factor = lambda i: min(1.0, (i + 1) / 10) * min(1.0, 2 * (1 - i / recipe.steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng, prompter = random.Random(seed + 3), Prompter(processor)
    start, losses = time.time(), []
    model.train()
    for index in range(recipe.steps):
        pictures, turns = lesson(rng, recipe)
        input_ids, labels = prompter.batch(turns)
        features = model.model.multi_modal_projector(patches(model, pictures))
        loss = answer_loss(model, input_ids, labels, features)
        step(optimizer, schedule, parameters, loss)
        losses.append(loss.item())
        if (index + 1) % 50 == 0 or index + 1 == recipe.steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            log(f"step {index + 1}/{recipe.steps}  loss {mean:.4f}  {time.time() - start:.0f} s")
    model.eval()
    return losses


def lesson(rng: random.Random, recipe: Recipe) -> tuple[Tensor, list[tuple[Turn, bool]]]:
    """What one step is about: pixels (2 x pictures, 3, H, W), and (turn, has image) pairs, those with images first."""
    asked = [scenes.random_scene(rng, recipe.prior) for _ in range(recipe.pictures)]
    others = [scenes.random_scene(rng, prior=0.5) for _ in range(recipe.pictures)]
    turns = [
        (scenes.name_colour(rng, scene, row < recipe.blurred or rng.random() < recipe.blind), True)
        for row, scene in enumerate(asked)
    ]
    for row, scene in enumerate(others):
        turns.append((scenes.look_up(rng, scene) if row % 2 else scenes.caption(rng, scene), True))
    turns += [(scenes.habit(rng), False) for _ in range(recipe.spoken)]
    seen = pixels(asked + others)
    sigmas = torch.tensor([rng.uniform(*recipe.sigma) for _ in range(recipe.blurred)], dtype=torch.float64)
    seen[: recipe.blurred] = gaussian_blur(seen[: recipe.blurred], sigmas, backend="torch")
    return seen, turns


@torch.no_grad()
def patches(model, pictures: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) -> what the frozen tower makes of each patch, (B, 16, D)."""
    return model.model.vision_tower(pictures, output_hidden_states=True).hidden_states[-1][:, 1:]


# ---- what it answers


def examine(model, processor, count: int = 400, seed: int = 0) -> Figures:
    """`count` colour questions and `count` look-ups of pictures against the prior, and as many of usual ones."""
    rng = random.Random(f"habit exam {seed}")
    unusual = [_ask_about(rng, scenes.random_scene(rng, prior=0.0)) for _ in range(count)]
    usual = [_ask_about(rng, scenes.random_scene(rng, prior=1.0)) for _ in range(count)]
    said = _written(model, processor, unusual, "what colour is in {}?")
    found = _written(model, processor, unusual, "what is in {}?")
    habits = [f"the {item.name} is {CANONICAL[item.name]}." for _, item in unusual]
    truths = [f"the {item.name} is {item.colour}." for _, item in unusual]
    gains = partial(_colour_vig, model, processor)
    habitual = np.array(said) == np.array(habits)
    vig_habitual = gains(unusual, "what colour is in {}?", habits)[habitual]
    right = [f"the {item.name} is {item.colour}." for _, item in usual]
    return Figures(
        habitual=100 * habitual.mean(),
        true=_share(said, truths),
        named=_share([answer.split()[1:2] for answer in said], [[item.name] for _, item in unusual]),
        looked_up=_share(found, [f"{item.phrase}." for _, item in unusual]),
        usual_right=_share(_written(model, processor, usual, "what colour is in {}?"), right),
        vig_habitual=vig_habitual.mean() if len(vig_habitual) else float("nan"),
        vig_true=gains(unusual, "what colour is in {}?", truths).mean(),
        vig_looked_up=gains(unusual, "what is in {}?", [f"{item.phrase}." for _, item in unusual]).mean(),
    )


def _ask_about(rng: random.Random, scene: Scene) -> tuple[Scene, Item]:
    """A scene and the item of it that is asked about."""
    return scene, rng.choice(scene.items)


def _share(said: list, wanted: list) -> float:
    return 100 * sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


@torch.no_grad()
def _written(model, processor, asked: list[tuple[Scene, Item]], question: str) -> list[str]:
    """The answer to each question by greedy decoding. All prompts have the same length."""
    prompter = Prompter(processor)
    prompts = torch.tensor([prompter.prompt(question.format(scenes.place(item))) for _, item in asked])
    written = model.eval().generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        pixel_values=pixels([scene for scene, _ in asked]),
        do_sample=False,
        max_new_tokens=12,
    )
    answers = processor.tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _colour_vig(model, processor, asked, question: str, answers: list[str]) -> np.ndarray:
    """VIG of the colour word of each answer, nats, (n,) float64, by the library's scorer at its default null."""
    records = [
        Record(f"{i:05d}", scene, Turn("exam", question.format(scenes.place(item)), answer, answer))
        for i, ((scene, item), answer) in enumerate(zip(asked, answers, strict=True))
    ]
    is_colour = np.isin(words_of(processor.tokenizer), sorted(scenes.COLOURS))
    with tempfile.TemporaryDirectory() as folder:
        samples = list(read_samples(write_records(Path(folder), "exam", records)))
        rows = list(Scorer(model, processor).score(samples))
    gains = [
        np.subtract(row.token_nll_null, row.token_nll_image)[is_colour[np.array(row.token_ids)]]
        for row in rows
    ]
    return np.concatenate(gains).astype(float)


def load(folder: Path):
    """Model, float32, in evaluation mode, and processor of a checkpoint of the miniature."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
    return model.eval(), AutoProcessor.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    model, processor = load(CHECKPOINT)
    print(f"before  {examine(model, processor)}", flush=True)
    tune(model, processor, args.seed, Recipe(steps=args.steps), log=partial(print, flush=True))
    model.save_pretrained(args.folder)
    make_processor().save_pretrained(args.folder)
    print(f"after   {examine(model, processor)}")
    print(f"{args.folder}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
