#include <immintrin.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_avx512.h"
#include "multiply_body.h"
#include "fold_body.h"
#include "gaussian_blur_body.h"
#include "store_body.h"
#include "table_body.h"

constexpr Kernels kTable = make_table("avx512");

}  // namespace

const Kernels* kernels_avx512() { return &kTable; }

}  // namespace vig
