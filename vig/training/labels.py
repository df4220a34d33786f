"""Selective labels in anybody's trainer: what is not selected becomes -100.

    collator = SelectiveLabels(DataCollatorForVisionLanguageModeling(processor), "selection/")   # any collator
    dataset = dataset.map(lambda row: {"labels": mask_row(row["labels"], row["key"], table)})    # tokenised records

The trainer's own labels say which tokens it would train on, the selection which of the answer's are worth it; both have
to agree. Where the answer stands among the labels is found by its token ids (`vig.training.align`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vig.data.sample import SampleError, shortened
from vig.models.answer_spans import turn_end_tokens
from vig.models.image_tokens import image_token_id
from vig.models.lm_head import IGNORE, count_kept
from vig.selection.select import Selection
from vig.store.selections import Entry, SelectionTable, read_selection, selection_files
from vig.training.align import lay

Selected = Mapping[str, Entry]
AnySelection = Selection | Selected | str | Path
SHOWN_IDS = 32  # of each list in an error
CURE = (
    "Score with the tokenizer, chat template and end_of_turn that you train with, and train on the records that were "
    "scored"
)


def open_selection(selection: AnySelection | None) -> Selected | None:
    """The mapping key -> Entry of a folder, of what `vig.select` returned, or of a mapping itself."""
    if isinstance(selection, str | Path):
        return read_selection(selection)
    return selection.table() if isinstance(selection, Selection) else selection


def entry_of(selection: Selected, key: str, id: str | None = None) -> Entry:
    """What is selected of a sample.

    Raises SampleError for a key that the selection does not know, and for a kept sample that was scored under another
    id: keys are numbers of rows, so it is another one, of data that changed. (A sample without an id has its key's.)
    """
    scored = None
    try:
        if isinstance(selection, SelectionTable):
            entry, scored = selection.with_id(key)
        else:
            entry = Entry(*selection[key])
    except KeyError:
        raise SampleError(
            str(key), str(key if id is None else id), "it is not in the selection",
            "Score and select the data that you train on",
        ) from None  # fmt: skip
    known = None not in (id, scored) and key not in (id, scored)
    if known and str(id) != scored:
        raise SampleError(
            key, id, f"in the selection the sample of this key has the id {shortened(scored)!r}",
            "The data changed since they were scored: put them back as they were, or score and select them again",
        )  # fmt: skip
    return entry


def is_kept(entry: Entry) -> bool:
    """Whether a sample has a token to train on."""
    return bool(entry.keep) and bool(np.any(entry.token_keep))


def kept_rows(keys: Sequence[str], selection: AnySelection, ids: Sequence[Any] | None = None) -> list[int]:
    """The places of the keys whose samples have a token to train on: ``dataset.select(kept_rows(dataset["key"], s))``.

    What is left out is never loaded. Raises SampleError for a key that the selection does not know, and where the
    samples' own `ids` are given, for one that was scored under another id.
    """
    selection = open_selection(selection)
    named = zip(keys, repeat(None) if ids is None else ids, strict=ids is not None)
    return [place for place, (key, id) in enumerate(named) if is_kept(entry_of(selection, key, id))]


def mask_row(
    labels: Sequence[int],
    key: str,
    selection: AnySelection,
    *,
    end_ids: Collection[int] = (),
    id: str | None = None,
) -> list[int]:
    """The labels of one tokenised record, of which what is not selected has become -100.

    labels: (T,) token ids, -100 off the supervised tokens; completion-only, assistant-only or the full sequence.
    selection: a folder (kept open between calls), what `vig.select` returned, or a mapping key -> (keep, token_ids,
        token_keep).
    end_ids: the ids of end-of-turn tokens. A selection scored with ``end_of_turn="add"`` knows its own; else they are
        needed where the full sequence is supervised and its questions hold words of the answers.
    id: the record's own, where the data have ids; a row that was scored under another one raises SampleError.

    The supervised ids must allow exactly one way to lay the stored answer, all turns in order. A row that was cut short
    may hold the beginning of it. Raises SampleError with the key and both lists of ids for anything else.
    """
    if isinstance(selection, str | Path):
        stamp = tuple((str(file), file.stat().st_mtime_ns) for file in selection_files(selection))
        selection = _kept_open(str(selection), stamp)
    return _mask(list(map(int, labels)), key, open_selection(selection), end_ids, id).labels


@lru_cache(maxsize=1)
def _kept_open(folder: str, stamp: tuple[tuple[str, int], ...]) -> Selected:
    """A selection, read again where its files (`stamp`) have changed."""
    return read_selection(folder)


def mask_labels(
    labels: Tensor,  # (B, T) int64
    keys: Sequence[str],
    selection: AnySelection,
    *,
    end_ids: Collection[int] = (),
) -> Tensor:
    """`mask_row` for a batch: (B, T) int64, a new tensor on the device of `labels`.

    keys: of the B rows. Raises ValueError for another number of keys, and SampleError as `mask_row` does.
    """
    _check_labels(labels, keys)
    selection = open_selection(selection)
    rows = [
        _mask(row, key, selection, end_ids).labels for row, key in zip(labels.tolist(), keys, strict=True)
    ]
    return torch.tensor(rows, dtype=labels.dtype, device=labels.device).reshape(labels.shape)


def _check_labels(labels: Any, keys: Sequence[str]) -> None:
    if not torch.is_tensor(labels) or labels.dim() != 2 or labels.is_floating_point():
        shape = f"{labels.dtype} {tuple(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
        raise ValueError(f"expected labels (B, T) int64, got {shape}")
    if len(labels) != len(keys):
        raise ValueError(f"{len(keys)} keys for labels of {len(labels)} rows")


class Masked(NamedTuple):
    """What is left of a row's labels."""

    labels: list[int]
    truncated: bool = False  # the row ends before the answer does
    ways: int = 1  # to lay the answer on the row: none, one, or 2 for several
    others: tuple[int, ...] = ()  # supervised ids that are no part of the answer


def mask(labels: list[int], entry: Entry, ends: Collection[int]) -> Masked:
    """The labels of one row whose token is selected, the others IGNORE. Without one way to lay the answer, all are."""
    masked = [IGNORE] * len(labels)
    if not is_kept(entry):
        return Masked(masked)
    if all(label == IGNORE for label in labels):  # its answer was cut off
        return Masked(masked, truncated=True)
    layout = lay(labels, np.asarray(entry.token_ids).tolist(), ends)
    if layout is None or layout.ways > 1:
        return Masked(masked, ways=0 if layout is None else layout.ways)
    keep = np.asarray(entry.token_keep, bool)
    for position, stored in zip(layout.index, layout.stored, strict=True):
        if keep[stored]:
            masked[position] = labels[position]
    laid = set(layout.index)
    others = tuple(label for position, label in enumerate(labels) if label != IGNORE and position not in laid)
    return Masked(masked, layout.truncated, 1, others)


def known_ends(selection: Selected, entry: Entry, end_ids: Collection[int]) -> set[int]:
    """The ids of end-of-turn tokens: those given, and what ends each answer where the scores say that it does so."""
    ends = set(end_ids)
    if len(entry.token_ids) and getattr(selection, "metadata", {}).get("end_of_turn") == "add":
        ends.add(int(entry.token_ids[-1]))
    return ends


def _mask(
    labels: list[int], key: str, selection: Selected, end_ids: Collection[int], id: str | None = None
) -> Masked:
    entry = entry_of(selection, key, id)
    found = mask(labels, entry, known_ends(selection, entry, end_ids))
    if found.ways != 1:
        raise _refusal(labels, key, np.asarray(entry.token_ids).tolist(), found.ways == 0)
    return found


def _refusal(labels: list[int], key: str, ids: list[int], nowhere: bool) -> SampleError:
    supervised = [label for label in labels if label != IGNORE]
    found = f"its labels {_shown(supervised)}, the selection's answer {_shown(ids)}"
    if nowhere:
        return SampleError(key, key, f"the labels do not hold the answer that was scored: {found}", CURE)
    return SampleError(
        key, key, f"the labels hold the answer that was scored in more than one place: {found}",
        "Supervise the answers alone (assistant-only or completion-only labels), or give the ids of the end-of-turn "
        "tokens (end_ids)",
    )  # fmt: skip


def _shown(ids: Sequence[int]) -> str:
    """A list of ids, its middle left out where it is long."""
    if len(ids) <= SHOWN_IDS:
        return str(list(ids))
    half = SHOWN_IDS // 2
    first, last = (", ".join(map(str, part)) for part in (ids[:half], ids[-half:]))
    return f"[{first}, ... {len(ids) - 2 * half:,} more ..., {last}]"


def end_ids_of(processor: Any) -> frozenset[int]:
    """The ids of the end-of-turn tokens of a processor or tokenizer; none for None."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        return frozenset()
    ends = turn_end_tokens(tokenizer, getattr(processor, "image_token", None))
    padding = tokenizer.pad_token if tokenizer.pad_token != tokenizer.eos_token else None
    found = [token for token in ends if token != padding]
    return frozenset(tokenizer.convert_tokens_to_ids(found))


PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels", "token_type_ids", "mm_token_type_ids")


def cut_batch(batch: dict[str, Any], image_token: int | None) -> dict[str, Any]:
    """The batch without the positions behind its last kept label: no kept token depends on them in a causal model.

    Image tokens stay, since their features do. Left whole are batches with inputs besides token ids where it is not
    known which the image tokens are (`image_token` None), padding-free ones, and those with masks of other shapes.
    """
    labels, length = batch["labels"], batch["labels"].shape[1]
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    cut = [name for name in PER_TOKEN if name in tensors and tensors[name].shape[-1] == length]
    pixels = tensors.keys() - cut
    if not {"input_ids", "attention_mask"} <= set(cut) or tensors["attention_mask"].shape != labels.shape:
        return batch
    if pixels and (image_token is None or any(tensors[name].shape == labels.shape for name in pixels)):
        return batch
    needed = labels != IGNORE
    if pixels:
        needed |= batch["input_ids"] == image_token
    columns = needed.any(0).nonzero()
    kept = min(length, max(2, int(columns[-1]) + 1 if len(columns) else 0))
    return batch | {name: batch[name][..., :kept].contiguous() for name in cut}


class SelectiveLabels:
    """A collator around any collator that returns labels: what is not selected becomes -100.

    base: TRL's, transformers', LLaMA-Factory's, your own: a function of a list of features that returns a dict with
        ``labels`` (B, T) int64, -100 off the supervised tokens.
    selection: a folder, what `vig.select` returned, or a mapping key -> (keep, token_ids, token_keep).
    key: the name of the field of a feature that holds its key, which `base` does not see; or a function of a feature.
    cut: leave out the positions behind the last kept label of a batch. Loss and gradients are the same.
    processor: whose end-of-turn tokens tell turns apart and whose image token is never cut. `base.processor` or
        `base.tokenizer` unless given.

    As `mask_row` it refuses, with SampleError by key, a row on which the stored answer does not lie in exactly one way.
    Answers cut short are counted in `truncated`. Padding-free batches (rows one behind the other, ``position_ids``
    from 0 in each) are masked row by row; packed features, whose records have lost their keys, are refused.
    `FusedLossMixin` turns `counts` on: ``num_kept`` and ``num_truncated`` (int) are then added to each batch.
    """

    def __init__(
        self,
        base: Callable[[list[Any]], Mapping[str, Any]],
        selection: AnySelection,
        *,
        key: str | Callable[[Any], str] = "key",
        cut: bool = True,
        processor: Any = None,
        counts: bool = False,
    ):
        self.base, self.selection = base, open_selection(selection)
        self.key, self.cut, self.counts = key, cut, counts
        self._processor = processor
        self.truncated = 0  # answers cut short, counted at every visit

    @cached_property
    def processor(self) -> Any:
        """Whose tokens they are; None where it is not known."""
        named = (getattr(self.base, name, None) for name in ("processor", "tokenizer"))
        return self._processor or next((found for found in named if found is not None), None)

    @property
    def tokenizer(self) -> Any:
        """What a Trainer saves with the model where it was given no processing_class."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids of the tokenizer's end-of-turn tokens."""
        return end_ids_of(self.processor)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        keys = [self._key(feature) for feature in features]
        if isinstance(self.key, str):
            features = [
                {name: value for name, value in feature.items() if name != self.key} for feature in features
            ]
        batch = dict(self.base(list(features)))
        if "labels" not in batch:
            raise ValueError(
                f"the collator under SelectiveLabels returns no labels, only {', '.join(sorted(batch))}"
            )
        truncated = self._mask(batch, keys)
        self.truncated += truncated
        if self.cut:
            batch = cut_batch(batch, None if self.processor is None else image_token_id(self.processor))
        if self.counts:
            batch |= {"num_kept": count_kept(batch["labels"]), "num_truncated": truncated}
        return batch

    def _key(self, feature: Any) -> str:
        if isinstance(feature, Mapping) and len(feature.get("seq_lengths") or ()) > 1:
            raise ValueError(
                "packed features: several records share a row, and their keys are gone. Turn packing off; "
                "padding_free=True of the collator spares the padding as well"
            )
        if not isinstance(self.key, str):
            return self.key(feature)
        try:
            return feature[self.key]
        except (KeyError, TypeError, IndexError):
            has = (
                ", ".join(sorted(map(str, feature)))
                if isinstance(feature, Mapping)
                else type(feature).__name__
            )
            raise SampleError(
                "?", "?", f"the feature has no field {self.key!r} (it has {has})",
                "Give the dataset a column of keys (file.json#row, as they were scored), key= a function of a "
                "feature, and remove_unused_columns=False",
            ) from None  # fmt: skip

    def _mask(self, batch: dict[str, Any], keys: Sequence[str]) -> int:
        """Masks the labels in place of the batch; how many answers were cut short."""
        labels = batch["labels"]
        rows = _rows(labels, batch.get("position_ids"), len(keys))
        if rows is None:
            _check_labels(labels, keys)
            rows = labels.tolist()
        found = [_mask(row, key, self.selection, self.end_ids) for row, key in zip(rows, keys, strict=True)]
        masked = torch.tensor([label for row in found for label in row.labels], dtype=labels.dtype)
        batch["labels"] = masked.reshape(labels.shape).to(labels.device)
        return sum(row.truncated for row in found)


def _rows(labels: Any, position_ids: Tensor | None, keys: int) -> list[list[int]] | None:
    """The rows of a padding-free batch (1, T), one a key; None for a padded one."""
    if keys == 1 or position_ids is None or not torch.is_tensor(labels) or labels.shape[0] != 1:
        return None
    starts = (position_ids.reshape(-1) == 0).nonzero().flatten().tolist()
    if len(starts) < keys:
        raise ValueError(
            f"{keys} keys for a batch of {len(starts)} sequences. Packing takes keys away: turn it off"
        )
    flat = labels.reshape(-1).tolist()
    ends = [*starts[1:keys], len(flat)]  # what follows the last row is padding
    return [flat[start:end] for start, end in zip(starts[:keys], ends, strict=True)]
