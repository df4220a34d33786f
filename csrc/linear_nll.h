#pragma once
#include "head.h"

namespace vig {

// Results by slot; null where not wanted.
struct NllOutputs {
  float* nll;
  float* lse;
  float* lse_lo;  // lse + lse_lo is the log-sum-exp beyond float32's precision
  float* entropy;
  int64_t* argmax;
  float* kl = nullptr;  // of two passes over rows that correspond, by slot of the first

  bool stats() const { return entropy != nullptr || argmax != nullptr; }  // those that the plain sums do not give
  void store(int64_t slot, const RowTotal& total, float picked) const;
};

// nll = lse - logit[target], in nats, for every kept row; slots of other rows are left alone. Where kl is wanted the
// second half of the rows are those of a second pass: their logits meet those of the first in the tile.
void linear_nll(const Head& head, const KeptRows& kept, const NllOutputs& out, int threads);

}  // namespace vig
