// Logits folded in cache: running (max, sum) of each row, a lane at a time, and the gradient of kept logits. Included
// once per instruction set, inside its anonymous namespace. The running max is subtracted from the logits as they are:
// a conversion to another base before that would round large logits once more.

constexpr float kLog2E = 1.4426950408889634f;

// e^x for x <= 80 or so; 0 from -104 down (and for -inf); NaN stays NaN. Relative error 1.5e-7 and 6e-8 |x|; e^0 is 1.
// The polynomials are minimax for 2^t on [0, 1] with the constant 1, fitted by us.
inline Vec::F exp_of(Vec::F x) {
  Vec::F part, whole;
  Vec::split(Vec::mul(x, Vec::set1(kLog2E)), part, whole);
  Vec::F p = Vec::set1(1.8671302134e-03f);
  p = Vec::fma(p, part, Vec::set1(9.0170300186e-03f));
  p = Vec::fma(p, part, Vec::set1(5.5799913321e-02f));
  p = Vec::fma(p, part, Vec::set1(2.4016445010e-01f));
  p = Vec::fma(p, part, Vec::set1(6.9315131181e-01f));
  return Vec::scale_by_power(Vec::fma(p, part, Vec::set1(1.0f)), whole);
}

// The same with a relative error of 7e-8 at any x, for gradients: the product with log2(e) is not rounded before the
// whole part is taken off, and the polynomial is one degree longer.
inline Vec::F exact_exp_of(Vec::F x) {
  x = Vec::max(Vec::set1(-104.0f), x);
  const Vec::F log2e = Vec::set1(kLog2E);
  const Vec::F whole = Vec::floor(Vec::mul(x, log2e));
  Vec::F part = Vec::fma(x, log2e, Vec::sub(Vec::zero(), whole));
  part = Vec::fma(x, Vec::set1(1.9259629911e-08f), part);  // log2(e) beyond float32
  Vec::F p = Vec::set1(2.1612916366e-04f);
  p = Vec::fma(p, part, Vec::set1(1.2467846076e-03f));
  p = Vec::fma(p, part, Vec::set1(9.6754516026e-03f));
  p = Vec::fma(p, part, Vec::set1(5.5485280603e-02f));
  p = Vec::fma(p, part, Vec::set1(2.4022930556e-01f));
  p = Vec::fma(p, part, Vec::set1(6.9314704444e-01f));
  return Vec::scale_by_power(Vec::fma(p, part, Vec::set1(1.0f)), whole);
}

// cap * tanh(x / cap), rounded little more than once: x and an odd polynomial of x near 0; beyond, cap less its share
// 2 e / (1 + e) with e = exp(-2 |x| / cap).
inline Vec::F softcap_of(Vec::F x, Vec::F cap) {
  const Vec::F ratio = Vec::div(x, cap), size = Vec::abs(ratio), square = Vec::mul(ratio, ratio);
  Vec::F p = Vec::set1(-5.7049108457e-03f);
  p = Vec::fma(p, square, Vec::set1(2.0639022263e-02f));
  p = Vec::fma(p, square, Vec::set1(-5.3739696205e-02f));
  p = Vec::fma(p, square, Vec::set1(1.3331441985e-01f));
  p = Vec::fma(p, square, Vec::set1(-3.3333281935e-01f));
  const Vec::F near = Vec::fma(Vec::mul(p, square), x, x);
  const Vec::F e = exact_exp_of(Vec::mul(size, Vec::set1(-2.0f)));
  const Vec::F far = Vec::fma(Vec::div(Vec::mul(Vec::set1(-2.0f), e), Vec::add(Vec::set1(1.0f), e)), cap, cap);
  return Vec::select(Vec::greater(size, Vec::set1(0.625f)), Vec::with_sign(far, x), near);
}

// How far logits may rise above the running max of their row before its sums are rebased to a new one: rebasing at
// every new maximum costs as much again as folding.
constexpr float kSlack = 4.0f;

inline float highest_lane(Vec::F x) {
  float lane[Vec::W];
  Vec::store(lane, x);
  float highest = lane[0];
  for (int i = 1; i < Vec::W; ++i) highest = lane[i] > highest ? lane[i] : highest;
  return highest;
}

template <bool Cap>
inline Vec::F logit_of(const FoldArgs& f, Vec::F product, Vec::F scale, Vec::F bias) {
  const Vec::F y = Vec::fma(product, scale, bias);
  if constexpr (!Cap) return y;
  return softcap_of(y, Vec::set1(f.cap));
}

// A difference as a factor of its own exponential: where that is 0, neither infinite nor so large that a sum would be.
inline Vec::F bounded(Vec::F below) { return Vec::max(Vec::set1(-200.0f), below); }

// sum and moment of the lanes, moved from the old maximum to a new one that is no smaller.
template <bool Stats>
inline void rebase(Vec::F from, Vec::F to, Vec::F& sum, Vec::F& moment) {
  const Vec::F change = Vec::sub(from, to), factor = exp_of(change);
  if constexpr (Stats) moment = Vec::mul(factor, Vec::fma(sum, bounded(change), moment));
  sum = Vec::mul(factor, sum);
}

template <bool Stats>
inline Vec::F gather(Vec::F y, Vec::F running_max, Vec::F& sum, Vec::F& moment) {
  const Vec::F below = Vec::sub(y, running_max), e = exp_of(below);
  sum = Vec::add(sum, e);
  if constexpr (Stats) moment = Vec::fma(e, bounded(below), moment);
  return e;
}

// What row n's entries of the first pass add beyond those of the second. A weight of 0 outdoes whatever the logits are:
// -inf less -inf is no part.
inline void add_difference(const FirstPass& first, int n, int lane_floats, Vec::F left, Vec::F right, bool fresh) {
  constexpr int W = Vec::W;
  const Vec::F running_max = Vec::load(first.lanes + n * lane_floats);
  float* const at = first.sums + n * 2 * W;
  const Vec::F before = fresh ? Vec::set1(kLowest) : Vec::load(at);
  Vec::F sum = fresh ? Vec::zero() : Vec::load(at + W);
  if (fresh || Vec::any(Vec::greater(running_max, before))) {
    const Vec::F factor = exp_of(Vec::sub(before, running_max));
    sum = Vec::select(Vec::greater(factor, Vec::zero()), Vec::mul(sum, factor), Vec::zero());
    Vec::store(at, running_max);
  }
  const auto add_half = [&](int64_t column, Vec::F second) {
    const Vec::F e = Vec::load(first.weights + column);
    const Vec::F term = Vec::mul(e, Vec::sub(Vec::load(first.logits + column), second));
    sum = Vec::add(sum, Vec::select(Vec::greater(e, Vec::zero()), term, Vec::zero()));
  };
  add_half(n * kPanel, left);
  add_half(n * kPanel + W, right);
  Vec::store(at + W, sum);
}

template <bool Cap, bool Stats>
void fold_tile(const FoldArgs& f) {
  constexpr int W = Vec::W;
  const Vec::F scale = Vec::set1(f.scale), nothing = Vec::set1(-__builtin_inff());
  const Vec::F bias_left = Vec::load(f.bias), bias_right = Vec::load(f.bias + W);
  for (int n = 0; n < f.rows; ++n) {
    float* lanes = f.lanes + n * W * (Stats ? 5 : 2);
    Vec::F left = logit_of<Cap>(f, Vec::load(f.product + n * kPanel), scale, bias_left);
    Vec::F right = logit_of<Cap>(f, Vec::load(f.product + n * kPanel + W), scale, bias_right);
    if (f.columns < kPanel) {
      left = Vec::select(Vec::first(f.columns), left, nothing);
      right = Vec::select(Vec::first(f.columns - W), right, nothing);
    }
    const uint64_t wanted = static_cast<uint64_t>(f.target[n] - f.first_column);
    if (wanted < static_cast<uint64_t>(f.columns)) {
      float logit[kPanel];
      Vec::store(logit, left);
      Vec::store(logit + W, right);
      f.picked[n] = logit[wanted];
    }
    if (f.keep != nullptr) {
      Vec::store(f.keep + n * kPanel, left);
      Vec::store(f.keep + n * kPanel + W, right);
    }
    Vec::F running_max = f.fresh ? Vec::set1(kLowest) : Vec::load(lanes);
    Vec::F sum = f.fresh ? Vec::zero() : Vec::load(lanes + W), moment = Vec::zero();
    const Vec::F highest = Vec::max(left, right);
    if constexpr (Stats) {
      const int32_t first = static_cast<int32_t>(f.first_column);
      if (!f.fresh) moment = Vec::load(lanes + 2 * W);
      const Vec::F greatest = f.fresh ? nothing : Vec::load(lanes + 3 * W);
      Vec::I column = f.fresh ? Vec::ramp(first) : Vec::iload(lanes + 4 * W);
      column = Vec::iselect(Vec::greater(left, greatest), Vec::ramp(first), column);
      column = Vec::iselect(Vec::greater(right, Vec::max(left, greatest)), Vec::ramp(first + W), column);
      Vec::store(lanes + 3 * W, Vec::max(highest, greatest));
      Vec::istore(lanes + 4 * W, column);
    }
    if (f.fresh || Vec::any(Vec::greater(highest, Vec::add(running_max, Vec::set1(kSlack))))) {
      const Vec::F raised = Vec::set1(highest_lane(Vec::max(highest, running_max)));
      rebase<Stats>(running_max, raised, sum, moment);
      running_max = raised;
      Vec::store(lanes, running_max);
    }
    const Vec::F weight_left = gather<Stats>(left, running_max, sum, moment);
    const Vec::F weight_right = gather<Stats>(right, running_max, sum, moment);
    if (f.first != nullptr && !f.second) {
      Vec::store(f.first->logits + n * kPanel, left);
      Vec::store(f.first->logits + n * kPanel + W, right);
      Vec::store(f.first->weights + n * kPanel, weight_left);
      Vec::store(f.first->weights + n * kPanel + W, weight_right);
    }
    if (f.second) add_difference(*f.first, n, W * (Stats ? 5 : 2), left, right, f.fresh);
    Vec::store(lanes + W, sum);
    if constexpr (Stats) Vec::store(lanes + 2 * W, moment);
  }
}

void fold(const FoldArgs& f) {
  if (f.cap != 0.0f) return f.stats ? fold_tile<true, true>(f) : fold_tile<true, false>(f);
  f.stats ? fold_tile<false, true>(f) : fold_tile<false, false>(f);
}

// One step of a sum over parts of a row that have running maxima of their own, W rows at a time.
template <bool Stats>
inline void add_part(Vec::F part_max, Vec::F part_sum, Vec::F part_moment, Vec::F running_max, Vec::F& sum,
                     Vec::F& moment) {
  rebase<Stats>(part_max, running_max, part_sum, part_moment);
  sum = Vec::add(sum, part_sum);
  if constexpr (Stats) moment = Vec::add(moment, part_moment);
}

inline void store_sums(const Partials& out, int64_t n, Vec::F running_max, Vec::F sum, Vec::F moment) {
  Vec::store(out.running_max + n, running_max);
  Vec::store(out.sum + n, sum);
  Vec::store(out.moment + n, moment);
}

// The greatest of W lanes of W rows (`greatest` holds one lane of each row), and the least column that holds it.
inline void store_first_greatest(const Vec::F* greatest, const Vec::F* column, const Partials& out, int64_t n) {
  constexpr int W = Vec::W;
  Vec::F best = greatest[0];
  for (int i = 1; i < W; ++i) best = Vec::max(greatest[i], best);
  Vec::store(out.greatest + n, best);
  int32_t first[W] = {};
  for (int i = 0; i < W; ++i) {
    float value[W];
    int32_t at[W];
    Vec::store(value, greatest[i]);
    Vec::store(reinterpret_cast<float*>(at), column[i]);
    for (int r = 0; r < W; ++r) {
      if (value[r] == out.greatest[n + r] && (first[r] == 0 || at[r] + 1 < first[r])) first[r] = at[r] + 1;
    }
  }
  for (int r = 0; r < W; ++r) first[r] -= first[r] > 0 ? 1 : 0;
  Vec::istore(out.column + n, Vec::iload(first));
}

// The lanes of W rows, turned so that a vector holds one lane of each row, summed in lane order.
template <bool Stats>
void reduce_rows(const float* lanes, int64_t rows, const Partials& out) {
  constexpr int W = Vec::W, kFields = Stats ? 5 : 2;
  for (int64_t n = 0; n < rows; n += W) {
    Vec::F field[kFields][W];
    for (int f = 0; f < kFields; ++f) {
      for (int i = 0; i < W; ++i) field[f][i] = Vec::load(lanes + ((n + i) * kFields + f) * W);
      Vec::transpose(field[f]);
    }
    Vec::F running_max = field[0][0], sum = Vec::zero(), moment = Vec::zero();
    for (int i = 1; i < W; ++i) running_max = Vec::max(field[0][i], running_max);
    for (int i = 0; i < W; ++i) {
      add_part<Stats>(field[0][i], field[1][i], field[Stats ? 2 : 0][i], running_max, sum, moment);
    }
    store_sums(out, n, running_max, sum, moment);
    if constexpr (Stats) store_first_greatest(field[3], field[4], out, n);
  }
}

void reduce_lanes(const float* lanes, int64_t rows, bool stats, const Partials& out) {
  stats ? reduce_rows<true>(lanes, rows, out) : reduce_rows<false>(lanes, rows, out);
}

// Rows [first, first + W) over all groups, in the groups' order.
template <bool Stats>
void combine_rows(const Partials* groups, int64_t count, int64_t first, const Partials& out) {
  Vec::F running_max = Vec::load(groups[0].running_max + first), sum = Vec::zero(), moment = Vec::zero();
  for (int64_t g = 1; g < count; ++g) running_max = Vec::max(Vec::load(groups[g].running_max + first), running_max);
  for (int64_t g = 0; g < count; ++g) {
    add_part<Stats>(Vec::load(groups[g].running_max + first), Vec::load(groups[g].sum + first),
                    Vec::load(groups[g].moment + first), running_max, sum, moment);
  }
  store_sums(out, first, running_max, sum, moment);
  if constexpr (Stats) {
    Vec::F greatest = Vec::load(groups[0].greatest + first);
    Vec::I column = Vec::iload(groups[0].column + first);
    for (int64_t g = 1; g < count; ++g) {
      const Vec::F other = Vec::load(groups[g].greatest + first);
      column = Vec::iselect(Vec::greater(other, greatest), Vec::iload(groups[g].column + first), column);
      greatest = Vec::max(other, greatest);
    }
    Vec::store(out.greatest + first, greatest);
    Vec::istore(out.column + first, column);
  }
}

void combine(const Partials* groups, int64_t count, int64_t first, bool stats, const Partials& out) {
  stats ? combine_rows<true>(groups, count, first, out) : combine_rows<false>(groups, count, first, out);
}

// d(upstream) / d(product) of W columns of row n; `plain` adds up the gradient before the scale.
inline Vec::F gradient_of(const GradArgs& g, int64_t n, const float* logit, int first, Vec::F& plain) {
  const Vec::F y = Vec::load(logit);
  const Vec::F below = Vec::sub(Vec::sub(y, Vec::set1(g.lse[n])), Vec::set1(g.lse_lo[n]));
  const Vec::F p = exact_exp_of(below);
  Vec::F upstream = Vec::set1(g.weight[n]);
  if (g.moment != nullptr) {  // dH/dlogit = -p * (logit - lse + H)
    const Vec::F centred = Vec::add(bounded(below), Vec::set1(g.entropy[n]));
    upstream = Vec::fma(Vec::set1(-g.moment[n]), centred, upstream);
  }
  Vec::F slope = Vec::mul(p, upstream);
  const int64_t hit = g.target[n] - g.first_column - first;
  if (static_cast<uint64_t>(hit) < static_cast<uint64_t>(Vec::W)) {
    float lane[Vec::W] = {};
    lane[hit] = g.onehot[n];
    slope = Vec::sub(slope, Vec::load(lane));
  }
  if (g.cap != 0.0f) {  // d(cap * tanh(x / cap)) / dx = 1 - (logit / cap)^2
    const Vec::F ratio = Vec::div(y, Vec::set1(g.cap));
    slope = Vec::mul(slope, Vec::fma(ratio, Vec::sub(Vec::zero(), ratio), Vec::set1(1.0f)));
  }
  slope = Vec::select(Vec::first(g.columns - first), slope, Vec::zero());
  plain = Vec::add(plain, slope);
  slope = Vec::mul(slope, Vec::set1(g.scale));
  if (g.residual != nullptr && static_cast<uint64_t>(hit) < static_cast<uint64_t>(Vec::W)) {
    float lane[Vec::W];
    uint16_t rounded[Vec::W];
    Vec::store(lane, slope);
    Vec::to_bf16(rounded, slope);
    g.residual[n] = lane[hit] - bf16_to_float(rounded[hit]);
  }
  return slope;
}

// total + low += x, with what the addition to `total` rounds off in `low` (Knuth's TwoSum): one running sum over
// thousands of rows, most of which cancel, is off by more than eager PyTorch's.
inline void add_exactly(Vec::F& total, Vec::F& low, Vec::F x) {
  const Vec::F sum = Vec::add(total, x), added = Vec::sub(sum, total);
  low = Vec::add(low, Vec::add(Vec::sub(total, Vec::sub(sum, added)), Vec::sub(x, added)));
  total = sum;
}

void gradient(const GradArgs& g) {
  constexpr int W = Vec::W;
  constexpr int kRowsOfSum = 32;
  Vec::F plain[2] = {Vec::zero(), Vec::zero()}, total[2] = {Vec::zero(), Vec::zero()};
  Vec::F low[2] = {Vec::zero(), Vec::zero()};
  uint16_t two[2][kPanel] = {};
  for (int64_t n = 0; n < g.rows; ++n) {
    if (n % kRowsOfSum == 0) {
      for (int half = 0; half < 2; ++half) {
        add_exactly(total[half], low[half], plain[half]);
        plain[half] = Vec::zero();
      }
    }
    for (int half = 0; half < 2; ++half) {
      float* at = g.logits + n * kPanel + half * W;
      const Vec::F slope = gradient_of(g, n, at, half * W, plain[half]);
      if (g.row_pairs == nullptr && g.column_pairs == nullptr) {
        Vec::store(at, slope);
      } else {
        Vec::to_bf16(two[n & 1] + half * W, slope);
      }
    }
    if (g.column_pairs != nullptr) __builtin_memcpy(g.column_pairs + n * kPanel, two[n & 1], sizeof two[0]);
    if (g.row_pairs == nullptr || ((n & 1) == 0 && n + 1 < g.rows)) continue;
    if ((n & 1) == 0) __builtin_memset(two[1], 0, sizeof two[1]);
    for (int half = 0; half < 2; ++half) {
      Vec::pair_bf16(g.row_pairs + n / 2 * kPanel + half * W, two[0] + half * W, two[1] + half * W);
    }
  }
  if (g.column_sum == nullptr) return;
  for (int half = 0; half < 2; ++half) {
    add_exactly(total[half], low[half], plain[half]);
    Vec::store(g.column_sum + half * W, Vec::add(total[half], low[half]));
  }
}
