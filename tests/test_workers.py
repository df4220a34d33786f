"""Processes that prefetch: what they leave behind, and what becomes of their exceptions."""

import errno
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset, dataloader

from vig.data import workers
from vig.data.files import StoreError
from vig.data.sample import SampleError
from vig.data.workers import SPOOL, Spool, prefetch


class Unlike(RuntimeError):
    """An exception that pickle cannot make anew."""

    def __init__(self, *words):
        super().__init__(words[2], lambda: None)


class Squares(Dataset):
    def __init__(self, refusal):
        self.refusal = refusal

    def __len__(self):
        return 5

    def __getitem__(self, number):
        if number == 3:
            raise self.refusal("k", "i", "three is refused", "Give four")
        return number * number


def die_with_a_file() -> None:
    spool = Spool()
    (spool.path / "sent").write_bytes(b"item")
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_files_of_a_killed_run_go_and_those_of_a_live_one_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = multiprocessing.get_context("fork").Process(target=die_with_a_file)
    child.start()
    child.join(20)
    (left,) = tmp_path.glob(f"{SPOOL}*")
    assert (left / "sent").exists()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "kept").touch()
    (tmp_path / f"{SPOOL}link").symlink_to(other)
    live = Spool()
    (live.path / "sent").touch()
    assert not left.exists() and (other / "kept").exists()
    again = Spool()
    assert (live.path / "sent").exists()
    live.clear()
    again.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", f"{SPOOL}link"}


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, mkdtemp = [], tempfile.mkdtemp

    def swept(*given, **options):
        made.append(mkdtemp(*given, **options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    spool = Spool()
    assert len(made) == 2 and str(spool.path) == made[1] and spool.path.is_dir()
    spool.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("refusal", "raised", "message"),
    [
        (SampleError, SampleError, r"^k \(id 'i'\): three is refused\. Give four$"),
        (Unlike, RuntimeError, "three is refused"),
    ],
)
def test_what_a_process_raises_is_raised_and_is_no_death(tmp_path, monkeypatch, refusal, raised, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    items = prefetch(Squares(refusal), 1, lost=pytest.fail)
    assert [next(items) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(raised, match=message):
        next(items)
    assert not list(tmp_path.iterdir())


class Deadly(Dataset):
    """Items are their process; the sixth kills it at any time, the eighth when it is made first."""

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 40

    def __getitem__(self, number):
        if number == 5 or (number == 7 and not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()


def test_processes_are_as_many_again_behind_the_items_at_which_they_died(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(asked, "__defaults__", (0.05,))  # seconds between two looks at the workers
    found = list(prefetch(Deadly(tmp_path / "mark"), 2, lambda number: f"lost {number}"))
    assert [item for item in found if isinstance(item, str)] == ["lost 5"] and found[5] == "lost 5"
    assert len(found) == 40 and len(set(found[6:9])) == 1 and len(set(found[15:])) == 2


def test_a_full_folder_is_told_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StoreError, match=rf"{tmp_path}/{SPOOL}\w+: .*No space left on device.*set TMPDIR"):
        list(prefetch(Squares(SampleError), 1, lost=pytest.fail))


@pytest.mark.parametrize("dies", [True, False], ids=["parent dead", "parent alive"])
def test_a_worker_whose_parent_died_before_it_began_ends(dies):
    """It would keep the locks that it was forked with, and nobody would end it."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        parent = os.getpid()
        if os.fork() == 0:
            os.close(reading)
            while dies and os.getppid() == parent:
                time.sleep(0.01)
            workers._begin(parent, 0)
            os.write(writing, b"begun")
            os._exit(0)
        if not dies:
            os.wait()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == (b"" if dies else b"begun")
    os.wait()
