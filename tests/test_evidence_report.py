"""The page, the README's block and the verdicts, from synthetic lines of known effect."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.evidence import advice, analysis, design, probes, report, store, verdict
from benchmarks.evidence.analysis import Estimate, Lines
from benchmarks.evidence.design import EXAMS, Run
from benchmarks.evidence.exams import digits, packed, percent


def made(effect, runs, seed=0) -> dict[Run, dict]:
    """A line of each run: `effect(run)` on top of 70 % right, seeds and questions scattered."""
    rng = np.random.default_rng(seed)
    luck = {number: rng.normal(0, 0.01) for number in sorted({run.seed for run in runs})}
    lines = {}
    for run in runs:
        right = 0.7 + luck[run.seed] + effect(run)
        bits = rng.random(EXAMS["test"][1]) < right
        absent = rng.binomial(3, 0.1, EXAMS["captions"][1])
        line = run._asdict() | {"seconds": {"training": 8.0}}
        if run.arm != design.UNTUNED:
            line |= {
                f"{name}_{part}": number
                for name, numbers in {"samples": (6, 9), "tokens": (30, 80), "wrong": (1, 4)}.items()
                for part, number in zip(("kept", "total"), numbers, strict=True)
            }
            line |= {"trained_samples": 9, "trained_tokens": 20_000, "trained_text_tokens": 5000}
        if run.is_rate_check:
            line["validation_colour"] = 100 * right
        else:
            line |= {"captions_named": digits(np.full(len(absent), 3)), "captions_absent": digits(absent)}
            line |= {
                "chair_i": 100 * absent.sum() / 3 / len(absent),
                "chair_s": percent(absent > 0),
                "recall": 95.0,
            }
            line |= {"test_habit": 5.0, "prior_colour": 80.0, "text_loss": 0.2}
            for part in ("colour", "exact"):
                line |= {f"test_{part}": percent(bits), f"test_{part}_bits": packed(bits)}
        lines[run] = line
    return lines


def stored(folder, lines: dict[Run, dict]) -> report.Places:
    path = folder / store.NAME
    store.begin(path, {"commit": "abc", "date": "2026-11-28"})
    for line in lines.values():
        store.append(path, line)
    return report.places_of(path)


ALL = design.runs(design.plan(3))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(analysis, "DRAWS", 1000)
    analysis._draws.cache_clear()
    yield
    analysis._draws.cache_clear()


@pytest.mark.parametrize(
    ("most", "none", "word"), [(0.1, -0.1, "holds"), (0.1, 0.0, "holds in part"), (0.0, 0.0, "does not hold")]
)
def test_the_verdict_follows_the_numbers(most, none, word):
    lines = made(
        lambda run: {0.75: most, 0.0: none}.get(run.share, 0) * (run.arm == "vig"), design.runs(design.plan())
    )
    said = verdict.helps_and_harms(Lines(lines))
    assert f"**{word}**" in said
    assert verdict.interval(analysis.estimate(Lines(lines), analysis.difference("vig", "all", 0.75))) in said


@pytest.mark.parametrize(
    ("change", "word"),
    [(0.1, "**holds: the more"), (-0.1, "**the reverse of this holds"), (0.0, "**is not shown")],
)
def test_the_primary_verdict_has_three_ways_out(change, word):
    runs = design.runs(design.plan())
    lines = made(lambda run: change * run.share * (run.arm == "vig") / 0.75, runs, seed=4)
    assert word in verdict.primary(Lines(lines))


def test_every_loss_is_listed():
    lines = made(lambda run: -0.1 * (run.arm == "vig"), design.runs(design.plan()))
    said = verdict.losses(Lines(lines))
    assert sum("VIG, p = 70 against all tokens, right colour" in line for line in said) == len(design.SHARES)
    assert any(line.startswith("VIG, p = 70 against all tokens, habit base, right colour") for line in said)


@pytest.mark.parametrize(
    ("most", "none", "wanted"),
    [
        (0.1, -0.1, ("VIG beats all tokens in right colour at 75 % blind", "On clean data train on all tokens: ")),
        (0.0, 0.0, ("At no share of blind answers is VIG shown to beat all tokens", "nothing is shown either way")),
        (-0.1, 0.0, ("At no share", "It is worse at 75 % blind answers.")),
    ],
)  # fmt: skip
def test_what_to_conclude_follows_the_tests(most, none, wanted):
    effect = lambda run: {0.75: most, 0.0: none}.get(run.share, 0) * (run.arm == "vig")  # noqa: E731
    said = advice.conclusions(Lines(made(effect, design.runs(design.plan()), seed=1)))
    assert all(text in said[0] for text in wanted), said[0]
    assert said[-1] == advice.YOURS and "needs one pass" in said[1]


def test_a_filter_that_does_as_well_and_one_that_does_not():
    runs = design.runs(design.plan())
    both = made(lambda run: 0.1 * (run.arm in ("vig", "loss filter")), runs)
    assert (
        "In right colour no difference is shown at 0, 25, 50 and 75 %" in advice.conclusions(Lines(both))[1]
    )
    alone = made(lambda run: 0.1 * (run.arm == "vig") * (run.share != 0.5), runs)
    said = advice.conclusions(Lines(alone))[1]
    assert "VIG is better at 0, 25 and 75 % blind answers; no difference is shown at 50 %" in said


def test_described_losses_are_on_the_worse_side_alone():
    rng = np.random.default_rng(0)
    lines = made(lambda run: 0.0, [run for run in design.runs(design.plan()) if not run.is_rate_check])
    for run, line in lines.items():
        worse = -5.0 * (run.arm == "vig" and run.share == 0.25)
        line["prior_colour"] = 80 + worse + rng.normal(0, 0.5)
        line["text_loss"] = 0.2 - 0.1 * (run.arm == "easy") + rng.normal(0, 0.01)
        line["chair_s"] = 5 - worse + rng.normal(0, 0.5)
        line["recall"] = 90.0
    found = [line for line in advice.described_losses(Lines(lines)) if "25 %" in line]
    assert any(
        line.startswith("VIG, p = 70 against all tokens, right colour where habit is right: -")
        for line in found
    )
    assert any(line.startswith("VIG, p = 70 against all tokens, CHAIR_s: +") for line in found)
    assert not any("text-only" in line and "easy" in line for line in advice.described_losses(Lines(lines)))


def test_losses_that_adjustment_hides_are_listed_apart():
    comparisons = [
        analysis.difference("vig", other, share)
        for other in ("all", "loss filter")
        for share in design.SHARES
    ]
    tests = [
        analysis.Tested(one, Estimate(10, mean, mean - 1, mean + 1, 0.01), p)
        for one, mean, p in zip(comparisons, (-2, -2, -0.5, 2, 2, 2, 2, 2), (0.01, *[0.2] * 7), strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "FAMILIES", {"secondary": ()})
        patch.setattr(analysis, "tested", lambda lines, family: tests)
        found = advice.near_losses(Lines({}))
    assert found == ["VIG, p = 70 against all tokens, right colour at 25 %: -2.0 ± 1.0 (p = 0.200)"]


@pytest.mark.parametrize(("permuted", "blames"), [(1, True), (5, False)])
def test_wrong_tokens_are_compared_with_permuted_values(permuted, blames):
    lines = made(lambda run: 0.0, ALL)
    for run, line in lines.items():
        if "wrong_kept" in line:
            line["wrong_kept"] = {"vig": 3, "permuted": permuted}.get(run.arm, 2)
    said = advice.wrong_kept(Lines(lines))
    assert f"3 and {permuted} at 25 %" in said and ("choice of samples that avoids" in said) == blames


def test_the_swing_of_whole_answers_is_told():
    lines = made(lambda run: 0.0, ALL)
    for run, line in lines.items():
        if run.base == "shipped" and run.arm == "vig":
            line["test_exact"] = 20.0 if run.seed == 1100 else 77.0
    assert "right in 20 to 77 % of cases with VIG, " in advice.swings(Lines(lines))


def test_the_probes_stand_in_the_page_once_they_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr(report.figures, "draw", lambda lines, folder: [])
    places = stored(tmp_path, made(lambda run: 0.0, ALL))
    report.write(places)
    assert "evidence --probes` makes them" in places.page.read_text()
    path = tmp_path / probes.NAME
    store.begin(path, {})
    for place, run in enumerate(probes.plan()):
        figures = [
            ["attention", "layer 0", "on image tokens", 9, 0.2 + place / 100, 0.1, 0.3],
            ["attention", "layer 0", "image tokens", 9, 0.64, 0.64, 0.64],
            ["match", "conflict", "VIG", 9, -0.5 * place, -1.0, 0.25],
            ["match", "match - conflict", "VIG", 9, 1.0, 1.0, 1.0],
        ]
        store.append(path, run._asdict() | {"figures": figures})
    report.write(places)
    page = places.page.read_text()
    assert "| layer 0: on image tokens, % | 20.0 [10.0, 30.0] | 24.0 (21.0 to 27.0) | " in page
    assert "| conflict: VIG, nats | 0.00 [-1.00, +0.25] | -2.00 (-3.50 to -0.50) | " in page
    text = " ".join(page.split())
    assert "match - conflict" not in text
    assert "put 64 % on image tokens" in text and "on 3 of the seeds" in text


def test_the_page_stands_beside_lines_of_elsewhere(tmp_path):
    places = stored(tmp_path, made(lambda run: 0.0, ALL))
    places.readme.write_text("before\n<!-- evidence -->\nold\n<!-- /evidence -->\nafter\n")
    written = report.write(places)
    assert {path.name for path in written} == {
        "evidence.md", "evidence-differences.png", "evidence-arms.png", "README.md",
    }  # fmt: skip
    page = places.page.read_text()
    for name in re.findall(r"\]\((plots/[^)]+)\)", page):
        assert (tmp_path / name).exists()
    for name in design.NAMES.values():
        assert name in page
    assert "nan" not in page and "None" not in page
    block = places.readme.read_text()
    assert block.startswith("before\n<!-- evidence -->\n- ") and block.endswith("<!-- /evidence -->\nafter\n")
    assert "old" not in block and sum(line.startswith("- ") for line in block.splitlines()) == 3
    assert max(map(len, block.splitlines())) <= 120
    assert report.page(*_read(places)) == page


def _read(places: report.Places) -> tuple:
    head, found = store.read(places.lines)
    return head, Lines(found), len(found)


def test_a_readme_without_marks_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report.figures, "draw", lambda lines, folder: [])
    places = stored(tmp_path, made(lambda run: 0.0, ALL))
    places.readme.write_text("nothing here\n")
    assert places.readme not in report.write(places)
    assert places.readme.read_text() == "nothing here\n"


def test_part_of_the_runs_make_a_page_that_says_so(tmp_path):
    runs = [run for run in design.runs(design.plan(1)) if run.base == "shipped" and not run.is_rate_check]
    places = stored(tmp_path, made(lambda run: 0.0, runs[:8]))
    report.write(places)
    page = places.page.read_text()
    assert "8 of 378 lines" in page and "Not run" in page and "Primary: not tested" in page
    assert "nan" not in page


def test_no_lines_are_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.write(report.places_of(tmp_path / store.NAME))


def test_numbers_as_they_are_written():
    nan = float("nan")
    assert verdict.number(-0.04) == "0.0" and verdict.number(2) == "+2.0"
    assert verdict.interval(Estimate(3, 5.84, 2.6, 9.0, 0.01)) == "+5.8 ± 3.2"
    assert verdict.interval(Estimate(1, 5.84, nan, nan, nan)) == "+5.8"
    assert verdict.interval(Estimate(0, nan, nan, nan, nan)) == "not run"
    assert (verdict.probability(0.0004), verdict.probability(0.05)) == ("p < 0.001", "p = 0.050")
