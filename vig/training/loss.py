"""The masked loss of selective training, for any trainer: no (B, T, V) logits, no GEMM on tokens left out.

    loss = 1 / num_items * sum over kept tokens of w_t * (nll_t + z_loss * lse_t^2)

`selective_loss` runs the model's own forward, through whatever wraps it (PEFT, DDP, FSDP, autocast), with one
exchange: where the model calls its LM head, the kept rows go to `vig_kernels.linear_cross_entropy` instead.
So every family gets the inputs it gets in ordinary training, and sharded weights are whole when they are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vig_kernels import linear_cross_entropy

IGNORE = -100

# What transformers' configs call the factor on the logits (Cohere, Muse, Falcon-H1; Granite divides by its own).
SCALE_NAMES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAP_NAMES = ("final_logit_softcapping",)


class HeadError(ValueError):
    """The LM head of this model cannot be replaced by the fused loss; the message says why and what helps."""


# --- the shift ---


class Rows(NamedTuple):
    """The hidden states that predict a kept token, in reading order."""

    index: Tensor  # (N,) int64: rows of hidden.reshape(B * T, D)
    target: Tensor  # (N,) int64: the token each of them predicts


def shifted_rows(
    labels: Tensor,  # (B, T) int64, IGNORE off the kept tokens, aligned with input_ids
    num_kept: int | None = None,
) -> Rows:
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
    return Rows(index, following[index])


def count_kept(labels: Tensor) -> int:  # (B, T)
    """How many tokens the loss runs over: N of `shifted_rows`."""
    return int((labels[:, 1:] != IGNORE).sum())


# --- the loss ---


def selective_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    num_items: int | float | Tensor | None = None,
    num_kept: int | None = None,
    token_weight: Tensor | None = None,  # (B, T) float, aligned with labels
    z_loss: float = 0.0,
    memory: str = "fast",
    backend: str = "auto",
    return_outputs: bool = False,
) -> Any:
    """Masked cross-entropy of a causal or vision-language model over the tokens that `labels` keep.

    model: a transformers model with an LM head, bare or wrapped (PEFT, DDP, FSDP, torch.compile).
    inputs: what the model takes, plus ``labels`` (B, T) int64, -100 on the tokens left out, not shifted.
    num_items: divides the summed loss: the kept tokens of the whole optimiser step on all devices. Without it
        the mean over this call's kept tokens (or over their weights).
    num_kept: kept tokens of this call (`count_kept`), which spares a GPU one synchronisation.
    memory, backend: as in `vig_kernels.linear_cross_entropy`.
    return_outputs: also return the model's outputs with their logits (B, T, V). For evaluation, under no_grad.

    Returns a float32 scalar, or (scalar, outputs). A call that keeps no token gives 0.0 and zero gradients.
    Frozen weights cost no gradient GEMM; tied embeddings receive their gradient from both ends.
    Raises HeadError where the head cannot be fused: adapters on it, quantised or sharded weights, or logits
    that the model transforms in an unknown way (found by `verify_head` at the first call).
    """
    if return_outputs and torch.is_grad_enabled():
        raise ValueError("return_outputs builds the (B, T, V) logits: evaluate under torch.no_grad()")
    inputs = {"use_cache": False} | dict(inputs)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(f"no labels among the inputs {sorted(inputs)}: the loss is masked by them")
    head = find_head(model)
    transform = verify_head(model, inputs)
    rows = shifted_rows(labels, num_kept)
    if token_weight is not None:
        token_weight = token_weight.reshape(-1)[rows.index + 1]
    loss = None

    def fused(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal loss
        if hidden.shape[:-1] != labels.shape:
            raise HeadError(
                f"the model sends hidden states {tuple(hidden.shape)} to its head, the labels are "
                f"{tuple(labels.shape)}. Prompt tuning and packed hidden states are not supported"
            )
        weight, bias = _weights(head)
        kept = hidden.reshape(-1, hidden.shape[-1])[rows.index.to(hidden.device)]
        loss = linear_cross_entropy(
            kept,
            weight,
            rows.target.to(hidden.device),
            bias=bias,
            token_weight=None if token_weight is None else token_weight.to(hidden.device),
            num_items=num_items,
            num_kept=len(rows.index),
            z_loss=z_loss,
            memory=memory,
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            backend=backend,
        )
        if return_outputs:
            return forward(hidden)
        # The gradient must leave through the model's outputs, where DDP and FSDP hang their hooks. Scaling and
        # softcap, which the model still applies, map this 0 to 0 with slope `scale`.
        return (loss - loss.detach()).reshape(1, 1, 1) / transform.scale

    with head_replaced(head, fused):
        outputs = model(**inputs)
    if loss is None:
        raise HeadError(f"{type(model).__name__} computes its logits without calling its output embeddings")
    if getattr(outputs, "aux_loss", None) is not None:
        raise HeadError("the model adds a router loss. Set config.output_router_logits = False")
    if return_outputs:
        return loss, outputs
    return loss.detach() + outputs.logits.sum().to(loss.device)


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


def _weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias of the head, at the moment of its call: sharding wrappers have gathered them."""
    layer = getattr(head, "base_layer", head)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "placements"):  # a DTensor
        raise HeadError(
            f"the weight of the LM head is sharded ({weight.placements}) when it is called. Leave the head out "
            "of the tensor-parallel plan; FSDP2 gathers it"
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
    So the model's own forward is run on `inputs` with a probe in the place of the last hidden state, and its
    logits are compared with every combination of the scales and softcaps that the config mentions.
    Raises HeadError with the values where none reproduces them within 1e-3 (2e-2 in 16 bit) of the largest.
    """
    causal = unwrap(model)
    if causal not in _verified:
        _verified[causal] = _probe(model, causal, {"use_cache": False} | dict(inputs))
    return _verified[causal]


@torch.no_grad()
def _probe(model: nn.Module, causal: nn.Module, inputs: dict[str, Any]) -> HeadTransform:
    columns = raw = tolerance = None

    def probed(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal columns, raw, tolerance
        weight, bias = _weights(head)
        columns = torch.linspace(0, len(weight) - 1, min(len(weight), 1024), device=weight.device).long()
        sample, offset = weight[columns].float(), 0.0 if bias is None else bias[columns].float()
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
