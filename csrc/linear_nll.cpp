#include "linear_nll.h"

#include <algorithm>
#include <vector>

#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // packed hidden rows of a chunk
constexpr int64_t kLaneBytes = 16 << 20;    // running values of a chunk, all threads together
constexpr int64_t kChunkRows = 4096;

int64_t rows_per_chunk(const Head& head, bool stats, int threads) {
  const int64_t tile = head.kernels.tile;
  const int64_t rows = std::min({kChunkRows, kPackedBytes / (4 * std::max<int64_t>(head.words(), 1)),
                                 kLaneBytes / (threads * PanelSweep::bytes_per_row(head, stats))});
  return std::max(rows / tile, int64_t{1}) * tile;
}

void finish_rows(const Head& head, const KeptRows& kept, int64_t begin, int64_t rows, PartialTable& table,
                 const float* picked, const NllOutputs& out, int threads) {
  const int64_t lanes = head.kernels.lanes;
  parallel_for((rows + lanes - 1) / lanes, threads, [&](int64_t task, int) {
    table.combine(head, task * lanes, out.stats());
    for (int64_t n = task * lanes; n < std::min(rows, (task + 1) * lanes); ++n) {
      out.store(kept.slot(begin + n), table.total(n), picked[n]);
    }
  });
}

}  // namespace

void NllOutputs::store(int64_t slot, const RowTotal& total, float picked) const {
  const double exact = total.lse();
  if (nll != nullptr) nll[slot] = static_cast<float>(total.nll(picked));
  if (lse != nullptr) lse[slot] = static_cast<float>(exact);
  if (lse_lo != nullptr) lse_lo[slot] = static_cast<float>(exact - static_cast<float>(exact));
  if (entropy != nullptr) entropy[slot] = static_cast<float>(total.entropy());
  if (argmax != nullptr) argmax[slot] = total.column;
}

void linear_nll(const Head& head, const KeptRows& kept, const NllOutputs& out, int threads) {
  if (kept.size() == 0) return;
  const bool stats = out.stats();
  const PanelGroups groups(head);
  threads = static_cast<int>(std::min<int64_t>(threads, groups.count));
  const int64_t chunk_rows = std::min(rows_per_chunk(head, stats, threads), kept.size());
  std::vector<std::unique_ptr<PanelSweep>> sweeps;
  for (int i = 0; i < threads; ++i) sweeps.push_back(std::make_unique<PanelSweep>(head, chunk_rows, stats));
  PartialTable table(groups.count, padded_rows(head, chunk_rows));
  const Buffer picked = make_buffer(chunk_rows);
  for (int64_t begin = 0; begin < kept.size(); begin += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, kept.size() - begin);
    const RowChunk chunk(head, kept, begin, rows, threads);
    parallel_for(groups.count, threads, [&](int64_t group, int worker) {
      PanelSweep& sweep = *sweeps[worker];
      sweep.start(rows);
      sweep.fold_panels(chunk, groups.begin(group), groups.end(group), groups.begin(group + threads), picked.get(),
                        {.data = nullptr, .first = 0});
      sweep.finish(rows, table.group(group));
    });
    finish_rows(head, kept, begin, rows, table, picked.get(), out, threads);
  }
}

}  // namespace vig
