"""Attention on image tokens, layer by layer.

    share_l = mean over answer rows t and heads h of sum_{j is an image token} A_l[h, t, j]

An answer row is the position that predicts an answer token. A_l are the decoder's own attention weights, which only
its eager implementation gives; each layer's are summed up as soon as they are there, so that those of one layer alone
are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vig.data.sample import SampleError
from vig.evaluation.probes.answering import OnShare
from vig.evaluation.probes.data import ProbeData, image_name
from vig.evaluation.probes.findings import Findings, Unit
from vig.evaluation.probes.settings import ProbeSettings
from vig.models.families import ModelError
from vig.models.lm_head import hidden_at_head
from vig.scoring import batching
from vig.scoring.loader import LoadedRecord, load_records
from vig.scoring.memory import in_halves
from vig.scoring.scorer import Scorer

MOST_BYTES = 256 << 20  # of one layer's weights, before and behind the softmax and cast: three copies


def why_not(model: PreTrainedModel, image_token_id: int) -> str | None:
    """None where image tokens stand in the decoder's sequence and its attention can be read; else the reason."""
    name = model.config.model_type
    text = model.config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        return f"{name} reads images by cross-attention: no image tokens stand in the decoder's sequence"
    if image_token_id < 0:
        return f"the processor of {name} writes no image tokens"
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        return f"the decoder of {name} has no list of layers"
    without = [place for place, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if without:
        return f"layer {without[0]} of {name} has no softmax attention"
    return None


def attention(scorer: Scorer, data: ProbeData, settings: ProbeSettings, on_share: OnShare = None) -> Findings:
    """Every answer of every sample, all turns. Raises ModelError for a model that cannot be probed, with the reason."""
    model, encoder = scorer.loaded.model, scorer.encoder
    reason = why_not(model, encoder.image_token_id)
    if reason is not None:
        raise ModelError(f"the probe attention cannot be made: {reason}. Leave it out")
    found, seen = Findings([]), 0
    with eager_attention(model):
        for chunk in batching.chunks(data.samples, batching.BLOCK):
            items: list[LoadedRecord] = []
            for item in load_records(chunk, encoder, "pixels", scorer.workers):
                if item.error is None and encoder.image_token_id not in item.encoded.input_ids:
                    reason = "no image token stands in its sequence"
                    item.error = SampleError(item.record.key, item.record.id, reason, "Check the processor")
                if item.error is not None:
                    about = f"{item.error.reason}. {item.error.cure}"
                    found.errors.append((item.record.key, item.record.id, about))
                else:
                    items.append(item)
            for batch in _batches(items, model):
                for item, result in zip(batch, _probe(scorer, batch), strict=True):
                    if isinstance(result, Unit):
                        found.units.append(result)
                    else:
                        found.errors.append((item.record.key, item.record.id, result))
            seen += len(chunk)
            if on_share is not None:
                on_share(seen / len(data.samples))
    order = {sample.key: place for place, sample in enumerate(data.samples)}
    found.units.sort(key=lambda unit: order[unit.key])
    return found


def _batches(items: Sequence[LoadedRecord], model: PreTrainedModel) -> Iterator[list[LoadedRecord]]:
    """Longest first; a layer's weights (B, heads, T, T) stay within MOST_BYTES, unless one sample alone has more."""
    heads = model.config.get_text_config().num_attention_heads
    batch: list[LoadedRecord] = []
    for item in sorted(items, key=lambda item: -item.encoded.n_fed):
        longest = (batch or [item])[0].encoded.n_fed
        if batch and (len(batch) + 1) * 3 * 4 * heads * longest**2 > MOST_BYTES:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _probe(scorer: Scorer, items: Sequence[LoadedRecord]) -> list[Unit | str]:
    """A unit a sample, or why there is none. What does not fit into memory is halved."""
    return in_halves(
        lambda batch: _units(scorer, batch),
        items,
        lambda item, reason: f"{reason}. Probe it on a larger device",
    )


def _units(scorer: Scorer, items: Sequence[LoadedRecord]) -> Iterator[Unit]:
    layers, even = image_attention(scorer, items)
    start = 0
    for item in items:
        end = start + len(item.encoded.answer_index)
        expected = float(even[start:end].mean())
        values = {
            f"layer {number}": {
                "on image tokens": float(layer[start:end].mean()),
                "image tokens": expected,
            }
            for number, layer in enumerate(layers)
        }
        yield Unit(item.record.key, image_name(item.record), values)
        start = end


@torch.inference_mode()
def image_attention(scorer: Scorer, items: Sequence[LoadedRecord]) -> tuple[Tensor, Tensor]:
    """((layers, N), (N,)) float64 on the CPU, N answer rows in reading order.

    The first: attention mass on image tokens, mean over heads. The second: what attention that is the same for all
    tokens up to the row would put there.
    """
    model = scorer.loaded.model
    batch = scorer.passes.padded([item.view for item in items])
    is_image = batch.inputs["input_ids"] == scorer.encoder.image_token_id  # (B, T)
    row, column = (
        batch.answers.index // is_image.shape[1],
        batch.answers.index % is_image.shape[1],
    )  # (N,) each
    of_row = is_image[row]  # (N, T)
    found: list[Tensor] = []

    def take(weights: Tensor) -> None:  # (B, H, T, T)
        of_answers = weights[row, :, column].float().mean(dim=1)  # (N, T)
        found.append((of_answers * of_row).sum(dim=1))

    with weights_taken(model, take):
        hidden_at_head(model, batch.inputs, batch.answers.index)
    before = torch.arange(is_image.shape[1], device=row.device) <= column[:, None]
    even = (of_row & before).sum(dim=1) / (column + 1)
    return torch.stack(found).double().cpu(), even.double().cpu()


@contextmanager
def weights_taken(model: PreTrainedModel, take: Any) -> Iterator[None]:
    """While it lasts, take(weights) is called with each layer's attention weights, in order, and nobody keeps them."""

    def hook(module: nn.Module, inputs: Any, outputs: tuple) -> tuple:
        attended, weights, *more = outputs
        if weights is None:
            raise ModelError(
                f"{type(module).__name__} gives no attention weights. Leave the probe attention out"
            )
        take(weights)
        return attended, None, *more

    with ExitStack() as stack:
        for layer in model.get_decoder().layers:
            stack.callback(layer.self_attn.register_forward_hook(hook).remove)
        yield


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts the decoder attends by the implementation that gives its weights."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
