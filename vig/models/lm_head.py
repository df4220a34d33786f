"""The LM head: which hidden states predict which tokens, and what the model does at its own call of the head.

The shift by one, for scoring and training alike, is `shifted_rows`. `head_replaced` puts a function in the place of the
head while the model's own forward runs, so that nothing of the model has to be written anew; `verify_head` finds the
scale and softcap that the model applies behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORE = -100

# What transformers' configs call the factor on the logits (Cohere, Muse, Falcon-H1; Granite divides by its own).
SCALE_NAMES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAP_NAMES = ("final_logit_softcapping",)
TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")  # Gemma 3 and PaliGemma do not train without


class HeadError(ValueError):
    """The LM head of this model cannot be replaced by the fused loss; the message says why and what helps."""


# --- the shift ---


class ShiftedRows(NamedTuple):
    """The hidden states that predict a kept token, in reading order."""

    index: Tensor  # (N,) int64: rows of hidden.reshape(B * T, D)
    target: Tensor  # (N,) int64: the token each of them predicts


def shifted_rows(
    labels: Tensor,  # (B, T) int64, IGNORE off the kept tokens, aligned with input_ids
    num_kept: int | None = None,
) -> ShiftedRows:
    """Which hidden states predict a kept token, and which token: the shift by one.

        position       0      1      2      3
        input_ids      a      b      c      d
        labels       -100     b    -100     d
        hidden        h0     h1     h2     h3
                       |             |
        predicts       b             d          index = [0, 2], target = [b, d]

    A label at position 0 is predicted by nothing. The label of row `index[n]` stands at flat position
    `index[n] + 1`.
    num_kept: N, when the collator has counted it; then a GPU is not synchronised to find it.
    """
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    following = following.reshape(-1)
    kept = following != IGNORE
    if num_kept is None or labels.device.type == "cpu":
        index = kept.nonzero().squeeze(1)
        if num_kept is not None and index.numel() != num_kept:
            raise ValueError(f"num_kept is {num_kept}, but the labels keep {index.numel()} tokens")
    else:
        index = kept.nonzero_static(size=num_kept).squeeze(1)
    return ShiftedRows(index, following[index])


def count_kept(labels: Tensor) -> int:  # (B, T)
    """How many tokens the loss runs over: N of `shifted_rows`."""
    return int((labels[:, 1:] != IGNORE).sum())


# --- the head ---


class HeadTransform(NamedTuple):
    """What a model does to `hidden @ weight.T + bias`: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        else:
            inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def find_head(model: nn.Module) -> nn.Module:
    """The linear module that turns hidden states into logits. Raises HeadError where it cannot be fused."""
    if isinstance(model, nn.DataParallel):
        raise HeadError("nn.DataParallel copies the model at every step. Launch one process a GPU (torchrun)")
    causal = unwrap(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise HeadError(f"{type(causal).__name__} has no LM head. Load it with its language-model class")
    if hasattr(head, "modules_to_save"):  # PEFT trains a full copy
        active = head.active_adapters
        head = (
            head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
        )
    if hasattr(head, "base_layer") and not (head.merged or head.disable_adapters):
        raise HeadError(
            "the LM head carries an adapter, which the fused loss would ignore. Leave it out of the adapter's "
            "target_modules (exclude_modules), train it whole (modules_to_save), or merge it first"
        )
    return head


def head_weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias of the head, at the moment of its call: sharding wrappers have gathered them.

    The head of a tensor-parallel model (transformers' tp_plan) stays sharded: DTensors, for `head_input`.
    """
    layer = getattr(head, "base_layer", head)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if is_sharded(weight) and not getattr(
        layer, "_is_hooked", False
    ):  # as transformers marks what it distributes
        raise HeadError(
            f"the weight of the LM head is sharded ({weight.placements}) when it is called, but not by the model's "
            'own plan. Load the model with tp_plan="auto", or leave the head whole; FSDP2 gathers it'
        )
    if weight.numel() == 0:
        raise HeadError(
            "the weight of the LM head is empty when it is called: ZeRO-3 has not gathered it. Pass the "
            "DeepSpeed engine itself as `model`, or use ZeRO-2"
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise HeadError(
            f"the weight of the LM head is {weight.dtype} {tuple(weight.shape)}, expected floating (V, D). "
            'A quantised head must be left out of quantisation (llm_int8_skip_modules=["lm_head"])'
        )
    return weight, bias


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(weight, "placements")


def head_input(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states as the ops of `vig_kernels` take them beside a weight of `head_weights`.

    All ranks of a tensor-parallel model hold the same rows: beside its DTensor they are a Replicate one.
    """
    if not is_sharded(weight):
        return hidden
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)


def _rows_of(weight: Tensor, rows: Tensor) -> Tensor:
    """weight[rows], float32, also of a weight whose rows are spread over ranks."""
    if not is_sharded(weight):
        return weight[rows].float()
    local, mesh = weight.to_local(), weight.device_mesh
    chunk = -(-weight.shape[0] // mesh.size())  # Shard(0) cuts as torch.chunk does
    index = rows - mesh.get_local_rank() * chunk
    here = (index >= 0) & (index < len(local))
    found = torch.zeros((len(rows), *weight.shape[1:]), device=local.device)
    found[here] = local[index[here]].float()
    torch.distributed.all_reduce(found, group=mesh.get_group())
    return found


@contextmanager
def head_replaced(
    head: nn.Module, function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """While it lasts, the head computes function(its own forward, hidden). Its hooks still run around it."""
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"  # accelerate's offloading hooks
    own, forward = head.__dict__.get(name), getattr(head, name)
    setattr(head, name, lambda hidden: function(forward, hidden))
    try:
        yield
    finally:
        if own is None:
            delattr(head, name)
        else:
            setattr(head, name, own)


_verified: WeakKeyDictionary[nn.Module, HeadTransform] = WeakKeyDictionary()


def verify_head(model: nn.Module, inputs: dict[str, Any]) -> HeadTransform:
    """Finds what the model does to its logits by feeding its head a known hidden state, once a model.

    The config alone cannot tell: Gemma3's vision-language class ignores the softcap that its text class applies.
    So the model's own forward is run, on two tokens of text with the fields of `inputs`, with a probe in the place of
    the last hidden state, and its logits are compared with every combination of the scales and softcaps that the
    config mentions. A model that cannot run so is given `inputs` whole. No random number is drawn.
    Raises HeadError with the values where none reproduces them within 1e-3 (2e-2 in 16 bit) of the largest.
    """
    causal = unwrap(model)
    if causal not in _verified:
        find_head(model)
        device = next(causal.parameters()).device
        devices = [] if device.type in ("cpu", "meta", "mps") else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            _verified[causal] = _probe(model, causal, {"use_cache": False} | dict(inputs))
    return _verified[causal]


def _two_tokens(causal: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the same fields as far as a token has them, for one row of two tokens that stand for text."""
    configs = (causal.config, causal.config.get_text_config())
    reserved = {
        value
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = itertools.islice((id for id in itertools.count() if id not in reserved), 2)
    tokens = torch.tensor([list(usual)], device=inputs["input_ids"].device)
    per_token = {name: torch.zeros_like(tokens) for name in TOKEN_KINDS if name in inputs}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False} | per_token


@torch.no_grad()
def _probe(model: nn.Module, causal: nn.Module, inputs: dict[str, Any]) -> HeadTransform:
    columns = raw = tolerance = None

    def probed(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal columns, raw, tolerance
        weight, bias = head_weights(head)
        columns = torch.linspace(0, len(weight) - 1, min(len(weight), 1024), device=weight.device).long()
        sample, offset = _rows_of(weight, columns), 0.0 if bias is None else _rows_of(bias, columns)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn((1, 2, hidden.shape[-1]), generator=generator).to(weight.device)
        largest = torch.nn.functional.linear(probe, sample).abs().max()
        probe = (probe * torch.where(largest > 0, 50.0 / largest, 1.0)).to(hidden.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            raw = torch.nn.functional.linear(probe.float(), sample) + offset
        logits = forward(probe)
        tolerance = 1e-3 if logits.dtype == torch.float32 else 2e-2
        return logits

    head = find_head(model)
    with head_replaced(head, probed):
        try:
            outputs = model(**_two_tokens(causal, inputs))
        except HeadError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    if raw is None:
        raise HeadError(f"{type(causal).__name__} computes its logits without calling its output embeddings")
    if not raw.isfinite().all():
        raise HeadError(f"the LM head of {type(causal).__name__} holds NaN or infinite weights")
    logits = outputs.logits[:, :, columns.to(outputs.logits.device)].float().to(raw.device)
    candidates = list(itertools.starmap(HeadTransform, itertools.product(*_settings(causal))))
    largest = logits.abs().max().clamp(min=1e-6)
    errors = [float((transform(raw) - logits).abs().max() / largest) for transform in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    if not errors[best] <= tolerance:
        spot = (candidates[best](raw) - logits).abs().argmax()
        raise HeadError(
            f"{type(causal).__name__} turns the logit {float(raw.flatten()[spot]):.6g} into "
            f"{float(logits.flatten()[spot]):.6g}; no scale and softcap of its config explains it (tried "
            f"{', '.join(f'{c.scale:g} / {c.softcap}' for c in candidates)}). Train it with its own loss"
        )
    return candidates[best]


def _settings(causal: nn.Module) -> tuple[list[float], list[float | None]]:
    """The scales and softcaps that a model's configs mention, 1.0 and None first."""
    scales, softcaps = [1.0], [None]
    for config in (causal.config, causal.config.get_text_config()):
        for name in SCALE_NAMES:
            value = getattr(config, name, None)
            if isinstance(value, int | float) and value:
                scales += [float(value), 1.0 / float(value)]
        softcaps += [getattr(config, name, None) for name in SOFTCAP_NAMES]
    return list(dict.fromkeys(scales)), list(dict.fromkeys(softcaps))


def hidden_at_head(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """What the model hands to its LM head: (B, T, D) hidden states, or (N, D) of the flat positions `rows` (N,).

    The model's own forward runs up to its head; no logits are computed. Pixels are cast to the model's dtype.
    """
    taken = None

    def take(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal taken
        taken = hidden if rows is None else hidden.reshape(-1, hidden.shape[-1])[rows]
        return hidden.new_zeros(1, 1, 1)  # the logits that nobody reads

    cast = {
        name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with head_replaced(find_head(model), take):
        model(**cast, use_cache=False)
    return taken
