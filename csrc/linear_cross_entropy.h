#pragma once
#include "linear_nll.h"
#include "logit_gradients.h"

namespace vig {

// Gradients by slot and row; null where not needed. hidden and weight: float32, or bfloat16 of a bfloat16 head if
// `rounded`.
struct LossGradients {
  char* hidden;
  char* weight;
  bool rounded;
  float* bias;
};

// sum_n w_n (nll_n + z_loss lse_n^2)
struct LossTerms {
  const float* row_weight;  // of the kept rows
  double z_loss;
};

// The loss over the kept rows, its gradients and the rows' values, in one sweep: three matrix products. Neither loss nor
// gradients depend on which values are wanted.
double linear_cross_entropy(const Head& head, const KeptRows& kept, const LossTerms& terms, const LossGradients& out,
                            const NllOutputs& values, int threads);

// Upstream gradients by slot (null: none) and what the forward found, in nats.
struct Upstream {
  const float *nll, *lse, *entropy;
  const float *saved_lse, *saved_entropy;
};

// Gradients of linear_nll for any upstream, with the logits formed anew: stored in the head's dtype (bias: float32).
struct StoredGradients {
  char* hidden;
  char* weight;
  float* bias;
};
void linear_nll_backward(const Head& head, const KeptRows& kept, const Upstream& upstream, const StoredGradients& out,
                         int threads);

}  // namespace vig
