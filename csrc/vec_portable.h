// Vec: kLanes float32 lanes in the compiler's own vector type (SSE2, NEON, or plain registers).
// Included once per file, inside its anonymous namespace, after kLanes. Sixteen lanes are what the tests put in the place
// of AVX-512: as many registers, and the product of bfloat16 pairs.
struct Vec {
  static constexpr int W = kLanes;
  static constexpr int kRegisters = kLanes == 16 ? 32 : 16;
  static constexpr bool kTakesLanes = false;  // of a register, as a factor
  static constexpr bool kHasPairs = kLanes == 16;
  typedef float F __attribute__((vector_size(4 * kLanes)));
  typedef int32_t I __attribute__((vector_size(4 * kLanes)));
  using M = I;  // all bits of a lane set, or none

  static F zero() { return F{}; }
  static F set1(float x) { return F{} + x; }
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
  static void stream(float* p, F x) { store(p, x); }
  static void fence() {}
  static void touch(F& x) { __asm__ volatile("" : "+m"(x)); }  // the compiler no longer knows its value
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F dot(F sum, F a, F b) {  // + a.high * b.high + a.low * b.low
    const I x = as_int(a), y = as_int(b), high = iset1(static_cast<int32_t>(0xffff0000u));
    sum += as_float(x & high) * as_float(y & high);
    return sum + as_float(x << 16) * as_float(y << 16);
  }
  static F max(F a, F b) { return select(a > b, a, b); }  // b where either is NaN
  static F abs(F a) { return as_float(as_int(a) & 0x7fffffff); }
  static M greater(F a, F b) { return a > b; }
  static bool any(M m) {
    int32_t all = 0;
    for (int i = 0; i < W; ++i) all |= m[i];
    return all != 0;
  }
  static M first(int n) { return ramp(0) < iset1(n); }
  static F select(M m, F yes, F no) { return as_float((as_int(yes) & m) | (as_int(no) & ~m)); }
  static F with_sign(F magnitude, F sign) {
    return as_float(as_int(magnitude) | (as_int(sign) & static_cast<int32_t>(0x80000000u)));
  }
  static F floor(F a) {  // |a| < 2^22 here
    const F big = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to nearest even
    const F near = (a + big) - big;
    return near - select(greater(near, a), set1(1.0f), zero());
  }
  static void split(F x, F& part, F& whole) {  // x = whole + part with part in [0, 1]
    x = max(set1(-150.0f), x);
    whole = floor(x);
    part = x - whole;
  }
  static F scale_by_power(F a, F n) {  // a * 2^n, n >= -150 an integer; 0 below the normal range
    const F safe = select(n > set1(-127.0f), n, set1(-126.0f));
    const F power = as_float((__builtin_convertvector(safe, I) + 127) << 23);
    return select(n > set1(-127.0f), a * power, n * zero());
  }

  static I iset1(int32_t x) { return I{} + x; }
  static I ramp(int32_t start) {
    I x;
    for (int i = 0; i < W; ++i) x[i] = start + i;
    return x;
  }
  static I iload(const void* p) {
    I x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void istore(void* p, I x) { __builtin_memcpy(p, &x, sizeof x); }
  static I iselect(M m, I yes, I no) { return (yes & m) | (no & ~m); }

  // W elements to float32, from contiguous memory.
  static F from_bf16(const void* p) {
    return each<uint16_t>(p, bf16_to_float);
  }
  static F from_f16(const void* p) {
    return each<uint16_t>(p, f16_to_float);
  }
  static F from_u8(const void* p) {
    return each<uint8_t>(p, [](uint8_t x) { return static_cast<float>(x); });
  }
  // W lanes to bfloat16, float16 and uint8, rounded to nearest even.
  static void to_bf16(uint16_t* p, F x) {
    for (int i = 0; i < W; ++i) p[i] = to_bfloat16(x[i]);
  }
  static void to_f16(uint16_t* p, F x) {
    for (int i = 0; i < W; ++i) p[i] = to_float16(x[i]);
  }
  static void to_u8(uint8_t* p, F x) {
    for (int i = 0; i < W; ++i) p[i] = to_uint8(x[i]);
  }
  // Words of two bfloat16: low half from a, high half from b.
  static void pair_bf16(uint32_t* p, const uint16_t* a, const uint16_t* b) {
    for (int i = 0; i < W; ++i) p[i] = a[i] | (static_cast<uint32_t>(b[i]) << 16);
  }

  static void transpose(F* r) {
    for (int i = 0; i < W; ++i) {
      for (int j = i + 1; j < W; ++j) {
        const float x = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = x;
      }
    }
  }

 private:
  template <class Stored, class Convert>
  static F each(const void* p, Convert convert) {
    Stored x[W];
    __builtin_memcpy(x, p, sizeof x);
    F y;
    for (int i = 0; i < W; ++i) y[i] = convert(x[i]);
    return y;
  }
  static F as_float(I x) {
    F y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
  static I as_int(F x) {
    I y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
};
