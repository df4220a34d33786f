// From kept logits to the gradients of hidden, weight and bias: the second and third matrix product.
#pragma once
#include "head.h"

namespace vig {

struct Needs {
  bool hidden, weight, bias;
};

// What is known of each row of a chunk once its log-sum-exp is.
struct RowSlopes {
  std::vector<float> lse;
  std::vector<float> lse_lo;   // lse + lse_lo: beyond float32's precision
  std::vector<float> weight;   // factor of the softmax
  std::vector<float> onehot;   // subtracted at the target
  std::vector<float> moment;   // upstream of the entropy; empty: none
  std::vector<float> entropy;  // nats
};

// Panels [begin, end) of the vocabulary, and where their gradients go: (columns, D) and (columns).
struct PanelRange {
  int64_t begin, end;
  float* grad_weight;     // float32
  uint16_t* grad_rounded; // or bfloat16, of a chunk that holds all rows: then nothing is added
  float* grad_bias;       // float32
  bool add;               // to what stands there
};

// One chunk of rows: its logits, then their gradients in the same memory, and both products with them.
class ChunkGradients {
 public:
  ChunkGradients(const Head& head, const RowChunk& chunk, Needs needs, int threads);

  // logits: [panel - range.begin][padded rows][panel columns]; overwritten.
  void run(const PanelRange& range, const RowSlopes& slopes, float* logits);
  // Row n of the chunk: the sum over all ranges so far, (D) float32.
  void read_hidden(int64_t n, float* out) const;

  static int64_t bytes_per_row(const Head& head) { return 8 * round_up(head.depth, head.kernels.panel); }

 private:
  void panel_gradient(const PanelRange& range, int64_t panel, const RowSlopes& slopes, float* logits, int worker);
  void weight_product(const PanelRange& range, int64_t panel, const uint32_t* gradient, int worker);
  void hidden_product(const PanelRange& range, const float* logits, int64_t slice, int worker);
  void hidden_block(const PanelRange& range, const float* logits, int64_t block, int64_t column, int64_t columns,
                    const uint32_t* packed);
  void pack_weight(int64_t panel, int64_t rows, int64_t column, int64_t columns, uint32_t* packed) const;
  int64_t scratch_words() const;
  void correct_tile(int64_t panel, int64_t column, float* tile) const;
  void write_tile(const PanelRange& range, int64_t panel, int64_t column, const float* tile) const;
  // Words of a column over the chunk's rows: two rows a word for pairs.
  int64_t row_words() const {
    return pairs_ ? round_up((chunk_.rows + 1) / 2, head_.kernels.word_unit) : chunk_.rows;
  }
  int64_t blocks_of_columns() const;
  int64_t block_rows() const { return (pairs_ ? 2 : 1) * kBlock; }

  const Head& head_;
  const RowChunk& chunk_;
  const Needs needs_;
  const int threads_;
  const bool pairs_;
  Buffer hidden_;       // [block of columns][row words][panel columns]: rows in order, for the weight's gradient
  Buffer grad_hidden_;  // [block of columns][padded rows][panel columns]
  std::vector<Buffer> scratch_;
  std::vector<float> residual_;  // by row: what the rounding to bfloat16 lost at the target, by far the largest loss
  std::vector<std::pair<int64_t, int64_t>> by_target_;  // (target, row), ascending
};

}  // namespace vig
