"""Heads whose rows are spread over 2 and 4 processes (gloo) against one process that has them all."""

from __future__ import annotations

import pytest
import sharded_heads
import torch
from cases import assert_gradients, bound, eager_logits
from ranks import launch
from sharded_heads import BACKENDS, DTENSOR_WORDS, MEMORY, SHARDED, WIRE, differing, whole
from torch.utils.checkpoint import checkpoint

from vig_kernels import linear_cross_entropy, reference

RANKS = (2, 4)


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks}-ranks")
def found(request, tmp_path_factory) -> list[dict]:
    """What each rank has saved."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return launch(sharded_heads.__file__, request.param, folder, *BACKENDS, MALLOC_MMAP_THRESHOLD_="65536")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [name for name in SHARDED if name != "bfloat16"])
def test_equals_one_process(case, backend, found):
    """Loss, nll, statistics and gradients; what is not sharded has the same bits on every rank."""
    made, null = sharded_heads.inputs(SHARDED[case], len(found))
    one = sharded_heads.results(made, null, backend)
    parts = [rank["cases"][case, backend] for rank in found]
    assert differing({name: whole(parts, name) for name in parts[0]}, one) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend, found):
    """Values as in float32; the ranks' parts of the hidden gradient are rounded one by one, which eager does too."""
    made, null = sharded_heads.inputs(SHARDED["bfloat16"], len(found))
    one = sharded_heads.results(made, null, backend)
    parts = [rank["cases"]["bfloat16", backend] for rank in found]
    mine = {name: whole(parts, name) for name in parts[0]}
    assert all(".grad_" in name for name in differing(mine, one))
    exact = made.double()
    loss = reference.linear_cross_entropy(exact.hidden, exact.weight, exact.target)
    eager = torch.nn.functional.cross_entropy(eager_logits(made), made.target, ignore_index=-100)
    found = [mine["mean.grad_0"], mine["mean.grad_1"]]
    assert_gradients(
        (found, torch.autograd.grad(loss, exact.leaves()), torch.autograd.grad(eager, made.leaves()))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [name for name in SHARDED if name != "masked"])
def test_errs_as_little_as_one_process(case, backend, found):
    """Every nll, lse and entropy within 1e-5 + 1e-6 A of float64, KL within 1e-5 + 2e-6 (A_image + A_null)."""
    made, null = sharded_heads.inputs(SHARDED[case], len(found))
    options = {"ignore_index": -100, **made.options}
    names = ("lse", "entropy")
    nll, stats = reference.linear_nll(made.hidden, made.weight, made.target, stats=names, **options)
    _, kl = reference.linear_vig(made.hidden, null, made.weight, made.target, stats=("kl",), **options)
    mine = found[0]["cases"][case, backend]
    image, both = bound(made), 1e-5 + 2 * (bound(made) + bound(made, null) - 2e-5)
    assert ((mine["nll"] - nll).abs() <= image).all()
    for name in names:
        assert ((mine[f"nll.{name}"] - stats[name]).abs() <= image).all()
    assert ((mine["vig.kl"] - kl["kl"]).abs() <= both).all()


@pytest.mark.parametrize("words", DTENSOR_WORDS)
def test_dtensors(words, found):
    """Shard(0) beside Replicate, as tensor-parallel plans make them; a rank may hold no row at all."""
    case = sharded_heads.Sharded(sharded_heads.Case("", N=9, D=16, V=words, bias=True))
    made, null = sharded_heads.inputs(case, len(found))
    one = sharded_heads.results(made, null, "auto")
    for rank in found:
        assert differing(rank["dtensors"][words], one) == {}


def test_fsdp2_is_whole_in_its_forward_and_refused_outside(found):
    """Its weights have Shard(0) too, but every rank has rows of its own."""
    losses, head = [], sharded_heads.Head()
    for rank, saved in enumerate(found):
        loss = head(torch.full((3, 4), rank + 1.0), torch.arange(3) + rank)
        torch.testing.assert_close(saved["fsdp2"]["loss"], loss.detach())
        assert saved["fsdp2"]["refused"].startswith(
            "TypeError: weight is a DTensor with (Shard(dim=0),), but hidden is"
        )
        assert "FSDP2" in saved["fsdp2"]["refused"]
        losses.append(loss)
    (mean,) = torch.autograd.grad(sum(losses) / len(losses), head.weight)
    torch.testing.assert_close(found[-1]["fsdp2"]["grad"], mean)


REFUSALS = {
    "Shard(1)": "TypeError: weight is a DTensor with (Shard(dim=1),) on a mesh of shape ({ranks},); served is (Shard",
    "whole": "TypeError: weight is a DTensor with (Replicate(),)",
    "two dimensions": "TypeError: weight is a DTensor with (Replicate(), Shard(dim=0)) on a mesh of shape ({half}, 2)",
    "plain hidden": "TypeError: weight is a DTensor with (Shard(dim=0),), but hidden is a plain Tensor: if all ranks",
    "plain bias": "TypeError: weight is sharded by rows, but bias is a plain Tensor: shard it like the weight",
    "sharded target": "TypeError: expected target plain or Replicate on the mesh of weight, got a DTensor with (Shard",
    "both": "TypeError: weight is a DTensor, which says itself where its rows stand: leave vocab_shard out",
    "plain weight": "TypeError: hidden is a DTensor",
    "no pair": "TypeError: expected vocab_shard=(first_row, process group), got",
    "no group": "TypeError: expected a torch.distributed.ProcessGroup in vocab_shard, got 'tp'",
    "negative": "ValueError: vocab_shard: first_row=-1 is negative",
    "reference": "ValueError: backend='reference' does not serve sharded heads: pass the whole weight",
    "gap": "ValueError: the shards of the vocabulary do not join: rank 1 holds rows 6 to 10 where row 5 was expected",
    "overlap": "ValueError: the shards of the vocabulary do not join: rank 1 holds rows 0 to 4 where row 5 was",
    "own rows": "ValueError: ranks 0 and 1 of a sharded head have different targets",
    "range": "ValueError: target[1] = {words} is not in [0, {words}) and is not ignore_index=-100",
    "below": "ValueError: target[1] = -1 is not in [0, {words})",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_say_the_cure_on_every_rank(what, found):
    ranks = len(found)
    expected = REFUSALS[what].format(ranks=ranks, half=ranks // 2, words=5 * ranks)
    for rank in found:
        assert rank["refusals"][what].startswith(expected), rank["refusals"][what]


def test_a_shard_needs_a_process_group():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        sharded_heads.linear_nll(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), vocab_shard=(0, None))


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_opcheck(alone):
    made, null = sharded_heads.inputs(SHARDED["options"], 1)
    options = [made.options[name] for name in ("bias", "logit_scale", "logit_softcap", "ignore_index")]
    head = made.hidden, made.weight, made.target, *options, None, 0, alone.group_name
    ops = torch.ops.vig_kernels
    torch.library.opcheck(ops.sharded_nll.default, (*head, [True] * 4, "torch"))
    with torch.no_grad():
        torch.library.opcheck(ops.sharded_vig.default, (*head, null, [True] * 5, "torch"))


def test_compiles_whole(alone):
    made, _ = sharded_heads.inputs(SHARDED["ragged"], 1)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, made.target, vocab_shard=(0, None), z_loss=0.1)

    expected = torch.autograd.grad(loss(made.hidden, made.weight), made.leaves())
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(made.hidden, made.weight), made.leaves())
    assert all(map(torch.equal, found, expected))


def test_checkpointing_and_a_second_backward(alone):
    made, _ = sharded_heads.inputs(SHARDED["ragged"], 1)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, made.target, vocab_shard=(0, alone))

    once = loss(made.hidden, made.weight)
    expected = torch.autograd.grad(once, made.leaves(), retain_graph=True)
    for reentered in (once, checkpoint(loss, made.hidden, made.weight, use_reentrant=False)):
        found = torch.autograd.grad(reentered, made.leaves(), create_graph=True)
        assert all(map(torch.equal, found, expected))
        with pytest.raises(RuntimeError):
            torch.autograd.grad(found[0].sum(), made.leaves())


def test_wire_bytes(found):
    """12 bytes a row and pass, 24 a rank; 4 more for entropy and KL, 8 for argmax; the hidden gradient once."""
    rows, width = WIRE.values()
    gather, reduce = sharded_heads.GATHER, "all_reduce"
    for rank in found:
        assert rank["wire"] == {
            "nll": [(gather, 12 * rows + 24)],
            "stats": [(gather, 24 * rows + 24)],
            "vig": [(gather, 24 * rows + 24)],
            "vig stats": [(gather, 52 * rows + 24)],
            "loss": [(gather, 12 * rows + 24), (reduce, 4 * rows * width)],
            "frozen hidden": [(gather, 12 * rows + 24)],
        }


def test_memory_of_a_rank(found):
    """Logits of the rank's words alone would take 420 MB."""
    assert 4 * MEMORY["N"] * MEMORY["V"] > 400e6
    for rank in found:
        if "memory" not in rank:
            pytest.skip("counted with two ranks")
        assert rank["memory"]["score"] <= 64, rank["memory"]
        assert rank["memory"]["train"] <= 256, rank["memory"]
