// Plain code in vectors of 16 bytes: SSE2 on any x86-64, NEON on aarch64, and whatever else the compiler knows.
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastl2l::cpu {
namespace generic {

struct F32 {
  FASTL2L_VECTOR(float, uint32_t, 16)
  static constexpr int vectors = 2, block_tiles = 1, outer_inputs = 2;
  static constexpr Blocking blocking{1, 5};
  static constexpr bool has_table = false;

  static INLINE V set1(T x) { return V{x, x, x, x}; }
#if defined(__aarch64__)
  static INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static INLINE V sqrt(V x) { return vsqrtq_f32(x); }
#else
  static INLINE V fma(V a, V b, V c) { return a * b + c; }
  static INLINE V sqrt(V x) {
    return V{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
  }
#endif
  static INLINE V clamp(V x, T bound) {
    x = x < set1(-bound) ? set1(-bound) : x;  // comparisons with NaN are false
    return x > set1(bound) ? set1(bound) : x;
  }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    out[0] += (a[0] + a[2]) + (a[1] + a[3]);
    out[1] += (b[0] + b[2]) + (b[1] + b[3]);
    out[2] += (c[0] + c[2]) + (c[1] + c[3]);
    out[3] += (d[0] + d[2]) + (d[1] + d[3]);
  }
};

struct F64 {
  FASTL2L_VECTOR(double, uint64_t, 16)
  static constexpr int vectors = 2, block_tiles = 1, outer_inputs = 2;
  static constexpr Blocking blocking{1, 5};
  static constexpr bool has_table = false;

  static INLINE V set1(T x) { return V{x, x}; }
#if defined(__aarch64__)
  static INLINE V fma(V a, V b, V c) { return vfmaq_f64(c, a, b); }
  static INLINE V sqrt(V x) { return vsqrtq_f64(x); }
#else
  static INLINE V fma(V a, V b, V c) { return a * b + c; }
  static INLINE V sqrt(V x) { return V{__builtin_sqrt(x[0]), __builtin_sqrt(x[1])}; }
#endif
  static INLINE V clamp(V x, T bound) {
    x = x < set1(-bound) ? set1(-bound) : x;
    return x > set1(bound) ? set1(bound) : x;
  }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    out[0] += a[0] + a[1];
    out[1] += b[0] + b[1];
    out[2] += c[0] + c[1];
    out[3] += d[0] + d[1];
  }
};

#include "cpu/isa_body.h"

}  // namespace generic

const InstructionSet kGeneric{"generic", [] { return true; }, &generic::kF32, &generic::kF64};
}  // namespace fastl2l::cpu
