"""The commands as a user types them: output, exit codes, and one line for what the user can mend."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vig
from vig.cli import app, main
from vig.data.sample import DataError, SampleError
from vig.models.null_image import NULLS
from vig.store.folder import SettingsDiffer
from vig.store.scores import read_scores
from vig.store.selections import read_selection, selection_metadata
from vig_kernels import BackendUnavailable
from vig_kernels.__main__ import main as kernels

TRAIN = importlib.import_module("vig.training.train")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint and a dataset on disk; record 3 has no image file, record 5 is text alone."""
    folder = tmp_path_factory.mktemp("given")
    tiny.save_llava(folder / "model")
    records = []
    for number in range(12):
        tiny.save_picture(folder / f"{number}.png", number)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"red {number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    records[3]["image"] = "nowhere.png"
    records[5] = {
        "id": "5",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"}],
    }
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_score_select_train_report(given, tmp_path):
    said = call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", code=3)
    assert "scored 11 samples" in said and "1 text-only" in said
    assert "data.json#3 (id '3'): no image at" in said and "--image-root" in said
    assert "1 of 12 samples could not be scored" in said
    said = call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", code=3)
    assert "scored 0 samples" in said and "12 were done before" in said
    assert "scoring: 12 of 12" in said and "()" not in said
    assert "1 samples of earlier runs could not be scored; --retry failed" in said

    said = call("select", tmp_path / "scores", "--p", "50", "-o", tmp_path / "selection")
    assert "tau = " in said and "samples kept 5 of 10" in said and re.search(r"noise floor \S+ nats", said)
    kept = read_selection(tmp_path / "selection")
    assert kept["data.json#5"][0] and not kept["data.json#3"][0]

    said = call(
        "train", given / "model", given / "data.json", "--selection", tmp_path / "selection", "-o", tmp_path / "out",
        "--lr", "1e-3", "--batch-size", "2",
    )  # fmt: skip
    assert "6 samples kept, 6 not selected" in said and (tmp_path / "out" / "model.safetensors").exists()

    call("report", tmp_path / "scores", "--selection", tmp_path / "selection", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "data:image/webp;base64," in page and "http://" not in page.replace("http://www.w3.org", "")
    assert modes(tmp_path) == {oct(0o666 & ~umask())}, "others may read what the umask lets them"


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def modes(folder: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}


def test_select_passes_its_options_on(given, tmp_path):
    call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", code=3)
    said = call(
        "select",
        tmp_path / "scores",
        "-o",
        tmp_path / "s",
        "--level",
        "token",
        "--clip",
        "0.01",
        "--tau-floor",
        "9",
    )
    assert "level token" in said and "tau = 9 nats (the floor" in said
    assert "a probability between 0 and 1" in call(
        "select", tmp_path / "scores", "-o", tmp_path / "s", "--clip", "-1", code=2
    )


@pytest.mark.parametrize("null", NULLS)
def test_dry_run_scores_nothing(given, tmp_path, null):
    said = call(
        "score", given / "model", given / "data.json", "-o", tmp_path / "scores", "--dry-run", "--null", null,
        code=3,
    )  # fmt: skip
    assert "checked 12 records: 10 with images, 1 text-only" in said
    assert "estimate:" in said and "nothing was scored" in said
    assert not (tmp_path / "scores").exists()


def test_dry_run_of_a_job_checks_its_windows_alone(given, tmp_path):
    arguments = ("score", given / "model", given / "data.json", "-o", tmp_path / "scores", "--dry-run")
    said = call(*arguments, "--window", "2", "--shard", "1/4", code=3)  # records 2, 3, 10 and 11
    assert "checked 4 records: 3 with images, 0 text-only" in said and "data.json#3" in said
    said = call(*arguments, "--window", "2", "--shard", "0/4")  # 0, 1, 8 and 9
    assert "checked 4 records: 4 with images" in said
    assert not (tmp_path / "scores").exists()


def test_a_job_without_a_window_says_so_and_ends_well(given, tmp_path):
    """As `--shard 1/2` of data that one window holds; and when it is given again."""
    arguments = ["score", given / "model", given / "data.json", "-o", tmp_path / "scores", "--window", 5]
    expected = "no window of the data is this job's (3/4): 12 records make 3 windows of 5."
    for _ in range(2):
        said = call(*arguments, "--shard", "3/4")
        assert expected in said and "scored 0 samples" in said
    said = CliRunner().invoke(app, [*map(str, arguments), "--shard", "3/4", "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["notes"][0].startswith(expected)


@pytest.mark.parametrize("null", NULLS)
def test_inspect_shows_the_scores_of_every_null(given, tmp_path, null):
    call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", "--null", null, code=3)
    row = next(row for batch in read_scores(tmp_path / "scores") for row in batch.to_pylist()[2:3])
    arguments = ("inspect", given / "model", given / "data.json", "--index", "2", "-o", tmp_path / "p.png")
    said = call(*arguments, "--null", null)  # record 3 has no image file: the donor is that of record 4
    shown = float(re.search(r"sample VIG (\S+) nats", said)[1])
    assert shown == pytest.approx(row["vig"], abs=2e-4) and abs(shown) > 1e-3
    width, height = Image.open(tmp_path / "p.png").size  # of one image, and its null below
    assert (height > width) == (null != "drop")


def test_shuffle_of_a_lone_photograph_says_what_helps(given, tmp_path):
    tiny.picture(5, (640, 480)).save(tmp_path / "photo.jpg")
    with pytest.raises(SampleError, match=r"there is no other image.*Use null blur"):
        call("inspect", given / "model", tmp_path / "photo.jpg", "--answer", "red", "--null", "shuffle")


def test_inspect_a_record_and_a_photograph(given, tmp_path):
    picture = tmp_path / "seen.png"
    said = call("inspect", given / "model", given / "data.json", "--index", "2", "-o", picture)
    assert "data.json#2" in said and "<image> x 16" in said and "sample VIG" in said and picture.exists()
    tiny.picture(5, (640, 480)).save(tmp_path / "photo.jpg")
    said = call(
        "inspect", given / "model", tmp_path / "photo.jpg", "--question", "What?", "--answer", "A red thing",
        "-o", picture,
    )  # fmt: skip
    assert "photo.jpg" in said and "A red thing" not in said.split("NLL")[1] and "VIG" in said


def test_wrong_usage_exits_with_2(given, tmp_path):
    arguments = ("score", given / "model", given / "data.json", "-o", tmp_path / "s")
    assert "0 <= i < n" in call(*arguments, "--shard", "4/4", code=2)
    assert "expected failed" in call(*arguments, "--retry", "all", code=2)
    assert "expected plain or ray" in call(*arguments, "--engine", "spark", code=2)
    call("score", given / "model", code=2)


@pytest.mark.parametrize(
    "command, options",
    [
        (
            "score",
            {
                "null": "fog",
                "sigma": "0",
                "dtype": "fp8",
                "backend": "cuda",
                "end-of-turn": "never",
                "device": "abacus",
            },
        ),
        (
            "inspect",
            {"null": "fog", "sigma": "-1", "dtype": "fp8", "end-of-turn": "never", "device": "abacus"},
        ),
        ("select", {"p": "0", "level": "foo", "clip": "-1", "tau-floor": "nan", "seed": str(2**63)}),
    ],
)
def test_wrong_values_exit_with_2_before_anything_is_loaded(tmp_path, command, options):
    given = {"select": ("nowhere",)}.get(command, ("no model", "no data"))
    for name, value in options.items():
        said = call(command, *given, "-o", tmp_path / "out", f"--{name}", value, code=2)
        assert "Invalid value" in said and value in said and "loading" not in said


@pytest.mark.parametrize(
    "option, value", [("end-of-turn", "never"), ("freeze", "["), ("seed", "-1"), ("device", "abacus")]
)
def test_wrong_values_of_training_exit_with_2(given, option, value, monkeypatch, capsys):
    monkeypatch.setattr(TRAIN, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(given)
    monkeypatch.setattr(
        sys, "argv", ["vig", "train", "model", "data.json", "-o", "out", f"--{option}", value]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and value in said and "\nvig: WrongSetting: " in said


@pytest.mark.parametrize("command", ["score", "train"])
def test_data_that_is_not_there_is_said_before_the_model_is_read(given, tmp_path, monkeypatch, command):
    monkeypatch.setattr("vig.scoring.scorer.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(TRAIN, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="no such data"):
        call(command, given / "model", given / "nowhere.json", "-o", tmp_path / "out")


def test_names_of_folders_are_printed_as_they_are(given, tmp_path):
    folder = tmp_path / "[run 1]"
    assert f"scores: {folder}" in call("score", given / "model", given / "data.json", "-o", folder, code=3)
    assert f"report: {folder}.html" in call("report", folder, "-o", f"{folder}.html")


def test_a_backend_that_is_not_here_is_said_before_the_model_is_read(given, tmp_path, monkeypatch):
    monkeypatch.setattr("vig.scoring.scorer.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("vig_kernels.dispatch.why_not", lambda *_: "not today")
    with pytest.raises(BackendUnavailable, match="cpu: not today"):
        call("score", given / "model", given / "data.json", "-o", tmp_path / "s", "--backend", "cpu")


def test_select_from_unfinished_scores_ends_with_3_and_says_why(given, tmp_path):
    job = (
        "score",
        given / "model",
        given / "data.json",
        "-o",
        tmp_path / "scores",
        "--window",
        "4",
        "--shard",
    )
    choice = ("select", tmp_path / "scores", "-o", tmp_path / "selection")
    call(*job, "0/2", code=3)
    result = CliRunner().invoke(app, [str(word) for word in choice])
    assert result.exit_code == 3 and "have not begun" not in result.stdout
    assert "the scores are not complete" in result.stderr
    assert "of 2 jobs these have not begun: 1" in result.stderr
    assert len(read_selection(tmp_path / "selection")) == 8
    call(*job, "1/2")
    assert "not complete" not in call(*choice)  # the same settings: replaced
    assert len(read_selection(tmp_path / "selection")) == 12


def test_data_that_is_a_link_is_known_by_its_own_name(given, tmp_path):
    """In the hub's cache every file is one, to a file whose name says nothing."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5e1f").write_bytes((given / "data.json").read_bytes())
    (tmp_path / "latest.json").symlink_to("blobs/5e1f")
    scores, kept, page = (tmp_path / name for name in ("scores", "kept.json", "report.html"))
    call(
        "score", given / "model", tmp_path / "latest.json", "--image-root", given, "-o", scores, "--limit", 3
    )
    call("select", scores, "-o", tmp_path / "selection", "--p", "100", "--export", kept)
    assert json.loads(kept.read_text()) == json.loads((given / "data.json").read_text())[:3]
    call("report", scores, "-o", page)
    assert page.read_text().count("data:image/webp;base64,") >= 3 and "are missing" not in page.read_text()


def test_select_exports_the_kept_records(given, tmp_path):
    call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", code=3)
    choice = ("select", tmp_path / "scores", "-o", tmp_path / "selection", "--p", "50", "--export")
    assert f"6 records: {tmp_path / 'kept.json'}" in call(*choice, tmp_path / "kept.json")
    records = {record["id"]: record for record in json.loads((given / "data.json").read_text())}
    kept = json.loads((tmp_path / "kept.json").read_text())
    selected = read_selection(tmp_path / "selection")
    assert [record["id"] for record in kept] == [key.split("#")[1] for key in selected if selected[key].keep]
    assert all(record == records[record["id"]] for record in kept)
    assert "not the name of a .json or .jsonl" in call(*choice, tmp_path / "kept.csv", code=2)


def test_another_selection_is_replaced_only_when_asked_to(given, tmp_path):
    call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", code=3)
    choice = ("select", tmp_path / "scores", "-o", tmp_path / "selection", "--p")
    call(*choice, "30")
    call(*choice, "30")
    with pytest.raises(SettingsDiffer, match=r"p: the folder has 30.0, this run has 40.0\nGive --overwrite"):
        call(*choice, "40")
    assert selection_metadata(tmp_path / "selection")["selection"]["p"] == 30
    call(*choice, "40", "--overwrite")
    assert selection_metadata(tmp_path / "selection")["selection"]["p"] == 40


@pytest.mark.parametrize(
    "words, code, shown",
    [
        (["--version"], 0, vig.__version__),
        (["--help"], 0, "usage: "),
        (["--bogus"], 2, "--bogus"),
        ([], 0, "linear_vig"),
    ],
)
def test_programs_say_their_version_and_refuse_what_they_do_not_know(monkeypatch, capsys, words, code, shown):
    monkeypatch.setattr(sys, "argv", ["vig_kernels", *words])
    try:
        kernels()
    except SystemExit as stop:
        assert stop.code == code
    said = "".join(capsys.readouterr())
    assert shown in said and ("linear_vig" in said) == (words == [])
    if words == ["--version"]:
        assert vig.__version__ in call("--version")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("score", "model", "nowhere.json", "-o", "s"), "no such data: nowhere.json"),
        (("score", "nowhere", "data.json", "-o", "s"), "cannot load nowhere"),
        (("score", "model", "data.json", "-o", "s", "--device", "cuda:99"), "device = 'cuda:99'"),
        (("select", "nowhere", "-o", "s"), "nowhere does not exist"),
        (("inspect", "model", "data.json", "--index", "99"), "has no record number 99"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_1(given, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(given)
    monkeypatch.setattr(sys, "argv", ["vig", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert message in said and said.count("vig: ") == 1
    monkeypatch.setenv("VIG_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError, RuntimeError)):
        main()


@pytest.mark.parametrize("workers", [0, 1])
def test_train_names_what_it_cannot_use_and_saves_the_rest(given, tmp_path, workers):
    records = json.loads((given / "data.json").read_text())
    broken = [{"id": f"b{row}", "conversations": []} for row in range(9)]
    data = given / f"broken{workers}.json"
    data.write_text(json.dumps(broken[:1] + records + broken[1:] * 2))
    said = call(
        "train", given / "model", data, "-o", tmp_path / "out", "--batch-size", "2", "--workers", workers, code=3
    )  # fmt: skip
    assert f"17 samples: {data.name}#0 (id 'b0'): no answer turn" in said and "Traceback" not in said
    assert "all of them: `errors` in" in said and "17 records could not be read" in said
    assert "1 samples were left out of training" in said
    errors = json.loads((tmp_path / "out" / "train.json").read_text())["errors"]
    assert len(errors) == 18 and errors[17].startswith(f"{data.name}#4 (id '3'): no image at")


def test_train_says_its_own_dtypes():
    said = call("train", "--help")
    assert "autocast" in said and "float16" not in said.replace("bfloat16", "")


def test_python_dash_m_vig_is_the_same_program(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "vig", "select", "nowhere", "-o", "s"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nowhere does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_one_line_and_exit_code_130(given, monkeypatch, capsys, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupted(*_, **__):
        signal.raise_signal(number)
        raise AssertionError("went on")

    monkeypatch.setattr("vig.scoring.run.run_scoring", interrupted)
    monkeypatch.chdir(given)
    monkeypatch.setattr(sys, "argv", ["vig", "score", "model", "data.json", "-o", "stopped"])
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    said = capsys.readouterr().err
    assert stop.value.code == 130 and "vig: stopped" in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["inspect", "report", "select", "train"])
def test_a_public_name_is_the_function_whatever_was_imported_before(name):
    home = vig._HOMES[name]
    program = (
        f"import vig, importlib; first = getattr(importlib.import_module('{home}'), '{name}')\n"
        f"from vig import {name}; assert {name} is first is vig.{name} and callable({name}), {name}\n"
        "from vig import *\n"
        f"assert all(callable(getattr(vig, n)) for n in vig.__all__) and {name} is first\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for before in ("", "from vig import Scorer, SelectiveTrainer, report, score_dataset, train\n"):
        done = subprocess.run(
            [sys.executable, "-c", before + program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_pages_and_pictures_need_the_name_of_a_file(given, monkeypatch):
    monkeypatch.chdir(given)
    call("score", "model", "data.json", "-o", "named", code=3)
    (given / "folder").mkdir()
    with pytest.raises(RuntimeError, match=r"folder is a folder: name the page, folder/report.html"):
        call("report", "named", "-o", "folder")
    assert "not the name of a file" in call("inspect", "model", "data.json", "-o", "folder", code=2)
    assert "not the name of a file" in call("inspect", "model", "data.json", "-o", "nowhere/x.png", code=2)
    call("inspect", "model", "data.json", "-o", "picture.foo")
    assert (given / "picture.foo").read_bytes().startswith(b"\x89PNG")


def test_a_crash_of_native_code_says_where():
    code = (
        "import os, signal; from vig import cli\n"
        "def decode(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "cli.app = decode; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV and "in decode" in done.stderr


def test_a_name_that_the_terminal_cannot_show_ends_no_run():
    code = "from vig import cli; cli.app = lambda: cli.out.print('\\u65e5 \\udcff'); cli.main()"
    for encoding, said in (("ascii", b"\\u65e5 \\udcff"), ("utf-8", b"\xe6\x97\xa5 \\udcff")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
        assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["score", "dry run"])
def test_the_total_appears_with_the_first_bar(given, tmp_path, monkeypatch, extra):
    screen = io.StringIO()
    monkeypatch.setattr("vig.cli.scoring.err", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(
        "vig.scoring.run.FIRST_WAIT", 60.0
    )  # the count's process starts slowly on a busy machine
    call("score", given / "model", given / "data.json", "-o", tmp_path / "scores", *extra, code=3)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    totals = re.findall(r"(\d+)/(\d+|\?)", shown)
    assert totals[0] == ("0", "12") and {total for _, total in totals} == {"12"} and ("12", "12") in totals
    assert shown.index("loading") < shown.index("0/12")


def test_a_bar_from_python_begins_with_its_total(given, tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("vig.scoring.progress_bar.Console", lambda **_: console)
    monkeypatch.setattr("vig.scoring.run.FIRST_WAIT", 60.0)
    scorer = vig.Scorer(str(given / "model"))
    with pytest.warns(UserWarning, match="1 samples could not be scored"):
        vig.score_dataset(scorer, given / "data.json", tmp_path / "scores")
    assert "0/12" in screen.getvalue() and "/?" not in screen.getvalue()
