// The kernels of AVX512_BF16 and AMX in plain C++: sixteen lanes in the compiler's vector type, and tile registers in
// memory. They show that packing, padding and indices are right, not that the instructions are.
#include <cstring>

#include "cast.h"
#include "check.h"
#include "kernels.h"

namespace vig {
namespace {

struct TileRegisters {
  bool configured = false;
  float words[8][16][16];
};
thread_local TileRegisters tiles;

float (&tile(int number))[16][16] {
  CHECK(tiles.configured, "tile %d is used without a configuration", number);
  return tiles.words[number];
}

void _tile_loadconfig(const void*) {
  CHECK(!tiles.configured, "tiles are configured twice");
  tiles.configured = true;
}

void _tile_release() {
  tiles.configured = false;
  std::memset(tiles.words, 0xff, sizeof tiles.words);  // NaN
}

void _tile_zero(int number) { std::memset(tile(number), 0, sizeof tiles.words[0]); }

void load_tile(int number, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile(number)[i], static_cast<const char*>(from) + i * stride, 64);
}

void store_tile(int number, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile(number)[i], 64);
}

// Macros whose address is cast as the first headers of GCC 11 do it: what is not in parentheses is cut in two.
#define _tile_loadd(number, from, stride) load_tile(number, (const void*)from, stride)
#define _tile_stored(number, to, stride) store_tile(number, (void*)to, stride)

void _tile_dpbf16ps(int sum, int left, int right) {
  const auto low = [](float x) { return float_of(bits_of(x) << 16); };
  const auto high = [](float x) { return float_of(bits_of(x) & 0xffff0000u); };
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      const float a = tile(left)[i][k];
      for (int j = 0; j < 16; ++j) {
        const float b = tile(right)[k][j];
        tile(sum)[i][j] += low(a) * low(b);
        tile(sum)[i][j] += high(a) * high(b);
      }
    }
  }
}

constexpr int kLanes = 16;
#include "vec_portable.h"
#include "bodies.h"
#include "multiply_tiles_body.h"

constexpr Kernels kFloats = make_table("avx512_bf16 (emulated)");
constexpr Kernels kTiles = make_tile_table(kFloats);

}  // namespace
}  // namespace vig

const vig::Kernels* kernels_emulated_avx512_bf16() { return &vig::kFloats; }
const vig::Kernels* kernels_emulated_amx() {
  static const vig::Kernels tiles = [] {
    vig::Kernels table = vig::kTiles;
    table.name = "amx_bf16 (emulated)";
    return table;
  }();
  return &tiles;
}
