"""The tile that every kernel of the language-model head is built on.

A program owns BLOCK_N rows x BLOCK_V vocabulary entries and never writes them as logits:

    y = logit_scale * (hidden @ weight.T + bias)       float32 accumulation
    z = logit_softcap * tanh(y / logit_softcap)        or y, when there is no cap

`dot_tile` makes the product and `logits` makes z of it, for the fold (logit_fold.py) and the gradients
(logit_gradients.py) alike. The drawings are in docs/kernels.md.

Rows are visited in the order of `order` (N,), a permutation with the `count` kept rows first, so that ignored
rows end in whole tiles that return at once. All offsets that grow with N, V or D are int64.
"""

import triton
import triton.language as tl

# The interpreter differs from a GPU in two ways that the kernels make up for: it multiplies the bits of bfloat16 as
# integers, and it cuts float32 to bfloat16 where a GPU rounds to nearest even.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x, float32, rounded to nearest even in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x to 2 units in the last place. FAST: one instruction, which flushes what is below 2^-126."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def tanh(x):
    """tanh to 2e-7: a series near 0, where 1 - exp(-2x) would cancel, and the exponential form elsewhere."""
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -magnitude, magnitude)
    return tl.where(tl.abs(x) < 0.25, series, far)


@triton.jit
def tile_position(
    pid,
    row_tiles,
    vocab_tiles,
    GROUP: tl.constexpr,
):
    """Tile of program `pid`: GROUP row tiles sweep the vocabulary together, the row tile running fastest.

    The hidden rows of a group stay in L2 while each weight tile is fetched from memory once a group.
    """
    span = GROUP * vocab_tiles
    first = (pid // span) * GROUP
    width = tl.minimum(row_tiles - first, GROUP)
    within = pid % span
    return first + within % width, within // width


@triton.jit
def row_offsets(row, stride, UNIT: tl.constexpr):
    """Element offsets of rows, row int64, known to the compiler to be multiples of UNIT.

    They are multiplied here since a hint on an argument of a function that is not the kernel is lost.
    """
    offset = row * stride
    if UNIT > 1:
        offset = tl.multiple_of(offset, UNIT)
    return offset


@triton.jit
def word_pointers(
    weight,  # pointer to (V, D)
    stride_weight,
    first_column,
    V,
    k,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(BLOCK_K, BLOCK_V) pointers to the first block of D of each word.

    The last word stands in for those beyond V: it is read in bounds, and masked by the epilogue.
    """
    word = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
    return weight + row_offsets(word, stride_weight, UNIT)[None, :] + k[:, None]


@triton.jit
def load_rows(pointer, k, left, EVEN_K: tl.constexpr):
    """A block of hidden, with zeros from column `left` on: what lies beyond D may be NaN, and NaN times 0 is NaN."""
    if EVEN_K:
        h = tl.load(pointer)
    else:
        h = tl.load(pointer, mask=k[None, :] < left, other=0.0)
    if INTERPRETED:
        h = h.to(tl.float32)
    return h


@triton.jit
def load_words(
    weight,  # tensor descriptor of (V, D), or not used
    pointer,  # (BLOCK_K, BLOCK_V), or not used
    first_column,
    start,
    k,
    left,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """A block of the transposed weight, with zeros from row `left` on, which a descriptor fills in by itself."""
    if DESCRIPTOR:
        w = weight.load([first_column, start]).T
    elif EVEN_K:
        w = tl.load(pointer)
    else:
        w = tl.load(pointer, mask=k[:, None] < left, other=0.0)
    if INTERPRETED:
        w = w.to(tl.float32)
    return w


@triton.jit
def dot_tile(
    hidden,  # pointer, rows of D
    row_offset,  # (BLOCK_N,) int64, element offset of each row
    weight,  # pointer to (V, D), or a tensor descriptor of it
    stride_weight,
    first_column,  # vocabulary index of the tile's column 0
    V,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # D is a multiple of BLOCK_K
    DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,  # D and the row strides are multiples of it
    PRECISION: tl.constexpr,
):
    """hidden @ weight.T of the tile, (BLOCK_N, BLOCK_V) float32; what stands in columns >= V is undefined."""
    k = tl.arange(0, BLOCK_K)
    if not EVEN_K:
        D = D // UNIT * UNIT  # D itself; it tells the compiler that a mask splits no UNIT elements
    hidden_ptr = hidden + row_offset[:, None] + k[None, :]
    weight_ptr = weight
    if not DESCRIPTOR:
        weight_ptr = word_pointers(weight, stride_weight, first_column, V, k, BLOCK_V, UNIT)
    accumulator = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        h = load_rows(hidden_ptr, k, D - start, EVEN_K)
        w = load_words(weight, weight_ptr, first_column, start, k, D - start, EVEN_K, DESCRIPTOR)
        accumulator = tl.dot(h, w, accumulator, input_precision=PRECISION)
        hidden_ptr += BLOCK_K
        if not DESCRIPTOR:
            weight_ptr += BLOCK_K
    return accumulator


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of x (ROWS, COLUMNS); a renaming of registers, or two loads of tensor memory."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def raw_logits(dot, bias, column, V, logit_scale):
    """y of a (part of a) tile."""
    if bias is not None:
        dot += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    return dot * logit_scale


@triton.jit
def logits(dot, bias, column, V, logit_scale, logit_softcap, SOFTCAP: tl.constexpr):
    """z of a (part of a) tile; what stands in columns >= V is undefined."""
    z = raw_logits(dot, bias, column, V, logit_scale)
    if SOFTCAP:
        z = logit_softcap * tanh(z / logit_softcap)
    return z


@triton.jit
def slopes(dot, bias, column, V, logit_scale, logit_softcap):
    """dz/dy = 1 - tanh(y / cap)^2, formed as 4 e / (1 + e)^2 with e = exp(-2 |y / cap|): no cancellation near 1."""
    decay = tl.exp(-2.0 * tl.abs(raw_logits(dot, bias, column, V, logit_scale) / logit_softcap))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
