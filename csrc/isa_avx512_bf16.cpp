#include <immintrin.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_avx512.h"
#include "bodies.h"

constexpr Kernels kTable = make_table("avx512_bf16");

}  // namespace

const Kernels* kernels_avx512_bf16() { return &kTable; }

}  // namespace vig
