// Vec: four float32 lanes in a NEON register. Included once per file, inside its anonymous namespace.
struct Vec {
  static constexpr int W = 4;
  static constexpr int kRegisters = 32;
  static constexpr bool kTakesLanes = true;  // of a register, as a factor
  using F = float32x4_t;
  using I = int32x4_t;
  using M = uint32x4_t;  // all bits of a lane set, or none
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  static constexpr bool kHasPairs = true;
  // sum + the two products of each lane; the rounding within the pair is the instruction's.
  static F dot(F sum, F a, F b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
  }
  template <int Lane>
  static F dot_lane(F sum, F b, F a) {
    return vbfdotq_laneq_f32(sum, vreinterpretq_bf16_f32(b), vreinterpretq_bf16_f32(a), Lane);
  }
#else
  static constexpr bool kHasPairs = false;
#endif

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set1(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void stream(float* p, F x) { store(p, x); }
  static void fence() {}
  static void touch(F& x) { __asm__ volatile("" : "+w"(x)); }  // the compiler no longer knows its value
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }                // a * b + c
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }      // b where either is NaN
  static F abs(F a) { return vabsq_f32(a); }
  static M greater(F a, F b) { return vcgtq_f32(a, b); }
  static bool any(M m) { return vmaxvq_u32(m) != 0; }
  static M first(int n) { return vcltq_s32(ramp(0), iset1(n)); }
  static F select(M m, F yes, F no) { return vbslq_f32(m, yes, no); }
  static F with_sign(F magnitude, F sign) {
    const M high = vandq_u32(vreinterpretq_u32_f32(sign), vdupq_n_u32(0x80000000u));
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(magnitude), high));
  }
  static F floor(F a) { return vrndmq_f32(a); }
  static void split(F x, F& part, F& whole) {  // x = whole + part with part in [0, 1]
    x = max(set1(-150.0f), x);
    whole = floor(x);
    part = sub(x, whole);
  }
  static F scale_by_power(F a, F n) {  // a * 2^n, n >= -150 an integer; 0 below the normal range
    const I power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), iset1(127)), 23);
    return select(greater(n, set1(-127.0f)), mul(a, vreinterpretq_f32_s32(power)), mul(n, zero()));  // NaN stays
  }

  // Adds lane i of `a` times the panel's two vectors to sum[i]: the instructions take a factor from a lane.
  template <bool Pairs>
  static void add_lanes(F (*sum)[2], F a, F left, F right) {
    add_lane<Pairs, 0>(sum, a, left, right);
    add_lane<Pairs, 1>(sum, a, left, right);
    add_lane<Pairs, 2>(sum, a, left, right);
    add_lane<Pairs, 3>(sum, a, left, right);
  }

  static I iset1(int32_t x) { return vdupq_n_s32(x); }
  static I ramp(int32_t start) { return vaddq_s32(iset1(start), I{0, 1, 2, 3}); }
  static I iload(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void istore(void* p, I x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(x)); }
  static I iselect(M m, I yes, I no) { return vbslq_s32(m, yes, no); }

  // W elements to float32, from contiguous memory.
  static F from_bf16(const void* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves(p)), 16)); }
  static F from_f16(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u16(halves(p))); }
  static F from_u8(const void* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
  }
  // W lanes to bfloat16, float16 and uint8, rounded to nearest even.
  static void to_bf16(uint16_t* p, F x) {
    const M bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const M sum = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), sum, vdupq_n_u32(0x7fc00000u)), 16));
  }
  static void to_f16(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static void to_u8(uint8_t* p, F x) {
    const uint16x4_t whole = vmovn_u32(vcvtnq_u32_f32(vminq_f32(max(x, zero()), set1(255.0f))));
    const uint64_t bytes = vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcombine_u16(whole, whole))), 0);
    __builtin_memcpy(p, &bytes, W);
  }
  // Words of two bfloat16: low half from a, high half from b.
  static void pair_bf16(uint32_t* p, const uint16_t* a, const uint16_t* b) {
    const uint16x4_t low = halves(a), high = halves(b);
    vst1q_u32(p, vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high))));
  }

  static void transpose(F* r) {
    const F t[4] = {vtrn1q_f32(r[0], r[1]), vtrn2q_f32(r[0], r[1]), vtrn1q_f32(r[2], r[3]), vtrn2q_f32(r[2], r[3])};
    for (int i = 0; i < 2; ++i) {
      const float64x2_t upper = vreinterpretq_f64_f32(t[i]), lower = vreinterpretq_f64_f32(t[i + 2]);
      r[i] = vreinterpretq_f32_f64(vtrn1q_f64(upper, lower));
      r[i + 2] = vreinterpretq_f32_f64(vtrn2q_f64(upper, lower));
    }
  }

 private:
  static uint16x4_t halves(const void* p) { return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p))); }

  template <bool Pairs, int Lane>
  static void add_lane(F (*sum)[2], F a, F left, F right) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    if constexpr (Pairs) {
      sum[Lane][0] = dot_lane<Lane>(sum[Lane][0], left, a);
      sum[Lane][1] = dot_lane<Lane>(sum[Lane][1], right, a);
      return;
    }
#endif
    sum[Lane][0] = vfmaq_laneq_f32(sum[Lane][0], left, a, Lane);
    sum[Lane][1] = vfmaq_laneq_f32(sum[Lane][1], right, a, Lane);
  }
};
