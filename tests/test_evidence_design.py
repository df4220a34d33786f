"""What the experiment runs, in which order, and how its lines are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest

from benchmarks.evidence import command, design, store, workers
from benchmarks.evidence.design import Run
from benchmarks.evidence.exams import digits, packed, undigits, unpacked

GROUPS = design.plan()[2:5]


def test_the_design_is_what_the_page_says():
    runs = design.runs(design.plan())
    trained = [run for run in runs if run.arm != design.UNTUNED]
    core = [run for run in trained if run.seed in design.SEEDS and run.arm in design.ARMS]
    assert len(runs) == len(set(runs)) and len(trained) == 376
    assert len(core) == 270
    assert Counter(run.arm for run in core if run.share == 0.75) == dict.fromkeys(design.ARMS, 10)
    assert sum(run.arm in design.VARIANTS for run in trained) == 40
    assert sum(run.is_rate_check for run in trained) == 36
    assert sum(run.base == "habit" for run in trained) == 30
    assert len({str(run) for run in runs}) == len(runs)


def test_a_stop_leaves_whole_seeds():
    core = [group for group in design.plan() if group[0].arm == "all" and group[0].seed in design.SEEDS]
    assert [(group[0].seed, group[0].share) for group in core[:5]] == [
        *((design.SEEDS[0], share) for share in design.SHARES),
        (design.SEEDS[1], 0.0),
    ]


def test_fewer_seeds_are_never_fewer_arms():
    few, all_ = design.runs(design.plan(2)), design.runs(design.plan())
    without_seed = lambda runs: {run._replace(seed=0) for run in runs}  # noqa: E731
    assert without_seed(few) == without_seed(all_)
    assert set(few) < set(all_)
    with pytest.raises(ValueError, match="seeds = 11, expected 1 to 10"):
        design.plan(11)


def test_runs_are_found_by_their_names():
    for run in design.runs(design.plan()):
        assert design.find(str(run)) == run
    with pytest.raises(ValueError, match=r"one is 'shipped/0\.75/1100/vig'"):
        design.find("x")


def line(run: Run, **more) -> dict:
    return run._asdict() | more


def test_lines_come_back_by_run(tmp_path):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {"commit": "abc"})
    run = GROUPS[0][0]
    store.append(path, line(run, test_colour=1.5))
    head, found = store.read(path)
    assert head["commit"] == "abc" and found == {run: line(run, test_colour=1.5)}
    store.begin(path, {"commit": "def"})  # a second start leaves it
    assert store.read(path)[0]["commit"] == "abc"


def test_what_a_killed_process_left_of_a_line_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {})
    first, second = GROUPS[0][:2]
    store.append(path, line(first))
    with path.open("a") as file:
        file.write('{"base": "ship')
    assert list(store.read(path)[1]) == [first]
    store.append(path, line(second))
    assert list(store.read(path)[1]) == [first, second]
    assert all(json.loads(text) for text in path.read_text().splitlines())


def test_runs_of_another_design_are_not_mixed_in(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {})
    monkeypatch.setattr(design, "P", 60.0)
    with pytest.raises(store.OtherDesign, match="--out"):
        store.begin(path, {})


def test_only_missing_runs_are_claimed(tmp_path):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {})
    for run in (*GROUPS[0], GROUPS[1][0]):
        store.append(path, line(run))
    assert list(store.claims(path, GROUPS)) == [GROUPS[1][1:], GROUPS[2]]


def hold(path, ready):
    claims = store.claims(path, GROUPS)  # held as long as this generator lives
    next(claims)
    ready.set()
    signal.pause()


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {})
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(path, ready))
    process.start()
    try:
        assert ready.wait(60)
        assert list(store.claims(path, GROUPS)) == GROUPS[1:]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert list(store.claims(path, GROUPS)) == GROUPS


def test_a_base_that_is_not_there_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setitem(design.BASES, "habit", tmp_path / "nowhere")
    said: list[str] = []
    groups = workers.possible(design.plan(), said.append)
    assert {group[0].base for group in groups} == {"shipped"}
    assert said == [f"{tmp_path / 'nowhere'} holds no checkpoint: the 31 runs of the habit base are left out"]


def test_a_terminated_experiment_ends_its_processes(tmp_path, monkeypatch):
    path, pids = tmp_path / "lines.jsonl", tmp_path / "pids"
    store.begin(path, {})
    script = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(100)"
    monkeypatch.setattr(workers, "_command", lambda *_: [sys.executable, "-c", script])

    def end_when_both_run(text: str) -> None:
        while not pids.exists() or pids.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(workers, "POLL", 0.1)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        workers.run_all(
            path,
            1,
            2,
            lambda text: end_when_both_run(text) if " runs" in text and "left out" not in text else None,
        )
    assert signal.getsignal(signal.SIGTERM) == before
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_process_that_fails_ends_the_others_and_is_told(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    store.begin(path, {})
    monkeypatch.setattr(workers, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(workers, "POLL", 0.1)
    with pytest.raises(workers.WorkerFailed, match=r"lines\.log"):
        workers.run_all(path, 1, 2, lambda text: None)


def test_check_names_the_fields_that_differ(tmp_path, monkeypatch):
    run = GROUPS[0][0]
    path = tmp_path / store.NAME
    store.begin(path, {})
    store.append(path, line(run, test_colour=50.0, seconds={"training": 1.0}))
    again = line(run, test_colour=50.0, seconds={"training": 2.0})
    monkeypatch.setattr(command, "_line", lambda run: again)
    said: list[str] = []
    assert command.check(str(run), tmp_path, said.append)
    again["test_colour"] = 51.0
    assert not command.check(str(run), tmp_path, said.append)
    assert said[-1] == f"{run}: test_colour was 50.0, is 51.0"


@pytest.mark.parametrize("count", [1, 8, 13, 1000])
def test_bits_and_digits_come_back(count):
    rng = np.random.default_rng(count)
    bits, counts = rng.random(count) < 0.5, rng.integers(0, 10, count)
    assert (unpacked(packed(bits), count) == bits).all()
    assert (undigits(digits(counts)) == counts).all()
    with pytest.raises(ValueError, match="bits stored"):
        unpacked(packed(bits), count + 8)
