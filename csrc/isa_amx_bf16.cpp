#include <immintrin.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_avx512.h"
#include "bodies.h"
#include "multiply_tiles_body.h"

constexpr Kernels kFloats = make_table("amx_bf16");
constexpr Kernels kTable = make_tile_table(kFloats);

}  // namespace

const Kernels* kernels_amx_bf16() { return &kTable; }

}  // namespace vig
