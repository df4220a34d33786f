"""Tables and plots from stored results. The only way numbers get into the pages.

Each suite has a pair of markers, `<!-- benchmarks:score -->` and `<!-- /benchmarks:score -->`, in docs/benchmarks.md;
what stands between them is replaced. A suite without results leaves its block without any table. The suites of scoring
have their markers in docs/throughput.md, and the README one block, `scoring`, with their figures in a sentence.
docs/kernels.md has two blocks that are never empty: `gpu`, what GPUs measured, and `predictions`, what they should
take, beside what they took; both say "not measured" where that is so.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import audit, machine, memory, plots, results
from benchmarks.harness import ONE_CALL

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("score", "train", "memory", "blur", "peak")
ON_OWN_PAGE = ("throughput", "scale")  # in docs/throughput.md
OF_TRAINERS = ("trainers",)  # in docs/trainers.md
GPU, PREDICTIONS = "gpu", "predictions"
ON_KERNELS_PAGE = (PREDICTIONS, GPU)  # in docs/kernels.md, with results or without
SCORING, KERNELS = "scoring", "kernels"  # of the README: a sentence and a table, from other suites' results
FROM_OTHERS = {SCORING: ON_OWN_PAGE, KERNELS: ("score", "train"), PREDICTIONS: (GPU,)}
WITHOUT_PLOT = ("peak", *ON_OWN_PAGE, *OF_TRAINERS)
DTYPES = ("float32", "bfloat16", "float16", "uint8")


@dataclass(frozen=True)
class Paths:
    readme: Path
    results: Path
    plots: Path

    @classmethod
    def default(cls, readme: Path | None, stored: Path | None, plots: Path | None) -> Paths:
        return cls(readme or ROOT / "README.md", stored or results.FOLDER, plots or ROOT / "docs" / "plots")

    @property
    def pages(self) -> dict[Path, tuple[str, ...]]:
        """Each page that shows results, and the suites it shows."""
        return {
            self.readme: (KERNELS, SCORING),
            self.readme.parent / "docs" / "benchmarks.md": SUITES,
            self.readme.parent / "docs" / "throughput.md": ON_OWN_PAGE,
            self.readme.parent / "docs" / "kernels.md": ON_KERNELS_PAGE,
            self.readme.parent / "docs" / "trainers.md": OF_TRAINERS,
        }

    def stored(self, block: str) -> list[dict]:
        """The results that a block shows."""
        suites = FROM_OTHERS.get(block, (block,))
        return [result for suite in suites for result in results.read_full(suite, self.results)]


def write(paths: Paths) -> list[Path]:
    """Rewrites the pages' blocks and the plots; returns the files that were written."""
    pages = {page: blocks for page, blocks in paths.pages.items() if page.exists()}
    for page, blocks in pages.items():
        text = page.read_text()
        for name in blocks:
            if _has_marker(text, name) and (name in ON_KERNELS_PAGE or paths.stored(name)):
                text = _with_block(text, name, block(name, page, paths))
        page.write_text(text)
    drawn = [
        plots.draw(result, paths.plots, summary)
        for suite in (*SUITES, GPU)
        for result, summary in _pictured(suite, paths)
    ]
    return [*pages, *(path for path in drawn if path is not None)]


def disagreements(paths: Paths) -> list[str]:
    """One line for every way in which pages and plots do not show what the results hold, or results do not hold."""
    return [
        line
        for page, blocks in paths.pages.items()
        for line in (
            *_of_page(page, blocks, paths),
            *(line for name in blocks for line in _of_results(name, paths)),
        )
    ]


def outdated(paths: Paths) -> list[str]:
    """One line for every stored result that other code measured than the checkout's, where git can say."""
    found = []
    for suite in (*SUITES, *ON_OWN_PAGE, *OF_TRAINERS, GPU):
        for result in paths.stored(suite):
            changed = machine.changed_since(result["commit"])
            if changed:
                found.append(f"{suite}: measured at {result['commit']}; changed since: {', '.join(changed)}")
    return found


def _of_page(page: Path, blocks: tuple[str, ...], paths: Paths) -> Iterator[str]:
    if not page.exists():
        if any(paths.stored(name) for name in blocks):
            yield f"{page} does not exist"
        return
    text = page.read_text()
    for mark, count in Counter(re.findall(r"<!-- (/?benchmarks:\w+) -->", text)).items():
        if count > 1 or mark.partition(":")[2] not in blocks:
            yield f"{page.name} has <!-- {mark} --> {count} times: one block of each of {', '.join(blocks)}"
    for name in blocks:
        stored = paths.stored(name)
        if not _has_marker(text, name):
            if stored and name != "peak":  # the peak stands in the captions of the others
                yield f"{name}: there are results, but {page.name} has no <!-- benchmarks:{name} --> block"
            continue
        shown = _pattern(name).search(text).group("block")
        if not stored and shown.strip() and name not in ON_KERNELS_PAGE:
            yield f"{name}: {page.name} shows figures, but {paths.results} has no results"
        if (stored or name in ON_KERNELS_PAGE) and shown != block(name, page, paths):
            yield f"{name}: {page.name} differs from the results: run `python -m benchmarks report`"


def _of_results(suite: str, paths: Paths) -> Iterator[str]:
    if suite in FROM_OTHERS:
        return
    for result in paths.stored(suite):
        for line in (*audit.broken(result), *audit.not_following(result)):
            yield f"{suite}: {line}"
    for result, summary in _pictured(suite, paths):
        if suite in WITHOUT_PLOT or not plots.cases_of(result, summary):
            continue
        picture = plots.path_of(result, paths.plots, summary)
        if not picture.exists():
            yield f"{suite}: {picture} is missing: run `python -m benchmarks report`"
        elif plots.digest_of(picture) != results.digest(result):
            yield f"{suite}: {picture} was drawn from another result: run `python -m benchmarks report`"


def _pictured(suite: str, paths: Paths) -> Iterator[tuple[dict, bool]]:
    """(result, summary) of a suite's plots: one a machine, and the README's of the first."""
    for at, result in enumerate(paths.stored(suite)):
        yield result, False
        if at == 0:
            yield result, True


def _pattern(suite: str) -> re.Pattern:
    return re.compile(
        rf"(?P<open><!-- benchmarks:{suite} -->\n)(?P<block>.*?)(?P<close><!-- /benchmarks:{suite} -->)",
        re.DOTALL,
    )


def _has_marker(text: str, suite: str) -> bool:
    return _pattern(suite).search(text) is not None


def _with_block(text: str, suite: str, inner: str) -> str:
    return _pattern(suite).sub(lambda match: match["open"] + inner + match["close"], text)


def block(suite: str, page: Path, paths: Paths) -> str:
    """What stands, on that page, between the markers of a suite: for each machine a caption, tables, and the plot."""
    if suite == SCORING:
        return _scoring(paths)
    if suite == KERNELS:
        return _kernels(paths)
    if suite == PREDICTIONS:
        return _predictions(paths)
    if suite == GPU and not paths.stored(GPU):
        return "Not measured: no GPU has run `python -m benchmarks gpu` yet.\n"
    return "\n".join(_machine_block(suite, result, page, paths) for result in paths.stored(suite))


def _scoring(paths: Paths) -> str:
    """The suites of scoring in one sentence, each by the first machine that has run it; their page has all machines."""
    first = {}
    for result in paths.stored(SCORING):
        first.setdefault(result["suite"], result)
    parts = [
        importlib.import_module(f"benchmarks.{suite}").in_words(result["cases"])
        for suite, result in first.items()
    ]
    return f"{'; '.join(parts)}.\n"


def _kernels(paths: Paths) -> str:
    """The CPU kernels in a small table, a column a machine: ratio to the bare products, share of the peak; one plot."""
    places: dict[str, dict[str, str]] = {}
    pictures: list[str] = []
    for result in paths.stored(KERNELS):
        op = {"score": "linear_nll", "train": "linear_cross_entropy"}[result["suite"]]
        for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
            timed = [
                row
                for case in result["cases"]
                if case["dtype"] == dtype
                for row in results.timed(case)
                if row["name"] == op and row["of_peak"]
            ]
            if timed:
                ratio = _range([row["ratio"] for row in timed], "{:.2f}")
                share = _range([100 * row["of_peak"] for row in timed], "{:.0f}")
                places.setdefault(machine.sentence(result), {})[f"`{op}`, {dtype}"] = f"{ratio} ({share} %)"
        pictures = pictures or _picture(result, paths.readme, paths, summary=True)
    names = dict.fromkeys(name for column in places.values() for name in column)
    head = ["time / torch's bare matrix products (share of the instruction peak)", *places]
    rows = [[name, *(column.get(name, "") for column in places.values())] for name in names]
    return "\n".join([*_lines([head, *rows]), "", *pictures])


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def _predictions(paths: Paths) -> str:
    """What ops should take on each GPU; then, GPU by GPU, what they took."""
    from benchmarks import predictions  # reads the tiles, and with them imports Triton

    lines = []
    for table in (*predictions.tables(), predictions.measured_table(paths.stored(GPU))):
        lines += [*_lines(table), ""]
    return "\n".join(lines)


def _lines(table: list[list[str]]) -> Iterator[str]:
    """A table of which every column but the first holds numbers."""
    head, *rows = table
    return map(_line, (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def _machine_block(suite: str, result: dict, page: Path, paths: Paths) -> str:
    lines = [f"`{result['command']}`, {_caption(result)}", ""]
    if suite in (*ON_OWN_PAGE, *OF_TRAINERS, GPU):
        for table in results.tables(result):
            lines += [*_lines(table), ""]
        return "\n".join([*lines, *_picture(result, page, paths)])
    for group, cases in _groups(result["cases"]):
        lines += [*_table(suite, group, cases), ""]
    lines += [*_notes(result["cases"]), *_comparisons(result["cases"]), *_absent(result["cases"])]
    return "\n".join([*lines, *_picture(result, page, paths)])


def _picture(result: dict, page: Path, paths: Paths, summary: bool = False) -> list[str]:
    """The plot of a result on the page that shows it, where it has one."""
    if result["suite"] in WITHOUT_PLOT or not plots.cases_of(result, summary):
        return []
    picture = plots.path_of(result, paths.plots, summary)
    alternative = plots.heading(result).replace("\n", "; ")
    return [f"![{alternative}]({_relative(picture, page.parent)})", ""]


def _notes(cases: list[dict]) -> Iterator[str]:
    """What a reader has to know of the cells above."""
    rows = [row for case in cases for row in results.timed(case)]
    if any(row.get("samples") == 1 for row in rows):
        yield from (f"One call: {ONE_CALL}.", "")
    if any("promised" in row for row in rows):
        yield from (memory.caption(cases), "")


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _caption(result: dict) -> str:
    versions = result["versions"]
    peers = [
        f"{name} {versions[package]}"
        for name, package in (
            ("TRL", "trl"),
            ("CCE", "cut-cross-entropy"),
            ("Liger", "liger-kernel"),
            *((("Triton", "triton"),) if result["suite"] == "gpu" else ()),
        )
        if package in versions and result["suite"] in ("score", "train", "memory", "gpu")
    ]
    if result["suite"] == "blur":
        peers = [
            f"{name} {versions[package]}"
            for name, package in (
                ("OpenCV", "opencv-python-headless"),
                ("kornia", "kornia"),
                ("SciPy", "scipy"),
            )
            if package in versions
        ]
    parts = [machine.place(result), f"torch {versions['torch']}", *peers]
    commit = result["commit"].replace("+", " with changes")
    return f"{', '.join(parts)}; commit {commit}, {result['date']}."


def _groups(cases: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Cases that share a table: same kind and dtype."""
    kinds = list(dict.fromkeys((case.get("suite", ""), case.get("dtype", "")) for case in cases))
    for kind, dtype in kinds:
        title = " ".join(word for word in (kind, dtype) if word)
        yield title, [c for c in cases if (c.get("suite", ""), c.get("dtype", "")) == (kind, dtype)]


def _table(suite: str, group: str, cases: list[dict]) -> list[str]:
    """Rows are contenders, columns are cases; a cell is the ratio to the baseline, then milliseconds."""
    unit = cases[0].get("unit")
    what = unit or f"ratio {cases[0].get('ratio_to', '/ bare GEMM')} (ms)"
    if suite == "train" or (cases[0].get("suite") == "train" and unit is None):
        what = "ratio / three bare GEMMs (ms)"
    header = [f"{group}: {what}", *(_column(case) for case in cases)]
    has_errors = unit is None
    if has_errors:
        header.append("max error")
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    for name in results.names(cases):
        rows = [next((row for row in case["rows"] if row["name"] == name), None) for case in cases]
        timed = [row for row in rows if row is not None and row["status"] == "ok"]
        label = name if unit else results.named(timed[0])
        label = f"**{label}**" if timed[0]["ours"] else label
        cells = [label, *(_cell(row) for row in rows)]
        if has_errors:
            cells.append(f"{max(row['max_error'] for row in timed):.0e}")
        lines.append(_line(cells))
    if has_errors:
        lines.append(_line(["rounds that a median is of", *map(_rounds, cases), ""]))
    peaks = [case.get("peak_gflops") for case in cases]
    if any(peaks):
        lines.append(_line(["register-only peak, GFLOP/s", *(f"{p:.0f}" if p else "" for p in peaks), ""]))
    return lines


def _rounds(case: dict) -> str:
    """ "9", or "2-9" where slow contenders sat out some."""
    counts = [row["samples"] for row in results.timed(case) if row["samples"] > 1]
    return "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def _column(case: dict) -> str:
    """A column's head; the dtype stands in the table's."""
    label = results.label(case).rsplit(",", 1)[0] if "dtype" in case else results.label(case)
    label = label.removeprefix(f"{case.get('suite', '')}: ").replace(" x ", " × ")
    return label if "unit" in case or "sigma" in case else f"{label}<br>{case['model']}"


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    if row["status"] != "ok":
        return {"cannot run": "-", "wrong": "wrong", "failed": "failed"}[row["status"]]
    if "value" in row:
        promised = f" (promised {row['promised']:.0f})" if row.get("promised") else ""
        return f"{row['value']:.0f}{promised}"
    share = f", {100 * row['of_peak']:.0f} % of peak" if row.get("of_peak") else ""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} "
    single = ", one call" if row["samples"] == 1 else ""
    return f"{ratio}({results.milliseconds(row['p50_ms'])}{share}{single})"


def _comparisons(cases: list[dict]) -> list[str]:
    """Ratios within the library, one line each, case by case."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for comparison in case.get("comparisons", ()):
            if comparison["ratio"] is not None:
                text = f"{comparison['ratio']:.2f} ({results.label(case).replace(' x ', ' × ')})"
                found.setdefault(comparison["name"], []).append(text)
    return [line for name, texts in found.items() for line in (f"{name}: {'; '.join(texts)}.", "")]


def _absent(cases: list[dict]) -> list[str]:
    """Who was not timed, and why; the same reason is given once."""
    reasons = dict.fromkeys(line for case in cases for line in results.problems(case))
    return [f"Not timed: {'; '.join(reasons)}.", ""] if reasons else []


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
