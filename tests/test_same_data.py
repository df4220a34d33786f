"""Keys are numbers of rows, so training sees to it that the data are those that were scored."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
from tiny import llava_model, llava_processor

from vig import SelectiveCollator, keep_samples, kept_rows, mask_row
from vig.data.records import sample_from_record
from vig.data.sample import SampleError
from vig.store.selections import SELECTION_SCHEMA, SelectionTable
from vig.training.train import train


def record(row: int) -> dict:
    """All have the same answer: nothing but the id tells which one it is."""
    turns = [{"from": "human", "value": f"What is {row}?"}, {"from": "gpt", "value": "so"}]
    return {"id": f"id{row}", "conversations": turns}


# --- samples ---


def samples(count: int = 3) -> list:
    return [sample_from_record(record(row), key=f"data.json#{row}") for row in range(count)]


def chosen_of(items, keep) -> SelectionTable:
    ids = [SelectiveCollator(llava_processor()).encode(item).answer_ids for item in items]
    rows = {
        "key": [item.key for item in items], "id": [item.id for item in items], "keep": keep, "token_ids": ids,
        "token_keep": [[True] * len(one) for one in ids],
    }  # fmt: skip
    return SelectionTable(pa.table(rows, schema=SELECTION_SCHEMA))


def test_a_sample_that_was_scored_under_another_id_is_refused_with_both():
    items, processor = samples(), llava_processor()
    chosen, keys = chosen_of(items, [True, True, False]), [item.key for item in items]
    others = [replace(item, id=items[1 - row].id) for row, item in enumerate(items[:2])]
    for refuse in (
        lambda: keep_samples(others, chosen),
        lambda: SelectiveCollator(processor, chosen)(others),
        lambda: SelectiveCollator(processor, chosen)([record(1) | {"key": "data.json#0"}]),
        lambda: kept_rows(keys, chosen, ["id1", "id0", "id2"]),
        lambda: mask_row([1], "data.json#0", chosen, id="id1"),
        lambda: train(llava_model(), others, chosen, None, processor=processor),
    ):
        with pytest.raises(
            SampleError, match=r"^data.json#0 \(id 'id1'\): .* has the id 'id0'\. The data cha"
        ):
            refuse()


def test_what_says_nothing_of_an_id_is_taken():
    """Rows that are not kept; data without ids, whose samples have their keys'; selections that hold none."""
    items, processor = samples(), llava_processor()
    chosen, keys = chosen_of(items, [True, True, False]), [item.key for item in items]
    assert kept_rows(keys, chosen, ["id0", "id1", "another"]) == kept_rows(keys, chosen) == [0, 1]
    without = [replace(item, id=item.key) for item in items]
    assert len(keep_samples(without, chosen).samples) == 2
    assert len(keep_samples(items, chosen_of(without, [True] * 3)).samples) == 3
    plain = record(0) | {"key": "data.json#0", "id": None}
    assert (SelectiveCollator(processor, chosen)([plain])["labels"] != -100).any()
    others = [replace(item, id="another") for item in items]
    assert len(keep_samples(others, dict(chosen)).samples) == 2
