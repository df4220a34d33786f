// Register tiles of the matrix product, and the packing of their operands.
// Included once per instruction set, inside its anonymous namespace, after Vec.

constexpr int kPanel = 2 * Vec::W;             // columns of a tile
constexpr int kUnit = Vec::kRegisters == 32 ? 4 : 2;  // rows of the smallest tile; the others have 2 and 3 units
constexpr int kTile = 3 * kUnit;

// Where a word of the product leaves slots for copying.
constexpr bool kInterleavesPacking = kUnit == 4 && !Vec::kTakesLanes;
constexpr int kPrefetchWords = 24;             // from a word in use to the one that the tile asks the cache for

enum class Layout { kPacked, kColumns, kRows };  // where a[i][k] stands: see Kernels

template <bool Pairs, class V = Vec>
inline typename V::F step(typename V::F sum, typename V::F a, typename V::F b) {
  if constexpr (Pairs) {
    return V::dot(sum, a, b);
  } else {
    return V::fma(a, b, sum);
  }
}

// A word of rows that stand side by side, where an instruction takes a factor from a lane.
template <int Rows, bool Pairs, class V = Vec>
inline void add_by_lane(const float* a, typename V::F left, typename V::F right, typename V::F (&sum)[Rows][2]) {
#pragma GCC unroll 3
  for (int i = 0; i < Rows; i += V::W) V::template add_lanes<Pairs>(sum + i, V::load(a + i), left, right);
}

// Line by line over the rows, so that what they fill together is in cache together.
inline void copy_line(Packing& p) {
  __builtin_prefetch(p.from + p.prefetch_bytes, 0, 2);
#pragma GCC unroll 16
  for (int i = 0; i < kLineWords; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, p.from + 4 * i, 4);
    __asm__ volatile("" : "+r"(word));  // not by vectors: the products have all of them
    p.to[i * kPanel] = word;
  }
  p.from += p.stride;
  p.to += 1;
  if (++p.row < kPanel) return;
  constexpr int64_t kBytes = 4 * kLineWords;
  const int64_t next_panel = kPanel * p.stride - p.lines * kBytes;
  p.row = 0;
  p.from += kBytes - kPanel * p.stride;
  p.to += (kLineWords - 1) * kPanel;
  if (++p.line == p.lines) {
    p.line = 0;
    p.from += next_panel;
    p.to += (p.words - p.lines * kLineWords) * kPanel;
  }
  p.prefetch_bytes = kPrefetchLines * kBytes + (p.line + kPrefetchLines < p.lines ? 0 : next_panel);
}

// The strides of `a` are constants of the instance, so that they become displacements.
template <int Rows, Layout L, bool Pairs, bool Packs>
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
  const char* prefetch = m.prefetch;
  [[maybe_unused]] Packing packing = Packs ? *m.packing : Packing{};
  [[maybe_unused]] int64_t lines = m.lines;
  [[maybe_unused]] const int64_t lines_together = Packs ? lines / ((m.words + 7) / 8) + 1 : 0;
  int64_t in_block = 0;
  bool add = m.accumulate;
  for (int64_t s = 0; s < m.segments; ++s) {
    const float* a = reinterpret_cast<const float*>(m.a) + s * m.a_segment;
    for (int64_t done = 0; done < m.words;) {
      const int64_t steps = m.words - done < kBlock ? m.words - done : kBlock;
      for (int64_t k = 0; k < steps;) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += prefetch < m.prefetch_end ? 64 : 0;
        if constexpr (Packs) {
          for (int64_t n = 0; n < lines_together && lines > 0; ++n, --lines) copy_line(packing);
        }
        for (const int64_t stop = k + 8 < steps ? k + 8 : steps; k < stop; ++k) {
          const Vec::F left = Vec::load(b), right = Vec::load(b + Vec::W);
          __builtin_prefetch(b + kPrefetchWords * kPanel);
          __builtin_prefetch(b + kPrefetchWords * kPanel + Vec::W);
          if constexpr (L != Layout::kRows) __builtin_prefetch(a + kPrefetchWords * kWord);
          if constexpr (Vec::kTakesLanes && kRow == 1) {
            add_by_lane<Rows, Pairs>(a, left, right, sum);
          } else {
#pragma GCC unroll 12
            for (int i = 0; i < Rows; ++i) {
              const Vec::F value = Vec::set1(a[i * kRow]);
              sum[i][0] = step<Pairs>(sum[i][0], value, left);
              sum[i][1] = step<Pairs>(sum[i][1], value, right);
            }
          }
          a += kWord;
          b += kPanel;
        }
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
  if constexpr (Packs) *m.packing = packing;
}

template <Layout L, bool Pairs, bool Packs>
void multiply_rows_of(const MultiplyArgs& m) {
  if (m.rows > 2 * kUnit) {
    multiply_tile<3 * kUnit, L, Pairs, Packs>(m);
  } else if (m.rows > kUnit) {
    multiply_tile<2 * kUnit, L, Pairs, Packs>(m);
  } else {
    multiply_tile<kUnit, L, Pairs, Packs>(m);
  }
}

template <Layout L, bool Pairs>
void multiply_any(const MultiplyArgs& m) {
  if constexpr (kInterleavesPacking && L == Layout::kPacked) {
    if (m.packing != nullptr) return multiply_rows_of<L, Pairs, true>(m);
  }
  multiply_rows_of<L, Pairs, false>(m);
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

// A square of W by W, transposed, to rows `stride` floats apart.
inline void store_transposed(Vec::F* square, float* out, int64_t stride) {
  Vec::transpose(square);
#pragma GCC unroll 16
  for (int k = 0; k < Vec::W; ++k) Vec::store(out + k * stride, square[k]);
}

// The same where the whole square is there: nothing leaves the registers.
template <class Load>
inline void pack_whole_square(const PackArgs& p, int first, int64_t word, int64_t size, int per_word, Load load) {
  Vec::F square[Vec::W];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::W; ++i) {
    const char* at = p.rows[first + i] + word * per_word * size;
    __builtin_prefetch(at + 256, 0, 2);  // sixteen rows at once are more streams than the hardware follows
    square[i] = load(at);
  }
  store_transposed(square, reinterpret_cast<float*>(p.out) + (word - p.begin) * p.width + first, p.width);
}

// Rows a multiple of 4 KiB apart all fall on the same few lines of the first cache: lines of a row are copied out of
// there side by side, and transposed from the copy. Returns the word it came to.
template <class Load>
int64_t pack_staged(const PackArgs& p, int64_t size, int per_word, Load load) {
  constexpr int kLines = 4;
  alignas(64) float staged[Vec::W][(kLines + 1) * Vec::W];
  int64_t word = p.begin;
  for (; word + kLines * Vec::W <= p.end && (word + kLines * Vec::W) * per_word <= p.depth; word += kLines * Vec::W) {
    for (int first = 0; first < p.width; first += Vec::W) {
      for (int i = 0; i < Vec::W; ++i) {
        const char* at = p.rows[first + i] + word * per_word * size;
#pragma GCC unroll 4
        for (int line = 0; line < kLines; ++line, at += Vec::W * per_word * size) {
          __builtin_prefetch(at + 1024, 0, 2);
          Vec::store(staged[i] + line * Vec::W, load(at));
        }
      }
      float* out = reinterpret_cast<float*>(p.out) + (word - p.begin) * p.width + first;
      for (int line = 0; line < kLines; ++line, out += Vec::W * p.width) {
        Vec::F square[Vec::W];
#pragma GCC unroll 16
        for (int i = 0; i < Vec::W; ++i) square[i] = Vec::load(staged[i] + line * Vec::W);
        store_transposed(square, out, p.width);
      }
    }
  }
  return word;
}

template <class Load>
void pack_with(const PackArgs& p, int64_t size, int per_word, Load load) {
  int64_t word = p.begin;
  if (p.width % Vec::W == 0 && (p.rows[1] - p.rows[0]) % 4096 == 0) word = pack_staged(p, size, per_word, load);
  for (; word < p.end; word += Vec::W) {
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

// Columns [begin, end) of `width` rows: [kPanel columns][row][kPanel] words, two rows a word for pairs. Row by row, so
// that what lies side by side is read together: rows of the weight are often a multiple of 4 KiB apart.
template <class Load>
void pack_rows_with(const PackArgs& p, int64_t size, Load load) {
  for (int n = 0; n < p.width; ++n) {
    uint32_t* out = p.out + n * kPanel;
    for (int64_t e = p.begin; e < p.end; e += kPanel, out += static_cast<int64_t>(p.width) * kPanel) {
      for (int half = 0; half < 2; ++half) {
        const Vec::F words = words_of(p.rows[n], e + half * Vec::W, p.end, size, 1, load);
        Vec::store(reinterpret_cast<float*>(out) + half * Vec::W, words);
      }
    }
  }
}

// W elements of a row from `e` on, zeros past the end, at `padded` or where they stand.
inline const uint16_t* halves_of(const char* row, int64_t e, int64_t end, uint16_t* padded) {
  if (row != nullptr && e + Vec::W <= end) return reinterpret_cast<const uint16_t*>(row) + e;
  __builtin_memset(padded, 0, Vec::W * 2);
  if (row != nullptr && e < end) __builtin_memcpy(padded, row + 2 * e, (end - e) * 2);
  return padded;
}

void pack_row_pairs(const PackArgs& p) {
  uint16_t padded[2][Vec::W];
  const int64_t words = (p.width + 1) / 2;
  for (int64_t n = 0; n < words; ++n) {
    const char* low = p.rows[2 * n];
    const char* high = 2 * n + 1 < p.width ? p.rows[2 * n + 1] : nullptr;
    uint32_t* out = p.out + n * kPanel;
    for (int64_t e = p.begin; e < p.end; e += kPanel, out += words * kPanel) {
      for (int64_t at = e; at < e + kPanel; at += Vec::W) {
        Vec::pair_bf16(out + at - e, halves_of(low, at, p.end, padded[0]), halves_of(high, at, p.end, padded[1]));
      }
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
    Vec::touch(a);
    Vec::touch(left);
    Vec::touch(right);
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i) {
      sum[i][0] = step<Pairs>(sum[i][0], a, left);
      sum[i][1] = step<Pairs>(sum[i][1], a, right);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTile; ++i) {
    Vec::touch(sum[i][0]);
    Vec::touch(sum[i][1]);
  }
  return static_cast<double>(steps) * kTile * kPanel * (Pairs ? 4 : 2);
}

double peak(bool pairs, int64_t steps) {
  if constexpr (Vec::kHasPairs) {
    if (pairs) return peak_loop<true>(steps);
  }
  (void)pairs;
  return peak_loop<false>(steps);
}
