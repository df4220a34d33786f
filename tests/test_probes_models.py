"""Attention and greedy answers of every family, against the model's own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import tiny_families
import torch

from vig.data.samples import read_samples
from vig.evaluation.probes import attention
from vig.evaluation.probes.answering import greedy_answers
from vig.evaluation.probes.run import by_group, run_probes
from vig.models.families import FAMILIES, ModelError
from vig.scoring.scorer import Scorer
from vig.scoring.settings import RunSpec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six samples with prompts and answers of different lengths; two images, two turns, and one image twice."""
    folder = tmp_path_factory.mktemp("probes")
    for number in range(3):
        tiny.save_picture(folder / f"{number}.png", number, (40 - 4 * number, 20 + 5 * number))
    asked = [
        (["0.png"], [("<image>\nWhat?", "a cat")]),
        (["1.png"], [("<image>\nWhat do you see there?", "no")]),
        (["0.png"], [("<image>\nWho?", "two dogs and a bird"), ("Sure?", "yes")]),
        (["1.png", "2.png"], [("<image>\n<image>\nCompare.", "red")]),
        (["2.png"], [("Look: <image>", "it is blue")]),
        ([], [("Say it", "so")]),
    ]
    records = [
        {
            "id": str(number),
            "image": images,
            "conversations": [
                {"from": role, "value": text}
                for pair in turns
                for role, text in zip(("human", "gpt"), pair, strict=True)
            ],
        }
        for number, (images, turns) in enumerate(asked)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(params=list(FAMILIES))
def scorer(request):
    return Scorer(tiny_families.model(request.param), tiny_families.processor(request.param))


def test_attention_is_what_the_model_attends_to(scorer, data):
    model, encoder = scorer.loaded.model, scorer.encoder
    before = model.get_decoder().config._attn_implementation
    result = run_probes(scorer, RunSpec(data), ["attention"])[0]
    assert model.get_decoder().config._attn_implementation == before
    assert result.findings.errors == [] and len(result.findings.units) == 5
    layers = by_group(result.figures)
    assert list(layers) == [f"layer {n}" for n in range(len(model.get_decoder().layers))]
    for place, sample in enumerate(one for one in read_samples(data) if one.images):
        encoded = encoder.encode(sample)
        inputs = encoder.collate([encoded])
        inputs.pop("labels")
        with attention.eager_attention(model), torch.no_grad():
            own = model(**inputs, output_attentions=True, use_cache=False).attentions
        is_image = torch.tensor(encoded.input_ids) == encoder.image_token_id
        rows = torch.tensor(encoded.answer_index) - 1
        unit = result.findings.units[place]
        assert unit.key == sample.key and len(own) == len(layers)
        for number, weights in enumerate(own):  # (1, H, T, T)
            expected = weights[0].mean(dim=0)[rows][:, is_image].sum(dim=1).mean()
            assert unit.values[f"layer {number}"]["on image tokens"] == pytest.approx(
                float(expected), abs=1e-5
            )
        even = [float(is_image[: row + 1].sum()) / (int(row) + 1) for row in rows]
        assert unit.values["layer 0"]["image tokens"] == pytest.approx(sum(even) / len(even))


def test_greedy_answers_of_a_batch_are_the_most_probable_tokens(scorer, data):
    samples = [sample for sample in read_samples(data) if sample.images]
    written = greedy_answers(scorer, samples, 5)
    model, encoder, tokenizer = scorer.loaded.model, scorer.encoder, scorer.encoder.tokenizer
    own = model.generation_config.eos_token_id
    stops = {*encoder.stop_ids, *([own] if isinstance(own, int) else own or ())}
    for sample, text in zip(samples, written, strict=True):
        encoded = encoder.encode(sample)
        start = encoded.answer_index[0]
        ids = list(encoded.input_ids[:start])
        for _ in range(5):  # no cache, no padding: one token after another
            inputs = {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            }
            for name, value in encoded.pixels.items():
                if name in ("token_type_ids", "mm_token_type_ids"):
                    kind = int(
                        encoder.has_bidirectional_prefix
                    )  # PaliGemma's answers see what is before them
                    value = torch.cat([value[:, :start], value.new_full((1, len(ids) - start), kind)], dim=1)
                inputs[name] = value
            with torch.no_grad():
                ids.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
        new = [id for id in ids[start:] if id not in stops]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_batches_of_weights_stay_within_their_bytes(data, monkeypatch):
    scorer = Scorer(tiny_families.model("llava"), tiny_families.processor("llava"))
    whole = run_probes(scorer, RunSpec(data), ["attention"])[0]
    sizes = []
    probe = attention._probe
    monkeypatch.setattr(
        attention, "_probe", lambda scorer, items: sizes.append(len(items)) or probe(scorer, items)
    )
    monkeypatch.setattr(attention, "MOST_BYTES", 1)
    alone = run_probes(scorer, RunSpec(data), ["attention"])[0]
    assert sizes == [1] * 5
    for one, other in zip(whole.findings.units, alone.findings.units, strict=True):
        assert one.key == other.key
        for layer, values in one.values.items():
            assert other.values[layer] == pytest.approx(values, abs=1e-6)


def test_out_of_memory_halves_the_batch_and_at_last_is_an_error(data, monkeypatch):
    scorer = Scorer(tiny_families.model("llava"), tiny_families.processor("llava"))
    real = attention.image_attention

    def small(scorer, items):
        if len(items) > 1 or items[0].record.id == "2":
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 3 GiB")
        return real(scorer, items)

    monkeypatch.setattr(attention, "image_attention", small)
    result = run_probes(scorer, RunSpec(data), ["attention"])[0]
    assert [unit.key for unit in result.findings.units] == [f"data.json#{n}" for n in (0, 1, 3, 4)]
    assert result.findings.errors[0][1] == "2" and "does not fit into memory" in result.findings.errors[0][2]


@pytest.mark.parametrize(
    ("text", "layers", "image_token", "reason"),
    [
        (
            {"cross_attention_layers": [1]},
            [],
            7,
            "eye reads images by cross-attention: no image tokens stand in",
        ),
        ({}, [], -1, "the processor of eye writes no image tokens"),
        ({}, None, 7, "the decoder of eye has no list of layers"),
        ({}, [SimpleNamespace(self_attn=1), SimpleNamespace()], 7, "layer 1 of eye has no softmax attention"),
    ],
)
def test_models_whose_attention_cannot_be_read_are_refused(text, layers, image_token, reason):
    config = SimpleNamespace(model_type="eye", get_text_config=lambda: SimpleNamespace(**text))
    model = SimpleNamespace(config=config, get_decoder=lambda: SimpleNamespace(layers=layers))
    assert attention.why_not(model, image_token).startswith(reason)


def test_the_refusal_of_a_model_says_the_reason(data, monkeypatch):
    scorer = Scorer(tiny_families.model("llava"), tiny_families.processor("llava"))
    monkeypatch.setattr(
        scorer.loaded.model.config.get_text_config(), "cross_attention_layers", [0], raising=False
    )
    with pytest.raises(
        ModelError, match="the probe attention cannot be made: llava reads images by cross-attention"
    ):
        run_probes(scorer, RunSpec(data), ["attention"])
