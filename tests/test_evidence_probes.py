"""The evidence experiment's probes, made small: what is asked, the lines, and the tables that are made of them."""

from __future__ import annotations

import pytest

from benchmarks.evidence import command, design, probes, store, tables
from benchmarks.evidence.design import UNTUNED, Run
from benchmarks.evidence.probes import Sizes
from vig.demo import scenes

TINY = Sizes(questions=6, triples=2, of_kind=2)


def test_the_plan_is_the_base_and_three_seeds_of_each_arm():
    runs = probes.plan()
    known = set(design.runs(design.plan()))
    assert runs[0] == Run("shipped", 0.0, 0, UNTUNED) and set(runs) <= known
    assert [(run.seed, run.arm) for run in runs[1:]] == [
        (seed, arm) for seed in (1100, 1101, 1102) for arm in ("all", "vig", "easy")
    ]
    assert {run.share for run in runs[1:]} == {0.5}
    assert len(probes.plan(1)) == 4


def test_a_claim_is_neither_true_nor_usual():
    questions = probes.parts(Sizes(questions=200, triples=1, of_kind=1))[0]
    for record in questions.records:
        _, name, _, colour = questions.fields[record.id]["claim"].rstrip(".").split()
        item = record.scene.find(name)
        assert record.turn.truth.startswith(f"the {name} is ")
        assert colour in scenes.COLOURS and colour not in (item.colour, scenes.CANONICAL[name])


def test_the_questions_are_those_of_no_run():
    seeds = {probes.SEED}
    assert not seeds & {0, 77, *design.SEEDS, *design.RATE_SEEDS, *design.HABIT_SEEDS}
    assert not seeds & {seed for seed, _ in design.EXAMS.values()}
    assert [part.records for part in probes.parts(TINY)] == [part.records for part in probes.parts(TINY)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The lines of the base and of one seed, through the command, which is stopped after the second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(design, "SAMPLES", 80)
    patch.setitem(design.TRAINING, "max_steps", 2)
    patch.setattr(probes, "Sizes", lambda: TINY)
    folder = tmp_path_factory.mktemp("probes")
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.run_probes(folder, 1, stop)
    command.run_probes(folder, 1, said.append)
    patch.undo()
    return said, store.read(folder / probes.NAME)[1]


def test_the_command_goes_on_where_it_stopped(found):
    said, lines = found
    assert list(lines) == probes.plan(1)
    assert said[:2] == ["shipped/0/0/untuned was probed", "shipped/0.5/1100/all was probed"]
    assert len(said) == 5 and said[4].startswith("4 models stand in ")


def test_every_probe_has_figures_of_every_model(found):
    lines = found[1]
    keys = {run: [tuple(figure[:3]) for figure in line["figures"]] for run, line in lines.items()}
    base = keys[probes.plan()[0]]
    assert all(of_run == base for of_run in keys.values())
    assert {probe for probe, _, _ in base} == {"misleading-text", "attention", "match", "modality"}
    assert ("attention", "layer 3", "on image tokens") in base
    assert ("match", "conflict", "VIG") in base
    assert {group for probe, group, _ in base if probe == "modality"} == {"all", *probes.KINDS}
    attention = [
        [figure[4] for figure in line["figures"] if figure[0] == "attention"] for line in lines.values()
    ]
    assert len({tuple(values) for values in attention}) == len(lines), "no two models attend alike"


def test_the_tables_hold_the_lines_figures(found):
    lines = found[1]
    of = dict(tables.probes(lines))
    assert list(of) == ["misleading-text", "attention", "match", "modality"]
    base, tuned = (lines[run]["figures"] for run in probes.plan(1)[:2])
    place = [figure[:3] for figure in base].index(["match", "conflict", "VIG"])
    row = next(row for row in of["match"].splitlines() if "conflict: VIG, nats" in row)
    value, low, high = base[place][4:]
    assert f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" in row
    assert "{0:+.2f} ({0:+.2f} to {0:+.2f})".format(tuned[place][4]) in row
    assert of["modality"].splitlines()[0].startswith("| modality | base, untuned | all tokens, n = 1 | ")
