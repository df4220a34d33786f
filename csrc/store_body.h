// float32 to the storage types, rounded to nearest even. Included once per instruction set, inside its anonymous
// namespace, after Vec.

template <class Store, class Scalar>
inline void store_with(const float* from, int64_t count, Store store, Scalar scalar) {
  int64_t i = 0;
  for (; i + Vec::W <= count; i += Vec::W) store(i, Vec::load(from + i));
  for (; i < count; ++i) scalar(i, from[i]);
}

// `count` values to contiguous elements.
void store_row(const float* from, char* to, int64_t count, Dtype dtype) {
  uint16_t* const halves = reinterpret_cast<uint16_t*>(to);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(to);
  switch (dtype) {
    case Dtype::kFloat32:
      __builtin_memcpy(to, from, count * sizeof(float));
      return;
    case Dtype::kBFloat16:
      return store_with(
          from, count, [=](int64_t i, Vec::F x) { Vec::to_bf16(halves + i, x); },
          [=](int64_t i, float x) { halves[i] = to_bfloat16(x); });
    case Dtype::kFloat16:
      return store_with(
          from, count, [=](int64_t i, Vec::F x) { Vec::to_f16(halves + i, x); },
          [=](int64_t i, float x) { halves[i] = to_float16(x); });
    default:
      return store_with(
          from, count, [=](int64_t i, Vec::F x) { Vec::to_u8(bytes + i, x); },
          [=](int64_t i, float x) { bytes[i] = to_uint8(x); });
  }
}
