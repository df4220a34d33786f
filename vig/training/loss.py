"""The masked loss of selective training, for any trainer: no (B, T, V) logits, no GEMM on tokens left out.

    loss = 1 / num_items * sum over kept tokens of w_t * (nll_t + z_loss * lse_t^2)

`selective_loss` runs the model's own forward, through whatever wraps it (PEFT, DDP, FSDP, autocast), with one
exchange: where the model calls its LM head, the kept rows go to `vig_kernels.linear_cross_entropy` instead.
So every family gets the inputs it gets in ordinary training, and sharded weights are whole when they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vig.models.lm_head import HeadError, find_head, head_replaced, head_weights, shifted_rows, verify_head
from vig_kernels import linear_cross_entropy


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
        weight, bias = head_weights(head)
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
