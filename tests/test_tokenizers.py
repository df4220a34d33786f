"""Real tokenizers with their models' published templates: answer masks and scores against naive ones.

The masks are compared with the bytes that the tokens spell, the scores with one sample at a time, full logits, prompts
written by hand and scipy's blur. Extracts of the tokenizers lie beside; `make test-tokenizers` runs this on whole ones.
"""

from __future__ import annotations

import copy

import naive_families
import numpy as np
import pytest
import real_tokenizers as real
import torch

from vig.models.prompts import Encoder
from vig.models.token_texts import token_texts
from vig.scoring.scorer import Scorer

N_SAMPLES = 200
TOLERANCE = 2e-4  # nats, float32

each_tokenizer = pytest.mark.parametrize("name", real.HERE)


def test_extracts_or_all():
    assert set(real.HERE) >= {"mistral", "qwen3", "smollm2"}
    if real.FOLDER != real.EXTRACTS:
        assert set(real.HERE) == set(real.REAL)


@each_tokenizer
@pytest.mark.parametrize("number", range(len(real.ANSWERS)))
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_answer_masks(name, number, image):
    """Twice in one conversation, so that what stands between two answers is seen too."""
    answer = real.ANSWERS[number]
    sample = real.sample(number, [("What is it?", answer), (" And now 😀?", answer)], image=image)
    encoder = Encoder(real.processor(name))
    encoded = encoder.encode(sample)
    mask = real.answer_mask(name, encoded.input_ids, sample)
    assert encoded.answer_index == [index for index, is_answer in enumerate(mask) if is_answer]
    assert encoded.turn_position.count(0) == 2 and encoded.unknown == 0
    assert encoded.answer_ids[-1] in encoder.stop_ids
    texts = token_texts(encoder.tokenizer, encoded.answer_ids)
    assert "".join(texts) == encoder.tokenizer.decode(encoded.answer_ids)


@pytest.mark.skipif(real.FOLDER == real.EXTRACTS, reason="`make test-tokenizers` has the whole ones")
@pytest.mark.parametrize("name", sorted(path.stem for path in real.EXTRACTS.glob("*.json")))
def test_an_extract_gives_the_tokens_of_the_whole(name):
    whole, part = real.tokenizer(name), real.tokenizer(name, real.EXTRACTS)
    for sample in real.samples(N_SAMPLES):
        text = prompt(name, sample)
        assert whole.tokenize(text) == part.tokenize(text)


# --- scores ---


def prompt(name: str, sample) -> str:
    entry = real.REAL[name]
    return "".join(
        text for text, _ in entry.by_hand(real.turns_of(sample), entry.image if sample.images else "")
    )


@torch.inference_mode()
def one_by_one(name: str, sample) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """Ids of the answer tokens and their NLLs, with the image and without."""
    text, found = prompt(name, sample), []
    clean = real.processor(name)
    blind = copy.copy(clean)
    blind.image_processor = naive_families.blurring(clean.image_processor)
    for processor in (clean, blind) if sample.images else (clean,):
        images = {"images": [list(sample.images)]} if sample.images else {}
        inputs = processor(text=[text], **images, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"][0]
        index = torch.tensor(real.answer_mask(name, ids.tolist(), sample)).nonzero().squeeze(1)
        logp = real.model(name)(**inputs).logits[0, index - 1].float().log_softmax(-1)
        found.append(-logp.gather(1, ids[index, None]).squeeze(1).numpy())
    return ids[index].tolist(), found[0], found[1] if sample.images else None


@each_tokenizer
def test_scores_of_200_samples_equal_the_naive_loop(name):
    samples = real.samples(N_SAMPLES)
    rows = Scorer(real.model(name), real.processor(name), device="cpu", batch_size=7).score(samples)
    assert len(rows) == N_SAMPLES
    for row, sample in zip(rows, samples, strict=True):
        ids, image, null = one_by_one(name, sample)
        assert list(row.token_ids) == ids
        np.testing.assert_allclose(row.token_nll_image, image, rtol=0, atol=TOLERANCE)
        if null is None:
            assert row.status == "text_only" and row.vig is None
        else:
            np.testing.assert_allclose(row.token_nll_null, null, rtol=0, atol=TOLERANCE)
            assert np.abs(row.token_nll_null - row.token_nll_image).max() > 10 * TOLERANCE
