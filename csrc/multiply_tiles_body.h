// Products of bfloat16 pairs by AMX: registers of 16 rows of 64 bytes, six of which hold sums of 48 rows by a panel.
// Included after the other bodies, inside the anonymous namespace of the one instruction set that has such registers.
//
// The left side stands as [block of kTileWords words][row][kTileWords words], so that a register is loaded from 1 KiB
// that lies together; the right side as everywhere, [word][panel].
//
// Addresses stand in parentheses: the first headers of GCC 11 and 12 cast only what comes first in the argument of
// _tile_stored, so that `c + 16` would be 16 bytes away.

constexpr int kTileRows = 16, kTileWords = 16;
constexpr int kTileBytes = 4 * kTileRows * kTileWords;

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers are in use while one of these lives: other users of the thread find none, and the system saves none.
struct TilesInUse {
  TilesInUse() {
    static constexpr TileShape shape;
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
};

// One block of words: sums 0 to 2 are those of the left half of the panel, 3 to 5 of the right half.
template <int Groups>
inline void add_block(const char* a, const char* b) {
  _tile_loadd(7, (b), 4 * kPanel);
  _tile_loadd(6, (a), 64);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (Groups > 1) {
    _tile_loadd(6, (a + kTileBytes), 64);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (Groups > 2) {
    _tile_loadd(6, (a + 2 * kTileBytes), 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  _tile_loadd(7, (b + 64), 4 * kPanel);
  if constexpr (Groups > 2) {
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(6, (a + kTileBytes), 64);
  }
  if constexpr (Groups > 1) {
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(6, (a), 64);
  }
  _tile_dpbf16ps(3, 6, 7);
}

template <int Groups>
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(3);
  if constexpr (Groups > 1) {
    _tile_zero(1);
    _tile_zero(4);
  }
  if constexpr (Groups > 2) {
    _tile_zero(2);
    _tile_zero(5);
  }
}

template <int Groups>
inline void store_tiles(float* c, int64_t ldc) {
  const int64_t group = kTileRows * ldc, bytes = 4 * ldc;
  _tile_stored(0, (c), bytes);
  _tile_stored(3, (c + kTileWords), bytes);
  if constexpr (Groups > 1) {
    _tile_stored(1, (c + group), bytes);
    _tile_stored(4, (c + group + kTileWords), bytes);
  }
  if constexpr (Groups > 2) {
    _tile_stored(2, (c + 2 * group), bytes);
    _tile_stored(5, (c + 2 * group + kTileWords), bytes);
  }
}

// The sums of a block of words join the total, as in multiply_tile.
template <int Groups>
inline void join(float* c, int64_t ldc, bool add) {
  if (!add) return store_tiles<Groups>(c, ldc);
  alignas(64) float sums[Groups * kTileRows * kPanel];
  store_tiles<Groups>(sums, kPanel);
#pragma GCC unroll 4
  for (int i = 0; i < Groups * kTileRows; ++i, c += ldc) {
    Vec::store(c, Vec::add(Vec::load(c), Vec::load(sums + i * kPanel)));
    Vec::store(c + Vec::W, Vec::add(Vec::load(c + Vec::W), Vec::load(sums + i * kPanel + Vec::W)));
  }
}

// a_words: from a block of words to the next.
template <int Groups, bool Packs>
void multiply_groups(const MultiplyArgs& m, int64_t a_words) {
  const char* a = reinterpret_cast<const char*>(m.a);
  const char* b = reinterpret_cast<const char*>(m.b);
  const int64_t blocks = m.segments * (m.words / kTileWords);
  const char* prefetch = m.prefetch;
  const int64_t wanted = (m.prefetch_end - m.prefetch) / 64;
  const int lines_asked = static_cast<int>(wanted / blocks < 4 ? wanted / blocks + 1 : 4);
  [[maybe_unused]] Packing packing = Packs ? *m.packing : Packing{};
  [[maybe_unused]] int64_t lines = m.lines;
  [[maybe_unused]] const int64_t lines_together = Packs ? lines / blocks + 1 : 0;
  bool add = m.accumulate;
  const TilesInUse in_use;
  for (int64_t block = 0; block < blocks;) {
    const int64_t stop = block + kBlock / kTileWords < blocks ? block + kBlock / kTileWords : blocks;
    clear_sums<Groups>();
    for (; block < stop; ++block, a += 4 * a_words, b += 4 * kTileWords * kPanel) {
      add_block<Groups>(a, b);
      for (int i = 0; i < lines_asked && prefetch < m.prefetch_end; ++i, prefetch += 64) {
        __builtin_prefetch(prefetch, 0, 2);
      }
      if constexpr (Packs) {
        for (int64_t n = 0; n < lines_together && lines > 0; ++n, --lines) copy_line(packing);
      }
    }
    join<Groups>(m.c, m.ldc, add);
    add = true;
  }
  if constexpr (Packs) *m.packing = packing;
}

template <Layout L, bool Packs>
void multiply_tiles_of(const MultiplyArgs& m) {
  const int groups = (m.rows + kTileRows - 1) / kTileRows;
  const int64_t a_words = L == Layout::kRows      ? m.a_segment
                          : L == Layout::kColumns ? kPanel * kTileWords
                                                  : groups * kTileRows * kTileWords;
  if (groups > 2) {
    multiply_groups<3, Packs>(m, a_words);
  } else if (groups > 1) {
    multiply_groups<2, Packs>(m, a_words);
  } else {
    multiply_groups<1, Packs>(m, a_words);
  }
}

template <Layout L>
void multiply_tiles(const MultiplyArgs& m, bool) {
  if constexpr (L == Layout::kPacked) {
    if (m.packing != nullptr) return multiply_tiles_of<L, true>(m);
  }
  multiply_tiles_of<L, false>(m);
}

// Rows as they stand, block of words by block of words.
void pack_blocks(const PackArgs& p) {
  const auto pairs = [](const char* at) { return Vec::load(reinterpret_cast<const float*>(at)); };
  for (int i = 0; i < p.width; ++i) {
    uint32_t* out = p.out + i * kTileWords;
    for (int64_t word = p.begin; word < p.end; word += kTileWords, out += p.width * kTileWords) {
      Vec::store(reinterpret_cast<float*>(out), words_of(p.rows[i], 2 * word, p.depth, 2, 2, pairs));
    }
  }
}

// As `gradient`, with the pairs of rows where the product of columns wants them: [block of words][column][word],
// whole blocks of them.
void gradient_in_blocks(const GradArgs& g) {
  gradient(g);
  if (g.row_pairs == nullptr) return;
  const int64_t words = (g.rows + 1) / 2, padded = (words + kTileWords - 1) / kTileWords * kTileWords;
  __builtin_memset(g.row_pairs + words * kPanel, 0, (padded - words) * kPanel * 4);
  for (int64_t word = 0; word < padded; word += kTileWords) {
    float* const block = reinterpret_cast<float*>(g.row_pairs) + word * kPanel;
    alignas(64) float copy[kTileWords * kPanel];
    __builtin_memcpy(copy, block, sizeof copy);
    for (int half = 0; half < 2; ++half) {
      Vec::F square[Vec::W];
#pragma GCC unroll 16
      for (int k = 0; k < Vec::W; ++k) square[k] = Vec::load(copy + k * kPanel + half * Vec::W);
      store_transposed(square, block + half * Vec::W * kTileWords, kTileWords);
    }
  }
}

double tile_peak(bool pairs, int64_t steps) {
  if (!pairs) return peak(false, steps);
  const TilesInUse in_use;
  clear_sums<3>();
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t k = 0; k < steps; ++k) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  return static_cast<double>(steps) * 3 * kTileRows * kPanel * 4 * kTileWords;
}

// `floats`: the table of the same instruction set without these registers.
constexpr Kernels make_tile_table(const Kernels& floats) {
  Kernels table = floats;
  table.floats = &floats;
  table.tile = 3 * kTileRows;
  table.word_unit = kTileWords;
  table.packed_words = 128 << 10;
  table.interleaved_words = 128 << 10;
  table.pack_left = pack_blocks;
  table.multiply = multiply_tiles<Layout::kPacked>;
  table.multiply_columns = multiply_tiles<Layout::kColumns>;
  table.multiply_rows = multiply_tiles<Layout::kRows>;
  table.gradient = gradient_in_blocks;
  table.peak = tile_peak;
  return table;
}
