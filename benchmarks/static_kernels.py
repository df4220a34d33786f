"""Every Triton kernel with the arguments it is launched with, as sources for compilation without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vig_kernels.kernels.triton import gaussian_blur as gaussian_blur_triton
from vig_kernels.kernels.triton import (
    kept_block,
    logit_fold,
    logit_gradients,
    loss_sum,
    pair_fold,
    row_order,
    target_residual,
)
from vig_kernels.kernels.triton import linear_cross_entropy as linear_cross_entropy_triton
from vig_kernels.kernels.triton.tile_configs import TileConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8"}

INT64 = ("target", "order", "count", "place", "row_of")
FLOAT32 = (
    "partial_max", "partial_sum", "partials", "kl", "target_logit", "target_slope", "lse", "lse_lo", "nll",
    "loss_scale", "row_weight", "grad_nll", "residual", "total", "centre_of", "factor_of", "row_factor",
)  # fmt: skip
FLOATS = ("logit_scale", "logit_softcap", "z_loss")
WIDTHS = ("stride_hidden", "stride_hidden_second", "stride_weight", "D")  # what follows D
ALIGNED = (
    *WIDTHS,
    "stride_block",
    "stride_matrix",
    "stride_total",
    "size",
    "lines",
)  # usually multiples of 16


@dataclass(frozen=True)
class Variant:
    """A set of options that changes the code of a kernel."""

    name: str
    softcap: bool = False
    bias: bool = False
    entropy: bool = False
    argmax: bool = False
    store: bool = False
    pair: bool = False
    even_k: bool = True  # D is a multiple of BLOCK_K
    aligned: bool = True  # D and row strides are whole 16 bytes


def head_source(
    kernel, variant: Variant, dtype: str, config: TileConfig, precision: str, nvidia: bool
) -> ASTSource:
    """fold_kernel, gradient_kernel or pair_kernel for `dtype` operands."""
    data = "*" + POINTER[dtype]
    descriptor = config.descriptor and variant.aligned
    types = {
        "hidden": data,
        "hidden_second": data,
        "weight": f"tensordesc<{data[1:]}[{config.block_v}, {config.block_k}]>" if descriptor else data,
        "bias": "*fp32" if variant.bias else None,
        "partial_dot": "*fp32" if variant.entropy else None,
        "partial_arg": "*i32" if variant.argmax else None,
        "partial_bias": "*fp32" if variant.bias else None,
        "entropy": "*fp32" if variant.entropy else None,
        "grad_entropy": "*fp32" if variant.entropy else None,
        "grad_lse": "*fp32" if variant.entropy else None,
        "block": block_type(kernel, variant, dtype),
        "loss_scale": "*fp32" if dtype == "float16" else None,
        "residual": None if dtype == "float32" else "*fp32",
    }
    constants = {
        "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_K": config.block_k, "PARTS": config.parts,
        "GROUP": config.group, "EVEN_K": variant.even_k, "DESCRIPTOR": descriptor, "SOFTCAP": variant.softcap,
        "UNIT": (4 if dtype == "float32" else 8) if variant.aligned else 1,
        "FOLDED": not (variant.bias or variant.softcap), "FAST_EXP2": nvidia, "PRECISION": precision,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    odd = () if variant.even_k else WIDTHS if variant.aligned else ALIGNED
    return source(kernel, types, constants, odd)


def block_type(kernel, variant: Variant, dtype: str) -> str | None:
    """The gradient block has the operands' type; the fold leaves float16 weights for 16-bit operands."""
    if kernel is logit_gradients.gradient_kernel:
        return "*" + POINTER[dtype]
    return ("*fp32" if dtype == "float32" else "*fp16") if variant.store else None


def source(kernel, types: dict, constants: dict, odd: tuple[str, ...] = ()) -> ASTSource:
    """ASTSource of `kernel`; what `types` does not name follows from the argument's name.

    odd: arguments that are no multiples of 16, though they mostly are.
    """
    signature, constants = {}, dict(constants)
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name] or "constexpr"
            if types[name] is None:
                constants[name] = None
        elif name in INT64:
            signature[name] = "*i64"
        elif name in FLOAT32:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    unknown = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if (signature[name].startswith("*") and name not in unknown) or (name in ALIGNED and name not in odd)
    }
    return ASTSource(kernel, signature, constants, attributes)


def combine_source(variant: Variant, part: int) -> ASTSource:
    types = {
        "partial_dot": "*fp32" if variant.entropy else None,
        "partial_arg": "*i32" if variant.argmax else None,
        "lse": "*fp32" if variant.entropy or variant.store else None,
        "lse_lo": "*fp32" if variant.entropy or variant.store else None,
        "entropy": "*fp32" if variant.entropy else None,
        "argmax": "*i64" if variant.argmax else None,
        "nll_image": "*fp32" if variant.pair else None,
        "vig": "*fp32" if variant.pair else None,
    }
    sizes = {"PART": part, "BLOCK_N": logit_fold.COMBINE_ROWS, "BLOCK_T": logit_fold.COMBINE_PARTS}
    return source(logit_fold.combine_kernel, types, sizes)


def pair_combine_source() -> ASTSource:
    sizes = {"BLOCK_N": logit_fold.COMBINE_ROWS, "BLOCK_T": logit_fold.COMBINE_PARTS}
    return source(pair_fold.pair_combine_kernel, {}, sizes)


def finish_source(variant: Variant, dtype: str, part: int) -> ASTSource:
    weights, kept = "*fp32" if dtype == "float32" else "*fp16", not variant.softcap
    types = {
        "weights": weights,
        "block": "*" + POINTER[dtype],
        "target_slope": "*fp32" if variant.softcap else None,
        "loss_scale": "*fp32" if dtype == "float16" else None,
        "partial_bias": "*fp32" if variant.bias else None,
        "residual": None if dtype == "float32" or kept else "*fp32",
        "row_factor": "*fp32" if kept else None,
    }
    constants = {"PART": part, "BLOCK_N": linear_cross_entropy_triton.FINISH_ROWS, "SOFTCAP": variant.softcap}
    return source(linear_cross_entropy_triton.finish_kernel, types, constants)


def correct_source(kernel: str, variant: Variant, dtype: str) -> ASTSource:
    """correct_hidden_kernel or correct_weight_kernel, by its name in the tables; float32 blocks have no residual."""
    function = getattr(target_residual, kernel.replace(" ", "_") + "_kernel")
    data = "*" + POINTER[dtype]
    sizes = {name: getattr(target_residual, name) for name in ("ENTRIES", "BLOCK_N", "BLOCK_R")}
    constants = {name: size for name, size in sizes.items() if name in function.arg_names}
    constants["BLOCK_D"] = target_residual.BLOCK_W if "BLOCK_R" in constants else target_residual.BLOCK_D
    return source(function, {"weight": data, "hidden": data}, constants, () if variant.aligned else ALIGNED)


def order_source() -> ASTSource:
    return source(row_order.order_kernel, {"order": "*i64"}, {"BLOCK": row_order.ORDER_BLOCK})


def rows_source(variant: Variant, dtype: str) -> ASTSource:
    data = "*" + POINTER[dtype]
    types = {"hidden": data, "gathered": data, "grad_hidden": data, "total": "*fp32", "visit": "*i64"}
    types |= {"factor": "*fp32", "scale": "fp32"}
    return source(
        kept_block.rows_kernel, types, {"BLOCK_D": kept_block.ROW_COLUMNS}, () if variant.aligned else ALIGNED
    )


def loss_source(variant: Variant) -> ASTSource:
    """The plain loss, or with `softcap` all that may go into one."""
    full = variant.softcap
    types = {"lse": "*fp32" if full else None, "row_weight": "*fp32" if full else None, "loss": "*fp32"}
    types |= {"count": "*i64" if full else None, "reciprocal": "*fp32" if full else None, "scale": "fp32"}
    return source(loss_sum.loss_kernel, types, {"BLOCK": loss_sum.SUM_BLOCK})


def blur_source(first_launch: bool, dtype: str, fast: bool, config: TileConfig, precision: str) -> ASTSource:
    """band_kernel: the launch that reads the samples, or the one that writes them."""
    middle = "*fp16" if fast else "*fp32"
    data = "*" + POINTER[dtype]
    int64 = ("source_plane", "source_line", "source_step", "out_plane", "out_row", "out_column")
    types = dict.fromkeys(int64, "*i64") | {
        "matrix": middle,
        "operator_of": "*i32",
        "radius_of": "*i32",
        "source": data if first_launch else middle,
        "out": middle if first_launch else data,
        "centre_of": "*fp32" if fast else None,
        "factor_of": "*fp32" if fast else None,
    }
    constants = {
        "BLOCK_R": config.block_n, "BLOCK_L": config.block_v, "BLOCK_K": config.block_k,
        "ENTER": fast and first_launch, "LEAVE": fast and not first_launch, "SOURCE_UNIT": True, "OUT_UNIT": True,
        "SOURCE_DIVISOR": 16, "OUT_DIVISOR": 16, "PRECISION": precision,
    }  # fmt: skip
    return source(gaussian_blur_triton.band_kernel, types, constants)
