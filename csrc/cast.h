// One element from its storage type to float32 and back, rounded to nearest even. Every body is static: see kernels.h.
#pragma once
#include "kernels.h"

namespace vig {

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);  // NaN
  return static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}

static inline float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

static inline float from_bfloat16(const char* at) {
  uint16_t half;
  __builtin_memcpy(&half, at, sizeof half);
  return bf16_to_float(half);
}

static inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t exponent = (x >> 10) & 31, fraction = x & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {  // zero or denormal: fraction * 2^-24, exactly
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

static inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // denormal or zero: adding 0.5 leaves the rounded fraction in the low bits
    return static_cast<uint16_t>(sign | (bits_of(__builtin_fabsf(x) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline uint8_t to_uint8(float x) {
  const float inside = x > 0.0f ? (x < 255.0f ? x : 255.0f) : 0.0f;
  return static_cast<uint8_t>(static_cast<int>(__builtin_nearbyintf(inside)));
}

// Element `i` of contiguous memory.
static inline float element(const char* p, Dtype dtype, int64_t i) {
  float x;
  uint16_t half;
  switch (dtype) {
    case Dtype::kFloat32: __builtin_memcpy(&x, p + 4 * i, sizeof x); return x;
    case Dtype::kBFloat16: return from_bfloat16(p + 2 * i);
    case Dtype::kFloat16: __builtin_memcpy(&half, p + 2 * i, sizeof half); return f16_to_float(half);
    default: return static_cast<float>(static_cast<unsigned char>(p[i]));
  }
}

// One value to an element of any dtype.
static inline void store_element(float x, char* to, Dtype dtype) {
  const uint16_t half = dtype == Dtype::kBFloat16 ? to_bfloat16(x) : dtype == Dtype::kFloat16 ? to_float16(x) : 0;
  switch (dtype) {
    case Dtype::kFloat32: __builtin_memcpy(to, &x, sizeof x); return;
    case Dtype::kUInt8: *reinterpret_cast<uint8_t*>(to) = to_uint8(x); return;
    default: __builtin_memcpy(to, &half, sizeof half);
  }
}

static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kUInt8 ? 1 : 2; }

}  // namespace vig
