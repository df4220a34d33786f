"""The Ray engine: the rows of the plain engine, whatever happens to its actors."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from vig.data.files import StoreError
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.scoring.settings import RunSpec, ScoreSettings
from vig.store.folder import score_files
from vig.store.scores import read_scores, score_metadata, unfinished

ray = pytest.importorskip("ray", reason="needs the extra ray")

from vig.scoring.run_ray import TRIES, Job, ScoreWindows, score_dataset_on_ray  # noqa: E402

HERE = Path(__file__).parent
N_SAMPLES = 48


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint and data whose windows of 4 take a while: long answers, one missing image."""
    folder = tmp_path_factory.mktemp("ray")
    tiny.save_llava(folder / "model")
    records = []
    for number in range(N_SAMPLES):
        tiny.save_picture(folder / f"{number}.png", number)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red ball " * 30}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    records[9]["image"] = "nowhere.png"
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, sys.path)])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(
        num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def plain(given):
    score_dataset(Scorer(given / "model"), given / "data.json", given / "plain", window=4)
    return rows_of(given / "plain")


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


def actor_processes() -> list[int]:
    """Processes of this user's Ray that score windows."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ScoreWindows" in path.read_bytes() or b"MapWorker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_one(folder: Path, killed: list[int]) -> None:
    """Kills an actor once the first windows are written."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        if len(list(folder.glob("scores-*.parquet"))) >= 2 and actor_processes():
            killed.append(actor_processes()[0])
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.01)


def test_two_actors_one_killed_write_the_rows_of_the_plain_engine(given, cluster, plain):
    killed: list[int] = []
    thread = threading.Thread(target=kill_one, args=(given / "killed", killed))
    thread.start()
    progress = score_dataset_on_ray(
        given / "model", given / "data.json", given / "killed", actors=2, cpus_per_actor=0.5, window=4
    )
    thread.join()
    assert killed and 2 <= len(score_files(given / "killed")) == N_SAMPLES // 4
    assert rows_of(given / "killed") == plain and not unfinished(given / "killed")
    assert progress.done == progress.total == N_SAMPLES and len(progress.errors) == 1
    assert progress.tokens == sum(row["n_tokens"] for row in plain)


def test_it_resumes_the_plain_engine_and_retries_what_failed(given, cluster, plain, tmp_path):
    data = tmp_path / "data.json"
    records = json.loads((given / "data.json").read_text())[:16]
    data.write_text(json.dumps(records))
    score_dataset(Scorer(given / "model"), data, tmp_path / "scores", image_root=given, window=4)
    assert sum(row["status"] != "ok" for row in rows_of(tmp_path / "scores")) == 1
    (tmp_path / "scores" / "scores-00000.parquet").unlink()
    tiny.save_picture(given / "nowhere.png", 9)
    try:
        progress = score_dataset_on_ray(
            given / "model", data, tmp_path / "scores", actors=1, cpus_per_actor=0.5, image_root=given,
            window=4, retry_failed=True,
        )  # fmt: skip
    finally:
        (given / "nowhere.png").unlink()
    assert (progress.done, progress.resumed, progress.errors) == (16, 11, [])
    rows = rows_of(tmp_path / "scores")
    assert [row["key"] for row in rows] == [f"data.json#{number}" for number in range(16)]
    assert {row["status"] for row in rows} == {"ok"} and not unfinished(tmp_path / "scores")
    assert rows[:9] == plain[:9]


def test_statistics_stand_beside_the_likelihoods(given, cluster, tmp_path):
    stats = {"stats": ("kl", "entropy")}
    columns = ["token_kl", "token_entropy_image", "token_entropy_null"]
    score_dataset(
        Scorer(given / "model", **stats), given / "data.json", tmp_path / "plain", window=4, limit=12
    )
    score_dataset_on_ray(
        given / "model", given / "data.json", tmp_path / "ray", options=stats, actors=1, cpus_per_actor=0.5,
        window=4, limit=12,
    )  # fmt: skip
    rows = rows_of(tmp_path / "ray")
    assert rows == rows_of(tmp_path / "plain") and list(rows[0])[-3:] == columns
    assert (
        score_metadata(tmp_path / "ray")["stats"]
        == score_metadata(tmp_path / "plain")["stats"]
        == ["kl", "entropy"]
    )
    scored = [row for row in rows if row["status"] == "ok"]
    assert len(scored) == 11 and all(len(row[name]) == row["n_tokens"] for row in scored for name in columns)
    assert all(max(row["token_kl"]) > 0 for row in scored)


def test_errors_of_the_model_come_through(given, cluster, tmp_path):
    from vig.models.families import ModelError

    with pytest.raises(ModelError, match="cannot load"):
        score_dataset_on_ray(tmp_path, given / "data.json", tmp_path / "scores", cpus_per_actor=0.5)


def job_in(folder: Path, given: Path) -> Job:
    run = RunSpec(str(given / "data.json"), window=4)
    return Job(str(given / "model"), ScoreSettings(), run, str(folder), 60.0, {})


def test_a_window_that_fells_its_actors_is_named(given, tmp_path):
    job = job_in(tmp_path, given)
    actor = ScoreWindows(job)
    for _ in range(TRIES):  # as many processes began with it and died
        actor._try(3)
    with pytest.raises(StoreError, match=r"window 3 \(records 12 and on\) has killed 5 processes"):
        actor({"window": [3], "again": [[]]})
    assert actor({"window": [2], "again": [[]]})["window"] == [2]
    assert [path.name for path in tmp_path.glob(".window*")] == [".window-00003.tries"]


def test_an_actor_reads_windows_in_any_order_and_ends_itself_when_stuck(given, tmp_path, plain):
    job = job_in(tmp_path, given)
    actor = ScoreWindows(job)
    for number in (3, 1, 11):
        assert [record.key for record in actor._read(number)] == [
            row["key"] for row in plain[4 * number : 4 * number + 4]
        ]
    pid = os.fork()
    if pid == 0:
        actor.job = replace(job, stuck_after=0.2)
        actor.scorer.score_window = lambda *_: time.sleep(30)
        actor({"window": [0], "again": [[]]})
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status != 0 and not list(tmp_path.glob("scores-*"))
