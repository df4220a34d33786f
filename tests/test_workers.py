"""Processes that work ahead: what they leave behind, and what becomes of their exceptions."""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from vig.workers import SPOOL, Spool, made_ahead


class Squares(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, number):
        if number == 3:
            raise RuntimeError("three is refused")
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


def test_what_a_process_raises_is_raised_and_is_no_death(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    items = made_ahead(Squares(), 1, lost=lambda number: pytest.fail(f"{number} was given up"))
    assert [next(items) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="three is refused"):
        next(items)
    assert not list(tmp_path.iterdir())
