#include <arm_neon.h>

#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

#include "vec_neon.h"
#include "bodies.h"

constexpr Kernels kTable = make_table("neon");

}  // namespace

const Kernels* kernels_neon() { return &kTable; }

}  // namespace vig
