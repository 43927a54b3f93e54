// Functions of single numbers, and numbers in memory of any dtype.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/device.cuh"
#include "rule.h"

namespace fastl2l::cuda {

// 1 / (1 + 2^t): sigmoid(x) for t = -x log2(e).
DEVICE float sigmoid_of_power(float t) { return approximate_reciprocal(1.0f + approximate_exp2(t)); }

// (2^t - 1) / (2^t + 1): tanh(x) for t = 2 x log2(e). Close to 0 powers of 2 cancel, so there it is a polynomial, whose
// relative error is 4e-8.
DEVICE float tanh_of_power(float t) {
  constexpr float bound = 1.5869f;  // |x| < 0.55
  const float magnitude = fabsf(t), t2 = t * t;
  const float large = copysignf(fmaf(-2.0f, approximate_reciprocal(1.0f + approximate_exp2(magnitude)), 1.0f), t);
  float series = 1.1769502e-06f;
  series = fmaf(series, t2, -3.1583903e-05f);
  series = fmaf(series, t2, 6.6595507e-04f);
  series = fmaf(series, t2, -1.3875803e-02f);
  const float small = fmaf(series * t2, t, 0.34657359f * t);
  return magnitude < bound ? small : large;  // NaN takes the way of the large, on which it stays NaN
}

// The double precision and the sizes without a kernel of their own take these.
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// exp(x) - 1, or x where that is positive.
DEVICE float elu(float x) { return x > 0 ? x : expm1f(x); }
DEVICE double elu(double x) { return x > 0 ? x : expm1(x); }

// What formulas.h asks of numbers.
template <typename Number>
struct Scalar {
  using T = Number;
  using V = Number;

  DEVICE static V set1(T x) { return x; }
  DEVICE static V fma(V a, V b, V c) { return fused(a, b, c); }
  DEVICE static V over(V x, T, T inverse) { return x * inverse; }  // takes fewer registers than a division
};

template <class P>
DEVICE typename P::V logarithm(typename P::V x) {
  if constexpr (std::is_same_v<typename P::T, float>) {
    return logf(x);
  } else {
    return log(x);
  }
}
template <class P>
DEVICE typename P::V root(typename P::V x) {
  if constexpr (std::is_same_v<typename P::T, float>) {
    return sqrtf(x);
  } else {
    return sqrt(x);
  }
}

#define FORMULA DEVICE
#include "formulas.h"
#undef FORMULA

// Numbers as they are stored, and as they are computed with.
DEVICE float wide(float x) { return x; }
DEVICE double wide(double x) { return x; }
DEVICE void round_to(float x, float& y) { y = x; }
DEVICE void round_to(double x, double& y) { y = x; }

enum class Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <typename T>
DEVICE T element(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat32: return (T) static_cast<const float*>(data)[i];
    case Dtype::kFloat64: return (T) static_cast<const double*>(data)[i];
    case Dtype::kFloat16: return (T)wide(static_cast<const Half*>(data)[i]);
    default: return (T)wide(static_cast<const BFloat16*>(data)[i]);
  }
}

// Multiplies an element by `kept` and adds x, in the wider of both dtypes; 1 changes no bit.
template <typename T>
DEVICE void add_to_element(void* data, Dtype dtype, int64_t i, double kept, T x) {
  const auto add = [&](auto* at) {
    using Stored = std::remove_pointer_t<decltype(at)>;
    if constexpr (std::is_arithmetic_v<Stored>) {
      using Wide = std::common_type_t<Stored, T>;
      at[i] = (Stored)((Wide)kept * (Wide)at[i] + (Wide)x);
    } else {
      round_to((float)((T)kept * (T)wide(at[i]) + x), at[i]);
    }
  };
  switch (dtype) {
    case Dtype::kFloat32: return add(static_cast<float*>(data));
    case Dtype::kFloat64: return add(static_cast<double*>(data));
    case Dtype::kFloat16: return add(static_cast<Half*>(data));
    default: return add(static_cast<BFloat16*>(data));
  }
}

}  // namespace fastl2l::cuda
