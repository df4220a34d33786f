#include <arm_neon.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_neon.h"
#include "bodies.h"

constexpr Kernels kTable = make_table("neon_bf16");

}  // namespace

const Kernels* kernels_neon_bf16() { return &kTable; }

}  // namespace vig
