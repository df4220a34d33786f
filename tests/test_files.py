"""The lock of a folder: one writer, whoever dies, and on file systems without locks a warning."""

import errno
import multiprocessing
import os
import signal

import pytest

from vig.data import files
from vig.data.files import LOCK, FolderLock, lock_folder


def test_a_released_lock_leaves_nothing_and_a_killed_holder_is_told_of(tmp_path):
    fork = multiprocessing.get_context("fork")

    def die():
        lock_folder(tmp_path / "new")
        os.kill(os.getpid(), signal.SIGKILL)

    with lock_folder(tmp_path / "new") as lock:
        assert lock.held and not lock.after_death
    assert not list(tmp_path.iterdir())
    child = fork.Process(target=die)
    child.start()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    for after_death in (True, False):
        with lock_folder(tmp_path / "new") as lock:
            assert lock.held and lock.after_death == after_death
        assert not list((tmp_path / "new").iterdir())


def test_a_file_that_its_last_holder_takes_away_is_not_locked(tmp_path, monkeypatch):
    """Between opening and locking it, that is: others would lock the next file of that name."""
    locked = []

    def lockf(file, operation):
        if not locked:
            (tmp_path / LOCK).unlink()
        locked.append(os.fstat(file.fileno()).st_ino)

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with FolderLock(tmp_path):
        assert len(locked) == 2 and (tmp_path / LOCK).stat().st_ino == locked[1]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match=rf"{tmp_path}: its file system has no locks .*Start no second run"):
        lock = lock_folder(tmp_path)
    assert not lock.held
    lock.release()
    assert not (tmp_path / LOCK).exists()
