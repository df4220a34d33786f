"""Who takes part in the LM-head suites: the library, bare matrix products, and the peers, each in its own words.

A peer that is not installed or cannot run on the device is listed with the reason. `pip install
"vig-kernels[bench-peers]"` brings those that are optional.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vig_kernels
from benchmarks.harness import Contender, can_run
from benchmarks.heads import HeadInputs
from vig_kernels import dispatch

IGNORE = -100
TRL_CHUNK = 32768  # vocabulary columns a tile, as TRL's trainers choose
TRL = "trl.kernels.chunked_logprob"
SPARSE = "linear_nll, 70 % of the rows ignored"
FROZEN = "linear_cross_entropy, frozen weight"
LESS_WORK = (SPARSE, FROZEN)  # asked for less than the peers are: compared with our own rows only
LIGER_NLL = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, target) -> nll or loss


def installed(package: str, pip_name: str) -> Callable[[], str | None]:
    """A why_not that asks whether `package` can be found."""
    return lambda: None if importlib.util.find_spec(package) else f"not installed (pip install {pip_name})"


def on_gpu(package: str, pip_name: str) -> Callable[[], str | None]:
    """A why_not for GPU-only peers."""

    def why_not() -> str | None:
        return installed(package, pip_name)() or (None if torch.cuda.is_available() else "needs a CUDA GPU")

    return why_not


def compiler() -> str | None:
    """torch.compile on a CPU needs a C++ compiler."""
    if torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler (g++ or clang++)"


def backend(op: str, name: str, device: str) -> Callable[[], str | None]:
    """A why_not for one backend of the library."""

    def why_not() -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA GPU"
        return dispatch.why_not(op, name, torch.device(device))

    return why_not


def eager_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What everybody writes first."""
    logits = F.linear(hidden, weight).float()
    return -torch.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, ignore_index=IGNORE)


def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """With the options that torch chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


def torch_wide_chunks(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """With the options that were found fastest on a CPU: few chunks, and sums in the dtype of the inputs."""
    rows = -(-hidden.shape[0] // 4)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="accurate", acc_dtype=hidden.dtype
    )
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


def torch_plain(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction)


def torch_has_it() -> str | None:
    has = hasattr(F, "linear_cross_entropy")
    return None if has else f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)"


def trl_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def cce(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str, impl: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, reduction=reduction, impl=impl)


def liger_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)
    return found[0] if isinstance(found, tuple) else found


def liger_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, target)


def quack_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target)


def mean_of(nll: Head) -> Head:
    """A mean loss from per-token values; no row is ignored in the train suite."""
    return lambda hidden, weight, target: nll(hidden, weight, target).mean()


def compiled(function: Head) -> Head:
    """Compiled for the shape of its first call, with nothing left of earlier shapes: their number is limited."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def forward_only(
    function: Head, compiles: bool = False, imports: str = ""
) -> Callable[[HeadInputs], Callable[[], Tensor]]:
    """make() of a scoring contender. Importing `imports` is not timed."""

    def make(inputs: HeadInputs):
        if imports:
            importlib.import_module(imports)
        called = compiled(function) if compiles else function

        @torch.no_grad()
        def run():
            return called(inputs.hidden, inputs.weight, inputs.target)

        return run

    return make


def forward_backward(function: Head, frozen: bool = False, compiles: bool = False, imports: str = ""):
    """make() of a training contender: () -> (loss, grad_hidden, grad_weight or None)."""

    def make(inputs: HeadInputs):
        if imports:
            importlib.import_module(imports)
        called = compiled(function) if compiles else function
        hidden, weight = inputs.leaves(frozen)

        def run():
            loss = called(hidden, weight, inputs.target)
            if frozen:
                return loss.detach(), *torch.autograd.grad(loss, (hidden,)), None
            return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

        return run

    return make


class Peer(NamedTuple):
    """One contender of the LM-head suites that is not ours; both suites are made from the table below."""

    name: str
    nll: Head | None = None  # per-token values, if it gives them
    loss: Head | None = None  # mean loss; None: the mean of `nll`
    why_not: Callable[[], str | None] = can_run
    nll_imports: str = ""  # imported before it is timed
    loss_imports: str = ""
    device: str = "any"  # any, cpu or gpu
    compiles: bool = False  # by itself, in its first call
    whole_compiled: bool = False  # by us, as a whole


def both(function: Callable[..., Tensor], **options: object) -> dict[str, Head]:
    """`nll` and `loss` of a peer whose one function takes `reduction`."""
    return {
        "nll": functools.partial(function, reduction="none", **options),
        "loss": functools.partial(function, reduction="mean", **options),
    }


CCE = "cut_cross_entropy"
LIGER_LOSS = "liger_kernel.transformers.functional"
PEERS = (
    Peer("eager PyTorch", eager_nll, eager_loss),
    Peer("torch.compile", eager_nll, eager_loss, compiler, whole_compiled=True),
    Peer("torch linear_cross_entropy", **both(torch_plain), why_not=torch_has_it),
    Peer("torch linear_cross_entropy, auto", **both(torch_chunked), why_not=torch_has_it),
    Peer("torch linear_cross_entropy, 4 chunks", **both(torch_wide_chunks), why_not=torch_has_it),
    Peer("TRL ChunkedLogProb", trl_nll, None, installed("trl", "trl"), TRL, TRL),
    Peer("CCE", **both(cce, impl="cce"), why_not=on_gpu(CCE, "cut-cross-entropy"),
         nll_imports=CCE, loss_imports=CCE, device="gpu"),
    Peer("CCE torch_compile", **both(cce, impl="torch_compile"), why_not=installed(CCE, "cut-cross-entropy"),
         nll_imports=CCE, loss_imports=CCE, device="cpu", compiles=True),
    Peer("Liger", liger_nll, liger_loss, on_gpu("liger_kernel", "liger-kernel"), LIGER_NLL, LIGER_LOSS, "gpu"),
    Peer("Liger, fallback", liger_nll, None, installed("liger_kernel", "liger-kernel"), LIGER_NLL, LIGER_NLL, "cpu"),
    Peer("quack", None, quack_loss, on_gpu("quack", "quack-kernels"), "", "quack.linear_cross_entropy", "gpu"),
)  # fmt: skip


def score_peers(gpu: bool) -> list[Contender]:
    """Everyone else's way to per-token negative log-likelihoods."""
    bare = Contender(
        "bare GEMM", forward_only(lambda h, w, t: F.linear(h, w)), output="logits", baseline=True
    )
    return [bare, *(_contender(row, row.nll, row.nll_imports, "nll", forward_only) for row in _peers_on(gpu))]


def score_ours(name: str, device: str) -> list[Contender]:
    """The library's ops on backend `name`; the suite's comparisons use these names."""

    def nll(h, w, t):
        return vig_kernels.linear_nll(h, w, t, backend=name)

    def paired(inputs: HeadInputs):
        def run():
            return vig_kernels.linear_vig(
                inputs.hidden, inputs.hidden_null, inputs.weight, inputs.target, backend=name
            )[1:]

        return run

    def sparse(inputs: HeadInputs):
        @torch.no_grad()
        def run():
            return nll(inputs.hidden, inputs.weight, inputs.sparse_target)

        return run

    def entry(label, make, output, op="linear_nll", **more):
        return Contender(label, make, backend(op, name, device), output, "promise", ours=True, **more)

    return [
        entry("linear_nll", forward_only(nll), "nll"),
        entry(SPARSE, sparse, "sparse"),
        entry("linear_vig, N + N rows", paired, "pair", "linear_vig", work=2.0, note="against two GEMMs"),
    ]


def bare_products(upstream: Tensor) -> list[Contender]:
    """The three products of a head's forward and backward, as torch runs them."""

    def product(label, output, function):
        def make(inputs: HeadInputs):
            return lambda: function(inputs.hidden, inputs.weight)

        return Contender(label, make, output=output, baseline=True)

    return [
        product("bare F.linear(h, w)", "logits", F.linear),
        product("bare g @ w", "hidden", lambda h, w: upstream @ w),
        product("bare g.t() @ h", "weight", lambda h, w: upstream.t() @ h),
    ]


def train_peers(gpu: bool) -> list[Contender]:
    """Everyone else's way to a mean loss with the gradients of hidden and weight."""
    return [
        _contender(row, row.loss or mean_of(row.nll), row.loss_imports, "loss", forward_backward)
        for row in _peers_on(gpu)
    ]


def _peers_on(gpu: bool) -> list[Peer]:
    return [row for row in PEERS if row.device in ("any", "gpu" if gpu else "cpu")]


def _contender(peer: Peer, function: Head | None, imports: str, output: str, make: Callable) -> Contender:
    """A suite's entry; one that does not give this output is listed with the reason."""
    why_not = (
        peer.why_not if function is not None else lambda: "gives sums and means only, no per-token values"
    )
    made = make(function or peer.loss, compiles=peer.whole_compiled, imports=imports)
    return Contender(peer.name, made, why_not, output, compiles=peer.compiles or peer.whole_compiled)


def train_ours(name: str, device: str) -> list[Contender]:
    """The library's loss on backend `name`: both memory settings, and a frozen weight."""

    def loss(h, w, t, memory="fast"):
        return vig_kernels.linear_cross_entropy(h, w, t, memory=memory, backend=name)

    why_not = backend("linear_cross_entropy", name, device)
    low = functools.partial(loss, memory="low")
    return [
        Contender("linear_cross_entropy", forward_backward(loss), why_not, "loss", "promise", ours=True),
        Contender(
            FROZEN,
            forward_backward(loss, True),
            why_not,
            "loss",
            "promise",
            ours=True,
        ),
        Contender(
            'linear_cross_entropy, memory="low"', forward_backward(low), why_not, "loss", "promise", ours=True
        ),
    ]
