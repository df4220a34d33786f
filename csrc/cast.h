// float32 to the storage types, rounded to nearest even. Not for the files of one instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace vig {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}

inline float from_bfloat16(const char* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // denormal or zero: adding 0.5 leaves the rounded fraction in the low bits
    return static_cast<uint16_t>(sign | (bits_of(std::fabs(x) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline uint8_t to_uint8(float x) {
  const float inside = x > 0.0f ? (x < 255.0f ? x : 255.0f) : 0.0f;
  return static_cast<uint8_t>(static_cast<int>(std::nearbyint(inside)));
}

template <class Element, class Cast>
void store_cast(const float* from, char* to, int64_t stride, int64_t count, Cast cast) {
  if (stride == static_cast<int64_t>(sizeof(Element))) {
    Element* dense = reinterpret_cast<Element*>(to);
    for (int64_t x = 0; x < count; ++x) dense[x] = cast(from[x]);
  } else {
    for (int64_t x = 0; x < count; ++x) *reinterpret_cast<Element*>(to + x * stride) = cast(from[x]);
  }
}

// `count` values to elements `stride` bytes apart.
inline void store_row(const float* from, char* to, int64_t stride, int64_t count, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return store_cast<float>(from, to, stride, count, [](float x) { return x; });
    case Dtype::kBFloat16: return store_cast<uint16_t>(from, to, stride, count, to_bfloat16);
    case Dtype::kFloat16: return store_cast<uint16_t>(from, to, stride, count, to_float16);
    default: return store_cast<uint8_t>(from, to, stride, count, to_uint8);
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kUInt8 ? 1 : 2; }

}  // namespace vig
