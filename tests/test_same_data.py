"""Keys are numbers of rows, so training sees to it that the data are those that were scored."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_checkpoint import Killed, killed_at
from tiny import llava_model, llava_processor, picture, save_llava

from vig import SelectiveCollator, keep_samples, kept_rows, mask_row
from vig.data.reading import Source
from vig.data.records import sample_from_record
from vig.data.sample import SampleError
from vig.data.samples import read_samples
from vig.selection.select import select
from vig.store.fingerprints import data_fingerprint
from vig.store.folder import SettingsDiffer
from vig.store.rows import METADATA_KEY, ScoreRow
from vig.store.scores import ScoreWriter, data_sets
from vig.store.selections import SELECTION_SCHEMA, SelectionTable, selection_metadata
from vig.training.settings import TrainError
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
        lambda: train(copy.deepcopy(llava_model()), others, chosen, None, processor=processor),
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


# --- data on disk ---


def write(path: Path, rows, **more) -> Path:
    """Records of these rows, as the file's name says."""
    path.parent.mkdir(exist_ok=True)
    records = [record(row) | more for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records))
    return path


def scored(data: Path) -> Path:
    """A folder of scores of text-only samples, as `vig score` leaves it."""
    encode, folder = SelectiveCollator(llava_processor()).encode, data.with_name(f"{data.stem}-scores")
    about = {
        "model": "m",
        "data": str(data),
        "data_fingerprint": data_fingerprint(data),
        "end_of_turn": "add",
    }
    rows = []
    for sample in read_samples(data):
        ids = encode(sample).answer_ids
        rows.append(
            ScoreRow(
                sample.key, sample.id, sample.source, "text_only", ids, range(len(ids)), np.ones(len(ids))
            )
        )
    with ScoreWriter(folder, about) as writer:
        writer.write(0, rows)
        writer.mark_complete()
    return folder


def selected(*scores: Path) -> Path:
    select(list(scores), 70, out=scores[0].with_name("selection"), overwrite=True)
    return scores[0].with_name("selection")


def trained(data: Path, selection: Path | SelectionTable | None, out: Path | None = None, **options):
    run = {"processor": llava_processor(), "max_steps": 2, "batch_size": 1, "log_every": 1}
    return train(copy.deepcopy(llava_model()), data, selection, out, **run | options)


EDITS = {
    "reordered": [2, 1, 0, 3],  # all answers are equal
    "one deleted": [0, 1, 3],
    "one appended": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["data.json", "part.parquet", "folder"])
def test_data_that_changed_since_scoring_are_refused_with_file_and_fingerprints(tmp_path, name, edit):
    is_folder = name == "folder"
    file, data = tmp_path / name / "part.json" if is_folder else tmp_path / name, tmp_path / name
    write(file, range(4))
    selection, before = selected(scored(data)), data_fingerprint(data)
    assert trained(data, selection).kept == 4
    if is_folder and edit == "reordered":
        edit = "one deleted"  # of a folder's files only names and sizes count
    write(file, EDITS[edit])
    now = data_fingerprint(data)
    message = (
        rf"^{data} changed since it was scored: its fingerprint is {now}, .* of {data}, is {before}\. Put the"
    )
    with pytest.raises(TrainError, match=message):
        trained(data, selection)
    moved = Path(shutil.move(data, tmp_path / "moved"))  # to another folder
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(TrainError, match="changed since it was scored"):
        trained(Path(shutil.move(moved, tmp_path / "elsewhere" / name)), selection)


def test_a_renamed_file_is_told_so(tmp_path):
    data = write(tmp_path / "data.json", range(4))
    selection = selected(scored(data))
    for edit in (range(4), [3, 2, 1, 0]):
        other = write(tmp_path / "other.json", edit)
        with pytest.raises(
            TrainError, match=rf"^{other}: the scores are of data.json, .* \(data.json#0\), and other"
        ):
            trained(other, selection)


def test_one_of_several_scored_data_sets_is_enough(tmp_path):
    """Each alone, and all of them from a folder; a file that changed is named."""
    files = [
        write(tmp_path / "data" / name, range(at, at + 3)) for at, name in ((0, "a.json"), (5, "b.json"))
    ]
    scores = [scored(file) for file in files]
    selection = selected(*scores)
    assert [one["key"] for one in data_sets(scores)] == ["a.json#0", "b.json#0"]
    shutil.move(tmp_path / "data", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "a-scores")
    shutil.rmtree(tmp_path / "moved" / "b-scores")
    shutil.move(tmp_path / "moved" / "selection", tmp_path)
    selection, folder = tmp_path / "selection", tmp_path / "moved"
    assert [trained(one, selection).kept for one in (folder / "a.json", folder / "b.json", folder)] == [
        3,
        3,
        6,
    ]
    b = write(folder / "b.json", [6, 5, 7])
    for data in (b, folder):
        with pytest.raises(TrainError, match=rf"^{b} changed since it was scored"):
            trained(data, selection)
    assert trained(folder / "a.json", selection).kept == 3


def test_a_part_of_a_scored_folder_is_taken_and_known_by_its_ids(tmp_path):
    for name, rows in (("a.parquet", range(3)), ("b.parquet", range(5, 8))):
        write(tmp_path / "data" / name, rows)
    selection = selected(scored(tmp_path / "data"))
    assert trained(tmp_path / "data" / "b.parquet", selection).kept == 3
    other = write(tmp_path / "other" / "b.parquet", [6, 5, 7])
    with pytest.raises(SampleError, match=r"^b.parquet#0 \(id 'id6'\): .* has the id 'id5'"):
        trained(other, selection)


def test_selections_that_know_no_fingerprint_work(tmp_path):
    """Of older versions, of samples that were scored in Python, and the first of several that an older one names."""
    data = write(tmp_path / "data.json", range(4))
    selection = selected(scored(data))
    table = pq.read_table(selection / "selection-00000.parquet")
    about = selection_metadata(selection)
    without = {name: value for name, value in about.items() if name not in ("data", "data_fingerprint")}
    assert about.keys() - without.keys() == {"data", "data_fingerprint"}
    write(data, range(4), more="changed")

    def known(metadata: dict, rows: pa.Table = table) -> SelectionTable:
        return SelectionTable(rows.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)}))

    assert trained(data, known(without)).kept == trained(data, dict(known(about))).kept == 4
    b = write(tmp_path / "b.json", range(4))
    column = pa.array([key.replace("data", "b") for key in table["key"].to_pylist()])
    both = pa.concat_tables([table, table.set_column(0, "key", column)])
    assert trained(b, known(about, both)).kept == 4
    with pytest.raises(TrainError, match="changed since it was scored"):
        trained(data, known(about, both))


def test_photographs_may_come_and_go_since_their_keys_are_their_names(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for row in range(4):
        picture(row).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text("so")
    selection = selected(scored(folder))
    (folder / "1.png").unlink()
    assert trained(folder, selection).kept == 3
    moved = Path(shutil.move(folder, tmp_path / "pictures"))
    with pytest.raises(TrainError, match=r"the scores are of photographs, .* and pictures is given"):
        trained(moved, selection)


def test_a_killed_run_does_not_go_on_with_data_that_were_edited(tmp_path):
    """Without a selection; the same file under another name goes on, and so does a checkpoint of an older version."""
    data, out, model = (
        write(tmp_path / "data.json", range(4)),
        tmp_path / "out",
        save_llava(tmp_path / "model"),
    )
    run = {"max_steps": 3, "save_every": 1, "batch_size": 1, "log_every": 1, "warmup": 0.0}
    with pytest.raises(Killed):
        train(model, data, None, out, on_progress=killed_at(2), **run)
    before = data_fingerprint(data)
    write(data, [2, 1, 0, 3])
    said = f"fingerprint of {data}: the folder has '{before}', this run has '{data_fingerprint(data)}'"
    with pytest.raises(SettingsDiffer, match=re.escape(f"\n  {said}\nGive the same settings and data")):
        train(model, data, None, out, **run)
    [checkpoint] = out.glob("train-checkpoint-*")
    state = json.loads((checkpoint / "run.json").read_text())
    del state["made_with"]["data_fingerprint"]
    (checkpoint / "run.json").write_text(json.dumps(state))
    assert train(model, data, None, out, **run).resumed == 1
    record = json.loads((out / "train.json").read_text())
    assert record["data_fingerprint"] == data_fingerprint(data)
    assert train(model, Source.of(data), None, out, **run).resumed == 3
    write(data, range(4))
    with pytest.raises(SettingsDiffer, match=f"finished run.*\n  fingerprint of {data}"):
        train(model, data, None, out, **run)
