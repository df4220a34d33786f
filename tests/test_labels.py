"""Selective labels around other collators: which labels stay, and which rows are refused."""

from __future__ import annotations

import pickle
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from test_trainer import samples, selection
from tiny import byte_tokenizer, llava_model, llava_processor, picture
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from vig import SelectiveCollator, SelectiveLabels, mask_labels, mask_row
from vig.data.records import sample_from_record
from vig.data.sample import SampleError
from vig.models.lm_head import IGNORE
from vig.models.prompts import Encoder
from vig.store.selections import SELECTION_SCHEMA, Entry, write_selection
from vig.training import labels as labels_module
from vig.training.align import lay
from vig.training.labels import cut_batch, kept_rows
from vig.training.loss import selective_loss

E = 9  # the end-of-turn token of the rows written by hand
X = IGNORE


class Table(dict):
    """A selection with the settings of its scores."""

    def __init__(self, entries, **metadata):
        super().__init__(entries)
        self.metadata = metadata


def chosen(ids, keep=None, **metadata) -> Table:
    keep = np.ones(len(ids), bool) if keep is None else np.array(keep, bool)
    return Table({"k": Entry(True, np.array(ids, np.int32), keep)}, **metadata)


# --- rows written by hand ---


@pytest.mark.parametrize(
    ("labels", "ids", "ends", "index"),
    [
        ([X, X, 4, 5, E, X], [4, 5, E], {E}, [2, 3, 4]),  # one turn, ends on both sides
        ([X, X, 4, 5, E, 1], [4, 5, E], {E}, [2, 3, 4]),  # a newline behind it
        ([X, X, 4, 5, X, X], [4, 5, E], {E}, [2, 3]),  # the trainer's labels have no end of turn
        ([X, X, 4, 5, E, 1], [4, 5], {E}, [2, 3]),  # the scores have none
        ([X, X, 4, 5, E, 1], [4, 5], (), [2, 3]),  # nor does anyone know it
        ([X, X, 4, E, X, X, 4, E], [4, E, 4, E], {E}, [2, 3, 6, 7]),  # the same answer twice
        ([X, X, 4, E, X, X, 4, E], [4, 4], {E}, [2, 6]),
        ([X, X, 4, E, X, X, 4, E], [4, 4], (), [2, 6]),
        ([X, X, 4, X, X, 4, 5], [4, E, 4, 5, E], {E}, [2, 5, 6]),
        ([X, X, 4, E, 7, 8, E, 4, E], [4, E, 4, E], {E}, [2, 3, 7, 8]),  # a completion of several messages
        (
            [1, 4, 5, 2, E, 3, 4, 5, E, 1],
            [4, 5, E],
            {E},
            [6, 7, 8],
        ),  # full sequence, the question holds the answer
        ([1, 4, 2, E, 3, 4, E, 1], [4], {E}, [5]),
        ([1, 7, E, 3, 4, E, 1, 4, 8, E, 3, 5, E], [4, E, 5, E], {E}, [4, 5, 11, 12]),
        ([1, 7, E, 3, 4, E, 8, E, 3, 5, E], [4, 5], {E}, [4, 9]),
        ([1, 7, 3, 4, 1, 8, 3, 5, 1], [4, E, 5, E], {E}, [3, 7]),  # full sequence of a template without ends
        ([4, 5, 6], [4, 5, 6], (), [0, 1, 2]),
    ],
)
def test_the_one_way_to_lay_the_answer(labels, ids, ends, index):
    found = lay(labels, ids, ends)
    assert found is not None and (list(found.index), found.ways, found.truncated) == (index, 1, False)


@pytest.mark.parametrize(
    ("labels", "ids", "ends", "index"),
    [
        ([X, X, 4, 5], [4, 5, 6, E], {E}, [2, 3]),  # cut in an answer
        ([X, X, 4, E, X, X, X], [4, E, 5, E], {E}, [2, 3]),  # cut in a question
        ([X, X, 4, E, X, X, 5], [4, E, 5, 6, E], {E}, [2, 3, 6]),
        ([1, 7, E, 3, 4, 5], [4, 5, 6, E], {E}, [4, 5]),  # full sequences
        ([1, 7, E, 3, 4, E, 1, 8, 8], [4, E, 5, E], {E}, [4, 5]),
        ([1, 7, E, 3, 4, E, 1, 8, 8, E, 3], [4, 5], {E}, [4]),
        ([X, X, 4, 4], [4, 4, 4, E], {E}, [2, 3]),
    ],
)
def test_a_row_cut_short_holds_the_beginning(labels, ids, ends, index):
    found = lay(labels, ids, ends)
    assert found is not None and (list(found.index), found.ways, found.truncated) == (index, 1, True)


@pytest.mark.parametrize(
    ("labels", "ids", "ends"),
    [
        ([X, X, 5, 4, E], [4, 5, E], {E}),  # other words
        ([X, X, 4, 6, 5, E], [4, 5, E], {E}),  # a word more within, behind
        ([X, X, 4, 5, 6, E], [4, 5, E], {E}),
        ([X, X, 4, 5, 6, E], [4, 5], {E}),
        ([X, X, 4, E, X, X, 5, E], [4, E], {E}),  # a turn more
        ([1, 7, E, 3, 4, E, 7, E, 3, 5, E], [4, E], {E}),
        ([1, 7, E, 3, 4, E, 7, E, 3, 6, E], [4, E, 5, E], {E}),  # another last answer
        ([X, X, 4, E, X, X, 6, E], [4, E, 5, E], {E}),
    ],
)
def test_another_answer_is_refused(labels, ids, ends):
    assert lay(labels, ids, ends) is None
    with pytest.raises(SampleError) as raised:
        mask_row(labels, "k", chosen(ids), end_ids=ends)
    supervised = [label for label in labels if label != X]
    assert str(raised.value).startswith("k ") and str(supervised) in str(raised.value)
    assert str(ids) in str(raised.value) and "end_of_turn that you train with" in str(raised.value)


def test_two_ways_are_refused():
    labels = [1, 7, 4, E, 3, 4, E, 1]  # the question ends with the answer
    with pytest.raises(
        SampleError, match=r"^k .*more than one place: .*\[1, 7, 4, 9.* answer \[4, 9\].*end_ids"
    ):
        mask_row(labels, "k", chosen([4, E]), end_ids={E})
    with pytest.raises(
        SampleError, match="more than one place"
    ):  # without the ends, any word of the question counts
        mask_row([1, 4, 7, E, 3, 4, E, 1], "k", chosen([4]))
    assert mask_row([1, 4, 7, E, 3, 4, E, 1], "k", chosen([4]), end_ids={E}) == [X] * 5 + [4, X, X]


def conversation(draw: np.random.Generator, stored_end: bool, row_end: bool):
    """A made-up row: (full labels, assistant-only labels, stored ids, positions of the stored ids in the row)."""
    row, assistant, ids, index = [1, 2], [X, X], [], []

    def add(tokens, supervised):
        row.extend(tokens)
        assistant.extend(tokens if supervised else [X] * len(tokens))

    for _ in range(draw.integers(1, 4)):
        add(
            [*draw.integers(3, 7, draw.integers(1, 6)).tolist(), *[E] * row_end, 2], False
        )  # question, its end, a header
        answer = draw.integers(3, 7, draw.integers(1, 4)).tolist()
        ids += answer + [E] * stored_end
        index += range(len(row), len(row) + len(answer) + (stored_end and row_end))
        add(answer + [E] * row_end, True)
        add([1], False)
    return row, assistant, ids, index


@pytest.mark.parametrize("row_end", [True, False])
@pytest.mark.parametrize("stored_end", [True, False])
@pytest.mark.parametrize("ends", [{E}, set()])
def test_a_layout_is_never_wrong(stored_end, row_end, ends):
    """Five words in random conversations: full sequences are ambiguous at times, but never laid elsewhere."""
    draw, sure, cuts = np.random.default_rng(0), 0, 0
    for _ in range(300):
        full, assistant, ids, index = conversation(draw, stored_end, row_end)
        if row_end or not stored_end or ends:
            found = lay(assistant, ids, ends)
            assert found is not None and (list(found.index), found.ways) == (index, 1)
        found = lay(full, ids, ends)
        if found is not None and found.ways == 1 and not found.truncated:
            assert list(found.index) == index
            sure += 1
        length = int(draw.integers(index[0] + 1, len(full)))
        found, kept = lay(assistant[:length], ids, ends), [place for place in index if place < length]
        if found is not None and found.ways == 1 and (row_end == stored_end):
            assert list(found.index) == kept
            cuts += 1
    assert cuts > 200 or row_end != stored_end
    assert sure > 100 or not (ends and row_end)


# --- the two functions ---


def test_mask_labels_and_mask_row():
    table = {
        "a": (True, np.array([4, 5, E]), np.array([True, False, True])),
        "b": (True, [6, 7], [True, True]),  # any mapping, plain lists too
        "c": (False, [6, 7], [True, True]),
    }
    labels = torch.tensor([[X, 4, 5, E], [X, 6, 7, X], [X, 6, 7, X]])
    masked = mask_labels(labels, ["a", "b", "c"], table, end_ids=[E])
    assert masked.tolist() == [[X, 4, X, E], [X, 6, 7, X], [X] * 4]
    assert masked.dtype == torch.int64 and labels[0, 2] == 5
    assert mask_row((X, 4, 5, E), "a", table) == [X, 4, X, E]
    assert mask_labels(labels[:0], [], table).shape == (0, 4)
    assert mask_labels(torch.full((1, 3), X), ["a"], table).tolist() == [[X] * 3]
    with pytest.raises(ValueError, match=r"2 keys for labels of 3 rows"):
        mask_labels(labels, ["a", "b"], table)
    with pytest.raises(ValueError, match=r"expected labels \(B, T\) int64, got torch.float32 \(3, 4\)"):
        mask_labels(labels.float(), ["a", "b", "c"], table)
    with pytest.raises(SampleError, match=r"^d .*not in the selection"):
        mask_row([4], "d", table)


def test_selections_that_say_how_turns_end_need_no_ids():
    row = [1, 4, 7, E, 3, 4, E, 1]
    assert mask_row(row, "k", chosen([4, E], end_of_turn="add")) == [X] * 5 + [4, E, X]
    assert kept_rows(["k", "k"], chosen([4, E])) == [0, 1]
    assert kept_rows(["k"], chosen([4, E], [0, 0])) == []


def test_a_folder_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    read, reads = labels_module.read_selection, []
    monkeypatch.setattr(labels_module, "read_selection", lambda folder: reads.append(folder) or read(folder))
    for kept in (True, False):
        rows = pa.record_batch([["k"], ["k"], [True], [[4, E]], [[kept, True]]], schema=SELECTION_SCHEMA)
        write_selection(tmp_path, [rows], dict)
        for _ in range(3):
            assert mask_row([X, 4, E], "k", tmp_path) == [X, 4 if kept else X, E]
    assert len(reads) == 2


def test_long_lists_are_shown_by_their_ends():
    with pytest.raises(SampleError, match=r"\[0, 1, 2, .*, 15, \.\.\. 68 more \.\.\., 84, .*, 99\]"):
        mask_row(range(100), "k", chosen([5, 4]))


def test_dataset_map(tmp_path):
    """As LLaMA-Factory, axolotl and ms-swift hand their tokenised records to a trainer."""
    table = chosen([4, 5, E], [1, 0, 1])
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 4, 5, E], "labels": [X, X, 4, 5, E], "key": "k"}])
    rows = rows.map(lambda row: {"labels": mask_row(row["labels"], row["key"], table)})
    assert rows["labels"][0] == [X, X, 4, X, E]


# --- around TRL's collators ---

TURNS = (("What is it?", "red"), ("And now?", "a blue cup"), ("Is it red?", "red"))


def talks(turns=3, count=3) -> list[dict]:
    """Conversations of three turns about a picture, in which the same answer comes twice."""
    found = []
    for row in range(count):
        messages = []
        for number, (question, answer) in enumerate(TURNS[:turns]):
            image = [{"type": "image"}] if number == 0 else []
            messages.append(
                {"role": "user", "content": [*image, {"type": "text", "text": question + "!" * row}]}
            )
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        found.append(
            {"key": f"data.json#{row}", "id": f"id{row}", "images": [picture(row)], "messages": messages}
        )
    return found


def in_trl_form(talk: dict, kind: str) -> dict:
    talk = {"key": talk["key"], "images": talk["images"], "messages": [dict(m) for m in talk["messages"]]}
    if kind != "completion":
        return talk
    messages = talk.pop("messages")
    return talk | {"prompt": messages[:1], "completion": messages[1:]}


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("end_of_turn", ["template", "add", "drop"])
@pytest.mark.parametrize("kind", ["completion", "assistant", "full"])
def test_trls_collator_gives_the_labels_of_ours(processor, kind, end_of_turn, turns):
    """Token for token, with ends of turn on either side."""
    given = talks(turns)
    items = [sample_from_record(talk, key=talk["key"]) for talk in given]
    encoder, table = Encoder(processor, end_of_turn=end_of_turn), Table({}, end_of_turn=end_of_turn)
    for row, item in enumerate(items):
        ids = np.array(encoder.encode(item).answer_ids, np.int32)
        table[item.key] = Entry(True, ids, np.arange(len(ids)) % 3 != row % 3)
    base = DataCollatorForVisionLanguageModeling(
        processor, completion_only_loss=kind == "completion", assistant_only_loss=kind == "assistant"
    )
    ours = SelectiveCollator(processor, table, counts=True)(items)
    theirs = SelectiveLabels(base, table, counts=True)([in_trl_form(talk, kind) for talk in given])
    assert (ours["labels"] != X).sum() > 10 * turns - 5
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-6)
    assert (ours["num_kept"], ours["num_truncated"]) == (theirs["num_kept"], theirs["num_truncated"])


@pytest.mark.parametrize("kind", ["completion", "assistant", "full"])
@pytest.mark.parametrize("left", [50, 62, 75])  # within the second question, answer, the third turn
def test_truncated_rows_keep_the_beginning_and_are_counted(processor, kind, left):
    given = talks()
    items = [sample_from_record(talk, key=talk["key"]) for talk in given]
    table = Table(
        selection(processor, items), end_of_turn="add"
    )  # the tiny template writes an end to each turn
    base = DataCollatorForVisionLanguageModeling(
        processor, max_length=left, completion_only_loss=kind == "completion",
        assistant_only_loss=kind == "assistant",
    )  # fmt: skip
    collator = SelectiveLabels(base, table, counts=True)
    ours = SelectiveCollator(processor, table, max_length=left, counts=True)(items)
    theirs = collator([in_trl_form(talk, kind) for talk in given])
    assert torch.equal(ours["labels"], theirs["labels"]) and (ours["labels"] != X).any()
    assert ours["num_truncated"] == theirs["num_truncated"] == collator.truncated == 3


def test_a_key_may_come_from_a_function_and_is_hidden_from_the_base(processor):
    seen = []

    def base(features):
        seen.extend(features)
        return {"input_ids": torch.tensor([[1, 4, E]]), "labels": torch.tensor([[X, 4, E]])}

    table = {"a#1": Entry(True, np.array([4, E]), np.array([True, False]))}
    for key, feature in (
        ("key", {"key": "a#1", "text": "t"}),
        (lambda feature: f"a#{feature['row']}", {"row": 1}),
    ):
        assert SelectiveLabels(base, table, key=key)([feature])["labels"].tolist() == [[X, 4, X]]
    assert seen == [{"text": "t"}, {"row": 1}]
    with pytest.raises(SampleError, match=r"no field 'key' \(it has text\).*remove_unused_columns=False"):
        SelectiveLabels(base, table)([{"text": "t"}])
    with pytest.raises(ValueError, match="returns no labels, only input_ids"):
        SelectiveLabels(lambda features: {"input_ids": 1}, table)([{"key": "a#1"}])
    with pytest.raises(ValueError, match=r"packed features: .*Turn packing off"):
        SelectiveLabels(base, table)([{"key": "a#1", "seq_lengths": [2, 1]}])


def test_workers_get_a_copy(processor):
    table = selection(processor, samples(2))
    collator = SelectiveLabels(DataCollatorForLanguageModeling(0), table, processor=processor)
    again = pickle.loads(pickle.dumps(collator))
    assert again.end_ids == collator.end_ids and byte_tokenizer().eos_token_id in collator.end_ids
    assert byte_tokenizer().pad_token_id not in collator.end_ids


# --- what is cut ---


def test_what_follows_the_last_kept_label_is_cut_and_changes_nothing(processor):
    items = samples(4)
    table = selection(processor, items, lambda row, n: np.arange(n) < 2)
    whole, short = (SelectiveCollator(processor, table, cut=cut)(items) for cut in (False, True))
    width = short["labels"].shape[1]
    assert width < whole["labels"].shape[1] - 20
    assert (
        torch.equal(whole["labels"][:, :width], short["labels"]) and (whole["labels"][:, width:] == X).all()
    )
    assert all(short[name].shape == (4, width) for name in ("input_ids", "attention_mask"))
    model, found = llava_model(), []
    for batch in (whole, short):
        model.zero_grad()
        loss = selective_loss(model, batch)
        loss.backward()
        found.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_image_tokens_are_never_cut():
    batch = {
        "input_ids": torch.tensor([[1, 4, 3, 3, 2]]),
        "attention_mask": torch.ones((1, 5), dtype=torch.int64),
        "labels": torch.tensor([[X, 4, X, X, X]]),
        "pixel_values": torch.zeros((1, 3, 4, 4)),
    }
    assert cut_batch(batch, 3)["input_ids"].tolist() == [[1, 4, 3, 3]]
    assert cut_batch(batch, None)["input_ids"].shape == (1, 5)  # nobody knows which they are
    text = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert cut_batch(text, None)["labels"].tolist() == [[X, 4]]
    positions = torch.arange(5).expand(3, 1, 5)  # Qwen's
    assert cut_batch(text | {"position_ids": positions}, None)["position_ids"].shape == (3, 1, 2)
    square = text | {"attention_mask": torch.ones(1, 1, 5, 5)}
    assert cut_batch(square, None)["labels"].shape == (1, 5)
    nothing = text | {"labels": torch.full((1, 5), X)}
    assert cut_batch(nothing, None)["labels"].shape == (1, 2)


def test_padding_free_batches_are_masked_row_by_row():
    tokenizer = byte_tokenizer()
    rows = [{"input_ids": [1, 7, 4, 2], "labels": [X, X, 4, 2], "key": "a"},
            {"input_ids": [1, 8, 9, 4, 5, 2], "labels": [X, X, X, 4, 5, 2], "key": "b"}]  # fmt: skip
    table = {"a": (True, [4, 2], [1, 0]), "b": (True, [4, 5, 2], [0, 1, 1])}
    collator = SelectiveLabels(
        DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=4),
        table,
        processor=tokenizer,
    )
    batch = collator(rows)
    assert batch["labels"].tolist() == [[X, X, 4, X, X, X, X, X, 5, 2, X, X]]
    padded = SelectiveLabels(DataCollatorForLanguageModeling(0), table, processor=tokenizer)(rows)
    assert padded["labels"].tolist() == [[X, X, 4, X, X, X], [X, X, X, X, 5, 2]]
    packed = [{"input_ids": [1, 7, 4, 2], "labels": [X, X, 4, 2]}]
    base = partial(DataCollatorForLanguageModeling(0, padding_free=True))
    with pytest.raises(ValueError, match=r"2 keys for a batch of 1 sequences.*turn it off"):
        SelectiveLabels(lambda features: base(packed), table)(rows)
