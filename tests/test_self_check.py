"""What is decided on the first samples: once, for the whole run, and before anything is scored."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from naive_families import SAMPLES, naive_scores

from vig.data.sample import BrokenRecord
from vig.data.samples import read_samples
from vig.models.families import ModelError
from vig.scoring import run
from vig.scoring import scorer as scoring
from vig.scoring.dual_pass import TwoPasses
from vig.scoring.loader import load_record
from vig.scoring.run import first_records, score_dataset
from vig.scoring.scorer import Progress, Scorer
from vig.store.scores import ScoreWriter, read_scores, score_metadata

N_SAMPLES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 samples, four questions about each image; one image is missing."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(N_SAMPLES):
        tiny.save_picture(folder / f"{number // 4}.png", number // 4)
        turns = [("human", "<image>\nWhat" + "?" * (number % 3)), ("gpt", "red ball " * (1 + number % 4))]
        record = {"id": str(number), "image": f"{number // 4}.png" if number != 9 else "nowhere.png"}
        records.append(record | {"conversations": [{"from": role, "value": text} for role, text in turns]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def scorer(**options) -> Scorer:
    return Scorer(tiny.llava_model(), tiny.llava_processor(), **options)


def rows_of(folder) -> list[dict]:
    return [row for batch in read_scores(folder) for row in batch.to_pylist()]


# --- what was decided about sharing holds for the whole folder ---


@pytest.mark.parametrize("moves", [math.inf, 0.0])
def test_a_resumed_run_follows_the_first_ones_decision(data, tmp_path, monkeypatch, moves):
    """The second process would decide otherwise, as another block of samples might make it."""
    real = TwoPasses.sharing_error
    monkeypatch.setattr(TwoPasses, "sharing_error", lambda *_: moves)
    whole = tmp_path / "whole"
    if moves:
        with pytest.warns(UserWarning, match="so it is off"):
            score_dataset(scorer(), data, whole, window=16)
    else:
        score_dataset(scorer(), data, whole, window=16)
    assert score_metadata(whole)["sharing"] == ("alone" if moves else "images")
    shutil.copytree(whole, tmp_path / "resumed")
    (tmp_path / "resumed" / "scores-00001.parquet").unlink()
    monkeypatch.setattr(TwoPasses, "sharing_error", real if moves else lambda *_: math.inf)
    one = scorer()
    score_dataset(one, data, tmp_path / "resumed", window=16)
    assert one.passes.share == (not moves)
    assert rows_of(tmp_path / "resumed") == rows_of(whole)  # bit for bit
    other = scorer(share=bool(moves))
    assert [row.vig for row in other.score(read_samples(data))] != [row["vig"] for row in rows_of(whole)]


def test_the_jobs_of_an_array_follow_the_first_of_them(data, tmp_path, monkeypatch):
    score_dataset(scorer(), data, tmp_path / "scores", window=16, shard=(0, 2))
    monkeypatch.setattr(TwoPasses, "sharing_error", lambda *_: math.inf)
    one = scorer()
    score_dataset(one, data, tmp_path / "scores", window=16, shard=(1, 2))
    assert one.passes.share and score_metadata(tmp_path / "scores")["sharing"] == "images"


def test_the_first_records_with_images_decide(monkeypatch):
    plain = [SAMPLES[1]] * 500
    broken = BrokenRecord("k", "", "s", None)
    assert first_records([broken, *plain, SAMPLES[0], *plain, SAMPLES[2]]) == [SAMPLES[0], SAMPLES[2]]
    assert first_records([broken, *plain]) == [broken, *plain[: 4 * scoring.NOISE_SAMPLES - 1]]
    assert len(first_records([SAMPLES[0]] * 500)) == 4 * scoring.NOISE_SAMPLES
    monkeypatch.setattr(run, "LOOK_AHEAD", 100)
    assert SAMPLES[0] not in first_records([*plain, SAMPLES[0]])


def test_sharing_is_checked_on_text_and_again_on_images(monkeypatch):
    one, seen, real = scorer(), [], TwoPasses.sharing_error
    monkeypatch.setattr(TwoPasses, "sharing_error", lambda self, rows: seen.append(rows) or real(self, rows))
    for chosen in (SAMPLES[1:2], SAMPLES[5:6], SAMPLES[:1], SAMPLES[8:]):
        one.score(chosen)
    assert one.self_check.sharing == "images" and len(seen) == 2
    assert [[len(row.members) for row in rows] for rows in seen] == [[1, 1], [2, 1]]


# --- memory ---


def tight(passes: TwoPasses, most: int, error: Exception, calls: list[int]):
    original = passes.score

    def scoring(samples, *others):
        calls.append(len(samples))
        if len(samples) > most:
            raise error
        return original(samples, *others)

    return scoring


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused_before_anything_is_scored(data, tmp_path, error):
    one, calls = scorer(batch_tokens=1024), []
    tokens = load_record(next(read_samples(data)), one.encoder, "pixels").encoded.answer_index[-1] + 1
    one.noise_floor = lambda records: None
    one.passes.score = tight(one.passes, 4, error, calls)
    fits = r"does not fit into the memory of cpu, one of (\d+) does\. Give --batch-tokens \1"
    with pytest.raises(ModelError, match=fits):
        score_dataset(one, data, tmp_path / "scores", window=16)
    assert calls[0] == min(1024 // tokens, 16) and calls[-1] <= 4  # the budget, and no more than a window has
    assert not list((tmp_path / "scores").glob("scores-*"))
    one.passes.score = tight(one.passes, 0, error, calls)
    with pytest.raises(ModelError, match=r"a sample of \d+ tokens does not fit"):
        score_dataset(one, data, tmp_path / "scores", window=16)


def test_the_largest_batch_is_scored_once_a_process_with_images_of_its_own(data, tmp_path, monkeypatch):
    one, seen = scorer(), []
    original = one.passes.score
    monkeypatch.setattr(one.passes, "score", lambda *given: seen.append(given) or original(*given))
    monkeypatch.setattr(one, "noise_floor", lambda records: None)
    score_dataset(one, data, tmp_path / "scores", window=16)
    views, _ = seen[0]
    assert len(views) == 16 and len({id(view.encoded) for view in views}) == 1
    assert len({view.hashes for view in views}) == 16
    for views_of_data, _ in seen[1:]:  # none of the others is made up
        assert len({id(view.encoded) for view in views_of_data}) > 1
    assert not {name[1:] for name in one.passes.features._kept} & {view.hashes for view in views}


def counted_images(monkeypatch, tower) -> list[int]:
    """How many images enter the vision tower at each call."""
    calls, forward = [], tower.forward

    def counting(*args, **options):
        calls.append(len(args[0] if args else options["pixel_values"]))
        return forward(*args, **options)

    monkeypatch.setattr(tower, "forward", counting)
    return calls


@pytest.mark.parametrize("null", ["blur", "shuffle"])
@pytest.mark.parametrize(
    ("family", "share"),
    [("llava", True), ("gemma3", True), ("llava", False)],
    ids=["packed", "padded", "alone"],
)
def test_copies_of_a_sample_encode_an_image_each(data, monkeypatch, family, share, null):
    """Else the batch that tries the memory holds one image where real batches hold many."""
    model, processor = tiny_families.model(family), tiny_families.processor(family)
    one = Scorer(model, processor, share=share, null=null)
    items = one._few(list(read_samples(data, limit=8)))
    one.self_check.run(items)
    assert one.passes.share == share
    calls = counted_images(monkeypatch, model.model.vision_tower)
    one.self_check.probe_memory(items, budget=10_000, most=8)
    assert sum(calls) == 2 * 8  # clean and null


def test_no_memory_is_probed_where_nothing_is_left_to_do(data, tmp_path):
    score_dataset(scorer(), data, tmp_path / "scores")
    one = scorer()
    one.passes.score = None  # not called
    assert score_dataset(one, data, tmp_path / "scores").resumed == N_SAMPLES


def test_halved_batches_are_noted_in_the_manifest(data, tmp_path):
    one = scorer(batch_size=8)
    one.probe_memory = one.noise_floor = lambda records: None
    one.passes.score = tight(one.passes, 5, torch.OutOfMemoryError("no memory"), [])
    progress = score_dataset(one, data, tmp_path / "scores", window=16)
    splits = score_metadata(tmp_path / "scores")["notes"]["splits"]
    assert set(splits) == {"0", "1", "2"} and sum(splits.values()) == progress.splits > 2


def test_tensors_of_a_batch_that_did_not_fit_are_gone_before_its_halves_are_scored(data):
    one = scorer()
    items = [load_record(sample, one.encoder, "pixels") for sample in read_samples(data, limit=4)]
    original, held = one.passes.score, []

    def failing(samples, *others):
        if len(samples) == 4:
            large = torch.zeros(8)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("no memory")
        assert held[0]() is None
        return original(samples, *others)

    one.passes.score = failing
    gc.disable()  # nothing but the end of the exception may free it
    try:
        assert len(one._score_batch(items, Progress())) == 4
    finally:
        gc.enable()


# --- pictures ---


def test_a_picture_cut_in_a_way_of_its_own_is_an_error_row():
    """With a longest edge that is not a multiple of the tile size, the tiling of some shapes cannot be predicted."""
    processor = copy.copy(tiny_families.processor("smolvlm"))
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = {"longest_edge": 40}
    one = Scorer(tiny_families.model("smolvlm"), processor)
    rows = one.score(SAMPLES)
    failed = [row for row in rows if row.status.startswith("error: ")]
    assert 0 < len(failed) < sum(bool(sample.images) for sample in SAMPLES)
    for row in failed:
        assert "the processor made" in row.status and "null drop or shuffle" in row.status
    good = [sample for sample, row in zip(SAMPLES, rows, strict=True) if row not in failed]
    alone = Scorer(tiny_families.model("smolvlm"), processor, share=False, batch_size=1)
    for row, other in zip([row for row in rows if row not in failed], alone.score(good), strict=True):
        assert np.abs(np.subtract(row.token_nll_image, other.token_nll_image)).max() < 2e-4
    broken = [sample for sample, row in zip(SAMPLES, rows, strict=True) if row in failed]
    for null in ("drop", "shuffle"):  # the cure
        again = Scorer(tiny_families.model("smolvlm"), processor, null=null).score(SAMPLES)
        assert {row.status for row in again} == {"ok", "text_only"}
    with pytest.raises(ModelError, match="the processor made"):  # not one fits: it is the wrong processor
        Scorer(tiny_families.model("smolvlm"), processor).score(broken)


# --- the last layer ---


def test_a_last_layer_that_mixes_rows_is_computed_whole():
    """Its feed-forward part adds up the tokens before each: on answer rows alone it would give others."""
    model = copy.deepcopy(tiny_families.model("llava"))
    mlp = model.get_decoder().layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: torch.cumsum(forward(hidden), dim=1)
    chosen = [SAMPLES[0], SAMPLES[1], SAMPLES[2]]
    with pytest.warns(UserWarning, match=r"last layer on answer rows alone moves them by \S+ of their norm"):
        rows = Scorer(model, tiny_families.processor("llava"), share=False).score(chosen)
    one = Scorer(model, tiny_families.processor("llava"), share=False, batch_size=1)
    one.passes.last_layer_whole()
    for row, other in zip(rows, one.score(chosen), strict=True):
        assert np.abs(np.subtract(row.token_nll_image, other.token_nll_image)).max() < 2e-4


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_last_layer_runs_on_answer_rows_alone(family, monkeypatch):
    one, sizes = Scorer(tiny_families.model(family), tiny_families.processor(family)), []
    one.score(SAMPLES[:1])  # the self-check
    mlp = one.loaded.model.get_decoder().layers[-1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden: sizes.append(hidden.shape) or forward(hidden))
    row = one.score(SAMPLES[:1])[0]
    assert {shape[:2].numel() for shape in sizes} == {row.n_tokens} and len(sizes) == 2
    image, null = naive_scores(family)[0]
    assert np.abs(row.token_nll_image - image).max() < 2e-4 and np.abs(row.token_nll_null - null).max() < 2e-4


# --- counting ---


def test_messages_of_failures_are_bounded_and_their_count_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT_ERRORS", 3)
    (tmp_path / "data.json").write_text(json.dumps([{"id": str(number)} for number in range(50)]))
    progress = score_dataset(scorer(), tmp_path / "data.json", tmp_path / "scores", window=8)
    assert (progress.failed, len(progress.errors), progress.done) == (50, 3, 50)


def test_failures_of_earlier_runs_are_told_apart(data, tmp_path):
    first = score_dataset(scorer(), data, tmp_path / "scores", window=16)
    assert (first.failed, first.failed_before) == (1, 0)
    again = score_dataset(scorer(), data, tmp_path / "scores", window=16)
    assert (again.failed, again.failed_before) == (0, 1)
    retried = score_dataset(scorer(), data, tmp_path / "scores", window=16, retry_failed=True)
    assert (retried.failed, retried.failed_before) == (1, 0)
    with ScoreWriter(tmp_path / "scores", score_metadata(tmp_path / "scores")) as writer:
        assert writer.counts()["errors"] == 1


def test_an_error_holds_no_frames_and_so_no_pictures(data):
    """Else a dataset with many broken images would grow in memory between two runs of the garbage collector."""
    one = scorer()
    for record in (list(read_samples(data))[9], SAMPLES[0]):
        item = load_record(
            record, Scorer(tiny.llava_model(), one.loaded.processor, max_length=8).encoder, "pixels"
        )
        assert item.error is not None
        assert item.error.__traceback__ is None and item.error.__context__ is None
