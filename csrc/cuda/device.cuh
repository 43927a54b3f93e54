// All that the kernels take from CUDA, under names of ours: tests/portable/cuda_emulator.h has the same names on the
// host, and runs the very same kernels there.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks_per_multiprocessor) __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define KERNEL_ARGUMENT const __grid_constant__
#define UNROLL _Pragma("unroll")
#define ONE_AT_A_TIME _Pragma("unroll 1")

namespace fastl2l::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using TwoFloats = float2;  // read by one instruction
using Error = cudaError_t;
using Stream = cudaStream_t;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }  // that lane's x
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// The block's memory, as many bytes as the launch asked for.
DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

DEVICE float wide(Half x) { return __half2float(x); }
DEVICE float wide(BFloat16 x) { return __bfloat162float(x); }
DEVICE void round_to(float x, Half& y) { y = __float2half_rn(x); }
DEVICE void round_to(float x, BFloat16& y) { y = __float2bfloat16_rn(x); }

DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

// Two numbers rounded to the nearest bfloat16, or to the even one of two, the first in the lower half of the word; NaN
// stays NaN.
DEVICE uint32_t to_two_bfloat16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// To the nearest number of 11 significant bits, which is what tensor cores take; NaN stays NaN.
DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b: a is 16 x 8, b is 8 x 8, d is 16 x 8 in float32. Lane 4 g + q of a warp holds
//   a[g][q], a[g + 8][q], a[g][q + 4], a[g + 8][q + 4],
//   b[q][g], b[q + 4][g],
//   d[g][2 q], d[g][2 q + 1], d[g + 8][2 q], d[g + 8][2 q + 1].
DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x, but nothing that depends on it is computed before and kept in registers meanwhile.
DEVICE int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Brings what is at this address into the second-level cache.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// 2^x with a relative error of at most 2^-22, and 1 / x within one unit in the last place; no subnormal numbers.
DEVICE float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline Error copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

// Runs `kernel` on the stream, and returns CUDA's error.
template <typename... Parameters, typename... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
             Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<(unsigned)blocks, threads, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}

}  // namespace fastl2l::cuda

#else
#include "cuda_emulator.h"
#endif
