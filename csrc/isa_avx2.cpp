#include <immintrin.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_avx2.h"
#include "bodies.h"

constexpr Kernels kTable = make_table("avx2");

}  // namespace

const Kernels* kernels_avx2() { return &kTable; }

}  // namespace vig
