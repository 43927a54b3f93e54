// AVX2 with FMA: 16 registers of 8 floats.
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

FASTL2L_TARGET_BEGIN("avx2,fma")

namespace fastl2l::cpu {
namespace avx2 {

struct F32 {
  FASTL2L_VECTOR(float, uint32_t, 32)
  static constexpr int vectors = 2, block_tiles = 1, outer_inputs = 2;
  static constexpr Blocking blocking{1, 5};

  static INLINE V set1(T x) { return _mm256_set1_ps(x); }
  static INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE V sqrt(V x) { return _mm256_sqrt_ps(x); }
  // min and max return their second operand when one is NaN
  static INLINE V clamp(V x, T bound) { return _mm256_min_ps(set1(bound), _mm256_max_ps(set1(-bound), x)); }
  static constexpr bool has_table = true;
  // Bits of 2^(j/8) - (j << 20), j the last three bits; see exp2_by_table().
  static INLINE BitsV eighths(BitsV bits) {
    const BitsV table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                         0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    return (BitsV)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits);
  }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const __m256 abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
    const __m128 sums = _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
    _mm256_storeu_pd(out, _mm256_loadu_pd(out) + _mm256_cvtps_pd(sums));
  }
};

struct F64 {
  FASTL2L_VECTOR(double, uint64_t, 32)
  static constexpr int vectors = 2, block_tiles = 1, outer_inputs = 2;
  static constexpr Blocking blocking{1, 5};

  static constexpr bool has_table = false;

  static INLINE V set1(T x) { return _mm256_set1_pd(x); }
  static INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static INLINE V sqrt(V x) { return _mm256_sqrt_pd(x); }
  static INLINE V clamp(V x, T bound) { return _mm256_min_pd(set1(bound), _mm256_max_pd(set1(-bound), x)); }
  static INLINE void add_sums(V a, V b, V c, V d, double* out) {
    const __m256d ab = _mm256_unpacklo_pd(a, b) + _mm256_unpackhi_pd(a, b);
    const __m256d cd = _mm256_unpacklo_pd(c, d) + _mm256_unpackhi_pd(c, d);
    const __m256d sums = _mm256_permute2f128_pd(ab, cd, 0x20) + _mm256_permute2f128_pd(ab, cd, 0x31);
    _mm256_storeu_pd(out, _mm256_loadu_pd(out) + sums);
  }
};

#include "cpu/isa_body.h"

}  // namespace avx2
}  // namespace fastl2l::cpu

FASTL2L_TARGET_END

namespace fastl2l::cpu {
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
const InstructionSet kAvx2{"avx2", has_avx2, &avx2::kF32, &avx2::kF64};
}  // namespace fastl2l::cpu

#else

namespace fastl2l::cpu {
const InstructionSet kAvx2{"avx2", [] { return false; }, nullptr, nullptr};
}  // namespace fastl2l::cpu

#endif
