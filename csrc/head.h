// What every op over an LM head shares: the problem, its kept rows packed for the register tiles, and the sweep of the
// weight's panels over them.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "buffers.h"
#include "kernels.h"

namespace vig {

constexpr int64_t kChunkRows = 4096;  // the most, whose running values and packed copies every thread works with

// logits (N, V) = softcap(scale * (hidden weight^T + bias)); strides in bytes, elements of a row are contiguous.
struct HeadData {
  Dtype dtype;
  int64_t depth;  // D
  int64_t vocab;  // V
  const char* weight;
  int64_t weight_stride;
  const float* bias;  // (V,) or null
  float scale, cap;   // cap 0: none
};

// A head and the kernels that multiply it: those of `all` for its dtype.
struct Head : HeadData {
  const bool in_float;  // bfloat16 is multiplied in float32 although there is an instruction for it
  const Kernels& kernels;

  Head(const Kernels& all, const HeadData& data, bool multiply_in_float = false)
      : HeadData(data), in_float(multiply_in_float),
        kernels(all.floats != nullptr && (dtype != Dtype::kBFloat16 || in_float) ? *all.floats : all) {}

  bool pairs() const { return dtype == Dtype::kBFloat16 && kernels.pairs && !in_float; }
  int64_t words() const { return pairs() ? round_up((depth + 1) / 2, kernels.word_unit) : depth; }
  int64_t panels() const { return (vocab + kernels.panel - 1) / kernels.panel; }
};

// Rows that are not ignored, in the order of the call. A call may have millions: one number is kept of each.
class KeptRows {
 public:
  void add(const char* data, int64_t stride, const int64_t* targets, int64_t count, int64_t ignore_index);
  int64_t size() const { return static_cast<int64_t>(slots_.size()); }
  int64_t slot(int64_t n) const { return slots_[n]; }  // where the row's results go: its number among all rows offered
  const char* hidden(int64_t n) const { return offer(n).data + (slots_[n] - offer(n).first) * offer(n).stride; }
  int64_t target(int64_t n) const { return offer(n).targets[slots_[n] - offer(n).first]; }
  KeptRows part(int64_t begin, int64_t count) const;  // at most `count` of them

 private:
  struct Offer {
    const char* data;
    int64_t stride;
    const int64_t* targets;
    int64_t first;  // slot of its row 0
  };
  const Offer& offer(int64_t n) const {
    size_t last = offers_.size() - 1;
    while (slots_[n] < offers_[last].first) --last;
    return offers_[last];
  }

  std::vector<Offer> offers_;
  std::vector<int64_t> slots_;
  int64_t offered_ = 0;
};

int64_t padded_rows(const Head& head, int64_t rows);  // to whole tiles and vectors

// Rows that a tile of `rows` has when it is packed: the smallest register tile is a third of the largest.
inline int packed_rows(const Kernels& kernels, int64_t rows) {
  return static_cast<int>(round_up(rows, kernels.tile / 3));
}

// Which rows of a call: [begin, begin + count) and, where there is a second pass, as many from begin + second on.
struct RowRange {
  int64_t begin, count;
  int64_t second = 0;  // from a row of the first pass to that of the second; 0: there is none
};

// Some rows of a call, packed tile by tile: tile i starts at word i * tile * words, as Kernels::pack_left leaves it.
struct RowChunk {
  RowRange range;
  int64_t apart;         // row n of the second pass is row apart + n, what lies between is not there; 0: one pass
  int64_t rows, padded;  // the last row's end; padded: as padded_rows
  std::vector<const char*> hidden;
  std::vector<int64_t> target;
  Buffer packed;

  RowChunk(const Head& head, const KeptRows& kept, const RowRange& range, int threads);
  int64_t pass_rows() const { return rows - apart; }
  int64_t step() const { return apart > 0 ? apart : rows; }  // from pass to pass
  // The number of row n among the kept ones, or -1 where there is none.
  int64_t kept_row(int64_t n) const {
    if (n < pass_rows()) return range.begin + n;
    return n < apart ? -1 : range.begin + range.second + n - apart;
  }
};

// Where the logits of panels from `first` on are kept: [panel][padded rows][panel columns].
struct KeptLogits {
  float* data;  // null: nowhere
  int64_t first;
};

// A thread's own memory for one panel at a time.
class PanelSweep {
 public:
  // threads: how many such sweeps there are; pairs: chunks have two passes
  PanelSweep(const Head& head, int64_t max_rows, bool stats, int threads, bool pairs = false);

  void start(const RowChunk& chunk);  // forgets all maxima and sums
  // Folds panels [begin, end) of the vocabulary into the rows' lanes; `next` is where this thread will probably go on.
  void fold_panels(const RowChunk& chunk, int64_t begin, int64_t end, int64_t next, float* picked, KeptLogits keep);
  void finish(const RowChunk& chunk, const Partials& out) const;

  static int64_t bytes_per_row(const Head& head, bool stats, bool pairs = false);

 private:
  static bool interleaves_packing(const Head& head, int64_t rows);
  static int64_t panels_together(const Head& head, bool interleaved, int threads);
  uint32_t* packed(int64_t half) {
    return reinterpret_cast<uint32_t*>(packed_.get()) + half * together_ * head_.words() * head_.kernels.panel;
  }
  void pack(int64_t panel, uint32_t* to, int64_t begin, int64_t end);
  void set_bias(int64_t panel, int64_t place);
  void fold_shallow_panels(const RowChunk& chunk, int64_t begin, int64_t end, int64_t group_end, int64_t next,
                           float* picked, KeptLogits keep);
  void fold_deep_panel(const RowChunk& chunk, int64_t panel, int64_t next, float* picked, KeptLogits keep);
  void fold_tile(const RowChunk& chunk, int64_t panel, int64_t place, int64_t row, int rows, const float* product,
                 float* picked, KeptLogits keep);

  const Head& head_;
  const bool stats_, interleaved_;  // interleaved: the next panels are packed between products, in the other half
  const int64_t together_;
  bool fresh_ = true;
  int64_t half_ = 0;
  bool packed_already_ = false;  // the panels that are next stand packed in this half
  Buffer packed_, product_, lanes_, bias_;
  Buffer pair_, difference_;  // logits and weights of a tile of the first pass; sums over the differences of both
  std::vector<const char*> rows_;
};

using Sweeps = std::vector<std::unique_ptr<PanelSweep>>;

Sweeps make_sweeps(const Head& head, int64_t max_rows, bool stats, int threads, bool pairs = false);

// Panels are summed in fixed groups, a function of V alone, so that bits depend on neither threads nor other rows.
// Large groups first, then small ones, so that threads end together.
struct PanelGroups {
  int64_t panels, small, large_count, count;  // small: panels of a small group; a large one has four times as many
  explicit PanelGroups(const Head& head);
  int64_t begin(int64_t group) const {
    const int64_t large = group < large_count ? group : large_count;
    return (4 * large + group - large) * small;
  }
  int64_t end(int64_t group) const { return begin(group + 1) < panels ? begin(group + 1) : panels; }
};

// A row's values over all groups, in nats.
struct RowTotal {
  double running_max, log_sum, mean_above;  // mean_above: softmax mean of (logit - running_max)
  int32_t column;                           // of the first greatest logit
  double nll(float picked) const;
  double lse() const;
  double entropy() const;
};

// What each group of panels gathered for each row, and their sum in the groups' order.
class PartialTable {
 public:
  PartialTable(int64_t groups, int64_t padded_rows, bool pairs = false);
  const Partials& group(int64_t g) const { return groups_[g]; }
  void combine(const Head& head, int64_t first, bool stats);  // one vector of rows, from `first` on
  RowTotal total(int64_t row) const;
  // KL divergence in nats of the softmax of `row` from that of row `other` of the second pass.
  double divergence(int64_t row, int64_t other) const;

 private:
  Buffer memory_;
  std::vector<Partials> groups_;  // the last one is the sum
};

// Folds all panels into a chunk's rows, group by group, on as many threads as there are sweeps. logits: where all of
// them are kept, as KeptLogits, or null.
void sweep_groups(const Head& head, const RowChunk& chunk, const Sweeps& sweeps, const PartialTable& table,
                  float* picked, float* logits);

}  // namespace vig
