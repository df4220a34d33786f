#include "linear_nll.h"

#include <algorithm>

#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // packed hidden rows of a chunk
constexpr int64_t kLaneBytes = 16 << 20;    // running values of a chunk, all threads together

int64_t rows_per_chunk(const Head& head, bool stats, bool pairs, int threads) {
  const int64_t tile = head.kernels.tile;
  const int64_t rows = std::min({kChunkRows, kPackedBytes / (4 * std::max<int64_t>(head.words(), 1)),
                                 kLaneBytes / (threads * PanelSweep::bytes_per_row(head, stats, pairs))});
  return std::max(rows / tile, int64_t{1}) * tile;
}

void finish_rows(const Head& head, const KeptRows& kept, const RowChunk& chunk, PartialTable& table,
                 const float* picked, const NllOutputs& out, int threads) {
  const int64_t lanes = head.kernels.lanes;
  const auto each_row = [&](auto&& finish) {
    parallel_for((chunk.rows + lanes - 1) / lanes, threads, [&](int64_t task, int) {
      for (int64_t n = task * lanes; n < std::min(chunk.rows, (task + 1) * lanes); ++n) finish(n);
    });
  };
  each_row([&](int64_t n) {
    if (n % lanes == 0) table.combine(head, n, out.stats());
    if (chunk.kept_row(n) >= 0) out.store(kept.slot(chunk.kept_row(n)), table.total(n), picked[n]);
  });
  if (out.kl == nullptr) return;
  each_row([&](int64_t n) {  // once both of its passes are there
    if (n < chunk.pass_rows()) out.kl[kept.slot(chunk.kept_row(n))] = table.divergence(n, chunk.apart + n);
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
  const bool stats = out.stats(), pairs = out.kl != nullptr;
  const PanelGroups groups(head);
  threads = static_cast<int>(std::min<int64_t>(threads, groups.count));
  const int64_t pass_rows = pairs ? kept.size() / 2 : kept.size();
  const int64_t most = rows_per_chunk(head, stats, pairs, threads);
  const int64_t chunk_rows = std::min(pairs ? std::max<int64_t>(most / 2, 1) : most, pass_rows);
  const int64_t held = pairs ? padded_rows(head, chunk_rows) + chunk_rows : chunk_rows;
  const Sweeps sweeps = make_sweeps(head, held, stats, threads, pairs);
  PartialTable table(groups.count, padded_rows(head, held), pairs);
  const Buffer picked = make_buffer(held);
  for (int64_t begin = 0; begin < pass_rows; begin += chunk_rows) {
    const RowRange range = {.begin = begin,
                            .count = std::min(chunk_rows, pass_rows - begin),
                            .second = pairs ? pass_rows : 0};
    const RowChunk chunk(head, kept, range, threads);
    sweep_groups(head, chunk, sweeps, table, picked.get(), nullptr);
    finish_rows(head, kept, chunk, table, picked.get(), out, threads);
  }
}

}  // namespace vig
