"""Prefetching in worker processes: they make items before the model asks for them, and outlive the death of one.

A process that dies, at an image that crashes its decoder or for want of memory, is replaced; an item whose processes
die again and again is given up. Items come in order, whatever the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vig.data.files import LOCK, FolderInUse, FolderLock, StoreError

Item = TypeVar("Item")
PREFETCH = 2  # items that a process makes before they are asked for
DEATHS = 2  # of processes at one item
DIED = "DataLoader worker (pid"  # torch of a death; of an exception "Caught ... in DataLoader worker process"
SPOOL = "vig-spool-"


def prefetch(items: Dataset[Item], workers: int, lost: Callable[[int], Item]) -> Iterator[Item]:
    """The items in order, made by `workers` processes, each prefetching at most two; they start at once.

    lost: what stands in the place of an item whose processes died, by its number.
    """
    spool = Spool()
    started = _started(items, spool, range(len(items)), num_workers=workers)
    return _made(items, workers, lost, spool, started)


def _made(
    items: Dataset[Item],
    workers: int,
    lost: Callable[[int], Item],
    spool: Spool,
    started: Iterator[str | Exception],
) -> Iterator[Item]:
    done, deaths = 0, 0  # items; processes since the last item came
    suspect = 0  # where the items end that may have felled a process
    try:
        while done < len(items):
            try:
                for sent in started:
                    yield _taken(sent)
                    done, deaths = done + 1, 0
            except RuntimeError as error:
                if DIED not in str(error):
                    raise
                deaths, suspect = deaths + 1, max(suspect, done + PREFETCH * workers + 1)
                if deaths > DEATHS:
                    yield lost(done)
                    done, deaths = done + 1, 0
            started = iter(())  # ends the processes that are left, which no other name holds
            if done < suspect:  # one process works on one item, so that it is known which one fells it
                some = range(done, min(suspect, len(items)))
                started = _started(items, spool, some, num_workers=1, prefetch_factor=1)
            elif done < len(items):
                started = _started(items, spool, range(done, len(items)), num_workers=workers)
    finally:
        started = iter(())  # before their folder goes
        spool.clear()


def _started(items: Dataset[Any], spool: Spool, some: range, **options: int) -> Iterator[str | Exception]:
    """Starts processes on some of the items.

    torch's handler of SIGCHLD is taken back, since it would raise a process's death in the midst of the model; so it is
    raised where an item is waited for, within seconds. Ctrl-C is left to the parent.
    """
    before = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        Subset(_ToFile(items, spool.path), some),
        batch_size=None,
        worker_init_fn=partial(_begin, os.getpid()),
        generator=torch.Generator(),  # so that none of the run's random numbers is drawn
        **{"prefetch_factor": PREFETCH} | options,
    )
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():  # the only one that sets handlers
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


def _begin(parent: int, worker: int) -> None:
    """Leaves Ctrl-C to the parent, and ends where that is dead already.

    torch's own watch begins behind this: it would take whatever adopted this process for its parent, and the process
    would wait for good, with the locks that it was forked with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)


class _ToFile(Dataset):
    """Writes each item into a file of its own, and sends the file's name; or what was raised, as it is.

    Tensors would go through open files in /dev/shm, of which a container has 64 MB and a shell 1,024; large messages
    through a pipe, which hangs where a process dies in the midst of one. torch would make an exception anew from the
    text of its traceback.
    """

    def __init__(self, items: Dataset[Any], folder: Path):
        self.items, self.folder = items, folder

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> str | Exception:
        try:
            item = self.items[number]
        except Exception as error:
            if _can_be_sent(error):
                return error
            raise
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                pickle.dump(item, file, protocol=pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            cure = "Free some space there, set TMPDIR to a larger folder, or leave out --workers"
            return StoreError(
                f"{self.folder}: what the processes make cannot be written ({error.strerror}). {cure}"
            )
        return file.name


def _can_be_sent(error: Exception) -> bool:
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # whatever its class does there
        return False


def _taken(sent: str | Exception) -> Any:
    if isinstance(sent, Exception):
        raise sent
    path = Path(sent)
    item = pickle.loads(path.read_bytes())
    path.unlink()
    return item


class Spool:
    """A folder among the temporary ones for the files of one run's processes; a killed run's goes with the next run."""

    def __init__(self):
        _sweep()
        while True:
            self._folder = tempfile.TemporaryDirectory(prefix=SPOOL, ignore_cleanup_errors=True)
            self.path = Path(self._folder.name)
            with suppress(FileNotFoundError, FolderInUse):  # swept by another run before it is locked
                self._lock = FolderLock(self.path)
                return

    def clear(self) -> None:
        self._lock.release()
        self._folder.cleanup()


def _sweep() -> None:
    """Removes the folders of killed runs: those of this user that nobody has locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SPOOL}*"):
        with suppress(OSError, FolderInUse):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with FolderLock(folder) as lock:
                for file in folder.iterdir() if lock.held else ():
                    if file.name != LOCK:
                        file.unlink()
            folder.rmdir()
