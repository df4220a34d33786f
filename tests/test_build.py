"""The build records why it failed, and the package says so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vig_kernels.kernels import cpu
from vig_kernels.kernels.cpu import native

ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path: Path, **environment: str) -> tuple[dict, list[str]]:
    """Run build_ext on a copy of the sources; return the record and the extensions beside it."""
    for name in ("setup.py", "CMakeLists.txt", "csrc", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    package = tmp_path / "out" / "vig_kernels"
    record = json.loads((package / "_build.json").read_text())
    return record, [path.name for path in package.iterdir() if path.name.startswith("_native")]


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
def test_a_broken_compiler_is_recorded_and_not_fatal(tmp_path):
    pytest.importorskip("pybind11", reason="the build asks for pybind11, which is not in this environment")
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    stale = tmp_path / "out" / "vig_kernels" / "_native.cpython-stale.so"
    record, extensions = build(tmp_path, CXX=str(compiler))
    assert record["built"] is False and not extensions and not stale.exists()
    assert "this compiler is broken" in record["reason"]
    assert "pip install" in record["cure"]


def test_the_record_becomes_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "RECORD", tmp_path / "_build.json")
    assert "have not been built" in native._read_record()
    native.RECORD.write_text(json.dumps({"built": False, "reason": "no g++", "cure": "install g++"}))
    assert "no g++" in native._read_record() and "install g++" in native._read_record()
    native.RECORD.write_text(json.dumps({"built": True}))
    assert "another Python" in native._read_record()


def test_without_the_extension_there_is_a_reason_and_no_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "vig_kernels._native", None)
    native._load.cache_clear()
    try:
        assert native.module() is None
        assert native.why_not() and cpu.why_not(torch.device("cpu")) == native.why_not()
        assert native.isas() == {} and native.isa() is None and native.machine_note() == ""
        with pytest.raises(RuntimeError):
            native.peak_f32(1)
    finally:
        native._load.cache_clear()


def test_only_cpu_tensors():
    assert "backend='auto'" in cpu.why_not(torch.device("cuda"))


@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a checkout")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_kernels_pass_their_own_tests(tmp_path):
    """In C++: every instruction set of this machine, and AVX512_BF16 and AMX in emulation."""
    pytest.importorskip("cmake", reason="the tests are built with CMake")
    cmake = [sys.executable, "-m", "cmake"]
    for command in (
        [*cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DVIG_TESTS=ON"],
        [*cmake, "--build", str(tmp_path), "--parallel", "2"],
        [str(tmp_path / "native_tests")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "native tests passed on: amx_bf16 (emulated) avx512_bf16 (emulated)" in done.stdout
