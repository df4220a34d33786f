#include <arm_neon.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_neon.h"
#include "multiply_body.h"
#include "fold_body.h"
#include "gaussian_blur_body.h"
#include "store_body.h"
#include "table_body.h"

constexpr Kernels kTable = make_table("neon_bf16");

}  // namespace

const Kernels* kernels_neon_bf16() { return &kTable; }

}  // namespace vig
