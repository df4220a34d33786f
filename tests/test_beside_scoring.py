"""Readers of several passes beside a running `vig score`: all passes read the shards that were there at the first."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from test_null_check import Pieces

from vig.data.files import StoreError
from vig.reporting.compare_page import comparison_page
from vig.reporting.null_check import check_scores
from vig.reporting.plots import plot
from vig.reporting.report import report
from vig.selection.compare import compare
from vig.selection.select import select
from vig.store import scores as store
from vig.store.rows import ScoreBlock
from vig.store.scores import ScoreWriter, open_scores, unfinished
from vig.store.selections import read_selection

SETTINGS = {"model": "nowhere", "null": {"kind": "blur", "params": {"sigma": 0.1}}, "window": 50}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def block(window: int, source: str = "early", seed: int = 0) -> ScoreBlock:
    """A window of 50 rows, some of text alone, some that failed; the null pass is of the seed."""
    rng = np.random.default_rng(window)
    lengths = rng.integers(1, 6, 50)
    total = lengths.sum()
    status = ["text_only" if i % 7 == 3 else "error: lost" if i % 11 == 5 else "ok" for i in range(50)]
    keys = [f"d.json#{50 * window + i}" for i in range(50)]
    ids, places = rng.integers(1, 12, total), np.concatenate([np.arange(n) for n in lengths])
    image = rng.exponential(0.4, total)
    null = image + np.random.default_rng([seed, window]).normal(0.5, 1, total)
    return ScoreBlock(keys, keys, [source] * 50, status, lengths, ids, places, image, null)


class Scoring:
    """Two jobs of an array; while `goes_on`, each file that a reader opens finds one more window written."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.goes_on, self.windows = folder, False, count(1, 2)
        self.jobs = [
            ScoreWriter(folder / f"shard-{job}-of-2", SETTINGS | {"shard": f"{job}/2"}) for job in (0, 1)
        ]
        for window in (0, 2, 4):
            self.jobs[0].write(window, block(window))
        opened = store._open_parquet

        def open_and_write(path):
            if self.goes_on:
                window = next(self.windows)
                self.jobs[1].write(window, block(window, "late"))
            return opened(path)

        monkeypatch.setattr(store, "_open_parquet", open_and_write)


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    scoring = Scoring(tmp_path / "scores", monkeypatch)
    yield scoring
    for job in scoring.jobs:
        job.close()


def _select(**settings):
    def read(scoring, out):
        selection = select(scoring.folder, 50, out=out / "selection", **settings)
        stored = read_selection(out / "selection").table
        assert selection.table().table.equals(stored)
        return selection.counts, selection.sources, selection.summary(), stored.to_pylist()

    return read


def _compare(scoring, out):
    """The page is made of the folder as well, after the comparison."""
    other = out / "other"
    with ScoreWriter(other, SETTINGS) as writer:
        for window in (0, 2, 4):
            writer.write(window, block(window, seed=1))
    found = compare(scoring.folder, other)
    page = comparison_page(found, scoring.folder, other, out / "c.html").read_text()
    return found.as_dict() | {"names": None}, page.replace(str(out), "")


READERS = {
    "select": _select(),
    "random": _select(level="random"),
    "source": _select(by="source"),
    "clip": _select(clip=-2.0, keep_easy=0.5),
    "report": lambda scoring, out: report(scoring.folder, out / "r.html").read_text(),
    "plot": lambda scoring, out: [f.read_text() for f in plot(scoring.folder, out, formats=["svg"])],
    "compare": _compare,
    "check": lambda scoring, out: check_scores(scoring.folder, Pieces()),
}


@pytest.mark.parametrize("name", READERS)
def test_windows_that_come_meanwhile_change_nothing(scoring, name, tmp_path):
    quiet, beside = (tmp_path / part for part in ("quiet", "beside"))
    for folder in (quiet, beside):
        folder.mkdir()
    expected = READERS[name](scoring, quiet)
    scoring.goes_on = True
    assert READERS[name](scoring, beside) == expected
    assert next(scoring.windows) > 5  # some did come


def test_a_selection_keeps_to_the_shards_that_it_was_made_from(scoring):
    selection = select(scoring.folder, 50)
    before = selection.table().table
    scoring.jobs[1].write(1, block(1, "late"))
    assert selection.table().table.equals(before)


def test_scores_that_are_completed_meanwhile_are_said_to_be_unfinished(scoring, monkeypatch):
    scores = open_scores(scoring.folder)
    for job in scoring.jobs:
        job.mark_complete()
    assert not unfinished(scoring.folder)
    assert len(unfinished(scores)) == 2 and len(select(scores, 50).unfinished) == 2


def test_a_shard_that_is_written_anew_meanwhile_is_refused(scoring, tmp_path):
    """As by `--retry failed`: rows that had failed would be kept by a tau that knows nothing of them."""
    select(scoring.folder, 50, out=tmp_path / "selection")
    before = (tmp_path / "selection" / "selection-00000.parquet").read_bytes()
    done = iter(range(100))

    def retry(share: float) -> None:
        if next(done) == 1:  # within the first pass
            scoring.jobs[0].replace(2, [])

    with pytest.raises(StoreError, match=r"scores-00002.parquet was written anew while the scores were read"):
        select(scoring.folder, 50, out=tmp_path / "selection", progress=retry)
    assert (tmp_path / "selection" / "selection-00000.parquet").read_bytes() == before
