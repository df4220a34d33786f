"""`vig demo`: the end-to-end example, offline, in minutes, with the very commands that a user would type.

Draws scenes, scores them with and without sight, selects, tunes the shipped checkpoint in three ways on three seeds,
examines all of them where habit is always wrong, and writes the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from vig.demo.arms import ARMS, CHECKPOINT, TRAINING, Job, run_jobs
from vig.demo.dataset import (
    BLIND,
    DATA_SEED,
    MATCHES,
    SAMPLES,
    read_truth,
    test_records,
    triple_records,
    tuning_records,
    write_records,
)
from vig.demo.measures import mean_interval, vig_by, word_vig, words_of
from vig.training.folder import RECORD

NAMES = {"base": "base, untuned", "all": "all tokens", "random": "random, same count", "vig": "VIG, p = 70"}


def demo(
    folder: str | Path = "demo-output",
    *,
    samples: int = SAMPLES,
    questions: int = 600,
    triples: int = 120,
    seeds: int = 3,
    console: Console | None = None,
    command: Command | None = None,
) -> dict:
    """Run the miniature in `folder`; returns its figures, which stand in `folder`/figures.json too.

    samples: of the tuning data. questions: of the test. triples: captions with a matching, a partly matching and a
    conflicting picture. seeds: trainings of each arm. command: runs the words behind `vig` and returns the exit
    code; `python -m vig` in a process of its own unless given. One thread a process, two processes. Raises ValueError
    for a folder that holds anything but an earlier demo.
    """
    import torch

    started = time.monotonic()
    shell = Shell(console or Console(highlight=False, soft_wrap=True, emoji=False), command or _own_process)
    folder = _fresh(Path(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = _pipeline(folder, samples, questions, triples, seeds, shell)
    finally:
        torch.set_num_threads(threads)
    figures["seconds"] = round(time.monotonic() - started, 1)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    shell.console.print(f"\nreport: {folder / 'report.html'}   ({figures['seconds']:.0f} s)", markup=False)
    return figures


def _pipeline(folder: Path, samples: int, questions: int, triples: int, seeds: int, shell: Shell) -> dict:
    console = shell.console
    tune = write_records(folder, "tune", tuning_records(samples, DATA_SEED))
    write_records(folder, "test", test_records(questions, DATA_SEED))
    pairs = write_records(folder, "triples", triple_records(triples, DATA_SEED))
    console.print(
        f"drawn into {folder}: {samples:,} samples to tune on ({100 * BLIND:.0f} % of colours and captions answered "
        f"from habit), {questions:,} test questions, {triples:,} triples\n",
        markup=False,
    )
    scores, pair_scores, selection = folder / "scores", folder / "scores-triples", folder / "selection"
    shell.vig("score", CHECKPOINT, tune, "-o", scores)
    shell.vig("score", CHECKPOINT, pairs, "-o", pair_scores)
    figures = {
        "scores": _show_scores(console, scores, tune),
        "triples": _show_triples(console, pair_scores, pairs),
    }
    shell.vig("select", scores, "--p", 70, "-o", selection)
    for seed in range(seeds):
        chosen = folder / f"selection-random-{seed}"
        shell.vig("select", scores, "--p", 70, "--level", "random", "--seed", seed, "-o", chosen)
    figures["arms"] = _experiment(shell, folder, seeds)
    figures["claims"] = _show_arms(console, figures["arms"])
    shell.vig("report", scores, "--selection", selection, "-o", folder / "report.html")
    return figures


def _fresh(folder: Path) -> Path:
    """The folder, empty. An earlier demo in it is removed, nothing else is."""
    import shutil

    mark = folder / ".vig-demo"
    if folder.exists() and any(folder.iterdir()):
        if not mark.is_file():
            raise ValueError(f"{folder} is not empty and holds no earlier demo. Give another folder with -o")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("made by vig demo; removed by the next one\n", encoding="utf-8")
    return folder


# ---- commands

Command = Callable[[list[str]], int | None]


class Shell(NamedTuple):
    """Where the demo prints, and how it runs a command of `vig`."""

    console: Console
    command: Command

    def vig(self, *arguments: object) -> None:
        """Run a command, shown as it would be typed."""
        words = [str(argument) for argument in arguments]
        self.console.print(f"$ vig {' '.join(words)}", style="bold", markup=False)
        code = self.command(words)
        if code:
            raise RuntimeError(f"vig {words[0]} ended with exit code {code}")
        self.console.print()


def _own_process(words: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "vig", *words], check=False).returncode


# ---- what the scores show


def _show_scores(console: Console, scores: Path, data: Path) -> dict:
    from transformers import AutoTokenizer

    truth = read_truth(data)
    table = Table("kind of question", "samples", "mean VIG, nats", title="sample VIG", title_justify="left")
    kinds = vig_by("kind", scores, truth)
    for kind, values in sorted(kinds.items()):
        table.add_row(kind, f"{len(values):,}", f"{values.mean():+.3f}")
    console.print(table)
    words = words_of(AutoTokenizer.from_pretrained(CHECKPOINT))
    seen = [id for id, facts in truth.items() if not facts["blind"]]
    sorted_words = word_vig(scores, words, seen)
    title = "token VIG in answers given by someone who looked"
    table = Table(
        "words", "tokens", "mean VIG, nats", "AUROC against function words", title=title, title_justify="left"
    )
    for name, values in sorted_words.values.items():
        area = "" if name == "function" else f"{sorted_words.against_function(name):.3f}"
        table.add_row(name, f"{len(values):,}", f"{values.mean():+.3f}", area)
    console.print(table)
    everyone = word_vig(scores, words).auroc
    console.print(
        f"AUROC of colour and object words against function words: {sorted_words.auroc:.3f} "
        f"({everyone:.3f} with the answers from habit, whose wrong words no picture supports)\n"
    )
    return {
        "auroc": sorted_words.auroc,
        "auroc_with_habit": everyone,
        "words": {name: float(values.mean()) for name, values in sorted_words.values.items()},
        "kinds": {kind: float(values.mean()) for kind, values in kinds.items()},
    }


def _show_triples(console: Console, scores: Path, data: Path) -> dict:
    groups = vig_by("match", scores, read_truth(data))
    means = {match: float(groups[match].mean()) for match in MATCHES}
    line = " > ".join(f"{match} {means[match]:+.3f}" for match in MATCHES)
    holds = means["match"] > means["partly"] > means["conflict"]
    console.print(
        f"mean VIG of {len(groups['match']):,} captions, each with three pictures: {line} nats\n"
        f"the order of the paper's Table 1 {'holds' if holds else 'DOES NOT HOLD'}\n"
    )
    return {**means, "count": len(groups["match"]), "holds": holds}


# ---- the experiment


def _experiment(shell: Shell, folder: Path, seeds: int) -> list[dict]:
    """Figures of the base, then of every arm and seed. Half of the work is done by a second process."""
    first, *jobs = [Job(arm, seed) for seed in range(seeds) for arm in reversed(ARMS)]
    here, there = jobs[: (len(jobs) - 1) // 2], jobs[(len(jobs) - 1) // 2 :]
    with _second_process(folder, there) as arriving:
        figures = [_examine(folder, CHECKPOINT), _first_seed(shell, folder, first)]
        shell.console.print(
            f"{len(jobs)} more trainings with the same settings, all from the shipped checkpoint"
        )
        started = time.monotonic()
        for done, found in enumerate(chain(run_jobs(folder, here), arriving), start=1):
            figures.append(found)
            left = _left(done, len(here), len(jobs), time.monotonic() - started)
            _show_arm(shell.console, found, left)
    return figures


def _first_seed(shell: Shell, folder: Path, job: Job) -> dict:
    """Train with the command and examine the checkpoint that it wrote."""
    started, out = time.monotonic(), folder / "tuned"
    options = [word for name, value in TRAINING.items() for word in (f"--{name.replace('_', '-')}", value)]
    selection = ["--selection", job.selection(folder)]
    shell.vig("train", CHECKPOINT, folder / "tune.json", *selection, "-o", out, "--seed", job.seed, *options)
    seconds = time.monotonic() - started
    tokens = json.loads((out / RECORD).read_text(encoding="utf-8"))["tokens"]
    told = {"arm": job.arm, "seed": job.seed, "tokens": tokens, "seconds": seconds}
    found = _examine(folder, out) | told
    _show_arm(shell.console, found)
    return found


def _examine(folder: Path, checkpoint: Path) -> dict:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vig.demo.evaluate import Exam

    exam = Exam(folder / "test.json", AutoProcessor.from_pretrained(checkpoint))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    return {"arm": "base", "seed": None, **exam.sit(model)._asdict()}


@contextmanager
def _second_process(folder: Path, jobs: Sequence[Job]) -> Iterator[Iterator[dict]]:
    """The figures of `jobs`, trained by another process of one thread, which is ended with the block."""
    command = [sys.executable, "-m", "vig.demo.arms", str(folder), *map(str, jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "second-process.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

        def results() -> Iterator[dict]:
            yield from (json.loads(line) for line in process.stdout)
            if process.wait() != 0:
                raise RuntimeError(f"the second process failed: see {log.name}")

        try:
            yield results()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _left(done: int, here: int, jobs: int, seconds: float) -> str:
    """What is left after `done` of the jobs in so many seconds. Both processes end at about the same time."""
    if done == jobs:
        return ""
    time_left = f", about {seconds / done * (here - done):.0f} s" if done < here else ""
    return f"; {jobs - done} left{time_left}"


def _show_arm(console: Console, found: dict, left: str = "") -> None:
    console.print(
        f"  {NAMES[found['arm']]}, seed {found['seed']}: colour {found['colour']:.1f} %, "
        f"{found['tokens']:,} answer tokens, {found['seconds']:.0f} s{left}"
    )


def _show_arms(console: Console, figures: list[dict]) -> dict[str, bool]:
    """The table of the four arms, how VIG compares with the others, and which of the arms beat the base."""
    base = figures[0]
    seeds = sorted({found["seed"] for found in figures[1:]})
    title = f"right colour, % of {base['questions']:,} questions about scenes where habit is always wrong"
    heads = (*(f"seed {seed}" for seed in seeds), "mean and 95 % interval", "exact answer", "tokens")
    table = Table("arm", *heads, title=title, title_justify="left")
    table.add_row(
        NAMES["base"],
        *([f"{base['colour']:.1f}"] * len(seeds)),
        f"{base['colour']:.1f}",
        f"{base['exact']:.1f}",
        "0",
    )
    colour = {}
    for arm in ARMS:
        rows = sorted((found for found in figures if found["arm"] == arm), key=lambda found: found["seed"])
        colour[arm] = np.array([found["colour"] for found in rows])
        exact, tokens = (np.mean([found[name] for found in rows]) for name in ("exact", "tokens"))
        means = (str(mean_interval(colour[arm])), f"{exact:.1f}", f"{tokens:,.0f}")
        table.add_row(NAMES[arm], *(f"{value:.1f}" for value in colour[arm]), *means)
    console.print(table)
    console.print(
        "tokens: answer tokens of a training's steps, those of text-only samples included, mean over seeds"
    )
    compared = [(f"{NAMES[arm]} minus the base", colour[arm] - base["colour"]) for arm in ARMS]
    compared += [
        (f"{NAMES['vig']} minus {NAMES[arm]}", colour["vig"] - colour[arm]) for arm in ARMS if arm != "vig"
    ]
    claims = {}
    for what, differences in compared:
        found = mean_interval(differences)
        claims[what] = found.excludes_zero
        said = "" if found.excludes_zero else ": no difference is claimed"
        console.print(f"{what}: {found.signed} points{said}")
    console.print(f"intervals: paired t over {len(seeds)} seeds, of one draw of the data and one test")
    console.print()
    return claims
