// Vec: sixteen float32 lanes in a zmm register. Included once per file, inside its anonymous namespace.
struct Vec {
  static constexpr int W = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kTakesLanes = false;  // of a register, as a factor
  using F = __m512;
#ifdef __AVX512BF16__
  static constexpr bool kHasPairs = true;
  // sum + the two products of each lane; the rounding within the pair is the instruction's.
  static F dot(F sum, F a, F b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#else
  static constexpr bool kHasPairs = false;
#endif
  using I = __m512i;
  using M = __mmask16;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void stream(float* p, F x) { _mm512_stream_ps(p, x); }  // aligned; past the cache, until fence()
  static void fence() { _mm_sfence(); }
  static void touch(F& x) { __asm__ volatile("" : "+x"(x)); }  // the compiler no longer knows its value
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
  static F max(F a, F b) { return _mm512_max_ps(a, b); }            // b where either is NaN
  static F abs(F a) { return _mm512_abs_ps(a); }
  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static bool any(M m) { return m != 0; }
  static M first(int n) { return static_cast<M>(n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1); }
  static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  static F with_sign(F magnitude, F sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  // x = whole + part with part in [0, 1]; whole may come with a fraction, which scale_by_power does not look at.
  static void split(F x, F& part, F& whole) {
    part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    whole = x;
  }
  static F floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^floor(n)

  static I iset1(int32_t x) { return _mm512_set1_epi32(x); }
  static I ramp(int32_t start) {
    return _mm512_add_epi32(_mm512_set1_epi32(start),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I iselect(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }

  // W elements to float32, from contiguous memory.
  static F from_bf16(const void* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  static F from_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static F from_u8(const void* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  // W lanes to bfloat16, float16 and uint8, rounded to nearest even.
  static void to_bf16(uint16_t* p, F x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    return;
#endif
    const I bits = _mm512_castps_si512(x);
    const M nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(
                            _mm512_mask_blend_epi32(nan, sum, _mm512_set1_epi32(0x7fc00000)), 16)));
  }
  static void to_f16(uint16_t* p, F x) {
    const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  static void to_u8(uint8_t* p, F x) {  // what an int32 cannot hold becomes 2^31, and that 255
    const I whole = _mm512_cvtps_epi32(max(x, zero()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(whole));
  }
  // Words of two bfloat16: low half from a, high half from b.
  static void pair_bf16(uint32_t* p, const uint16_t* a, const uint16_t* b) {
    const I low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    const I high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static void transpose(F* r) {
    F t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
      r[i] = unpack_low(t[i], t[i + 2]);
      r[i + 1] = unpack_high(t[i], t[i + 2]);
      r[i + 2] = unpack_low(t[i + 1], t[i + 3]);
      r[i + 3] = unpack_high(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

 private:
  static F unpack_low(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static F unpack_high(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};
