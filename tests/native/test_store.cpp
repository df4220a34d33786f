#include <cmath>
#include <cstring>
#include <limits>

#include "cast.h"
#include "check.h"

namespace {

bool same(const char* found, const char* expected, vig::Dtype dtype) {
  const int64_t size = vig::size_of(dtype);
  if (std::memcmp(found, expected, size) == 0) return true;
  uint16_t a = 0, b = 0;  // any NaN will do
  if (size != 2) return false;
  std::memcpy(&a, found, size);
  std::memcpy(&b, expected, size);
  const int infinite = dtype == vig::Dtype::kBFloat16 ? 0x7f80 : 0x7c00;
  return (a & 0x7fff) > infinite && (b & 0x7fff) > infinite;
}

}  // namespace

// Whole vectors and what is left over, against the cast of one element.
void test_store() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> values = {0.0f,     -0.0f,    0.5f, 1.5f,  2.5f,   254.5f,    255.5f,     256.0f,
                               -3.0f,    1e-8f,    6e-8f, 3e-5f, 3e9f,  1e20f,     -1e20f,     3.4e38f,
                               65504.0f, 65519.0f, 65520.0f, NAN,   1.0f + 1.0f / 256,   1.0f + 3.0f / 256,
                               kInfinity, -kInfinity,
                               vig::float_of(0x7f800001), vig::float_of(0x7fffffff), vig::float_of(0xffffffff)};  // NaN
  Draw draw(5);
  for (float x : draw.values(300)) values.push_back(300 * x);
  for (const vig::Kernels* kernels : all_kernels()) {
    for (vig::Dtype dtype : {vig::Dtype::kFloat32, vig::Dtype::kBFloat16, vig::Dtype::kFloat16, vig::Dtype::kUInt8}) {
      const int64_t size = vig::size_of(dtype);
      for (size_t first = 0; first < 40; ++first) {
        const int64_t count = static_cast<int64_t>(values.size() - first);
        std::vector<char> found(count * size);
        kernels->store_row(values.data() + first, found.data(), count, dtype);
        for (int64_t i = 0; i < count; ++i) {
          char expected[4] = {};
          vig::store_element(values[first + i], expected, dtype);
          CHECK(same(found.data() + i * size, expected, dtype), "%s, dtype %d: %g is stored otherwise in a row",
                kernels->name, static_cast<int>(dtype), values[first + i]);
        }
      }
    }
  }
}
