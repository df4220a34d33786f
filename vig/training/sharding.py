"""FSDP2: weights, gradients and moments of a run spread over its processes, by `torch.distributed.fsdp`.

Each decoder layer is a group, gathered where it runs and freed behind it. All else (embedding, vision tower, projector,
norm, head) is one more group, which stays whole from a step's forward to its backward. So all processes gather the same
groups in the same order whatever their batches hold: one of text alone skips the tower, but no group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from vig.models.lm_head import is_sharded, unwrap


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, its parameters cut along their first dimension and moved to `device`, a layer at a time."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in unwrap(model).get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained_together(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters outside of the decoder layers. Whole behind a forward, shards behind a backward."""
    layers = {id(p) for layer in unwrap(model).get_decoder().layers for p in layer.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in layers]


def nothing(model: nn.Module) -> Tensor:
    """0.0, from every parameter that a batch may leave unused: processes exchange gradients of the same ones.

    Called behind a forward.
    """
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return sum(p.float().sum() for p in trained_together(model)) * 0.0


def drop_unused(model: nn.Module) -> None:
    """Takes away gradients that are zero on all processes, since AdamW would decay what no batch has used."""
    parameters = [p for p in trained_together(model) if p.grad is not None]
    if not parameters:
        return
    used = torch.stack([p.grad.to_local().any() for p in parameters]).int()
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter, one in zip(parameters, used.tolist(), strict=True):
        if not one:
            parameter.grad = None


def whole(value: Any, keep: bool = True) -> Any:
    """The same with every shard gathered, on the CPU: tensors in dicts and lists. Called by all processes.

    keep: whether this process wants them; the others hold one at a time.
    """
    if isinstance(value, dict):
        return {name: whole(part, keep) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(part, keep) for part in value)
    if not (isinstance(value, Tensor) and is_sharded(value)):
        return value
    full = value.detach().full_tensor()
    return full.cpu() if keep else None


def like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor of the parameter's shape, sharded as the parameter is; anything else as it is."""
    if not is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
