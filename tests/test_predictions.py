"""Predicted times: what the model of a launch says by hand, and what must follow from what."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks import predictions, results
from benchmarks.predictions import GPUS, Launch, NotCounted

H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
MAIN = (8192, 4096, 151936)


def test_a_vendors_product_by_hand():
    """The longer of arithmetic and bytes, each at the rate that lasts."""
    flop, moved = 2.0 * 8192**3, 3 * 2.0 * 8192**2
    product = Launch("bare", flop=flop, moved=moved)
    assert predictions.seconds(product, H100, "bfloat16") == pytest.approx(flop / (0.80 * 989e12))
    assert predictions.seconds(replace(product, moved=1e12), H100, "bfloat16") == pytest.approx(
        1e12 / (0.9 * 3.35e12)
    )
    assert predictions.seconds(Launch("nothing"), H100, "bfloat16") == predictions.SMALL_S
    three = [replace(product, times=3)]
    once = 1e3 * (flop / (0.80 * 989e12) + predictions.GAP_S)
    assert predictions.call_ms(three, H100, "bfloat16") == pytest.approx(3 * once)


def test_waves_of_a_tile_kernel_by_hand(monkeypatch):
    """132 blocks at a time: 133 take twice as long. A second block on the multiprocessor hides the epilogue."""
    tile = predictions.tile_of("fold", "sm_90", "bfloat16", 4096)
    counts = {"resident_warps": tile.num_warps, "shortest_instructions": 1464, "shortest_special": 0}
    monkeypatch.setattr(predictions, "counts_of", lambda *_: counts)
    flop = 2.0 * tile.block_n * tile.block_v * 4096
    products = flop / (0.95 * 0.80 * 989e12 / 132)
    epilogue = tile.num_warps * 1464 / 4 / (0.80 * 1.83e9)
    for programs, waves in ((1, 1), (132, 1), (133, 2), (264, 2), (265, 3)):
        launch = Launch("fold", programs, flop * programs, 0.0, tile=tile)
        expected = waves * (products + epilogue + predictions.FILL_S)
        assert predictions.seconds(launch, H100, "bfloat16") == pytest.approx(expected), programs
    counts["resident_warps"] *= 2
    launch = Launch("fold", 264, flop * 264, 0.0, tile=tile)
    assert predictions.seconds(launch, H100, "bfloat16") == pytest.approx(2 * products)
    counts["shortest_special"] = 10**6  # bound by the special-function unit
    slow = predictions.epilogue(tile, counts, H100)
    assert slow == pytest.approx(tile.num_warps * 10**6 / 0.5 / (0.80 * 1.83e9))


def test_nothing_is_predicted_under_its_floor():
    found = predictions.predictions()
    assert {p.gpu for p in found} == {gpu.name for gpu in GPUS} == set(predictions.SUSTAINED)
    for p in found:
        assert p.predicted_ms > p.floor_ms > 0, p
        assert p.op == "gaussian_blur" or p.predicted_ms > p.products_ms, p


def test_training_multiplies_three_times_and_scoring_once():
    """FLOP of the launches, against N x D x V; ragged tiles are computed whole, hence a little more."""
    N, D, V = MAIN
    for launches, products in (
        (predictions.score(*MAIN, H100, "bfloat16"), 1),
        (predictions.score(*MAIN, H100, "bfloat16", 2), 2),
        (predictions.train(*MAIN, H100, "bfloat16"), 3),
    ):
        flop = sum(launch.times * launch.flop for launch in launches)
        assert 1 <= flop / (products * 2 * N * D * V) < 1.03


def test_a_row_that_is_not_counted_is_named():
    tile = replace(predictions.tile_of("fold", "sm_90", "bfloat16", 4096), group=7)
    with pytest.raises(
        NotCounted, match=r"sm_90 fold bfloat16 .* is not counted: run python -m benchmarks static"
    ):
        predictions.counts_of("fold", "sm_90", "bfloat16", tile)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_cards_are_found_by_the_name_of_the_device(device, card):
    found = predictions.card_of(device)
    assert (found and found.name) == card


def test_the_committed_page_is_what_the_code_gives():
    """From the committed counts; `python -m benchmarks report` writes it."""
    from benchmarks import report

    paths = report.Paths.default(None, None, None)
    page = (paths.readme.parent / "docs" / "kernels.md").read_text()
    for table in (*predictions.tables(), predictions.measured_table(results.read_full("gpu"))):
        for row in table:
            assert f"| {' | '.join(row)} |" in page, row
