#include "head.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cast.h"
#include "interrupt.h"
#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kPanelWords = 4096;  // words of D packed at a time: 512 KiB of an AVX-512 panel, half of an L2
constexpr int64_t kSmallGroups = 208;  // 48 large groups of 4, and 16
constexpr int64_t kAllPackedWords = 6 << 20;  // of all threads, where more than one panel is packed: 24 MiB
constexpr int64_t kFewTiles = 5;            // multiplied faster than the weight comes from memory: nothing to gain
constexpr int64_t kManyTiles = 170;         // packing is under half a percent of the products

// Hands out the weight rows of the next panels, a share with every tile, for the tile to prefetch.
class Prefetch {
 public:
  Prefetch(const Head& head, int64_t panel, int64_t panels, int64_t tiles) {
    const int64_t row_bytes = head.depth * (head.dtype == Dtype::kFloat32 ? 4 : 2);
    if (panel >= head.panels() || head.weight_stride != row_bytes) return;  // rows with gaps: left to the hardware
    const int64_t first = panel * head.kernels.panel;
    const int64_t rows = std::min(panels * head.kernels.panel, head.vocab - first);
    at_ = head.weight + first * row_bytes;
    end_ = at_ + rows * row_bytes;
    share_ = (rows * row_bytes / tiles + 127) / 64 * 64;
  }

  std::pair<const char*, const char*> take() {
    const char* from = at_;
    at_ = end_ - at_ > share_ ? at_ + share_ : end_;
    return {from, at_};
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t share_ = 0;
};

// Whole lines of a row of the weight.
int64_t lines_of_row(const Head& head) { return head.depth * size_of(head.dtype) / (4 * kLineWords); }

// Interleaved packing: the panels after those that are multiplied, a share with every tile.
class InterleavedPacking {
 public:
  InterleavedPacking() = default;

  InterleavedPacking(const Head& head, int64_t begin, int64_t end, uint32_t* to, int64_t tiles, bool first)
      : packing_{.from = head.weight + begin * head.kernels.panel * head.weight_stride,
                 .to = to,
                 .stride = head.weight_stride,
                 .words = head.words(),
                 .lines = lines_of_row(head),
                 .prefetch_bytes = kPrefetchLines * kLineBytes},
        left_((end - begin) * head.kernels.panel * packing_.lines), share_((left_ + tiles - 1) / tiles) {
    if (!first) return;  // the panels before have asked for the first lines
    for (int64_t i = 0; i < head.kernels.panel * kPrefetchLines; ++i) {
      const char* row = packing_.from + i / kPrefetchLines * packing_.stride;
      __builtin_prefetch(row + i % kPrefetchLines * kLineBytes, 0, 2);
    }
  }

  // What a tile copies, and how many lines of it.
  std::pair<Packing*, int64_t> take() {
    const int64_t lines = std::min(left_, share_);
    left_ -= lines;
    return {lines > 0 ? &packing_ : nullptr, lines};
  }

 private:
  static constexpr int64_t kLineBytes = 4 * kLineWords;
  Packing packing_{};
  int64_t left_ = 0, share_ = 0;
};

}  // namespace

void KeptRows::add(const char* data, int64_t stride, const int64_t* targets, int64_t count, int64_t ignore_index) {
  offers_.push_back({data, stride, targets, offered_});
  slots_.reserve(slots_.size() + count - std::count(targets, targets + count, ignore_index));
  for (int64_t n = 0; n < count; ++n) {
    if (targets[n] != ignore_index) slots_.push_back(offered_ + n);
  }
  offered_ += count;
}

KeptRows KeptRows::part(int64_t begin, int64_t count) const {
  KeptRows rows;
  rows.offers_ = offers_;
  rows.slots_.assign(slots_.begin() + begin, slots_.begin() + std::min(begin + count, size()));
  rows.offered_ = offered_;
  return rows;
}

int64_t padded_rows(const Head& head, int64_t rows) {
  return round_up(rows, std::lcm(head.kernels.tile, head.kernels.lanes));
}

RowChunk::RowChunk(const Head& head, const KeptRows& kept, const RowRange& which, int threads)
    : range(which), apart(which.second > 0 ? padded_rows(head, which.count) : 0), rows(apart + which.count),
      padded(padded_rows(head, rows)), hidden(rows), target(rows), packed(make_buffer(padded * head.words())) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t from = kept_row(n);
    if (from < 0) continue;
    hidden[n] = kept.hidden(from);
    target[n] = kept.target(from);
  }
  const int64_t tile = head.kernels.tile, words = head.words();
  parallel_for((rows + tile - 1) / tile, threads, [&](int64_t i, int) {
    const int64_t row = i * tile;
    const int width = static_cast<int>(std::min(tile, (row < apart ? pass_rows() : rows) - row));
    if (width <= 0) return;
    const int padded = packed_rows(head.kernels, width);
    const char* rows_of_tile[64];
    for (int r = 0; r < padded; ++r) rows_of_tile[r] = hidden[row + std::min(r, width - 1)];
    head.kernels.pack_left({.out = reinterpret_cast<uint32_t*>(packed.get()) + i * tile * words,
                            .rows = rows_of_tile,
                            .width = padded,
                            .dtype = head.dtype,
                            .pairs = head.pairs(),
                            .begin = 0,
                            .end = words,
                            .depth = head.depth});
  });
}

PanelSweep::PanelSweep(const Head& head, int64_t max_rows, bool stats, int threads, bool pairs)
    : head_(head), stats_(stats), interleaved_(interleaves_packing(head, max_rows)),
      together_(panels_together(head, interleaved_, threads)),
      packed_(make_buffer(std::min(head.words(), kPanelWords) * head.kernels.panel * together_ *
                          (interleaved_ ? 2 : 1))),
      product_(make_buffer((head.words() > kPanelWords ? round_up(max_rows, head.kernels.tile) : head.kernels.tile) *
                           head.kernels.panel)),
      lanes_(make_buffer(padded_rows(head, max_rows) * lane_floats(head.kernels.lanes, stats))),
      bias_(make_buffer(head.kernels.panel * together_)),
      pair_(make_buffer(pairs ? 2 * head.kernels.tile * head.kernels.panel : 0)),
      difference_(make_buffer(pairs ? padded_rows(head, max_rows / 2) * 2 * head.kernels.lanes : 0)),
      rows_(head.kernels.panel) {}

bool PanelSweep::interleaves_packing(const Head& head, int64_t rows) {
  const int64_t tiles = rows / head.kernels.tile;
  const bool words_as_they_stand = head.dtype == Dtype::kFloat32 || head.pairs();
  return head.kernels.interleaves_packing && words_as_they_stand && lines_of_row(head) > 0 &&
         head.words() <= kPanelWords && tiles > kFewTiles && tiles <= kManyTiles;
}

int64_t PanelSweep::panels_together(const Head& head, bool interleaved, int threads) {
  if (head.words() > kPanelWords) return 1;  // packed block by block of D
  const int64_t panel_words = std::max<int64_t>(head.words(), 1) * head.kernels.panel;
  const int64_t most = interleaved ? head.kernels.interleaved_words : head.kernels.packed_words;
  return std::clamp<int64_t>(std::min(most, kAllPackedWords / threads / (interleaved ? 2 : 1)) / panel_words, 1, 16);
}

int64_t PanelSweep::bytes_per_row(const Head& head, bool stats, bool pairs) {
  const int64_t products = head.words() > kPanelWords ? head.kernels.panel : 0;
  return 4 * (lane_floats(head.kernels.lanes, stats) + products + (pairs ? head.kernels.lanes : 0));
}

Sweeps make_sweeps(const Head& head, int64_t max_rows, bool stats, int threads, bool pairs) {
  Sweeps sweeps;
  for (int i = 0; i < threads; ++i) {
    sweeps.push_back(std::make_unique<PanelSweep>(head, max_rows, stats, threads, pairs));
  }
  return sweeps;
}

void PanelSweep::start(const RowChunk& chunk) {
  fresh_ = true;
  const int64_t floats = lane_floats(head_.kernels.lanes, stats_);  // rows that only fill up the last vector
  for (int64_t end = chunk.pass_rows(); end <= chunk.rows; end += chunk.step()) {
    std::fill(lanes_.get() + end * floats, lanes_.get() + padded_rows(head_, end) * floats, 0.0f);
  }
}

void PanelSweep::fold_panels(const RowChunk& chunk, int64_t begin, int64_t end, int64_t next, float* picked,
                             KeptLogits keep) {
  for (int64_t panel = begin; panel < end && !interrupted(); panel += together_) {
    const int64_t last = std::min(panel + together_, end);
    const int64_t after = last < end ? last : next;
    if (head_.words() > kPanelWords) {
      fold_deep_panel(chunk, panel, after, picked, keep);
    } else {
      fold_shallow_panels(chunk, panel, last, end, after, picked, keep);
    }
    fresh_ = false;
  }
}

void PanelSweep::pack(int64_t panel, uint32_t* to, int64_t begin, int64_t end) {
  const Kernels& k = head_.kernels;
  for (int i = 0; i < k.panel; ++i) {
    rows_[i] = head_.weight + std::min(panel * k.panel + i, head_.vocab - 1) * head_.weight_stride;
  }
  k.pack({.out = to,
          .rows = rows_.data(),
          .width = k.panel,
          .dtype = head_.dtype,
          .pairs = head_.pairs(),
          .begin = begin,
          .end = end,
          .depth = head_.depth});
}

void PanelSweep::set_bias(int64_t panel, int64_t place) {
  const Kernels& k = head_.kernels;
  for (int i = 0; i < k.panel; ++i) {
    const int64_t row = std::min(panel * k.panel + i, head_.vocab - 1);
    bias_[place * k.panel + i] = head_.bias == nullptr ? 0.0f : head_.bias[row] * head_.scale;
  }
}

// The packed panels and one tile of rows stay in cache together, so that rows come from afar once for all of them.
void PanelSweep::fold_shallow_panels(const RowChunk& chunk, int64_t begin, int64_t end, int64_t group_end, int64_t next,
                                     float* picked, KeptLogits keep) {
  const Kernels& k = head_.kernels;
  const int64_t words = head_.words(), panel_words = words * k.panel;
  const int64_t passes = chunk.apart > 0 ? 2 : 1;
  const int64_t tiles = (end - begin) * passes * ((chunk.pass_rows() + k.tile - 1) / k.tile);
  const int64_t coming = std::min(end + together_, group_end);
  // The last rows are left to pack().
  const bool swap = interleaved_ && coming > end && coming * k.panel <= head_.vocab;
  for (int64_t panel = begin; panel < end; ++panel) {
    if (!packed_already_) pack(panel, packed(half_) + (panel - begin) * panel_words, 0, words);
    set_bias(panel, panel - begin);
  }
  InterleavedPacking packer =
      swap ? InterleavedPacking(head_, end, coming, packed(1 - half_), tiles, !packed_already_) : InterleavedPacking();
  Prefetch prefetch(head_, swap ? head_.panels() : next, end - begin, tiles);
  for (int64_t first = 0; first < chunk.pass_rows(); first += k.tile) {
    const int rows = static_cast<int>(std::min<int64_t>(k.tile, chunk.pass_rows() - first));
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint32_t* b = packed(half_) + (panel - begin) * panel_words;
      for (int64_t row = first; row < chunk.rows; row += chunk.step()) {
        const auto [from, to] = prefetch.take();
        const auto [packing, lines] = packer.take();
        k.multiply({.a = reinterpret_cast<const uint32_t*>(chunk.packed.get()) + row * words,
                    .b = b,
                    .c = product_.get(),
                    .ldc = k.panel,
                    .words = words,
                    .rows = rows,
                    .prefetch = from,
                    .prefetch_end = to,
                    .packing = packing,
                    .lines = lines},
                   head_.pairs());
        fold_tile(chunk, panel, panel - begin, row, rows, product_.get(), picked, keep);
      }
    }
  }
  packed_already_ = swap;
  if (!swap) return;
  half_ = 1 - half_;
  const int64_t whole = lines_of_row(head_) * kLineWords;
  for (int64_t panel = end; panel < coming && whole < words; ++panel) {
    pack(panel, packed(half_) + (panel - end) * panel_words + whole * k.panel, whole, words);
  }
}

// One panel whose columns are too many for the cache: block by block of D, with the products of all rows held between.
void PanelSweep::fold_deep_panel(const RowChunk& chunk, int64_t panel, int64_t next, float* picked, KeptLogits keep) {
  const Kernels& k = head_.kernels;
  const int64_t words = head_.words(), blocks = (words + kPanelWords - 1) / kPanelWords;
  const int64_t tiles = (chunk.pass_rows() + k.tile - 1) / k.tile;
  Prefetch prefetch(head_, next, 1, blocks * tiles * (chunk.apart > 0 ? 2 : 1));
  for (int64_t begin = 0; begin < words; begin += kPanelWords) {
    const int64_t end = std::min(words, begin + kPanelWords);
    pack(panel, packed(0), begin, end);
    set_bias(panel, 0);
    for (int64_t first = 0; first < chunk.pass_rows(); first += k.tile) {
      const int rows = static_cast<int>(std::min<int64_t>(k.tile, chunk.pass_rows() - first));
      const int padded = packed_rows(k, rows);
      for (int64_t row = first; row < chunk.rows; row += chunk.step()) {
        float* product = product_.get() + row * k.panel;
        const auto [from, to] = prefetch.take();
        k.multiply({.a = reinterpret_cast<const uint32_t*>(chunk.packed.get()) + row * words + begin * padded,
                    .b = packed(0),
                    .c = product,
                    .ldc = k.panel,
                    .words = end - begin,
                    .rows = rows,
                    .accumulate = begin > 0,
                    .prefetch = from,
                    .prefetch_end = to},
                   head_.pairs());
        if (end == words) fold_tile(chunk, panel, 0, row, rows, product, picked, keep);
      }
    }
  }
}

void PanelSweep::fold_tile(const RowChunk& chunk, int64_t panel, int64_t place, int64_t row, int rows,
                           const float* product, float* picked, KeptLogits keep) {
  const Kernels& k = head_.kernels;
  const int64_t first = panel * k.panel;
  const bool pair = chunk.apart > 0, second = pair && row >= chunk.apart;
  const int64_t floats = lane_floats(k.lanes, stats_), of_first = second ? row - chunk.apart : row;
  const FirstPass pass = {.logits = pair_.get(),
                          .weights = pair_.get() + k.tile * k.panel,
                          .lanes = lanes_.get() + of_first * floats,
                          .sums = difference_.get() + of_first * 2 * k.lanes};
  float* kept = nullptr;
  if (keep.data != nullptr) kept = keep.data + ((panel - keep.first) * chunk.padded + row) * k.panel;
  k.fold({.product = product,
          .rows = rows,
          .columns = static_cast<int>(std::min<int64_t>(k.panel, head_.vocab - first)),
          .first_column = first,
          .target = chunk.target.data() + row,
          .picked = picked + row,
          .lanes = lanes_.get() + row * floats,
          .stats = stats_,
          .fresh = fresh_ && place == 0,
          .scale = head_.scale,
          .bias = bias_.get() + place * k.panel,
          .cap = head_.cap,
          .keep = kept,
          .first = pair ? &pass : nullptr,
          .second = second});
}

void PanelSweep::finish(const RowChunk& chunk, const Partials& out) const {
  const int64_t lanes = head_.kernels.lanes;
  head_.kernels.reduce_lanes(lanes_.get(), round_up(chunk.rows, lanes), stats_, out);
  for (int64_t n = 0; out.difference != nullptr && n < chunk.pass_rows(); ++n) {
    const float* sums = difference_.get() + n * 2 * lanes;  // all lanes of a row have one running max
    out.difference[n] = 0;
    for (int64_t i = 0; i < lanes; ++i) out.difference[n] += sums[lanes + i];
  }
}

PanelGroups::PanelGroups(const Head& head)
    : panels(head.panels()), small((panels + kSmallGroups - 1) / kSmallGroups),
      large_count(panels * 12 / 13 / (4 * small)),
      count(large_count + (panels - begin(large_count) + small - 1) / small) {}

PartialTable::PartialTable(int64_t groups, int64_t rows, bool pairs)
    : memory_(make_buffer((groups + 1) * rows * (pairs ? 6 : 5))), groups_(groups + 1) {
  for (int64_t g = 0; g <= groups; ++g) {
    float* at = memory_.get() + g * rows * (pairs ? 6 : 5);
    groups_[g] = {.running_max = at,
                  .sum = at + rows,
                  .moment = at + 2 * rows,
                  .greatest = at + 3 * rows,
                  .column = reinterpret_cast<int32_t*>(at + 4 * rows),
                  .difference = pairs ? at + 5 * rows : nullptr};
  }
}

void PartialTable::combine(const Head& head, int64_t first, bool stats) {
  head.kernels.combine(groups_.data(), static_cast<int64_t>(groups_.size()) - 1, first, stats, groups_.back());
}

RowTotal PartialTable::total(int64_t row) const {
  const Partials& all = groups_.back();
  return {.running_max = all.running_max[row],
          .log_sum = std::log(static_cast<double>(all.sum[row])),
          .mean_above = static_cast<double>(all.moment[row]) / all.sum[row],
          .column = all.column[row]};
}

void sweep_groups(const Head& head, const RowChunk& chunk, const Sweeps& sweeps, const PartialTable& table,
                  float* picked, float* logits) {
  const PanelGroups groups(head);
  const int threads = static_cast<int>(sweeps.size());
  parallel_for(groups.count, threads, [&](int64_t group, int worker) {
    PanelSweep& sweep = *sweeps[worker];
    sweep.start(chunk);
    sweep.fold_panels(chunk, groups.begin(group), groups.end(group), groups.begin(group + threads), picked,
                      {.data = logits, .first = 0});
    sweep.finish(chunk, table.group(group));
  });
}

// KL = sum_v p_v (z_v - z'_v) - lse + lse', where the sum is that of the differences over that of the weights.
double PartialTable::divergence(int64_t row, int64_t other) const {
  const RowTotal first = total(row), second = total(other);
  double difference = 0;
  for (size_t g = 0; g + 1 < groups_.size(); ++g) {
    const Partials& group = groups_[g];
    const double weight = std::exp(group.running_max[row] - first.running_max);
    if (weight > 0) difference += weight * group.difference[row];
  }
  const double mean = difference / groups_.back().sum[row];
  const double found = mean - ((first.running_max - second.running_max) + (first.log_sum - second.log_sum));
  return found < 0 ? 0 : found;
}

double RowTotal::nll(float picked) const { return (running_max - picked) + log_sum; }
double RowTotal::lse() const { return running_max + log_sum; }
double RowTotal::entropy() const { return log_sum - mean_above; }

}  // namespace vig
