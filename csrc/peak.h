#pragma once
#include "kernels.h"

namespace vig {

// Floating-point operations a second of register-only multiply-adds on `threads` threads, over about `seconds`.
double measure_peak(const Kernels& kernels, bool pairs, int threads, double seconds);

}  // namespace vig
