"""The masked loss of selective training, for any trainer: no (B, T, V) logits, no GEMM on tokens left out.

    loss = 1 / num_items * sum over kept tokens of w_t * (nll_t + z_loss * lse_t^2)

`selective_loss` runs the model's own forward, through whatever wraps it (PEFT, DDP, FSDP, autocast), with one
exchange: where the model calls its LM head, the kept rows go to `vig_kernels.linear_cross_entropy` instead.
So every family gets the inputs it gets in ordinary training, and sharded weights are whole when they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vig.models.lm_head import (
    HeadError,
    HeadTransform,
    ShiftedRows,
    find_head,
    head_input,
    head_replaced,
    head_weights,
    shifted_rows,
    verify_head,
)
from vig_kernels import linear_cross_entropy

STATS = ("entropy", "argmax")  # of `linear_cross_entropy`, that trainers log


class KeptRows(NamedTuple):
    """What the LM head was called with, as far as labels are kept."""

    hidden: Tensor  # (N, D)
    rows: ShiftedRows
    head: dict[str, Any]  # of `linear_cross_entropy`: weight, bias, scale and softcap


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
    on_stats: Callable[[Tensor], None] | None = None,
) -> Any:
    """Masked cross-entropy of a causal or vision-language model over the tokens that `labels` keep.

    model: a transformers model with an LM head, bare or wrapped (PEFT, DDP, FSDP, torch.compile).
    inputs: what the model takes, plus ``labels`` (B, T) int64, -100 on the tokens left out, not shifted.
    num_items: divides the summed loss: the kept tokens of the whole optimiser step on all devices. Without it
        the mean over this call's kept tokens (or over their weights).
    num_kept: kept tokens of this call (`count_kept`), which spares a GPU one synchronisation.
    memory, backend: as in `vig_kernels.linear_cross_entropy`.
    return_outputs: also return the model's outputs with their logits (B, T, V). For evaluation, under no_grad.
    on_stats: called with (N, 3) float32, detached, of the kept rows: entropy in nats, 1.0 where the most likely token
        is the label, 1.0 (0.0 three times where the weight is 0). From the loss's own sweep; its bits stay.

    Returns a float32 scalar, or (scalar, outputs). A call that keeps no token gives 0.0 and zero gradients.
    Frozen weights cost no gradient GEMM; tied embeddings receive their gradient from both ends.
    A model that transformers has made tensor-parallel (`tp_plan="auto"`) keeps its sharded head: all its ranks pass
    the same batch.
    Raises HeadError where the head cannot be fused: adapters on it, quantised or otherwise sharded weights, or logits
    that the model transforms in an unknown way (found by `verify_head` at the first call).
    """
    if return_outputs and torch.is_grad_enabled():
        raise ValueError("return_outputs builds the (B, T, V) logits: evaluate under torch.no_grad()")
    inputs = {"use_cache": False} | dict(inputs)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(f"no labels among the inputs {sorted(inputs)}: the loss is masked by them")

    def mean(kept: KeptRows) -> Tensor:
        weight = None
        if token_weight is not None:
            weight = token_weight.reshape(-1)[kept.rows.index + 1].to(kept.hidden.device)
        found = linear_cross_entropy(
            kept.hidden,
            target=kept.rows.target,
            token_weight=weight,
            num_items=num_items,
            num_kept=len(kept.rows.index),
            z_loss=z_loss,
            memory=memory,
            backend=backend,
            stats=() if on_stats is None else STATS,
            **kept.head,
        )
        if on_stats is None:
            return found
        on_stats(_figures(found[1], kept.rows.target))
        return found[0]

    loss, outputs = _at_the_head(model, inputs, labels, num_kept, mean, return_outputs)
    if return_outputs:
        return loss, outputs
    return loss.detach() + outputs.logits.sum().to(loss.device)


@torch.no_grad()
def row_losses(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    num_kept: int | None = None,
    token_weight: Tensor | None = None,  # (B, T) float, aligned with labels
    z_loss: float = 0.0,
    backend: str = "auto",
    return_outputs: bool = False,
    stats: bool = False,
) -> Any:
    """Loss and weight of each row, for evaluation: (B, 2) float32, summed w_t * (nll_t + z_loss * lse_t^2) and w_t.

    Arguments as for `selective_loss`, whose value is the ratio of the two columns' sums. Rows that lie one behind the
    other (padding-free: labels (1, T), ``position_ids`` from 0 in each) are told apart. With `stats` (B, 5): summed
    entropy, hits and tokens of each row beside them, as in `selective_loss`.
    """
    inputs = {"use_cache": False} | dict(inputs)
    labels = inputs.pop("labels")
    owner = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    positions = inputs.get("position_ids")
    if len(labels) == 1 and positions is not None and positions.shape == labels.shape:
        owner = (positions == 0).cumsum(1) - 1
    owner = owner.reshape(-1)

    def summed(kept: KeptRows) -> Tensor:
        nll = linear_cross_entropy(
            kept.hidden, target=kept.rows.target, reduction="none", num_kept=len(kept.rows.index),
            z_loss=z_loss, backend=backend, stats=STATS if stats else (), **kept.head,
        )  # fmt: skip
        nll, values = nll if stats else (nll, {})
        index = kept.rows.index + 1
        weight = torch.ones_like(nll) if token_weight is None else token_weight.reshape(-1)[index].to(nll)
        columns = torch.stack((nll * weight, weight), 1)
        if stats:
            figures = _figures(values, kept.rows.target) * (weight != 0).unsqueeze(1)
            columns = torch.cat((columns, figures), 1)
        sums = nll.new_zeros((int(owner[-1]) + 1, columns.shape[1]))
        return sums.index_add_(0, owner[index].to(nll.device), columns)

    found, outputs = _at_the_head(model, inputs, labels, num_kept, summed, return_outputs)
    return (found, outputs) if return_outputs else found


def _figures(values: dict[str, Tensor], target: Tensor) -> Tensor:
    """(N, 3) float32: entropy, whether the most likely token is the target, and 1 for a row that counts."""
    argmax = values["argmax"]  # -1 in a row that does not count
    return torch.stack((values["entropy"], (argmax == target).float(), (argmax >= 0).float()), 1)


def _at_the_head(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    num_kept: int | None,
    compute: Callable[[KeptRows], Tensor],
    return_outputs: bool,
) -> tuple[Tensor, Any]:
    """What `compute` makes of the kept rows where the model calls its head, and the model's outputs.

    Their logits are (B, T, V) with `return_outputs`, else one element, through which the gradient of a scalar leaves.
    """
    head = find_head(model)
    transform = verify_head(model, inputs)
    rows = shifted_rows(labels, num_kept)
    value = None

    def fused(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal value
        if hidden.shape[:-1] != labels.shape:
            raise HeadError(_other_shape(hidden, labels))
        kept = ShiftedRows(*(tensor.to(hidden.device) for tensor in rows))
        options = _of_head(head, transform)
        taken = head_input(hidden.reshape(-1, hidden.shape[-1])[kept.index], options["weight"])
        value = compute(KeptRows(taken, kept, options))
        if return_outputs:
            return forward(hidden)
        if value.dim():
            return hidden.new_zeros((1, 1, 1))
        # The gradient must leave through the model's outputs, where DDP and FSDP hang their hooks. Scaling and
        # softcap, which the model still applies, map this 0 to 0 with slope `scale`.
        return (value - value.detach()).reshape(1, 1, 1) / transform.scale

    with head_replaced(head, fused):
        outputs = model(**inputs)
    if value is None:
        raise HeadError(f"{type(model).__name__} computes its logits without calling its output embeddings")
    if getattr(outputs, "aux_loss", None) is not None:
        raise HeadError("the model adds a router loss. Set config.output_router_logits = False")
    return value, outputs


def _of_head(head: nn.Module, transform: HeadTransform) -> dict[str, Any]:
    weight, bias = head_weights(head)
    return {
        "weight": weight,
        "bias": bias,
        "logit_scale": transform.scale,
        "logit_softcap": transform.softcap,
    }


def _other_shape(hidden: Tensor, labels: Tensor) -> str:
    text = f"the model sends hidden states {tuple(hidden.shape)} to its head, the labels are {tuple(labels.shape)}. "
    if hidden.shape[0] == labels.shape[0] and hidden.shape[1] > labels.shape[1]:
        return text + (
            f"Prompt tuning writes {hidden.shape[1] - labels.shape[1]} virtual tokens in front of each row, which have "
            "no label: use LoRA, or train with the model's own loss"
        )
    return text + "Pass rows as the model sees them, (B, T) labels beside (B, T) input_ids"
