"""The probes on hand-worked values, and end to end on the miniature, before and after a short training."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vig.cli import app
from vig.data.sample import DataError, Sample, text_of
from vig.data.samples import read_samples
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import test_records as anti_prior_records
from vig.demo.dataset import triple_records, tuning_records, write_records
from vig.demo.evaluate import Exam
from vig.evaluation.probes import data as probe_data
from vig.evaluation.probes.data import ProbeData, read_probe_data
from vig.evaluation.probes.findings import Findings, Unit, compare, estimate
from vig.evaluation.probes.match import of_pair
from vig.evaluation.probes.misleading_text import (
    Trial,
    by_generation,
    by_likelihood,
    make_trials,
    misled,
)
from vig.evaluation.probes.modality import of_row
from vig.evaluation.probes.run import by_group, run_probes
from vig.evaluation.probes.settings import ProbeSettings
from vig.evaluation.probes.show import show_result
from vig.evaluation.probes.table import PROBES, check_probes
from vig.scoring.scorer import Scorer
from vig.scoring.settings import RunSpec
from vig.store.rows import ScoreRow
from vig.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

# --- hand-worked ---


def unit(key: str, image: str, **values: float) -> Unit:
    return Unit(key, image, {"all": values})


def test_a_figure_is_the_mean_over_samples_that_have_the_measure():
    units = [
        unit("a", "x", right=1.0, flips=1.0),
        unit("b", "x", right=0.0),
        unit("c", "y", right=1.0, flips=0.0),
    ]
    figures = {figure.measure: figure for figure in estimate(units, resamples=400)}
    assert (figures["right"].n, figures["right"].value) == (3, 2 / 3)
    assert (figures["flips"].n, figures["flips"].value) == (2, 1 / 2)
    # two images: of four equally likely draws one is x alone (1/2 right, 1 flips), one y alone (1 right, 0 flips)
    assert (figures["right"].low, figures["right"].high) == (1 / 2, 1.0)
    assert (figures["flips"].low, figures["flips"].high) == (0.0, 1.0)


def test_images_are_drawn_whole():
    """100 copies of one question about each of 20 images tell no more than the 20."""
    rng = np.random.default_rng(0)
    of_image = rng.integers(0, 2, 20).astype(float)
    one = [unit(f"{i}", f"{i}", right=value) for i, value in enumerate(of_image)]
    many = [unit(f"{i}-{j}", f"{i}", right=value) for i, value in enumerate(of_image) for j in range(100)]
    few, more = estimate(one, 2000)[0], estimate(many, 2000)[0]
    assert (few.low, few.high) == pytest.approx((more.low, more.high))
    half_width = 1.96 * of_image.std() / 20**0.5
    assert (few.high - few.low) / 2 == pytest.approx(half_width, rel=0.15)


def test_one_image_has_no_interval():
    assert estimate([unit("a", "x", right=1.0), unit("b", "x", right=0.0)], 200)[0][-3:] == (0.5, None, None)


def test_changes_are_of_the_samples_that_both_sides_have():
    before = [unit("a", "x", right=0.0), unit("b", "y", right=1.0), unit("gone", "z", right=1.0)]
    after = [unit("new", "w", right=0.0), unit("b", "y", right=1.0), unit("a", "x", right=1.0)]
    change = compare(after, before, resamples=400)[0]
    assert (change.n, change.baseline, change.value, change.difference) == (2, 0.5, 1.0, 0.5)
    assert (change.low, change.high) == (0.0, 1.0)  # x alone gains one, y alone nothing


def test_changes_are_paired():
    """Both sides swing with the pictures, and the difference does not."""
    rng = np.random.default_rng(1)
    base = rng.normal(size=60) * 10
    before = [unit(str(i), str(i), VIG=value) for i, value in enumerate(base)]
    after = [unit(str(i), str(i), VIG=value + 0.25) for i, value in enumerate(base)]
    change = compare(after, before, resamples=500)[0]
    assert (change.low, change.difference, change.high) == pytest.approx((0.25, 0.25, 0.25))
    assert estimate(after, 500)[0].high - estimate(after, 500)[0].low > 3


def row(image, null=(), ids=(5, 6), most_image=(), most_null=()) -> ScoreRow:
    stats = {
        "token_argmax_image": np.array(most_image or ids, np.float32),
        "token_argmax_null": np.array(most_null or ids, np.float32),
    }
    return ScoreRow(
        "k", "i", token_ids=ids, token_nll_image=image, token_nll_null=null or image, token_stats=stats
    )


def test_likelihood_compares_whole_answers():
    # plainly 0.5 < 2.0 nats: right; misled 3.0 > 1.0: the claim wins
    rows = [row((0.25, 0.25)), row((1.0, 1.0)), row((1.5, 1.5)), row((0.5, 0.5))]
    values, nll = by_likelihood(rows)
    assert values == {"right, plain": 1.0, "right, misled": 0.0, "flips": 1.0, "lost": 1.0}
    assert nll == [0.5, 2.0, 3.0, 1.0]
    values, _ = by_likelihood([rows[1], rows[0], rows[1], rows[0]])
    assert values == {"right, plain": 0.0, "right, misled": 0.0}, "flips are of answers that were right"
    values, _ = by_likelihood([rows[0], rows[1], rows[0], rows[0]])
    assert values == {"right, plain": 1.0, "right, misled": 0.0, "flips": 0.0, "lost": 1.0}, (
        "a tie is not right"
    )


@pytest.mark.parametrize(
    ("plainly", "beside", "expected"),
    [
        ("Red.", "red", (1, 1, 0, 0)),
        ("red", "It is blue", (1, 0, 0, 1)),
        ("red", " BLUE. ", (1, 0, 1, 1)),
        ("green", "blue", (0, 0)),
    ],
)
def test_generation_is_judged_by_exact_match(plainly, beside, expected):
    assert tuple(by_generation(plainly, beside, "red", "blue").values()) == expected


def test_match_counts_a_pair_in_order_only_if_vig_falls_each_time():
    order = ("match", "partly", "conflict")
    values = of_pair({"match": 1.5, "partly": 0.5, "conflict": -1.0}, order)
    assert values["match - partly"] == {"VIG": 1.0} and values["match - conflict"] == {"VIG": 2.5}
    assert values["match > partly > conflict"] == {"in order": 1.0}
    values = of_pair({"match": 1.5, "partly": 0.5, "conflict": 0.5}, order)
    assert values["match > partly > conflict"] == {"in order": 0.0}


def test_modality_measures_of_one_sample():
    found = of_row(row((0.1, 0.2), (0.12, 0.22), most_null=(5, 9)), near_zero=0.05)
    assert found.pop("VIG") == pytest.approx(0.02)
    assert found == {"near zero": 1.0, "right, image": 1.0, "right, null": 0.0, "gain": 1.0}
    assert of_row(row((0.1, 0.2), (0.2, 0.3)), near_zero=0.05)["near zero"] == 0.0
    assert of_row(row((0.1, 0.2), (0.0, 0.1)), near_zero=0.05)["near zero"] == 0.0, "negative VIG is not none"


# --- statements ---


def sample(key: str, question: str, answer: str, source: str = "s.json", *more) -> Sample:
    image = {"type": "image"}
    turns = [("user", [image, {"type": "text", "text": f"\n{question}"}]), ("assistant", answer), *more]
    messages = tuple(
        {"role": role, "content": [{"type": "text", "text": text}] if isinstance(text, str) else text}
        for role, text in turns
    )
    return Sample(key, key, (b"picture " + key.encode(),), messages, source)


def trials(samples: list[Sample], fields=None, **settings) -> tuple[list[Trial], Findings]:
    found = Findings([])
    return make_trials(ProbeData(samples, fields=fields or {}), ProbeSettings(**settings), found), found


def test_a_claim_is_an_answer_of_the_same_source_and_if_possible_of_the_same_form():
    samples = [
        sample("a", "Is it red?", "Yes"),
        sample("b", "is it  red?", "no."),
        sample("c", "What is it?", "a red cat"),
        sample("d", "Who is it?", "the old man"),
        sample("e", "Is it red?", "never ever", "other.json"),
        sample("f", "Is it tall?", "Maybe", "other.json"),
    ]
    made, found = trials(samples)
    assert {trial.sample.key: trial.claim for trial in made} == {
        "a": "no.", "b": "Yes", "c": "the old man", "d": "a red cat", "e": "Maybe", "f": "never ever",
    }  # fmt: skip
    assert found.errors == []
    assert [trial.claim for trial in trials(samples[::-1])[0]] == [trial.claim for trial in made[::-1]]


def test_claims_differ_from_seed_to_seed_alone():
    samples = [sample(f"k{i}", "Which?", f"number {i}") for i in range(20)]
    claims = [[trial.claim for trial in trials(samples, seed=seed)[0]] for seed in (3, 3, 4)]
    assert claims[0] == claims[1] != claims[2]
    assert all(claim != f"number {i}" for i, claim in enumerate(claims[0]))


def test_what_cannot_be_claimed_is_an_error_of_its_sample():
    made, found = trials([sample("a", "Which?", "Red."), sample("b", "Which?", "red")])
    assert made == [] and len(found.errors) == 2
    assert found.errors[0][2].startswith("no other answer of source 's.json' could be claimed. Give a field")
    fields = {"a": {"lie": "blue"}, "b": {"lie": "Red "}}
    made, found = trials([sample(key, "Which?", "red") for key in "abc"], fields, claim="lie")
    assert [trial.claim for trial in made] == ["blue"]
    assert [message for _, _, message in found.errors] == [
        "the claim 'Red ' is its answer. Correct the field 'lie'",
        "its record has no field 'lie'. Add it to the record, or give a JSON file {id: {field: value}} with --fields",
    ]


def test_the_statement_stands_between_image_and_question_of_the_first_turn():
    later = (("user", "Sure?"), ("assistant", "Yes"))
    made, _ = trials([sample("a", "Which?", "red", "s.json", *later), sample("b", "Which?", "blue")],
                     statement="Hint: {claim}!")  # fmt: skip
    assert text_of(made[1].misled.messages[0]) == "\nHint: red!\nWhich?"
    assert made[0].misled.messages[0]["content"][0] == {"type": "image"}
    plain_answer, plain_claim, misled_answer, misled_claim = made[1].variants()
    assert [text_of(one.messages[-1]) for one in made[1].variants()] == ["blue", "red", "blue", "red"]
    assert plain_answer == made[1].sample and plain_claim.messages[0] == plain_answer.messages[0]
    assert misled_answer == made[1].misled and misled_claim.messages[0] == misled_answer.messages[0]
    bare = Sample("k", "k", (b"",), ({"role": "user", "content": [{"type": "image"}]},), "s")
    assert misled(bare, "It is so").messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "It is so"},
    ]


def test_later_turns_and_images_behind_the_first_answer_are_left_out():
    later = (("user", [{"type": "image"}, {"type": "text", "text": "And this?"}]), ("assistant", "Yes"))
    one = sample("a", "Which?", "red", "s.json", *later)
    one = Sample(one.key, one.id, (b"first", b"second"), one.messages, one.source)
    made, _ = trials([one, sample("b", "Which?", "blue")])
    assert made[0].sample.images == (b"first",) and len(made[0].sample.messages) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statement": "It is red"}, "statement = 'It is red', expected a text with {claim} in it"),
        ({"judges": ("taste",)}, "judges = ('taste',), expected one or both of likelihood, generation"),
        ({"judges": ()}, "judges = (), expected one or both"),
        ({"order": ("match",)}, "order = 'match', expected two or more different groups"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0, expected at least 1"),
        ({"near_zero": float("nan")}, "near_zero = nan, expected more than 0 nats"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ProbeSettings(**settings)


def test_the_table_names_what_it_has():
    with pytest.raises(ValueError, match=f"probe = 'eyes', expected one of {', '.join(PROBES)}"):
        check_probes(["match", "eyes"])
    assert check_probes(["match", "attention", "match"]) == ("attention", "match")
    for probe in PROBES.values():
        assert set(probe.settings) <= set(ProbeSettings.__dataclass_fields__)


# --- the miniature ---

STATEMENT = "the picture: {claim}"  # in words that the tiny tokenizer knows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """test.json as it is; triples.json and tune.json with the truth in their records."""
    folder = tmp_path_factory.mktemp("probes")
    write_records(folder, "test", anti_prior_records(48, 0))
    write_records(folder, "triples", triple_records(24, 0))
    write_records(folder, "tune", tuning_records(60, 0))
    for name in ("triples", "tune"):
        records = json.loads((folder / f"{name}.json").read_text())
        truth = json.loads((folder / f"{name}.truth.json").read_text())
        for record in records:
            record |= {"kind": truth[record["id"]]["kind"], "match": truth[record["id"]]["match"],
                       "pair": record["id"].rpartition("-")[0]}  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def scorer():
    return Scorer(str(CHECKPOINT), dtype="float32")


def test_match_shows_table_1_of_the_paper(folder, scorer):
    result = run_probes(scorer, RunSpec(folder / "triples.json"), ["match"])[0]
    groups = by_group(result.figures)
    means = [groups[name]["VIG"].value for name in ("match", "partly", "conflict")]
    assert means[0] > means[1] > means[2] and groups["match - conflict"]["VIG"].low > 1
    assert groups["match - partly"]["VIG"].value == pytest.approx(means[0] - means[1])
    assert result.findings.notes == ["the order match > partly > conflict holds in the means of 24 pairs"]
    rows = scorer.score(read_samples(folder / "triples.json"))
    assert means[0] == pytest.approx(np.mean([row.vig for row in rows if row.id.endswith("match")]))


def test_a_wrong_order_is_said_and_pairs_that_lack_a_group_are_left_out(folder, scorer):
    settings = ProbeSettings(order=("conflict", "match", "partly"))
    result = run_probes(scorer, RunSpec(folder / "triples.json", limit=8), ["match"], None, settings)[0]
    assert result.findings.notes == [
        "1 of 3 pairs lack one of conflict, match, partly: left out",
        "the order conflict > match > partly DOES NOT HOLD in the means of 2 pairs",
    ]
    two = ProbeSettings(order=("match", "partly"))
    result = run_probes(scorer, RunSpec(folder / "triples.json", limit=6), ["match"], None, two)[0]
    assert len(result.findings.errors) == 2
    assert (
        result.findings.errors[0][2] == "its match is 'conflict', none of match, partly. Name it in --order"
    )


def test_modality_by_kind_agrees_with_the_demos_exam(folder, scorer):
    result = run_probes(scorer, RunSpec(folder / "test.json"), ["modality"])[0]
    figures = by_group(result.figures)["all"]
    exam = Exam(folder / "test.json", scorer.loaded.processor).sit(scorer.loaded.model)
    assert 100 * figures["right, image"].value == pytest.approx(exam.exact) and 40 < exam.exact < 100
    assert figures["right, null"].value < figures["right, image"].value
    assert list(by_group(result.figures)) == ["all", "test.json"]
    assert scorer.passes.stat_columns == [], "the scorer is left as it was"

    by = ProbeSettings(by="kind")
    result = run_probes(scorer, RunSpec(folder / "tune.json"), ["modality"], None, by)[0]
    kinds = by_group(result.figures)
    assert next(iter(kinds)) == "all" and {"colour", "caption"} <= set(kinds) and "text only" not in kinds
    assert sum(of["VIG"].n for name, of in kinds.items() if name != "all") == kinds["all"]["VIG"].n


def test_misleading_text_by_both_judges(folder, scorer):
    settings = ProbeSettings(statement=STATEMENT, max_new_tokens=10)
    shares = []
    result = run_probes(
        scorer, RunSpec(folder / "test.json"), ["misleading-text"], None, settings,
        on_share=lambda name, share: shares.append(share),
    )[0]  # fmt: skip
    assert shares == sorted(shares) and shares[-1] == 1.0
    groups = by_group(result.figures)
    assert groups["likelihood"]["right, plain"].value > 0.9
    assert 0.1 < groups["likelihood"]["flips"].value < 0.7
    exam = Exam(folder / "test.json", scorer.loaded.processor).sit(scorer.loaded.model)
    assert 100 * groups["generation"]["right, plain"].value == pytest.approx(exam.exact)
    # one sample by the model's own logits
    unit = result.findings.units[5]
    samples = {one.key: one for one in read_samples(folder / "test.json")}
    asked = misled(samples[unit.key], STATEMENT.replace("{claim}", unit.about["claim"]))
    encoded = scorer.encoder.encode(asked)
    batch = scorer.encoder.collate([encoded])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = scorer.loaded.model(**batch).logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    nll = -logits.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0][kept].sum()
    assert unit.about["nll"][2] == pytest.approx(float(nll), abs=1e-3)


def test_before_and_after_tuning(folder, tmp_path):
    """The same questions before and after a short training, through the command."""
    tuned = tmp_path / "tuned"
    train(
        str(CHECKPOINT),
        folder / "tune.json",
        None,
        tuned,
        max_steps=3,
        batch_size=8,
        lr=1e-3,
        dtype="float32",
    )
    probes = ["--probe", "modality", "--probe", "attention", "--limit", "24", "--dtype", "float32"]
    run = CliRunner().invoke
    before = run(
        app, ["probe", str(CHECKPOINT), str(folder / "test.json"), *probes, "-o", str(tmp_path / "0")]
    )
    assert before.exit_code == 0, before.output
    assert "layer 3" in before.stdout and "near zero" in before.stdout
    again = [str(tuned), str(folder / "test.json"), *probes, "--baseline", str(tmp_path / "0")]
    after = run(app, ["probe", *again, "-o", str(tmp_path / "1"), "--json"])
    assert after.exit_code == 0, after.output
    told = json.loads(after.stdout)["probes"]
    stored = [json.loads((tmp_path / "1" / f"{name}.json").read_text()) for name in ("attention", "modality")]
    assert [one["changes"] for one in told] == [one["changes"] for one in stored]
    old = json.loads((tmp_path / "0" / "attention.json").read_text())["figures"]
    for change, figure, earlier in zip(stored[0]["changes"], stored[0]["figures"], old, strict=True):
        assert change["value"] == figure["value"] and change["baseline"] == earlier["value"]
        assert change["low"] <= change["difference"] <= change["high"]
    moved = [change for change in stored[0]["changes"] if change["measure"] == "on image tokens"]
    assert any(change["difference"] != 0 for change in moved), "three steps move the attention"
    assert stored[1]["provenance"]["model"] == str(tuned) and stored[1]["samples"] == 24

    changed = run(app, ["probe", *again, "-o", str(tmp_path / "2"), "--near-zero", "0.5"])
    assert changed.exit_code == 1
    assert "was probed with near_zero = 0.05, this run has 0.5. Give the same --near-zero" in str(
        changed.exception
    )


def test_samples_that_cannot_be_probed_are_said_and_end_with_3(folder, tmp_path):
    records = json.loads((folder / "test.json").read_text())[:4]
    records[1]["image"] = "images/gone.png"
    records[2]["conversations"][1]["value"] = ""
    data = folder / "broken.json"
    data.write_text(json.dumps(records))
    done = CliRunner().invoke(app, ["probe", str(CHECKPOINT), str(data), "--probe", "attention", "--probe", "modality",
                                    "-o", str(tmp_path / "out")])  # fmt: skip
    assert done.exit_code == 3, done.output
    assert "no image at" in done.stdout and "gone.png" in done.stdout
    for name in ("attention", "modality"):
        stored = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert stored["units"] + len(stored["errors"]) == 4 and len(stored["errors"]) == 2


# --- data, and what is refused ---


def test_fields_come_from_the_records_or_from_a_file(folder, tmp_path):
    data = read_probe_data(RunSpec(folder / "triples.json", limit=5), ["match", "pair"])
    assert [data.of(one, "match") for one in data.samples] == [
        "match",
        "partly",
        "conflict",
        "match",
        "partly",
    ]
    assert data.of(data.samples[0], "source") == "triples.json"
    beside = tmp_path / "fields.json"
    beside.write_text(json.dumps({"triple-0000-partly": {"match": "half"}}))
    data = read_probe_data(RunSpec(folder / "triples.json", limit=5), ["match"], beside)
    assert data.fields == {"triples.json#1": {"match": "half"}}
    beside.write_text("[]")
    with pytest.raises(DataError, match="holds no object of objects"):
        read_probe_data(RunSpec(folder / "triples.json"), ["match"], beside)


def test_data_that_a_probe_cannot_use_are_refused_before_anything_is_scored(folder, scorer, tmp_path):
    run = RunSpec(folder / "test.json")
    with pytest.raises(DataError, match=re.escape("test.json has a field 'match'. Name another one")):
        run_probes(scorer, run, ["match"])
    with pytest.raises(
        DataError, match=re.escape("holds no attention.json. Run `vig probe ... --probe attention")
    ):
        run_probes(scorer, run, ["attention"], baseline=tmp_path)
    records = [one for one in json.loads((folder / "tune.json").read_text()) if "image" not in one]
    (tmp_path / "text.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=f"holds no sample with an image: {len(records)} are text alone"):
        run_probes(scorer, RunSpec(tmp_path / "text.json"), ["attention"])


def test_another_dataset_is_no_baseline(folder, scorer, tmp_path):
    run_probes(scorer, RunSpec(folder / "tune.json", limit=4), ["attention"], tmp_path / "a")
    with pytest.raises(DataError, match=r"a was probed on other data than .*test.json"):
        run_probes(scorer, RunSpec(folder / "test.json", limit=4), ["attention"], baseline=tmp_path / "a")


def test_a_baseline_whose_samples_hold_line_separators(folder, scorer, tmp_path):
    data = folder / "a\u2028b\x85c.json"
    data.write_bytes((folder / "tune.json").read_bytes())
    run_probes(scorer, RunSpec(data, limit=4), ["attention"], tmp_path / "a")
    result = run_probes(scorer, RunSpec(data, limit=4), ["attention"], baseline=tmp_path / "a")[0]
    assert result.changes and not result.unpaired


def test_claims_are_the_baselines(folder, scorer, tmp_path):
    """A limit changes the pool that claims are drawn from."""
    settings = ProbeSettings(judges=("likelihood",))
    run_probes(scorer, RunSpec(folder / "test.json", limit=6), ["misleading-text"], tmp_path / "a", settings)
    with pytest.raises(DataError, match=r"was probed with limit = 6, this run has 8\. Give the same --limit"):
        run_probes(
            scorer, RunSpec(folder / "test.json", limit=8), ["misleading-text"], None, settings,
            baseline=tmp_path / "a",
        )  # fmt: skip
    result = run_probes(
        scorer,
        RunSpec(folder / "test.json", limit=6),
        ["misleading-text"],
        None,
        settings,
        baseline=tmp_path / "a",
    )[0]
    assert result.changes and all(change.difference == 0 for change in result.changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--probe", "eyes"], f"expected one of {', '.join(PROBES)}"),
        (["--probe", "misleading-text", "--statement", "so"], "expected a text with {claim} in it"),
        (["--probe", "match", "--order", "match"], "expected two or more different groups"),
        (["--probe", "modality", "--null", "fog"], "null = 'fog'"),
    ],
)
def test_wrong_usage_ends_with_2_before_a_model_is_loaded(folder, options, said):
    done = CliRunner().invoke(app, ["probe", "nowhere", str(folder / "test.json"), "-o", "out", *options],
                              env={"COLUMNS": "200"})  # fmt: skip
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split()), done.output


def test_help_lists_every_probe():
    done = CliRunner().invoke(app, ["probe", "--help"], env={"COLUMNS": "400"})
    assert all(name in done.output for name in PROBES)


def test_images_of_equal_bytes_or_paths_are_one_image(folder):
    samples = list(read_samples(folder / "test.json"))
    assert probe_data.image_name(samples[0]) != probe_data.image_name(samples[1])
    assert probe_data.image_name(sample("a", "?", "x")) == probe_data.image_name(sample("a", "!", "y"))


def test_the_table_on_a_terminal_says_what_it_shows(folder, scorer, capsys):
    from rich.console import Console

    result = run_probes(scorer, RunSpec(folder / "test.json", limit=6), ["attention"])[0]
    show_result(Console(width=120), result)
    printed = capsys.readouterr().out
    first = by_group(result.figures)["layer 0"]["on image tokens"]
    shown = f"{100 * first.value:.1f} [{100 * first.low:.1f}, {100 * first.high:.1f}]"
    assert PROBES["attention"].question in printed and shown in printed
    assert "image tokens: of the tokens that an answer row sees" in printed
