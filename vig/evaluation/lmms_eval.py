"""lmms-eval on a checkpoint of ours, in an environment of its own, its log and results stored beside ours.

Its dependencies are many and pinned in their own way, so it is not installed beside this package: it runs as another
process, from a virtual environment that this module makes (or is given). It ends with exit code 0 whatever happens, so
what counts is the results file that it leaves. Source: https://github.com/EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vig.data.files import check_writable, explain_write_errors, write_atomically
from vig.models.families import ModelError, family_of
from vig.models.loading import adapter_cure
from vig.store.fingerprints import weights_fingerprint

# What was tried together (2026-11), on Python 3.11.
PINS = (
    "lmms-eval==0.7.3",
    "torch==2.13.0",
    "transformers==5.24.0",
    "filelock==3.32.7",  # 4 has no filelock._api, which lmms-eval patches
    "decord==0.6.0",  # llava_hf imports it, and lmms-eval does not ask for it
)
PACKAGES = tuple(pin.partition("==")[0] for pin in PINS)
# Its name for our families; "huggingface" loads any model through the auto classes, in bfloat16.
MODELS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
    "gemma3": "gemma3",
}
OTHERS = "huggingface"
RESULTS = "lmms-eval.json"
LOG = "lmms-eval.log"
MARK = ".vig-lmms-eval"  # of an environment that is complete
LAST = 20  # lines of a log in a message
HINTS = (  # what its log says -> what helps
    (
        r"Tasks not found",
        "`{python} -m lmms_eval tasks list` shows them; --include-path adds a folder of your own",
    ),
    (
        r"ConnectionError|OfflineModeIsEnabled|LocalEntryNotFound",
        "The task's data are not in the hub's cache: run it once with access, or give a task of local data",
    ),
    (
        r"API_KEY|api_key",
        "The task's judge needs a key in the environment: see the task's folder in lmms-eval",
    ),
    (r"[Oo]ut of memory", "Lower --batch-size, or run on a larger device"),
    (
        r"torchvision::nms|Failed to load image Python extension",
        "torchvision is of another build than torch: `{python} -m pip uninstall torchvision`",
    ),
    (r"filelock\._api", "`{python} -m pip install filelock==3.32.7`"),
    (r"No module named '(?P<name>[\w.]+)'", "`{python} -m pip install {name}`"),
)


class LmmsEvalError(RuntimeError):
    """lmms-eval could not be installed, or left no results; says why, and what helps."""


@dataclass(frozen=True)
class LmmsRun:
    """What is run. model, model_args: lmms-eval's own names, by family unless given; batch_size: its own too."""

    checkpoint: str
    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    model: str | None = None
    model_args: str = ""
    device: str = "cuda"
    batch_size: int = 1

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("no task was named, expected some, such as pope,mmvet")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"include_path = {self.include_path}, expected a folder of task files")

    def command(self, python: Path, folder: Path) -> list[str]:
        """What is executed; results are written below `folder`."""
        path = Path(self.checkpoint)
        pretrained = str(path.resolve()) if path.is_dir() else self.checkpoint
        given = [part for part in self.model_args.split(",") if part]
        names = {part.partition("=")[0] for part in given}
        usual = [f"pretrained={pretrained}", f"device_map={self.device}"]
        arguments = ",".join([*(part for part in usual if part.partition("=")[0] not in names), *given])
        options = {
            "--model": self.model or lmms_model(self.checkpoint),
            "--model_args": arguments,
            "--tasks": ",".join(self.tasks),
            "--batch_size": str(self.batch_size),
            "--device": self.device,
            "--output_path": str(folder.resolve()),
            "--include_path": self.include_path and str(self.include_path.resolve()),
            "--limit": self.limit and str(self.limit),
        }
        words = [word for name, value in options.items() if value for word in (name, value)]
        return [str(python), "-m", "lmms_eval", *words, "--log_samples"]


def lmms_model(checkpoint: str) -> str:
    """lmms-eval's name for the model class of a checkpoint. Raises ModelError for what is no model of our families."""
    folder = Path(checkpoint)
    if folder.is_dir():
        cure = adapter_cure(checkpoint)
        if cure is not None:
            raise ModelError(f"cannot evaluate {checkpoint}: {cure}")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder} holds no config.json that can be read ({error}). Give a checkpoint"
            ) from None
        model_type = str(config.get("model_type"))
    else:
        from transformers import AutoConfig

        try:
            model_type = AutoConfig.from_pretrained(checkpoint).model_type
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"cannot load {checkpoint}: {reason}. Give a checkpoint, or a name on the hub"
            ) from error
    family_of(type("Config", (), {"model_type": model_type}))
    return MODELS.get(model_type, OTHERS)


# --- the environment ---


def default_env() -> Path:
    """Below XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vig" / PINS[0].replace("==", "-")


def ready_env(env: Path, log: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has lmms-eval; it is made where there is none. Raises LmmsEvalError.

    log: takes what pip says. say: told what takes long.
    """
    python = env / "bin" / "python"
    if python.is_file() and not (env / MARK).is_file() and _versions(python).get(PACKAGES[0]):
        return python  # somebody else's
    if (env / MARK).is_file():
        return python
    if env.exists() and any(env.iterdir()) and not (env / "pyvenv.cfg").is_file():
        raise LmmsEvalError(f"{env} is no virtual environment, and not empty. Give another folder with --env")
    say(f"making {env} with {', '.join(PINS)} (2.5 GB, 10 GB with CUDA; its log: {log})")
    with explain_write_errors(env), log.open("ab") as file:
        for words in (
            [sys.executable, "-m", "venv", str(env)],
            [str(python), "-m", "pip", "install", *PINS],
        ):
            if subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=_environment()).returncode:
                cure = f"Repair what it says and run again, or install into it by hand and give it with --env {env}"
                raise LmmsEvalError(f"`{' '.join(words)}` failed. {cure}\n{_tail(log)}")
        _drop_broken_torchvision(python, file, say)
    write_atomically(env / MARK, "\n".join(PINS).encode())
    return python


def _drop_broken_torchvision(python: Path, log: Any, say: Callable[[str], None]) -> None:
    """A torchvision of another build than torch breaks every import of transformers; without it all goes well."""
    found = subprocess.run(
        [str(python), "-c", "import torchvision"], capture_output=True, text=True, env=_environment()
    )
    if found.returncode and "No module named 'torchvision'" not in found.stderr:
        say("its torchvision is of another build than its torch: uninstalled")
        words = [str(python), "-m", "pip", "uninstall", "-y", "torchvision"]
        subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=_environment(), check=True)


def _environment() -> dict[str, str]:
    """Ours, without what would mix our packages with those of the other environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def _versions(python: Path) -> dict[str, str]:
    """Of the pinned packages, as far as they are installed there."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "names = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: names[n] for n in sys.argv[1:] if n in names}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *PACKAGES], capture_output=True, text=True, env=_environment()
    )
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {}


# --- the run ---


def run_lmms_eval(
    run: LmmsRun,
    out: str | Path,
    env: str | Path | None = None,
    *,
    say: Callable[[str], None] = print,
    show: Callable[[bytes], None] | None = None,
) -> dict[str, Any]:
    """Runs lmms-eval and returns what `out`/lmms-eval.json holds: results by task, and where they come from.

    env: a virtual environment that has lmms-eval, or the folder to make one in; `default_env` unless given.
    say: told what takes long. show: given what lmms-eval writes, as it comes; it stands in `out`/lmms-eval.log too.
    Raises LmmsEvalError where it cannot be installed or leaves no results, ModelError for a checkpoint it cannot read.
    """
    out = Path(out)
    check_writable(out)
    folder = out / "lmms-eval"
    command = run.command(Path("python"), folder)  # refuses the checkpoint before anything is installed
    env = Path(env) if env is not None else default_env()
    python = ready_env(env.absolute(), out.absolute() / "lmms-eval-install.log", say)
    command[0] = str(python)
    before = set(folder.glob("**/*_results.json"))
    started = datetime.now(UTC)
    code = _execute(command, out / LOG, show)
    new = sorted(set(folder.glob("**/*_results.json")) - before)
    if code or not new:
        raise LmmsEvalError(_failure(code, out / LOG, python))
    stored = json.loads(new[-1].read_text(encoding="utf-8"))
    summary = {
        "results": stored["results"],
        "results_file": str(new[-1].relative_to(out)),
        "log": LOG,
        "provenance": _provenance(run, python, command, started),
    }
    missing = [task for task in run.tasks if not _has(task, stored)]
    if missing:
        raise LmmsEvalError(
            f"lmms-eval left no results of {', '.join(missing)}. {_failure(code, out / LOG, python)}"
        )
    write_atomically(
        out / RESULTS, json.dumps(summary, indent=1, ensure_ascii=False, default=str).encode() + b"\n"
    )
    return summary


def _has(task: str, stored: Mapping[str, Any]) -> bool:
    """A task, or a group of tasks."""
    return any(task in stored.get(name, {}) for name in ("results", "groups", "group_subtasks"))


def _execute(command: list[str], log: Path, show: Callable[[bytes], None] | None) -> int:
    """Its exit code. What it writes goes to the log, and to `show` as it comes; it ends with this process."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
        try:
            while piece := process.stdout.read1(1 << 16):
                file.write(piece)
                file.flush()
                if show is not None:
                    show(piece)
            return process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _provenance(run: LmmsRun, python: Path, command: list[str], started: datetime) -> dict[str, Any]:
    versions = _versions(python)
    found = [f"{name}=={version}" for name, version in versions.items()]
    return {
        **json.loads(json.dumps(asdict(run), default=str)),
        "lmms_model": command[command.index("--model") + 1],
        "revision": weights_fingerprint(run.checkpoint),
        "versions": versions,
        "untried": [one for one in found if one.partition("+")[0] not in PINS],
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
    }


def _failure(code: int, log: Path, python: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    told = re.findall(r"Error during evaluation: (.*?)\. Please set `--verbosity", text, re.DOTALL)
    reason = told[-1].strip() if told else "it says no reason"
    for pattern, cure in HINTS:
        found = re.search(pattern, text)
        if found:
            cure = cure.format(python=python, **found.groupdict())
            return f"lmms-eval failed (exit code {code}): {reason}. {cure}. Its log: {log}"
    return f"lmms-eval failed (exit code {code}): {reason}. The last lines of {log}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(lines[-LAST:])


def figures(results: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, float, float | None]]:
    """(task, measure, value, its standard error) of each number among the results."""
    for task, of_task in results.items():
        for name, value in of_task.items():
            measure, _, rest = name.partition(",")
            if isinstance(value, int | float) and "_stderr" not in measure:
                error = of_task.get(f"{measure}_stderr,{rest}")
                yield task, measure, float(value), float(error) if isinstance(error, int | float) else None
