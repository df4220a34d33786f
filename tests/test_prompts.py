"""Answer masks: which tokens training would supervise, checked against the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from vig.data.records import sample_from_record
from vig.data.sample import SampleError
from vig.models.answer_spans import PromptError
from vig.models.lm_head import IGNORE
from vig.models.prompts import Encoder, collate_pixels, without_images

TURNS = [("<image>\nWhat is it?", "A rëd cat."), ("Sure?", "Yes 😀")]


def sample(turns=TURNS, n_images=1, key="d.json#4"):
    conversations = [
        {"from": role, "value": text}
        for pair in turns
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    images = [tiny.picture(number) for number in range(n_images)]
    return sample_from_record({"id": "i", "images": images, "conversations": conversations}, key=key)


def turns_of(encoder, encoded):
    """Decoded answer of every turn, cut where turn_position restarts."""
    ids, starts = encoded.answer_ids, [n for n, p in enumerate(encoded.turn_position) if p == 0]
    return [
        encoder.tokenizer.decode(ids[start:end])
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]


@pytest.mark.parametrize("template", [tiny.MARKED, tiny.UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("end_of_turn", ["template", "add", "drop"])
def test_every_turn_is_masked_and_decodes_to_its_text(template, end_of_turn):
    encoder = Encoder(tiny.llava_processor(template), end_of_turn=end_of_turn)
    encoded = encoder.encode(sample())
    eos = {"template": "</s>" if template == tiny.MARKED else "", "add": "</s>", "drop": ""}[end_of_turn]
    assert turns_of(encoder, encoded) == ["A rëd cat." + eos, "Yes 😀" + eos]
    assert encoded.input_ids.count(encoder.image_token_id) == 16
    assert encoded.boundary_tokens == 0
    expected = "generation marks" if template == tiny.MARKED else "sentinels"
    assert encoder.source_of_answers == expected


def test_end_of_turn_is_written_where_the_template_has_none():
    template = tiny.UNMARKED.replace("+ eos_token ", "")
    added = Encoder(tiny.llava_processor(template), end_of_turn="add")
    encoded = added.encode(sample())
    assert turns_of(added, encoded) == ["A rëd cat.</s>", "Yes 😀</s>"]
    plain = Encoder(tiny.llava_processor(template), end_of_turn="template").encode(sample())
    assert len(encoded.input_ids) == len(plain.input_ids) + 2


def test_the_beginning_of_the_next_turn_is_not_the_end_of_an_answer():
    template = tiny.UNMARKED.replace("+ eos_token ", "").replace("{{ '\n' }}", "{{ bos_token }}")
    added = Encoder(tiny.llava_processor(template), end_of_turn="add")
    assert turns_of(added, added.encode(sample())) == ["A rëd cat.</s>", "Yes 😀</s>"]


@pytest.mark.parametrize("template", [tiny.MARKED, "{{ bos_token }}" + tiny.MARKED])
def test_a_sequence_begins_once(template):
    processor = tiny.llava_processor(template)
    begin = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    ids = Encoder(processor).encode(sample()).input_ids
    assert ids[0] == begin and ids.count(begin) == 1


def test_a_template_that_strips_answers_is_followed():
    template = tiny.UNMARKED.replace("part['text'] + eos_token", "part['text'] | trim + eos_token")
    encoder = Encoder(tiny.llava_processor(template))
    encoded = encoder.encode(sample([("<image>\nWhat?", "  spaced  ")]))
    assert turns_of(encoder, encoded) == ["spaced</s>"]


def test_a_template_that_rewrites_answers_is_refused():
    template = tiny.UNMARKED.replace("part['text'] + eos_token", "part['text'] | upper + eos_token")
    with pytest.raises(SampleError, match=r"does not show where the answers are") as error:
        Encoder(tiny.llava_processor(template)).encode(sample())
    assert "d.json#4" in str(error.value)


def test_marks_in_the_wrong_place_are_caught_by_the_decoded_text():
    template = tiny.MARKED.replace(
        "{% generation %}{{ part['text']", "{{ part['text'] }}{% generation %}{{ 'ok'"
    )
    with pytest.raises(SampleError, match="the answer mask decodes to"):
        Encoder(tiny.llava_processor(template)).encode(sample())


def test_an_answer_that_repeats_the_question_is_masked_once():
    encoder = Encoder(tiny.llava_processor())
    encoded = encoder.encode(sample([("<image>\nred", "red"), ("red", "red")]))
    assert turns_of(encoder, encoded) == ["red</s>", "red</s>"]
    text = encoder.tokenizer.decode(encoded.input_ids)
    assert text.count("red") == 4 and len(encoded.answer_index) == 8


def test_boundary_tokens_are_counted():
    template = tiny.MARKED.replace("{{ part['text'] + eos_token }}", "{{ part['text'] }}")
    processor = tiny.llava_processor(template.replace("message['role'] + ': '", "message['role'] + ': é'"))
    processor.tokenizer.backend_tokenizer.add_tokens(["éA"])
    encoded = Encoder(processor, end_of_turn="template").encode(sample([("<image>\nx", "A cat")]), None)
    assert encoded.boundary_tokens == 1
    processor.chat_template = processor.chat_template.replace("{% endgeneration %}", "{% endgeneration %}é")
    processor.tokenizer.backend_tokenizer.add_tokens(["té"])
    marked = Encoder(processor, end_of_turn="template").encode(sample([("<image>\nx", "A cat")]), None)
    assert marked.boundary_tokens == 2


@pytest.mark.parametrize("longest", [30, 70, 84])
def test_too_long_is_refused_by_name(longest):
    with pytest.raises(SampleError, match=f"the context holds {longest}"):
        Encoder(tiny.llava_processor(), max_length=longest).encode(sample())


def test_truncation_keeps_a_prefix_and_counts():
    whole = Encoder(tiny.llava_processor()).encode(sample())
    longest = whole.answer_index[4] + 1
    cut = Encoder(tiny.llava_processor(), max_length=longest, truncate=True).encode(sample())
    assert cut.input_ids == whole.input_ids[:longest]
    assert cut.answer_index == whole.answer_index[:5]
    assert cut.truncated == len(whole.answer_index) - 5
    with pytest.raises(SampleError, match="leaves no answer token"):
        Encoder(tiny.llava_processor(), max_length=whole.answer_index[0], truncate=True).encode(sample())
    with pytest.raises(SampleError, match="cuts its image tokens"):
        Encoder(tiny.llava_processor(), max_length=15, truncate=True).encode(sample())


def test_refusals_name_the_sample():
    encoder = Encoder(tiny.llava_processor())
    fake = sample([("<image>\nWhat?", "It is <|im_end|>")])
    encoder.encode(fake)  # a special token in an answer is the trainer's token too
    broken = sample_from_record(
        {"images": [tiny.picture(0)], "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is <image> it?"}]},
            {"role": "assistant", "content": "yes"},
        ]}, key="k#1",
    )  # fmt: skip
    with pytest.raises(SampleError, match=r"k#1.*image token '<image>'"):
        encoder.encode(broken)


def test_processors_that_cannot_be_used():
    with pytest.raises(PromptError, match="no chat template"):
        Encoder(tiny.llava_processor(None))
    with pytest.raises(ValueError, match="end_of_turn = 'maybe'"):
        Encoder(tiny.llava_processor(), end_of_turn="maybe")


def test_text_only_samples_and_text_models():
    text = sample([("Hello?", "Hi.")], n_images=0)
    encoder = Encoder(tiny.llava_processor())
    encoded = encoder.encode(text)
    assert encoded.pixels == {} and turns_of(encoder, encoded) == ["Hi.</s>"]
    blind = encoder.encode(without_images(sample()))
    assert encoder.image_token_id not in blind.input_ids
    assert blind.answer_ids == encoder.encode(sample()).answer_ids
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    plain = Encoder(tokenizer)
    assert turns_of(plain, plain.encode(text)) == ["Hi.</s>"]
    with pytest.raises(SampleError, match="the processor takes none"):
        plain.encode(sample())


@pytest.mark.parametrize("until_last_answer", [False, True])
def test_collate_pads_right_and_labels_answers_only(until_last_answer):
    encoder = Encoder(tiny.llava_processor())
    items = [encoder.encode(sample()), encoder.encode(sample([("Hello?", "Hi.")], n_images=0))]
    batch = encoder.collate(items, until_last_answer=until_last_answer)
    for row, item in enumerate(items):
        length = item.answer_index[-1] + 1 if until_last_answer else len(item.input_ids)
        assert batch["input_ids"][row, :length].tolist() == item.input_ids[:length]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        kept = (batch["labels"][row] != IGNORE).nonzero().squeeze(1).tolist()
        assert kept == item.answer_index
        assert batch["labels"][row, kept].tolist() == item.answer_ids
    assert batch["pixel_values"].shape[0] == 1


def test_collate_pixels_pads_tiles():
    first, second = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 5, 3, 4, 4)
    joined = collate_pixels([{"pixel_values": first}, {"pixel_values": second}], [1, 1])["pixel_values"]
    assert joined.shape == (2, 5, 3, 4, 4)
    assert joined[0, 2:].abs().sum() == 0 and joined[0, :2].min() == 1 and joined[1].min() == 1


@pytest.mark.parametrize("case", [0, 1])
def test_the_published_template_of_llava_1_5(case):
    """Its marks hold a space behind the answer, which a tokenizer may join with the next "USER:"."""
    processor = tiny.llava_processor(tiny.LLAVA15)
    processor.tokenizer.backend_tokenizer.add_tokens([" US", "Yes"])
    record = json.loads((Path(__file__).parent / "cases_data" / "llava15_template.json").read_text())[case]
    one = sample_from_record(record | {"image": tiny.picture(0)}, key="k")
    encoder = Encoder(processor)
    encoded = encoder.encode(one)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoded.answer_ids)
    assert tokens == ["Yes", "</s>"] * (case + 1) and encoded.boundary_tokens == 0
    assert Encoder(processor, end_of_turn="drop").encode(one).answer_ids == [encoded.answer_ids[0]] * (
        case + 1
    )
    marked = Encoder(processor, end_of_turn="template").encode(one)
    as_marked = encoder.tokenizer.convert_ids_to_tokens(marked.answer_ids)
    assert as_marked == ["Yes", " US", "Yes", "\u0120"][-2 * (case + 1) :] and marked.boundary_tokens == case


@pytest.mark.parametrize("template", [tiny.MARKED, tiny.UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("answer", ["Yes", " Yes", "Yes \n", "end", "a: a", "</s> is the end", "s"])
def test_what_a_template_writes_beside_an_answer_is_none(template, answer):
    """Text before it and white space behind it, in the mark; the answer's own white space stays."""
    beside = template.replace(
        "{{ part['text'] + eos_token }}", "{{ 'a: ' + part['text'] + ' \n' + eos_token }}"
    )
    beside = beside.replace("{% endgeneration %}", "{{ ' \n' }}{% endgeneration %}")
    encoder = Encoder(tiny.llava_processor(beside))
    (only,) = turns_of(encoder, encoder.encode(sample([("<image>\nWhat?", answer)])))
    assert only == answer + " \n</s>"
    dropped = Encoder(tiny.llava_processor(beside), end_of_turn="drop")
    assert turns_of(dropped, dropped.encode(sample([("<image>\nWhat?", answer)]))) == [answer]


@pytest.mark.parametrize("template", [tiny.MARKED, tiny.UNMARKED], ids=["marked", "unmarked"])
def test_answers_that_are_not_trained_are_part_of_the_prompt(template):
    turns = [
        {"role": "user", "content": "<image>q"},
        {"role": "assistant", "content": "draft", "loss": False},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "A cat"},
    ]
    one = sample_from_record({"image": tiny.picture(0), "messages": turns}, key="k")
    encoder = Encoder(tiny.llava_processor(template))
    encoded = encoder.encode(one)
    assert turns_of(encoder, encoded) == ["A cat</s>"]
    assert "draft" in encoder.tokenizer.decode(encoded.input_ids)


def test_turns_and_tools_that_the_template_leaves_out_are_refused():
    silent = "{% for m in messages if m['role'] != 'system' %}" + tiny.MARKED.partition("%}")[2].replace(
        "message", "m"
    )
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>q"},
        {"role": "assistant", "content": "A cat"},
    ]
    record = {"image": tiny.picture(0), "messages": turns}
    with pytest.raises(SampleError, match="does not render the system turn"):
        Encoder(tiny.llava_processor(silent)).encode(sample_from_record(record, key="k"))
    record = {"image": tiny.picture(0), "messages": turns[1:], "tools": [{"name": "zoom"}]}
    one = sample_from_record(record, key="k")
    with pytest.raises(SampleError, match="does not render the field tools"):
        Encoder(tiny.llava_processor()).encode(one)
    for template in (tiny.MARKED, tiny.UNMARKED):
        encoder = Encoder(tiny.llava_processor("{% if tools %}{{ tools }}{% endif %}" + template))
        encoded = encoder.encode(one)
        assert "zoom" in encoder.tokenizer.decode(encoded.input_ids) and turns_of(encoder, encoded) == [
            "A cat</s>"
        ]


def test_a_system_field_changes_what_is_scored():
    from vig.data.samples import read_samples
    from vig.scoring.scorer import Scorer

    cases = Path(__file__).parent / "cases_data"
    with_system, without = Scorer(tiny.llava_model(), tiny.llava_processor()).score(
        read_samples(cases / "sharegpt_system_field.json")
    )
    assert list(with_system.token_ids) == list(without.token_ids)
    assert list(with_system.token_nll_image) != list(without.token_nll_image)


def test_adjacent_text_parts_are_one_answer():
    from vig.data.samples import read_samples

    (one,) = read_samples(Path(__file__).parent / "cases_data" / "two_text_parts.json")
    for template in (tiny.MARKED, tiny.UNMARKED):
        encoder = Encoder(tiny.llava_processor(template))
        assert turns_of(encoder, encoder.encode(one)) == ["A cat</s>"]
