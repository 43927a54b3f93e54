// What the files of an instruction set need from the compiler. From FASTL2L_TARGET_BEGIN("avx2,fma") on, functions are
// compiled for these instructions, whatever the command line says; no standard header may come after it.
#pragma once

#define FASTL2L_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define FASTL2L_TARGET_BEGIN(isa) \
  FASTL2L_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTL2L_TARGET_END FASTL2L_PRAGMA(clang attribute pop)
#else
#define FASTL2L_TARGET_BEGIN(isa) FASTL2L_PRAGMA(GCC target(isa))
#define FASTL2L_TARGET_END
#endif

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

// The vector types that compilers know, loads and stores of them at any address, and a quotient (see formulas.h).
#define FASTL2L_VECTOR(scalar, bits, bytes)                                               \
  using T = scalar;                                                                       \
  typedef T V __attribute__((vector_size(bytes)));                                        \
  typedef bits BitsV __attribute__((vector_size(bytes)));                                 \
  static constexpr int lanes = (bytes) / sizeof(T);                                       \
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias)); \
  static INLINE V load(const T* at) { return *(const Unaligned*)at; }                     \
  static INLINE void store(T* at, V x) { *(Unaligned*)at = x; }                           \
  static INLINE V over(V x, T constant, T) { return x / set1(constant); }
