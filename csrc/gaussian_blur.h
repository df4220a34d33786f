#pragma once
#include <cstdint>

#include "kernels.h"

namespace vig {

// A (L, C, H, W) view: the address of element 0 and byte strides.
struct ImageView {
  char* data;
  int64_t stride[4];
};

// The images that are read and the ones that are written, which may not overlap: one shape (L, C, H, W), one dtype.
struct ImagePair {
  ImageView images, out;
  const int64_t* shape;
  Dtype dtype;
};

struct BlurSettings {
  const double *sigma_y, *sigma_x;  // (L,) pixels
  double truncate;
  bool replicate;  // the edge pixel; else borders mirror without repeating it, as often as the radius needs
};

// out[l, c] = Gaussian of (sigma_y[l], sigma_x[l]) over images[l, c], radius ceil(truncate * sigma), weights normalised
// to 1. uint8 is rounded half to even.
void gaussian_blur(const Kernels& kernels, const ImagePair& pair, const BlurSettings& settings, int threads);

}  // namespace vig
