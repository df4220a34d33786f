"""The scorer on 200 samples of the end-to-end example, with the checkpoint that ships, against a naive loop.

The loop takes one sample at a time, pads nothing, and forms full logits in float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vig.data.samples import read_samples
from vig.demo import dataset
from vig.demo.arms import CHECKPOINT
from vig.models.prompts import Encoder
from vig.scoring.scorer import Scorer

N_SAMPLES = 200
TOLERANCE = 2e-4  # nats, float32


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = dataset.write_records(
        tmp_path_factory.mktemp("scenes"), "tune", dataset.tuning_records(N_SAMPLES, seed=11)
    )
    return list(read_samples(path))


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def naive(samples, model, processor):
    """(image, null) NLLs of every sample; null is None for text alone."""
    encoder = Encoder(processor)
    with torch.inference_mode():
        return [one_by_one(model, encoder.encode(sample)) for sample in samples]


def one_by_one(model, encoded):
    ids = torch.tensor([encoded.input_ids])
    index = torch.tensor(encoded.answer_index)

    def nll(**pixels):
        logits = model(input_ids=ids, **pixels).logits[0].float()
        return -torch.log_softmax(logits, dim=-1)[index - 1, ids[0, index]].numpy()

    if not encoded.sample.images:
        return nll(), None
    pixels = encoded.pixels["pixel_values"]
    sigma = 0.1 * min(pixels.shape[-2:])
    radius = int(np.ceil(3 * sigma))
    blurred = gaussian_filter(
        pixels.double().numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, radius, radius)
    )
    return nll(pixel_values=pixels), nll(pixel_values=torch.from_numpy(blurred).float())


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_token_nlls_equal_the_naive_loop(samples, model, processor, naive, batch_size):
    rows = Scorer(model, processor, batch_size=batch_size).score(samples)
    assert len(rows) == N_SAMPLES
    for row, sample, (image, null) in zip(rows, samples, naive, strict=True):
        np.testing.assert_allclose(row.token_nll_image, image, rtol=0, atol=TOLERANCE)
        if sample.images:
            np.testing.assert_allclose(row.token_nll_null, null, rtol=0, atol=TOLERANCE)
        else:
            assert row.status == "text_only" and row.vig is None


def test_an_image_that_is_its_own_null_gives_exactly_zero(samples, model, processor, monkeypatch):
    monkeypatch.setattr("vig.models.null_pixels.blur", lambda pictures, *_: pictures.clone())
    rows = Scorer(model, processor, batch_size=7).score(samples)
    rows = [row for row in rows if row.status == "ok"]
    differences = [float(value) for row in rows for value in row.token_nll_null - row.token_nll_image]
    assert len(differences) > 500 and set(differences) == {0.0}
    assert {row.vig for row in rows} == {0.0}
