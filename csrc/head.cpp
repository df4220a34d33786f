#include "head.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kPanelWords = 4096;  // words of D packed at a time: 512 KiB of an AVX-512 panel, half of an L2
constexpr int64_t kMaxGroups = 128;
constexpr double kLn2 = 0.69314718055994530942;

}  // namespace

void KeptRows::add(const char* data, int64_t stride, const int64_t* targets, int64_t count, int64_t ignore_index) {
  for (int64_t n = 0; n < count; ++n) {
    if (targets[n] == ignore_index) continue;
    hidden.push_back(data + n * stride);
    target.push_back(targets[n]);
    slot.push_back(offered + n);
  }
  offered += count;
}

Buffer make_buffer(int64_t floats) { return Buffer(new float[static_cast<size_t>(std::max<int64_t>(floats, 1))]); }

RowChunk::RowChunk(const Head& head, const KeptRows& kept, int64_t begin, int64_t count, int threads)
    : target(kept.target.data() + begin), rows(count), packed(make_buffer(round_up(count, head.kernels.tile) * head.words())) {
  const int64_t tile = head.kernels.tile, words = head.words();
  parallel_for((count + tile - 1) / tile, threads, [&](int64_t i, int) {
    const int64_t row = begin + i * tile;
    const int width = static_cast<int>(std::min(tile, begin + count - row));
    const int unit = static_cast<int>(tile / 3), padded = (width + unit - 1) / unit * unit;
    const char* rows_of_tile[64];
    for (int r = 0; r < padded; ++r) rows_of_tile[r] = kept.hidden[row + std::min(r, width - 1)];
    head.kernels.pack({reinterpret_cast<uint32_t*>(packed.get()) + i * tile * words, rows_of_tile, padded, head.dtype,
                       head.pairs(), 0, words, head.depth});
  });
}

PanelSweep::PanelSweep(const Head& head, int64_t max_rows, bool stats)
    : head_(head), stats_(stats), packed_(make_buffer(std::min(head.words(), kPanelWords) * head.kernels.panel)),
      product_(make_buffer((head.words() > kPanelWords ? round_up(max_rows, head.kernels.tile) : head.kernels.tile) *
                           head.kernels.panel)),
      lanes_(make_buffer(max_rows * lane_floats(head.kernels.lanes, stats))), bias_(make_buffer(head.kernels.panel)),
      rows_(head.kernels.panel) {}

int64_t PanelSweep::bytes_per_row(const Head& head, bool stats) {
  return 4 * (lane_floats(head.kernels.lanes, stats) + (head.words() > kPanelWords ? head.kernels.panel : 0));
}

void PanelSweep::start(int64_t rows) {
  const int lanes = head_.kernels.lanes, floats = lane_floats(lanes, stats_);
  std::fill_n(lanes_.get(), rows * floats, 0.0f);
  for (int64_t n = 0; n < rows; ++n) std::fill_n(lanes_.get() + n * floats, lanes, kLowest);
}

void PanelSweep::fold_panel(const RowChunk& chunk, int64_t panel, float* picked, float* keep) {
  const Kernels& k = head_.kernels;
  const int64_t first = panel * k.panel, words = head_.words();
  const float factor = head_.scale * (head_.cap == 0.0f ? 1.4426950408889634f : 1.0f);
  for (int i = 0; i < k.panel; ++i) {
    const int64_t row = std::min(first + i, head_.vocab - 1);
    rows_[i] = head_.weight + row * head_.weight_stride;
    bias_[i] = head_.bias == nullptr ? 0.0f : head_.bias[row] * factor;
  }
  for (int64_t begin = 0; begin < words || begin == 0; begin += kPanelWords) {
    const int64_t end = std::min(words, begin + kPanelWords);
    uint32_t* packed = reinterpret_cast<uint32_t*>(packed_.get());
    k.pack({packed, rows_.data(), k.panel, head_.dtype, head_.pairs(), begin, end, head_.depth});
    for (int64_t row = 0; row < chunk.rows; row += k.tile) {
      const int rows = static_cast<int>(std::min<int64_t>(k.tile, chunk.rows - row));
      const int unit = k.tile / 3, padded = (rows + unit - 1) / unit * unit;
      const uint32_t* a = reinterpret_cast<const uint32_t*>(chunk.packed.get()) + row * words + begin * padded;
      float* product = product_.get() + (words > kPanelWords ? row * k.panel : 0);
      k.multiply({a, packed, product, k.panel, end - begin, 1, 0, rows, begin > 0}, head_.pairs());
      if (end == words) fold_tile(chunk, panel, row, rows, product, picked, keep);
    }
  }
}

void PanelSweep::fold_tile(const RowChunk& chunk, int64_t panel, int64_t row, int rows, const float* product,
                           float* picked, float* keep) {
  const Kernels& k = head_.kernels;
  const int64_t first = panel * k.panel;
  const float scale = head_.scale * (head_.cap == 0.0f ? 1.4426950408889634f : 1.0f);
  k.fold({product, rows, static_cast<int>(std::min<int64_t>(k.panel, head_.vocab - first)), first, chunk.target + row,
          picked + row, lanes_.get() + row * lane_floats(k.lanes, stats_), stats_, scale, bias_.get(), head_.cap,
          keep == nullptr ? nullptr : keep + row * k.panel});
}

void PanelSweep::finish(int64_t rows, Partial* out) const {
  head_.kernels.reduce_lanes(lanes_.get(), rows, stats_, out);
}

PanelGroups::PanelGroups(const Head& head)
    : panels(head.panels()), per_group((panels + kMaxGroups - 1) / kMaxGroups),
      count((panels + per_group - 1) / per_group) {}

RowTotal combine(const Partial* partial, int64_t groups, int64_t stride, bool stats) {
  float maximum = partial[0].maximum;
  int32_t column = partial[0].column;
  for (int64_t g = 1; g < groups; ++g) {
    if (partial[g * stride].maximum <= maximum) continue;  // of equals the first
    maximum = partial[g * stride].maximum;
    column = partial[g * stride].column;
  }
  double sum = 0, moment = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Partial& part = partial[g * stride];
    const double change = double(part.maximum) - maximum;
    const float factor = std::exp2(static_cast<float>(change));
    sum += double(factor) * part.sum;
    if (stats && factor > 0) moment += double(factor) * (part.moment + part.sum * change);
  }
  return {maximum, std::log2(sum), moment / sum - std::log2(sum), column};
}

double RowTotal::nll(float picked) const { return kLn2 * ((maximum - picked) + log2_sum); }
double RowTotal::lse() const { return kLn2 * (maximum + log2_sum); }
double RowTotal::entropy() const { return -kLn2 * mean_below; }

}  // namespace vig
