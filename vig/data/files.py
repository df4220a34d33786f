"""Files that are whole or absent: atomic writes, a folder lock, and errors that name the cure."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class StoreError(RuntimeError):
    """A folder of scores or selections cannot be read or written; the message names it and the cure."""


class FolderInUse(StoreError):
    """Another process is writing to the folder."""


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """OSError -> StoreError with the folder and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "Free some space and run the same command again: finished windows are kept."
            raise StoreError(f"{folder}: the disk is full ({error.strerror}). {cure}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            cure = "Choose another output folder, or change its permissions."
            raise StoreError(f"{folder}: cannot be written ({error.strerror}). {cure}") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StoreError(f"{folder}: is a file, not a folder. Choose another output folder.") from error
        raise


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, so that what cannot be written is known before the work begins.

    Raises StoreError."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ".writable", b"")
    (folder / ".writable").unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when all of it is written; until then `path` holds what it held before."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with explain_write_errors(path.parent):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomically(path: Path, content) -> None:
    """Write ``content`` (bytes-like) so that ``path`` holds all of it or what it held before."""
    with whole_file(path) as file:
        file.write(content)


def make_readable(folder: Path) -> None:
    """Gives the files of a folder at least the mode that a new one gets there, by the umask or the folder's ACL.

    safetensors writes through temporary files of mode 0600, which keep it: nobody else on a shared machine could load
    them.
    """
    probe = folder / ".mode"
    with open(probe, "wb") as file:
        usual = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode | usual != mode:
            with suppress(OSError):  # a file system without modes
                path.chmod(mode | usual)


def sync_folder(folder: Path) -> None:
    """Make renames within the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK = ".lock"
# What file systems say that have no locks, as some of a network.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_locked: dict[Path, int] = {}  # folder -> pid; record locks do not bind within a process, nor pass to a fork


def lock_folder(folder: Path) -> FolderLock:
    """Makes the folder and locks it; one that was made and is still empty goes with the lock.

    Raises FolderInUse, and StoreError where the folder cannot be written.
    """
    made = not folder.exists()
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    lock.made = made
    return lock


class FolderLock:
    """One writing process a folder: a POSIX record lock on its file ``.lock``.

    The lock dies with its process, also on SIGKILL, and is not inherited by worker processes. The file goes when the
    lock is released, so a file that nobody holds tells of a process that died: `after_death`. On a file system
    without locks it warns, and the folder is not `held`. Raises FolderInUse, which names the holder.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        if _locked.get(self.folder) == os.getpid():
            raise FolderInUse(f"{folder} is already open for writing in this process")
        self.made = False  # for the lock
        self.held = self._lock(folder)
        self.file.seek(0)
        self.after_death = bool(self.file.read())
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        _locked[self.folder] = os.getpid()

    def _lock(self, folder: Path) -> bool:
        """Opens the file until it is locked and still has its name, which its last holder takes away."""
        path = self.folder / LOCK
        while True:
            self.file = open(path, "a+")  # noqa: SIM115  (held until release)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    warnings.warn(
                        f"{folder}: its file system has no locks ({error.strerror}). Start no second run that writes "
                        "there: nothing would stop it",
                        stacklevel=4,
                    )
                    return False
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise FolderInUse(
                    f"{folder} is being written by {holder}. Wait for it, or choose another folder."
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), path.stat()):
                    return True
            self.file.close()

    def release(self) -> None:
        if _locked.get(self.folder) == os.getpid():
            del _locked[self.folder]
            with suppress(OSError):  # before the lock, so that nobody gets hold of a file that is to go
                (self.folder / LOCK).unlink()
                if self.made:
                    self.folder.rmdir()
        self.file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()
