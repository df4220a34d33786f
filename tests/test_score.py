"""The scorer against a naive loop, and what it does with samples that cannot be scored."""

from __future__ import annotations

import functools
import json
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from vig.data import samples
from vig.data.files import StoreError
from vig.data.images import open_image, open_images
from vig.data.records import sample_from_record
from vig.data.sample import Sample, answers
from vig.data.samples import read_samples
from vig.models.answer_spans import PromptError
from vig.models.families import ModelError
from vig.models.loading import as_loaded, load
from vig.models.null_image import NULLS
from vig.models.null_pixels import PixelRange
from vig.models.prompts import Encoder, without_images
from vig.scoring import batching
from vig.scoring.loader import content_hash, load_records
from vig.scoring.run import dry_run_dataset, score_dataset
from vig.scoring.scorer import Scorer
from vig.selection.select import select
from vig.store.fingerprints import text_hash
from vig.store.folder import settings_differences
from vig.store.scores import read_scores, score_metadata, unfinished

N_SAMPLES = 200
WORDS = ("red", "a", "blue ball", "the cat sat", "no", "Two dogs, one bird.", "yes it is", "ü")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 samples of many lengths: 40 images, several questions each, multi-turn, two images, text-only."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(40):
        tiny.save_picture(folder / f"{number}.png", number, (30 + number, 60 - number))
    records = []
    for number in range(N_SAMPLES):
        words = [WORDS[(number * 7 + step) % len(WORDS)] for step in range(1 + number % 5)]
        turns = [("<image>\nWhat?", " and ".join(words))]
        images = [f"{(number // 3) % 40}.png"]
        if number % 10 == 3:
            turns = [("Say it", words[0])]
            images = []
        if number % 10 == 4:
            turns.append(("Sure?", "I am " + words[0]))
        if number % 10 == 5:
            turns[0] = ("<image>\n<image>\nCompare.", words[0])
            images = images * 2
        conversations = [
            {"from": role, "value": text}
            for pair in turns
            for role, text in zip(("human", "gpt"), pair, strict=True)
        ]
        records.append({"id": str(number), "image": images, "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def scorer(**options):
    return Scorer(tiny.llava_model(), tiny.llava_processor(), **options)


@torch.inference_mode()
def naive_nll(sample, sigma=0.1):
    """One sample, no padding, full logits in float32, the null blurred by scipy."""
    processor, model = tiny.llava_processor(), tiny.llava_model()
    encoded = Encoder(processor).encode(sample)
    ids = torch.tensor([encoded.input_ids])

    def nll(**pixels):
        logits = model(input_ids=ids, **pixels).logits[0].float()
        logp = torch.log_softmax(logits, dim=-1)
        index = torch.tensor(encoded.answer_index)
        return -logp[index - 1, ids[0, index]].numpy()

    if not sample.images:
        return nll(), None
    pixels = encoded.pixels["pixel_values"]
    side = sigma * min(pixels.shape[-2:])
    radius = int(np.ceil(3 * side))
    blurred = gaussian_filter(
        pixels.double().numpy(), (0, 0, side, side), mode="mirror", radius=(0, 0, radius, radius)
    )
    return nll(pixel_values=pixels), nll(pixel_values=torch.from_numpy(blurred).float())


@functools.cache
def naive_scores(path):
    return [naive_nll(sample) for sample in read_samples(path)]


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_scores_equal_a_naive_loop(data, batch_size):
    rows = scorer(batch_size=batch_size).score(read_samples(data))
    samples = list(read_samples(data))
    assert [row.key for row in rows] == [sample.key for sample in samples]
    tokenizer = tiny.byte_tokenizer()
    for row, sample, (image, null) in zip(rows, samples, naive_scores(data), strict=True):
        assert row.status == ("ok" if sample.images else "text_only")
        assert tokenizer.decode(row.token_ids) == "</s>".join(answers(sample)) + "</s>"
        np.testing.assert_allclose(row.token_nll_image, image, rtol=0, atol=2e-4)
        if sample.images:
            np.testing.assert_allclose(row.token_nll_null, null, rtol=0, atol=2e-4)
            assert row.vig == pytest.approx((null.astype(np.float64) - image).mean(), abs=2e-4)
        else:
            assert row.vig is None and len(row.token_nll_null) == 0
    moved = [abs(row.vig) for row in rows if row.vig is not None]
    assert np.median(moved) > 0.01  # the pictures do matter to this model, or the test would show nothing


def test_the_same_image_as_its_null_gives_exactly_zero(data, monkeypatch):
    monkeypatch.setattr("vig.models.null_pixels.blur", lambda pictures, *_: pictures.clone())
    rows = scorer(batch_size=7).score(read_samples(data, limit=60))
    values = [
        value for row in rows if row.vig is not None for value in row.token_nll_null - row.token_nll_image
    ]
    assert len(values) > 300 and set(values) == {0.0}
    assert {row.vig for row in rows} == {0.0, None}


@pytest.mark.parametrize("null", NULLS)
def test_every_null_image_scores_and_keeps_the_clean_pass(data, null):
    clean = scorer().score(read_samples(data, limit=30))
    rows = scorer(null=null).score(read_samples(data, limit=30))
    for left, right in zip(clean, rows, strict=True):
        assert right.status == left.status
        np.testing.assert_allclose(left.token_nll_image, right.token_nll_image, atol=2e-5)
    vigs = [row.vig for row in rows if row.vig is not None]
    assert np.isfinite(vigs).all() and np.std(vigs) > 1e-3


def test_nulls_are_what_they_say(data):
    processor, (sample, *_) = tiny.llava_processor(), list(read_samples(data, limit=1))
    one = scorer()
    encoded = one.encoder.encode(sample)
    pixels, sizes = encoded.pixels, [encoded.sizes]
    content = [content_hash(image) for image in open_images(sample)]

    def null(kind, content=content):
        return scorer(null=kind).passes.null_pixels(pixels, sizes, content)["pixel_values"]

    expected = PixelRange.of(processor)
    assert null("black")[0, :, 3, 4].tolist() == pytest.approx(list(expected.black))
    mean = pixels["pixel_values"].mean(dim=(2, 3))
    assert torch.allclose(null("mean").amax(dim=(2, 3)), mean, atol=1e-6)
    noise = null("noise")
    assert torch.equal(noise, null("noise"))  # seeded by the picture
    assert not torch.equal(noise, null("noise", ["ab"]))
    low, high = (torch.tensor(level)[:, None, None] for level in (expected.black, expected.white))
    share = (noise - low) / (high - low)  # uniform from black to white
    assert -1e-6 < share.min() < 0.01 and 0.99 < share.max() < 1 + 1e-6 and abs(share.mean() - 0.5) < 0.02
    shown = without_images(sample)
    assert shown.images == () and answers(shown) == answers(sample)


def test_shuffle_takes_the_next_different_image_and_shares_it(data):
    one = scorer(null="shuffle")
    samples = [sample for sample in read_samples(data) if sample.images]
    order = list(dict.fromkeys(image for sample in samples for image in sample.images))
    questions = dict.fromkeys(order, 0)
    for item in load_records(samples, one.encoder, "image"):
        for place, image in enumerate(item.record.images):
            donor = open_image(order[(order.index(image) + 1) % len(order)], "", "")
            donor = donor.resize(item.sizes[place], Image.Resampling.BICUBIC)
            expected = one.encoder.processor.image_processor(donor, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(item.null.pixels["pixel_values"][place], expected)
            assert item.null_hashes[place] == content_hash(donor)
            questions[image] += 1
    assert len(order) == 40 and max(questions.values()) > 2
    alone = one.score([samples[0]])[0]
    assert alone.status.startswith("error: there is no other image")


def test_shuffle_passes_over_equal_and_broken_images(tmp_path):
    def record(name):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
        return {"id": name, "image": name, "conversations": turns}

    for name, seed in (("a.png", 0), ("copy.png", 0), ("b.png", 1), ("c.png", 2)):
        tiny.save_picture(tmp_path / name, seed)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = ["a.png", "copy.png", "broken.png", "b.png", "copy.png", "c.png"]
    (tmp_path / "data.json").write_text(json.dumps([record(name) for name in names]))
    one = scorer(null="shuffle")
    items = load_records(list(read_samples(tmp_path / "data.json")), one.encoder, "image")
    found = {item.record.id: item.null_hashes for item in items if item.encoded is not None}
    a, b, c = ([content_hash(tiny.picture(seed))] for seed in (0, 1, 2))
    assert found == {"a.png": b, "copy.png": b, "b.png": c, "c.png": a}


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffle_depends_on_neither_blocks_nor_batches(data, monkeypatch, workers):
    samples = [sample for sample in read_samples(data) if len(sample.images) == 1][:25]
    whole = scorer(null="shuffle").score(samples)
    monkeypatch.setattr(batching, "BLOCK", 8)  # the last block is one sample
    for options in ({}, {"share": False}, {"batch_size": 1}):
        rows = scorer(null="shuffle", workers=workers, **options).score(samples)
        assert {row.status for row in rows} == {"ok"}
        for row, other in zip(rows, whole, strict=True):
            np.testing.assert_allclose(row.token_nll_null, other.token_nll_null, rtol=0, atol=2e-4)
            assert np.abs(row.token_nll_null - row.token_nll_image).max() > 1e-3


def test_equal_images_that_are_replaced_by_different_ones_share_no_row():
    def asked(number, picture):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
        return sample_from_record({"images": [picture], "conversations": turns}, key=str(number))

    pictures = [tiny.picture(seed) for seed in (0, 1, 0, 2)]  # the third is the first again, elsewhere
    samples = [asked(*pair) for pair in enumerate(pictures)]
    together = scorer(null="shuffle").score(samples)
    apart = scorer(null="shuffle", share=False).score(samples)
    for row, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(row.token_nll_null, other.token_nll_null, rtol=0, atol=2e-4)
    assert abs(apart[0].vig - apart[2].vig) > 1e-3


def test_backends_agree(data):
    reference = scorer(backend="reference").score(read_samples(data, limit=20))
    for row, other in zip(scorer().score(read_samples(data, limit=20)), reference, strict=True):
        np.testing.assert_allclose(row.token_nll_image, other.token_nll_image, atol=1e-4)


# --- on disk ---


def table(folder):
    return {row["key"]: row for batch in read_scores(folder) for row in batch.to_pylist()}


def broken_data(folder, data):
    """The samples of `data` with seven bad records among the first eight."""
    records = json.loads(data.read_text())[:20]
    for number in range(40):
        tiny.save_picture(folder / f"{number}.png", number)
    (folder / "text.jpg").write_text("not a picture")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = [
        {"image": "nowhere.png"},
        {"image": "text.jpg"},
        {"image": "cut.png"},
        {"image": []},
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}]},
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "long " * 200}]},
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "alien", "value": "?"}]},
    ]
    for number, change in enumerate(bad, start=1):
        records[number] = {**records[0], "id": "bad", **change}
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", len(bad)


def test_bad_samples_become_rows_and_the_rest_is_scored(tmp_path, data):
    path, n_bad = broken_data(tmp_path, data)
    progress = score_dataset(scorer(), path, tmp_path / "scores")
    rows = table(tmp_path / "scores")
    assert len(rows) == 20 and progress.done == 20
    failed = {key: row for key, row in rows.items() if row["status"].startswith("error: ")}
    assert set(failed) == {f"data.json#{number}" for number in range(1, n_bad + 1)}
    assert len(progress.errors) == n_bad
    for row, line in zip(failed.values(), progress.errors, strict=True):
        assert row["vig"] is None and row["token_ids"] is None
        assert row["key"] in line and "bad" in line
    text = "\n".join(row["status"] for row in failed.values())
    for reason in (
        "no image at", "not an image", "cannot be decoded", "0 images but 1", "an answer is empty",
        "the context holds 512", "unknown role 'alien'",
    ):  # fmt: skip
        assert reason in text
    good = {row.key: row for row in scorer().score(read_samples(path)) if row.status == "ok"}
    for key, row in good.items():
        assert rows[key]["vig"] == row.vig


ASKED = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
TOLD = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}


@pytest.mark.parametrize(
    "messages, reason",
    [
        ((ASKED, TOLD | {"content": "red"}), "a assistant turn's content is str, not a list of parts"),
        ((ASKED | {"content": None}, TOLD), "a user turn's content is NoneType, not a list of parts"),
        ((ASKED,), "no answer turn"),
        ((), "no answer turn"),
        ((ASKED, TOLD | {"content": []}), "an answer is empty"),
        ((ASKED, TOLD | {"role": "gpt"}), "unknown role 'gpt'"),
        ((ASKED, TOLD | {"content": [{"type": "text"}]}), "a content part is {'type': 'text'}"),
        ((ASKED | {"content": [{"type": "image"}]}, TOLD), "0 images but 1 <image> mark"),
        ("What?", "the turns are not a list of objects"),
    ],
)
def test_samples_made_by_hand_wrongly_are_error_rows(messages, reason):
    wrong = Sample("k#1", "b", (), messages, "hand")
    good = Sample("k#0", "a", (), (ASKED, TOLD), "hand")
    first, second = scorer().score([good, wrong])
    assert first.status == "text_only"
    assert second.key == "k#1" and second.status.startswith(f"error: {reason}")


def test_names_that_are_numbers_are_their_text(tmp_path):
    rows = scorer().score(
        [Sample("k#0", 7, (), (ASKED, TOLD), "hand"), Sample("k#1", 8, (), (ASKED,), "hand")]
    )
    assert [row.id for row in rows] == ["7", "8"] and rows[1].status.startswith("error: no answer turn")
    assert select(rows, p=50, out=tmp_path / "selection").table()["k#0"].keep


class Fussy:
    """A processor that raises what `errors` has for a word of the text."""

    def __init__(self, inner, errors):
        self._inner, self._errors = inner, errors

    def __call__(self, *args, text, **options):
        for word, error in self._errors.items():
            if word in text[0]:
                raise error
        return self._inner(*args, text=text, **options)

    def __getattr__(self, name):
        if name.startswith("__") or name == "_inner":  # while it is copied
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("null", ["blur", "shuffle", "drop"])
def test_whatever_is_raised_while_a_sample_is_prepared_is_its_own_error(data, null):
    """Not what is wrong with the processor as a whole, or with the machine."""
    one, images = scorer(null=null), [tiny.picture(number) for number in range(5)]
    words = ["good", "type", "key", "runtime", "well"]
    samples = [
        sample_from_record({"image": image, "caption": word}, key=word)
        for image, word in zip(images, words, strict=True)
    ]
    errors = {"type": TypeError("not a str"), "key": KeyError("x"), "runtime": RuntimeError("odd")}
    one.encoder.processor = Fussy(one.encoder.processor, errors)
    rows = one.score(samples)
    said = ["TypeError: not a str", "KeyError: 'x'", "RuntimeError: odd"]
    said = [f"error: it cannot be prepared ({text}). Check its turns and images" for text in said]
    assert [(row.key, row.status) for row in rows] == list(zip(words, ["ok", *said, "ok"], strict=True))
    for error in (MemoryError(), OSError("no space left"), ImportError("no torchvision")):
        one.encoder.processor = Fussy(tiny.llava_processor(), {"good": error})
        with pytest.raises(type(error)):
            one.score(samples)
    one.encoder._check_text = Mock(side_effect=PromptError("no template"))
    with pytest.raises(PromptError):
        one.score(samples)


def test_retry_scores_the_failed_rows_again(tmp_path, data):
    path, n_bad = broken_data(tmp_path, data)
    score_dataset(scorer(), path, tmp_path / "scores")
    tiny.save_picture(tmp_path / "nowhere.png", 1)
    assert score_dataset(scorer(), path, tmp_path / "scores").resumed == 20
    progress = score_dataset(scorer(), path, tmp_path / "scores", retry_failed=True)
    assert len(progress.errors) == n_bad - 1 and progress.resumed == 20 - n_bad
    assert table(tmp_path / "scores")["data.json#1"]["status"] == "ok"


@pytest.mark.parametrize("workers", [0, 2])
def test_retried_samples_take_the_images_of_the_whole_window(tmp_path, workers):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(7)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number in (0, 2, 3, 5):
        tiny.save_picture(tmp_path / f"{number}.png", number)
    data = tmp_path / "data.json"
    score_dataset(scorer(null="shuffle"), data, tmp_path / "scores", window=5)
    for number in (1, 4, 6):
        tiny.save_picture(tmp_path / f"{number}.png", number)
    again = scorer(null="shuffle", workers=workers)
    assert score_dataset(again, data, tmp_path / "scores", window=5, retry_failed=True).failed == 0
    score_dataset(scorer(null="shuffle"), data, tmp_path / "whole", window=5)
    found, expected = table(tmp_path / "scores"), table(tmp_path / "whole")
    passed_over = ("data.json#0", "data.json#3")  # the image behind them was broken
    for key, row in expected.items():
        if key not in passed_over:
            np.testing.assert_allclose(found[key]["token_nll_null"], row["token_nll_null"], rtol=0, atol=2e-4)
        else:
            assert abs(found[key]["vig"] - row["vig"]) > 1e-3


def test_nan_logits_are_error_rows(tmp_path, data):
    model = tiny.llava_model(seed=7)
    with torch.no_grad():  # a rare character overflows
        model.model.language_model.embed_tokens.weight[tiny.byte_tokenizer().encode("\u00fc")[0]] = float(
            "nan"
        )
    progress = score_dataset(Scorer(model, tiny.llava_processor()), data, tmp_path / "scores")
    rows = table(tmp_path / "scores")
    hit = {sample.key for sample in read_samples(data) if any("\u00fc" in text for text in answers(sample))}
    assert {key for key, row in rows.items() if row["status"].startswith("error: ")} == hit
    assert 0 < len(hit) < N_SAMPLES and len(progress.errors) == len(hit)
    for key in hit:
        assert "--dtype float32" in rows[key]["status"] and rows[key]["vig"] is None


def test_windows_shards_and_resume_write_the_same_rows(tmp_path, data):
    score_dataset(scorer(), data, tmp_path / "whole", window=64)
    whole = table(tmp_path / "whole")
    for index in range(2):
        progress = score_dataset(scorer(), data, tmp_path / "parts", window=64, shard=(index, 2))
        assert progress.done == progress.total == (128, 72)[index]
        assert bool(unfinished(tmp_path / "parts")) == (index == 0)
    assert list(table(tmp_path / "parts").items()) == list(whole.items()) and len(whole) == N_SAMPLES
    (tmp_path / "whole" / "scores-00002.parquet").unlink()
    progress = score_dataset(scorer(), data, tmp_path / "whole", window=64)
    assert progress.resumed == N_SAMPLES - 64
    assert table(tmp_path / "whole") == whole  # bit for bit


@pytest.mark.parametrize(
    "read",
    [
        lambda data, out: score_dataset(scorer(), data, out, window=16, limit=80),
        lambda data, out: dry_run_dataset(scorer(), data, window=16, limit=80),
        lambda data, out: scorer().score(read_samples(data, limit=80)),
    ],
    ids=["score", "dry run", "in memory"],
)
def test_one_window_is_in_memory_at_a_time(tmp_path, data, monkeypatch, read):
    """With the bytes of its images a window may be gigabytes."""
    made, alive = [], []
    original = samples.sample_from_record

    def counted(*arguments, **named):
        sample = original(*arguments, **named)
        made.append(weakref.ref(sample))
        alive.append(sum(one() is not None for one in made))
        return sample

    monkeypatch.setattr(samples, "sample_from_record", counted)
    monkeypatch.setattr(batching, "WINDOW", 16)
    monkeypatch.setattr(batching, "BLOCK", 4)  # the last one may still be held
    # Held before the windows, for the noise floor.
    monkeypatch.setattr("vig.scoring.run.first_records", lambda records: [])
    read(data, tmp_path / "scores")
    assert len(made) == 80 and max(alive) <= 16 + 4


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("truncation", [False, True])
def test_what_each_call_sets_in_a_tokenizer_is_not_in_its_hash(tmp_path, data, truncation, padding):
    """Some tokenizer.json were saved with it; of the others the hash is that of the whole text, as folders have it."""
    one = scorer()
    tokenizer = one.encoder.tokenizer.backend_tokenizer
    whole = text_hash(tokenizer.to_str())
    if truncation:
        tokenizer.enable_truncation(64, strategy="longest_first")
    if padding:
        tokenizer.enable_padding(length=64, pad_token='{"padding":')
    assert (text_hash(tokenizer.to_str()) == whole) == (not truncation and not padding)
    for resumed in (0, 3):
        assert one.provenance()["tokenizer_hash"] == whole
        assert score_dataset(one, data, tmp_path / "scores", limit=3).resumed == resumed


def test_other_settings_in_the_same_folder_are_refused(tmp_path, data):
    score_dataset(scorer(), data, tmp_path / "scores", limit=4)
    with pytest.raises(StoreError, match=r"null\.params\.sigma.*0\.1.*0\.2"):
        score_dataset(scorer(sigma=0.2), data, tmp_path / "scores", limit=4)
    metadata = score_metadata(tmp_path / "scores")
    assert metadata["null"] == {
        "kind": "blur",
        "params": {"sigma": 0.1, "truncate": 3.0, "border": "reflect"},
    }
    assert metadata["dtype"] == "float32" and metadata["backend"] in ("cpu", "torch")
    assert 0 <= metadata["noise_floor"] < 2e-4


def test_every_setting_binds_but_those_that_change_no_score(data):
    settings = scorer().provenance(data) | {"window": 8192, "limit": None, "shard": None, "schema_version": 1}
    free = {"data", "image_root", "batch_tokens", "batch_size", "library_version", "noise_floor", "sharing"}
    free |= {
        "data_format",
        "stop_ids",
    }  # follow from the data and the tokenizer; folders of before have neither
    for name in settings | dict.fromkeys(free):
        differences = settings_differences(settings, settings | {name: "other"})
        assert bool(differences) == (name not in free), name


def test_an_out_of_memory_batch_is_halved_and_a_single_one_is_an_error_row(data):
    one = scorer(batch_size=16)
    whole, original = one.score(read_samples(data, limit=12)), one.passes.score

    def tight(views, *others):
        if len(views) > 3 or any(view.encoded.sample.id == "7" for view in views):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(views, *others)

    one.passes.score = tight
    rows = one.score(read_samples(data, limit=12))
    for row, other in zip(rows, whole, strict=True):
        if row.id == "7":
            assert row.status.startswith("error: it does not fit into memory")
        else:
            np.testing.assert_allclose(row.token_nll_image, other.token_nll_image, atol=2e-4)


# --- models ---


def test_models_that_cannot_be_scored_are_refused(tmp_path, data):
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError, match="model_type 'llama' is not supported; supported: llava"):
        as_loaded(model, tiny.llava_processor())
    with pytest.raises(ModelError, match="without its processor"):
        Scorer(tiny.llava_model())


def test_a_model_that_sees_later_tokens_is_refused(data):
    model = tiny.llava_model(seed=3)

    def look_ahead(module, args, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + hidden.mean(dim=1, keepdim=True)

    hook = model.model.language_model.register_forward_hook(look_ahead)
    try:
        with pytest.raises(ModelError, match="is not causal"):
            Scorer(model, tiny.llava_processor()).score(read_samples(data, limit=3))
    finally:
        hook.remove()


def test_a_checkpoint_on_disk_scores_like_the_model_in_memory(tmp_path, data):
    tiny.save_llava(tmp_path)
    rows = Scorer(tmp_path, dtype="float32", device="cpu").score(read_samples(data, limit=5))
    for row, other in zip(rows, scorer().score(read_samples(data, limit=5)), strict=True):
        assert row.vig == other.vig
    with pytest.raises(ModelError, match="dtype = 'fp8'"):
        load(tmp_path, dtype="fp8")


# --- planning ---


def test_batches_keep_the_budget_and_every_item():
    lengths = [5, 90, 30, 30, 7, 200, 1, 64, 64]
    cut = batching.batches(lengths, budget=128)
    assert sorted(index for batch in cut for index in batch) == list(range(len(lengths)))
    for batch in cut:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= 128
    assert cut[0] == [5]  # the longest first, alone because it is over the budget
    assert all(len(batch) <= 2 for batch in batching.batches(lengths, 10_000, max_rows=2))
    assert batching.batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]  # full to the last token, in order
    assert batching.batches([], 10) == []


def test_shards():
    assert batching.parse_shard("3/8") == (3, 8)
    for wrong in ("8/8", "x", "1", "-1/2", "1/0"):
        with pytest.raises(ValueError, match="expected i/n"):
            batching.parse_shard(wrong)
    assert [number for number in range(6) if batching.in_shard(number, (1, 3))] == [1, 4]
