"""Work is counted: one GEMM over the weight to score, three to train, four with recomputation."""

import checks
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vig_kernels.kernels.triton import tile_configs
from vig_kernels.ops import linear_cross_entropy
from vig_kernels.problem import HeadProblem, Needs, Saved, Upstream

KERNELS = checks.load("vig_kernels.kernels.triton")


class Tiles:
    """Counts the multiply-adds of every tile kernel that is launched: 2 x rows x columns x D."""

    def __init__(self, monkeypatch):
        self.flop = 0
        self.launches = 0
        for module, name, columns in (
            (KERNELS.logit_fold, "fold_kernel", "V"),
            (KERNELS.logit_gradients, "gradient_kernel", "columns"),
            (KERNELS.pair_fold, "pair_kernel", "V"),
        ):
            monkeypatch.setattr(module, name, Counted(getattr(module, name), self, columns))


class Counted:
    """A kernel that tells `Tiles` what it is launched with."""

    def __init__(self, kernel, tiles, columns):
        self.kernel, self.tiles, self.columns = kernel, tiles, columns

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            given = dict(zip(self.kernel.arg_names, arguments, strict=False))
            passes = 2 if self.kernel.__name__ == "pair_kernel" else given.get("passes", 1)
            self.tiles.flop += 2 * given["rows"] * passes * given[self.columns] * given["D"]
            self.tiles.launches += 1
            return self.kernel[grid](*arguments, **options)

        return launch


def test_one_pass_to_score(monkeypatch):
    hidden, weight, target, _ = checks.problem(N=40)
    tiles, gemm = Tiles(monkeypatch), 2 * 40 * 75 * 50
    with FlopCounterMode(display=False) as vendor:
        KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target), checks.STATS)
        assert tiles.flop == gemm and tiles.launches == 1
        KERNELS.linear_vig.with_stats(HeadProblem(hidden, weight, target), hidden + 1, ())
        assert tiles.flop == 3 * gemm and tiles.launches == 2, "both passes belong to one launch"
        KERNELS.linear_vig.with_stats(
            HeadProblem(hidden, weight, target), hidden + 1, ("kl", "entropy_image")
        )
        assert tiles.flop == 7 * gemm and tiles.launches == 4, "KL takes one product of each pass more"
    assert vendor.get_total_flops() == 0


def test_ignored_rows_have_no_tiles(monkeypatch):
    """Of 40 rows 8 are kept: one row tile of three does anything."""
    monkeypatch.setattr(tile_configs, "INTERPRETER", tile_configs.TileConfig(16, 32, 16, 1, 1, parts=2))
    hidden, weight, target, _ = checks.problem(N=40, ignored=False)
    target[8:] = -100
    products, dot_tile = [], KERNELS.logit_fold.dot_tile
    monkeypatch.setattr(KERNELS.logit_fold, "dot_tile", lambda *a: products.append(1) or dot_tile(*a))
    KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target), ())
    assert len(products) == 3  # the tiles of the vocabulary, for one row tile


def test_three_gemms_to_train_and_four_to_recompute(monkeypatch):
    hidden, weight, target, _ = checks.problem(N=40)
    kept = int((target != -100).sum())
    tiles = Tiles(monkeypatch)
    gemm = 2 * kept * 75 * 50

    def count(needs, dtype=torch.float32):
        tiles.flop = 0
        with FlopCounterMode(display=False) as vendor:
            head = HeadProblem(hidden.to(dtype), weight.to(dtype), target, num_kept=kept)
            checks.formed_gradients(KERNELS, head, None, 0.0, Needs(*needs))
        return (tiles.flop + vendor.get_total_flops()) / gemm

    assert count((True, True, False)) == 3, "ignored rows cost no GEMM when num_kept is given"
    assert count((True, True, False), torch.bfloat16) == 3, (
        "nor where the backward forms the weight's from a block"
    )
    assert count((True, False, False)) == 2, "a frozen weight costs no gradient GEMM"
    assert count((False, False, False)) == 40 / kept

    for num_kept, rows in ((None, 40), (kept, kept)):
        tiles.flop = 0
        with FlopCounterMode(display=False) as vendor:
            _, values = KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target), ("lse",))
            assert tiles.flop == 2 * 40 * 75 * 50
            KERNELS.linear_nll.backward(
                Upstream(torch.ones(40)),
                Saved(values["lse"]),
                HeadProblem(hidden, weight, target, num_kept=num_kept),
                Needs(True, True, False),
            )
        assert tiles.flop + vendor.get_total_flops() == (40 + 3 * rows) * 2 * 75 * 50, (
            "ignored rows are skipped"
        )


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((8192, 4096, 151936), True), ((16384, 4096, 151936), False), ((16384, 4096, 32064), True)],
)
def test_shapes_whose_gradients_are_formed_early(shape, kept):
    """16384 x 4096, whose float32 hidden gradient has 256 MiB, too; one block where it fits."""
    budget = linear_cross_entropy._fast_budget(torch.device("cuda"))
    needs = Needs(True, True, False)
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, shape[1], dtype=torch.bfloat16, device="cuda") for n in shape[::2])
        head = HeadProblem(hidden, weight, torch.empty(shape[0], dtype=torch.long, device="cuda"))
        assert linear_cross_entropy._fast(head, needs, None, "triton", budget)
        rows = KERNELS.linear_cross_entropy.kept_rows(head, needs, budget)
    assert rows == (shape[0] if kept else 0)
