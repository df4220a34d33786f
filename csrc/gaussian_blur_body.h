// The separable blur of one strip of columns. Included once per instruction set, inside its anonymous namespace.
// Both passes run this vertical filter: it writes its result transposed, so the second pass turns it upright again.

constexpr int kBlurRows = Vec::W == 16 ? 8 : 4;

// tile[i][0..2W) += sum over t in [from, to) of tap(t - i) * strip[index[t]], i < kBlurRows.
inline void blur_rows(const BlurArgs& b, const float* columns, const int32_t* index, int64_t from, int64_t to,
                      float* tile) {
  Vec::F sum[kBlurRows][2];
  for (int i = 0; i < kBlurRows; ++i) sum[i][0] = sum[i][1] = Vec::zero();
  for (int64_t t = from; t < to; ++t) {
    const float* row = columns + static_cast<int64_t>(index[t]) * b.columns;
    const Vec::F left = Vec::load(row), right = Vec::load(row + Vec::W);
    const float* tap = b.taps + t + kBlurRows - 1;
#pragma GCC unroll 8
    for (int i = 0; i < kBlurRows; ++i) {
      const Vec::F weight = Vec::set1(tap[-i]);
      sum[i][0] = Vec::fma(left, weight, sum[i][0]);
      sum[i][1] = Vec::fma(right, weight, sum[i][1]);
    }
  }
  for (int i = 0; i < kBlurRows; ++i) {
    float* out = tile + i * 2 * Vec::W;
    Vec::store(out, Vec::add(Vec::load(out), sum[i][0]));
    Vec::store(out + Vec::W, Vec::add(Vec::load(out + Vec::W), sum[i][1]));
  }
}

void blur(const BlurArgs& b) {
  const int64_t steps = 2 * b.radius + kBlurRows;  // input rows that kBlurRows outputs see
  float tile[Vec::W * 2 * Vec::W];
  for (int64_t x = 0; x < b.columns; x += 2 * Vec::W) {
    for (int64_t y = 0; y < b.length; y += Vec::W) {
      for (float& value : tile) value = 0.0f;
      for (int i = 0; i < Vec::W; i += kBlurRows) {
        for (int64_t from = 0; from < steps; from += kBlock) {
          const int64_t to = from + kBlock < steps ? from + kBlock : steps;
          blur_rows(b, b.strip + x, b.index + y + i, from, to, tile + i * 2 * Vec::W);
        }
      }
      for (int half = 0; half < 2; ++half) {
        Vec::F square[Vec::W];
        for (int i = 0; i < Vec::W; ++i) square[i] = Vec::load(tile + i * 2 * Vec::W + half * Vec::W);
        Vec::transpose(square);
        float* out = b.out + (x + half * Vec::W) * b.out_stride + y;
        for (int i = 0; i < Vec::W; ++i) Vec::store(out + i * b.out_stride, square[i]);
      }
    }
  }
}

inline Vec::F load_vector(const char* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return Vec::load(reinterpret_cast<const float*>(p));
    case Dtype::kBFloat16: return Vec::from_bf16(p);
    case Dtype::kFloat16: return Vec::from_f16(p);
    default: return Vec::from_u8(p);
  }
}

void load_strip(const ConvertArgs& c) {
  const int64_t size = element_bytes(c.dtype);
  for (int64_t y = 0; y < c.rows; ++y) {
    const char* from = c.from + y * c.row_stride;
    float* to = c.strip + y * c.strip_columns;
    int64_t x = 0;
    if (c.column_stride == size) {
      for (; x + Vec::W <= c.columns; x += Vec::W) Vec::store(to + x, load_vector(from + x * size, c.dtype));
    }
    for (; x < c.columns; ++x) to[x] = element(from + x * c.column_stride, c.dtype, 0);
    for (; x < c.strip_columns; ++x) to[x] = 0.0f;
  }
}
