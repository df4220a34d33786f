"""Steps: scoring and training of LM heads against cuBLAS of the same shape, eager PyTorch and the peers.

Training is told how many rows are kept, as the trainers tell it. The bare products of a case run in its own rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

import vig_kernels
from benchmarks import peers, score, train
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender
from benchmarks.heads import ScoreJudge, TrainJudge, make_inputs
from benchmarks.shapes import Shape

COMPILED = ("bare GEMM", "torch.compile")
BUDGETS_MIB = (240, 1024)  # of memory=MiB, beside "fast" and "low"
TINY = Shape("tiny", 24, 64, 300)


def shape_of(session: Session, given: Sequence) -> Shape:
    """A step's arguments come as JSON. Every shape is tiny in a rehearsal."""
    return TINY if session.rehearse else Shape(*given)


def budget_why_not(mib: int) -> str | None:
    """None where linear_cross_entropy takes a number of MiB."""
    hidden, weight = torch.zeros(1, 1), torch.zeros(1, 1)
    try:
        vig_kernels.linear_cross_entropy(
            hidden, weight, torch.zeros(1, dtype=torch.long), memory=mib, backend="torch"
        )
    except (TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def train_ours(device: str, rows: int) -> list[Contender]:
    """The library's loss with its memory settings, and with a frozen weight."""
    why_not = peers.backend("linear_cross_entropy", "triton", device)

    def loss(h, w, t, memory="fast"):
        return vig_kernels.linear_cross_entropy(h, w, t, memory=memory, backend="triton", num_kept=rows)

    def contender(name: str, function, why=why_not, frozen: bool = False) -> Contender:
        make = peers.forward_backward(function, frozen)
        return Contender(name, make, why, "loss", "promise", ours=True)

    return [
        contender("linear_cross_entropy", loss),
        *(
            contender(
                f"linear_cross_entropy, {mib} MiB",
                functools.partial(loss, memory=mib),
                lambda mib=mib: why_not() or budget_why_not(mib),
            )
            for mib in BUDGETS_MIB
        ),
        contender('linear_cross_entropy, memory="low"', functools.partial(loss, memory="low")),
        contender(peers.FROZEN, loss, frozen=True),
    ]


def _peers(session: Session, field: list[Contender], names: Sequence[str] | None) -> list[Contender]:
    """Those named; None: all but torch.compile, which has steps of its own at the end."""
    if names is None:
        return [contender for contender in field if not contender.compiles]
    return [contender for contender in field if contender.name in names]


def score_step(session: Session, given: Sequence, dtype: str, names: Sequence[str] | None) -> None:
    """One shape of scoring."""
    shape, kind = shape_of(session, given), getattr(torch, dtype)
    inputs = make_inputs(shape, kind, session.device)
    field = _peers(session, peers.score_peers(gpu=True), names)
    if names is not COMPILED:
        field += peers.score_ours("triton", session.device)
    result = session.contest(field, inputs, ScoreJudge(inputs))
    session.case(score.describe(shape, kind, result, score.COMPARISONS) | {"suite": "score"})


def train_step(session: Session, given: Sequence, dtype: str, names: Sequence[str] | None) -> None:
    """One shape of training: mean loss and both gradients."""
    shape, kind = shape_of(session, given), getattr(torch, dtype)
    inputs = make_inputs(shape, kind, session.device)
    upstream = torch.rand(shape.N, shape.V, device=session.device, dtype=kind)
    field = peers.bare_products(upstream) + _peers(session, peers.train_peers(gpu=True), names)
    if names is not COMPILED:
        field += train_ours(session.device, shape.N)
    result = session.contest(field, inputs, TrainJudge(inputs, upstream))
    session.case(score.describe(shape, kind, result, train.COMPARISONS) | {"suite": "train"})


def compiled_step(session: Session, given: Sequence) -> None:
    """torch.compile of the eager forms, which takes long to compile: last. In a rehearsal nothing is compiled."""
    if session.rehearse:
        session.case({"label": "torch.compile", "rows": [_not_rehearsed()]})
        return
    score_step(session, given, "bfloat16", COMPILED)
    train_step(session, given, "bfloat16", COMPILED)


def _not_rehearsed() -> dict:
    return {
        "name": "torch.compile", "ours": False, "baseline": False, "work": 1.0, "note": "", "status": "cannot run",
        "reason": "compiles for the device; left out of a rehearsal",
    }  # fmt: skip
