"""The benchmark harness: what it refuses, what it reports, and that the README shows what was measured."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import (
    __main__,
    audit,
    blur,
    harness,
    heads,
    machine,
    memory,
    peers,
    plots,
    report,
    results,
    score,
    terminal,
    train,
)
from benchmarks.harness import Check, Contender
from benchmarks.shapes import Picture, Shape

TINY = Shape("tiny", 24, 40, 300)
PATHS = report.Paths.default(None, None, None)


def passes(contender, output):
    return Check(0.0, 0.0)


def scripted(times: dict[str, list[float]]):
    """(contenders, timer): each contender's runs take the milliseconds given, in order."""
    seen = []
    fakes = {name: (lambda name=name: seen.append(name)) for name in times}
    left = {name: list(values) for name, values in times.items()}

    def timer(run, calls):
        for _ in range(calls):
            run()
        return left[seen[-1]].pop(0)

    def contender(name, **more):
        return Contender(name, lambda inputs: fakes[name], **more)

    return contender, timer, seen


def test_quantiles():
    assert harness.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert harness.quantile([10.0, 20.0], 0.2) == pytest.approx(12.0)
    assert harness.quantile([7.0], 0.8) == 7.0


def test_ratios_rounds_and_order():
    # the first two values of each are the verified call and its warm repetition: they are no samples
    times = {
        "gemm": [900, 100, 110, 90, 100],
        "fast": [900, 50, 60, 40, 50],
        "double": [900, 150, 150, 150, 150],
    }
    for values in times.values():
        values[0] = 499  # shorter than LONG_MS: warmed once more
    contender, timer, seen = scripted(times)
    field = [
        contender("gemm", baseline=True),
        contender("fast", ours=True),
        contender("double", work=2.0),
    ]
    rows = harness.measure(field, None, passes, rounds=3, timer=timer, settle_s=0)["rows"]
    assert [row["samples"] for row in rows] == [3, 3, 3]
    assert [row["p50_ms"] for row in rows] == [100, 50, 150]
    assert rows[0]["p20_ms"] == pytest.approx(94) and rows[0]["p80_ms"] == pytest.approx(106)
    assert [row["ratio"] for row in rows] == [1.0, 0.5, 0.75]
    assert seen[6:] == ["gemm", "fast", "double", "fast", "double", "gemm", "double", "gemm", "fast"]
    assert harness.median_ratio(rows, "fast", "gemm") == 0.5
    assert harness.median_ratio(rows, "fast", "nobody") is None


def test_baselines_are_summed():
    contender, timer, _ = scripted({"a": [600, 100], "b": [600, 300], "both": [600, 200]})
    field = [contender("a", baseline=True), contender("b", baseline=True), contender("both")]
    rows = harness.measure(field, None, passes, rounds=1, timer=timer, settle_s=0)["rows"]
    assert rows[2]["ratio"] == 0.5


def test_short_calls_are_repeated_and_slow_ones_spared():
    contender, timer, seen = scripted({"short": [2.0] * 20, "slow": [30.0] * 9, "hopeless": [9000.0]})
    field = [contender("short", baseline=True), contender("slow"), contender("hopeless")]
    rows = harness.measure(field, None, passes, rounds=5, timer=timer, settle_s=0)["rows"]
    assert [row["samples"] for row in rows] == [5, harness.SLOW_ROUNDS, 1]
    assert seen.count("hopeless") == 1
    assert seen.count("short") == 3 + 5 * (1 + math.ceil(harness.SAMPLE_MS / 2.0))


def test_where_time_is_short_peers_have_few_rounds_and_what_is_judged_all():
    contender, timer, seen = scripted({name: [100.0] * 20 for name in ("gemm", "ours", "peer")})
    field = [contender("gemm", baseline=True), contender("ours", ours=True), contender("peer")]
    rows = harness.measure(field, None, passes, rounds=6, seconds=0.01, timer=timer, settle_s=0)["rows"]
    assert [row["samples"] for row in rows] == [6, 6, harness.FEW_ROUNDS]
    assert seen[-6:] == ["ours", "gemm", "gemm", "ours", "ours", "gemm"]
    rows = harness.measure(field, None, passes, rounds=6, seconds=99.0, timer=timer, settle_s=0)["rows"]
    assert [row["samples"] for row in rows] == [6, 6, 6]


def test_what_stands_beside_the_times_is_found_from_what_was_timed():
    contender, timer, seen = scripted({"one": [600.0] * 9})
    found = harness.measure([contender("one")], None, passes, rounds=1, timer=timer, settle_s=0,
                            beside={"peak_mib": lambda run: run() or 1.5})  # fmt: skip
    assert found["rows"][0]["peak_mib"] == 1.5 and seen == ["one"] * 3


def test_refuses_what_is_wrong_and_lists_what_cannot_run():
    def broken(inputs):
        raise RuntimeError("no such kernel\nand a long story")

    called = []
    field = [
        Contender("gemm", lambda inputs: lambda: 1.0, baseline=True),
        Contender("wrong", lambda inputs: lambda: called.append(1) or 2.0),
        Contender("nan", lambda inputs: lambda: math.nan),
        Contender("absent", broken, lambda: "not installed (pip install absent)"),
        Contender("raises", broken),
    ]
    judge = lambda contender, output: Check(abs(output - 1), abs(output - 1) / 0.5)  # noqa: E731
    rows = harness.measure(field, None, judge, rounds=2, settle_s=0)["rows"]
    assert [row["status"] for row in rows] == ["ok", "wrong", "wrong", "cannot run", "failed"]
    assert len(called) == 1, "a wrong contender was timed"
    assert "p50_ms" not in rows[1] and "not timed" in rows[1]["reason"]
    assert rows[3]["reason"] == "not installed (pip install absent)"
    assert rows[4]["reason"] == "RuntimeError: no such kernel"
    case = {"rows": rows}
    assert len(list(results.problems(case))) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_judge(dtype):
    """Every contender that can run here passes; a small shift of one row, or the other output, does not."""
    inputs = heads.make_inputs(TINY, dtype)
    judge = heads.ScoreJudge(inputs)
    field = [c for c in score.contenders() if not c.compiles and c.why_not() is None]
    assert {"bare GEMM", "eager PyTorch"} <= {c.name for c in field}
    for contender in field:
        output = contender.make(inputs)()
        assert judge(contender, output).passed, contender.name
        shift = 0.2 if contender.exactness == "own" else 1e-3
        worse = [x.clone().float() for x in (output if isinstance(output, tuple) else [output])]
        worse[-1][-1] += shift
        assert not judge(contender, tuple(worse) if len(worse) > 1 else worse[0]).passed, contender.name
        worse[-1][-1] = math.nan
        assert not judge(contender, tuple(worse) if len(worse) > 1 else worse[0]).passed, contender.name
    assert (inputs.sparse_target == -100).float().mean() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_judge(dtype):
    inputs = heads.make_inputs(TINY, dtype)
    upstream = torch.rand(TINY.N, TINY.V).to(dtype)
    judge = heads.TrainJudge(inputs, upstream)
    field = [c for c in train.contenders() if not c.compiles and c.why_not() is None]
    for contender in [*peers.bare_products(upstream), *field]:
        output = contender.make(inputs)()
        assert judge(contender, output).passed, contender.name
        if contender.output != "loss":
            assert not judge(contender, output * 1.1).passed
            continue
        loss, grad_hidden, grad_weight = output
        assert not judge(contender, (loss, grad_hidden * 1.1, grad_weight)).passed
        assert not judge(contender, (loss * 1.1, grad_hidden, grad_weight)).passed
        assert not judge(contender, (loss * math.nan, grad_hidden, grad_weight)).passed
        assert not judge(contender, (loss, grad_hidden * math.nan, grad_weight)).passed
        assert (grad_weight is None) == ("frozen" in contender.name)
        if grad_weight is not None:
            assert not judge(contender, (loss, grad_hidden, torch.zeros_like(grad_weight))).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_blur_judge(dtype):
    inputs = blur.make_inputs(Picture(1, 48, 40, 3.0), dtype)
    judge = blur.BlurJudge(inputs)
    for contender in blur.contenders(dtype):
        if contender.why_not() is None:
            assert judge(contender, contender.make(inputs)()).passed, contender.name
    mine = blur.ours("torch")
    assert not judge(mine, inputs.images).passed
    assert judge(mine, blur.reference.gaussian_blur(inputs.images.double(), 3.0)).error < 1e-12


def test_memory_of_a_fresh_process():
    """The child sees the logits of the materialising peer, and less from the library."""
    shape = {"name": "tiny", "N": 400, "D": 8, "V": 30000}
    order = {"suite": "score", "shape": shape, "dtype": "float32", "threads": 1}
    logits_mib = 4 * 400 * 30000 / 2**20
    eager = memory.child(order | {"name": "eager PyTorch"})
    assert logits_mib < eager < 4 * logits_mib
    assert memory.output_bytes((torch.zeros(3), None, torch.zeros(2, dtype=torch.bfloat16))) == 16


def test_a_case_from_inputs_to_tables(tmp_path):
    """Timings of the library and of eager PyTorch, shares of the peak, comparisons, on the terminal and stored."""
    field = [c for c in score.contenders() if c.name in ("bare GEMM", "eager PyTorch") or c.ours]
    case = score.case(TINY, torch.float32, 1, 3, field, lambda text: None)
    assert {row["status"] for row in case["rows"] if not row["ours"]} == {"ok"}
    native_runs = next(c for c in field if c.name == "linear_nll").why_not() is None
    assert all((ratio["ratio"] or 0) > 0 for ratio in case["comparisons"]) == native_runs
    assert 0 < case["rows"][0].get("of_peak", 0.5) < 1.5
    result = machine.header("score", 1, False) | {"cases": [case]}
    console = Console(record=True, width=140, file=io.StringIO())
    terminal.show(result, console)
    assert "eager PyTorch" in console.export_text()
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"] == torch.__version__
    results.write(result, tmp_path)
    assert "| eager PyTorch |" in report.block(
        "score", tmp_path / "page.md", report.Paths(tmp_path, tmp_path, tmp_path)
    )


def stored(folder: Path, suite: str = "score", p50_ms: float = 10.0) -> dict:
    """A small result as a suite stores it: 240 operations a call, a peak of 25,000 of them a second."""
    timed = {"baseline": False, "work": 1.0, "note": "", "status": "ok", "max_error": 2e-6, "samples": 5}
    ours = timed | {
        "name": "linear_nll",
        "ours": True,
        "p20_ms": 9.0,
        "p50_ms": p50_ms,
        "p80_ms": 11.0,
        "ratio": p50_ms / 16.0,
    }
    bare = timed | {
        "name": "bare GEMM",
        "ours": False,
        "p20_ms": 15,
        "p50_ms": 16.0,
        "p80_ms": 18.0,
        "ratio": 1.0,
    }
    sparse = ours | {"name": peers.SPARSE, "p50_ms": 3.0, "ratio": 3.0 / 16.0}
    absent = {
        "name": "Peer",
        "ours": False,
        "baseline": False,
        "note": "",
        "status": "cannot run",
        "reason": "why",
    }
    case = {
        "model": "a model",
        "shape": {"N": 4, "D": 5, "V": 6},
        "dtype": "float32",
        "peak_gflops": 25e-6,
        "rows": [bare | {"baseline": True}, ours | {"of_peak": 9.6 / p50_ms}, sparse, absent],
        "comparisons": [
            {"name": score.COMPARISONS[0][0], "ratio": None},
            {"name": score.COMPARISONS[1][0], "ratio": 3.0 / p50_ms},
        ],
    }
    result = {
        "suite": suite, "quick": False, "command": f"python -m benchmarks {suite} --threads 2", "date": "2026-01-02",
        "commit": "abc1234", "threads": 2, "versions": {"torch": "2.13.0"}, "cases": [case],
        "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "gpu": None, "memory_gib": 8.0, "isa": "avx2"},
    }  # fmt: skip
    results.write(result, folder)
    return result


def pages(folder: Path) -> tuple[report.Paths, Path]:
    """A README with its sentences' block, an empty folder of results, and where docs/benchmarks.md is to be."""
    paths = report.Paths(folder / "README.md", folder / "results", folder / "plots")
    paths.readme.write_text("<!-- benchmarks:kernels -->\n<!-- /benchmarks:kernels -->\n")
    paths.results.mkdir()
    (folder / "docs").mkdir()
    return paths, folder / "docs" / "benchmarks.md"


def test_report_round_trip(tmp_path):
    paths, page = pages(tmp_path)
    page.write_text("# x\n<!-- benchmarks:score -->\n<!-- /benchmarks:score -->\nend\n")
    assert report.disagreements(paths) == []  # nothing measured, nothing shown
    stored(paths.results)
    assert report.disagreements(paths)
    written = report.write(paths)
    assert report.disagreements(paths) == []
    text = page.read_text()
    assert text.startswith("# x\n") and text.endswith("end\n")
    assert "| **linear_nll** | 0.62 (10.0, 96 % of peak) |" in text
    assert "| rounds that a median is of | 5 |" in text
    assert "`python -m benchmarks score --threads 2`" in text
    assert "Not timed: Peer: cannot run: why." in text
    assert f"{peers.SPARSE} / none: 0.30 (4 × 5 × 6, float32)." in text and f"| **{peers.SPARSE}" not in text
    assert [path.suffix for path in written] == [".md", ".md", ".png", ".png"]
    assert min(path.stat().st_size for path in written[2:]) > 5000 and written[-1].name.startswith("readme-")
    report.write(paths)
    assert page.read_text() == text
    stored(paths.results, p50_ms=11.0)
    found = report.disagreements(paths)
    assert ["README.md differs" in found[0], "benchmarks.md differs" in found[1]] == [True, True]
    assert all("drawn from another result" in line for line in found[2:]) and len(found) == 4
    readme = paths.readme.read_text()
    assert "| `linear_nll`, float32 | 0.62 (96 %) |" in readme and f"(plots/{written[-1].name})" in readme
    report.write(paths)
    assert report.disagreements(paths) == []
    written[-1].unlink()
    assert "missing" in report.disagreements(paths)[0]
    next(paths.results.iterdir()).unlink()
    assert "has no results" in report.disagreements(paths)[0]


def test_quick_results_do_not_replace_full_ones(tmp_path):
    result = stored(tmp_path)
    path = results.write(result | {"quick": True}, tmp_path)
    assert "quick" in path.name and len(list(tmp_path.iterdir())) == 2
    assert len(results.read_full("score", tmp_path)) == 1
    assert json.loads(path.read_text())["cases"][0]["rows"][1]["ratio"] == 0.625


def test_plots_cut_only_what_is_far_longer(tmp_path):
    result = stored(tmp_path)
    result["cases"][0]["rows"][0] |= {"baseline": False, "name": "slow peer", "ratio": 12.0}
    path = plots.draw(result, tmp_path)
    assert path is not None and path.stat().st_size > 5000
    assert plots.digest_of(path) == results.digest(result)


def edited(paths: report.Paths, change) -> list[str]:
    """What the check says of a result that `change` was done to, after the pages were written from it."""
    path = next(paths.results.glob("score-*.json"))
    before = path.read_text()
    result = json.loads(before)
    change(result["cases"][0])
    path.write_text(json.dumps(result))
    report.write(paths)
    found = report.disagreements(paths)
    path.write_text(before)
    return found


def test_the_check_recomputes_what_follows_from_the_times(tmp_path):
    paths, page = pages(tmp_path)
    page.write_text("<!-- benchmarks:score -->\n<!-- /benchmarks:score -->\n")
    stored(paths.results)
    assert edited(paths, lambda case: None) == []
    assert "the ratio of linear_nll is 0.5, but" in edited(paths, lambda c: c["rows"][1].update(ratio=0.5))[0]
    assert "share of the peak" in edited(paths, lambda c: c["rows"][1].update(of_peak=0.9))[0]
    assert "none is 0.1, but" in edited(paths, lambda c: c["comparisons"][1].update(ratio=0.1))[0]
    assert "follows as None" in edited(paths, lambda c: c["comparisons"][0].update(ratio=0.9))[0]
    wrong = {"status": "wrong", "reason": "error 1"}
    assert "linear_nll: wrong: error 1" in edited(paths, lambda c: c["rows"][1].update(wrong))[0]


def test_one_block_of_each_suite_on_its_own_page(tmp_path):
    paths, page = pages(tmp_path)
    block = "<!-- benchmarks:score -->\n<!-- /benchmarks:score -->\n"
    stored(paths.results)
    page.write_text(block)
    report.write(paths)
    text = page.read_text()
    page.write_text(text + block.replace("\n", "\n| false |\n", 1))
    assert "2 times" in report.disagreements(paths)[0]
    page.write_text(text + block.replace("score", "scale"))
    assert "<!-- benchmarks:scale -->" in report.disagreements(paths)[0]
    page.unlink()
    assert "benchmarks.md does not exist" in report.disagreements(paths)[0]


def test_a_wrong_row_of_the_library_fails_the_suite(monkeypatch):
    """A peer's does not; what is wrong is wrong in the quick run too."""
    rows = [
        Contender("peer", lambda inputs: lambda: 2.0),
        Contender("mine", lambda inputs: lambda: 1.0, ours=True),
    ]
    right = 1.0
    judge = lambda contender, output: Check(0.0, 0.0 if output == right else math.inf)  # noqa: E731

    def run(threads, quick, say):
        return [{"label": "a case", "model": "", **harness.measure(rows, None, judge, rounds=1, settle_s=0)}]

    monkeypatch.setattr(blur, "run", run)
    assert CliRunner().invoke(__main__.app, ["blur", "--quick"]).exit_code == 0
    right = 2.0
    misplaced = CliRunner().invoke(__main__.app, ["--threads", "1", "blur", "--quick"])
    assert misplaced.exit_code == 2 and "blur --threads 1" in misplaced.stderr
    done = CliRunner().invoke(__main__.app, ["blur", "--quick"])
    assert done.exit_code == 1 and "blur: a case: mine: wrong: error 0" in done.output


def test_a_broken_promise_of_memory():
    case = {"label": "score: a case", "rows": [
        {"name": "linear_nll", "ours": True, "status": "ok", "value": 64.0, "promised": 64},
        {"name": "eager PyTorch", "ours": False, "status": "ok", "value": 900.0, "promised": None},
        {"name": "absent", "ours": False, "status": "cannot run", "reason": ""},
    ]}  # fmt: skip
    result = {"suite": "memory", "cases": [case]}
    assert audit.broken(result) == []
    case["rows"][0]["value"] = 64.1
    assert audit.broken(result) == ["score: a case: linear_nll: 64.1 MiB, promised 64"]


def test_every_suite_of_the_command_line_can_be_run():
    with_commands_of_their_own = {"gpu", "static", "evidence", "report"}
    names = {
        one.name or one.callback.__name__ for one in __main__.app.registered_commands
    } - with_commands_of_their_own
    assert {*__main__.SUITES, "throughput", "scale", "trainers"} == names
    for name in names:
        assert list(inspect.signature(importlib.import_module(f"benchmarks.{name}").run).parameters) == [
            "threads", "quick", "say"
        ]  # fmt: skip


def test_results_and_pages_are_no_changes_of_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown" and machine.changed_since("abc1234") is None
    git = lambda *words: subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)  # noqa: E731
    for name in ("csrc/a.h", "benchmarks/b.py", "benchmarks/results/c.json", "README.md", "docs/plots/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
    head = machine.commit()
    assert len(head) >= 7 and not head.endswith("+")
    for name in ("benchmarks/results/c.json", "README.md", "docs/plots/d.png"):
        (tmp_path / name).write_text("after")
    assert machine.commit() == head and machine.changed_since(head) == []
    (tmp_path / "csrc/a.h").write_text("after")
    assert machine.commit() == f"{head}+" and machine.changed_since(f"{head}+") == ["csrc"]


def test_pages_show_the_stored_results():
    assert report.disagreements(PATHS) == []
