// Register tiles of the matrix product, and the packing of their operands.
// Included once per instruction set, inside its anonymous namespace, after Vec.

constexpr int kPanel = 2 * Vec::W;             // columns of a tile
constexpr int kUnit = Vec::W == 16 ? 4 : 2;    // rows of the smallest tile; the others have 2 and 3 units
constexpr int kTile = 3 * kUnit;

constexpr int kAhead = 24;                     // words that the tile asks the cache for ahead of their use

enum class Layout { kPacked, kColumns, kRows };  // where a[i][k] stands: see Kernels

template <bool Pairs, class V = Vec>
inline typename V::F step(typename V::F sum, typename V::F a, typename V::F b) {
  if constexpr (Pairs) {
    return V::dot(sum, a, b);
  } else {
    return V::fma(a, b, sum);
  }
}

// The strides of `a` are constants of the instance, so that they become displacements.
template <int Rows, Layout L, bool Pairs>
void multiply_tile(const MultiplyArgs& m) {
  constexpr int kRow = L == Layout::kRows ? (Pairs ? kPanel / 2 : kPanel) : 1;
  constexpr int kWord = L == Layout::kPacked ? Rows : L == Layout::kColumns ? kPanel : 1;
  const float* b = reinterpret_cast<const float*>(m.b);
  Vec::F sum[Rows][2];
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = Vec::zero();
  if constexpr (L == Layout::kRows) {  // results that lie far away travel while the sums are formed
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      __builtin_prefetch(m.c + i * m.ldc, 1);
      __builtin_prefetch(m.c + i * m.ldc + kPanel - 1, 1);
    }
  }
  const char* ahead = m.ahead;
  int64_t in_block = 0;
  bool add = m.accumulate;
  for (int64_t s = 0; s < m.segments; ++s) {
    const float* a = reinterpret_cast<const float*>(m.a) + s * m.a_segment;
    for (int64_t done = 0; done < m.words;) {
      const int64_t steps = m.words - done < kBlock ? m.words - done : kBlock;
      for (int64_t k = 0; k < steps; ++k) {
        if ((k & 7) == 0) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead < m.ahead_end ? 64 : 0;
        }
        const Vec::F left = Vec::load(b), right = Vec::load(b + Vec::W);
        __builtin_prefetch(b + kAhead * kPanel);
        __builtin_prefetch(b + kAhead * kPanel + Vec::W);
        if constexpr (L != Layout::kRows) __builtin_prefetch(a + kAhead * kWord);
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
          const Vec::F value = Vec::set1(a[i * kRow]);
          sum[i][0] = step<Pairs>(sum[i][0], value, left);
          sum[i][1] = step<Pairs>(sum[i][1], value, right);
        }
        a += kWord;
        b += kPanel;
      }
      done += steps;
      in_block += steps;
      if (in_block < kBlock && (done < m.words || s + 1 < m.segments)) continue;
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {  // the block's sums join the total, at most kBlock steps old
        float* c = m.c + i * m.ldc;
        Vec::store(c, add ? Vec::add(Vec::load(c), sum[i][0]) : sum[i][0]);
        Vec::store(c + Vec::W, add ? Vec::add(Vec::load(c + Vec::W), sum[i][1]) : sum[i][1]);
        sum[i][0] = sum[i][1] = Vec::zero();
      }
      in_block = 0;
      add = true;
    }
  }
}

template <Layout L, bool Pairs>
void multiply_any(const MultiplyArgs& m) {
  if (m.rows > 2 * kUnit) {
    multiply_tile<3 * kUnit, L, Pairs>(m);
  } else if (m.rows > kUnit) {
    multiply_tile<2 * kUnit, L, Pairs>(m);
  } else {
    multiply_tile<kUnit, L, Pairs>(m);
  }
}

template <Layout L>
void multiply(const MultiplyArgs& m, bool pairs) {
  if constexpr (Vec::kHasPairs) {
    if (pairs) return multiply_any<L, true>(m);
  }
  (void)pairs;
  multiply_any<L, false>(m);
}

// W words of a row from element e on; past the end of the row (D elements) words are zero.
template <class Load>
inline Vec::F words_of(const char* row, int64_t e, int64_t depth, int64_t size, int per_word, Load load) {
  const int64_t want = static_cast<int64_t>(Vec::W) * per_word;
  if (e + want <= depth) return load(row + e * size);
  alignas(64) char padded[Vec::W * 4] = {};
  if (e < depth) __builtin_memcpy(padded, row + e * size, (depth - e) * size);
  return load(padded);
}

// Transposes one square of W rows by W words; `rows` and `count` are what of it is stored.
template <class Load>
inline void pack_square(const PackArgs& p, int first, int rows, int64_t word, int64_t size, int per_word, Load load) {
  Vec::F square[Vec::W];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::W; ++i) {
    square[i] = words_of(p.rows[first + (i < rows ? i : 0)], word * per_word, p.depth, size, per_word, load);
  }
  Vec::transpose(square);
  alignas(64) float lanes[Vec::W][Vec::W];
  for (int k = 0; k < Vec::W; ++k) Vec::store(lanes[k], square[k]);
  const int64_t count = p.end - word < Vec::W ? p.end - word : Vec::W;
  uint32_t* out = p.out + (word - p.begin) * p.width + first;
  for (int64_t k = 0; k < count; ++k) __builtin_memcpy(out + k * p.width, lanes[k], rows * sizeof(float));
}

// The same where the whole square is there: nothing leaves the registers.
template <class Load>
inline void pack_whole_square(const PackArgs& p, int first, int64_t word, int64_t size, int per_word, Load load) {
  Vec::F square[Vec::W];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::W; ++i) {
    const char* at = p.rows[first + i] + word * per_word * size;
    __builtin_prefetch(at + 256);  // sixteen rows at once are more streams than the hardware follows
    square[i] = load(at);
  }
  Vec::transpose(square);
  float* out = reinterpret_cast<float*>(p.out) + (word - p.begin) * p.width + first;
#pragma GCC unroll 16
  for (int k = 0; k < Vec::W; ++k) Vec::store(out + static_cast<int64_t>(k) * p.width, square[k]);
}

template <class Load>
void pack_with(const PackArgs& p, int64_t size, int per_word, Load load) {
  for (int64_t word = p.begin; word < p.end; word += Vec::W) {
    const bool inside = word + Vec::W <= p.end && (word + Vec::W) * per_word <= p.depth;
    for (int first = 0; first < p.width; first += Vec::W) {
      const int rows = p.width - first < Vec::W ? p.width - first : Vec::W;
      if (inside && rows == Vec::W) {
        pack_whole_square(p, first, word, size, per_word, load);
      } else {
        pack_square(p, first, rows, word, size, per_word, load);
      }
    }
  }
}

void pack(const PackArgs& p) {
  const auto floats = [](const char* at) { return Vec::load(reinterpret_cast<const float*>(at)); };
  if (p.dtype == Dtype::kFloat32) return pack_with(p, 4, 1, floats);
  if (p.pairs) return pack_with(p, 2, 2, floats);
  if (p.dtype == Dtype::kBFloat16) return pack_with(p, 2, 1, [](const char* at) { return Vec::from_bf16(at); });
  pack_with(p, 2, 1, [](const char* at) { return Vec::from_f16(at); });
}

// Columns [begin, end), at most kPanel of them, of `width` rows: [row][kPanel] words, two rows a word for pairs.
template <class Load>
void pack_rows_with(const PackArgs& p, int64_t size, Load load) {
  for (int n = 0; n < p.width; ++n) {
    for (int half = 0; half < 2; ++half) {
      const Vec::F words = words_of(p.rows[n], p.begin + half * Vec::W, p.end, size, 1, load);
      Vec::store(reinterpret_cast<float*>(p.out) + n * kPanel + half * Vec::W, words);
    }
  }
}

void pack_row_pairs(const PackArgs& p) {
  for (int n = 0; n < p.width; n += 2) {
    for (int half = 0; half < 2; ++half) {
      uint16_t two[2][Vec::W] = {};
      const int64_t e = p.begin + half * Vec::W;
      const int64_t count = p.end - e < Vec::W ? p.end - e : Vec::W;
      for (int i = 0; i < 2 && n + i < p.width && count > 0; ++i) {
        __builtin_memcpy(two[i], p.rows[n + i] + 2 * e, count * 2);
      }
      Vec::pair_bf16(p.out + n / 2 * kPanel + half * Vec::W, two[0], two[1]);
    }
  }
}

void pack_rows(const PackArgs& p) {
  if (p.pairs) return pack_row_pairs(p);
  if (p.dtype == Dtype::kFloat32) {
    return pack_rows_with(p, 4, [](const char* at) { return Vec::load(reinterpret_cast<const float*>(at)); });
  }
  if (p.dtype == Dtype::kBFloat16) return pack_rows_with(p, 2, [](const char* at) { return Vec::from_bf16(at); });
  pack_rows_with(p, 2, [](const char* at) { return Vec::from_f16(at); });
}

// A finished tile to rows of a large result: past the cache where it starts there, added where something stands.
void write_tile(const float* tile, int rows, float* out, int64_t stride, bool add) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % (Vec::W * 4) == 0 && stride % Vec::W == 0;
  for (int i = 0; i < rows; ++i, out += stride) {
    const Vec::F left = Vec::load(tile + i * kPanel), right = Vec::load(tile + i * kPanel + Vec::W);
    if (add) {
      Vec::store(out, Vec::add(Vec::load(out), left));
      Vec::store(out + Vec::W, Vec::add(Vec::load(out + Vec::W), right));
    } else if (aligned) {
      Vec::stream(out, left);
      Vec::stream(out + Vec::W, right);
    } else {
      Vec::store(out, left);
      Vec::store(out + Vec::W, right);
    }
  }
}

// The same, rounded to bfloat16.
void round_tile(const float* tile, int rows, uint16_t* out, int64_t stride) {
  for (int i = 0; i < rows; ++i, out += stride) {
    Vec::to_bf16(out, Vec::load(tile + i * kPanel));
    Vec::to_bf16(out + Vec::W, Vec::load(tile + i * kPanel + Vec::W));
  }
}

// As many independent multiply-adds as hide their latency, with nothing to load: the ceiling of any kernel here.
template <bool Pairs>
double peak_loop(int64_t steps) {
  Vec::F sum[kTile][2];
  for (int i = 0; i < kTile; ++i) sum[i][0] = sum[i][1] = Vec::set1(1.0f + i);
  Vec::F a = Vec::set1(1.0e-3f), left = Vec::set1(0.5f), right = Vec::set1(0.25f);
  for (int64_t k = 0; k < steps; ++k) {
    __asm__ volatile("" : "+x"(a), "+x"(left), "+x"(right));
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i) {
      sum[i][0] = step<Pairs>(sum[i][0], a, left);
      sum[i][1] = step<Pairs>(sum[i][1], a, right);
    }
  }
  for (int i = 0; i < kTile; ++i) __asm__ volatile("" : : "x"(sum[i][0]), "x"(sum[i][1]));
  return static_cast<double>(steps) * kTile * kPanel * (Pairs ? 4 : 2);
}

double peak(bool pairs, int64_t steps) {
  if constexpr (Vec::kHasPairs) {
    if (pairs) return peak_loop<true>(steps);
  }
  (void)pairs;
  return peak_loop<false>(steps);
}
