#include <algorithm>
#include <cmath>

#include "cast.h"
#include "check.h"
#include "linear_cross_entropy.h"
#include "linear_nll.h"

namespace {

struct Problem {
  int64_t rows, depth, vocab;
  vig::Dtype dtype;
  float scale, cap;
  bool bias;
};

// Inputs stored as the head reads them, exactly as long as they must be, and the same values in double.
struct Inputs {
  std::vector<char> hidden, weight;
  std::vector<double> hidden_values, weight_values;
  std::vector<float> bias;
  std::vector<int64_t> target;

  explicit Inputs(const Problem& p) {
    Draw draw(p.rows + 7 * p.depth + 77 * p.vocab);
    store(draw.values(p.rows * p.depth), p.dtype, hidden, hidden_values);
    store(draw.values(p.vocab * p.depth), p.dtype, weight, weight_values);
    if (p.bias) bias = draw.values(p.vocab);
    for (int64_t n = 0; n < p.rows; ++n) target.push_back(n % 3 == 1 ? -100 : draw.word() % p.vocab);
  }

  static void store(const std::vector<float>& values, vig::Dtype dtype, std::vector<char>& out,
                    std::vector<double>& exact) {
    const int64_t size = vig::size_of(dtype);
    out.resize(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) vig::store_element(values[i], out.data() + i * size, dtype);
    for (size_t i = 0; i < values.size(); ++i) {
      exact.push_back(dtype == vig::Dtype::kFloat32    ? values[i]
                      : dtype == vig::Dtype::kBFloat16 ? vig::from_bfloat16(out.data() + 2 * i)
                                                       : values[i]);
    }
  }
};

vig::Head head_of(const vig::Kernels& kernels, const Problem& p, const Inputs& in) {
  return {kernels,
          {.dtype = p.dtype,
           .depth = p.depth,
           .vocab = p.vocab,
           .weight = in.weight.data(),
           .weight_stride = p.depth * vig::size_of(p.dtype),
           .bias = p.bias ? in.bias.data() : nullptr,
           .scale = p.scale,
           .cap = p.cap}};
}

vig::NllOutputs only_nll(std::vector<float>& nll) {
  return {.nll = nll.data(), .lse = nullptr, .lse_lo = nullptr, .entropy = nullptr, .argmax = nullptr};
}

// Row n's logits in double.
std::vector<double> logits_of(const Problem& p, const Inputs& in, int64_t n) {
  std::vector<double> logits(p.vocab);
  for (int64_t v = 0; v < p.vocab; ++v) {
    double sum = p.bias ? in.bias[v] : 0.0;
    for (int64_t d = 0; d < p.depth; ++d) sum += in.hidden_values[n * p.depth + d] * in.weight_values[v * p.depth + d];
    sum *= p.scale;
    logits[v] = p.cap == 0 ? sum : p.cap * std::tanh(sum / p.cap);
  }
  return logits;
}

double lse_of(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

bool close(double found, double exact, double tolerance) { return std::fabs(found - exact) <= tolerance; }

// The divergence of each row from the row as far from the other end: a second pass whose rows run backwards.
void check_divergence(const vig::Kernels& kernels, const Problem& p, const Inputs& in, double tolerance) {
  const int64_t row = p.depth * vig::size_of(p.dtype);
  const vig::Head head = head_of(kernels, p, in);
  vig::KeptRows kept;
  kept.add(in.hidden.data(), row, in.target.data(), p.rows, -100);
  kept.add(in.hidden.data() + (p.rows - 1) * row, -row, in.target.data(), p.rows, -100);
  std::vector<float> nll(2 * p.rows), plain(2 * p.rows), kl(p.rows);
  vig::linear_nll(head, kept, only_nll(plain), 2);
  vig::NllOutputs out = only_nll(nll);
  out.kl = kl.data();
  vig::linear_nll(head, kept, out, 2);
  for (int64_t i = 0; i < kept.size() / 2; ++i) {
    const int64_t n = kept.slot(i);
    const std::vector<double> first = logits_of(p, in, n), second = logits_of(p, in, p.rows - 1 - n);
    const double lse = lse_of(first), other = lse_of(second);
    double exact = other - lse;
    for (int64_t v = 0; v < p.vocab; ++v) exact += std::exp(first[v] - lse) * (first[v] - second[v]);
    CHECK(nll[n] == plain[n], "%s: kl changes bits of row %ld", kernels.name, long(n));
    CHECK(close(kl[n], exact, 4 * tolerance), "%s kl %g, not %g", kernels.name, kl[n], exact);
  }
}

void check_problem(const vig::Kernels& kernels, const Problem& p) {
  const Inputs in(p);
  const int64_t size = vig::size_of(p.dtype);
  const vig::Head head = head_of(kernels, p, in);
  vig::KeptRows kept;
  kept.add(in.hidden.data(), p.depth * size, in.target.data(), p.rows, -100);
  std::vector<float> nll(p.rows), lse(p.rows), entropy(p.rows), again(p.rows);
  std::vector<int64_t> argmax(p.rows);
  vig::linear_nll(head, kept,
                  {.nll = nll.data(),
                   .lse = lse.data(),
                   .lse_lo = nullptr,
                   .entropy = entropy.data(),
                   .argmax = argmax.data()},
                  1);
  vig::linear_nll(head, kept, only_nll(again), 3);
  const double tolerance = 1e-5 + 1e-6 * p.depth + (p.dtype == vig::Dtype::kFloat16 ? 2e-3 * p.depth : 0);
  if (kept.size() > 0) check_divergence(kernels, p, in, tolerance);
  std::vector<double> grad_hidden(p.rows * p.depth), grad_weight(p.vocab * p.depth);
  double loss = 0, largest = 0;
  for (int64_t i = 0; i < kept.size(); ++i) {
    const int64_t n = kept.slot(i);
    std::vector<double> logits = logits_of(p, in, n);
    const double exact = lse_of(logits);
    CHECK(nll[n] == again[n], "%s: threads change bits of row %ld", kernels.name, long(n));
    CHECK(close(lse[n], exact, tolerance), "%s lse %g, not %g", kernels.name, lse[n], exact);
    CHECK(close(nll[n], exact - logits[in.target[n]], tolerance), "%s nll %g", kernels.name, nll[n]);
    CHECK(argmax[n] >= 0 && argmax[n] < p.vocab, "%s argmax %ld", kernels.name, long(argmax[n]));
    loss += exact - logits[in.target[n]];
    for (int64_t v = 0; v < p.vocab; ++v) {
      const double ratio = p.cap == 0 ? 0 : logits[v] / p.cap;
      const double slope = (std::exp(logits[v] - exact) - (v == in.target[n])) * (1 - ratio * ratio) * p.scale;
      for (int64_t d = 0; d < p.depth; ++d) {
        grad_hidden[n * p.depth + d] += slope * in.weight_values[v * p.depth + d];
        grad_weight[v * p.depth + d] += slope * in.hidden_values[n * p.depth + d];
      }
    }
  }
  std::vector<float> hidden(p.rows * p.depth), weight(p.vocab * p.depth), bias(p.vocab);
  const std::vector<float> ones(p.rows, 1.0f);
  const double found = vig::linear_cross_entropy(head, kept, {.row_weight = ones.data(), .z_loss = 0.0},
                                                 {.hidden = reinterpret_cast<char*>(hidden.data()),
                                                  .weight = reinterpret_cast<char*>(weight.data()),
                                                  .rounded = false,
                                                  .bias = p.bias ? bias.data() : nullptr},
                                                 {}, 2);
  CHECK(close(found, loss, tolerance * p.rows), "%s loss %g, not %g", kernels.name, found, loss);
  const double slack = p.dtype == vig::Dtype::kFloat32 ? 1e-5 : 2e-2;
  for (double g : grad_weight) largest = std::max(largest, std::fabs(g));
  for (size_t i = 0; i < weight.size(); ++i) {
    CHECK(close(weight[i], grad_weight[i], slack * (largest + 1)), "%s dW %g, not %g", kernels.name, weight[i],
          grad_weight[i]);
  }
  for (size_t i = 0; i < hidden.size(); ++i) {
    CHECK(close(hidden[i], grad_hidden[i], slack * (p.depth + 1)), "%s dH %g, not %g", kernels.name, hidden[i],
          grad_hidden[i]);
  }
  if (p.dtype == vig::Dtype::kBFloat16) {
    std::vector<uint16_t> rounded_hidden(hidden.size()), rounded_weight(weight.size());
    vig::linear_cross_entropy(head, kept, {.row_weight = ones.data(), .z_loss = 0.0},
                              {.hidden = reinterpret_cast<char*>(rounded_hidden.data()),
                               .weight = reinterpret_cast<char*>(rounded_weight.data()),
                               .rounded = true,
                               .bias = nullptr},
                              {}, 2);
    for (size_t i = 0; i < weight.size(); ++i) {
      CHECK(rounded_weight[i] == vig::to_bfloat16(weight[i]), "%s dW %zu is not the rounded sum", kernels.name, i);
    }
  }
  std::vector<char> stored_hidden(p.rows * p.depth * size), stored_weight(p.vocab * p.depth * size);
  vig::linear_nll_backward(
      head, kept,
      {.nll = ones.data(),
       .lse = nullptr,
       .entropy = ones.data(),
       .saved_lse = lse.data(),
       .saved_entropy = entropy.data()},
      {.hidden = stored_hidden.data(), .weight = stored_weight.data(), .bias = bias.data()}, 2);
}

// Values beside the loss are those of linear_nll, of few rows too, whose gradients are multiplied in float32.
void check_loss_of_few(const vig::Head& head, const vig::KeptRows& kept, const std::vector<float>& nll) {
  const std::vector<float> ones(kept.size(), 1.0f);
  for (int64_t count : {31, 32}) {
    std::vector<float> found(nll.size());
    vig::linear_cross_entropy(head, kept.part(0, count), {.row_weight = ones.data(), .z_loss = 0.0},
                              {.hidden = nullptr, .weight = nullptr, .rounded = false, .bias = nullptr},
                              only_nll(found), 2);
    for (int64_t i = 0; i < std::min(count, kept.size()); ++i) {
      const int64_t n = kept.slot(i);
      CHECK(found[n] == nll[n], "%s: the loss of %ld rows changes bits of row %ld", head.kernels.name, long(count),
            long(n));
    }
  }
}

// Rows enough for interleaved packing (twelve tiles, of which eight are kept), groups of more panels than are packed
// together, the last of them not whole.
void check_many_rows(const vig::Kernels& kernels, const Problem& p) {
  const Inputs in(p);
  const int64_t row_bytes = p.depth * vig::size_of(p.dtype), few = 10;
  const vig::Head head = head_of(kernels, p, in);
  std::vector<float> nll(p.rows), alone(few);
  vig::KeptRows kept, first;
  kept.add(in.hidden.data(), row_bytes, in.target.data(), p.rows, -100);
  first.add(in.hidden.data(), row_bytes, in.target.data(), few, -100);
  vig::linear_nll(head, kept, only_nll(nll), 2);
  vig::linear_nll(head, first, only_nll(alone), 1);
  for (int64_t i = 0; i < first.size(); ++i) {
    const int64_t n = first.slot(i);
    CHECK(nll[n] == alone[n], "%s: other rows change bits of row %ld", kernels.name, long(n));
  }
  check_loss_of_few(head, kept, nll);
}

}  // namespace

void test_heads() {
  const vig::Dtype kinds[] = {vig::Dtype::kFloat32, vig::Dtype::kBFloat16, vig::Dtype::kFloat16};
  for (const vig::Kernels* kernels : all_kernels()) {
    for (vig::Dtype dtype : kinds) {
      check_problem(*kernels, {1, 1, 1, dtype, 1.0f, 0.0f, false});
      check_problem(*kernels, {7, 33, 65, dtype, 0.7f, 0.0f, true});
      check_problem(*kernels, {75, 40, 131, dtype, 1.3f, 5.0f, true});
      check_many_rows(*kernels, {12 * kernels->tile, 2113, 420, dtype, 0.1f, 0.0f, false});
      check_problem(*kernels, {50, 530, 97, dtype, 0.1f, 0.0f, false});
      check_problem(*kernels, {3, 4200, 35, dtype, 0.05f, 0.0f, false});
    }
  }
}
