"""A model that answers batches of prompts: by writing, through transformers' `generate`, or by likelihoods.

A prompt is what scoring and training see before the answer's first token (`vig.models.prompts.Encoder`), so a model
is asked as it was tuned. Rows are padded on the left.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vig.evaluation.generation import (
    generation_config,
    left_padded,
    on_device,
    prompt_of,
    stop_ids_of,
    until_stop,
)
from vig.evaluation.questions import Question
from vig.evaluation.settings import AnswerSettings
from vig.models.families import ModelError
from vig.models.lm_head import find_head, head_input, head_weights, hidden_at_head, shifted_rows, verify_head
from vig.models.loading import LoadedModel, context_length, load
from vig.models.prompts import Encoder
from vig.scoring.loader import LoadedRecord, workers_beside
from vig.scoring.memory import in_halves
from vig.store.fingerprints import processor_json, text_hash, tokenizer_json
from vig_kernels import linear_nll
from vig_kernels.dispatch import resolve


@dataclass
class Asked:
    """A question and its encoded samples: one, or one a candidate."""

    question: Question
    items: list[LoadedRecord]

    def length(self, new_tokens: int) -> int:
        """Tokens of its rows, padded to the longest."""
        return len(self.items) * (max(len(item.encoded.input_ids) for item in self.items) + new_tokens)


class Answerer:
    """A loaded model that answers.

    new_tokens: the longest answer; 0 compares the likelihoods of candidates instead. Raises ModelError for a model
    that cannot be loaded, or whose context leaves no room for a prompt.
    """

    def __init__(self, model: str | LoadedModel, settings: AnswerSettings, new_tokens: int):
        self.settings, self.new_tokens = settings, new_tokens
        self.loaded = model if isinstance(model, LoadedModel) else _load(model, settings)
        self.model = self.loaded.model
        context = settings.max_length or context_length(self.loaded)
        if context is not None and context - new_tokens < 2:
            raise ModelError(
                f"max_new_tokens = {new_tokens} leaves no room for a prompt in the context of {context}. "
                "Lower --max-new-tokens"
            )
        longest = None if context is None else context - new_tokens
        self.encoder = Encoder(self.loaded.processor, end_of_turn="drop", max_length=longest)
        self.tokenizer = self.encoder.tokenizer
        workers = settings.workers
        self.workers = workers_beside(self.model.device) if workers is None else workers
        self.stop_ids = stop_ids_of(self.model, self.encoder)
        self.splits = 0  # batches that did not fit into memory and were halved

    def provenance(self) -> dict[str, Any]:
        """What is known once the model is loaded."""
        return {
            "revision": self.loaded.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "tokenizer_hash": text_hash(tokenizer_json(self.tokenizer)),
            "processor_hash": text_hash(processor_json(self.loaded.processor)),
            "template_hash": text_hash(self.encoder.template),
            "stop_ids": self.stop_ids,
            "backend": None
            if self.new_tokens
            else resolve("linear_nll", self.settings.backend, self.model.device),
        }

    @torch.inference_mode()
    def answer(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        """What is stored of each answer. A batch that does not fit into memory is halved.

        Raises MemoryError that names the question where one alone does not fit.
        """

        def too_large(asked: Asked, reason: str) -> dict[str, Any]:
            raise MemoryError(reason)

        def count() -> None:
            self.splits += 1

        return in_halves(self._write if self.new_tokens else self._weigh, batch, too_large, count)

    # --- by writing ---

    def _write(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        prompts = [prompt_of(asked.items[0].encoded) for asked in batch]
        pad_id, temperature = self.encoder.pad_id(), self.settings.temperature
        inputs = on_device(self.model, left_padded(prompts, pad_id))
        config = generation_config(self.new_tokens, pad_id, self.stop_ids, temperature)
        with torch.random.fork_rng(self._devices(), enabled=temperature > 0):
            if temperature > 0:
                torch.manual_seed(zlib.crc32(f"{self.settings.seed} {batch[0].question.key}".encode()))
            written = self.model.generate(**inputs, generation_config=config)
        return [self._read(row) for row in written[:, inputs["input_ids"].shape[1] :].tolist()]

    def _devices(self) -> list[torch.device]:
        return [] if self.model.device.type == "cpu" else [self.model.device]

    def _read(self, ids: list[int]) -> dict[str, Any]:
        """cut: the answer was still going on at max_new_tokens."""
        end = until_stop(ids, self.stop_ids)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        count = len(ids) if end is None else end
        return {"prediction": text, "tokens": count, **({"cut": True} if end is None else {})}

    # --- by likelihood ---

    def _weigh(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        """nll: nats of each candidate, summed over its tokens; token_counts: how many it has."""
        encoded = [item.encoded for asked in batch for item in asked.items]
        inputs = on_device(self.model, self.encoder.collate(encoded))
        labels = inputs.pop("labels")
        rows = shifted_rows(labels)
        transform = verify_head(self.model, inputs)
        weight, bias = head_weights(find_head(self.model))
        hidden = hidden_at_head(self.model, inputs, rows.index)
        nll = linear_nll(
            head_input(hidden, weight), weight, rows.target, bias=bias, logit_scale=transform.scale,
            logit_softcap=transform.softcap, backend=self.settings.backend,
        )  # fmt: skip
        of_row = iter(nll.split([len(one.answer_index) for one in encoded]))
        found = []
        for asked in batch:
            values = [next(of_row) for _ in asked.items]
            sums = [round(float(value.double().sum()), 6) for value in values]
            found.append({"nll": sums, "token_counts": [len(value) for value in values]})
        return found


def _load(name: str, settings: AnswerSettings) -> LoadedModel:
    return load(
        name, dtype=settings.load_dtype, device=settings.device, revision=settings.revision, attn=settings.attn,
        trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
