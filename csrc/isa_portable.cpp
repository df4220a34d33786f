#include "cast.h"
#include "kernels.h"

namespace vig {
namespace {

constexpr int kLanes = 4;
#include "vec_portable.h"
#include "bodies.h"

constexpr Kernels kTable = make_table("portable");

}  // namespace

const Kernels* kernels_portable() { return &kTable; }

}  // namespace vig
