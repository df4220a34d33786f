"""The Triton kernels in the interpreter against float64: values, gradients, blur, offsets, bits."""

from dataclasses import replace

import checks
import pytest
import torch
import triton
from cases import CASES, Case, make
from torch.utils._python_dispatch import TorchDispatchMode

from vig_kernels import reference
from vig_kernels.kernels import triton as triton_backend
from vig_kernels.kernels.triton import launch, row_order, tile_configs
from vig_kernels.kernels.triton.tile_configs import TileConfig
from vig_kernels.problem import Gaussian, HeadProblem, Needs, Saved, Upstream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = TileConfig(16, 32, 16, 1, 1, parts=2, group=2)
KERNELS = checks.load("vig_kernels.kernels.triton")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that every loop and every border of the kernels is met by small inputs."""
    monkeypatch.setattr(tile_configs, "INTERPRETER", SMALL)


LONG = ("tiles-of-N", "tiles-of-V")  # once is enough


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in CASES
        for dtype in DTYPES
        if case.N and (case.name not in LONG or dtype == DTYPES[0])
    ],
    ids=str,
)
def test_shared_cases(case: Case, dtype):
    inputs = make(case, dtype)
    options = checks.OPTIONS | inputs.options
    target = inputs.target.masked_fill(inputs.target == options.pop("ignore_index", -100), -100)
    checks.assert_forward(KERNELS, inputs.hidden, inputs.weight, target, options)


@every_dtype
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("descriptor", [False, True])
def test_small_tiles(dtype, parts, descriptor, monkeypatch):
    config = TileConfig(16, 32, 16, 1, 1, parts=parts, group=2, descriptor=descriptor)
    monkeypatch.setattr(tile_configs, "INTERPRETER", config)
    checks.check_fold_and_combine(KERNELS, dtype)
    hidden, weight, target, _ = checks.problem(N=18, D=48, V=66, dtype=dtype)
    checks.assert_forward(
        KERNELS, hidden, weight, target, checks.OPTIONS
    )  # 16-byte rows: descriptors are used


@pytest.mark.parametrize(
    ("dtype", "D", "block_k"),
    [
        (DTYPES[1], 72, 64),
        (DTYPES[2], 8, 64),  # less than a block
        (DTYPES[1], 1000, 64),
        (DTYPES[0], 36, 16),
        (DTYPES[0], 4, 32),
    ],
    ids=str,
)
def test_a_width_that_cuts_a_block(dtype, D, block_k):
    checks.check_width_that_cuts_a_block(KERNELS, dtype, D, block_k)


def test_rows_of_logits_around_ten_thousand(small_tiles):
    hidden, weight, target, _ = checks.problem(spread=2000.0)
    checks.assert_forward(KERNELS, hidden, weight, target, checks.OPTIONS)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-3, 40.0])
def test_scales_that_fold_into_the_exponent_and_others(scale, small_tiles):
    hidden, weight, target, _ = checks.problem()
    checks.assert_forward(KERNELS, hidden, weight, target, checks.OPTIONS | {"logit_scale": scale})


def test_order_of_the_rows():
    checks.check_order(KERNELS)


def test_hidden_rows_off_16_byte_borders_are_copied():
    rows = torch.randn(5, 40)
    for view in (rows[:, 1:9], rows.flatten()[1:33].view(4, 8), torch.randn(5, 10)[:, :8]):
        copy = launch.aligned(view)
        assert torch.equal(copy, view) and copy.data_ptr() % 16 == 0 and copy.stride() == (8, 1)
    for view in (rows, rows[:, 4:12], rows[:, :7]):  # of a width that never fits, a copy would not help
        assert launch.aligned(view) is view


def test_first_of_equal_maxima(small_tiles):
    checks.check_first_of_equal_maxima(KERNELS)


def test_bad_targets_and_masked_words(small_tiles):
    checks.check_bad_targets_and_masked_words(KERNELS)


def test_chunks_and_company_change_no_bits(small_tiles):
    checks.check_chunks_and_company(KERNELS)


@pytest.mark.parametrize(
    ("dtype", "parts", "descriptor"),
    [(DTYPES[0], 1, False), (DTYPES[1], 2, True), (DTYPES[2], 2, False)],
    ids=str,
)
def test_divergence(dtype, parts, descriptor, monkeypatch):
    config = TileConfig(16, 32, 16, 1, 1, parts=parts, group=2, descriptor=descriptor)
    monkeypatch.setattr(tile_configs, "INTERPRETER", config)
    checks.check_divergence(KERNELS, dtype)
    hidden, null, weight, target, _ = checks.pair_problem(dtype, N=18, D=48, V=66)
    checks.assert_divergence(KERNELS, hidden, null, weight, target, checks.OPTIONS)


def test_divergence_of_all_sorts(small_tiles):
    checks.check_divergence_of_many_parts(KERNELS)
    checks.check_divergence_where_words_are_ruled_out(KERNELS)
    checks.check_divergence_of_shifted_logits(KERNELS)
    checks.check_chunks_and_company_of_a_pair(KERNELS)
    hidden, null, weight, target, _ = checks.pair_problem()
    with_target_beyond = HeadProblem(hidden, weight, target.clamp_min(0) + 75, ignore_index=75)
    kl = KERNELS.pair_fold.divergence(with_target_beyond, null)
    assert kl.isfinite().all() and kl[target > 0].any(), "KL needs no target"
    weight[3] = torch.nan
    assert KERNELS.pair_fold.divergence(HeadProblem(hidden, weight, target), null)[target >= 0].isnan().all()


def test_ignored_rows_cost_nothing_in_any_chunk(small_tiles):
    hidden, weight, target, _ = checks.problem(N=40, ignored=False)
    target[20:] = -100
    order, count = row_order.compaction_order(target, -100)
    module, config = KERNELS.logit_fold, tile_configs.INTERPRETER
    for first, rows in ((0, 16), (16, 16), (32, 8)):
        partials = module.Partials(rows, 1, 75, config, (), hidden.device)
        partials.max.fill_(7.0)  # no logit of these
        chunk = row_order.RowChunk(order, count, first, rows)
        module.fold(HeadProblem(hidden, weight, target), None, chunk, partials, config)
        assert torch.equal((partials.max != 7.0).all(0), first + torch.arange(rows) < 20)
        assert (partials.max[:, first + torch.arange(rows) >= 20] == 7.0).all()


def test_equal_passes_give_equal_values(small_tiles):
    hidden, weight, target, _ = checks.problem()
    vig, image, null, _ = KERNELS.linear_vig.with_stats(
        HeadProblem(hidden, weight, target), hidden.clone(), ()
    )
    assert torch.equal(image, null) and not vig.any()


@every_dtype
def test_gradients_for_any_upstream(dtype, small_tiles):
    checks.check_gradients(KERNELS, dtype)


@pytest.mark.parametrize("kinds", [("nll",), ("lse",)], ids=str)
def test_gradients_of_one_value(kinds, small_tiles):
    checks.check_gradients(KERNELS, torch.float32, kinds)


@every_dtype
def test_gradients_in_one_block(dtype):
    checks.check_gradients(KERNELS, dtype, cap=None, chunks=False)


@every_dtype
@pytest.mark.parametrize("num_kept", [True, False])
def test_training(dtype, num_kept, small_tiles):
    checks.check_training(KERNELS, dtype, num_kept)


@every_dtype
def test_training_in_one_chunk(dtype):
    checks.check_training(KERNELS, dtype, cap=None, chunk_rows=4096)


def test_loss_of_all_rows():
    checks.check_loss_sum(KERNELS)


def test_gradients_from_a_kept_block():
    checks.check_kept_block(KERNELS)


def test_target_residual():
    checks.check_target_residual(KERNELS)


def test_what_16_bits_lose_is_given_back(small_tiles):
    checks.check_what_16_bits_lose(KERNELS)


def test_log_sum_exp_is_two_floats(small_tiles):
    checks.check_low_part_of_lse(KERNELS)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_not_needed_is_not_made(needs, small_tiles):
    hidden, weight, target, bias = checks.problem(bias=True)
    found = KERNELS.linear_cross_entropy.forward_backward(
        HeadProblem(hidden, weight, target, bias), None, 0.0, Needs(*needs), checks.BUDGET
    )
    assert tuple(gradient is not None for gradient in found[1:4]) == needs


def test_nothing_kept(small_tiles):
    hidden, weight, target, bias = checks.problem(bias=True)
    target[:] = -100
    for num_kept in (None, 0):
        head = HeadProblem(hidden, weight, target, bias, 1.0, 3.0, num_kept=num_kept)
        loss, *gradients = checks.formed_gradients(KERNELS, head, None, 0.1)
        assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_tiny_float16_gradients_are_not_lost(small_tiles):
    """Upstream gradients of 1e-9, which float16 cannot hold, leave the sums whole before the last cast."""
    hidden, weight, target, _ = checks.problem(dtype=torch.float16, ignored=False)
    sums = []
    module = KERNELS.linear_nll
    settle, module.settle = (
        module.settle,
        lambda gradient, total, unscale: sums.append(total.mul_(unscale).clone()),
    )
    try:
        for up in (1.0, 1e-9):
            _, values = KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target), ("lse",))
            module.backward(
                Upstream(torch.full((21,), up)),
                Saved(values["lse"]),
                HeadProblem(hidden, weight, target),
                Needs(True, False, False),
            )
    finally:
        module.settle = settle
    assert checks.norm_error(sums[1] * 1e9, sums[0]) < 1e-3


def test_float16_blocks_hold_the_slope_of_a_large_z_loss(small_tiles):
    hidden, weight, target, bias = checks.problem(dtype=torch.float16, spread=20.0, ignored=False, bias=True)
    bias += 100.0
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    options = {"bias": exact[2], "z_loss": 1.0, "reduction": "sum"}
    exact = torch.autograd.grad(reference.linear_cross_entropy(*exact[:2], target, **options), exact)
    found = KERNELS.linear_cross_entropy.forward_backward(
        HeadProblem(hidden, weight, target, bias), None, 1.0, Needs(), checks.BUDGET
    )
    for mine, truth in zip(found[1:4], exact, strict=True):
        assert checks.norm_error(mine, truth) < 1e-3


def test_float16_blocks_hold_a_large_upstream_of_the_entropy(small_tiles):
    hidden, weight, target, _ = checks.problem(dtype=torch.float16, ignored=False)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = reference.linear_nll(*leaves, target, stats=("entropy",))[1]["entropy"].sum() * 3000.0
    exact = torch.autograd.grad(exact, leaves)
    _, values = KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target), ("lse", "entropy"))
    found = KERNELS.linear_nll.backward(
        Upstream(None, None, torch.full((21,), 3000.0)),
        Saved(values["lse"], values["entropy"]),
        HeadProblem(hidden, weight, target),
        Needs(True, True, False),
    )
    for mine, truth in zip(found[:2], exact, strict=True):
        assert checks.norm_error(mine, truth) < 2e-3


class NoReadback(TorchDispatchMode):
    """Fails where an operation would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation(small_tiles):
    hidden, weight, target, bias = checks.problem(bias=True)
    with NoReadback():
        _, values = KERNELS.linear_nll.forward(HeadProblem(hidden, weight, target, bias), checks.STATS)
        up = torch.ones(21)
        KERNELS.linear_nll.backward(
            Upstream(up, up, up),
            Saved(values["lse"], values["entropy"]),
            HeadProblem(hidden, weight, target, bias),
            Needs(),
        )
        for num_kept in (None, 14):
            head = HeadProblem(hidden, weight, target, bias, num_kept=num_kept)
            checks.formed_gradients(KERNELS, head, up, 0.1)
            narrow = HeadProblem(hidden.bfloat16(), weight.bfloat16(), target, num_kept=num_kept)
            checks.formed_gradients(KERNELS, narrow, up, 0.1, Needs(True, True, False))


def test_gradient_products_never_use_plain_tf32(monkeypatch):
    """The vendor's GEMM takes float32 as it is, whatever the process has set for its own."""
    matmul = torch.backends.cuda.matmul
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: seen.append(matmul.fp32_precision) or addmm(*a, **k))
    hidden, weight, target, _ = checks.problem()
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        KERNELS.linear_cross_entropy.forward_backward(
            HeadProblem(hidden, weight, target), None, 0.0, Needs(True, True, False), checks.BUDGET
        )
        assert seen == ["ieee"] * 2 and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_large_offsets(small_tiles):
    checks.check_large_offsets_of_operands(KERNELS)
    checks.check_large_offsets_of_partials(KERNELS)
    checks.check_large_offsets_of_blocks(KERNELS)
    checks.check_large_offsets_of_residuals(KERNELS)
    checks.check_large_offsets_of_gathered_rows(KERNELS)


@pytest.mark.parametrize("precision", ["float32", "fast"])
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
def test_blur(dtype, precision):
    for border, shape in (
        ("reflect", (2, 2, 45, 38)),
        ("replicate", (1, 1, 7, 5)),
        ("reflect", (2, 1, 1, 9)),
    ):
        checks.check_blur(KERNELS, dtype, precision, shape, border)


def test_blur_in_chunks_and_in_place(monkeypatch):
    images = torch.randn(3, 2, 20, 17)
    sigma = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    whole = KERNELS.gaussian_blur.forward(
        images, Gaussian(sigma, sigma, 3.0, "reflect", "fast"), torch.empty_like(images)
    )
    monkeypatch.setattr(KERNELS.gaussian_blur, "INTERMEDIATE_BYTES", 20 * 17 * 2)
    assert torch.equal(
        KERNELS.gaussian_blur.forward(images, Gaussian(sigma, sigma, 3.0, "reflect", "fast"), images), whole
    )


@pytest.mark.parametrize("times", [1, 2])
def test_blur_of_qwen_patches(times):
    """The flattened patches are blurred where they lie, as the picture that they were cut from."""
    rows, columns, patch, merge, channels, temporal = 4, 6, 5, 2, 3, 2
    frames = times * temporal
    picture = torch.randn(frames, channels, rows * patch, columns * patch)
    sigma = torch.full((frames,), 2.0, dtype=torch.float64)
    blurred = KERNELS.gaussian_blur.forward(picture, Gaussian(sigma, sigma), torch.empty_like(picture))

    def cut(x):
        x = x.reshape(times, temporal, channels, rows // merge, merge, patch, columns // merge, merge, patch)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, -1)

    pixels = torch.cat([torch.zeros(7, channels * temporal * patch * patch), cut(picture)])
    at = KERNELS.gaussian_blur.patch_addresses(
        (times, rows, columns), patch, merge, channels, temporal, 7, pixels.device
    )
    patches = KERNELS.gaussian_blur.Samples(pixels, at)
    KERNELS.gaussian_blur.blur_at(patches, patches, Gaussian(sigma[:1], sigma[:1]))
    assert torch.equal(pixels[7:], cut(blurred)) and not pixels[:7].any()


def test_autotune_searches_once_and_prints(monkeypatch, capsys):
    """Not at import and not without being asked: at the first call of a key, with what was found on stderr."""
    hidden, weight, target, _ = checks.problem(V=90)
    head = HeadProblem(hidden, weight, target)
    plain = KERNELS.linear_nll.forward(head, ())[0]
    assert "VIG_AUTOTUNE" not in capsys.readouterr().err
    monkeypatch.setenv("VIG_AUTOTUNE", "1")
    monkeypatch.setattr(tile_configs, "_tuned", {})
    found = KERNELS.linear_nll.forward(head, ())[0]
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and sum(" * " in line for line in lines) == 1
        and all("fold interpreter" in x for x in lines)
    )
    assert (found - plain).abs().max() <= 1e-4
    KERNELS.linear_nll.forward(head, ())
    assert capsys.readouterr().err == ""
    KERNELS.linear_nll.forward(HeadProblem(hidden, weight[:80], target.clamp_max(79)), ())
    assert len(capsys.readouterr().err.splitlines()) == 2, "another vocabulary is another key"


def test_autotune_keeps_the_fastest_that_fits(monkeypatch):
    monkeypatch.setattr(tile_configs, "_tuned", {})
    monkeypatch.setattr(tile_configs, "measure", lambda run: run())
    candidates = [replace(SMALL, group=group) for group in (1, 2, 4, 8)]

    def trial(config):
        if config.group == 1:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return abs(config.group - 3.9)

    assert tile_configs.tuned(("a key",), candidates, trial).group == 4


def test_autotune_searches_every_kernel(monkeypatch, capsys):
    monkeypatch.setenv("VIG_AUTOTUNE", "1")
    monkeypatch.setattr(tile_configs, "_tuned", {})
    hidden, weight, target, _ = checks.problem(N=6, D=16, V=20, ignored=False)
    head, needs = HeadProblem(hidden, weight, target), Needs(True, True, False)
    _, values = KERNELS.linear_nll.forward(head, ("lse",))
    KERNELS.linear_nll.backward(Upstream(values["lse"]), Saved(values["lse"]), head, needs)
    KERNELS.linear_cross_entropy.forward_backward(head, None, 0.0, needs, checks.BUDGET)
    KERNELS.pair_fold.divergence(head, hidden)
    images, sigma = torch.rand(1, 1, 9, 7), torch.ones(1, dtype=torch.float64)
    KERNELS.gaussian_blur.forward(images, Gaussian(sigma, sigma), torch.empty_like(images))
    chosen = [line for line in capsys.readouterr().err.splitlines() if line.startswith("VIG_AUTOTUNE *")]
    assert [line.split()[2] for line in chosen] == ["fold", "gradient", "store", "pair", "blur", "blur"]


@pytest.mark.parametrize("low, span", [(3.0, 0.0), (0.0, 0.0), (1000.0, 0.01)])
def test_fast_blur_of_a_narrow_range_far_from_zero(low, span):
    images = low + span * torch.rand(1, 1, 9, 7)
    sigma = torch.ones(1, dtype=torch.float64)
    found = KERNELS.gaussian_blur.forward(
        images, Gaussian(sigma, sigma, 3.0, "reflect", "fast"), torch.empty_like(images)
    )
    exact = reference.gaussian_blur(images, 1.0)
    assert (found - exact).abs().max() <= 1e-3 * span + 2e-7 * low


def test_fast_blur_takes_the_range_of_each_image():
    images = torch.rand(2, 1, 9, 7) * torch.tensor([1.0, 1000.0])[:, None, None, None]
    sigma = torch.ones(2, dtype=torch.float64)
    found = KERNELS.gaussian_blur.forward(
        images, Gaussian(sigma, sigma, 3.0, "reflect", "fast"), torch.empty_like(images)
    )
    exact = reference.gaussian_blur(images, 1.0)
    assert (found - exact)[0].abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_80")],
    ids=str,
)
def test_a_gpu_takes_the_tiles_that_fit_it(capability, target, monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.target_of.__wrapped__(torch.device("cuda")) == target


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)], ids=str)
def test_a_gpu_that_is_too_old_is_named(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = triton_backend.why_not(torch.device("cuda"))
    assert reason is None if runs else "this is 7.5" in reason


def test_descriptors_take_rows_on_16_byte_borders():
    whole = torch.zeros(9, 64)
    assert launch.fits_descriptor(whole)
    assert not launch.fits_descriptor(whole[:, 1:49]), "the base"
    assert not launch.fits_descriptor(torch.zeros(9, 50)[:, :48]), "the rows"
    assert not launch.fits_descriptor(whole[:, :50]), "the width"
    assert launch.fits_descriptor(whole[:, :52]), "zeros stand in for what is beyond it"
    tile = replace(SMALL, descriptor=True)

    def regular(weight, config):
        return tile_configs.regular(weight.shape[1], launch.fits_descriptor(weight), config)

    assert regular(whole, tile) and not regular(whole[:, :50], tile)
    assert regular(whole[:, :52], tile) and not regular(whole[:, :52], SMALL)
    apart = torch.zeros(9, 50)[:, :48]
    assert not regular(apart, tile) and regular(apart, SMALL)


def test_loads_of_16_bytes_need_every_row_on_a_border():
    """A mask, or a row, that a wide load would cross makes the compiler be told of no alignment."""
    tile, rows, words = replace(SMALL, descriptor=True), torch.zeros(9, 80), torch.zeros(40, 80)

    def told(hidden, weight):
        options = tile_configs.head_options(weight, tile, rows, hidden)
        return tuple(options[name] for name in ("EVEN_K", "DESCRIPTOR", "UNIT"))

    assert told(rows[:, :64], words[:, :64]) == (True, True, 4)
    assert told(rows[:, :52], words[:, :52]) == (False, True, 4), "zeros stand in for what is beyond D"
    assert told(rows[:, :50], words[:, :50]) == (False, False, 1)
    assert told(torch.zeros(9, 54)[:, :52], words[:, :52]) == (False, True, 1), "rows of hidden"
    assert told(rows[:, :48], torch.zeros(40, 50)[:, :48]) == (True, False, 1), "rows of the weight"
    assert told(rows[:, :52].half(), words[:, :52].half()) == (False, False, 1), "16 bytes are 8 of them"
    assert told(rows[:, :48], words[:, 1:49]) == (True, False, 4), "its address is the compiler's to see"


def test_a_width_that_cuts_a_block_takes_the_tile_that_holds_its_masks(monkeypatch):
    monkeypatch.setattr(tile_configs, "target_of", lambda device: "sm_100")
    wide = tile_configs.HEAD["fold", "sm_100", "float32"][0]
    for D, tile in (
        (1024, wide),
        (1000, tile_configs.CUT["fold", "sm_100", "float32"]),
        (1001, tile_configs.irregular_tile("fold", "sm_100", "float32")),
    ):
        assert tile_configs.head_config("fold", torch.zeros(3, D), False, None) == tile
