"""Choosing a backend, what is public, and the errors that all linear ops share."""

import os
import subprocess
import sys

import pytest
import torch

import vig_kernels
import vig_kernels.__main__
import vig_kernels.kernels.triton
from vig_kernels import (
    BackendUnavailable,
    backend_table,
    backends,
    dispatch,
    linear_cross_entropy,
    linear_nll,
    linear_vig,
    reference,
)
from vig_kernels.kernels.cpu import native

CPU = torch.device("cpu")
HIDDEN, WEIGHT, TARGET = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([0, 10, -100, 3])


def test_public_names():
    ops = {"linear_nll", "linear_vig", "linear_cross_entropy", "gaussian_blur"}
    assert vig_kernels.__version__[0].isdigit() and not hasattr(vig_kernels, "nothing")
    assert set(vig_kernels.__all__) == ops | {"backends", "BackendUnavailable", "TokenVIG"}


def test_auto_takes_the_best_that_can_run(monkeypatch):
    monkeypatch.delenv("VIG_BACKEND", raising=False)
    able = {"triton": "no GPU", "cpu": None, "torch": None, "reference": None}
    rows = {name: backend_table.BACKENDS[name] for name in able}
    monkeypatch.setattr(backend_table, "BACKENDS", rows)
    monkeypatch.setattr(dispatch, "why_not", lambda op, name, device: able[name])
    assert dispatch.resolve("linear_nll", "auto", CPU) == "cpu"
    able["cpu"] = "not built"
    assert dispatch.resolve("linear_nll", "auto", CPU) == "torch"
    assert dispatch.resolve("linear_nll", "reference", CPU) == "reference"
    with pytest.raises(
        BackendUnavailable, match="linear_nll cannot run on cpu with backend='cpu'; cpu: not built"
    ):
        dispatch.resolve("linear_nll", "cpu", CPU)
    able["torch"] = able["reference"] = "broken"
    with pytest.raises(
        BackendUnavailable, match="triton: no GPU; cpu: not built; torch: broken; reference: broken"
    ):
        dispatch.resolve("linear_nll", "auto", CPU)


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("VIG_BACKEND", "reference")
    assert dispatch.resolve("linear_nll", "auto", CPU) == "reference"
    assert dispatch.resolve("linear_nll", "torch", CPU) == "torch"
    monkeypatch.setenv("VIG_BACKEND", "fastest")
    with pytest.raises(ValueError, match="VIG_BACKEND=fastest is not one of 'auto', 'triton'"):
        linear_nll(HIDDEN, WEIGHT, TARGET)
    with pytest.raises(ValueError, match="backend='best' is not one of"):
        linear_nll(HIDDEN, WEIGHT, TARGET, backend="best")


def test_a_module_that_is_missing_or_broken_has_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "linear_nll.py"
    broken.write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(vig_kernels.kernels.triton, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "vig_kernels.kernels.triton.linear_nll", raising=False)
    load = dispatch._load.__wrapped__
    assert "a_package_that_is_not_there" in load("linear_nll", "triton")
    assert load("linear_vig", "triton") == "not part of this build"


def test_backends_lists_every_op():
    states = backends()
    assert {key[0] for key in states} == set(backend_table.OPS)
    assert all(
        states[op, "torch", "cpu"] is None and states[op, "reference", "cpu"] is None
        for op in backend_table.OPS
    )
    listing = subprocess.run(
        [sys.executable, "-m", "vig_kernels"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    ).stdout
    assert "compiled part" in listing
    for op, backend, _ in states:
        assert any(line.split()[:2] == [op, backend] for line in listing.splitlines())


def test_a_reader_that_stops_after_a_line_is_no_error():
    command = [sys.executable, "-u", "-m", "vig_kernels"]  # unbuffered: what is printed is written at once
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline().startswith("torch ")
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 0


def test_reference_runs_like_any_backend():
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.bfloat16().float().requires_grad_()
    options = {"stats": ("lse", "argmax"), "backend": "reference"}
    nll, values = linear_nll(hidden, weight, TARGET, **options)
    exact = reference.linear_nll(hidden, weight, TARGET)
    assert nll.dtype == values["lse"].dtype == torch.float32 and torch.equal(nll, exact.float())
    nll.sum().backward()
    assert hidden.grad.dtype == torch.float32 and hidden.grad.any()
    loss = linear_cross_entropy(hidden, weight, TARGET, backend="reference")
    torch.testing.assert_close(loss, exact.sum().float() / 3)
    found = linear_vig(hidden, hidden + 1, weight, TARGET, backend="reference")
    torch.testing.assert_close(found.nll_image, nll.detach())
    assert torch.equal(found.vig, found.nll_null - found.nll_image)


def test_backends_shows_itself_as_a_table():
    lines = str(backends()).splitlines()
    assert lines[0].split() == ["op", "backend", "device", "state"] and len(lines) == 1 + len(backends())
    row = next(line for line in lines if line.split()[:3] == ["linear_nll", "torch", "cpu"])
    assert row.startswith("linear_nll            torch      cpu     available")


class DTensor(torch.Tensor):
    """Stands for torch.distributed.tensor.DTensor, which needs a process group."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(11, 7)}, r"expected weight \(V, 8\) to fit hidden \(4, 8\).* got \(11, 7\)"),
        ({"weight": torch.randn(0, 8)}, r"got \(0, 8\) \(a ZeRO-3 shard"),
        ({"weight": torch.randn(8)}, r"got \(8,\)"),
        (
            {"weight": torch.randn(11, 8).half()},
            r"hidden and weight of one dtype, got torch.float32 and torch.float16: call hidden\w*.to\(weight.dtype\), "
            "or run under torch.autocast",
        ),
        (
            {"weight": torch.randn(11, 8).double()},
            r"expected weight of dtype float32, bfloat16, float16, got float64: call weight.to\(torch.float32\)",
        ),
        ({"weight": torch.randn(11, 8).as_subclass(DTensor)}, r"weight is a DTensor.*full_tensor\(\)"),
        ({"hidden": [[1.0]]}, "expected hidden to be a torch.Tensor, got list"),
        ({"hidden": torch.tensor(1.0)}, "expected hidden .* got a 0-d tensor"),
        ({"target": torch.tensor([0, 1])}, r"expected target \(4,\) to fit hidden \(4, 8\), got \(2,\)"),
        (
            {"target": torch.tensor([0.0, 1, 2, 3])},
            r"expected target .*, got float32: call target.to\(torch.int64\)",
        ),
        ({"target": torch.tensor([0, 1, 11, 3])}, r"target\[2\] = 11 is not in \[0, 11\)"),
        ({"target": torch.tensor([0, -1, 1, 3])}, r"target\[1\] = -1 is not in \[0, 11\)"),
        ({"bias": torch.randn(10)}, r"expected bias \(11,\), got \(10,\)"),
        ({"logit_scale": float("inf")}, "logit_scale=inf is not a finite number"),
        ({"logit_scale": "1"}, "expected logit_scale to be a number, got str '1'"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 is not a finite positive number"),
        ({"logit_softcap": 1e-46}, r"logit_softcap=1e-46 is not in \[1.18e-38, 3.4e\+38\], float32's range"),
        ({"logit_softcap": 1e39}, r"logit_softcap=1e\+39 is not in"),
        ({"logit_scale": 1e39}, r"logit_scale=1e\+39 is beyond 3.4e\+38, the end of float32's range"),
        ({"logit_scale": -1e39}, r"logit_scale=-1e\+39 is beyond"),
        ({"ignore_index": None}, "expected ignore_index to be an int, got NoneType"),
        ({"weight": torch.empty(11, 8, device="meta")}, "expected hidden on meta with weight, got cpu"),
    ],
)
@pytest.mark.parametrize("op", [linear_nll, linear_vig, linear_cross_entropy], ids=lambda op: op.__name__)
def test_bad_arguments_show_their_value(op, change, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    hidden, weight, target = (arguments.pop(name) for name in ("hidden", "weight", "target"))
    hiddens = (hidden, hidden) if op is linear_vig else (hidden,)
    if op is linear_vig:
        message = message.replace("hidden", "hidden_image")
    for backend in ("torch", "reference"):
        with pytest.raises((ValueError, TypeError), match=message):
            op(*hiddens, weight, target, **arguments, backend=backend)


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        (linear_nll, {"stats": ("lse", "top5")}, "stats='top5' is not one of 'lse', 'entropy', 'argmax'"),
        (linear_nll, {"stats": "lse"}, r"expected stats to be a tuple such as \('lse',\)"),
        (linear_cross_entropy, {"reduction": "avg"}, "reduction='avg' is not one of"),
        (linear_cross_entropy, {"memory": "tiny"}, "memory='tiny' is not one of"),
        (
            linear_cross_entropy,
            {"token_weight": torch.ones(3)},
            r"expected token_weight \(4,\) as target, got \(3,\)",
        ),
        (linear_cross_entropy, {"num_items": torch.ones(2)}, r"expected num_items 0-d, got \(2,\)"),
        (linear_cross_entropy, {"num_items": "3"}, "expected num_items to be a number, got str '3'"),
        (linear_cross_entropy, {"num_kept": 2.0}, "expected num_kept to be an int, got float 2.0"),
        (linear_cross_entropy, {"z_loss": float("nan")}, "z_loss=nan is not a finite number"),
    ],
)
def test_bad_options_show_their_value(op, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        op(HIDDEN, WEIGHT, TARGET, **options)


def test_the_two_passes_must_fit():
    with pytest.raises(ValueError, match=r"expected hidden_null \(4, 8\) as hidden_image, got \(3, 8\)"):
        linear_vig(HIDDEN, HIDDEN[:3], WEIGHT, TARGET)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("VIG_BACKEND", "torch", 'linear_nll            torch      cpu     available, taken by "auto"'),
        ("VIG_BACKEND", "bogus", "VIG_BACKEND=bogus is not one of"),
        ("VIG_FORCE_ISA", "bogus", "VIG_FORCE_ISA=bogus"),
    ],
)
def test_the_table_tells_what_the_environment_does(variable, value, told):
    if variable == "VIG_FORCE_ISA" and native.module() is None:
        pytest.skip("no compiled kernels")
    run = subprocess.run(
        [sys.executable, "-m", "vig_kernels"],
        capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)) | {variable: value},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert told in run.stdout
    if variable == "VIG_BACKEND":
        assert not [line for line in run.stdout.splitlines() if " cpu        cpu" in line and "taken" in line]


def test_a_new_backend_is_a_package_and_a_row(tmp_path, monkeypatch):
    """Found by errors, table and help, and taken by name; it says itself where it runs, and has one op of four."""
    package = tmp_path / "abacus"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def why_not(device):\n    return None if device.type == 'cpu' else 'beads are on the CPU'\n"
    )
    (package / "linear_nll.py").write_text(
        "def forward(problem, stats):\n"
        "    counted = problem.target.float()\n"
        "    return counted, {stat: counted + 1 for stat in stats}\n"
    )
    monkeypatch.setattr(vig_kernels.kernels, "__path__", [*vig_kernels.kernels.__path__, str(tmp_path)])
    before = backend_table.choices()
    row = backend_table.Backend("abacus", "CPUs: beads", "vig_kernels.kernels.abacus")
    monkeypatch.setitem(backend_table.BACKENDS, "abacus", row)
    states = backends()
    assert states["linear_nll", "abacus", "cpu"] is None
    assert states["linear_vig", "abacus", "cpu"] == "not part of this build"
    assert dispatch.why_not("linear_nll", "abacus", torch.device("meta")) == "beads are on the CPU"
    nll, found = linear_nll(HIDDEN, WEIGHT, TARGET, stats=("lse",), backend="abacus")
    assert torch.equal(nll, TARGET.float()) and torch.equal(found["lse"], TARGET + 1.0)
    with pytest.raises(BackendUnavailable, match="abacus: not part of this build"):
        linear_vig(HIDDEN, HIDDEN, WEIGHT, TARGET, backend="abacus")
    with pytest.raises(ValueError, match=", 'abacus'"):
        linear_nll(HIDDEN, WEIGHT, TARGET, backend="best")
    assert backend_table.choices() == f"{before.replace(' or ', ', ')} or abacus"
    assert "abacus     CPUs: beads" in vig_kernels.__main__.backend_lines()


def test_the_table_of_backends_needs_no_torch():
    code = "import sys, vig_kernels.backend_table; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    )
