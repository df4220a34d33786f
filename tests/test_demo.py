"""The miniature: its scenes, its shipped checkpoint, and what VIG must show on them."""

import hashlib
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vig.data.images import open_images
from vig.data.sample import BrokenRecord
from vig.data.samples import read_samples
from vig.demo import dataset, measures, nulls, run, scenes
from vig.demo.arms import CHECKPOINT, Job
from vig.demo.evaluate import Exam
from vig.models.null_image import NullSettings
from vig.models.prompts import Encoder
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.store.rows import ScoreRow

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(str(CHECKPOINT), dtype="float32")


# ---- scenes


def test_scenes_are_the_same_for_the_same_seed_and_differ_for_another():
    def prints(seed):
        records = dataset.tuning_records(40, seed)
        drawn = b"".join(scenes.draw(record.scene).tobytes() for record in records if record.scene)
        return records, hashlib.sha256(drawn).hexdigest()

    assert prints(3) == prints(3)
    assert prints(3)[1] != prints(4)[1]


def test_every_object_in_every_colour_can_be_told_apart():
    pictures = {
        scenes.draw(scenes.Scene((scenes.Item(name, colour, 1, 2),), seed=5)).tobytes()
        for name in scenes.OBJECTS
        for colour in scenes.COLOURS
    }
    assert len(pictures) == 160


@pytest.mark.parametrize("prior", [0.0, 0.5, 1.0])
def test_the_prior_is_the_share_of_canonical_colours(prior):
    rng = random.Random(0)
    items = [item for _ in range(400) for item in scenes.random_scene(rng, prior).items]
    share = np.mean([item.colour == scenes.CANONICAL[item.name] for item in items])
    assert abs(share - prior) <= (0.05 if prior == 0.5 else 0.0)


def test_the_word_lists_do_not_overlap_and_the_answers_use_known_words_only():
    lists = [scenes.COLOUR_WORDS, scenes.OBJECT_WORDS, scenes.FUNCTION_WORDS]
    assert len(frozenset.union(*lists)) == sum(map(len, lists))
    known = set(scenes.words())
    for record in dataset.tuning_records(200, 0):
        for text in (record.turn.question, record.turn.answer, record.turn.truth):
            spaced = "".join(f" {sign} " if sign in ",.?:" else sign for sign in text)
            assert set(spaced.split()) <= known


def test_the_test_scenes_never_follow_habit_and_blind_answers_always_do():
    for record in dataset.test_records(100, 0):
        assert record.turn.answer == record.turn.truth
        assert all(item.colour != scenes.CANONICAL[item.name] for item in record.scene.items)
    blind = [record for record in dataset.tuning_records(600, 0) if record.turn.blind]
    assert len(blind) > 50
    for record in blind:
        words = record.turn.answer.replace(".", "").replace(",", "").split()
        named = [word for word in words if word in scenes.OBJECT_WORDS]
        coloured = [word for word in words if word in scenes.COLOUR_WORDS]
        assert coloured == [scenes.CANONICAL[name] for name in named]
    wrong = [record for record in blind if record.turn.answer != record.turn.truth]
    assert 0 < len(wrong) < len(blind)


def test_triples_share_question_and_answer_and_differ_as_named():
    records = dataset.triple_records(30, 0)
    for match, partly, conflict in zip(records[0::3], records[1::3], records[2::3], strict=True):
        assert match.turn == partly.turn == conflict.turn
        assert [record.match for record in (match, partly, conflict)] == list(dataset.MATCHES)
        true = {(item.name, item.colour) for item in match.scene.items}
        assert 0 < len(true & {(item.name, item.colour) for item in partly.scene.items}) < len(true)
        said = set(match.turn.answer.replace(".", "").replace(",", "").split())
        assert not said & {word for item in conflict.scene.items for word in (item.name, item.colour)}


def test_the_written_data_reads_back_with_its_truth(tmp_path):
    records = dataset.tuning_records(60, 1)
    path = dataset.write_records(tmp_path, "tune", records)
    samples = list(read_samples(path))
    assert not any(isinstance(sample, BrokenRecord) for sample in samples)
    truth = dataset.read_truth(path)
    for record, raw, sample in zip(records, json.loads(path.read_text()), samples, strict=True):
        assert sample.id == raw["id"] == record.id
        assert raw["conversations"][1] == {"from": "gpt", "value": record.turn.answer}
        assert ("image" in raw) == (record.scene is not None) == bool(sample.images)
        assert truth[sample.id]["truth"] == record.turn.truth
        for image in open_images(sample):
            assert image.tobytes() == scenes.draw(record.scene).tobytes()
    assert any(record.scene is None for record in records)


# ---- the checkpoint


def test_the_checkpoint_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 5e6
    assert (CHECKPOINT / "model.safetensors").is_file()


def test_training_text_is_tokenised_as_the_processor_does(tmp_path):
    from vig.demo.make_checkpoint import Prompter, make_processor, pixels

    processor, records = make_processor(), dataset.tuning_records(30, 2)
    encoder, prompter = Encoder(processor), Prompter(processor)
    assert encoder.source_of_answers == "generation marks"
    samples = read_samples(dataset.write_records(tmp_path, "tune", records))
    for record, sample in zip(records, samples, strict=True):
        encoded = encoder.encode(sample)
        input_ids, labels = prompter.batch([(record.turn, record.scene is not None)])
        assert encoded.input_ids == input_ids[0].tolist()
        assert encoded.answer_index == (labels[0] != -100).nonzero().squeeze(1).tolist()
        assert encoded.answer_ids[-1] == processor.tokenizer.eos_token_id
        text = processor.tokenizer.decode(encoded.answer_ids, skip_special_tokens=True)
        assert text == record.turn.answer
        if record.scene is not None:
            torch.testing.assert_close(encoded.pixels["pixel_values"], pixels([record.scene]))


def test_the_shipped_processor_is_the_one_the_script_makes(scorer):
    from vig.demo.make_checkpoint import make_processor

    made, shipped = make_processor(), scorer.loaded.processor
    assert shipped.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert shipped.chat_template == made.chat_template
    assert (
        shipped.tokenizer("what is in row two?").input_ids == made.tokenizer("what is in row two?").input_ids
    )


def test_sight_tells_colours_and_objects_from_function_words(scorer, tmp_path):
    path = dataset.write_records(tmp_path, "tune", dataset.tuning_records(240, 11, blind=0.0))
    score_dataset(scorer, path, tmp_path / "scores")
    words = measures.words_of(scorer.loaded.processor.tokenizer)
    found = measures.word_vig(tmp_path / "scores", words)
    assert all(len(values) > 100 for values in found.values.values())
    assert found.auroc >= 0.90


def test_vig_orders_matching_partly_matching_and_conflicting_pictures(scorer, tmp_path):
    path = dataset.write_records(tmp_path, "triples", dataset.triple_records(40, 11))
    score_dataset(scorer, path, tmp_path / "scores")
    groups = measures.vig_by("match", tmp_path / "scores", dataset.read_truth(path))
    assert [len(groups[match]) for match in dataset.MATCHES] == [40, 40, 40]
    match, partly, conflict = (groups[match].mean() for match in dataset.MATCHES)
    assert match > partly > conflict


def test_an_exam_equals_greedy_decoding(scorer, tmp_path):
    path = dataset.write_records(tmp_path, "test", dataset.test_records(24, 11))
    processor, model = scorer.loaded.processor, scorer.loaded.model
    exact = []
    for sample in read_samples(path):
        encoded = Encoder(processor).encode(sample)
        start = encoded.answer_index[0]
        with torch.no_grad():
            said = model.generate(
                input_ids=torch.tensor([encoded.input_ids[:start]]),
                attention_mask=torch.ones(1, start, dtype=torch.int64),
                pixel_values=encoded.pixels["pixel_values"],
                max_new_tokens=8,
                do_sample=False,
            )
        exact.append(said[0, start:].tolist()[: len(encoded.answer_ids)] == encoded.answer_ids)
    figures = Exam(path, processor, batch_size=5).sit(model)
    assert figures.questions == 24
    assert figures.exact == pytest.approx(100 * np.mean(exact))
    assert figures.colour >= figures.exact


# ---- measures


def test_chance_above_by_counting_pairs():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 5, 40).astype(float), rng.integers(-2, 3, 30).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert measures.chance_above(positive, negative) == pytest.approx(np.mean(pairs))
    assert np.isnan(measures.chance_above(positive, np.empty(0)))


# ---- the table of null images


def test_colours_against_habit_are_told_by_their_object():
    answer = "two things: a red cup and a yellow banana.".replace(":", " :").replace(".", " .").split()
    assert [word for word, yes in zip(answer, nulls.against_habit(answer), strict=True) if yes] == ["red"]
    for colour, contrary in (("teal", True), ("white", False)):
        assert any(nulls.against_habit(["the", "cup", "is", colour, "."])) is contrary


def test_null_figures_by_hand():
    words = ["a", "red", "cup", "yellow", "banana", "two", "</s>"]
    vig = [0.0, 2.0, 3.0, 0.5, 4.0, 1.0, 0.25]
    row = ScoreRow(
        "k", "i", "", "ok", list(range(7)), list(range(7)), [1.0] * 7, [1 + value for value in vig]
    )
    found = nulls.figures([row], words)
    assert (found.contrary, found.canonical, found.object) == (1.0, pytest.approx(2 / 3), 1.0)
    assert found.vig == {"colour": 1.25, "object": 3.5, "function": 0.0}


def test_the_page_on_null_images_says_what_its_command_measures(tmp_path):
    page = (ROOT / "docs" / "null-images.md").read_text(encoding="utf-8")
    lines = nulls.MARKS.search(page)[0].splitlines()
    assert len(lines) == 2 + len(nulls.NULLS)
    records = nulls.answered_by_looking(dataset.SAMPLES, dataset.DATA_SEED)
    assert f"the {len(records)} of its {dataset.SAMPLES:,}" in page
    default = NullSettings()
    found = nulls.measure(default, dataset.write_records(tmp_path, "seen", records))
    empty = found._replace(vig=dict.fromkeys(measures.CLASSES, 0.0))
    for null, line in zip(nulls.NULLS, lines[2:], strict=True):
        made = nulls.table([(null, found if null == default else empty)]).splitlines()
        assert lines[:2] == made[:2] and line.split("|")[1] == made[2].split("|")[1]
        if null == default:
            numbers = [
                [float(n) for n in re.findall(r"\d\.\d+", text.split("|", 2)[2])] for text in (line, made[2])
            ]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.011)
    demo = (ROOT / "docs" / "the-demo.md").read_text(encoding="utf-8")
    said = re.search(r"object words (\S+), colour words (\S+), function words (\S+) ", demo)
    assert [float(number) for number in said.groups()] == pytest.approx(
        [found.vig[name] for name in ("object", "colour", "function")], abs=0.0051
    )


def test_intervals_over_seeds_are_those_of_the_t_distribution():
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in (2, 3, 11, 12, 40):
        values = rng.normal(70, 3, n)
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        found = measures.mean_interval(values)
        assert found == pytest.approx((values.mean(), (high - low) / 2), rel=2e-4)
    three = measures.mean_interval(np.array([1.5, 2.8, 2.0]))
    assert (three.signed, str(three), three.excludes_zero) == ("+2.1 ± 1.6", "2.1 ± 1.6", True)
    assert not measures.mean_interval(np.array([-1.0, 2.0])).excludes_zero
    alone = measures.mean_interval(np.array([3.0]))
    assert (str(alone), alone.excludes_zero) == ("3.0", False)
    with pytest.raises(ValueError, match="at least one seed"):
        measures.mean_interval(np.array([]))


def test_the_arms_table_claims_what_its_intervals_allow():
    colour = {"all": (75.8, 76.5, 76.2), "random": (74.2, 68.8, 58.5), "vig": (77.3, 79.3, 78.2)}
    base = {"arm": "base", "seed": None, "questions": 600, "colour": 64.3, "exact": 60.2}
    rows = [
        {"arm": arm, "seed": seed, "colour": value, "exact": value - 4, "tokens": 14_000}
        for arm, values in colour.items()
        for seed, value in enumerate(values)
    ]
    console = Console(record=True, width=160, file=io.StringIO())
    claims = run._show_arms(console, [base, *rows])
    said = console.export_text()
    assert "VIG, p = 70 minus all tokens: +2.1 ± 1.6 points\n" in said
    assert "random, same count minus the base: +2.9 ± 19.8 points: no difference is claimed" in said
    assert "78.3 ± 2.5" in said and "paired t over 3 seeds" in said
    assert claims == {
        "all tokens minus the base": True,
        "random, same count minus the base": False,
        "VIG, p = 70 minus the base": True,
        "VIG, p = 70 minus all tokens": True,
        "VIG, p = 70 minus random, same count": False,
    }


def test_what_is_left_of_the_trainings_is_told():
    told = [run._left(done, here=3, jobs=8, seconds=10.0 * done) for done in range(1, 9)]
    assert told[:3] == ["; 7 left, about 20 s", "; 6 left, about 10 s", "; 5 left"]
    assert told[6:] == ["; 1 left", ""]


def test_jobs_are_read_as_they_are_written():
    assert Job.parse(str(Job("random", 2))) == Job("random", 2)
    for text in ("random", "best:1", "vig:x"):
        with pytest.raises(ValueError, match=text):
            Job.parse(text)


def test_photographs_of_any_size_fit_the_checkpoint(scorer):
    picture = Image.effect_noise((300, 200), 60).convert("RGB")
    found = scorer.loaded.processor(images=[picture], text="<image>", return_tensors="pt")
    assert found["pixel_values"].shape == (1, 3, scenes.SIDE, scenes.SIDE)
