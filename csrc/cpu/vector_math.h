// exp, sigmoid, tanh and log on vectors. Included inside the namespace of an instruction set, which defines the
// precisions F32 and F64: V (a vector of T), lanes, set1, fma, clamp (NaN stays NaN), sum4.
//
// Every operation is the same, lane by lane, on AVX2 and AVX-512 (explicit fused multiply-adds, IEEE division), so the
// two agree to the bit. Polynomials are Chebyshev interpolants of (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2.

template <class P>
struct Constants;

template <>
struct Constants<F32> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr int bias = 127;
  static constexpr float log2e = 1.4426950216293335f;
  static constexpr float ln2_high = 0.6931471824645996f, ln2_low = -1.9046542121259336e-09f;
  static constexpr float rounder = 12582912.0f + bias;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float sigmoid_bound = 87.0f;         // exp(87) is finite
  static constexpr float tanh_bound = 9.02f;            // tanh(9.02) rounds to 1
  static constexpr float smallest_normal = 1.17549435e-38f, largest = 3.40282347e38f;
  static constexpr float exp_tail[] = {1.3926213141530752e-3f, 8.363203145563602e-3f, 4.1666556149721146e-2f,
                                       1.6666576266288757e-1f, 0.5f};
  static constexpr int log_terms = 5;
};

template <>
struct Constants<F64> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr int bias = 1023;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471805599453, ln2_low = 2.3190468138462996e-17;
  static constexpr double rounder = 6755399441055744.0 + bias;  // 1.5 * 2^52
  static constexpr double sigmoid_bound = 708.0;
  static constexpr double tanh_bound = 19.1;
  static constexpr double smallest_normal = 2.2250738585072014e-308, largest = 1.7976931348623157e308;
  static constexpr double exp_tail[] = {2.5100424157005067e-08, 2.7620138719733994e-07,
                                        2.7557268378684192e-06, 2.480152119021773e-05,
                                        0.00019841269863105968, 0.0013888888917281794,
                                        0.008333333333330051,   0.04166666666662399,
                                        0.16666666666666669,    0.5};
  static constexpr int log_terms = 13;
};

template <class P>
using BitsVector = typename P::BitsV;

// exp(x) = scale * (1 + p). Keeping p, not 1 + p, keeps exp(x) - 1 accurate near 0. |x| within the bounds above.
template <class P>
INLINE void exp_parts(typename P::V x, typename P::V& scale, typename P::V& p) {
  using C = Constants<P>;
  using V = typename P::V;
  const V rounder = P::set1(C::rounder);
  const V shifted = P::fma(x, P::set1(C::log2e), rounder);
  const V n = shifted - rounder;
  scale = (V)((BitsVector<P>)shifted << C::mantissa_bits);  // 2^n: the bias is part of the rounder
  V r = P::fma(n, P::set1(-C::ln2_high), x);
  r = P::fma(n, P::set1(-C::ln2_low), r);
  V tail = P::set1(C::exp_tail[0]);
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(C::exp_tail) / sizeof(C::exp_tail[0]); ++i) {
    tail = P::fma(tail, r, P::set1(C::exp_tail[i]));
  }
  p = P::fma(r * r, tail, r);
}

template <class P>
INLINE typename P::V sigmoid(typename P::V x) {
  typename P::V scale, p;
  const typename P::V one = P::set1(1);
  exp_parts<P>(-P::clamp(x, Constants<P>::sigmoid_bound), scale, p);
  return one / P::fma(scale, p, scale + one);
}

template <class P>
INLINE typename P::V tanh(typename P::V x) {
  typename P::V scale, p;
  x = P::clamp(x, Constants<P>::tanh_bound);
  exp_parts<P>(x + x, scale, p);
  const typename P::V expm1 = P::fma(scale, p, scale - P::set1(1));
  return expm1 / (expm1 + P::set1(2));
}

// log of a positive x, subnormals included; inf and NaN come back as they are.
template <class P>
INLINE typename P::V log(typename P::V x) {
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
