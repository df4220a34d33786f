"""Loose guards of the rates that `python -m benchmarks.scale` measures, in processor time: load does not count."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks import scale
from vig.reporting.report import report
from vig.scoring.scorer import scored_row
from vig.selection.select import select
from vig.store.rows import ScoreBlock
from vig.store.scores import ScoreWriter, count_rows

SAMPLES = 3 * scale.WINDOW


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """A folder of synthetic scores, and the samples a processor second it was written with."""
    folder = tmp_path_factory.mktemp("scores")
    windows = [
        [scored_row(*scored) for scored in scale.synthetic_samples(start, scale.WINDOW)]
        for start in range(0, SAMPLES, scale.WINDOW)
    ]
    with ScoreWriter(folder, {"model": "synthetic"}) as writer:
        writer.write(0, windows[0])  # warm
        begun = time.process_time()
        for window, rows in enumerate(windows[1:], 1):
            writer.write(window, rows)
        seconds = time.process_time() - begun
        writer.mark_complete()
    return folder, 2 * scale.WINDOW / seconds


def test_scores_are_written_at_thousands_of_samples_a_second(scores):
    folder, rate = scores
    assert count_rows(folder) == SAMPLES
    assert rate > 10_000  # 40,000 and more on a free core


def test_rows_of_the_scorer_are_stored_as_the_columns_they_were_made_of():
    rows = [scored_row(*scored) for scored in scale.synthetic_samples(7, 50)]
    assert [row.token_ids.dtype for row in rows] == [row.positions.dtype for row in rows] == [np.int32] * 50
    assert all(row.token_nll_image.dtype == row.token_nll_null.dtype == np.float32 for row in rows)
    assert ScoreBlock.from_rows(rows).table().equals(scale.synthetic_block(7, 50).table())


def test_a_million_samples_are_selected_within_two_minutes(scores, tmp_path):
    begun = time.process_time()
    chosen = select(scores[0], 70, out=tmp_path)
    seconds = time.process_time() - begun
    assert chosen.counts["samples_total"] == SAMPLES
    assert seconds * 1_000_000 / SAMPLES < 120  # 25 s on a free core


def test_a_page_of_many_samples_is_built_in_seconds(scores, tmp_path):
    report(scale.synthetic_block(0, 50).table(), tmp_path / "warm.html")  # imports, templates
    begun = time.process_time()
    page = report(scores[0], tmp_path / "page.html", samples=50).read_text()
    seconds = time.process_time() - begun
    assert f"50 of {SAMPLES:,}" in page and "a seeded sample of 20,000 answers" in page
    assert seconds < 10  # 3 s on a free core, 2 of them for words; word by word it took 20


def test_a_process_of_its_own_has_a_peak_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text("[]")
    held = bytearray(600 << 20)  # of the parent's
    held[:: 1 << 12] = bytes(len(held) >> 12)
    found = scale.in_process("read", 1, tmp_path / "data.json", tmp_path)
    assert 20 < found["read_peak_mib_at_the_end"] < 500 and len(held)


def test_the_bounds_name_what_they_miss():
    good = {"write_samples_per_s": 50_000, "select_s": 20, "select_peak_mib": 400, "first_batch_s": 20}
    good |= {"report_s": 25, "report_peak_mib": 800}
    assert scale.broken_bounds([{"rows": scale.rows_of(good)}]) == []
    slow = [{"rows": scale.rows_of(good | {"select_s": 31})}]
    assert scale.broken_bounds(slow) == ["select_s = 31.0, expected <= 30"]
    assert scale.broken_bounds([{"rows": scale.rows_of({"write_samples_per_s": 1.0}, quick=True)}]) == []
