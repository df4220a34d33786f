"""The self-check of a model on the first samples, before its values count; what fails is refused or switched off.

1. Its head, its causality, its pictures (`check_model`): else it is refused.
2. Its last layer on answer rows alone gives these rows: else that layer is computed whole.
3. Several samples in one sequence, and samples that share a prefix, keep their values: else each is computed alone.
4. A batch of the largest size fits into memory: else the run stops at once, and says what fits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vig.data.sample import SampleError
from vig.models.families import ModelError
from vig.models.lm_head import HeadTransform, hidden_at_head, verify_head
from vig.models.loading import LoadedModel
from vig.models.pixels import Sizes
from vig.scoring.dual_pass import TwoPasses
from vig.scoring.loader import LoadedRecord
from vig.scoring.memory import is_out_of_memory, refused_by_ranks
from vig.scoring.prefix_sharing import SharedRow, View, prefix_length, shared_by

# How far sharing may move values, in nats: the largest in float32, the mean in 16 bit.
SHARING_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
# How far rows of the last layer may move, as a part of their norm: other sums, no more.
ROWS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
# What has been decided about sharing, and on which samples it was checked; a word of the scores' metadata.
ALONE, TEXT, IMAGES = "alone", "text", "images"


class SelfCheck:
    """The checks of one loaded model, each done once: on the first sample, and on the first one with images.

    sharing: "alone" where every sample is computed by itself, else the hardest samples that sharing was checked on
        ("text", "images"); None before the first.
    """

    def __init__(self, loaded: LoadedModel, passes: TwoPasses, image_token_id: int | None):
        self.loaded, self.passes, self.image_token_id = loaded, passes, image_token_id
        self.needs_pictures = passes.null.stage == "pixels"
        self.sharing: str | None = None if passes.share else ALONE
        self._checked = 0  # 1: on text, 2: on images too

    def run(self, block: Sequence[LoadedRecord]) -> None:
        """Raises ModelError with the values. Samples whose pictures are cut in a way of their own become errors."""
        items = [item for item in block if item.encoded is not None]
        if not items:
            return
        good = self._with_known_layout([item for item in items if item.is_multimodal])
        chosen = [*good, *(item for item in items if not item.is_multimodal)]
        if not chosen:
            return
        first = chosen[0]
        if self._checked < 1 + first.is_multimodal:
            inputs = self.passes.padded([first.view]).inputs
            sizes = [first.encoded.sizes] if self.needs_pictures else [[]]
            self.passes.transform = check_model(self.loaded, inputs, sizes, [first.encoded.answer_index[-1]])
            self._check_last_layer(first)
            self._checked = 1 + first.is_multimodal
        self._check_sharing(good or chosen)

    def _with_known_layout(self, items: Sequence[LoadedRecord]) -> list[LoadedRecord]:
        """Those whose pictures lie where the processor's settings say; the others become errors.

        Raises ModelError where it is none of the first samples: then it is the wrong processor. Where the null is not
        made of pictures, it does not matter how they lie.
        """
        if not self.needs_pictures:
            return list(items)
        good, broken = [], []
        for item in items:
            try:
                self.loaded.pixels.check(item.encoded.pixels, [item.encoded.sizes])
                good.append(item)
            except ModelError as error:
                broken.append((item, error))
        if broken and not good and self._checked < 2:
            raise broken[0][1]
        for item, error in broken:
            item.encoded = None
            cure = "Give the image another shape, or score with null drop or shuffle"
            item.error = SampleError(item.record.key, item.record.id, str(error).rstrip("."), cure)
        return good

    def _check_last_layer(self, item: LoadedRecord) -> None:
        moved = self.loaded.ranks.agree(self.passes.last_layer_error(item.view))
        if not moved <= ROWS_TOLERANCE[self.loaded.model.dtype]:
            self.passes.last_layer_whole()
            warnings.warn(
                f"{self.loaded.name}: the last layer on answer rows alone moves them by {moved:.3g} of their norm, so "
                "it is computed on all rows",
                stacklevel=2,
            )

    # --- sharing ---

    def follow(self, sharing: str | None) -> None:
        """Takes over what an earlier run of the same scores decided, so that all its rows are made in one way."""
        if sharing is not None and self.passes.share:
            self.sharing = sharing
            self.passes.share = sharing != ALONE

    def _check_sharing(self, items: Sequence[LoadedRecord]) -> None:
        """Compares samples in one sequence with the same ones alone; switches that off where it moves them."""
        together: dict[tuple, list[LoadedRecord]] = {}
        for item in items:
            if prefix_length(item.encoded, self.image_token_id):
                key = shared_by(item.view, self.image_token_id)
                together.setdefault(key, []).append(item)
        kind = IMAGES if together else TEXT
        if not self.passes.share or self.sharing in (kind, IMAGES):
            return
        if together:
            (_, ids), alike = max(together.items(), key=lambda entry: len(entry[1]))
            members = [item.view for item in (alike * 2 if len(alike) == 1 else alike)[:3]]
            rows = [SharedRow(tuple(members), len(ids)), SharedRow((members[-1],))]
        else:
            kinds = [item.view for item in items if item.is_multimodal == items[0].is_multimodal]
            rows = [SharedRow((kinds[0],)), SharedRow((kinds[-1],))]
        moved = self.loaded.ranks.agree(self.passes.sharing_error(rows))
        self.sharing = kind
        if not moved <= SHARING_TOLERANCE[self.loaded.model.dtype]:
            self.sharing, self.passes.share = ALONE, False
            warnings.warn(
                f"{self.loaded.name}: sharing the computation of images and prompts moves values by {moved:.3g} nats, "
                "so it is off: every sample is computed alone",
                stacklevel=2,
            )

    # --- memory ---

    @torch.inference_mode()
    def probe_memory(self, items: Sequence[LoadedRecord], budget: int, most: int | None) -> None:
        """Scores one batch of the largest size there can be, made of copies of one sample; keeps nothing of it.

        items: samples to choose from; the one with the most pixels a token is taken. budget: tokens of a batch;
        most: rows of one. Raises ModelError with what fits, if that does not.
        """
        items = [item for item in items if item.encoded is not None]
        if not items:
            return
        hardest = max(items, key=_pixels_a_token)
        tokens = hardest.encoded.n_fed
        copies = max(1, min(budget // tokens, most or budget))
        for n in (copies, *(copies >> shift for shift in range(1, copies.bit_length()))):
            try:
                with refused_by_ranks(self.loaded, budget):
                    self._score_copies(hardest, n)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                continue
            finally:
                self.passes.features.clear()
            if n < copies:
                raise ModelError(
                    f"{self.loaded.name}: a batch of {copies * tokens:,} tokens does not fit into the memory of "
                    f"{self.loaded.model.device}, one of {n * tokens:,} does. Give --batch-tokens {n * tokens}"
                )
            return
        raise ModelError(
            f"{self.loaded.name}: a sample of {tokens:,} tokens does not fit into the memory of "
            f"{self.loaded.model.device} beside the model. Use a larger device or --dtype bfloat16"
        )

    def _score_copies(self, item: LoadedRecord, n: int) -> None:
        """Each copy with images of its own, as far as anyone can tell."""
        images = len(item.hashes)
        hashes = [tuple(f"{copy * images + image:016x}" for image in range(images)) for copy in range(n)]
        views = [View(item.encoded, names) for names in hashes]
        self.passes.score(views, None if item.null is None else [View(item.null, names) for names in hashes])


# --- head, causality, pictures ---


@torch.inference_mode()
def check_model(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    sizes: Sizes = ((),),
    last_answers: Sequence[int] | None = None,
) -> HeadTransform:
    """Checks the facts that scoring stands on, on one real batch. Returns what the model does to its logits.

    1. hidden state x head, with that scale and softcap, equals the model's own logits;
    2. attention is causal over the answers: another last answer token leaves the bits of the rows before it;
    3. the pictures of the batch, taken out and put back, are the pixel inputs again.
    sizes: (height, width) of the images of each sample. last_answers: where each row's last answer token stands; its
    last token unless given. Raises ModelError with the values.
    """
    try:
        transform = verify_head(loaded.model, inputs)
    except ValueError as error:
        raise ModelError(f"{loaded.name}: {error}") from error
    _check_causal(loaded, inputs, last_answers)
    if any(sizes):
        _check_layout(loaded, inputs, sizes)
    return transform


def _check_causal(loaded: LoadedModel, inputs: dict[str, Tensor], last_answers: Sequence[int] | None) -> None:
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    last = inputs["attention_mask"].sum(dim=1) - 1
    if last_answers is not None:  # an image may follow, whose placeholders must stay
        last = last.new_tensor(last_answers)
    for row, end in enumerate(last.tolist()):
        changed["input_ids"][row, end] = _another_token(loaded.model, inputs["input_ids"][row, : end + 1])
    hidden = hidden_at_head(loaded.model, inputs)
    before = torch.arange(hidden.shape[1], device=last.device) < last[:, None]
    moved = (hidden_at_head(loaded.model, changed) - hidden)[before].abs()
    if not (moved == 0).all():
        raise ModelError(
            f"{loaded.name}: changing a later token moves earlier hidden states by {float(moved.max()):.3g}, so it is "
            "not causal over the answer and cannot be scored token by token"
        )


def _another_token(model: PreTrainedModel, ids: Tensor) -> int:
    """An ordinary token that differs from the last of ids (T,): one that stands before it, no image's placeholder."""
    config = model.config.to_dict()
    special = {value for name, value in config.items() if name.endswith(("token_id", "token_index"))}
    ordinary = [id for id in ids.tolist() if id not in special and id != int(ids[-1])]
    return ordinary[-1] if ordinary else (int(ids[-1]) + 1) % model.get_input_embeddings().weight.shape[0]


def _check_layout(loaded: LoadedModel, inputs: dict[str, Tensor], sizes: Sizes) -> None:
    pictures = loaded.pixels.pictures(inputs, sizes)
    again = loaded.pixels.put_back(inputs, sizes, [picture.pixels for picture in pictures])
    if not torch.equal(again["pixel_values"], inputs["pixel_values"]):
        raise ModelError(
            f"{loaded.name}: its pixel inputs {tuple(inputs['pixel_values'].shape)} are not laid out like those of "
            f"{loaded.family.name}. Score with the processor that the checkpoint came with"
        )


def _pixels_a_token(item: LoadedRecord) -> float:
    return sum(value.nbytes for value in item.encoded.pixels.values()) / item.encoded.n_fed
