// What is left to do over all blocks: the parts of the weight gradients, and whether all numbers are finite.
#pragma once

#include "cuda/arguments.h"
#include "cuda/device.cuh"

namespace fastl2l::cuda {

constexpr int kReduceThreads = 256;
constexpr int kSlices = 8;  // of the parts, added up side by side and then in order
constexpr int kReduceWidth = kReduceThreads / kSlices;

template <typename T>
KERNEL(kReduceThreads, 1)
sum_parts_kernel(KERNEL_ARGUMENT Parts parts, T* dweights) {
  auto& sums = *reinterpret_cast<double (*)[kSlices][kReduceWidth]>(shared_memory());
  const int slice = thread_index() / kReduceWidth, place = thread_index() % kReduceWidth;
  const int64_t weight = (int64_t)block_index() * kReduceWidth + place;
  double sum = 0;
  if (weight < parts.count) {
    for (int64_t part = slice; part < parts.parts; part += kSlices) sum += parts.sums[part * parts.count + weight];
  }
  sums[slice][place] = sum;
  sync_block();
  if (slice > 0 || weight >= parts.count) return;
  for (int other = 1; other < kSlices; ++other) sum += sums[other][place];
  dweights[weight] = (T)sum;
}

// Clears the segments' flag if a gradient is not finite: x - x is 0 for finite x alone. All who write, write the same.
KERNEL(kReduceThreads, 1)
find_nonfinite_kernel(KERNEL_ARGUMENT Segments segments) {
  const int64_t stride = (int64_t)block_count() * kReduceThreads, end = segments.tiles * kTile;
  bool found = false;
  for (int64_t i = (int64_t)block_index() * kReduceThreads + thread_index(); i < end; i += stride) {
    const Segment& segment = segments.of(i / kTile);
    const int64_t coordinate = i - segment.first_tile * kTile;
    if (coordinate >= segment.numel) continue;
    double x = element<double>(segment.grad, segment.dtype, coordinate);
    if (segments.in_float32) x = (float)x;
    found |= !(x - x == 0);
  }
  if (found) *segments.finite = false;
}

}  // namespace fastl2l::cuda
