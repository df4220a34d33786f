"""linear_nll and linear_vig of a head whose rows are spread over processes: the ops of one shard, joined.

Every rank runs the same backend on its own rows of the head (`vocab_shards.py`). The backward is that of linear_nll on
those rows, with the log-sum-exp and the entropy of the whole head handed in: p = exp(z - lse) of an entry then needs
nothing from the other ranks. A row whose target another rank holds gets its softmax part alone. The weight's gradient
stays on its rank; the hidden gradient is the sum over the ranks, one all-reduce in the dtype of hidden.
"""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from vig_kernels import check, dispatch
from vig_kernels.ops import registration, vocab_shards
from vig_kernels.ops.nll_autograd import STATS, derivative, fake_gradients
from vig_kernels.ops.vocab_shards import NO_TARGET, VocabShard
from vig_kernels.problem import (
    HEAD_SCHEMA,
    HeadProblem,
    Needs,
    Saved,
    Upstream,
    empty_output,
    vig_of,
    with_lse_lo,
)

SHARD_SCHEMA = "int first_row, str group"


def nll_values(
    problem: HeadProblem, stats: tuple[str, ...], backend: str, shard: VocabShard
) -> dict[str, Tensor]:
    """As `linear_nll.nll_values`, for this rank's shard of the head; the same values on every rank."""
    _refuse_reference(backend)
    check.transforms(problem.hidden, problem.weight, problem.bias)
    grad = torch.is_grad_enabled() and any(
        map(check.wants_grad, (problem.hidden, problem.weight, problem.bias))
    )
    wanted = [grad or "lse" in stats, "entropy" in stats, "argmax" in stats, grad]
    nll, *values = _nll_op(*problem, *shard, wanted, backend)
    return {"nll": nll} | dict(zip(compress(STATS, wanted), values, strict=True))


def _refuse_reference(backend: str) -> None:
    if backend == "reference":
        raise ValueError(f"backend='reference' does not serve sharded heads: {vocab_shards.GATHER}")


# --- a rank's sweep ---


def _part_columns(
    problem: HeadProblem, here: Tensor, values: dict[str, Tensor], stats: tuple[str, ...], first_row: int
) -> list[Tensor]:
    """What one rank sends of one pass: lse, lse_lo, nll, and of `stats` the entropy, the best logit and its row."""
    columns = [values["lse"], values["lse_lo"], torch.where(here, values["nll"], NO_TARGET)]
    if "entropy" in stats:
        columns.append(values["entropy"])
    if "argmax" in stats:
        columns += [vocab_shards.best_logit(problem, values["argmax"]), (values["argmax"] + first_row).int()]
    return columns


def _is_empty(problem: HeadProblem) -> bool:
    """Whether a rank holds no row of the head, or none that is not masked by a bias of -inf (looked at on CPUs)."""
    _, weight, _, bias, scale, cap = problem[:6]
    if not weight.shape[0]:
        return True
    if bias is None or not check.on_cpu(bias) or cap is not None or scale <= 0:
        return False
    return bool((bias == float("-inf")).all())


def _without_rows(problem: HeadProblem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The values of a rank that holds nothing: they weigh nothing."""
    values = {name: empty_output(problem, name, problem.target.shape[0]).zero_() for name in names}
    for name in values:
        if name.startswith("lse") and not name.startswith("lse_lo"):
            values[name].fill_(float("-inf"))
    return values


def _joined_pass(columns: list[Tensor], stats: tuple[str, ...], problem: HeadProblem):
    """(JoinedPass, {name: (N,) tensor}) of the (R, N) columns of one pass, which are taken from the list."""
    joined = vocab_shards.join(columns.pop(0), columns.pop(0), columns.pop(0))
    lse = joined.lse.float()
    values = {
        "nll": joined.nll.float(),
        "lse": lse,
        "lse_lo": torch.where(lse.isfinite(), joined.lse - lse, 0.0).float(),
    }
    if "entropy" in stats:
        values["entropy"] = joined.entropy(columns.pop(0)).float()
    if "argmax" in stats:
        values["argmax"] = vocab_shards.first_argmax(columns.pop(0), columns.pop(0))
    return joined, {name: _silent(value, problem, name) for name, value in values.items()}


def _silent(value: Tensor, problem: HeadProblem, name: str) -> Tensor:
    return value.masked_fill(problem.target == problem.ignore_index, -1 if name.startswith("argmax") else 0)


# --- linear_nll ---


def _nll(*args):
    """[nll, those of STATS that are wanted] of the whole head, from this rank's rows of it."""
    problem, shard, (wanted, backend) = HeadProblem(*args[:8]), VocabShard(*args[8:10]), args[10:]
    check.num_kept(problem)
    if problem.target.numel() == 0:
        return _nll_fake(*args)
    local, here = vocab_shards.local_problem(problem, shard)
    stats = tuple(name for name, asked in zip(STATS[1:3], wanted[1:3], strict=True) if asked)
    names = ("lse", *stats, "lse_lo")
    with check.no_autocast(problem.hidden.device):
        if not _is_empty(local):
            nll, values = dispatch.module("linear_nll", backend).forward(local, names)
            values = {"nll": nll} | values
        else:
            values = _without_rows(local, ("nll", *names))
        columns = vocab_shards.all_gather(
            _part_columns(local, here, values, stats, shard.first_row), problem, shard
        )
        _, values = _joined_pass(columns, stats, problem)
    return [values[name] for name in ("nll", *compress(STATS, wanted))]


def _nll_fake(*args):
    problem, rows = HeadProblem(*args[:8]), args[2].shape[0]
    return [empty_output(problem, name, rows) for name in ("nll", *compress(STATS, args[10]))]


def _nll_backward(*args):
    """Gradients of hidden (summed over the ranks) and of this rank's weight and bias, empty where not needed.

    d loss / d z_v = p_v (g_nll + g_lse - ...) - [v = target] g_nll: where another rank holds the target, g_nll goes
    into g_lse and leaves only its softmax part.
    """
    problem, shard = HeadProblem(*args[:8]), VocabShard(*args[8:10])
    lse, lse_lo, entropy, needs, backend = args[13:]
    local, here = vocab_shards.local_problem(problem, shard)
    nll, by_lse, by_entropy = (None if grad is None else grad.float().contiguous() for grad in args[10:13])
    if nll is not None:
        elsewhere = torch.where(here, 0.0, nll)
        nll, by_lse = torch.where(here, nll, 0.0), elsewhere if by_lse is None else by_lse + elsewhere
    upstream, saved = with_lse_lo(Upstream(nll, by_lse, by_entropy), Saved(lse, entropy), lse_lo)
    inputs = problem.hidden, problem.weight, problem.bias
    with check.no_autocast(problem.hidden.device):
        if problem.weight.shape[0]:
            found = dispatch.module("linear_nll", backend).backward(upstream, saved, local, Needs(*needs))
        else:
            found = [x.new_zeros(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
    found = [problem.hidden.new_empty(0) if grad is None else grad for grad in found]
    if needs[0]:
        found[0] = found[0].contiguous()
        torch.distributed.all_reduce(found[0], group=vocab_shards.process_group(shard))
    return tuple(found)


_nll_backward_op = registration.define(
    "sharded_nll_backward",
    f"({HEAD_SCHEMA}, {SHARD_SCHEMA}, Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_entropy, Tensor lse, "
    "Tensor lse_lo, Tensor? entropy, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _nll_backward,
    fake_gradients,
)
_nll_op = registration.define(
    "sharded_nll",
    f"({HEAD_SCHEMA}, {SHARD_SCHEMA}, bool[] wanted, str backend) -> Tensor[]",
    _nll,
    _nll_fake,
    derivative(_nll_backward_op, lambda args: args[10], between=len(VocabShard._fields)),
)


# --- linear_vig ---

VIG_STATS = ("kl", "entropy_image", "entropy_null", "argmax_image", "argmax_null")
SUMS = ("lse_image", "lse_lo_image", "lse_null", "lse_lo_null")


def vig_values(
    problem: HeadProblem, hidden_null: Tensor, stats: tuple[str, ...], backend: str, shard: VocabShard
) -> list[Tensor]:
    """[vig, nll_image, nll_null, those of VIG_STATS that are asked for]; the same values on every rank."""
    _refuse_reference(backend)
    check.forward_mode(problem.hidden, hidden_null, problem.weight, problem.bias)
    wanted = [stat in stats for stat in VIG_STATS]
    return _vig_op.without_grad(*problem, *shard, hidden_null, wanted, backend)


def _vig(*args):
    problem, shard, (hidden_null, wanted, backend) = (
        HeadProblem(*args[:8]),
        VocabShard(*args[8:10]),
        args[10:],
    )
    if problem.target.numel() == 0:
        return _vig_fake(*args)
    local, here = vocab_shards.local_problem(problem, shard)
    stats = tuple(compress(VIG_STATS, wanted))
    with check.no_autocast(problem.hidden.device):
        found = _vig_part(local, hidden_null, (*SUMS, *stats), backend)
        of_pass, columns = {}, []
        for name, hidden in (("image", local.hidden), ("null", hidden_null)):
            end = f"_{name}"
            own = {key.removesuffix(end): value for key, value in found.items() if key.endswith(end)}
            of_pass[name] = tuple(stat.removesuffix(end) for stat in stats if stat.endswith(end))
            rows = local._replace(hidden=hidden)
            columns += _part_columns(rows, here, own, of_pass[name], shard.first_row)
        if "kl" in stats:
            columns.append(found["kl"])
        columns = vocab_shards.all_gather(columns, problem, shard)
        passes, values = [], {}
        for name in ("image", "null"):
            joined, own = _joined_pass(columns, of_pass[name], problem)
            passes.append(joined)
            values |= {f"{key}_{name}": value for key, value in own.items()}
        if "kl" in stats:
            values["kl"] = _silent(passes[0].divergence(passes[1], columns.pop(0)).float(), problem, "kl")
    image, null = values["nll_image"], values["nll_null"]
    return [vig_of(image, null), image, null, *(values[stat] for stat in stats)]


def _vig_part(
    local: HeadProblem, hidden_null: Tensor, names: tuple[str, ...], backend: str
) -> dict[str, Tensor]:
    """{"nll_image", "nll_null", name: (N,)} of this rank's rows alone."""
    if _is_empty(local):
        return _without_rows(local, ("nll_image", "nll_null", *names))
    run = dispatch.module("linear_vig", backend).with_stats
    _, nll_image, nll_null, values = run(local, hidden_null, names)
    return {"nll_image": nll_image, "nll_null": nll_null} | values


def _vig_fake(*args):
    problem, rows = HeadProblem(*args[:8]), args[2].shape[0]
    names = "vig", "nll_image", "nll_null", *compress(VIG_STATS, args[11])
    return [empty_output(problem, name, rows) for name in names]


_vig_op = registration.define(
    "sharded_vig",
    f"({HEAD_SCHEMA}, {SHARD_SCHEMA}, Tensor hidden_null, bool[] wanted, str backend) -> Tensor[]",
    _vig,
    _vig_fake,
)
