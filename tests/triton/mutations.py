"""Seeded faults: each is put into a copy of the kernels, and the checks must fail on it.

    TRITON_INTERPRET=1 python tests/triton/mutations.py [NAME ...]

prints every fault and whether it was caught. Faults of offsets run in a fork of this process, since a wrapped offset
may read memory that is not there. tests/triton/test_mutations_triton.py runs the same list.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2]))

import checks
import row_by_row
import torch

from vig_kernels.kernels.triton import tile_configs

SOURCE = Path(tile_configs.__file__).parent
TILES, FOLD, GRADIENTS, NLL = "logit_tiles", "logit_fold", "logit_gradients", "linear_nll"
LOSS, BLUR, RESIDUAL, KEPT = "linear_cross_entropy", "gaussian_blur", "target_residual", "kept_block"
ORDER, PAIR, SUM = "row_order", "pair_fold", "loss_sum"


@dataclass(frozen=True)
class Mutation:
    kernel: str
    name: str
    module: str
    old: str
    new: str
    isolated: bool = False  # may crash


def _faults(kernel: str, module: str, *rows, isolated: bool = False) -> list[Mutation]:
    return [Mutation(kernel, name, module, old, new, isolated) for name, old, new in rows]


MUTATIONS = [
    *_faults(
        "fold", TILES,
        ("last block of D skipped", "range(0, D, BLOCK_K)", "range(0, D - BLOCK_K, BLOCK_K)"),
        ("bias added twice", "dot += tl.load(bias", "dot += 2.0 * tl.load(bias"),
        ("scale dropped", "return dot * logit_scale", "return dot"),
        ("series of tanh cut", "(-1.0 / 3.0 + x2 *", "(-1.0 / 3.0 + 0.0 *"),
        ("mask of hidden dropped", "tl.load(pointer, mask=k[None, :] < left, other=0.0)", "tl.load(pointer)"),
        ("mask of the weight dropped", "tl.load(pointer, mask=k[:, None] < left, other=0.0)", "tl.load(pointer)"),
    ),
    *_faults(
        "fold", FOLD,
        ("vocabulary mask dropped", 'z = tl.where(column[None, :] < V, z, -float("inf"))', "z = z"),
        ("last tile not masked", "if first + PART > V:", "if first > V:"),
        ("folded scale dropped", "unit = logit_scale", "unit = 1.0"),
        ("scale of the maximum dropped", "top * unit, mask=live", "top, mask=live"),
        ("target sought in full parts alone", "if hits > 0:", "if hits > 1:"),
        ("exponent in nats", "(unit * LOG2_E)", "unit"),
        ("maximum started at 0", "top = tl.max(z, axis=1)", "top = tl.maximum(tl.max(z, axis=1), 0.0)"),
        ("last tile of the vocabulary dropped", "cdiv(V, config.block_v)\n", "max(1, V // config.block_v)\n"),
        ("second half folded as the first", "left if half == 0 else right, bias, vocab_tile", "left, bias, vocab_tile"),
        ("last maximum instead of the first", "tl.min(tl.where(z == top[:, None], lane[None, :], PART - 1), axis=1)",
         "tl.max(tl.where(z == top[:, None], lane[None, :], 0), axis=1)"),
    ),
    *_faults(
        "fold", TILES,
        ("int32 offset of weight", "V - 1).to(tl.int64)", "V - 1)"),
        isolated=True,
    ),
    *_faults(
        "fold", FOLD,
        ("int32 offset of hidden", "row_offsets(row, tl", "row_offsets(row.to(tl.int32), tl"),
        ("int32 offset of partials", "at = part.to(tl.int64) * partial_stride", "at = part * partial_stride"),
        isolated=True,
    ),
    *_faults(
        "combine", FOLD,
        ("rescale omitted", "total += part_sum * rescale", "total += part_sum"),
        ("maximum started at 0", 'top = tl.full((BLOCK_T, BLOCK_N), -float("inf")',
         "top = tl.full((BLOCK_T, BLOCK_N), 0.0"),
        ("later parts dropped", "for start in range(0, parts, BLOCK_T)", "for start in range(0, BLOCK_T, BLOCK_T)"),
        ("shift of the entropy dropped", "(part_dot + part_sum * shift)", "part_dot"),
        ("part of the argmax dropped", "part[:, None] * PART + part_arg", "part_arg + 0 * part[:, None]"),
        ("ignored rows not zeroed", "tl.where(live, loss, 0.0)", "tl.where(live, loss, 1.0)"),
        ("infinite less infinite", "tl.where(differs, loss - image, 0.0)", "tl.where(live, loss - image, 0.0)"),
        ("low part of lse dropped", 'float("inf")), low, 0.0)', 'float("inf")), 0.0, 0.0)'),
    ),
    *_faults(
        "combine", FOLD,
        ("int32 offset of partials", "part.to(tl.int64)[:, None] * partial_stride", "part[:, None] * partial_stride"),
        isolated=True,
    ),
    *_faults(
        "vig", FOLD,
        ("second pass reads the first", "tl.where(second, hidden_second, hidden)", "hidden"),
        ("second pass with the first's stride", "tl.where(second, stride_hidden_second, stride_hidden)",
         "stride_hidden"),
        ("passes share their partials", "slot = local + second.to(tl.int32) * rows", "slot = local"),
        ("second pass combined from the first", "chunk.first, rows, pass_index * rows", "chunk.first, rows, 0"),
        ("difference turned round", "loss - image", "image - loss"),
        ("second pass not launched", "(row_tiles * passes * vocab_tiles,)", "(row_tiles * vocab_tiles,)"),
    ),
    *_faults(
        "pair", PAIR,
        ("last block of D skipped", "range(0, D, BLOCK_K)", "range(0, D - BLOCK_K, BLOCK_K)"),
        ("null pass multiplied as the image", "tl.dot(null, w, null_dot", "tl.dot(image, w, null_dot"),
        ("null pass with the image's stride", "row, stride_hidden_second, UNIT", "row, stride_hidden, UNIT"),
        ("last tile not masked", "if first + PART > V:", "if first > V:"),
        ("scale of the differences dropped", "tl.sum(apart, axis=1) * unit", "tl.sum(apart, axis=1)"),
        ("scale of the null maximum dropped", "null_top * unit", "null_top"),
        ("scale of the maximum dropped", "tl.store(to, top * unit", "tl.store(to, top"),
        ("folded scale dropped", "unit = logit_scale if FOLDED else 1.0", "unit = 1.0"),
        ("exponent in nats", "exp2(null_below * (unit * LOG2_E)", "exp2(null_below * unit"),
        ("difference turned round", "e * (below - null_below)", "e * (null_below - below)"),
        ("weights of 0 kept", "tl.where(e > 0, e * (below - null_below), 0.0)", "e * (below - null_below)"),
        ("second half of the null pass as its first", "null_left if half == 0 else null_right", "null_left"),
        ("last tile of the vocabulary dropped", "cdiv(V, config.block_v)\n", "max(1, V // config.block_v)\n"),
        ("null pass without a mask", "load_rows(null_ptr, k, D - start, EVEN_K)", "load_rows(null_ptr, k, D, True)"),
        ("maximum of nothing", 'z - tl.where(top == -float("inf"), 0.0, top)[:, None]', "z - top[:, None]"),
    ),
    *_faults(
        "pair combine", PAIR,
        ("shift of the image pass dropped", "(shift - null_shift)", "(0.0 - null_shift)"),
        ("shift of the null pass dropped", "(shift - null_shift)", "shift"),
        ("weights of 0 kept", "tl.where(weight > 0, weight *", "tl.where(weight >= 0, weight *"),
        ("rescale of the null pass omitted", "* tl.exp(null_shift)", ""),
        ("rescale omitted", "total += part_sum * weight", "total += part_sum"),
        ("later parts dropped", "for start in range(0, parts, BLOCK_T)", "for start in range(0, BLOCK_T, BLOCK_T)"),
        ("sums of the passes exchanged", "(tl.log(s) - tl.log(null_s))", "(tl.log(null_s) - tl.log(s))"),
        ("ignored rows not zeroed", "tl.where(live, found, 0.0), mask", "tl.where(live, found, 1.0), mask"),
        ("order forgotten", "tl.store(kl + row,", "tl.store(kl + first_row + local,"),
        ("differences between the logits themselves", "part_sum * (shift - null_shift)",
         "part_sum * ((shift + m) - (null_shift + null_m)) - part_sum * (m - null_m)"),
    ),
    *_faults(
        "pair", PAIR,
        ("int32 offset of hidden", "row_offsets(row, stride_hidden,", "row_offsets(row.to(tl.int32), stride_hidden,"),
        ("int32 offset of the null pass", "row_offsets(row, stride_hidden_second",
         "row_offsets(row.to(tl.int32), stride_hidden_second"),
        ("int32 offset of partials", "part.to(tl.int64) * FIELDS * rows", "part * FIELDS * rows"),
        isolated=True,
    ),
    *_faults(
        "pair", TILES,
        ("int32 offset of weight", "V - 1).to(tl.int64)", "V - 1)"),
        isolated=True,
    ),
    *_faults(
        "pair combine", PAIR,
        ("int32 offset of partials", "(part.to(tl.int64) * FIELDS + number)", "(part * FIELDS + number)"),
        isolated=True,
    ),
    *_faults(
        "gradient", GRADIENTS,
        ("target's term halved", "g -= tl.where(column", "g -= 0.5 * tl.where(column"),
        ("slope of the cap dropped", "g *= slopes(", "_ = slopes("),
        ("upstream of lse dropped", "up += tl.load(grad_lse", "_ = tl.load(grad_lse"),
        ("entropy's own term dropped", "p * (log_p + entropy[:, None])", "p * log_p"),
        ("chunk of the vocabulary forgotten", "wanted - first_vocab, -1)", "wanted, -1)"),
        ("ignored rows kept", "g = tl.where(live[:, None] &", "g = tl.where(inside[:, None] &"),
        ("loss_scale omitted", "g *= stored_scale(loss_scale, logit_scale)", "g *= 1.0"),
        ("residual of a wrong word", "g - stored.to(tl.float32), 0.0)", "0.0, 0.0)"),
        ("later chunks overwrite", "beta = 0.0 if first else 1.0", "beta = 0.0"),
    ),
    *_faults(
        "gradient", NLL,
        ("residual of hidden forgotten", "residual.correct_hidden(hidden_sum, weight, first)", "pass"),
        ("residual of weight forgotten", "residual.correct_weight(weight_sum, hidden, first_vocab=v)", "pass"),
    ),
    *_faults(
        "gradient", GRADIENTS,
        ("int32 offset of hidden", "row_offsets(row, stride_hidden", "row_offsets(row.to(tl.int32), stride_hidden"),
        isolated=True,
    ),
    *_faults(
        "loss", SUM,
        ("last block alone", "total += term", "total = term"),
        ("z_loss of lse itself", "z_loss * row_lse * row_lse", "z_loss * row_lse"),
        ("rows of weight 0 count", "(words != ignore_index) & (w != 0.0)", "words != ignore_index"),
        ("reciprocal dropped", "factor = factor * tl.load(reciprocal)", "factor = factor"),
        ("a divisor of 0 not heeded", "tl.where(factor == 0.0, 0.0, found * factor)", "found * factor"),
        ("more kept rows than told", "tl.load(count) > num_kept", "tl.load(count) < 0"),
    ),
    *_faults(
        "finish", LOSS,
        ("rescale omitted", "tl.exp((top - row_lse) - row_lse_lo)", "tl.exp(-row_lse - row_lse_lo)"),
        ("low part of lse dropped", "tl.exp((top - row_lse) - row_lse_lo)", "tl.exp(top - row_lse)"),
        ("z loss dropped", "(1.0 + 2.0 * z_loss * row_lse)", "1.0"),
        ("target taken from the rounded weight", "g = tl.where(hit, pull[:, None], g)",
         "g = tl.where(hit, g - w[:, None], g)"),
        ("residual dropped", "tl.where(hit, g - stored.to(tl.float32), 0.0)", "tl.where(hit, 0.0, 0.0)"),
        ("residual of hidden forgotten", "residual.correct_hidden(total, weight)", "pass"),
        ("residual of weight forgotten", "residual.correct_weight(grad_weight, hidden, picked)", "pass"),
        ("row weight dropped", "w = tl.load(row_weight", "_ = tl.load(row_weight"),
        ("slope of the target dropped", "pull *= tl.load(target_slope", "_ = tl.load(target_slope"),
        ("ignored rows kept", "live = inside & (local < tl.load(count) - first_row)", "live = inside"),
        ("every part is the first", "column = part * PART + tl.arange", "column = tl.arange"),
    ),
    *_faults(
        "loss", SUM,
        ("last block alone", "total += term", "total = term"),
        ("z_loss of lse itself", "z_loss * row_lse * row_lse", "z_loss * row_lse"),
        ("rows of weight 0 count", "(words != ignore_index) & (w != 0.0)", "words != ignore_index"),
        ("reciprocal dropped", "factor = factor * tl.load(reciprocal)", "factor = factor"),
        ("a divisor of 0 not heeded", "tl.where(factor == 0.0, 0.0, found * factor)", "found * factor"),
        ("more kept rows than told", "tl.load(count) > num_kept", "tl.load(count) < 0"),
    ),
    *_faults(
        "finish", LOSS,
        ("int32 offset of the block", "at = local.to(tl.int64)[:, None]", "at = local[:, None]"),
        isolated=True,
    ),
    *_faults(
        "correct hidden", RESIDUAL,
        ("unknown targets kept", "known = (word >= 0) & (word < V)", "known = (word >= 0) & (word <= V)"),
        ("sign turned round", "lost[:, None] * w, mask", "-lost[:, None] * w, mask"),
        ("sums overwritten", "tl.load(to, mask=mask, other=0.0) + lost", "lost"),
        ("last rows dropped", "cdiv(rows, BLOCK_N)", "rows // BLOCK_N"),
        ("last block of D dropped", "cdiv(rows, BLOCK_N), cdiv(D, block)",
         "cdiv(rows, BLOCK_N), D // block"),
        ("rows of another chunk", "self.target[first:]", "self.target"),
    ),
    *_faults(
        "correct weight", RESIDUAL,
        ("every row adds its target's", " & (word != before)", ""),
        ("later rows dropped", "tl.where(more, start + BLOCK_R, entries)", "entries"),
        ("sums overwritten", "tl.load(to, mask=column < D, other=0.0) + sums", "sums"),
        ("ignored rows kept", "target.masked_fill(target == ignore_index, -1)", "target"),
        ("chunk of the vocabulary forgotten", "first_vocab, first_vocab + words", "0, words"),
        ("rows taken unsorted", "rows[self.order]", "rows"),
        ("residuals taken unsorted", "lost = self.lost[self.order]", "lost = self.lost"),
        ("rows beyond the target's kept", "same = tl.load(target + entry, mask=there, other=-1) == word",
         "same = there"),
    ),
    *_faults(
        "correct hidden", RESIDUAL,
        ("int32 offset of weight", "word[:, None] * stride_weight", "word[:, None].to(tl.int32) * stride_weight"),
        ("int32 offset of the gradient", "row[:, None] * stride_total", "row[:, None].to(tl.int32) * stride_total"),
        isolated=True,
    ),
    *_faults(
        "correct weight", RESIDUAL,
        ("int32 offset of hidden", "row[:, None] * stride_hidden", "row[:, None].to(tl.int32) * stride_hidden"),
        ("int32 offset of the gradient", "(word - low) * stride_total", "(word - low).to(tl.int32) * stride_total"),
        isolated=True,
    ),
    *_faults(
        "order", ORDER,
        ("later blocks dropped", "for start in range(0, N, BLOCK):", "for start in range(0, BLOCK, BLOCK):"),
        ("earlier blocks forgotten", "before += tl.sum(live, axis=0)", "pass"),
        ("ignored rows from the start", "total + row - rank", "row - rank"),
        ("kept rows one too far", "rank - 1", "rank"),
        ("rows beyond N counted", "lane < N, other=ignore_index", "lane < N, other=ignore_index + 1"),
        ("count of the last block", "kept += (words", "kept = (words"),
        isolated=True,
    ),
    *_faults(
        "rows", KEPT,
        ("factor dropped", "tl.load(factor) * scale", "scale"),
        ("scale dropped", "tl.load(factor) * scale", "tl.load(factor)"),
        ("factor of the row dropped", "x * (upstream * of_row)", "x * upstream"),
        ("factor of the row not in the hidden gradient", "(g * of_row) * upstream", "g * upstream"),
        ("upstream not in the hidden gradient", "(g * of_row) * upstream", "g * of_row"),
        ("factor of another row", "tl.minimum(place, rows - 1)", "tl.minimum(row, rows - 1)"),
        ("ignored rows kept", " & (column * 0 + place < tl.load(visit + N))", ""),
        ("rows taken in their own order", "row = tl.load(visit + place)", "row = place"),
        ("hidden gradient in the order of the visit", "grad_hidden + row * D", "grad_hidden + place * D"),
    ),
    *_faults(
        "loss", SUM,
        ("last block alone", "total += term", "total = term"),
        ("z_loss of lse itself", "z_loss * row_lse * row_lse", "z_loss * row_lse"),
        ("rows of weight 0 count", "(words != ignore_index) & (w != 0.0)", "words != ignore_index"),
        ("reciprocal dropped", "factor = factor * tl.load(reciprocal)", "factor = factor"),
        ("a divisor of 0 not heeded", "tl.where(factor == 0.0, 0.0, found * factor)", "found * factor"),
        ("more kept rows than told", "tl.load(count) > num_kept", "tl.load(count) < 0"),
    ),
    *_faults(
        "finish", LOSS,
        ("first chunk forgotten", "grads, chunk.first == 0)", "grads, True)"),
        ("factor of the row near 1", "tl.constexpr(0.70710678)", "tl.constexpr(1.0)"),
        ("factor of the row not taken off", "g /= ratio[:, None]", "g = g"),
    ),
    *_faults(
        "blur", BLUR,
        ("left of the band cut", "tl.maximum(first - radius, 0)", "tl.maximum(first, 0)"),
        ("right of the band cut", "first + BLOCK_R + radius", "first + BLOCK_R"),
        ("first block of the band skipped", "range(low, high, BLOCK_K)", "range(low + BLOCK_K, high, BLOCK_K)"),
        ("rounding dropped", "(accumulator + 12582912.0) - 12582912.0", "accumulator"),
        ("every image with the first sigma", "tl.load(operator_of + plane)", "tl.load(operator_of)"),
        ("centre not put back", "accumulator / factor + centre", "accumulator / factor"),
        ("taps not normalised", "(taps / taps.sum())", "taps"),
    ),
    *_faults(
        "blur", BLUR,
        ("int32 offset of planes", "tl.load(source_plane + plane)", "tl.load(source_plane + plane).to(tl.int32)"),
        isolated=True,
    ),
]  # fmt: skip


def many_parts(k) -> None:
    """More parts than `combine_kernel` takes at a time."""
    hidden, weight, target, _ = checks.problem(N=6, V=2100, D=8)
    checks.assert_forward(k, hidden, weight, target, checks.OPTIONS)


CHECKS = {
    "fold": (
        checks.check_fold_and_combine,
        checks.check_first_of_equal_maxima,
        checks.check_width_that_cuts_a_block,
    ),
    "combine": (checks.check_low_part_of_lse, checks.check_fold_and_combine, many_parts),
    "vig": (checks.check_fold_and_combine,),
    "pair": (
        checks.check_divergence,
        checks.check_divergence_where_words_are_ruled_out,
        checks.check_width_that_cuts_a_block,
    ),
    "pair combine": (
        checks.check_divergence,
        checks.check_divergence_where_words_are_ruled_out,
        checks.check_divergence_of_many_parts,
        checks.check_divergence_of_shifted_logits,
    ),
    "gradient": (
        checks.check_what_16_bits_lose,
        checks.check_gradients,
        lambda k: checks.check_gradients(k, cap=None),
    ),
    "finish": (
        checks.check_low_part_of_lse,
        checks.check_what_16_bits_lose,
        checks.check_training,
        lambda k: checks.check_training(k, num_kept=False),
        checks.check_kept_block,
    ),
    "correct hidden": (checks.check_target_residual,),
    "correct weight": (checks.check_target_residual,),
    "order": (checks.check_order,),
    "rows": (checks.check_kept_block,),
    "loss": (checks.check_loss_sum,),
    "blur": (
        checks.check_blur,
        lambda k: checks.check_blur(k, torch.uint8),
        lambda k: checks.check_blur(k, torch.float32, "fast"),
    ),
}
OFFSETS = {
    "fold": (checks.check_large_offsets_of_operands, checks.check_large_offsets_of_partials),
    "combine": (checks.check_large_offsets_of_partials,),
    "pair": (checks.check_large_offsets_of_a_pair,),
    "pair combine": (checks.check_large_offsets_of_a_pair,),
    "gradient": (checks.check_large_offsets_of_operands,),
    "finish": (checks.check_large_offsets_of_blocks,),
    "correct hidden": (checks.check_large_offsets_of_residuals,),
    "correct weight": (checks.check_large_offsets_of_residuals,),
    "order": (checks.check_order,),
    "rows": (checks.check_large_offsets_of_gathered_rows,),
    "blur": (checks.check_large_offsets_of_blocks,),
}


def key(mutation: Mutation) -> str:
    return f"{mutation.kernel}: {mutation.name}"


def copy_with(mutation: Mutation | None, folder: Path) -> str:
    """The name of a package in `folder` with the kernels and, in them, the fault."""
    package = folder / f"mutant_{abs(hash(mutation))}"
    package.mkdir(parents=True)
    for path in SOURCE.glob("*.py"):
        text = path.read_text()
        if mutation is not None and path.stem == mutation.module:
            if mutation.old not in text:  # an error, not a catch
                raise LookupError(f"{key(mutation)}: {mutation.old!r} is not in {path.name}")
            text = text.replace(mutation.old, mutation.new)
        (package / path.name).write_text(text)
    return package.name


def run(mutation: Mutation | None, kernel: str, offsets: bool = False) -> str | None:
    """What the checks of `kernel` say about a copy with the fault; None when they find nothing."""
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        try:
            k = checks.load(copy_with(mutation, Path(folder)))
            k.tile_configs.INTERPRETER = k.tile_configs.TileConfig(16, 32, 16, 1, 1, parts=2, group=2)
            for check in (OFFSETS if offsets else CHECKS)[kernel]:
                check(k)
        except AssertionError as error:
            return f"caught: {error}".splitlines()[0]
        except ValueError as error:  # NaN where a number must be
            return f"caught: {error}".splitlines()[0]
        except RuntimeError as error:  # of torch, given an order that is none
            if "out of bounds" not in str(error):
                raise
            return f"caught: {error}".splitlines()[0]
        finally:
            sys.path.remove(folder)
    return None


def examine(mutation: Mutation) -> str | None:
    """The verdict on a fault; on one that may crash, from a fork, whose death by a signal counts as caught."""
    if not mutation.isolated:
        return run(mutation, mutation.kernel)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        verdict = run(mutation, mutation.kernel, offsets=True)
        os.write(writer, (verdict or "").encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"caught: the process died of signal {os.WTERMSIG(status)}"
    with open(reader) as told:
        return told.read() or None


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or any(name in key(m) for name in names)]
    missed = 0
    for mutation in chosen:
        verdict = examine(mutation)
        missed += verdict is None
        print(f"{key(mutation)} -> {verdict or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    row_by_row.install()
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
