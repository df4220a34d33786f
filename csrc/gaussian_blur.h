#pragma once
#include <cstdint>

#include "kernels.h"

namespace vig {

// A (L, C, H, W) view: the address of element 0 and byte strides.
struct ImageView {
  char* data;
  int64_t stride[4];
};

// out[l, c] = Gaussian of (sigma_y[l], sigma_x[l]) pixels over images[l, c], radius ceil(truncate * sigma), weights
// normalised to 1. Borders mirror without repeating the edge pixel (as often as the radius needs) or replicate it.
// uint8 is rounded half to even. `out` may not overlap `images`.
void gaussian_blur(const Kernels& kernels, const ImageView& images, const ImageView& out, const int64_t shape[4],
                   Dtype dtype, const double* sigma_y, const double* sigma_x, double truncate, bool replicate,
                   int threads);

}  // namespace vig
