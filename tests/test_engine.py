"""The engine on disk: killed, starved and in parts, it writes every sample exactly once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.data import dataloader

from vig.data import samples
from vig.data.files import FolderInUse, StoreError, lock_folder
from vig.data.sample import DataError
from vig.data.samples import read_samples
from vig.scoring import loader
from vig.scoring import settings as run_settings
from vig.scoring.record_count import RecordCount
from vig.scoring.run import dry_run_dataset, first_records, run_provenance, score_dataset
from vig.scoring.run_ray import score_dataset_on_ray
from vig.scoring.scorer import NOISE_SAMPLES, Scorer
from vig.scoring.settings import RunSpec, ScoreSettings
from vig.store import fingerprints
from vig.store.fingerprints import data_fingerprint
from vig.store.folder import SettingsDiffer, output_folder
from vig.store.scores import ScoreWriter, read_scores, unfinished, write_shard

HERE = Path(__file__).parent
N_SAMPLES = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(20):
        tiny.save_picture(folder / f"{number}.png", number)
    records = []
    for number in range(N_SAMPLES):
        turns = [("human", "<image>\nWhat?"), ("gpt", "red ball " * (1 + number * 7 % 5))]
        record = {"id": str(number), "image": f"{number // 3 % 20}.png"}
        if number % 11 == 5:
            turns, record = [("human", "Say it"), ("gpt", "no")], {"id": str(number)}
        if number % 29 == 3:
            record["image"] = "nowhere.png"
        record["conversations"] = [{"from": role, "value": text} for role, text in turns]
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def scorer(**options):
    return Scorer(tiny.llava_model(), tiny.llava_processor(), **options)


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


def keys_of(data) -> list[str]:
    return [record.key for record in read_samples(data)]


def test_killed_at_twenty_moments_it_ends_with_the_bits_of_an_uninterrupted_run(tmp_path, data):
    seed = random.SystemRandom().randrange(1 << 30)
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", data, tmp_path, "20", str(seed)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] == 20
    assert len(set(said["windows_at_kill"])) > 3, f"seed {seed}: the kills did not spread: {said}"
    whole = sorted((tmp_path / "whole").glob("scores-*.parquet"))
    assert len(whole) == N_SAMPLES // 8
    assert [row["key"] for row in rows_of(tmp_path / "whole")] == keys_of(data)
    plans = (tmp_path / "whole.plans").read_text().splitlines()
    for run in range(said["runs"]):
        folder = tmp_path / f"killed-{run}"
        assert not unfinished(folder) and not list(folder.glob(".*.tmp"))
        for file in whole:
            assert (folder / file.name).read_bytes() == file.read_bytes(), f"seed {seed}, {file.name}"
        assert len(list(folder.glob("scores-*"))) == len(whole)
        assert set((tmp_path / f"killed-{run}.plans").read_text().splitlines()) == set(plans)


def score_with_a_deadly_picture(data, out):
    """As a decoder that crashes: it takes down the process that opens 2.png, whichever that is."""
    torch.set_num_threads(1)
    original = loader.open_images

    def deadly(record):
        if record.images and record.images[0].name == "2.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(record)

    loader.open_images = deadly
    asked = dataloader._MultiProcessingDataLoaderIter._try_get_data
    asked.__defaults__ = (0.05,)  # seconds between two looks at the workers
    score_dataset(scorer(), data, out, window=16)


def test_a_picture_that_crashes_its_decoder_ends_one_run_and_costs_the_next_one_its_samples(tmp_path, data):
    """Among the first records, too, which the noise floor is measured on."""
    tiny.llava_model(), tiny.llava_processor()
    codes = []
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(
            target=score_with_a_deadly_picture, args=(data, tmp_path)
        )
        child.start()
        child.join(60)
        codes.append(child.exitcode)
    assert codes == [-signal.SIGKILL, 0] and not unfinished(tmp_path)
    rows = rows_of(tmp_path)
    assert [row["key"] for row in rows] == keys_of(data)
    lost = [row["key"] for row in rows if "process that decoded and tokenised it died" in row["status"]]
    assert lost == [record.key for record in read_samples(data) if with_image(record, "2.png")]


def with_image(record, name: str) -> bool:
    return any(image.name == name for image in getattr(record, "images", ()))


@pytest.mark.parametrize("content", ["", "[]", " \n"])
def test_data_without_a_record_are_refused(tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    for run in (lambda one, data: score_dataset(one, data, tmp_path / "scores"), dry_run_dataset):
        with pytest.raises(DataError, match=r"d\.json holds no records"):
            run(scorer(), tmp_path / "d.json")
    assert not (tmp_path / "scores").exists()


def test_a_second_run_is_refused_before_it_scores_anything(tmp_path, data, monkeypatch):
    one, workers = scorer(), []
    monkeypatch.setattr(one, "noise_floor", lambda records: workers.append(one.workers))
    with lock_folder(tmp_path), pytest.raises(FolderInUse, match="already open for writing"):
        score_dataset(one, data, tmp_path)
    assert not workers and list(tmp_path.iterdir()) == []
    score_dataset(one, data, tmp_path, limit=1)
    assert workers == [0] and one.workers == 0


def test_a_full_disk_is_said_and_the_run_goes_on_from_there(tmp_path, data, small_disk):
    one = scorer()
    with small_disk(tmp_path) as (folder, make_room):
        with pytest.raises(StoreError, match=r"disk is full.*run the same command again"):
            score_dataset(one, data, folder, window=16)
        assert unfinished(folder) and not list(folder.glob(".*.tmp"))
        kept = len(rows_of(folder))
        assert 0 < kept < N_SAMPLES
        make_room()
        assert score_dataset(one, data, folder, window=16).resumed == kept
        assert [row["key"] for row in rows_of(folder)] == keys_of(data)


@pytest.fixture
def small_disk():
    """A full file system of this test's own where we may mount one, else a limit on the size of files."""

    @contextmanager
    def disk(tmp_path):
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
            (folder / "filler").write_bytes(bytes(36 << 10))
            try:
                yield folder / "scores", (folder / "filler").unlink
            finally:
                subprocess.run(["umount", folder], check=True)
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
            yield folder / "scores", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return disk


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_scored():
    one, user = scorer(), os.geteuid()
    one.score_window = one.noise_floor = None  # not called
    with tempfile.TemporaryDirectory() as closed:
        data = Path(closed, "data.json")
        data.write_text("[{}]")
        os.chmod(closed, 0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            for out in (closed, Path(closed, "scores")):
                with pytest.raises(StoreError, match=r"cannot be written.*Choose another output folder"):
                    score_dataset(one, data, out)
        finally:
            os.seteuid(user)


def test_jobs_at_the_same_time_fill_one_folder_and_the_last_completes_it(tmp_path, data):
    one, out = scorer(), tmp_path / "scores"
    settings = run_provenance(one, RunSpec(data, shard=(1, 3), window=8), out)
    with ScoreWriter(output_folder(out, (1, 3)), settings) as other:  # a job is at work
        assert score_dataset(one, data, out, window=8, shard=(0, 3)).done == 24
        with pytest.raises(StoreError, match=r"shard-1-of-3 is (already|being)"):
            score_dataset(one, data, out, window=8, shard=(1, 3))
        other.write(1, one.score_window(list(read_samples(data))[8:16]))
    assert "1 windows so far" in unfinished(out)[0] and "have not begun: 2" in unfinished(out)[1]
    with pytest.raises(SettingsDiffer, match="shard-0-of-3 holds scores made with other settings:\n  window"):
        score_dataset(one, data, out, window=16, shard=(2, 3))
    with pytest.raises(StoreError, match=r"3 jobs\. Give --shard i/3"):
        score_dataset(one, data, out, window=8)
    with pytest.raises(StoreError, match="3 jobs"):
        score_dataset(one, data, out, window=8, shard=(0, 4))
    for index in (1, 2):
        score_dataset(one, data, out, window=8, shard=(index, 3))
    assert not unfinished(out)
    score_dataset(one, data, tmp_path / "whole", window=8)
    assert rows_of(out) == rows_of(tmp_path / "whole")  # the order too
    with pytest.raises(StoreError, match="Leave out --shard"):
        score_dataset(one, data, tmp_path / "whole", window=8, shard=(0, 3))


def test_a_dry_run_counts_the_tokens_of_both_passes(data):
    one = scorer()
    broken = "data.json#3"
    encoded = [one.encoder.encode(item) for item in read_samples(data, limit=20) if item.key != broken]
    estimate = dry_run_dataset(one, data, limit=20)
    assert estimate.multimodal == sum(bool(item.sample.images) for item in encoded) < len(encoded) == 19
    assert estimate.model_tokens == sum(item.n_fed * (2 if item.sample.images else 1) for item in encoded)
    assert estimate.progress.tokens == sum(len(item.answer_index) for item in encoded)


def test_the_first_records_with_images_decide(data):
    records = list(read_samples(data))
    text = [record for record in records if not record.images]
    with_images = [record for record in records if record.images]
    assert first_records([*text, *with_images * 20]) == (with_images * 20)[: 4 * NOISE_SAMPLES]
    assert first_records([*text, with_images[0]]) == with_images[:1]
    assert first_records(text) == text


def test_jobs_that_have_not_begun_are_named_from_the_first_on(tmp_path):
    with ScoreWriter(output_folder(tmp_path, (2, 4)), {"model": "m"}) as writer:
        writer.mark_complete()
    write_shard(tmp_path / "shard-2-of-4", 2, [], {"model": "m"})
    assert unfinished(tmp_path) == [f"{tmp_path}: of 4 jobs these have not begun: 0, 1, 3"]


def test_a_job_that_has_no_window_is_complete_too(tmp_path, data):
    for index in range(3):
        score_dataset(scorer(), data, tmp_path / "scores", limit=9, window=8, shard=(index, 3))
    assert len(rows_of(tmp_path / "scores")) == 9 and not unfinished(tmp_path / "scores")


@pytest.mark.parametrize("total, window, count", [(64, 8, 3), (65, 8, 3), (7, 8, 2), (0, 8, 2), (100, 7, 1)])
def test_the_parts_of_the_jobs_sum_to_the_whole(total, window, count):
    jobs = [RunSpec("data.json", shard=(index, count), window=window) for index in range(count)]
    expected = [0] * count
    for record in range(total):
        expected[record // window % count] += 1
    assert [job.part_of(total) for job in jobs] == expected and jobs[0].part_of(None) is None


def test_scoring_does_not_wait_for_the_count(tmp_path, data, monkeypatch):
    totals = []
    monkeypatch.setattr(RecordCount, "known", lambda self, within=0.0: None)
    progress = score_dataset(
        scorer(), data, tmp_path / "scores", on_progress=lambda state: totals.append(state.total)
    )
    assert totals[0] is None and totals[-1] == N_SAMPLES == progress.total
    monkeypatch.undo()
    with RecordCount(data) as count, RecordCount(data, limit=7) as less:
        assert count.wait() == N_SAMPLES and less.wait() == 7 and count.known() == N_SAMPLES
    with RecordCount(tmp_path / "nowhere.json") as count:
        assert count.wait() is None


def test_a_large_data_file_is_known_by_its_size_and_parts(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_bytes(bytes(3 << 20))
    whole = data_fingerprint(path)
    monkeypatch.setattr(fingerprints, "WHOLE", 1 << 20)
    parts = data_fingerprint(path)
    assert parts != whole and parts == data_fingerprint(path)
    path.write_bytes(bytes((3 << 20) + 1))
    assert data_fingerprint(path) != parts
    for at in (0, 3 << 19, (3 << 20) - 1):
        path.write_bytes(bytes(at) + b"[" + bytes((3 << 20) - 1 - at))
        assert data_fingerprint(path) != parts


def test_a_checkpoint_is_known_by_its_config_and_by_weights_at_its_end(tmp_path):
    files = {"config.json": b"{}", "a.safetensors": bytes(3 << 20), "b.safetensors": bytes(9)}
    changes = {
        "config.json": b"{ }",
        "a.safetensors": bytes((3 << 20) - 1) + b"1",
        "b.safetensors": bytes(8) + b"1",
    }
    found = set()
    for changed in (None, *files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(changes[name] if name == changed else content)
        found.add(fingerprints.weights_fingerprint(str(tmp_path)))
    assert len(found) == 4 and fingerprints.weights_fingerprint("owner/name") is None


def test_photographs_and_captions_may_be_repaired_but_not_exchanged(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "scores"
    folder.mkdir()
    for number in range(4):
        tiny.save_picture(folder / f"{number}.png", number)
        if number:
            (folder / f"{number}.txt").write_text("a red ball")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    assert score_dataset(scorer(), folder, out).failed == 2
    tiny.save_picture(folder / "1.png", 1)
    (folder / "0.txt").write_text("a blue ball")
    assert score_dataset(scorer(), folder, out).resumed == 4
    assert score_dataset(scorer(), folder, out, retry_failed=True).failed == 0
    assert [row["status"] for row in rows_of(out)] == ["ok"] * 4
    (folder / "3.png").rename(folder / "4.png")
    with pytest.raises(SettingsDiffer, match="the data changed since"):
        score_dataset(scorer(), folder, out)


@pytest.mark.parametrize("part", [None, (0, 2)])
def test_data_under_another_name_is_said_and_nothing_is_mixed(tmp_path, data, part):
    """Keys begin with the name: the windows that are missing would have got other ones."""
    given, out = tmp_path / "data.json", tmp_path / "scores"
    given.write_bytes(data.read_bytes())
    options = {"limit": 16, "window": 8, "image_root": data.parent, "progress_bar": False}
    done = score_dataset(scorer(), given, out, shard=part, **options)
    before = {file: file.read_bytes() for file in out.rglob("scores-*.parquet")}
    given.rename(tmp_path / "other.json")
    for shard in {part, part and (1, 2)}:  # another job of the array knows it too
        with pytest.raises(
            StoreError, match=r"scores are of data\.json, .*, and other\.json is given"
        ) as said:
            score_dataset(scorer(), tmp_path / "other.json", out, shard=shard, **options)
        assert "rename it back to data.json, or give another output folder" in str(said.value)
    assert before == {file: file.read_bytes() for file in out.rglob("scores-*.parquet")}
    (tmp_path / "other.json").rename(given)
    for file in before:
        file.write_bytes(b"damaged")
    assert score_dataset(scorer(), given, out, shard=part, **options).done == done.done
    assert keys_of(given)[:8] == [row["key"] for row in rows_of(min(before))]


def test_photographs_are_called_after_their_folder_from_within_it_too(tmp_path, monkeypatch):
    tiny.save_picture(tmp_path / "0.png", 0)
    (tmp_path / "0.txt").write_text("a red ball")
    monkeypatch.chdir(tmp_path)
    assert keys_of(".") == keys_of(tmp_path) == [f"{tmp_path.name}#0.png"]


def test_a_folder_of_data_files_is_known_by_their_sizes(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"1")
    (tmp_path / "0.png").write_bytes(b"broken")
    first = data_fingerprint(tmp_path)
    tiny.save_picture(tmp_path / "0.png", 0)
    assert data_fingerprint(tmp_path) == first
    (tmp_path / "a.tar").write_bytes(b"12")
    assert data_fingerprint(tmp_path) != first


def test_records_of_finished_windows_and_of_other_jobs_are_not_made(tmp_path, data, monkeypatch):
    one, keys = scorer(), keys_of(data)
    score_dataset(one, data, tmp_path / "scores", window=8)
    (tmp_path / "scores" / "scores-00005.parquet").unlink()
    made, original = [], samples.sample_from_record
    monkeypatch.setattr(
        samples,
        "sample_from_record",
        lambda *given, **named: made.append(named["key"]) or original(*given, **named),
    )
    assert score_dataset(one, data, tmp_path / "scores", window=8).resumed == N_SAMPLES - 8
    assert made == keys[40:48]
    made.clear()
    one.noise_floor = lambda records: None
    assert score_dataset(one, data, tmp_path / "parts", window=8, shard=(1, 4)).done == 16
    assert made[-16:] == [*keys[8:16], *keys[40:48]]


def test_the_first_batch_waits_for_one_window_alone(tmp_path, data, monkeypatch):
    consumed, at_first = [], []

    def counting(*args, **options):
        for record in read_samples(*args, **options):
            consumed.append(record)
            yield record

    one = scorer()
    one.noise_floor = lambda records: consumed.clear()
    monkeypatch.setattr(run_settings, "read_samples", counting)
    score_dataset(
        one, data, tmp_path / "scores", window=8, on_progress=lambda _: at_first.append(len(consumed))
    )
    assert at_first[:2] == [1, 8] and at_first[-1] == N_SAMPLES  # the data were looked at before


@pytest.mark.parametrize(
    "part",
    [{"window": 0}, {"shard": (3, 2)}, {"shard": (-1, 2)}, {"shard": (0, 0)}, {"limit": -1}],
    ids=str,
)
def test_a_part_that_makes_no_sense_is_refused_and_not_called_complete(data, tmp_path, part):
    ((name, _),) = part.items()
    with pytest.raises(ValueError, match=f"{name} = .*expected"):
        score_dataset(scorer(), data, tmp_path / "scores", **part)
    with pytest.raises(ValueError, match=f"{name} = .*expected"):
        dry_run_dataset(scorer(), data, **part)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (Scorer, ScoreSettings),
        (score_dataset, RunSpec),
        (dry_run_dataset, RunSpec),
        (score_dataset_on_ray, RunSpec),
    ],
)
def test_options_of_public_functions_are_the_fields_of_one_value(function, value):
    """With the same defaults. What else they take is about the machine, not about what is scored."""
    fields = {field.name: field.default for field in dataclasses.fields(value)}
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {name: options[name] for name in options if name in fields} == {
        name: fields[name] for name in fields if name in options
    }
    beside = {"on_progress", "progress_bar", "errors"}
    beside |= {"options", "actors", "gpus_per_actor", "cpus_per_actor", "stuck_after"}
    assert options.keys() - fields.keys() <= beside
    without_data = fields.keys() - {"data"} - ({"retry_failed"} if function is dry_run_dataset else set())
    assert without_data <= options.keys()


@pytest.mark.parametrize("option, value", [("max_length", 0), ("max_length", -5), ("workers", -1)])
def test_a_scorer_refuses_numbers_that_make_no_sense(option, value):
    with pytest.raises(ValueError, match=f"{option} = {value}, expected at least"):
        scorer(**{option: value})


def test_no_fewer_than_no_records_are_read(data):
    with pytest.raises(ValueError, match="limit = -1, expected at least 0 records"):
        read_samples(data, limit=-1)
