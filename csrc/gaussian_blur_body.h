// The separable blur of one strip of columns. Included once per instruction set, inside its anonymous namespace.
// Both passes run this vertical filter: it writes its result transposed, so the second pass turns it upright again.

constexpr int kBlurRows = Vec::W == 16 ? 8 : 4;

// The step at input row t: sum[i] += tap(t - i) * row for outputs first <= i <= last.
template <int Vectors>
inline void blur_step(const BlurArgs& b, const int32_t* index, int64_t t, int first, int last,
                      Vec::F (&sum)[kBlurRows][Vectors]) {
  const float* row = b.strip + static_cast<int64_t>(index[t]) * b.strip_stride;
  Vec::F value[Vectors];
  for (int v = 0; v < Vectors; ++v) value[v] = Vec::load(row + v * Vec::W);
  const float* tap = b.taps + t + kBlurRows - 1;
#pragma GCC unroll 8
  for (int i = 0; i < kBlurRows; ++i) {
    if (i < first || i > last) continue;
    const Vec::F weight = Vec::set1(tap[-i]);
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vec::fma(value[v], weight, sum[i][v]);
  }
}

// tile[i][0 .. Vectors * W) (+)= sum over t in [from, to) of tap(t - i) * strip[index[t]], i < kBlurRows; set at from 0.
template <int Vectors>
inline void blur_rows(const BlurArgs& b, const int32_t* index, int64_t from, int64_t to, float* tile) {
  Vec::F sum[kBlurRows][Vectors];
  for (int i = 0; i < kBlurRows; ++i) {
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vec::zero();
  }
  constexpr int kEdge = kBlurRows - 1;
  if (from == 0 && to == 2 * b.radius + kBlurRows && 2 * b.radius + 1 >= kEdge) {  // taps before and after are zeros
#pragma GCC unroll 7
    for (int t = 0; t < kEdge; ++t) blur_step<Vectors>(b, index, t, 0, t, sum);
    for (int64_t t = kEdge; t <= 2 * b.radius; ++t) blur_step<Vectors>(b, index, t, 0, kEdge, sum);
#pragma GCC unroll 7
    for (int i = 1; i <= kEdge; ++i) blur_step<Vectors>(b, index, 2 * b.radius + i, i, kEdge, sum);
  } else {
    for (int64_t t = from; t < to; ++t) {
      if (t >= kEdge && t <= 2 * b.radius) {
        blur_step<Vectors>(b, index, t, 0, kEdge, sum);
      } else {
        blur_step<Vectors>(b, index, t, static_cast<int>(t > 2 * b.radius ? t - 2 * b.radius : 0),
                           static_cast<int>(t < kEdge ? t : kEdge), sum);
      }
    }
  }
  for (int i = 0; i < kBlurRows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      float* out = tile + (i * 2 + v) * Vec::W;
      Vec::store(out, from == 0 ? sum[i][v] : Vec::add(Vec::load(out), sum[i][v]));
    }
  }
}

template <int Vectors>
void blur_strip(const BlurArgs& b) {
  const int64_t steps = 2 * b.radius + kBlurRows;  // input rows that kBlurRows outputs see
  alignas(64) float tile[Vec::W * 2 * Vec::W];
  for (int64_t y = 0; y < b.length; y += Vec::W) {
    for (int i = 0; i < Vec::W; i += kBlurRows) {
      for (int64_t from = 0; from < steps; from += kBlock) {
        const int64_t to = from + kBlock < steps ? from + kBlock : steps;
        blur_rows<Vectors>(b, b.index + y + i, from, to, tile + i * 2 * Vec::W);
      }
    }
    for (int v = 0; v < Vectors; ++v) {
      Vec::F square[Vec::W];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::W; ++i) square[i] = Vec::load(tile + (i * 2 + v) * Vec::W);
      store_transposed(square, b.out + v * Vec::W * b.out_stride + y, b.out_stride);
    }
  }
}

void blur(const BlurArgs& b) { b.columns > Vec::W ? blur_strip<2>(b) : blur_strip<1>(b); }

// Rows of contiguous elements; the columns that do not fill a vector one at a time.
template <class Load>
void load_dense(const ConvertArgs& c, int64_t size, Load load) {
  for (int64_t y = 0; y < c.rows; ++y) {
    const char* from = c.from + y * c.row_stride;
    float* to = c.strip + y * c.strip_columns;
    int64_t x = 0;
    for (; x + Vec::W <= c.columns; x += Vec::W) Vec::store(to + x, load(from + x * size));
    for (; x < c.columns; ++x) to[x] = element(from, c.dtype, x);
    for (; x < c.strip_columns; ++x) to[x] = 0.0f;
  }
}

void load_strip(const ConvertArgs& c) {
  const int64_t size = size_of(c.dtype);
  if (c.column_stride == size) {
    switch (c.dtype) {
      case Dtype::kFloat32:
        return load_dense(c, size, [](const char* at) { return Vec::load(reinterpret_cast<const float*>(at)); });
      case Dtype::kBFloat16: return load_dense(c, size, [](const char* at) { return Vec::from_bf16(at); });
      case Dtype::kFloat16: return load_dense(c, size, [](const char* at) { return Vec::from_f16(at); });
      default: return load_dense(c, size, [](const char* at) { return Vec::from_u8(at); });
    }
  }
  for (int64_t y = 0; y < c.rows; ++y) {
    const char* from = c.from + y * c.row_stride;
    float* to = c.strip + y * c.strip_columns;
    int64_t x = 0;
    for (; x < c.columns; ++x) to[x] = element(from + x * c.column_stride, c.dtype, 0);
    for (; x < c.strip_columns; ++x) to[x] = 0.0f;
  }
}
