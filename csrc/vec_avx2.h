// Vec: eight float32 lanes in a ymm register. Included once per file, inside its anonymous namespace.
struct Vec {
  static constexpr int W = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kTakesLanes = false;  // of a register, as a factor
  static constexpr bool kHasPairs = false;
  using F = __m256;
  using I = __m256i;
  using M = __m256;  // all bits of a lane set, or none

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void stream(float* p, F x) { _mm256_stream_ps(p, x); }  // aligned; past the cache, until fence()
  static void fence() { _mm_sfence(); }
  static void touch(F& x) { __asm__ volatile("" : "+x"(x)); }  // the compiler no longer knows its value
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
  static F max(F a, F b) { return _mm256_max_ps(a, b); }            // b where either is NaN
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static bool any(M m) { return _mm256_movemask_ps(m) != 0; }
  static M first(int n) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), ramp(0)));
  }
  static F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static F with_sign(F magnitude, F sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  static void split(F x, F& part, F& whole) {  // x = whole + part with part in [0, 1]
    x = max(set1(-150.0f), x);
    whole = _mm256_floor_ps(x);
    part = sub(x, whole);
  }
  static F floor(F a) { return _mm256_floor_ps(a); }
  static F scale_by_power(F a, F n) {  // a * 2^n, n >= -150 an integer; 0 below the normal range
    const I power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return select(greater(n, set1(-127.0f)), mul(a, _mm256_castsi256_ps(power)), keep_nan(n));
  }

  static I iset1(int32_t x) { return _mm256_set1_epi32(x); }
  static I ramp(int32_t start) {
    return _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void istore(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I iselect(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }

  // W elements to float32, from contiguous memory.
  static F from_bf16(const void* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16));
  }
  static F from_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static F from_u8(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  // W lanes to bfloat16, float16 and uint8, rounded to nearest even.
  static void to_bf16(uint16_t* p, F x) {
    const I bits = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I sum = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const M nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const I high = _mm256_srli_epi32(iselect(nan, _mm256_set1_epi32(0x7fc00000), sum), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void to_f16(uint16_t* p, F x) {
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
  static void to_u8(uint8_t* p, F x) {
    const I whole = _mm256_cvtps_epi32(_mm256_min_ps(max(x, zero()), set1(255.0f)));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }
  // Words of two bfloat16: low half from a, high half from b.
  static void pair_bf16(uint32_t* p, const uint16_t* a, const uint16_t* b) {
    const I low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    const I high = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }

  static void transpose(F* r) {
    F t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      const F low = r[i], high = r[i + 4];
      r[i] = _mm256_permute2f128_ps(low, high, 0x20);
      r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }

 private:
  static F keep_nan(F n) { return mul(n, zero()); }
};
