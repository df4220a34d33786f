"""Advice that is true: what tokens say, tokens that nobody knows, towers that train, models that learn to stop."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from vig.cli import app
from vig.data.records import sample_from_record
from vig.data.samples import read_samples
from vig.models.prompts import Encoder
from vig.models.token_texts import token_texts
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer
from vig.store.folder import SettingsDiffer
from vig.training.train import train


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with the space before them, and bytes for the rest, as Llama 2 has them."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", "▁Yes", "Yes", "▁it", "."]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", ignore_merges=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("text", ["Yes it Yes.", "日本 😀é", "x " * 40, "a\n\n  b", "שלום", "e\u0301e\u0301"])
@pytest.mark.parametrize("make", [sentencepiece, tiny.byte_tokenizer])
def test_texts_of_tokens_join_to_the_whole(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(
        ids, clean_up_tokenization_spaces=False
    )
    assert not any("\ufffd" in one for one in texts)


def test_spaces_of_sentencepiece_stay_and_bytes_of_a_character_stand_together():
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["▁Yes", "▁it", "▁Yes", "<0xC3>", "<0xA9>", "."])
    assert token_texts(tokenizer, ids) == ["Yes", " it", " Yes", "", "é", "."]


def test_unknown_tokens_are_counted_and_warned_of(tmp_path):
    processor = tiny.llava_processor()
    processor.tokenizer.unk_token = "<|im_end|>"  # a token that stands for something else than its text
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a <|im_end|><|im_end|> b"},
        ]
    }
    encoded = Encoder(processor).encode(sample_from_record(record, key="k"))
    assert encoded.unknown == 2
    (tmp_path / "d.json").write_text(json.dumps([record]))
    tiny.llava_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = [str(tmp_path / "model"), str(tmp_path / "d.json"), "-o", str(tmp_path / "out.png")]
    for words in (["score", *given, "--dry-run"], ["inspect", *given], ["score", *given]):
        result = CliRunner().invoke(app, words)
        assert "warning: 2 answer tokens are unknown to the tokenizer" in result.output
        if words[-1] == "--dry-run" or words[0] == "inspect":
            result = CliRunner().invoke(app, [*words, "--json"])
            assert json.loads(result.stdout.splitlines()[-1])["unknown_tokens"] == 2


@pytest.fixture
def data(tmp_path):
    tiny.save_picture(tmp_path / "0.png", 0)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * 2))
    return tmp_path / "d.json"


def new_model():
    tiny.llava_model.cache_clear()
    return tiny.llava_model()


def test_freeze_none_trains_the_tower(data):
    moved = {}
    for freeze in (None, ("none",)):
        model = new_model()
        name = next(
            name for name, _ in model.named_parameters() if "vision_tower" in name and "weight" in name
        )
        before = model.get_parameter(name).detach().clone()
        train(
            model,
            data,
            None,
            None,
            processor=tiny.llava_processor(),
            max_steps=1,
            lr=1e-2,
            warmup=0.0,
            freeze=freeze,
        )
        moved[freeze] = bool((model.get_parameter(name) != before).any())
    assert moved == {None: False, ("none",): True}


@pytest.mark.parametrize("end_of_turn", ["add", "drop"])
def test_training_without_an_end_of_turn_token_warns(data, end_of_turn):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(
            new_model(),
            data,
            None,
            None,
            processor=tiny.llava_processor(),
            max_steps=1,
            end_of_turn=end_of_turn,
        )
    about = [str(line.message) for line in said if "learn to stop" in str(line.message)]
    assert len(about) == (end_of_turn == "drop")


def test_data_that_changed_is_said_in_words(data, tmp_path):
    scorer = Scorer(new_model(), tiny.llava_processor())
    score_dataset(scorer, data, tmp_path / "scores")
    data.write_text(data.read_text().replace("red", "green"))
    with pytest.raises(SettingsDiffer, match="made with other settings:\n  the data changed since\n"):
        score_dataset(scorer, data, tmp_path / "scores")
    assert len(list(read_samples(data))) == 2
