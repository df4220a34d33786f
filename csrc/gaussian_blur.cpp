#include "gaussian_blur.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"
#include "cast.h"
#include "pool.h"

namespace vig {
namespace {

constexpr int64_t kPixelsPerThread = 16 << 10;  // fewer are done before another thread is awake
constexpr int64_t kScratchFloats = 2 << 20;  // half-blurred planes held at a time: 8 MiB stay in cache

// One direction of the filter: taps in float32, and which row stands where the border is crossed.
struct Filter {
  int64_t radius;
  std::vector<float> taps;
  std::vector<int32_t> index;

  Filter(double sigma, double truncate, int64_t length, bool replicate, int blur_rows)
      : radius(sigma > 0 ? static_cast<int64_t>(std::ceil(truncate * sigma)) : 0),
        taps(2 * radius + 2 * blur_rows, 0.0f),
        index(round_up(length, 16) + 2 * radius + blur_rows) {
    std::vector<double> weight(2 * radius + 1, 1.0);
    double total = 0;
    for (int64_t j = -radius; j <= radius; ++j) {
      if (radius > 0) weight[j + radius] = std::exp(-0.5 * (j / sigma) * (j / sigma));
      total += weight[j + radius];
    }
    for (int64_t j = 0; j <= 2 * radius; ++j) taps[blur_rows - 1 + j] = static_cast<float>(weight[j] / total);
    for (int64_t i = 0; i < static_cast<int64_t>(index.size()); ++i) {
      index[i] = static_cast<int32_t>(fold_border(i - radius, length, replicate));
    }
  }

  static int64_t fold_border(int64_t i, int64_t length, bool replicate) {
    if (replicate || length == 1) return std::clamp<int64_t>(i, 0, length - 1);
    const int64_t period = 2 * (length - 1);
    const int64_t phase = ((i % period) + period) % period;
    return phase < length ? phase : period - phase;
  }
};

// Blurs planes [first, first + count) of one image size; plane p is (image p / C, channel p % C).
class Blur {
 public:
  Blur(const Kernels& kernels, const ImagePair& pair, int threads)
      : kernels_(kernels), images_(pair.images), out_(pair.out), dtype_(pair.dtype), threads_(threads),
        channels_(pair.shape[1]), height_(pair.shape[2]), width_(pair.shape[3]), columns_(2 * kernels.lanes),
        half_stride_(round_up(height_, kernels.lanes)), wide_(round_up(width_, columns_)),
        strip_floats_((height_ + round_up(width_, kernels.lanes)) * columns_),
        strips_(make_buffer(strip_floats_ * threads)) {}

  int64_t plane_floats() const { return wide_ * half_stride_; }

  void run(int64_t first, int64_t count, const std::vector<Filter>& down, const std::vector<Filter>& across) {
    if (half_ == nullptr) half_ = make_buffer(plane_floats() * count);  // the first batch is the largest
    const int64_t vertical = wide_ / columns_, horizontal = (height_ + columns_ - 1) / columns_;
    parallel_for(count * vertical, threads_, [&](int64_t task, int worker) {
      blur_down(first, task / vertical, task % vertical * columns_, down, strips_.get() + worker * strip_floats_);
    });
    parallel_for(count * horizontal, threads_, [&](int64_t task, int worker) {
      blur_across(first, task / horizontal, task % horizontal * columns_, across,
                  strips_.get() + worker * strip_floats_);
    });
  }

 private:
  // Rows that vectors of float32 can be read from, or written to, where they stand.
  bool dense_floats(const ImageView& view) const {
    return dtype_ == Dtype::kFloat32 && view.stride[3] == 4 && view.stride[2] % 4 == 0;
  }

  // A row of the result.
  void store(const float* from, char* to) const {
    if (out_.stride[3] == size_of(dtype_)) return kernels_.store_row(from, to, width_, dtype_);
    for (int64_t x = 0; x < width_; ++x) store_element(from[x], to + x * out_.stride[3], dtype_);
  }

  const char* plane(const ImageView& view, int64_t p) const {
    return view.data + p / channels_ * view.stride[0] + p % channels_ * view.stride[1];
  }

  // Columns [x, x + columns) of a plane, filtered down, to rows x.. of the transposed half-blurred plane.
  void blur_down(int64_t first, int64_t p, int64_t x, const std::vector<Filter>& filters, float* strip) {
    const Filter& filter = filters[filters.size() == 1 ? 0 : (first + p) / channels_];
    const char* from = plane(images_, first + p) + x * images_.stride[3];
    const int64_t columns = std::min(columns_, width_ - x);
    const float* at = strip;
    int64_t stride = columns_;
    if (dense_floats(images_) && columns % kernels_.lanes == 0) {
      at = reinterpret_cast<const float*>(from);
      stride = images_.stride[2] / 4;
    } else {
      kernels_.load_strip({.from = from,
                           .rows = height_,
                           .columns = columns,
                           .row_stride = images_.stride[2],
                           .column_stride = images_.stride[3],
                           .dtype = dtype_,
                           .strip = strip,
                           .strip_columns = columns_});
    }
    kernels_.blur({.strip = at,
                   .strip_stride = stride,
                   .length = height_,
                   .columns = columns,
                   .index = filter.index.data(),
                   .taps = filter.taps.data(),
                   .radius = filter.radius,
                   .out = half_.get() + p * plane_floats() + x * half_stride_,
                   .out_stride = half_stride_});
  }

  // Rows [y, y + columns) of the result: columns of the half-blurred plane, filtered along x and turned upright.
  void blur_across(int64_t first, int64_t p, int64_t y, const std::vector<Filter>& filters, float* strip) {
    const Filter& filter = filters[filters.size() == 1 ? 0 : (first + p) / channels_];
    const int64_t rows = std::min(columns_, height_ - y), lanes = kernels_.lanes;
    const float* from = half_.get() + p * plane_floats() + y;
    char* to = const_cast<char*>(plane(out_, first + p)) + y * out_.stride[2];
    const bool direct = dense_floats(out_) && rows % lanes == 0 && width_ % lanes == 0;
    float* upright = direct ? reinterpret_cast<float*>(to) : strip + height_ * columns_;
    const int64_t stride = direct ? out_.stride[2] / 4 : round_up(width_, lanes);
    kernels_.blur({.strip = from,
                   .strip_stride = half_stride_,
                   .length = width_,
                   .columns = rows,
                   .index = filter.index.data(),
                   .taps = filter.taps.data(),
                   .radius = filter.radius,
                   .out = upright,
                   .out_stride = stride});
    if (direct) return;
    for (int64_t i = 0; i < rows; ++i) store(upright + i * stride, to + i * out_.stride[2]);
  }

  const Kernels& kernels_;
  const ImageView images_, out_;
  const Dtype dtype_;
  const int threads_;
  const int64_t channels_, height_, width_, columns_, half_stride_, wide_, strip_floats_;
  Buffer strips_, half_;
};

// One for each image, or one for all where their sigmas are equal.
std::vector<Filter> make_filters(const double* sigma, int64_t images, const BlurSettings& settings, int64_t length,
                                 int blur_rows) {
  const bool same = std::all_of(sigma, sigma + images, [&](double s) { return s == sigma[0]; });
  std::vector<Filter> filters;
  for (int64_t l = 0; l < (same ? 1 : images); ++l) {
    filters.emplace_back(sigma[l], settings.truncate, length, settings.replicate, blur_rows);
  }
  return filters;
}

}  // namespace

void gaussian_blur(const Kernels& kernels, const ImagePair& pair, const BlurSettings& settings, int threads) {
  const int64_t *shape = pair.shape, planes = shape[0] * shape[1];
  if (planes == 0 || shape[2] == 0 || shape[3] == 0) return;
  const auto down = make_filters(settings.sigma_y, shape[0], settings, shape[2], kernels.blur_rows);
  const auto across = make_filters(settings.sigma_x, shape[0], settings, shape[3], kernels.blur_rows);
  threads = static_cast<int>(std::min<int64_t>(threads, planes * shape[2] * shape[3] / kPixelsPerThread + 1));
  Blur blur(kernels, pair, threads);
  const int64_t batch = std::clamp<int64_t>(kScratchFloats / blur.plane_floats(), 1, planes);
  for (int64_t first = 0; first < planes; first += batch) {
    blur.run(first, std::min(batch, planes - first), down, across);
  }
}

}  // namespace vig
