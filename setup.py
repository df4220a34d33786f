"""Builds the native extension `vig_kernels._native` with CMake; a failure is recorded, never fatal.

Without a compiler the package still installs and runs on its other backends: `vig_kernels/_build.json` then holds
the reason and the cure, which `vig_kernels.kernels.cpu.native.why_not()` hands to the user.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TAIL = 1500  # characters of the compiler's message that are kept
CURE = (
    "install a C++20 compiler (Debian and Ubuntu: `apt-get install g++`; macOS: `xcode-select --install`), "
    "then run `pip install --force-reinstall --no-deps vig-kernels` (or `pip install .` in a checkout)"
)


class BuildFailure(Exception):
    """A step of the native build did not succeed; the text says which, and why."""


def run(command: list[str]) -> None:
    """Run one step; raise BuildFailure with the tail of what it printed."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BuildFailure(f"{command[0]}: {error}") from error
    sys.stdout.write(done.stdout)
    if done.returncode != 0:
        raise BuildFailure(
            f"{Path(command[0]).name} ended with {done.returncode}: {done.stdout.strip()[-TAIL:]}"
        )


def find_cmake() -> str:
    """The CMake of this environment, else the one on PATH."""
    beside = Path(sys.executable).parent / "cmake"
    found = str(beside) if beside.exists() else shutil.which("cmake")
    if found is None:
        raise BuildFailure("CMake was not found beside the interpreter or on PATH")
    return found


def is_stale(cache: str) -> bool:
    """Whether a build directory was configured for another checkout, or for another compiler than CXX names now."""
    wanted = os.environ.get("CXX")
    known = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    other_compiler = wanted and known and known[1] not in (wanted, shutil.which(wanted.split()[0]))
    return f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache or bool(other_compiler)


def build_native(build: Path, output: Path, name: str) -> None:
    """Configure and compile in `build`; leave the extension in `output` under `name`."""
    import pybind11

    cmake = find_cmake()
    build.mkdir(parents=True, exist_ok=True)
    cache = build / "CMakeCache.txt"
    if cache.exists() and is_stale(cache.read_text()):
        shutil.rmtree(build)
        build.mkdir(parents=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None and cache.exists() and "CMAKE_GENERATOR:INTERNAL=Ninja\n" in cache.read_text():
        cache.unlink()  # configured while there was a ninja
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(
        [
            cmake,
            *generator,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVIG_EXTENSION_NAME={name}",
        ]
    )
    run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1), "--target", "_native"])
    built = build / name
    if not built.exists():
        raise BuildFailure(f"the build ended well but left no {built}")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, output / name)


class NativeBuild(build_ext):
    """Runs CMake, and writes `_build.json` beside the extension in every case."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        record: dict[str, object] = {"built": True, "reason": None, "cure": None}
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        try:
            build_native(build, target.parent, target.name)
        except (BuildFailure, ImportError, OSError) as error:
            shutil.rmtree(build, ignore_errors=True)  # what failed is asked anew next time
            target.unlink(missing_ok=True)  # a stale extension would hide the failure
            record = {"built": False, "reason": str(error), "cure": CURE}
            print(f"warning: vig_kernels._native was not built: {error}\n{CURE}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: extension and record go beside the package; a stale extension goes away."""
        for ext in self.extensions:
            package = Path(
                self.get_finalized_command("build_py").get_package_dir(ext.name.rpartition(".")[0])
            )
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            (package / built.name).unlink(missing_ok=True)
            for path in (built, built.with_name("_build.json")):
                if path.exists():
                    shutil.copy2(path, package / path.name)

    def get_outputs(self) -> list[str]:
        """The record is an output of the build as well, and the extension only where it was built."""
        outputs = [path for path in super().get_outputs() if Path(path).exists()]
        return outputs + [str(Path(path).parent / "_build.json") for path in super().get_outputs()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("vig_kernels._native", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
