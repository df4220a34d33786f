#include <algorithm>
#include <cmath>

#include "check.h"
#include "gaussian_blur.h"

namespace {

int64_t edge(int64_t i, int64_t size, bool replicate) {
  if (replicate || size == 1) return std::clamp<int64_t>(i, 0, size - 1);
  while (i < 0 || i >= size) i = i < 0 ? -i : 2 * (size - 1) - i;
  return i;
}

// One direction, in double, straight from the definition.
std::vector<double> blur_lines(const std::vector<double>& from, int64_t lines, int64_t size, int64_t line_step,
                               int64_t step, double sigma, bool replicate) {
  const int64_t radius = static_cast<int64_t>(std::ceil(3.0 * sigma));
  std::vector<double> out(from.size());
  double total = 0;
  for (int64_t j = -radius; j <= radius; ++j) total += std::exp(-0.5 * j * j / (sigma * sigma));
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t j = -radius; j <= radius; ++j) {
        sum += std::exp(-0.5 * j * j / (sigma * sigma)) * from[line * line_step + edge(i + j, size, replicate) * step];
      }
      out[line * line_step + i * step] = sum / total;
    }
  }
  return out;
}

void check_plane(const vig::Kernels& kernels, int64_t height, int64_t width, double sigma, bool replicate, int threads) {
  Draw draw(height * 131 + width);
  const std::vector<float> image = draw.values(height * width);
  std::vector<float> out(height * width);  // exactly as long as it must be: the sanitizer guards the rest
  const int64_t shape[4] = {1, 1, height, width};
  const vig::ImageView from = {reinterpret_cast<char*>(const_cast<float*>(image.data())), {0, 0, width * 4, 4}};
  const vig::ImageView to = {reinterpret_cast<char*>(out.data()), {0, 0, width * 4, 4}};
  vig::gaussian_blur(kernels, {.images = from, .out = to, .shape = shape, .dtype = vig::Dtype::kFloat32},
                     {.sigma_y = &sigma, .sigma_x = &sigma, .truncate = 3.0, .replicate = replicate}, threads);
  std::vector<double> exact(image.begin(), image.end());
  exact = blur_lines(exact, width, height, 1, width, sigma, replicate);
  exact = blur_lines(exact, height, width, width, 1, sigma, replicate);
  for (int64_t i = 0; i < height * width; ++i) {
    CHECK(std::fabs(out[i] - exact[i]) < 2e-6, "%s %ldx%ld sigma %g at %ld: %g, not %g", kernels.name, long(height),
          long(width), sigma, long(i), out[i], exact[i]);
  }
}

}  // namespace

void test_blur() {
  for (const vig::Kernels* kernels : all_kernels()) {
    for (bool replicate : {false, true}) {
      for (double sigma : {0.3, 2.0, 30.0}) {
        check_plane(*kernels, 1, 1, sigma, replicate, 1);
        check_plane(*kernels, 5, 33, sigma, replicate, 1);
        check_plane(*kernels, 67, 41, sigma, replicate, 2);
        check_plane(*kernels, 48, 64, sigma, replicate, 2);  // whole vectors: nothing is copied
      }
    }
  }
}
