"""How many records a run has, counted beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from vig.data.reading import Source

FIRST_WAIT = 1.0  # seconds that a bar waits for its total before it is drawn without


class RecordCount:
    """Counts the records of a dataset in another process, so that scoring need not wait for it.

    ``known()`` is the number as soon as it is there, else None; it stays None where counting would mean to
    read all the images as well.
    """

    def __init__(self, data: str | Path, limit: int | None = None):
        self.limit = limit
        self._asked, self._known = False, None
        code = "import sys; from vig.data.samples import count_records; print(count_records(*sys.argv[1:]))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(data), *filter(None, [Source.of(data).reading.split])],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> RecordCount:
        return self

    def __exit__(self, *_) -> None:
        if not self._process.stdout.closed:
            self._process.kill()
            self._process.communicate()

    def known(self, within: float = 0.0) -> int | None:
        """within: seconds to wait for it."""
        if within:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(within)
        if not self._asked and self._process.poll() is not None:
            self._asked = True
            text = self._process.stdout.read().strip()
            if text.isdigit():
                self._known = min(int(text), self.limit or int(text))
        return self._known

    def wait(self) -> int | None:
        """The number of records, however long it takes; None where it cannot be told."""
        self._process.wait()
        return self.known()
