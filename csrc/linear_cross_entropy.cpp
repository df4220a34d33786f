#include "linear_cross_entropy.h"

#include <algorithm>

#include "cast.h"
#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kLogitBytes = 160 << 20;  // kept logits, and the copies of the rows that go with them
constexpr int64_t kBlockBytes = 64 << 20;   // the same where the logits are formed anew, block by block of V

constexpr int64_t kLaneBytes = 32 << 20;    // running values of a chunk, all threads together
constexpr int64_t kHiddenBytes = 128 << 20;  // float32 sums of a 16-bit hidden gradient, until they are rounded
constexpr int64_t kFewRows = 32;            // bfloat16 is then read faster than it can be multiplied: float32 is free

// What multiplies the gradients of the logits. The logits themselves are formed as in any call: a row's values have the
// same bits whatever the other rows.
Head for_gradients(const Head& head, const KeptRows& kept) { return {head.kernels, head, kept.size() < kFewRows}; }

// Threads that sweep `tasks` parts of the weight at once, as many as have room for the running values of their rows.
int sweepers(const Head& head, int64_t rows, bool stats, int64_t tasks, int threads) {
  const int64_t room = std::max<int64_t>(kLaneBytes / (rows * PanelSweep::bytes_per_row(head, stats)), 1);
  return static_cast<int>(std::min({int64_t{threads}, tasks, room}));
}

int64_t rows_within(const Head& head, int64_t bytes, int64_t columns, int64_t kept) {
  const int64_t unit = padded_rows(head, 1);
  const int64_t row = 4 * columns + 4 * head.words() + ChunkGradients::bytes_per_row(head);
  return std::min(kept, std::clamp<int64_t>(bytes / row / unit, 1, kChunkRows / unit) * unit);
}

// Gradients of a float32 hidden are summed where they are wanted; others in a buffer, and rounded at the end.
class HiddenSums {
 public:
  HiddenSums(const Head& head, const KeptRows& kept, char* out)
      : head_(head), kept_(kept), out_(out), row_bytes_(head.depth * size_of(head.dtype)), row_(make_buffer(head.depth)) {
    if (out == nullptr) return;
    if (head.dtype != Dtype::kFloat32) sums_.resize(kept.size() * head.depth);
    for (int64_t n = 0; n < kept.size(); ++n) std::fill_n(sum(n), head.depth, 0.0f);
  }

  void add(const ChunkGradients& gradients, int64_t begin, int64_t rows) {
    for (int64_t n = 0; out_ != nullptr && n < rows; ++n) {
      gradients.read_hidden(n, row_.get());
      float* const to = sum(begin + n);
      for (int64_t d = 0; d < head_.depth; ++d) to[d] += row_[d];
    }
  }

  void finish() {
    for (int64_t n = 0; !sums_.empty() && n < kept_.size(); ++n) {
      head_.kernels.store_row(sum(n), out_ + kept_.slot(n) * row_bytes_, head_.depth, head_.dtype);
    }
  }

 private:
  float* sum(int64_t n) {
    return sums_.empty() ? reinterpret_cast<float*>(out_ + kept_.slot(n) * row_bytes_) : sums_.data() + n * head_.depth;
  }

  const Head& head_;
  const KeptRows& kept_;
  char* const out_;
  const int64_t row_bytes_;
  Buffer row_;
  std::vector<float> sums_;
};

// A chunk of rows once all its logits have been seen, and kept.
struct ChunkTotals {
  PartialTable table;
  Buffer picked;
};

ChunkTotals sweep_chunk(const Head& head, const RowChunk& chunk, bool stats, const Sweeps& sweeps, float* logits) {
  ChunkTotals totals = {.table = PartialTable(PanelGroups(head).count, chunk.padded),
                        .picked = make_buffer(chunk.rows)};
  sweep_groups(head, chunk, sweeps, totals.table, totals.picked.get(), logits);
  for (int64_t first = 0; first < chunk.rows; first += head.kernels.lanes) totals.table.combine(head, first, stats);
  return totals;
}

// The chunk's share of the loss, and what its slopes are; terms are those of its rows.
double loss_of_chunk(const ChunkTotals& totals, int64_t rows, const LossTerms& terms, RowSlopes& slopes) {
  double loss = 0;
  const std::vector<float> zeros(rows);
  slopes = {.lse = zeros, .lse_lo = zeros, .weight = zeros, .onehot = zeros, .moment = {}, .entropy = {}};
  for (int64_t n = 0; n < rows; ++n) {
    const RowTotal total = totals.table.total(n);
    const double w = terms.row_weight[n], lse = total.lse();
    if (w != 0.0) loss += w * (total.nll(totals.picked[n]) + terms.z_loss * lse * lse);
    slopes.lse[n] = static_cast<float>(lse);
    slopes.lse_lo[n] = static_cast<float>(lse - slopes.lse[n]);
    slopes.weight[n] = static_cast<float>(w * (1.0 + 2.0 * terms.z_loss * lse));
    slopes.onehot[n] = static_cast<float>(w);
  }
  return loss;
}

RowSlopes slopes_of(const KeptRows& kept, int64_t begin, int64_t rows, const Upstream& up) {
  const std::vector<float> zeros(rows);
  RowSlopes slopes = {.lse = zeros,
                      .lse_lo = zeros,
                      .weight = zeros,
                      .onehot = zeros,
                      .moment = std::vector<float>(up.entropy == nullptr ? 0 : rows),
                      .entropy = zeros};
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t slot = kept.slot(begin + n);
    const float nll = up.nll == nullptr ? 0.0f : up.nll[slot];
    slopes.lse[n] = up.saved_lse[slot];
    slopes.weight[n] = nll + (up.lse == nullptr ? 0.0f : up.lse[slot]);
    slopes.onehot[n] = nll;
    if (up.entropy == nullptr) continue;
    slopes.moment[n] = up.entropy[slot];
    slopes.entropy[n] = up.saved_entropy[slot];
  }
  return slopes;
}

void store_rows(const Head& head, const float* from, char* to, int64_t rows, Dtype dtype, int threads) {
  constexpr int64_t kRows = 256;
  parallel_for((rows + kRows - 1) / kRows, threads, [&](int64_t task, int) {
    const int64_t first = task * kRows * head.depth, count = std::min(kRows, rows - task * kRows) * head.depth;
    head.kernels.store_row(from + first, to + first * size_of(dtype), count, dtype);
  });
}

template <class T>
void clear(T* data, int64_t count) {
  if (data != nullptr) std::fill_n(data, count, T{});
}

}  // namespace

double linear_cross_entropy(const Head& head, const KeptRows& kept, const LossTerms& terms, const LossGradients& out,
                            const NllOutputs& values, int threads) {
  const Head exact = for_gradients(head, kept);
  const Needs needs = {.hidden = out.hidden != nullptr, .weight = out.weight != nullptr, .bias = out.bias != nullptr};
  const Dtype stored = out.rounded ? Dtype::kBFloat16 : Dtype::kFloat32;
  const int64_t weight_bytes = head.vocab * head.depth * size_of(stored);
  if (kept.size() == 0) {
    clear(out.weight, weight_bytes);
    clear(out.bias, head.vocab);
    return 0;
  }
  const int64_t columns = head.panels() * head.kernels.panel;
  const int64_t chunk_rows = rows_within(head, kLogitBytes, columns, kept.size());
  const bool direct = out.rounded && chunk_rows >= kept.size();
  const Buffer sums = make_buffer(needs.weight && out.rounded && !direct ? head.vocab * head.depth : 0);
  float* grad_weight = out.rounded ? sums.get() : reinterpret_cast<float*>(out.weight);
  uint16_t* grad_rounded = direct ? reinterpret_cast<uint16_t*>(out.weight) : nullptr;
  const Buffer logits = make_buffer(padded_rows(head, chunk_rows) * columns);
  const Buffer row = make_buffer(head.depth);
  const bool stats = values.stats();
  const Sweeps sweeps =
      make_sweeps(head, chunk_rows, stats, sweepers(head, chunk_rows, stats, PanelGroups(head).count, threads));
  double loss = 0;
  for (int64_t begin = 0; begin < kept.size(); begin += chunk_rows) {
    const RowRange range = {.begin = begin, .count = std::min(chunk_rows, kept.size() - begin)};
    const RowChunk chunk(head, kept, range, threads);
    const ChunkTotals totals = sweep_chunk(head, chunk, stats, sweeps, logits.get());
    RowSlopes slopes;
    loss += loss_of_chunk(totals, chunk.rows, {.row_weight = terms.row_weight + begin, .z_loss = terms.z_loss}, slopes);
    for (int64_t n = 0; n < chunk.rows; ++n) values.store(kept.slot(begin + n), totals.table.total(n), totals.picked[n]);
    ChunkGradients gradients(exact, chunk, needs, threads);
    gradients.run({.begin = 0,
                   .end = head.panels(),
                   .grad_weight = grad_weight,
                   .grad_rounded = grad_rounded,
                   .grad_bias = out.bias,
                   .add = begin > 0},
                  slopes, logits.get());
    if (!needs.hidden) continue;
    for (int64_t n = 0; n < chunk.rows; ++n) {
      gradients.read_hidden(n, row.get());
      char* to = out.hidden + kept.slot(begin + n) * head.depth * size_of(stored);
      head.kernels.store_row(row.get(), to, head.depth, stored);
    }
  }
  if (needs.weight && out.rounded && !direct) {
    store_rows(head, sums.get(), out.weight, head.vocab, stored, threads);
  }
  return loss;
}

void linear_nll_backward(const Head& head, const KeptRows& kept, const Upstream& upstream, const StoredGradients& out,
                         int threads) {
  const int64_t most = std::max<int64_t>(kHiddenBytes / (4 * head.depth), 1);
  if (out.hidden != nullptr && head.dtype != Dtype::kFloat32 && kept.size() > most) {  // so many rows at a time
    if (out.weight != nullptr || out.bias != nullptr) {
      linear_nll_backward(head, kept, upstream, {.hidden = nullptr, .weight = out.weight, .bias = out.bias}, threads);
    }
    for (int64_t begin = 0; begin < kept.size(); begin += most) {
      linear_nll_backward(head, kept.part(begin, most), upstream,
                          {.hidden = out.hidden, .weight = nullptr, .bias = nullptr}, threads);
    }
    return;
  }
  const Head exact = for_gradients(head, kept);
  const Needs needs = {.hidden = out.hidden != nullptr, .weight = out.weight != nullptr, .bias = out.bias != nullptr};
  const int64_t width = head.kernels.panel, depth = head.depth;
  if (kept.size() == 0) {
    clear(out.weight, head.vocab * depth * size_of(head.dtype));
    clear(out.bias, head.vocab);
    return;
  }
  const int64_t chunk_rows = rows_within(head, kBlockBytes, 256 * width, kept.size());
  const int64_t block = std::clamp<int64_t>(
      kBlockBytes / (4 * width * std::max(padded_rows(head, chunk_rows), depth)), 1, head.panels());
  const Buffer logits = make_buffer(padded_rows(head, chunk_rows) * block * width);
  // One chunk of rows: what is summed is what is stored.
  const bool direct = chunk_rows >= kept.size() && head.dtype != Dtype::kFloat16;
  const bool rounded = direct && head.dtype == Dtype::kBFloat16;
  const Buffer sums = make_buffer(needs.weight && !direct ? block * width * depth : 0);
  const Buffer picked = make_buffer(chunk_rows);
  HiddenSums grad_hidden(head, kept, out.hidden);
  const Sweeps sweeps = make_sweeps(head, chunk_rows, false, sweepers(head, chunk_rows, false, block, threads));
  for (int64_t first = 0; first < head.panels(); first += block) {
    const int64_t last = std::min(first + block, head.panels());
    for (int64_t begin = 0; begin < kept.size(); begin += chunk_rows) {
      const RowRange range = {.begin = begin, .count = std::min(chunk_rows, kept.size() - begin)};
      const RowChunk chunk(head, kept, range, threads);
      const int64_t together = std::clamp<int64_t>((last - first) / (8 * threads), 1, 8);  // panels of a task
      const int sweeping = static_cast<int>(sweeps.size());
      parallel_for((last - first + together - 1) / together, sweeping, [&](int64_t i, int worker) {
        const int64_t panel = first + i * together;
        sweeps[worker]->start(chunk);
        sweeps[worker]->fold_panels(chunk, panel, std::min(panel + together, last), head.panels(), picked.get(),
                                    {.data = logits.get(), .first = first});
      });
      ChunkGradients gradients(exact, chunk, needs, threads);
      char* stored = needs.weight ? out.weight + first * width * depth * size_of(head.dtype) : nullptr;
      gradients.run({.begin = first,
                     .end = last,
                     .grad_weight = direct ? reinterpret_cast<float*>(stored) : sums.get(),
                     .grad_rounded = rounded ? reinterpret_cast<uint16_t*>(stored) : nullptr,
                     .grad_bias = needs.bias ? out.bias + first * width : nullptr,
                     .add = begin > 0},
                    slopes_of(kept, begin, chunk.rows, upstream), logits.get());
      grad_hidden.add(gradients, begin, chunk.rows);
    }
    const int64_t bytes = size_of(head.dtype), rows = std::min(last * width, head.vocab) - first * width;
    if (needs.weight && !direct) {
      store_rows(head, sums.get(), out.weight + first * width * depth * bytes, rows, head.dtype, threads);
    }
  }
  grad_hidden.finish();
}

}  // namespace vig
