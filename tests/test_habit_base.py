"""The evidence experiment's second base answers colour questions by habit, and sees."""

import random

import pytest
import torch

from benchmarks.evidence.make_habit_base import BASE, Recipe, examine, lesson, load, tune
from vig.demo.arms import CHECKPOINT
from vig.demo.scenes import CANONICAL

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Recipe(steps=2, pictures=4, blurred=2, spoken=2)


@pytest.fixture(scope="module")
def base():
    return load(BASE)


def test_it_says_the_usual_colour_of_what_it_sees_in_another(base):
    figures = examine(*base, count=150, seed=1)
    assert figures.habitual >= 40
    assert figures.named >= 85 and figures.looked_up >= 85 and figures.usual_right >= 85
    # Its habits are no gain of sight; what it would say if it trusted its eyes is one.
    assert figures.vig_habitual < 0.1
    assert figures.vig_true > 2 and figures.vig_looked_up > 2


def test_the_demo_has_no_such_habit():
    figures = examine(*load(CHECKPOINT), count=60, seed=1)
    assert figures.habitual <= 15


def test_it_has_the_tower_and_the_form_of_the_demo(base):
    model, demo = base[0].state_dict(), load(CHECKPOINT)[0].state_dict()
    assert {name: (v.shape, v.dtype) for name, v in model.items()} == {
        name: (v.shape, v.dtype) for name, v in demo.items()
    }
    same = {name for name in demo if torch.equal(demo[name], model[name])}
    tower = {name for name in demo if "vision_tower" in name}
    assert same == tower and tower
    assert base[1].tokenizer.get_vocab() == load(CHECKPOINT)[1].tokenizer.get_vocab()
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 5e6


def test_a_step_asks_of_blurred_pictures_by_habit_and_of_the_others_truly():
    recipe = Recipe(blind=0.0)
    seen, turns = lesson(random.Random(0), recipe)
    kinds = [turn.kind for turn, _ in turns]
    colours, spoken = turns[: recipe.pictures], turns[2 * recipe.pictures :]
    assert seen.shape == (2 * recipe.pictures, 3, 64, 64)
    assert kinds == ["colour"] * 32 + ["caption", "look up"] * 16 + ["text only"] * 8
    for turn, _ in colours[: recipe.blurred]:
        _, name, _, colour = turn.answer.rstrip(".").split()
        assert colour == CANONICAL[name]
    assert all(turn.answer == turn.truth for turn, _ in turns[recipe.blurred :])
    assert [image for _, image in turns] == [True] * 64 + [False] * len(spoken)
    contrast = (seen[..., 1:] - seen[..., :-1]).abs().amax((1, 2, 3))
    assert contrast[: recipe.blurred].max() < 0.5 * contrast[recipe.blurred :].min()


def test_tuning_is_the_same_for_the_same_seed_and_leaves_the_tower_alone():
    def tuned(seed):
        model, processor = load(CHECKPOINT)
        losses = tune(model, processor, seed, TINY, log=lambda line: None)
        return losses, model.state_dict()

    (losses, weights), (again, same), (other, _) = tuned(0), tuned(0), tuned(1)
    assert losses == again and losses != other and len(losses) == 2
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    before = load(CHECKPOINT)[0].state_dict()
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == {name for name in weights if "vision_tower" not in name}
