"""docs/evidence.md, its figures and the README's block, from the stored lines. No figure is typed in by hand."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine, results
from benchmarks.evidence import advice, analysis, design, figures, probes, prose, store, tables, verdict
from benchmarks.evidence.analysis import COLOUR, Lines
from benchmarks.evidence.design import SHARES

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSE = "<!-- evidence -->", "<!-- /evidence -->"
WIDTH = 118


class Places(NamedTuple):
    """Where the lines are read, and what is written."""

    lines: Path
    page: Path = ROOT / "docs" / "evidence.md"
    plots: Path = ROOT / "docs" / "plots"
    readme: Path = ROOT / "README.md"


def write(places: Places) -> list[Path]:
    """Write page, figures and, where it has the marks, the README's block; returns the files written."""
    head, found = store.read(places.lines)
    if not found:
        raise ValueError(f"{places.lines} holds no run: `python -m benchmarks evidence` makes them")
    lines = Lines(found)
    drawn = figures.draw(lines, places.plots)
    probed = store.read(places.lines.with_name(probes.NAME))[1]
    places.page.write_text(page(head, lines, len(found), probed), encoding="utf-8")
    return [places.page, *drawn, *_readme(places.readme, lines)]


def _readme(path: Path, lines: Lines) -> list[Path]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    block = "\n".join(_item(line) for line in verdict.readme(lines))
    new = re.sub(f"{OPEN}\n.*?{CLOSE}", lambda _: f"{OPEN}\n{block}\n{CLOSE}", text, count=1, flags=re.DOTALL)
    if OPEN not in text:
        return []
    path.write_text(new, encoding="utf-8")
    return [path]


def page(head: dict, lines: Lines, count: int, probed: Mapping[design.Run, dict] | None = None) -> str:
    """The whole page, in Markdown. probed: the lines of the probes."""
    parts = [
        "# Evidence: when does selection by VIG help?\n",
        _text(prose.INTRODUCTION),
        _text(_made_of(head, count)),
        "## Verdict\n",
        _items(_verdict(lines)),
        "![Differences by share of blind answers](plots/evidence-differences.png)\n",
        "## What to conclude\n",
        _items(advice.conclusions(lines)),
        "## The tests\n",
        _text(prose.TESTS),
        tables.of_family(lines, "secondary"),
        "Is it VIG that does it? Against other choices of as many tokens, right colour:\n",
        tables.of_family(lines, "controls"),
        "VIG and easy tokens (null likelihood above exp(-0.5)) against all tokens:\n",
        tables.of_family(lines, "easy"),
        _text(prose.EASY),
        tables.easy(lines),
        "## Where VIG loses\n",
        _items(verdict.losses(lines) or ["In no test is an arm of VIG worse than what it is compared with."]),
        _text(prose.UNADJUSTED),
        _items(advice.near_losses(lines) or ["No such test."]),
        _text(prose.UNTESTED),
        _items(advice.described_losses(lines) or ["No such measure."]),
        _text(prose.LOSES),
        tables.described(lines),
        "## Every arm\n",
        "![Every arm by share of blind answers](plots/evidence-arms.png)\n",
        _text(prose.ARMS),
        *(
            f"{verdict.percent_of(share)} blind answers\n\n{tables.of_share(lines, share)}"
            for share in SHARES
        ),
        _text(prose.KEPT),
        tables.kept(lines),
        *([_text(wrong)] if (wrong := advice.wrong_kept(lines)) else []),
        "## Other ways to choose\n",
        _text(prose.VARIANTS),
        tables.variants(lines),
        "## What the models take from the picture\n",
        *_probes(probed or {}),
        "## A base that answers by habit\n",
        *_habit(lines),
        "## The learning rate\n",
        _text(verdict.rates(lines)),
        tables.rates(lines),
        "## How it was done\n",
        _items(_design()),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def _verdict(lines: Lines) -> list[str]:
    said = [
        verdict.primary(lines),
        verdict.helps_and_harms(lines),
        verdict.is_it_vig(lines),
        verdict.beyond_the_loss(lines),
    ]
    if any(cell.base == "habit" and cell.arm == "vig" for cell in lines.cells):
        said.append(verdict.beyond_the_loss(lines, "habit"))
        pair = verdict.pairs(analysis.tested(lines, "habit"))[("vig", "all", COLOUR)]
        said.append(f"On that base VIG minus all tokens, right colour: {verdict.by_share(pair)}.")
    return said


def _habit(lines: Lines) -> list[str]:
    base = lines.untuned("habit")
    if base is None:
        return [_text("Not run: `benchmarks/evidence/habit_base` holds no checkpoint.")]
    own, shipped = base["test_habit"], (lines.untuned("shipped") or {}).get("test_habit")
    other = "" if shipped is None else f" (the shipped base: {shipped:.1f} %)"
    said = prose.HABIT.format(own=f"{own:.1f}", other=other, **prose.HABIT_FACTS)
    right = advice.habit_is_right(lines)
    caveats = [
        " ".join(text.format(right=f": {right}" if right else "", **prose.HABIT_FACTS).split())
        for text in prose.HABIT_CAVEATS
    ]
    return [
        _text(said),
        _items(caveats),
        tables.of_family(lines, "habit", design.HABIT_SHARES),
        tables.habit(lines),
    ]


def _probes(found: Mapping[design.Run, dict]) -> list[str]:
    if probes.plan()[0] not in found:
        return [_text(prose.NO_PROBES)]
    even = next(figure for figure in found[probes.plan()[0]]["figures"] if figure[2] == "image tokens")
    said = prose.PROBES.format(
        arms=advice.listed([design.NAMES[arm] for arm in probes.ARMS]),
        share=verdict.percent_of(probes.SHARE),
        seeds=len({run.seed for run in found if run.arm != design.UNTUNED}),
        even=f"{100 * even[4]:.0f}",
    )
    return [_text(said), *(table for _, table in tables.probes(found))]


def _made_of(head: dict, count: int) -> str:
    versions = head.get("versions", {})
    return prose.MADE_OF.format(
        command=head.get("command", "python -m benchmarks evidence"),
        count=count,
        planned=len(design.runs(design.plan())),
        machine=machine.sentence(head) if "machine" in head else "an unknown machine",
        torch=versions.get("torch", "?"),
        transformers=versions.get("transformers", "?"),
        commit=head.get("commit", "?"),
        date=head.get("date", "?"),
    )


def _design() -> list[str]:
    training = design.TRAINING
    figures_of = {
        "samples": f"{design.SAMPLES:,}",
        "p": f"{design.P:g}",
        "steps": training["max_steps"],
        "batch": training["batch_size"],
        "rate": f"{training['lr']:g}",
        "nats": f"{design.EASY_NATS:g}",
        **{name: f"{size:,}" for name, (_, size) in design.EXAMS.items()},
    }
    return [" ".join(text.format(**figures_of).split()) for text in prose.DESIGN]


def _text(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _items(texts: Iterable[str]) -> str:
    return "\n".join(_item(f"- {text}") for text in texts) + "\n"


def _item(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def places_of(lines: Path) -> Places:
    """The checkout's pages for the lines of the checkout; all beside the lines where these lie elsewhere."""
    if lines.resolve() == (results.FOLDER / store.NAME).resolve():
        return Places(lines)
    folder = lines.parent
    return Places(lines, folder / "evidence.md", folder / "plots", folder / "README.md")
