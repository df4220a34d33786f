"""Token VIG: what the image adds to the log-probability of each answer token."""

from __future__ import annotations

from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from vig_kernels import check, dispatch, reference
from vig_kernels.ops import registration, sharded_heads, vocab_shards
from vig_kernels.problem import HEAD_SCHEMA, HeadProblem, empty_output, vig_of

STATS = sharded_heads.VIG_STATS


class TokenVIG(NamedTuple):
    vig: Tensor  # (...) float32, nats: nll_null - nll_image
    nll_image: Tensor  # (...) float32
    nll_null: Tensor  # (...) float32


def linear_vig(
    hidden_image: Tensor,  # (..., D)
    hidden_null: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    stats: tuple[str, ...] = (),
    vocab_shard: tuple | None = None,
    backend: str = "auto",
) -> TokenVIG | tuple[TokenVIG, dict[str, Tensor]]:
    """VIG_t = NLL(a_t | a_<t, Q, null image) - NLL(a_t | a_<t, Q, image), in nats, in one sweep of the weight.

    Token-level Visual Information Gain of arXiv 2602.17186, section 3; a sample's VIG is the mean over its answer
    tokens. Arguments, accuracy and errors are those of `linear_nll`, for two hidden states of one shape. Ignored
    rows give 0.0 three times; equal hidden states give exactly 0.0. `nll_image` has the bits of `linear_nll`,
    and vig those of nll_null - nll_image in float32, on every backend (in float64: `vig_kernels.reference.linear_vig`).
    No gradient. vocab_shard (and a DTensor weight): a head whose rows are spread over processes, as in `linear_nll`.

    stats: any of "kl", "entropy_image", "entropy_null" (nats), "argmax_image" and "argmax_null" (int64), (...) each: a
    pair (TokenVIG, {name: tensor}) is returned then. kl = KL(p_image || p_null) = sum_v p_v (log p_v - log q_v), at
    least 0, exactly 0 for equal hidden states, and within 1e-5 + 2e-6 (A_image + A_null) of float64, where A is the
    row's in the bound of `linear_nll`. They come from the same sweep, and VIG keeps its bits; only the triton backend
    forms the logits of both passes once more for "kl", in a sweep that holds both in one tile.
    """
    stats = check.stats(stats, STATS)
    hiddens = {"hidden_image": hidden_image, "hidden_null": hidden_null}
    given = vocab_shards.local_arguments(hiddens, weight, target, bias, vocab_shard)
    problem, null = check.linear(
        given.hiddens,
        given.weight,
        given.target,
        bias=given.bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        least_rows=given.least_rows,
    )
    name = dispatch.resolve("linear_vig", backend, problem.weight.device)
    wanted = [stat in stats for stat in STATS]
    if given.shard is not None:
        vig, nll_image, nll_null, *values = sharded_heads.vig_values(
            problem, null.hidden, stats, name, given.shard
        )
        values = dict(zip(compress(STATS, wanted), values, strict=True))
    elif name == "reference":
        check.target_range(problem)
        options = problem.reference_options() | {"stats": STATS}
        with torch.no_grad():
            found, values = reference.linear_vig(problem.hidden, null.hidden, *problem[1:3], **options)
        nll_image, nll_null = (x.float() for x in found[1:])
        vig = vig_of(nll_image, nll_null)  # as every backend: of the values that are returned
        values = {
            name: value if value.dtype == torch.int64 else value.float() for name, value in values.items()
        }
    else:
        check.forward_mode(problem.hidden, null.hidden, problem.weight, problem.bias)
        vig, nll_image, nll_null, *values = _op.without_grad(*problem, null.hidden, wanted, name)
        values = dict(zip(compress(STATS, wanted), values, strict=True))
    shape = hidden_image.shape[:-1]
    found = TokenVIG(*(check.in_shape(value, shape) for value in (vig, nll_image, nll_null)))
    return (found, {stat: check.in_shape(values[stat], shape) for stat in stats}) if stats else found


def _run(*args):
    """[vig, nll_image, nll_null, those of STATS that are wanted]; the problem's rows are those of the image pass."""
    problem, (hidden_null, wanted, backend) = HeadProblem(*args[:8]), args[8:]
    check.target_range(problem)
    if problem.target.numel() == 0:
        return _fake(*args)
    stats = tuple(compress(STATS, wanted))
    run = dispatch.module("linear_vig", backend).with_stats
    with check.no_autocast(problem.hidden.device):
        vig, nll_image, nll_null, values = run(problem, hidden_null, stats)
    return [vig, nll_image, nll_null, *(values[stat] for stat in stats)]


def _fake(*args):
    problem, rows = HeadProblem(*args[:8]), args[2].shape[0]
    return [empty_output(problem, name, rows) for name in (*TokenVIG._fields, *compress(STATS, args[9]))]


_op = registration.define(
    "linear_vig",
    f"({HEAD_SCHEMA}, Tensor hidden_null, bool[] wanted, str backend) -> Tensor[]",
    _run,
    _fake,
)
