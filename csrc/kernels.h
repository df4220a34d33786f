// The table of kernels that one instruction set offers. Plain pointers and sizes: this header is all that the files
// compiled for newer instructions share with the rest, and what bodies it has are static, so nothing can leak between
// them.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace vig {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

constexpr int kBlock = 256;         // steps of one running sum; block sums are added up in float32
constexpr int kLineWords = 16;      // of 64 bytes
constexpr int kPrefetchLines = 4;   // of each row, between asking the cache for a line and copying it
constexpr float kLowest = -3.40282347e38f;  // the maximum of nothing: finite, so that -inf minus it is not NaN

// Matrix operands are stored as 32-bit words: one float32, or (pairs) two bfloat16 that one instruction multiplies. A row
// of an operand has a multiple of Kernels::word_unit of them; those past its end are zero.

// One side of the product, rows of which are packed to words: `rows` pointers to D elements each.
struct PackArgs {
  uint32_t* out;             // [word][width]
  const char* const* rows;   // width pointers; null: a row of zeros, for pairs of rows
  int width;
  Dtype dtype;
  bool pairs;
  int64_t begin, end;        // words to pack, out of ceil(D / (pairs ? 2 : 1))
  int64_t depth;             // D
};

// Interleaved packing: whole lines of weight rows go into packed panels, [word][panel], while the products of other
// panels are formed: word by word, through integer registers, which those leave alone.
struct Packing {
  const char* from;          // the next line: kLineWords words of one row
  uint32_t* to;              // where its first word goes
  int64_t stride;            // bytes from row to row
  int64_t words, lines;      // of a row; words past the last whole line are left out
  int64_t prefetch_bytes;    // from `from` to the line that the cache is asked for
  int64_t line = 0, row = 0;
};

// c[i][j] (+)= sum over segments s and words k of a[s * a_segment + i * a_row + k * a_word] * b[(s * words + k)][j].
struct MultiplyArgs {
  const uint32_t* a;
  const uint32_t* b;         // [segments * words][panel]
  float* c;
  int64_t ldc;
  int64_t words;
  int64_t segments = 1, a_segment = 0;
  int rows;                         // 1 .. tile
  bool accumulate = false;
  const char* prefetch = nullptr;   // memory that will be wanted soon: asked for line by line, up to prefetch_end
  const char* prefetch_end = nullptr;
  Packing* packing = nullptr;       // lines of it are copied on the way, as many as `lines` says
  int64_t lines = 0;
};

// A tile of logits of a pair's first pass, once it is folded, and what it says beyond the same tile of the second.
struct FirstPass {
  float* logits;       // [rows][panel], -inf past the vocabulary
  float* weights;      // [rows][panel] e^(logit - running max)
  const float* lanes;  // [rows][lane_floats]: the running max comes first
  float* sums;         // [rows][2 * lanes]: running max, sum of weights times (logit - the second pass's)
};

// One tile of products turned into logits and folded into the rows' running values.
struct FoldArgs {
  const float* product;      // [rows][panel]
  int rows;
  int columns;               // valid columns of this panel
  int64_t first_column;
  const int64_t* target;     // (rows)
  float* picked;             // (rows) logit of the target, written by the panel that holds it
  float* lanes;              // [rows][lane_floats]: running max, sum (, moment, greatest logit, its column)
  bool stats;
  bool fresh;                // the first panel: what stands in `lanes` is not read
  float scale;               // logit = scale * product + bias, then the cap
  const float* bias;         // [panel], scaled
  float cap;                 // 0: none; else the cap of cap * tanh(logit / cap)
  float* keep;               // [rows][panel] logits, or null
  const FirstPass* first = nullptr;  // of a pair; null: no pair
  bool second = false;               // this tile is the pair's second: `first` is read, and its sums are added to
};

// What rows have gathered: arrays over rows. sum = sum of e^(logit - running_max), moment the same times
// (logit - running_max). The running max may lag a little behind the greatest logit: see fold_body.h.
struct Partials {
  float *running_max, *sum, *moment, *greatest;
  int32_t* column;  // the first that holds the greatest logit
  float* difference = nullptr;  // of a pair's first rows: sum of e^(logit - running_max) (logit - the second's logit)
};

// Gradients of a panel's logits, from the logits that the sweep kept.
struct GradArgs {
  float* logits;             // [rows][panel] in; overwritten by the gradient where no pairs are asked for
  int64_t rows;
  int columns;
  int64_t first_column;
  const int64_t* target;
  const float* lse;          // (rows): lse + lse_lo is the log-sum-exp beyond float32's precision
  const float* lse_lo;
  const float* weight;       // (rows) factor of the softmax
  const float* onehot;       // (rows) subtracted at the target
  const float* moment;       // (rows) upstream of the entropy, or null
  const float* entropy;      // (rows), nats
  float scale, cap;
  uint32_t* row_pairs;       // (n, n + 1) as bfloat16, as multiply_columns takes them, or null
  uint16_t* column_pairs;    // [rows][panel] bfloat16, or null
  float* residual;           // (rows) what bfloat16 loses of the gradient at the target, or null
  float* column_sum;         // [panel] sum over rows before the scale (gradient of the bias), or null
};

struct BlurArgs {
  const float* strip;        // [length][strip_stride] float32, whole vectors of columns
  int64_t strip_stride;
  int64_t length, columns;   // columns that count, at most a panel
  const int32_t* index;      // (length + 2 * radius) rows to read, border folded in; index[0] stands for row -radius
  const float* taps;         // blur_rows - 1 zeros, 2 * radius + 1 taps, blur_rows - 1 zeros
  int64_t radius;
  float* out;                // transposed: [columns, to whole vectors][out_stride]
  int64_t out_stride;
};

struct ConvertArgs {
  const char* from;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // bytes
  Dtype dtype;
  float* strip;              // [rows][strip_columns], columns past the end are filled with zeros
  int64_t strip_columns;
};

struct Kernels {
  const char* name;
  int lanes;        // floats of a vector
  int panel;        // columns of a packed panel: 2 * lanes
  int tile;         // rows of the largest register tile; smaller tiles are 1/3 and 2/3 of it
  int word_unit;    // words of a row that stand together on the left side: 1, or those of a row of a tile register
  int64_t packed_words;       // of panels that share the cache with a tile of rows
  int64_t interleaved_words;  // the same while as many others are packed
  int blur_rows;    // outputs of one blur step
  bool pairs;       // has the bfloat16 dot product
  bool interleaves_packing;  // `multiply` heeds MultiplyArgs::packing
  const Kernels* floats;     // the table for float32 words where pairs have tiles of their own; else null
  void (*pack)(const PackArgs&);
  void (*pack_left)(const PackArgs&);  // of a tile's rows: [word][rows], or [block of word_unit words][row][word_unit]
  // Rows kept in order, [panel columns][row][panel] (pairs: two rows a word); begin and end are columns.
  void (*pack_rows)(const PackArgs&);
  // Where word_unit is 1: a_row 1, a_word = rows of the tile; a_row 1, a_word panel; a_row panel (pairs: panel / 2),
  // a_word 1. Else a_row is word_unit and a_word 1 within a block of word_unit words, and blocks follow each other.
  void (*multiply)(const MultiplyArgs&, bool pairs);          // a as packed by `pack_left`
  void (*multiply_columns)(const MultiplyArgs&, bool pairs);  // a: from a row of `a` on, row_pairs of GradArgs
  void (*multiply_rows)(const MultiplyArgs&, bool pairs);     // a: column_pairs of GradArgs, or its logits
  void (*write_tile)(const float* tile, int rows, float* out, int64_t stride, bool add);  // until fence()
  void (*round_tile)(const float* tile, int rows, uint16_t* out, int64_t stride);         // to bfloat16, until fence()
  void (*fence)();
  void (*fold)(const FoldArgs&);
  void (*reduce_lanes)(const float* lanes, int64_t rows, bool stats, const Partials& out);  // rows: whole vectors
  // `lanes` rows from `first` on.
  void (*combine)(const Partials* groups, int64_t count, int64_t first, bool stats, const Partials& out);
  void (*gradient)(const GradArgs&);
  void (*blur)(const BlurArgs&);
  void (*load_strip)(const ConvertArgs&);
  void (*store_row)(const float* from, char* to, int64_t count, Dtype dtype);  // contiguous elements, rounded
  double (*peak)(bool pairs, int64_t steps);  // register-only multiply-adds; returns floating-point operations done
};

static inline int lane_floats(int lanes, bool stats) { return lanes * (stats ? 5 : 2); }

const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx_bf16();
const Kernels* kernels_neon();
const Kernels* kernels_neon_bf16();

}  // namespace vig
