"""An LM head whose rows are spread over processes: who holds which, and how what each has found is joined.

Each process (rank) of a group sweeps its own rows of the head for the same hidden rows. One all-gather then brings the
ranks' parts together, 12 bytes a row of hidden and 24 bytes a rank,

    lse_r    log sum exp of its logits, as two floats           nll_r    lse_r - z_target, where it holds the target

and every rank joins them in the order of the ranks, in float64, hence with the same bits:

    lse = log sum_r exp(lse_r)          nll = nll_r + (lse - lse_r) of the rank r that holds the target
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels import check
from vig_kernels.problem import HeadProblem

IGNORED = -100  # of a rank's own problem, whose targets count from its first row
NO_TARGET = float("-inf")  # stands where a rank does not hold a row's target: no nll is that
HEADER = 3  # int64 words of a rank: first row, rows, checksum of the targets
PICK_BYTES = 8 << 20  # float64 copies of the rows whose logits are formed once more
GATHER = "pass the whole weight (weight.full_tensor()), or see docs/kernels.md, Sharded heads"


class VocabShard(NamedTuple):
    """Where a rank's rows of the head stand."""

    first_row: int
    group: str  # the name of the process group: custom ops take no group


# --- the door ---


class Arguments(NamedTuple):
    """What an op was called with, as plain local tensors."""

    hiddens: dict[str, Tensor]
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    token_weight: Tensor | None
    shard: VocabShard | None  # None for a head that is whole

    @property
    def least_rows(self) -> int:
        """Rows that the weight must have: a rank of many may be left without any."""
        return 1 if self.shard is None else 0


def local_arguments(
    hiddens: dict[str, Tensor],
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_shard: tuple | None,
    token_weight: Tensor | None = None,
) -> Arguments:
    """The local parts of DTensors that make a sharded head; everything as it is where there are none.

    Served: a weight with Shard(0) on a mesh of one dimension, the hidden states Replicate on the same mesh, the bias
    (if any) sharded like the weight; or plain tensors with vocab_shard=(first_row, process group). Anything else is
    refused: FSDP2's parameters have Shard(0) too, but there each rank has hidden rows of its own.
    """
    if vocab_shard is not None:
        if _is_dtensor(weight):
            raise TypeError(
                "weight is a DTensor, which says itself where its rows stand: leave vocab_shard out"
            )
        return Arguments(hiddens, weight, target, bias, token_weight, _given(vocab_shard))
    if not _is_dtensor(weight):
        return Arguments(hiddens, weight, target, bias, token_weight, None)
    mesh = weight.device_mesh
    if mesh.ndim != 1 or not _is_shard_0(weight):
        raise TypeError(
            f"weight is a DTensor with {weight.placements} on a mesh of shape {tuple(mesh.shape)}; served is "
            f"(Shard(dim=0),) on a mesh of one dimension: {GATHER}"
        )
    for name, value in hiddens.items():
        if not _is_replicated(value, mesh):
            raise TypeError(
                f"weight is a DTensor with {weight.placements}, but {name} is {_described(value)}: if all ranks hold "
                f"the same rows (tensor parallel), pass DTensor.from_local({name}, weight.device_mesh, [Replicate()]); "
                "if each has rows of its own (FSDP2), call the op inside the module's forward, where the weight is "
                f"whole, or {GATHER}"
            )
    if bias is not None and not (_is_dtensor(bias) and bias.device_mesh == mesh and _is_shard_0(bias)):
        raise TypeError(
            f"weight is sharded by rows, but bias is {_described(bias)}: shard it like the weight"
        )
    rest = {"target": target, "token_weight": token_weight}
    for name, value in rest.items():
        if _is_dtensor(value) and not _is_replicated(value, mesh):
            raise TypeError(
                f"expected {name} plain or Replicate on the mesh of weight, got {_described(value)}"
            )
    local = {name: value.to_local() if _is_dtensor(value) else value for name, value in rest.items()}
    return Arguments(
        {name: value.to_local() for name, value in hiddens.items()},
        weight.to_local(),
        local["target"],
        None if bias is None else bias.to_local(),
        local["token_weight"],
        _of_mesh(weight),
    )


def _is_dtensor(value) -> bool:
    return type(value).__name__ == "DTensor" and hasattr(value, "placements")


def _is_shard_0(value) -> bool:
    (placement,) = value.placements
    return type(placement).__name__ == "Shard" and placement.dim == 0


def _is_replicated(value, mesh) -> bool:
    if not _is_dtensor(value) or value.device_mesh != mesh:
        return False
    return all(placement.is_replicate() for placement in value.placements)


def _described(value) -> str:
    if not _is_dtensor(value):
        return f"a plain {type(value).__name__}"
    return f"a DTensor with {value.placements} on {value.device_mesh}"


def _of_mesh(weight) -> VocabShard:
    """A DTensor's Shard(0) cuts its rows as torch.chunk does: the last ranks may hold fewer, or none."""
    mesh = weight.device_mesh
    chunk = -(-weight.shape[0] // mesh.size())
    return VocabShard(min(mesh.get_local_rank() * chunk, weight.shape[0]), mesh.get_group().group_name)


def _given(vocab_shard) -> VocabShard:
    if not isinstance(vocab_shard, tuple) or len(vocab_shard) != 2:
        raise TypeError(f"expected vocab_shard=(first_row, process group), got {vocab_shard!r:.80}")
    first_row, group = check.integer("vocab_shard[0]", vocab_shard[0]), vocab_shard[1]
    check.require(first_row >= 0, ValueError, f"vocab_shard: first_row={first_row} is negative")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("vocab_shard needs a process group: call torch.distributed.init_process_group first")
    group = torch.distributed.group.WORLD if group is None else group
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"expected a torch.distributed.ProcessGroup in vocab_shard, got {group!r:.80}")
    return VocabShard(first_row, group.group_name)


# --- a rank's own part ---


def local_problem(problem: HeadProblem, shard: VocabShard) -> tuple[HeadProblem, Tensor]:
    """(the problem of this rank's rows of the head, which rows (N,) have their target among them).

    A row without a target here is given some row of the shard in its place: the log-sum-exp does not see it, and the
    callers take neither the nll nor a gradient from it. They are spread, since kernels walk over rows of one target.
    """
    rows = problem.weight.shape[0]
    ignored = problem.target == problem.ignore_index
    local = problem.target - shard.first_row
    here = (local >= 0) & (local < rows) & ~ignored
    local = local.remainder(max(1, rows)).masked_fill(ignored, IGNORED)
    return problem._replace(target=local, ignore_index=IGNORED), here


def best_logit(problem: HeadProblem, index: Tensor) -> Tensor:
    """(N,) float32 logits at `index`, the ranks' argmaxes, formed in float64; an index of -1 gives anything."""
    found = problem.hidden.new_full(index.shape, float("-inf"), dtype=torch.float32)
    if not problem.weight.shape[0]:
        return found
    step = max(1, PICK_BYTES // (8 * problem.hidden.shape[1]))
    for at in range(0, index.shape[0], step):
        part = slice(at, at + step)
        columns = index[part].clamp_min(0)
        z = (problem.hidden[part].double() * problem.weight[columns].double()).sum(1)
        if problem.bias is not None:
            z = z + problem.bias[columns].double()
        z = z * problem.logit_scale
        if problem.logit_softcap is not None:
            z = problem.logit_softcap * torch.tanh(z / problem.logit_softcap)
        found[part] = z
    return found


# --- the exchange ---


def process_group(shard: VocabShard):
    return torch.distributed.distributed_c10d._resolve_process_group(shard.group)


def all_gather(columns: Sequence[Tensor], problem: HeadProblem, shard: VocabShard) -> list[Tensor]:
    """(R, N) for each of the (N,) float32 or int32 columns, rank by rank, after one exchange.

    ValueError, on all ranks alike, where the ranks' rows do not make one head, their targets differ or no rank holds a
    target. Off the CPU that is looked at only with VIG_CHECK_TARGETS=1: it would stall the device.
    """
    target = problem.target
    header = target.new_empty(HEADER)
    header[0], header[1] = shard.first_row, problem.weight.shape[0]
    header[2] = (target * torch.arange(1, 2 * len(target), 2, device=target.device)).sum()
    sent = torch.cat([header.view(torch.int32), *(column.view(torch.int32) for column in columns)])
    group = process_group(shard)
    ranks = torch.distributed.get_world_size(group)
    gathered = sent.new_empty(ranks * len(sent))
    gather = getattr(torch.distributed, "all_gather_single", None)  # the name of torch 2.13
    (gather or torch.distributed.all_gather_into_tensor)(gathered, sent, group=group)
    gathered = gathered.view(ranks, -1)
    if check.looks_at_values(target):
        headers = gathered[:, : 2 * HEADER].reshape(-1).view(torch.int64).view(ranks, HEADER)
        vocabulary = _check_headers(headers.tolist())
        check.target_range(problem, vocabulary)
    found = gathered[:, 2 * HEADER :].view(ranks, len(columns), -1).unbind(1)
    return [part.view(column.dtype) for part, column in zip(found, columns, strict=True)]


def _check_headers(headers: list[list[int]]) -> int:
    """V of the whole head."""
    expected = 0
    for rank, (first_row, rows, checksum) in enumerate(headers):
        if first_row != expected:
            raise ValueError(
                f"the shards of the vocabulary do not join: rank {rank} holds rows {first_row} to "
                f"{first_row + rows - 1} where row {expected} was expected (ranks hold consecutive rows, in order)"
            )
        if checksum != headers[0][2]:
            raise ValueError(
                f"ranks 0 and {rank} of a sharded head have different targets: all ranks must pass the same rows. "
                f"Where each rank has rows of its own (data parallel, FSDP2), {GATHER}"
            )
        expected += rows
    return expected


# --- joining ---


class JoinedPass(NamedTuple):
    """What the ranks' parts of one softmax make together."""

    lse: Tensor  # (N,) float64
    parts: Tensor  # (R, N) float64: lse_r
    nll: Tensor  # (N,) float64, NaN where no rank holds the target

    def share(self) -> Tensor:
        """(R, N): the probability of each rank's rows, in all."""
        return (self.parts - self.lse).exp()

    def entropy(self, entropies: Tensor) -> Tensor:  # (R, N)
        """-sum_v p_v log p_v = sum_r s_r (H_r - log s_r), s_r: the share of rank r."""
        return self._mean(entropies.double() - (self.parts - self.lse))

    def divergence(self, other: JoinedPass, divergences: Tensor) -> Tensor:
        """KL(p || q) = sum_r s_r (KL_r + log s_r - log t_r), t_r: the share under q."""
        return self._mean(divergences.double() + ((self.parts - self.lse) - (other.parts - other.lse)))

    def _mean(self, values: Tensor) -> Tensor:
        share = self.share()
        return _sum(torch.where(share == 0, 0.0, share * values)).clamp_min(0.0)


def join(lse: Tensor, lse_lo: Tensor, nll: Tensor) -> JoinedPass:  # (R, N) each
    parts = lse.double() + lse_lo
    top = parts.amax(0)
    top = torch.where(top == float("-inf"), 0.0, top)
    total = top + _sum((parts - top).exp()).log()
    held = nll != NO_TARGET
    # a rank whose logits are all -inf knows no nll of its own; the whole head does
    rises = torch.where(
        parts == float("-inf"), torch.where(total.isfinite(), torch.inf, torch.nan), nll + (total - parts)
    )
    joined = torch.where(held, rises, 0.0)
    return JoinedPass(total, parts, _sum(joined).masked_fill(~held.any(0), torch.nan))


def _sum(parts: Tensor) -> Tensor:  # (R, N) -> (N,), in the order of the ranks
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def first_argmax(best: Tensor, index: Tensor) -> Tensor:  # (R, N) each
    """(N,) int64: the argmax, over the whole head, of the rank with the greatest logit; the first of equal ones."""
    top, found = best[0], index[0]
    for rank in range(1, len(best)):
        higher = best[rank] > top
        top, found = torch.where(higher, best[rank], top), torch.where(higher, index[rank], found)
    return found.long()
