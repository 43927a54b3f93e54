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
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// A rule's constants in its dtype.
template <typename T>
struct Preprocessing {
  bool log_sign;
  T constant, inverse, threshold, slope;  // a product with the inverse takes fewer registers than a division

  Preprocessing() = default;
  explicit Preprocessing(const Rule& rule)
      : log_sign(rule.log_sign),
        constant((T)rule.constant),
        inverse((T)(1 / rule.constant)),
        threshold((T)rule.log_sign_threshold),
        slope((T)rule.log_sign_slope) {}

  // The features of gradient g, of which raw has one; reference.py says what they are.
  DEVICE void features(T g, T (&to)[2]) const {
    if (!log_sign) {
      to[0] = constant * g;
      to[1] = 0;
      return;
    }
    const T magnitude = fabs(g);
    const bool large = magnitude >= threshold;
    to[0] = large ? logarithm(magnitude) * inverse : (g == g ? T(-1) : g);
    to[1] = large ? (g < 0 ? T(-1) : T(1)) : g * slope;
  }

  // d gradient from d features.
  DEVICE T backward(T g, const T (&dfeatures)[2]) const {
    if (!log_sign) return constant * dfeatures[0];
    return fabs(g) >= threshold ? dfeatures[0] / (constant * g) : dfeatures[1] * slope;
  }
};

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

template <typename T>
DEVICE void add_to_element(void* data, Dtype dtype, int64_t i, T x) {
  const auto add = [&](auto* at) {
    if constexpr (std::is_arithmetic_v<std::remove_pointer_t<decltype(at)>>) {
      at[i] = (std::remove_pointer_t<decltype(at)>)(at[i] + x);  // in the wider of both
    } else {
      round_to((float)(wide(at[i]) + x), at[i]);
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
