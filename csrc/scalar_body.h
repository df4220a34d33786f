// One element at a time. Included once per file, inside its anonymous namespace.

float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

[[maybe_unused]] uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

float bf16_to_float(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t exponent = (x >> 10) & 31, fraction = x & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) {  // zero or denormal: fraction * 2^-24, exactly
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

// Element `i` of contiguous memory as float32.
[[maybe_unused]] float element(const char* p, Dtype dtype, int64_t i) {
  uint16_t half;
  switch (dtype) {
    case Dtype::kFloat32: {
      float x;
      __builtin_memcpy(&x, p + 4 * i, sizeof x);
      return x;
    }
    case Dtype::kBFloat16:
      __builtin_memcpy(&half, p + 2 * i, sizeof half);
      return bf16_to_float(half);
    case Dtype::kFloat16:
      __builtin_memcpy(&half, p + 2 * i, sizeof half);
      return f16_to_float(half);
    default:
      return static_cast<float>(static_cast<unsigned char>(p[i]));
  }
}

[[maybe_unused]] int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kUInt8 ? 1 : 2;
}
