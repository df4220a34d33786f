"""The GPU suite without a GPU: its budget of minutes, its processes, its readers, and the whole of it rehearsed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import machine, peers, plots, report, results
from benchmarks.gpu import correctness, counters, device, plan, runner, tables
from benchmarks.gpu.runner import Outcome, Processes, Step, run_steps
from benchmarks.gpu.session import Session
from benchmarks.harness import Check, Contender

ROOT = Path(__file__).parents[1]


class Clock:
    """A clock that only the steps move, each by what it takes."""

    def __init__(self, takes: dict[str, float]):
        self.now, self.takes, self.calls = 0.0, takes, []

    def __call__(self) -> float:
        return self.now

    def launch(self, step: Step, limit_s: float, without) -> Outcome:
        self.calls.append((step.name, limit_s))
        seconds = min(self.takes[step.name], limit_s)
        self.now += seconds
        status = "ok" if self.takes[step.name] <= limit_s else "timed out"
        return Outcome(status, seconds, cases=[{"label": step.name, "rows": []}])


def steps(*names: str, **limits) -> list[Step]:
    return [Step(name, "nowhere:nothing", **limits) for name in names]


def test_the_minutes_are_obeyed():
    """No step gets more than its limit, none more than what is left; what no longer fits is not begun, and says so."""
    clock = Clock({"a": 50, "b": 500, "c": 40, "d": 3})
    stored = []
    wanted = [
        *steps("a", "b", limit_s=60, least_s=10),
        *steps("c", limit_s=60, least_s=30),
        *steps("d", least_s=5),
    ]
    budget = 50 + 60 + 20 + runner.MARGIN_S
    records, cases = run_steps(
        wanted,
        budget,
        clock.launch,
        lambda r, c: stored.append((len(r), len(c))),
        clock=clock,
        say=lambda _: None,
    )
    assert clock.calls == [("a", 60), ("b", 60), ("d", 20)]
    assert clock.now <= budget - runner.MARGIN_S
    assert [record["status"] for record in records] == ["ok", "timed out", "not measured", "ok"]
    assert "20 s left" in records[2]["reason"] and "30" in records[2]["reason"]
    assert stored == [(1, 1), (2, 2), (3, 2), (4, 3)]
    assert [case["step"] for case in cases] == ["a", "b", "d"]


def test_no_budget_begins_nothing():
    clock = Clock({"a": 1})
    records, cases = run_steps(
        steps("a", least_s=1), runner.MARGIN_S, clock.launch, lambda *_: None, clock=clock, say=lambda _: None
    )
    assert clock.calls == [] and cases == [] and records[0]["status"] == "not measured"


def test_what_was_measured_before_is_kept_and_what_was_not_is_tried_again():
    clock = Clock({"a": 1, "b": 1})
    done = (
        [{"name": "a", "status": "ok", "seconds": 1.0, "reason": ""}, {"name": "b", "status": "timed out"}],
        [{"step": "a", "rows": []}, {"step": "b", "rows": [], "label": "cut off"}],
    )
    records, cases = run_steps(
        steps("a", "b"), 100, clock.launch, lambda *_: None, done=done, clock=clock, say=lambda _: None
    )
    assert [name for name, _ in clock.calls] == ["b"]
    assert [(record["name"], record["status"]) for record in records] == [("a", "ok"), ("b", "ok")]
    assert [case["step"] for case in cases] == ["a", "b"] and cases[1]["label"] == "b"


def test_a_contender_that_ends_the_process_is_left_out_and_named():
    left_out = []

    def launch(step, limit_s, without):
        left_out.append(without)
        if "ours" not in without:
            return Outcome("failed", 3.0, "illegal access", at={"name": "ours", "ours": True})
        return Outcome(
            "ok", 2.0, cases=[{"label": "a case", "rows": [{"name": "bare GEMM", "status": "ok"}]}]
        )

    records, cases = run_steps(steps("a"), 100, launch, lambda *_: None, say=lambda _: None)
    assert left_out == [(), ("ours",)]
    assert records == [{"name": "a", "status": "ok", "seconds": 5.0, "reason": ""}]
    rows = {row["name"]: row for row in cases[0]["rows"]}
    assert rows["bare GEMM"]["status"] == "ok"
    assert (
        rows["ours"]["status"] == "failed"
        and rows["ours"]["ours"]
        and "illegal access" in rows["ours"]["reason"]
    )


STEPS = """
import os, signal, subprocess, sys, time
from benchmarks.gpu.device import DeviceLost

def works(session, word):
    session.case({"label": word, "rows": [], "left": session.left_s})

def dies(session):
    session.case({"label": "before", "rows": []})
    session.at("bad kernel", True)
    os.kill(os.getpid(), signal.SIGSEGV)

def loses_the_device(session):
    session.at("bad kernel", True)
    raise DeviceLost("an illegal memory access was encountered")

def hangs(session, path):
    session.case({"label": "before", "rows": []})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(path, "w").write(str(child.pid))
    time.sleep(60)

def raises(session):
    raise ValueError("what went wrong")
"""


@pytest.fixture
def processes(tmp_path):
    (tmp_path / "steps_of_a_test.py").write_text(STEPS)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    return Processes(tmp_path / "steps", os.environ | {"PYTHONPATH": paths}, rehearse=True)


def test_steps_in_processes_of_their_own(processes, tmp_path):
    """A crash, a lost device, an exception and a hang cost their own step; cases written before stay."""

    def step(name: str, *arguments) -> Step:
        return Step(name, f"steps_of_a_test:{name}", arguments)

    works = processes(step("works", "hello"), 60.0, ())
    assert works.status == "ok" and works.cases[0]["label"] == "hello" and 0 < works.cases[0]["left"] <= 60
    dies = processes(step("dies"), 60.0, ())
    assert dies.status == "failed" and "signal 11" in dies.reason and dies.cases[0]["label"] == "before"
    assert dies.at == {"name": "bad kernel", "ours": True}
    lost = processes(step("loses_the_device"), 60.0, ())
    assert lost.status == "failed" and lost.reason == "an illegal memory access was encountered" and lost.at
    raises = processes(step("raises"), 60.0, ())
    assert raises.status == "failed" and "ValueError: what went wrong" in raises.reason and raises.at is None
    note = tmp_path / "pid"
    hangs = processes(step("hangs", str(note)), 12.0, ())
    assert hangs.status == "timed out" and hangs.cases[0]["label"] == "before" and hangs.seconds < 25
    for _ in range(50):  # its own child has gone too
        if not Path(f"/proc/{note.read_text()}").exists() or _is_zombie(note.read_text()):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the step's child outlived it")


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text(
        '{"case": {"label": "whole"}}\n{"at": {"name": "a", "ours": false}}\n{"at": null}\n{"case": {"la'
    )
    found = runner.read_lines(lines)
    assert [case["label"] for case in found.cases] == ["whole"] and found.at is None
    assert runner.read_lines(tmp_path / "none").cases == []


def test_a_contest_names_the_contender_at_hand_and_leaves_out_who_it_is_told_to(tmp_path, monkeypatch):
    session = Session(tmp_path / "x.jsonl", rehearse=True, without=("left out",))

    def contender(name, run):
        return Contender(name, lambda inputs: run, ours=name != "gemm", baseline=name == "gemm")

    field = [
        contender("gemm", lambda: 1.0),
        contender("left out", lambda: 1.0),
        contender("mine", lambda: 1.0),
    ]
    found = session.contest(field, None, lambda *_: Check(0.0, 0.0))
    assert [row["name"] for row in found["rows"]] == ["gemm", "mine"]
    assert all(row["call_ms"] >= 0 and row["kernels"] == [] for row in found["rows"])
    entries = [json.loads(line)["at"] for line in session.out.read_text().splitlines()]
    assert {"name": "gemm", "ours": False} in entries and {"name": "mine", "ours": True} in entries
    assert entries[-1] is None and runner.read_lines(session.out).at is None

    def breaks():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a story")

    assert [
        r["status"] for r in session.contest([contender("mine", breaks)], None, lambda *_: None)["rows"]
    ] == ["failed"]
    monkeypatch.setattr(device, "lost", lambda: "an illegal memory access was encountered")
    with pytest.raises(device.DeviceLost, match="illegal memory access"):
        session.contest([contender("mine", breaks)], None, lambda *_: None)
    assert runner.read_lines(session.out).at == {"name": "mine", "ours": True}


def test_the_device_sleeps_while_a_call_is_enqueued(monkeypatch):
    """Flush, sleep, start, call, end; the sleep outlasts what the host took for the same call's last launches."""
    order, asked = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("end" if order[-1] == "call" else "start")

        def elapsed_time(self, end):
            return 2.5

    class Flush:
        def zero_(self):
            order.append("flush")

    now = [0.0]
    monkeypatch.setattr(device, "_flush_buffer", Flush)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: (order.append("sleep"), asked.append(cycles)), raising=False
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call():
        order.append("call")
        now[0] += 0.010

    clock = device.EventClock()
    assert clock(call, 3) == 2.5
    assert order == ["flush", "sleep", "start", "call", "end"] * 3
    seconds = [cycles / device.CYCLES_S for cycles in asked]
    assert seconds == pytest.approx([device.SLEEP_S, 0.015, 0.015])

    def slow():
        order.append("call")
        now[0] += 9.0

    clock(slow, 2)
    assert asked[-1] / device.CYCLES_S == pytest.approx(device.LONGEST_SLEEP_S)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(device.DeviceLost, match=r"encountered$"):
        clock(call, 1)


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (["nvjet_tst_256x128_64x4_2x1_v_bz_TNT", "fold_kernel", "combine_kernel"], "Triton path"),
        (["liger_cross_entropy_kernel", "nvjet_tst_128x256"], "Triton path"),
        (["_cce_lse_forward_kernel"], "Triton path"),
        (["kernel_cutlass_kernel_liger_fused_sm90", "liger_cross_entropy_kernel"], "CuTe path"),
        (
            [
                "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64",
                "void at::native::softmax<float>(...)",
            ],
            "vendor and torch kernels",
        ),
        ([], ""),
    ],
)
def test_rows_are_named_after_the_path_that_ran(names, path):
    assert device.path_of(names) == path


XML = """<testsuites><testsuite>
<testcase classname="tests.test_linear_nll" name="test_values[triton-cuda-torch.bfloat16-ragged]"/>
<testcase classname="tests.test_linear_nll" name="test_values[triton-cuda-torch.bfloat16-bias]"/>
<testcase classname="tests.test_linear_nll" name="test_values[triton-cuda-torch.float32-bias]">
<failure message="error 1.0 over 0.1&#10;more">text</failure></testcase>
<testcase classname="tests.test_linear_nll" name="test_values[triton-cuda-torch.float32-one]"><skipped/></testcase>
<testcase classname="tests.test_gaussian_blur" name="test_other[triton-cuda]"/>
</testsuite></testsuites>"""


def test_correctness_is_read_by_op_and_dtype():
    case = correctness.case_of(XML)
    rows = {row["name"]: row for row in case["rows"]}
    assert rows["linear_nll, bfloat16"]["value"] == 2 and rows["gaussian_blur, any dtype"]["value"] == 1
    wrong = rows["linear_nll, float32"]
    assert wrong["status"] == "wrong" and "1 of its tests fail" in wrong["reason"]
    assert "float32-bias]: error 1.0 over 0.1" in wrong["reason"]
    assert "cut off" in correctness.case_of(XML, cut=True)["label"]


NCU = """==PROF== Connected to process 1
==PROF== Profiling "fold_kernel" - 0: 0%....100% - 8 passes
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","fold_kernel","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","83.21"
"0","1","fold_kernel","GPU Speed Of Light Throughput","Duration","us","2,410.5"
"0","1","fold_kernel","Occupancy","Block Limit Registers","block","1"
"0","1","fold_kernel","Occupancy","","",""
"""


def test_counters_are_read_from_ncu():
    rows = {row["name"]: (row["value"], row["unit"]) for row in counters.rows_of(NCU)}
    assert rows["GPU Speed Of Light Throughput: Compute (SM) Throughput"] == (83.21, "%")
    assert rows["GPU Speed Of Light Throughput: Duration"] == (2410.5, "us")
    assert rows["Occupancy: Block Limit Registers"] == (1.0, "block") and len(rows) == 3
    assert counters.rows_of("==ERROR== no permission") == []


def test_tiles_of_the_table_are_exchanged_and_put_back():
    pytest.importorskip("triton")
    from dataclasses import replace

    from benchmarks.gpu import tiles
    from vig_kernels.kernels.triton import launch, tile_configs

    before = dict(tile_configs.HEAD)
    key = ("fold", "sm_90", "16-bit")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch, "target_of", lambda device: "sm_90")
        found = tiles.candidates("fold", "cpu")
        assert found[0] == before[key][0] and len(set(found)) == len(found) > 5
        assert replace(found[0], group=8) in found
        with tiles.tile("fold", found[1], "cpu"):
            assert tile_configs.HEAD[key] == (found[1], found[1])
        assert before == tile_configs.HEAD


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console = Console(record=True, width=140, file=io.StringIO())
    plan.show(console)
    text = console.export_text()
    assert text.startswith("Nothing was measured") and " ms" not in text
    order = [text.index(name) for name in (
        "environment", "correctness", "score 8192 x 4096 x 151936", "train 256 x 4096 x 32064", "tiles of the fold",
        "candidates", "blur", "end to end, one", "end to end, six", "training step", "counters",
        "score 8192 x 4096 x 32000", "README's trainers", "torch.compile",
    )]  # fmt: skip
    assert order == sorted(order)


def test_every_step_has_a_function():
    import importlib

    for step in plan.steps():
        module, _, name = step.run.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), step
        assert json.loads(json.dumps(step.arguments)) is not None
    assert len({runner.stem(step.name) for step in plan.steps()}) == len(plan.steps())


def test_wheels_of_a_folder_are_installed_beside_the_rest(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no"):
        plan.install(tmp_path, tmp_path / "site")
    info = "a_peer-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "value = 7\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"a_peer.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    site = plan.install(tmp_path, tmp_path / "site")
    environment = plan.environment(True, site, tmp_path / "cache")
    code = "import a_peer, importlib.metadata as m; print(a_peer.value, m.version('a-peer'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["7", "1.0"]


def measured(name: str, p50_ms: float, **more) -> dict:
    row = {
        "name": name, "ours": False, "baseline": False, "work": 1.0, "note": "", "status": "ok", "max_error": 2e-6,
        "samples": 9, "p20_ms": 0.9 * p50_ms, "p50_ms": p50_ms, "p80_ms": 1.1 * p50_ms, "call_ms": p50_ms + 0.25,
        "kernels": [], "peak_mib": 40.0, "ratio": p50_ms / 13.0,
    }  # fmt: skip
    return row | more


def stored(folder: Path) -> dict:
    """A result as an H100 would leave it that ran out of time after one step."""
    gone = {
        "name": "Liger",
        "ours": False,
        "baseline": False,
        "note": "",
        "status": "cannot run",
        "reason": "absent",
    }
    rows = [measured("bare GEMM", 13.0, baseline=True), gone]
    rows += [measured("linear_nll", 14.3, ours=True, note="Triton path")]
    case = {
        "step": "score 8192 x 4096 x 151936, bfloat16", "suite": "score", "model": "a model", "dtype": "bfloat16",
        "shape": {"N": 8192, "D": 4096, "V": 151936}, "peak_gflops": None, "rows": rows,
    }  # fmt: skip
    values = {"step": "environment", "label": "copy", "unit": "GB/s", "rows": [
        {"name": "copy", "ours": False, "status": "ok", "value": 2987.5, "note": ""}]}  # fmt: skip
    result = machine.header("gpu", 1, False) | {
        "minutes": 2.0, "rehearsal": False, "cases": [values, case],
        "steps": [
            {"name": "environment", "status": "ok", "seconds": 9.0, "reason": ""},
            {"name": "score 8192 x 4096 x 151936, bfloat16", "status": "ok", "seconds": 31.0, "reason": ""},
            {"name": "blur", "status": "timed out", "seconds": 60.0, "reason": "over 60 s"},
        ],
    }  # fmt: skip
    result["machine"] = result["machine"] | {"gpu": {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6}}
    results.write(result, folder)
    return result


def test_pages_show_what_was_measured_and_say_what_was_not(tmp_path):
    paths = report.Paths(tmp_path / "README.md", tmp_path / "results", tmp_path / "docs" / "plots")
    stored(paths.results)
    page = tmp_path / "docs" / "kernels.md"
    page.parent.mkdir()
    marks = [f"<!-- benchmarks:{name} -->\n<!-- /benchmarks:{name} -->\n" for name in report.ON_KERNELS_PAGE]
    page.write_text("\n".join(marks))
    paths.readme.write_text("")
    report.write(paths)
    text = page.read_text()
    assert "| **linear_nll (Triton path)** | 14.3 | 12.9-15.7 | 1.10 | 14.6 | 40 | 2.0e-06 |" in text
    assert "| Liger | not measured: cannot run, absent |" in text and "| copy | 2988 |" in text
    assert "| blur | not measured (timed out), 60 s | over 60 s |" in text
    assert "| counters | not measured | the run ended before |" in text
    row = next(line for line in text.splitlines() if line.startswith("| NVIDIA H100 80GB HBM3: linear_nll"))
    floor, predicted, found, share = (float(cell) for cell in row.strip("| ").split(" | ")[1:])
    assert found == 14.3 and floor < predicted and share == pytest.approx(14.3 / predicted, rel=0.01)
    assert "`python -m benchmarks gpu --threads 1`, NVIDIA H100 80GB HBM3, 79.6 GiB, torch" in text
    assert "(plots/gpu-nvidia-h100-80gb-hbm3.png)" in text and len(list(paths.plots.iterdir())) == 1
    assert report.disagreements(paths) == []
    page.write_text(text.replace("| 14.3 |", "| 13.3 |"))
    assert any("kernels.md differs" in line for line in report.disagreements(paths))


def test_every_table_of_a_rehearsal_says_that_it_is_one(tmp_path):
    result = stored(tmp_path)
    for rehearsed in (True, False):
        heads = [table[0] for table in tables.tables(result | {"rehearsal": rehearsed})]
        assert len(heads) == 3
        assert all(head[0].startswith("REHEARSAL ON A CPU, no figures: ") == rehearsed for head in heads)
        names = [name for head in heads for name in head]
        assert ("device ms" in names, "/ cuBLAS" in names) == (not rehearsed, not rehearsed)
        assert ("interpreter ms" in names) == rehearsed
    for rehearse in (True, False):
        session = Session(tmp_path / f"{rehearse}.jsonl", rehearse=rehearse)
        session.case({"label": "a", "rows": []})
        (line,) = (tmp_path / f"{rehearse}.jsonl").read_text().splitlines()
        assert json.loads(line)["case"].get("rehearsal", False) == rehearse


def test_a_second_call_goes_on_only_with_the_same_code_and_machine(tmp_path):
    stored(tmp_path)
    (path,) = tmp_path.iterdir()
    result = results.read(path) | {"commit": "abc1234"}
    path.write_text(json.dumps(result))
    header = {name: result[name] for name in ("commit", "machine", "versions", "rehearsal")}
    assert plan.before(path, header) == (result["steps"], result["cases"])
    for change in ({"commit": "def5678"}, {"versions": {"torch": "1.0"}}, {"rehearsal": True}):
        assert plan.before(path, header | change) == ([], [])
    for commit in ("unknown", "abc1234+"):  # nobody knows which code that was
        path.write_text(json.dumps(result | {"commit": commit}))
        assert plan.before(path, header | {"commit": commit}) == ([], [])
    assert plan.before(tmp_path / "none.json", header) == ([], [])


def test_without_results_the_page_says_not_measured(tmp_path):
    paths = report.Paths(tmp_path / "README.md", tmp_path / "results", tmp_path / "plots")
    page = tmp_path / "docs" / "kernels.md"
    assert report.block("gpu", page, paths).startswith("Not measured: no GPU has run")
    predicted = report.block("predictions", page, paths)
    assert "| any GPU: not measured |" in predicted
    assert plots.cases_of({"suite": "gpu", "cases": []}) == []


@pytest.mark.slow
def test_the_whole_suite_rehearsed(tmp_path):
    """Every function of every step on tiny shapes, in Triton's interpreter; each row of ours is right."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "gpu",
        "--rehearse",
        "--minutes",
        "8",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("gpu-quick-*.json")
    result = results.read(path)
    assert [(r["name"], r["status"], r["reason"]) for r in result["steps"] if r["status"] != "ok"] == []
    assert [r["name"] for r in result["steps"]] == [step.name for step in plan.rehearsed()]
    assert "in an interpreter, not of a GPU" in " ".join(done.stdout.split())
    assert all(case["rehearsal"] for case in result["cases"])
    cases = {case["step"]: case for case in result["cases"]}
    rows = [row for case in result["cases"] for row in case["rows"]]
    assert not [row for row in rows if row["status"] in ("wrong", "failed")]
    timed = {row["name"] for row in rows if "p50_ms" in row}
    ours = {
        "linear_nll", "linear_vig, N + N rows", "linear_cross_entropy", 'linear_cross_entropy, memory="low"',
        peers.FROZEN, "gaussian_blur", "gaussian_blur, fast", "bare GEMM", "bare copy", "eager PyTorch",
    }  # fmt: skip
    assert ours <= timed
    for step in ("end to end, one question an image", "end to end, six questions an image"):
        assert cases[step]["largest_difference"] < 2e-4
        for row in cases[step]["rows"]:
            assert row["value"] > 0 and 0 <= row["outside_s"] < row["seconds"] and row["mfu"] > 0
    assert next(row for row in cases["training step"]["rows"] if row["ours"])["tokens_s"] > 0
    assert cases["correctness"]["rows"][0]["value"] >= 1
    assert all(0 < row["value"] < 20 for row in cases["README's trainers"]["rows"] if row["status"] == "ok")
    assert any(
        row.get("reason") == "needs an NVIDIA GPU of compute capability 9.0"
        for row in cases["candidates"]["rows"]
    )
    assert len(tables.tables(result)) == 1 + sum(bool(case["rows"]) for case in result["cases"])
