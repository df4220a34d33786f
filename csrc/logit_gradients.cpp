#include "logit_gradients.h"

#include <algorithm>

#include "cast.h"
#include "interrupt.h"
#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kColumnsTogether = 4;  // panels of columns that are packed from the same rows of the weight

}  // namespace

ChunkGradients::ChunkGradients(const Head& head, const RowChunk& chunk, Needs needs, int threads)
    : head_(head), chunk_(chunk), needs_(needs), threads_(threads), pairs_(head.pairs()), residual_(chunk.rows, 0.0f) {
  const int64_t columns = blocks_of_columns(), width = head.kernels.panel, words = row_words();
  if (needs.hidden) {
    const int64_t floats = columns * chunk.padded * width;
    grad_hidden_ = make_buffer(floats);
    std::fill_n(grad_hidden_.get(), floats, 0.0f);
  }
  if (needs.weight) {
    hidden_ = make_buffer(columns * words * width);
    std::vector<const char*> rows = chunk.hidden;
    rows.resize(std::max(chunk.rows, pairs_ ? 2 * words : words));  // rows that only fill up a block are zeros
    parallel_for(columns, threads, [&](int64_t column, int) {
      head.kernels.pack_rows({.out = reinterpret_cast<uint32_t*>(hidden_.get()) + column * words * width,
                              .rows = rows.data(),
                              .width = static_cast<int>(rows.size()),
                              .dtype = head.dtype,
                              .pairs = pairs_,
                              .begin = column * width,
                              .end = std::min((column + 1) * width, head.depth),
                              .depth = head.depth});
    });
  }
  for (int64_t n = 0; pairs_ && needs.weight && n < chunk.rows; ++n) by_target_.emplace_back(chunk.target[n], n);
  std::sort(by_target_.begin(), by_target_.end());
  const int64_t floats = scratch_words() + round_up(width, head.kernels.tile) * width;
  for (int i = 0; i < threads; ++i) scratch_.push_back(make_buffer(floats));
}

// Gradients of a panel with rows as words, or the packed rows of the weight, whichever is longer.
int64_t ChunkGradients::scratch_words() const {
  return std::max(row_words(), kColumnsTogether * kBlock) * head_.kernels.panel;
}

int64_t ChunkGradients::blocks_of_columns() const {
  return (head_.depth + head_.kernels.panel - 1) / head_.kernels.panel;
}

void ChunkGradients::run(const PanelRange& range, const RowSlopes& slopes, float* logits) {
  parallel_for(range.end - range.begin, threads_, [&](int64_t i, int worker) {
    panel_gradient(range, range.begin + i, slopes, logits + i * chunk_.padded * head_.kernels.panel, worker);
  });
  if (!needs_.hidden) return;
  parallel_for(std::min<int64_t>(threads_, blocks_of_columns()), threads_,
               [&](int64_t slice, int worker) { hidden_product(range, logits, slice, worker); });
}

void ChunkGradients::panel_gradient(const PanelRange& range, int64_t panel, const RowSlopes& slopes, float* logits,
                                    int worker) {
  const Kernels& k = head_.kernels;
  const int64_t first = panel * k.panel;
  const int columns = static_cast<int>(std::min<int64_t>(k.panel, head_.vocab - first));
  uint32_t* row_pairs = pairs_ && needs_.weight ? reinterpret_cast<uint32_t*>(scratch_[worker].get()) : nullptr;
  // bfloat16 gradients take half the place of the logits, and never overtake the row that is read.
  uint16_t* column_pairs = pairs_ ? reinterpret_cast<uint16_t*>(logits) : nullptr;
  float sums[64];
  k.gradient({.logits = logits,
              .rows = chunk_.rows,
              .columns = columns,
              .first_column = first,
              .target = chunk_.target.data(),
              .lse = slopes.lse.data(),
              .lse_lo = slopes.lse_lo.data(),
              .weight = slopes.weight.data(),
              .onehot = slopes.onehot.data(),
              .moment = slopes.moment.empty() ? nullptr : slopes.moment.data(),
              .entropy = slopes.entropy.data(),
              .scale = head_.scale,
              .cap = head_.cap,
              .row_pairs = row_pairs,
              .column_pairs = column_pairs,
              .residual = pairs_ ? residual_.data() : nullptr,
              .column_sum = needs_.bias ? sums : nullptr});
  if (needs_.bias) {
    float* out = range.grad_bias + (panel - range.begin) * k.panel;
    for (int i = 0; i < columns; ++i) out[i] = (range.add ? out[i] : 0.0f) + sums[i] * head_.scale;
  }
  if (needs_.weight) {
    weight_product(range, panel, pairs_ ? row_pairs : reinterpret_cast<const uint32_t*>(logits), worker);
  }
}

// grad_weight[v, :] (+)= sum_n gradient[n, v] hidden[n, :] for the columns v of one panel.
void ChunkGradients::weight_product(const PanelRange& range, int64_t panel, const uint32_t* gradient, int worker) {
  const Kernels& k = head_.kernels;
  const int64_t width = k.panel, words = row_words();
  const int64_t valid = std::min(width, head_.vocab - panel * width);
  float* tile = scratch_[worker].get() + scratch_words();
  for (int64_t column = 0; column < blocks_of_columns(); ++column) {
    const uint32_t* b = reinterpret_cast<const uint32_t*>(hidden_.get()) + column * words * width;
    for (int64_t v = 0; v < valid; v += k.tile) {
      const int rows = static_cast<int>(std::min<int64_t>(k.tile, width - v));
      k.multiply_columns(
          {.a = gradient + v * k.word_unit, .b = b, .c = tile + v * width, .ldc = width, .words = words, .rows = rows}, pairs_);
    }
    if (pairs_) correct_tile(panel, column, tile);
    write_tile(range, panel, column, tile);
  }
  k.fence();
}

// tile[target] += residual * hidden, row after row, for the targets within the panel.
void ChunkGradients::correct_tile(int64_t panel, int64_t column, float* tile) const {
  const int64_t width = head_.kernels.panel, first = panel * width, begin = column * width;
  const int64_t wide = std::min(width, head_.depth - begin);
  auto at = std::lower_bound(by_target_.begin(), by_target_.end(), std::make_pair(first, int64_t{0}));
  for (; at != by_target_.end() && at->first < first + width; ++at) {
    const float residual = residual_[at->second];
    const char* hidden = chunk_.hidden[at->second] + 2 * begin;
    float* out = tile + (at->first - first) * width;
    for (int64_t d = 0; d < wide; ++d) out[d] += residual * from_bfloat16(hidden + 2 * d);
  }
}

// The tile, a panel of words by a panel of columns of D, to where the range wants it.
void ChunkGradients::write_tile(const PanelRange& range, int64_t panel, int64_t column, const float* tile) const {
  const Kernels& k = head_.kernels;
  const int64_t width = k.panel, wide = std::min(width, head_.depth - column * width);
  const int rows = static_cast<int>(std::min(width, head_.vocab - panel * width));
  const int64_t at = (panel - range.begin) * width * head_.depth + column * width;
  if (wide == width) {
    if (range.grad_rounded != nullptr) return k.round_tile(tile, rows, range.grad_rounded + at, head_.depth);
    return k.write_tile(tile, rows, range.grad_weight + at, head_.depth, range.add);
  }
  for (int64_t i = 0; i < rows * wide; ++i) {
    const int64_t to = at + i / wide * head_.depth + i % wide;
    const float sum = tile[i / wide * width + i % wide];
    if (range.grad_rounded != nullptr) {
      range.grad_rounded[to] = to_bfloat16(sum);
    } else {
      range.grad_weight[to] = range.add ? range.grad_weight[to] + sum : sum;
    }
  }
}

// Rows of the weight as the right side of a product over the vocabulary; rows past the end meet gradients of 0.
void ChunkGradients::pack_weight(int64_t panel, int64_t rows, int64_t column, int64_t columns,
                                 uint32_t* packed) const {
  const int64_t width = head_.kernels.panel;
  const char* at[2 * kBlock];
  for (int64_t i = 0; i < rows; ++i) {
    at[i] = head_.weight + std::min(panel * width + i, head_.vocab - 1) * head_.weight_stride;
  }
  head_.kernels.pack_rows({.out = packed,
                           .rows = at,
                           .width = static_cast<int>(rows),
                           .dtype = head_.dtype,
                           .pairs = pairs_,
                           .begin = column * width,
                           .end = std::min((column + columns) * width, head_.depth),
                           .depth = head_.depth});
}

// grad_hidden[n, slice of D] += sum_v gradient[n, v] weight[v, slice], kBlock words of v at a time.
void ChunkGradients::hidden_product(const PanelRange& range, const float* logits, int64_t slice, int worker) {
  const int64_t slices = std::min<int64_t>(threads_, blocks_of_columns()), width = head_.kernels.panel;
  const int64_t from = blocks_of_columns() * slice / slices, to = blocks_of_columns() * (slice + 1) / slices;
  const int64_t together = block_rows() / width;
  uint32_t* packed = reinterpret_cast<uint32_t*>(scratch_[worker].get());
  for (int64_t block = range.begin; block < range.end && !interrupted(); block += together) {
    const int64_t rows = std::min(together, range.end - block) * width;
    for (int64_t column = from; column < to; column += kColumnsTogether) {
      const int64_t columns = std::min(kColumnsTogether, to - column);
      pack_weight(block, rows, column, columns, packed);
      hidden_block(range, logits, block, column, columns, packed);
    }
  }
}

// A tile of gradients stays in the first cache while it meets all of the packed columns.
void ChunkGradients::hidden_block(const PanelRange& range, const float* logits, int64_t block, int64_t column,
                                  int64_t columns, const uint32_t* packed) {
  const Kernels& k = head_.kernels;
  const int64_t width = k.panel, panel_words = chunk_.padded * width, row_words = pairs_ ? width / 2 : width;
  const int64_t panels = std::min(block_rows() / width, range.end - block);
  const uint32_t* a = reinterpret_cast<const uint32_t*>(logits) + (block - range.begin) * panel_words;
  // The next columns of the same rows of the weight lie too far apart for the hardware to guess.
  const int64_t tiles = (chunk_.rows + k.tile - 1) / k.tile, weight_rows = panels * width;
  const int64_t share = (weight_rows + tiles - 1) / tiles, bytes = width * size_of(head_.dtype);
  const char* next = head_.weight + (column + columns) * bytes;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * k.tile;
    for (int64_t i = tile * share; i < std::min(weight_rows, (tile + 1) * share); ++i) {
      const char* line = next + std::min(block * width + i, head_.vocab - 1) * head_.weight_stride;
      for (int64_t at = 0; at < kColumnsTogether * bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
    }
    const int rows = static_cast<int>(std::min<int64_t>(k.tile, chunk_.rows - row));
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t* b = packed + i * panels * row_words * width;
      float* out = grad_hidden_.get() + (column + i) * panel_words + row * width;
      k.multiply_rows({.a = a + row * row_words,
                       .b = b,
                       .c = out,
                       .ldc = width,
                       .words = row_words,
                       .segments = panels,
                       .a_segment = panel_words,
                       .rows = rows,
                       .accumulate = true},
                      pairs_);
    }
  }
}

void ChunkGradients::read_hidden(int64_t n, float* out) const {
  const int64_t width = head_.kernels.panel;
  for (int64_t column = 0; column < blocks_of_columns(); ++column) {
    const float* from = grad_hidden_.get() + (column * chunk_.padded + n) * width;
    std::copy_n(from, std::min(width, head_.depth - column * width), out + column * width);
  }
  if (residual_[n] == 0.0f) return;
  const char* weight = head_.weight + chunk_.target[n] * head_.weight_stride;
  for (int64_t d = 0; d < head_.depth; ++d) out[d] += residual_[n] * from_bfloat16(weight + 2 * d);
}

}  // namespace vig
