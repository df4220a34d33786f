"""`vig score` by the ranks of torchrun: together they hold a model, or each holds one and scores windows of its own."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from killed import die_at_call
from ranks import run_command
from tensor_parallel import samples
from test_cli import call
from test_train import run_on_two
from transformers import LlavaForConditionalGeneration

from vig import Scorer
from vig.models.families import ModelError
from vig.models.launch import Launch
from vig.models.loading import load
from vig.store.scores import read_scores, score_metadata, unfinished

RECORDS, WINDOW = 14, 4


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint and 14 records: two questions of one picture, one of text alone, one whose image is missing."""
    folder = tmp_path_factory.mktemp("torchrun")
    tiny.save_llava(folder / "model")
    records = []
    for number in range(RECORDS):
        tiny.save_picture(folder / f"{number}.png", number)
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f"a red cup, {number}"},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    records[2]["image"], records[6]["image"] = "1.png", "nowhere.png"
    del records[5]["image"]
    records[5]["conversations"][0]["value"] = "Hi"
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def words(given, out, *more):
    return ["score", given / "model", given / "data.json", "-o", out, "--window", WINDOW, *more]


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def whole(given):
    call(*words(given, given / "whole"), code=3)
    return rows_of(given / "whole")


@pytest.fixture(scope="module")
def parallel(given, tmp_path_factory):
    """What two ranks that hold one model say, and their rows."""
    said = run_command(
        words(given, given / "parallel", "--tensor-parallel-size", 2), 2, tmp_path_factory.mktemp("logs")
    )
    return said, rows_of(given / "parallel")


def test_two_ranks_that_hold_a_model_score_as_one_process(given, whole, parallel):
    said, rows = parallel
    assert [code for code, _ in said] == [3, 0], said
    assert "scored 13 samples" in said[0][1] and "data.json#6 (id '6'): no image at" in said[0][1]
    assert said[1][1] == ""
    assert not unfinished(given / "parallel") and len(rows) == RECORDS
    assert score_metadata(given / "parallel")["tensor_parallel_size"] == 2
    for mine, row in zip(rows, whole, strict=True):
        for name, value in row.items():
            if (
                name in ("vig", "nll_image", "nll_null", "token_nll_image", "token_nll_null")
                and value is not None
            ):
                np.testing.assert_allclose(mine[name], value, rtol=1e-6, atol=1e-5, err_msg=name)
            else:
                assert mine[name] == value


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_any_rank_it_goes_on_and_scores_each_sample_once(rank, given, parallel, tmp_path):
    command = words(given, tmp_path / "scores", "--tensor-parallel-size", 2)

    def die(me: int) -> None:
        if me == rank == 0:
            die_at_call(9)
        elif me == rank:
            tells = Scorer.score_window
            calls = iter(range(9))

            def deadly(scorer, *arguments):
                if next(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return tells(scorer, *arguments)

            Scorer.score_window = deadly

    said = run_command(command, 2, tmp_path, die)
    assert said[rank][0] == -signal.SIGKILL and said[1 - rank][0] == 1
    if rank == 0:
        assert "the first rank of this model has ended" in said[1][1]
    assert unfinished(tmp_path / "scores") and 0 < len(rows_of(tmp_path / "scores")) < RECORDS
    assert [code for code, _ in run_command(command, 2, tmp_path)] == [3, 0]
    assert rows_of(tmp_path / "scores") == parallel[1] and not unfinished(tmp_path / "scores")


def test_ranks_that_hold_a_model_each_divide_the_windows(given, whole, tmp_path):
    """Like jobs of an array, with the same bits."""
    said = run_command(words(given, tmp_path / "scores"), 2, tmp_path)
    assert [code for code, _ in said] == [0, 3], said  # the missing image is in the second window
    assert "scores/shard-0-of-2" in said[0][1] and "scores/shard-1-of-2" in said[1][1]
    assert rows_of(tmp_path / "scores") == whole and not unfinished(tmp_path / "scores")


def test_a_rank_without_a_window_ends_well(given, tmp_path):
    """torchrun would stop the other ranks for another exit code than 0."""
    said = run_command(words(given, tmp_path / "scores", "--window", RECORDS), 2, tmp_path)
    assert [code for code, _ in said] == [3, 0], said  # the missing image is in the only window
    expected = "no window of the data is this job's (1/2): 14 records make 1 window of 14."
    assert expected in " ".join(said[1][1].split())
    assert len(rows_of(tmp_path / "scores")) == RECORDS and not unfinished(tmp_path / "scores")


def test_two_models_of_two_ranks_each(given, parallel, tmp_path):
    """Each scores half of the part that was asked for."""
    command = words(given, tmp_path / "scores", "--tensor-parallel-size", 2)
    said = [run_command([*command, "--shard", f"{job}/2"], 4, tmp_path) for job in range(2)]
    assert [code for run in said for code, _ in run] == [0, 0, 3, 0, 0, 0, 0, 0]  # the second of four parts
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        f"shard-{n}-of-4" for n in range(4)
    ]
    assert rows_of(tmp_path / "scores") == parallel[1] and not unfinished(tmp_path / "scores")


def test_dry_run_checks_every_record_once(given, tmp_path):
    command = words(given, tmp_path / "scores", "--tensor-parallel-size", 2, "--dry-run")
    (code, said), (other, nothing) = run_command(command, 2, tmp_path)
    assert (code, other) == (3, 0) and nothing == ""
    assert "checked 14 records: 12 with images, 1 text-only" in said and "estimate: " in said


# --- the families ---

PLANNED = [family for family in tiny_families.FAMILIES if family != "qwen3_vl"]


def values_of(scorer) -> list[list]:
    rows = scorer.score(samples())
    return [
        [row.status, list(map(float, row.token_nll_image)), list(map(float, row.token_nll_null))]
        for row in rows
    ]


def scored_by_two(rank: int, folder) -> None:
    found = {family: values_of(Scorer(folder / family, tensor_parallel_size=2)) for family in PLANNED}
    torch.save(found, folder.with_suffix(f".{rank}"))


def test_every_family_with_a_plan(tmp_path):
    """Rows of the first rank's samples on both ranks, those of the whole model."""
    folder = tmp_path / "families"
    for family in PLANNED:
        tiny_families.model(family).save_pretrained(folder / family)
        tiny_families.processor(family).save_pretrained(folder / family)
    for found in run_on_two(scored_by_two, folder):
        for family, rows in found.items():
            whole = values_of(Scorer(folder / family))
            for (status, image, null), (kind, *others) in zip(rows, whole, strict=True):
                assert status == kind and status in ("ok", "text_only"), family
                np.testing.assert_allclose(image, others[0], atol=3e-5, err_msg=family)
                np.testing.assert_allclose(null, others[1], atol=3e-5, err_msg=family)


# --- refusals ---


def ranked(monkeypatch, rank: int, world: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("world", "more", "says"),
    [
        (
            1,
            ["--tensor-parallel-size", 2],
            "this process stands alone. Start 2 of them: torchrun --nproc-per-node 2",
        ),
        (3, ["--tensor-parallel-size", 2], "torchrun started 3 processes, which make no whole groups of 2"),
        (
            2,
            ["--tensor-parallel-size", 2, "--device", "cpu"],
            "takes the GPU of its local rank. Leave it out",
        ),
        (2, ["--engine", "ray"], "ray starts its actors itself, but torchrun started 2 processes"),
        (2, ["--errors", "errors.jsonl"], "2 models would write errors.jsonl. Read _errors.jsonl"),
    ],
)
def test_what_torchrun_makes_meaningless_is_wrong_usage(given, tmp_path, monkeypatch, world, more, says):
    ranked(monkeypatch, 0, world)
    said = call(*words(given, tmp_path / "scores", *more), code=2)
    assert says in said.replace(" │ │ ", " "), said


def test_groups_and_their_parts():
    ranks = [Launch(rank, 8, rank, 4) for rank in range(8)]
    assert [launch.is_first for launch in ranks] == [True, False, False, False] * 2
    assert {launch.shard(None) for launch in ranks} == {(0, 2), (1, 2)}
    assert {launch.shard((i, 3)) for launch in ranks for i in range(3)} == {(i, 6) for i in range(6)}
    assert Launch().shard(None) is None and Launch(3, 4, 3, 4).shard((1, 2)) == (1, 2)


def test_heads_that_do_not_divide_are_refused_before_weights_are_read(given, monkeypatch):
    ranked(monkeypatch, 0, 4)
    expected = "= 4 does not divide num_attention_heads = 4, num_key_value_heads = 2. Give one of 2"
    with pytest.raises(ModelError, match=expected):
        load(given / "model", tensor_parallel_size=4)


def test_a_family_without_a_plan_is_refused(monkeypatch, tmp_path):
    tiny_families.model("qwen3_vl").save_pretrained(tmp_path)
    ranked(monkeypatch, 0, 2)
    with pytest.raises(
        ModelError, match=r"no tensor-parallel plan for the layers of qwen3_vl \(Qwen3VLTextConfig"
    ):
        load(tmp_path, tensor_parallel_size=2)


def test_a_model_over_several_devices_is_refused(given, tmp_path):
    places = {"model": "cpu", "lm_head": "disk"}
    model = LlavaForConditionalGeneration.from_pretrained(
        given / "model", device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(ModelError, match=r"its layers are spread over cpu, disk \(device_map\)"):
        Scorer(model, tiny.llava_processor())
