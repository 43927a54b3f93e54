// sigmoid, tanh, elu, log and root on vectors. Included inside the namespace of an instruction set, which defines the
// precisions F32 and F64: V (a vector of T), lanes, set1, fma, clamp (NaN stays NaN), and, if has_table, eighths.
//
// Exponentials are powers of 2: the packed weights hold the factor log2(e) already (pack.h), so a gate's sum is rounded
// to an integer, which becomes the exponent, and what is left over is exact and goes into a polynomial. Every operation
// is the same, lane by lane, on AVX2 and AVX-512 (explicit fused multiply-adds, IEEE division), so the two agree to the
// bit. Polynomials are Chebyshev interpolants of (2^f - 1) / f.

template <class P>
struct Constants;

template <>
struct Constants<F32> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float rounder = 12582912.0f + bias;              // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float eighths_rounder = 1572864.0f;              // 1.5 * 2^20: to a multiple of 1/8
  static constexpr float sigmoid_bound = 126, tanh_bound = 26.05f;  // 2^126 is finite; tanh(26.05 / 2 log2(e)) is 1
  static constexpr float two_log2e = 2.8853900432586670f, log2e = 1.4426950216293335f;
  static constexpr float ln2_high = 0.6931471824645996f, ln2_low = -1.9046542121259336e-09f;
  static constexpr float smallest_normal = 1.17549435e-38f, largest = 3.40282347e38f;
  static constexpr float exp2_halves[] = {1.5453164814971387e-4f, 1.339086564257741e-3f,  9.618083015084267e-3f,
                                          5.5503569543361664e-2f, 2.4022650718688965e-1f, 6.931471824645996e-1f};
  static constexpr float exp2_sixteenths[] = {5.550801381468773e-2f, 2.4025468528270721e-1f, 6.931471824645996e-1f};
  static constexpr int log_terms = 5;
};

template <>
struct Constants<F64> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0 + bias;
  static constexpr double sigmoid_bound = 1022, tanh_bound = 55.2;
  static constexpr double two_log2e = 2.8853900817779268, log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471805599453, ln2_low = 2.3190468138462996e-17;
  static constexpr double smallest_normal = 2.2250738585072014e-308, largest = 1.7976931348623157e308;
  static constexpr double exp2_halves[] = {4.454960975460706e-10,  7.072586657066206e-09,  1.0178062443959398e-07,
                                           1.3215442584382707e-06, 1.5252733829839213e-05, 0.00015403530441741856,
                                           0.0013333558146416933,  0.009618129107606885,   0.0555041086648216,
                                           0.24022650695910097,    0.6931471805599453};
  static constexpr int log_terms = 13;
};

template <class P>
using BitsVector = typename P::BitsV;

// f(0) ... f(J - 1), unrolled. The functions below take J vectors at a time and do each operation for all of them
// before the next: what one vector waits for (4 cycles an operation, 20 in a row) the others fill.
template <int J, class F>
INLINE void each(F f) {
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) f(j);
}

// p = the polynomial at x, highest coefficient first.
template <class P, int J, unsigned N>
INLINE void polynomial(const typename P::T (&coefficients)[N], const typename P::V (&x)[J], typename P::V (&p)[J]) {
  each<J>([&](int j) INLINE_LAMBDA { p[j] = P::set1(coefficients[0]); });
#pragma GCC unroll 16
  for (unsigned i = 1; i < N; ++i) {
    each<J>([&](int j) INLINE_LAMBDA { p[j] = P::fma(p[j], x[j], P::set1(coefficients[i])); });
  }
}

// 2^t = scale * (1 + p), |t| <= sigmoid_bound. Keeping p, not 1 + p, keeps 2^t - 1 accurate near 0.
template <class P, int J>
INLINE void exp2_parts(const typename P::V (&t)[J], typename P::V (&scale)[J], typename P::V (&p)[J]) {
  using C = Constants<P>;
  using V = typename P::V;
  V f[J];
  each<J>([&](int j) INLINE_LAMBDA { scale[j] = t[j] + P::set1(C::rounder); });
  each<J>([&](int j) INLINE_LAMBDA { f[j] = t[j] - (scale[j] - P::set1(C::rounder)); });
  // 2^n: the exponent's bias is part of the rounder
  each<J>([&](int j) INLINE_LAMBDA { scale[j] = (V)((BitsVector<P>)scale[j] << C::mantissa_bits); });
  polynomial<P>(C::exp2_halves, f, p);
  each<J>([&](int j) INLINE_LAMBDA { p[j] = p[j] * f[j]; });
}

// 2^t = scale * m with a table of 2^(j/8): a shorter polynomial, but scale is rounded, so 2^t - 1 is not good near 0.
template <class P, int J>
INLINE void exp2_by_table(const typename P::V (&t)[J], typename P::V (&scale)[J], typename P::V (&m)[J]) {
  using C = Constants<P>;
  using V = typename P::V;
  V f[J];
  each<J>([&](int j) INLINE_LAMBDA { scale[j] = t[j] + P::set1(C::eighths_rounder); });
  each<J>([&](int j) INLINE_LAMBDA { f[j] = t[j] - (scale[j] - P::set1(C::eighths_rounder)); });
  // The last three bits choose the table's entry, which is stored less what they add to the shifted exponent.
  each<J>([&](int j) INLINE_LAMBDA {
    const BitsVector<P> bits = (BitsVector<P>)scale[j];
    scale[j] = (V)(P::eighths(bits) + (bits << (C::mantissa_bits - 3)));
  });
  polynomial<P>(C::exp2_sixteenths, f, m);
  each<J>([&](int j) INLINE_LAMBDA { m[j] = P::fma(m[j], f[j], P::set1(1)); });
}

// In place, 1 / (1 + 2^t): sigmoid(x) for t = -x log2(e).
template <class P, int J>
INLINE void sigmoid(typename P::V (&t)[J]) {
  const typename P::V one = P::set1(1);
  typename P::V scale[J], m[J];
  each<J>([&](int j) INLINE_LAMBDA { t[j] = P::clamp(t[j], Constants<P>::sigmoid_bound); });
  if constexpr (P::has_table) {
    exp2_by_table<P>(t, scale, m);
  } else {
    exp2_parts<P>(t, scale, m);
    each<J>([&](int j) INLINE_LAMBDA { m[j] = m[j] + one; });
  }
  each<J>([&](int j) INLINE_LAMBDA { t[j] = one / P::fma(scale[j], m[j], one); });
}

// In place, (2^t - 1) / (2^t + 1): tanh(x) for t = 2 x log2(e).
template <class P, int J>
INLINE void tanh(typename P::V (&t)[J]) {
  const typename P::V one = P::set1(1), two = P::set1(2);
  typename P::V scale[J], p[J];
  each<J>([&](int j) INLINE_LAMBDA { t[j] = P::clamp(t[j], Constants<P>::tanh_bound); });
  exp2_parts<P>(t, scale, p);
  each<J>([&](int j) INLINE_LAMBDA { t[j] = P::fma(scale[j], p[j], scale[j] - one); });
  each<J>([&](int j) INLINE_LAMBDA { t[j] = t[j] / (t[j] + two); });
}

// In place, exp(x) - 1, or x where that is positive.
template <class P, int J>
INLINE void elu(typename P::V (&x)[J]) {
  const typename P::V one = P::set1(1), zero = P::set1(0);
  typename P::V t[J], scale[J], p[J];
  each<J>([&](int j) INLINE_LAMBDA { t[j] = x[j] * P::set1(Constants<P>::log2e); });
  each<J>([&](int j) INLINE_LAMBDA { t[j] = P::clamp(t[j], Constants<P>::sigmoid_bound); });
  exp2_parts<P>(t, scale, p);
  each<J>([&](int j) INLINE_LAMBDA { p[j] = P::fma(scale[j], p[j], scale[j] - one); });
  each<J>([&](int j) INLINE_LAMBDA { x[j] = x[j] > zero ? x[j] : p[j]; });
}

template <class P>
INLINE typename P::V root(typename P::V x) {
  return P::sqrt(x);
}

// log of a positive x, subnormals included; inf and NaN come back as they are.
template <class P>
INLINE typename P::V logarithm(typename P::V x) {
  using C = Constants<P>;
  using V = typename P::V;
  using B = BitsVector<P>;
  using Bits = typename C::Bits;
  const V up = P::set1((typename P::T)(Bits(1) << C::mantissa_bits));
  const V one = P::set1(1), zero = P::set1(0);
  const auto subnormal = x < P::set1(C::smallest_normal);
  const V normal = subnormal ? x * up : x;
  // mantissa in [0.75, 1.5), so that log is accurate around 1
  constexpr Bits three_quarters = (Bits(C::bias - 1) << C::mantissa_bits) | (Bits(1) << (C::mantissa_bits - 1));
  constexpr Bits lift = Bits(C::bias) << C::mantissa_bits;
  const B biased = ((B)normal - (three_quarters - lift)) >> C::mantissa_bits;  // exponent + bias, never negative
  const V mantissa = (V)((B)normal - (biased << C::mantissa_bits) + lift);
  const V exponent = (V)(biased | (B)up) - (up + P::set1(C::bias)) - (subnormal ? P::set1(C::mantissa_bits) : zero);
  // log(m) = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 0.2
  const V s = (mantissa - one) / (mantissa + one), s2 = s * s;
  V series = P::set1((typename P::T)(2.0 / (2 * C::log_terms + 1)));
#pragma GCC unroll 16
  for (int k = C::log_terms - 1; k >= 1; --k) series = P::fma(series, s2, P::set1((typename P::T)(2.0 / (2 * k + 1))));
  const V log_mantissa = P::fma(series * s2, s, P::fma(exponent, P::set1(C::ln2_low), s + s));
  const V result = P::fma(exponent, P::set1(C::ln2_high), log_mantissa);
  return x <= P::set1(C::largest) ? result : x;
}
