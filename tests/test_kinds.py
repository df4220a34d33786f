"""A path in the wrong place is told what it is, and which command makes what belongs there."""

from __future__ import annotations

import os
import re

import pytest

from vig.data.files import StoreError
from vig.data.kinds import KINDS, kind_of, lacking, other_kind, taken
from vig.data.locate import locate
from vig.data.sample import DataError
from vig.evaluation.folder import PredictionFolder, read_predictions
from vig.models.families import ModelError
from vig.models.loading import load
from vig.selection.select import select
from vig.store.folder import output_folder, score_files
from vig.store.rows import ScoreRow
from vig.store.selections import read_selection

FILES = {
    "scores": ("scores-00000.parquet", "_manifest.json"),
    "selection": ("selection-00000.parquet",),
    "predictions": ("predictions.jsonl", "measures.json", "_manifest.json"),
    "checkpoint": ("config.json", "model.safetensors", "train.json"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}
READERS = {"scores": score_files, "selection": read_selection, "predictions": read_predictions}
WRITERS = {
    "scores": lambda folder: output_folder(folder, None),
    "selection": lambda folder: select([ScoreRow("a#0", "", "", "ok", [1], [0], [0.0], [1.0])], out=folder),
    "predictions": lambda folder: PredictionFolder(folder, {}),
}


@pytest.fixture(params=FILES)
def made(request, tmp_path):
    """(name of its kind, a folder of it); its files are empty, since their names alone are looked at."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in FILES[request.param]:
        (folder / name).write_bytes(b"")
    return request.param, folder


def test_every_kind_of_folder_is_known(made):
    name, folder = made
    assert kind_of(folder).name == name and other_kind(folder, name) is None and taken(folder, name) is None
    for other in KINDS.keys() - {name}:
        assert KINDS[name].text in other_kind(folder, other) and KINDS[other].command in other_kind(
            folder, other
        )


@pytest.mark.parametrize("wanted", READERS)
def test_each_reader_says_what_it_was_given_and_what_makes_the_other(made, wanted):
    name, folder = made
    if name == wanted:
        return
    with pytest.raises(
        StoreError, match=re.escape(f"is {KINDS[name].text}, not {KINDS[wanted].text}")
    ) as said:
        READERS[wanted](folder)
    assert KINDS[wanted].command in str(said.value) and str(folder) in str(said.value)


@pytest.mark.parametrize("wanted", WRITERS)
def test_each_writer_leaves_what_another_command_wrote(made, wanted):
    name, folder = made
    if name == wanted:
        return
    with pytest.raises(StoreError, match=f"{KINDS[name].text}, which .* wrote. Give another output folder"):
        WRITERS[wanted](folder)
    assert sorted(os.listdir(folder)) == sorted(FILES[name])


def test_none_of_them_is_data_and_but_one_is_no_model(made):
    name, folder = made
    with pytest.raises(DataError, match=f"is {KINDS[name].text}, not data. Give .*") as said:
        locate(folder)
    assert ("MODEL comes first" in str(said.value)) == (name == "checkpoint")
    if name not in ("checkpoint", "adapter"):
        with pytest.raises(ModelError, match=f"it is {KINDS[name].text}, not a checkpoint"):
            load(folder)


def test_files_are_told_by_their_names_and_data_are_none_of_them(tmp_path):
    for name, kind in (
        ("report.html", "report"),
        ("selection-00001.parquet", "selection"),
        ("scores-00001.parquet", "scores"),
        ("train-00001.parquet", None),
        ("data.json", None),
    ):
        path = tmp_path / name
        path.write_bytes(b"")
        assert getattr(kind_of(path), "name", None) == kind
        if kind != "scores":
            with pytest.raises(
                StoreError, match=r"not a folder of scores\. Give what `vig score|cannot be read"
            ):
                list(select(path).batches())
    assert kind_of(tmp_path / "nowhere") is None and "does not exist" in lacking(
        tmp_path / "nowhere", "scores"
    )
    with pytest.raises(ModelError, match="it is a file, not a checkpoint"):
        load(tmp_path / "data.json")


def test_the_folder_of_a_job_array_is_one_of_scores(tmp_path):
    (tmp_path / "shard-0-of-2").mkdir()
    assert kind_of(tmp_path) is None
    (tmp_path / "shard-0-of-2" / "scores-00000.parquet").write_bytes(b"")
    assert kind_of(tmp_path).name == "scores"
