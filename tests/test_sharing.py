"""Samples that share images and prompt prefix: the same values, each image and prefix computed once."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from torch.utils.data import dataloader

from vig.data.samples import read_samples
from vig.models import image_features
from vig.models.families import FAMILIES
from vig.models.null_image import NULLS
from vig.scoring import batching, dual_pass, loader, prefix_sharing
from vig.scoring.loader import load_record, load_records
from vig.scoring.prefix_sharing import View
from vig.scoring.scorer import Scorer

ANSWERS = ("a cat", "no", "two dogs and a bird", "red", "it is blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 samples in mixed order: 5 images with up to 7 questions each, two images, two turns, text alone."""
    folder = tmp_path_factory.mktemp("shared")
    for number in range(5):
        tiny.save_picture(folder / f"{number}.png", number, (40 - 4 * number, 20 + 5 * number))
    records = []
    for number in range(40):
        turns = [("<image>\nWhat" + "?" * (number % 4 + 1), ANSWERS[number % 5])]
        images = [f"{number % 5}.png"]
        if number % 8 == 2:
            turns.append(("Sure?", f"yes, {number}"))
        if number % 8 == 3:
            turns, images = [("<image>\n<image>\nCompare.", ANSWERS[number % 5])], ["1.png", images[0]]
        if number % 8 == 5:
            turns[0] = ("What is it?\n<image>", turns[0][1])
        if number % 8 == 6:
            turns.append(("<image>\nAnd this?", "a later image"))
            images = [images[0], "2.png"]
        if number % 8 == 7:
            turns, images = [("Say it", ANSWERS[number % 5])], []
        parts = [
            {"from": role, "value": text}
            for pair in turns
            for role, text in zip(("human", "gpt"), pair, strict=True)
        ]
        records.append({"id": str(number), "image": images, "conversations": parts})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def scorer(family="llava", **options):
    return Scorer(tiny_families.model(family), tiny_families.processor(family), **options)


def differences(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row.key == other.key and row.status == other.status and row.status in ("ok", "text_only")
        assert list(row.token_ids) == list(other.token_ids)
        yield float(np.abs(np.subtract(row.token_nll_image, other.token_nll_image)).max())
        if row.status == "ok":
            yield float(np.abs(np.subtract(row.token_nll_null, other.token_nll_null)).max())


# --- the same values ---


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.shares_prefix])
def test_sharing_changes_no_value(data, family):
    shared, alone = scorer(family), scorer(family, share=False)
    assert max(differences(shared.score(read_samples(data)), alone.score(read_samples(data)))) < 2e-4
    assert shared.passes.share  # it has passed the self-check
    assert not alone.passes.share


@pytest.mark.parametrize("null", [name for name in NULLS if name != "blur"])
def test_every_null_image_is_shared_too(data, null):
    shared, alone = scorer(null=null), scorer(null=null, share=False)
    assert max(differences(shared.score(read_samples(data)), alone.score(read_samples(data)))) < 2e-4


def test_the_same_image_as_its_null_gives_exactly_zero(data, monkeypatch):
    monkeypatch.setattr("vig.models.null_pixels.blur", lambda pictures, *_: pictures.clone())
    assert {row.vig for row in scorer().score(read_samples(data))} == {0.0, None}


def test_the_rows_of_a_window_are_repeated_bit_for_bit(data):
    records = list(read_samples(data))
    first, second = scorer().score_window(records), scorer(workers=2).score_window(records)
    assert set(differences(first, second)) == {0.0}
    one = scorer()
    one.score_window(records[:17])  # what was scored before leaves no trace
    assert set(differences(first, one.score_window(records))) == {0.0}


def test_values_that_are_not_finite_stay_with_their_sample(data):
    model = tiny.llava_model(seed=11)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[tiny.byte_tokenizer().encode("b")[0]] = float("nan")
    rows = Scorer(model, tiny.llava_processor()).score(read_samples(data))
    with_b = {
        sample.key
        for sample in read_samples(data)
        if any("b" in part.get("text", "") for message in sample.messages for part in message["content"])
    }
    assert {row.key for row in rows if row.status.startswith("error: ")} == with_b
    assert 0 < len(with_b) < len(rows)


# --- it is done once ---


def counted(monkeypatch, owner, name, size):
    calls = []
    original = getattr(owner, name)

    def counting(*args, **options):
        calls.append(size(*args, **options))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_each_image_and_prefix_is_computed_once_a_pass(tmp_path, monkeypatch):
    records = []
    for number in range(24):
        tiny.save_picture(tmp_path / f"{number % 4}.png", number % 4)
        turns = [
            {"from": "human", "value": "<image>\n" + "?" * (number % 3)},
            {"from": "gpt", "value": "yes"},
        ]
        turns = turns if number < 12 else [{"from": "system", "value": "Be brief."}, *turns]
        records.append({"id": str(number), "image": f"{number % 4}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    one = Scorer(tiny.llava_model(), tiny.llava_processor())
    records = list(read_samples(tmp_path / "data.json"))
    one.score_window(records)  # the self-check
    tower = counted(
        monkeypatch, one.loaded.model.model.vision_tower, "forward", lambda images, **_: len(images)
    )
    tokens = counted(
        monkeypatch, one.loaded.model.model.language_model, "forward",
        lambda inputs_embeds, **_: inputs_embeds.shape[0] * inputs_embeds.shape[1],
    )  # fmt: skip
    opened = counted(monkeypatch, loader, "open_images", lambda record: record.images)
    processed = counted(
        monkeypatch, type(one.loaded.processor.image_processor), "__call__", lambda *_, **__: 1
    )
    one.score_window(records)
    assert sum(tower) == 2 * 4  # clean and null of four images, each with two prefixes
    assert len(opened) == len(processed) == 4
    encoded = [one.encoder.encode(record) for record in records]
    prefixes = {
        prefix_sharing.shared_by(View(item, item.sample.images), one.encoder.image_token_id)
        for item in encoded
    }
    least = sum(len(ids) for _, ids in prefixes)
    least += sum(item.n_fed - prefix_sharing.prefix_length(item, 3) for item in encoded)
    assert len(prefixes) == 8
    assert 2 * least <= sum(tokens) <= 2 * 1.15 * least  # a little padding


def test_nothing_is_computed_behind_the_last_answer_token(data, monkeypatch):
    one = scorer(share=False)
    seen = counted(
        monkeypatch, one.loaded.model.model.language_model, "forward", lambda **o: o["inputs_embeds"].shape
    )
    items = [load_record(sample, one.encoder, "pixels") for sample in read_samples(data, limit=3)]
    one.passes.score([items[0].view])
    assert {shape[1] for shape in seen} == {items[0].encoded.answer_index[-1] + 1}
    assert items[0].encoded.answer_index[-1] + 1 < len(items[0].encoded.input_ids)


def test_workers_give_the_same_records_in_the_same_order(data):
    one, records = scorer(), list(read_samples(data))
    here, there = (list(load_records(records, one.encoder, "pixels", workers)) for workers in (0, 2))
    assert [item.place for item in here] == [item.place for item in there]
    assert sorted(item.place for item in here) == list(range(len(records)))
    for left, right in zip(here, there, strict=True):
        assert left.encoded.input_ids == right.encoded.input_ids and left.hashes == right.hashes
        for name, value in left.encoded.pixels.items():
            assert torch.equal(value, right.encoded.pixels[name])


def test_workers_need_neither_open_files_nor_shared_memory(data, monkeypatch, tmp_path):
    """A shell gives 1,024 open files, a container 64 MB in /dev/shm: what is loaded may hold none of them."""
    one, records = scorer(), list(read_samples(data)) * 2
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = set(os.listdir("/dev/shm"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
        found = list(load_records(records, one.encoder, "pixels", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(found) == len(records)
    assert not any(value.is_shared() for item in found for value in item.encoded.pixels.values())
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("torch_")]
    assert not list(tmp_path.iterdir())  # the files that were sent are gone


def test_the_next_block_is_made_while_the_last_one_is_scored(data, monkeypatch):
    monkeypatch.setattr(batching, "BLOCK", 8)
    made, seen = [], []
    blocks = batching.blocks

    def noted(*given):
        for block in blocks(*given):
            made.append(len(block))
            yield block

    monkeypatch.setattr(batching, "blocks", noted)
    one, records = scorer(workers=1), list(read_samples(data))
    score_block = one._score_block

    def slow(*given):
        deadline = time.monotonic() + 20
        while len(made) < min(len(seen) + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(len(made))
        return score_block(*given)

    one._score_block = slow
    assert len(one.score_window(records)) == len(records)
    assert len(seen) == 5
    for scored, at in enumerate(seen):
        assert (
            min(scored + 2, 5) <= at <= scored + 3
        )  # no more than two are prefetched: their pixels are in memory


def test_a_prefetching_thread_passes_errors_on_and_ends_with_its_reader():
    def failing():
        yield 1
        raise ValueError("no")

    items = loader.prefetch_in_thread(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no"):
        next(items)
    endless = loader.prefetch_in_thread(iter(int, 1))
    assert next(endless) == 0
    endless.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "vig-prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(loader.prefetch_in_thread(iter(()))) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_kills_its_process_is_an_error_row(data, monkeypatch, workers):
    """As a decoder that crashes does: the other samples are loaded, in the same order."""
    one, records, parent, original = scorer(), list(read_samples(data)), os.getpid(), loader.open_images

    def deadly(record):
        if os.getpid() != parent and record.images and record.images[0].name == "2.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(record)

    whole = list(load_records(records, one.encoder, "pixels"))
    monkeypatch.setattr(loader, "open_images", deadly)
    asked = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(asked, "__defaults__", (0.05,))  # seconds between two looks at the workers
    found = list(load_records(records, one.encoder, "pixels", workers))
    assert [item.place for item in found] == [item.place for item in whole]
    killed = [item for item in found if item.is_multimodal and item.record.images[0].name == "2.png"]
    assert killed and all("process that decoded" in item.error.reason for item in killed)
    assert all(item.encoded is None for item in killed)
    assert all((item.error is None) == (item not in killed) for item in found)


def test_how_many_workers_feed_a_device():
    assert loader.workers_beside(torch.device("cpu")) == 0
    assert 1 <= loader.workers_beside(torch.device("cuda")) <= loader.MOST_WORKERS
    assert scorer(workers=None).workers == 0


@pytest.mark.parametrize(
    "family", [name for name, row in FAMILIES.items() if row.shares_prefix and row.features_apart]
)
def test_features_are_computed_apart_in_every_family_that_offers_it(family):
    assert image_features.why_not(tiny_families.model(family)) is None


def test_kept_features_are_bounded(monkeypatch):
    kept = image_features.ImageFeatures(tiny.llava_model())
    asked = []

    def pixels(places):
        asked.append(list(places))
        return {"pixel_values": torch.rand(len(places), 3, 32, 32)}

    one = kept.of(["a", "b", "a"], [16] * 3, pixels)["image"].pooler_output[0]
    assert asked == [[0, 1]] and one.shape == (48, 48) and torch.equal(one[:16], one[32:])
    monkeypatch.setattr(image_features, "KEPT_BYTES", 2 * 16 * 48 * 4)
    again = kept.of(["c", "b"], [16] * 2, pixels)["image"].pooler_output[0]
    assert asked[1:] == [[0]] and torch.equal(again[16:], one[16:32])
    kept.of(["b", "a"], [16] * 2, pixels)
    assert asked[2:] == [[1]]  # "a" had been asked for least lately


# --- when it is not done ---


def test_sharing_that_moves_values_is_switched_off_and_said(data, monkeypatch):
    """In a family whose rows are padded and masked; of packed rows tests/test_packed.py."""
    alone = scorer("gemma3", share=False).score(read_samples(data))

    def all_see_all(model, branch, positions, input_ids):  # earlier branches are seen too: wrong
        order = torch.arange(branch.shape[1])
        return prefix_sharing._added(
            (order[:, None] >= order[None, :]).expand(len(branch), -1, -1), model.dtype
        )

    monkeypatch.setattr(prefix_sharing, "_masks", all_see_all)
    one = scorer("gemma3")
    with pytest.warns(UserWarning, match=r"moves values by \S+ nats, so it is off"):
        rows = one.score(read_samples(data))
    assert not one.passes.share
    assert max(differences(rows, alone)) < 2e-4


def test_wrong_positions_are_found_by_the_self_check(data, monkeypatch):
    monkeypatch.setattr(prefix_sharing.SharedRow, "positions", lambda row, whole: torch.arange(row.n_tokens))
    with pytest.warns(UserWarning, match="so it is off"):
        scorer().score(read_samples(data, limit=12))


def test_a_prefix_that_sees_what_follows_is_never_shared():
    reason = prefix_sharing.why_not(tiny_families.model("paligemma"))
    assert "paligemma is not causal" in reason
    assert not scorer("paligemma").passes.share
    assert prefix_sharing.why_not(tiny_families.model("llava")) is None


# --- rows and blocks ---


def test_rows_keep_the_order_and_the_limit(data):
    one = scorer()
    items = [
        load_record(sample, one.encoder, "pixels") for sample in read_samples(data) if len(sample.images) == 1
    ]
    items.sort(key=lambda item: item.hashes)
    views = [item.view for item in items]
    rows = one.passes.rows(views)
    assert [id(member) for row in rows for member in row.members] == [id(view) for view in views]
    assert max(len(row.members) for row in rows) > 2
    one.passes.longest = 90
    short = one.passes.rows(views)
    assert len(short) > len(rows)
    assert all(row.n_tokens <= 90 for row in short if len(row.members) > 1)
    for row in short:  # a row for itself is that row again: a batch may be cut anywhere
        again = one.passes.rows(row.members)
        assert [len(other.members) for other in again] == [len(row.members)]


def test_an_answer_before_the_last_image_is_computed_alone(data):
    one = scorer()
    late = next(sample for sample in read_samples(data) if sample.id == "6")
    encoded = one.encoder.encode(late)
    assert encoded.input_ids.count(3) > 1 and prefix_sharing.prefix_length(encoded, 3) == 0
    alone = prefix_sharing.rows_of([View(encoded, ("a", "b"))] * 2, 3, None, 10_000)
    assert [len(row.members) for row in alone] == [1, 1]  # though their images are the same
    behind = replace(encoded, answer_index=encoded.answer_index[-3:])
    assert 0 < prefix_sharing.prefix_length(behind, 3) < behind.answer_index[0]


def test_records_with_the_same_images_stand_together():
    class Record:
        def __init__(self, *images):
            self.images = images

    records = [Record(b"a"), Record(b"b"), Record(), Record(b"a"), Record(b"a", b"b"), Record(), Record(b"b")]
    assert batching.by_images(records) == [[0, 3], [1, 6], [2], [4], [5]]
    assert batching.by_images(records[:1] * 5, most=2) == [[0, 1], [2, 3], [4]]
    assert list(batching.blocks([10, 20, 30], lambda item: batching.BLOCK_BYTES // 2)) == [[10, 20], [30]]


def test_a_batch_that_does_not_fit_is_halved_between_samples_that_share(data):
    one = scorer()
    records = list(read_samples(data))
    whole, original = one.score_window(records), one.passes.score

    def tight(samples, *others):
        if len(samples) > 2:
            raise torch.OutOfMemoryError("no memory")
        return original(samples, *others)

    one.passes.score = tight
    assert max(differences(whole, one.score_window(records))) < 2e-4


def test_results_of_a_row_that_is_not_finite_are_taken_alone(data):
    assert dual_pass.TokenNLL(np.ones(2, np.float32), None).is_finite()
    assert not dual_pass.TokenNLL(np.ones(1, np.float32), np.array([np.nan], np.float32)).is_finite()
