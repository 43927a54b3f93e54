// AVX-512: 32 registers of 16 floats.
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

FASTL2L_TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")

namespace fastl2l::cpu {
namespace avx512 {

struct F32 {
  FASTL2L_VECTOR(float, uint32_t, 64)
  static constexpr int vectors = 2, block_tiles = 2, outer_inputs = 6;
  static constexpr Blocking blocking{2, 10};

  static INLINE V set1(T x) { return _mm512_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE V sqrt(V x) { return _mm512_sqrt_ps(x); }
  // min and max return their second operand when one is NaN
  static INLINE V clamp(V x, T bound) { return _mm512_min_ps(set1(bound), _mm512_max_ps(set1(-bound), x)); }
  static constexpr bool has_table = true;
  // Bits of 2^(j/8) - (j << 20), j the last three bits; see exp2_by_table().
  static INLINE BitsV eighths(BitsV bits) {
    const BitsV table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                         0x3f7744fd, 0x3f7ac0c7, 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                         0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    return (BitsV)_mm512_permutexvar_epi32((__m512i)bits, (__m512i)table);
  }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    const __m128 sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    _mm256_storeu_pd(out, _mm256_loadu_pd(out) + _mm256_cvtps_pd(sums));
  }
};

struct F64 {
  FASTL2L_VECTOR(double, uint64_t, 64)
  static constexpr int vectors = 2, block_tiles = 1, outer_inputs = 6;
  static constexpr Blocking blocking{2, 10};

  static constexpr bool has_table = false;

  static INLINE V set1(T x) { return _mm512_set1_pd(x); }
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static INLINE V sqrt(V x) { return _mm512_sqrt_pd(x); }
  static INLINE V clamp(V x, T bound) { return _mm512_min_pd(set1(bound), _mm512_max_pd(set1(-bound), x)); }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    const __m512d ab = _mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b);
    const __m512d cd = _mm512_unpacklo_pd(c, d) + _mm512_unpackhi_pd(c, d);
    const __m256d ab_half = _mm512_castpd512_pd256(ab) + _mm512_extractf64x4_pd(ab, 1);
    const __m256d cd_half = _mm512_castpd512_pd256(cd) + _mm512_extractf64x4_pd(cd, 1);
    const __m256d sums =
        _mm256_permute2f128_pd(ab_half, cd_half, 0x20) + _mm256_permute2f128_pd(ab_half, cd_half, 0x31);
    _mm256_storeu_pd(out, _mm256_loadu_pd(out) + sums);
  }
};

#include "cpu/isa_body.h"

}  // namespace avx512
}  // namespace fastl2l::cpu

FASTL2L_TARGET_END

namespace fastl2l::cpu {
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}
const InstructionSet kAvx512{"avx512", has_avx512, &avx512::kF32, &avx512::kF64};
}  // namespace fastl2l::cpu

#else

namespace fastl2l::cpu {
const InstructionSet kAvx512{"avx512", [] { return false; }, nullptr, nullptr};
}  // namespace fastl2l::cpu

#endif
