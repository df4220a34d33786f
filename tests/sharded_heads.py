"""A rank of a sharded head, run as `python sharded_heads.py RANK RANKS FOLDER BACKEND...`; its results are saved.

tests/test_sharded_heads.py starts the ranks and compares what they saved with one process.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
import torch.distributed as dist
from cases import Case, Inputs, make, runners
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vig_kernels import linear_cross_entropy, linear_nll, linear_vig

NLL_STATS = ("lse", "entropy", "argmax")
VIG_STATS = ("kl", "entropy_image", "entropy_null", "argmax_image", "argmax_null")
LOSS_STATS = ("nll", "lse", "entropy", "argmax")
BACKENDS = [backend for backend, device in runners("linear_nll") if device == "cpu"]
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
WIRE = {"N": 37, "D": 24}
MEMORY = {"N": 1500, "D": 64, "V": 70_000}  # V: of a rank


@dataclass(frozen=True)
class Sharded:
    case: Case
    targets: str = (
        "any"  # or "edges": the first and last row of each shard; "first": in the first shard alone
    )
    cut: str = (
        "even"  # or "uneven": ranks of 1, 2, ... rows, the last the rest; "empty": the last rank without any
    )
    masked: bool = False  # the bias of the second shard is -inf
    dtype: torch.dtype = torch.float32


SHARDED = {
    "ragged": Sharded(Case("", N=37, D=129, V=1001)),
    "edges": Sharded(Case("", N=24, D=33, V=90, ignored="none"), "edges", "uneven"),
    "no-target": Sharded(Case("", N=9, D=33, V=67), "first"),
    "all-ignored": Sharded(Case("", ignored="all")),
    "one-row": Sharded(Case("", N=1, D=64, V=300, ignored="none")),
    "no-rows": Sharded(Case("", N=0)),
    "no-words": Sharded(Case("", N=6, D=16, V=9), cut="empty"),
    "peaked": Sharded(Case("", N=8, D=32, V=90, scale=30.0)),
    "sunk": Sharded(Case("", N=8, D=40, V=100, bias=True, sunk=400.0)),  # lse is -395: a float32 steps by 3e-5
    "twins": Sharded(Case("", N=8, D=32, V=12, twins=True), cut="uneven"),
    "options": Sharded(
        Case("", N=20, D=70, V=257, bias=True, scale=3.0,
             options={"logit_scale": 1.7, "logit_softcap": 30.0, "ignore_index": 7}), "edges"
    ),
    "masked": Sharded(Case("", N=8, D=40, V=100, bias=True), "first", masked=True),
    "bfloat16": Sharded(Case("", N=37, D=129, V=1001), dtype=torch.bfloat16),
}  # fmt: skip


def bounds(sharded: Sharded, ranks: int) -> list[int]:
    """Where the shards begin, and V."""
    words = sharded.case.V
    if sharded.cut == "uneven":
        return [rank * (rank + 1) // 2 for rank in range(ranks)] + [words]
    if sharded.cut == "empty":
        return [rank * words // (ranks - 1) for rank in range(ranks)] + [words]
    return [rank * words // ranks for rank in range(ranks)] + [words]


def inputs(sharded: Sharded, ranks: int) -> tuple[Inputs, torch.Tensor]:
    """(leaves of the whole head, hidden states of the null pass), the same in every process."""
    made = make(sharded.case, sharded.dtype, seed=1)
    cuts, target = bounds(sharded, ranks), made.target
    kept = target != made.options.get("ignore_index", -100)
    if sharded.targets == "edges":
        ends = torch.tensor(sorted({*cuts[:-1], *(cut - 1 for cut in cuts[1:])} - {7}))
        target[kept] = ends[torch.arange(int(kept.sum())) % len(ends)]
    if sharded.targets == "first":
        target[kept] = target[kept] % cuts[1]
    if sharded.masked:
        made.options["bias"][cuts[1] : cuts[2]] = float("-inf")
    null = made.hidden + 0.3 * torch.randn(made.hidden.shape, generator=torch.Generator().manual_seed(2))
    for leaf in made.leaves():
        leaf.requires_grad_()
    return made, null.to(sharded.dtype)


def results(made: Inputs, null: torch.Tensor, backend: str, **shard) -> dict[str, torch.Tensor]:
    """Everything that the three ops give, gradients included; `made` holds the whole head or a rank's part."""
    rest = {"backend": backend, **made.options, **shard}
    draw = torch.Generator().manual_seed(3)
    rows = len(made.target)
    factors, token_weight = torch.randn(3, rows, generator=draw), torch.rand(rows, generator=draw)
    token_weight[3:4] = 0.0
    found = {}

    def gradients(name, loss):
        grads = torch.autograd.grad(loss, made.leaves())
        found.update({f"{name}.grad_{i}": grad for i, grad in enumerate(grads)})

    nll, stats = linear_nll(made.hidden, made.weight, made.target, stats=NLL_STATS, **rest)
    found |= {"nll": nll, **{f"nll.{stat}": value for stat, value in stats.items()}}
    gradients("nll", factors[0] @ nll + factors[1] @ stats["lse"] + factors[2] @ stats["entropy"])
    vig, stats = linear_vig(made.hidden, null, made.weight, made.target, stats=VIG_STATS, **rest)
    found |= {**vig._asdict(), **{f"vig.{stat}": value for stat, value in stats.items()}}
    losses = {
        "mean": {"stats": LOSS_STATS},
        "weighted": {"token_weight": token_weight, "z_loss": 0.01, "num_items": 11, "memory": "low"},
        "none": {"reduction": "none"},
    }
    for name, options in losses.items():
        loss = linear_cross_entropy(made.hidden, made.weight, made.target, **options, **rest)
        if "stats" in options:
            loss, stats = loss
            found |= {f"{name}.{stat}": value for stat, value in stats.items()}
        found[name] = loss
        gradients(name, loss if loss.ndim == 0 else loss @ factors[0])
    return {name: value.detach() for name, value in found.items()}


def part(made: Inputs, rows: slice) -> Inputs:
    """A rank's rows of a head, as leaves."""
    options = dict(made.options)
    if "bias" in options:
        options["bias"] = options["bias"].detach()[rows].requires_grad_()
    return replace(made, weight=made.weight.detach()[rows].requires_grad_(), options=options)


def run_cases(rank: int, ranks: int, backends: list[str]) -> dict:
    found = {}
    for name, sharded in SHARDED.items():
        made, null = inputs(sharded, ranks)
        first, last = bounds(sharded, ranks)[rank : rank + 2]
        for backend in backends:
            shard = {"vocab_shard": (first, dist.group.WORLD)}
            found[name, backend] = results(part(made, slice(first, last)), null, backend, **shard)
    return found


# --- against one process ---

# Differences of two larger values, whose norm is the measure: an entropy is lse less a mean logit.
DIFFERENCES = {"vig": "nll_null", "vig.kl": "nll.lse", "nll.entropy": "nll.lse", "mean.entropy": "mean.lse"}
DIFFERENCES |= dict.fromkeys(("vig.entropy_image", "vig.entropy_null"), "nll.lse")


def close(mine: torch.Tensor, one: torch.Tensor, norm: torch.Tensor) -> bool:
    """Within 1e-6 of a norm, infinite in the same places, integers equal."""
    if mine.shape != one.shape or mine.dtype != one.dtype:
        return False
    if one.dtype == torch.int64:
        return torch.equal(mine, one)
    mine, one = mine.double(), one.double()
    finite = one.isfinite()
    if not torch.equal(mine[~finite], one[~finite]):
        return False
    return bool((mine - one)[finite].norm() <= 1e-6 * norm + 1e-12)


def differing(mine: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """What is not within 1e-6 of one process."""
    assert mine.keys() == one.keys()
    norms = {name: value[value.isfinite()].double().norm() for name, value in one.items()}
    return {
        name: (mine[name], value)
        for name, value in one.items()
        if not close(mine[name], value, norms[DIFFERENCES.get(name, name)])
    }


def whole(ranks: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """A result of the whole head: gradients of weight (1) and bias (2) end to end, all else the same on every rank."""
    if name.endswith((".grad_1", ".grad_2")):
        return torch.cat([rank[name] for rank in ranks])
    for rank in ranks[1:]:
        assert torch.equal(ranks[0][name].nan_to_num(7), rank[name].nan_to_num(7)), (
            f"{name} differs between ranks"
        )
    return ranks[0][name]


# --- DTensors ---

DTENSOR_WORDS = (67, 5)  # 5 over 4 ranks: 2, 2, 1 and 0


def run_dtensors(mesh) -> dict:
    found = {}
    for words in DTENSOR_WORDS:
        made, null = inputs(Sharded(Case("", N=9, D=16, V=words, bias=True)), mesh.size())
        split = {name: distribute_tensor(tensor.detach(), mesh, [Shard(0)]).requires_grad_()
                 for name, tensor in (("weight", made.weight), ("bias", made.options["bias"]))}  # fmt: skip
        hidden, null = (DTensor.from_local(x.detach(), mesh, [Replicate()]) for x in (made.hidden, null))
        hidden.requires_grad_()
        served = Inputs(hidden, split["weight"], made.target, made.options | {"bias": split["bias"]})
        values = results(served, null, "auto")
        found[words] = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}
    return found


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(40.0).reshape(10, 4) / 40)

    def forward(self, hidden, target):
        return linear_cross_entropy(hidden, self.weight, target)


def run_fsdp2(rank: int, mesh) -> dict:
    """Rows of one's own beside a weight that is whole while the module runs, and sharded outside."""
    head = fully_shard(Head(), mesh=mesh, reshard_after_forward=True)
    hidden = torch.full((3, 4), rank + 1.0)
    loss = head(hidden, torch.arange(3) + rank)
    loss.backward()
    grad = head.weight.grad.full_tensor()
    return {"loss": loss.detach(), "grad": grad, "refused": refusal(hidden, head.weight, torch.arange(3))}


# --- refusals ---


def refusal(*arguments, **options) -> str:
    try:
        linear_nll(*arguments, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def run_refusals(rank: int, ranks: int, mesh) -> dict[str, str]:
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    replicated = DTensor.from_local(hidden, mesh, [Replicate()])
    split = distribute_tensor(torch.randn(10, 4), mesh, [Shard(0)])
    square = init_device_mesh("cpu", (ranks // 2, 2))
    shard = rank * 5, dist.group.WORLD
    return {
        "Shard(1)": refusal(replicated, split.redistribute(mesh, [Shard(1)]), target),
        "whole": refusal(replicated, split.redistribute(mesh, [Replicate()]), target),
        "two dimensions": refusal(
            replicated, distribute_tensor(torch.randn(10, 4), square, [Replicate(), Shard(0)]), target
        ),
        "plain hidden": refusal(hidden, split, target),
        "plain bias": refusal(replicated, split, target, bias=torch.randn(10)),
        "sharded target": refusal(replicated, split, distribute_tensor(torch.arange(3), mesh, [Shard(0)])),
        "both": refusal(replicated, split, target, vocab_shard=shard),
        "plain weight": refusal(replicated, weight, target),
        "no pair": refusal(hidden, weight, target, vocab_shard=rank),
        "no group": refusal(hidden, weight, target, vocab_shard=(0, "tp")),
        "negative": refusal(hidden, weight, target, vocab_shard=(-1, None)),
        "reference": refusal(hidden, weight, target, vocab_shard=shard, backend="reference"),
        "gap": refusal(hidden, weight, target, vocab_shard=(rank * 6, None)),
        "overlap": refusal(hidden, weight, target, vocab_shard=(0, None)),
        "own rows": refusal(hidden, weight, target + rank, vocab_shard=shard),
        "range": refusal(hidden, weight, torch.tensor([0, 5 * ranks, 1]), vocab_shard=shard),
        "below": refusal(hidden, weight, torch.tensor([0, -1, 1]), vocab_shard=shard),
    }


# --- what it costs ---


@contextmanager
def counted(calls: list):
    """Notes (name, bytes that this rank sends) of every collective."""
    kept = {name: getattr(dist, name) for name in (GATHER, "all_reduce")}

    def noting(name, argument):
        def call(*arguments, **options):
            calls.append((name, arguments[argument].nbytes))
            return kept[name](*arguments, **options)

        return call

    setattr(dist, GATHER, noting(GATHER, 1))
    dist.all_reduce = noting("all_reduce", 0)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def run_wire(rank: int) -> dict[str, list]:
    hidden, weight = torch.randn(WIRE["N"], WIRE["D"]), torch.randn(50, WIRE["D"])
    target, found = torch.arange(WIRE["N"]), {}

    def note(name, call):
        with counted(found.setdefault(name, [])):
            call()

    shard = {"vocab_shard": (rank * 50, None)}
    learned, trained = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    note("nll", lambda: linear_nll(hidden, weight, target, **shard))
    note("stats", lambda: linear_nll(hidden, weight, target, stats=NLL_STATS, **shard))
    note("vig", lambda: linear_vig(hidden, hidden, weight, target, **shard))
    note("vig stats", lambda: linear_vig(hidden, hidden, weight, target, stats=VIG_STATS, **shard))
    note("loss", lambda: linear_cross_entropy(learned, trained, target, **shard).backward())
    note("frozen hidden", lambda: linear_cross_entropy(hidden, trained, target, **shard).backward())
    return found


def run_memory(rank: int) -> dict[str, float]:
    """MiB that the resident set grows by beyond inputs and gradients."""
    rows, width, words = MEMORY.values()
    shard = {"vocab_shard": (rank * words, None)}
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw).requires_grad_()
    target = torch.randint(0, 2 * words, (rows,), generator=draw)
    weight = (torch.randn(words, width) * 0.02).requires_grad_()
    linear_cross_entropy(hidden[:4], weight[:9], target[:4] % 9, vocab_shard=(rank * 9, None)).backward()
    hidden.grad = weight.grad = None
    calls = {
        "score": lambda: linear_vig(hidden, hidden, weight, target, stats=VIG_STATS, **shard),
        "train": lambda: linear_cross_entropy(hidden, weight, target, stats=LOSS_STATS, **shard)[
            0
        ].backward(),
    }
    found = {name: _growth(call) for name, call in calls.items()}
    found["train"] -= (hidden.grad.nbytes + weight.grad.nbytes) / 2**20
    return found


def _growth(call) -> float:
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (peak[0] - before) / 2**20


def run(rank: int, ranks: int, folder: str, backends: list[str]) -> None:
    """All backends, and what does not depend on them; of one alone, the cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {"cases": run_cases(rank, ranks, backends)}
    if backends == BACKENDS:
        mesh = init_device_mesh("cpu", (ranks,))
        found |= {
            "dtensors": run_dtensors(mesh),
            "fsdp2": run_fsdp2(rank, mesh),
            "refusals": run_refusals(rank, ranks, mesh),
            "wire": run_wire(rank),
        }
        if ranks == 2:
            found["memory"] = run_memory(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
