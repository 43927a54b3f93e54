// From arguments on the host to launches: which kernel, how many blocks, how much memory.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "cuda/step.cuh"

// Rules that have kernels of their own, on tensor cores; all others take those of generic.cuh.
#ifndef FASTL2L_CUDA_SHAPES
#define FASTL2L_CUDA_SHAPES Shape<20, 2>
#endif

namespace fastl2l::cuda {

struct Queue {
  Stream stream;
  int multiprocessors;
  std::function<void*(size_t bytes)> workspace;  // device memory that lives until the caller is done
};

template <class S, class F>
bool with_shape(const Rule& rule, F f) {
  if (rule.hidden != S::kHidden || rule.layers != S::kLayers) return false;
  f(S());
  return true;
}

// Calls f(Shape()) for the shape of the rule; false if it has none.
template <class... Shapes, class F>
bool with_any_shape(const Rule& rule, F f) {
  return (with_shape<Shapes>(rule, f) || ...);
}

template <int Layers>
WeightPointers<Layers> pointers(const std::vector<const float*>& weights) {
  WeightPointers<Layers> result;
  for (int layer = 0; layer < Layers; ++layer) {
    result.layer[layer] = {weights[3 * layer], weights[3 * layer + 1], weights[3 * layer + 2]};
  }
  result.w_out = weights[3 * Layers];
  result.b_out = weights[3 * Layers + 1];
  return result;
}

template <class S>
Error fast_step(const Rule& rule, const std::vector<const float*>& weights, const Segments& segments,
                double grad_scale, const Queue& queue) {
  const StepArguments<S> arguments{segments,
                                   pointers<S::kLayers>(weights),
                                   Preprocessing<float>(rule),
                                   rule.features,
                                   (float)grad_scale,
                                   (float)rule.update_scale};
  constexpr int kBlocksPerMultiprocessor = 2;
  const int64_t blocks = std::min<int64_t>((segments.tiles + kWarps - 1) / kWarps,
                                           (int64_t)queue.multiprocessors * kBlocksPerMultiprocessor);
  return launch(step_kernel<S>, blocks, kThreads, sizeof(ForwardWeights<S>), queue.stream, arguments);
}

// One step of all segments, whose first_tile is filled in here. Returns the device's error.
template <typename T>
Error step(const Rule& rule, const std::vector<const T*>& weights, const std::vector<Segment>& all, double grad_scale,
           const Queue& queue) {
  Error error{};
  for (size_t first = 0; first < all.size() && error == Error{}; first += kMostSegments) {
    Segments segments{};
    for (size_t i = first; i < std::min(all.size(), first + kMostSegments); ++i) {
      if (all[i].numel == 0) continue;
      Segment& segment = segments.at[segments.count++];
      segment = all[i];
      segment.first_tile = segments.tiles;
      segments.tiles += tiles_of(segment.numel);
    }
    if (segments.tiles == 0) continue;
    if constexpr (std::is_same_v<T, float>) {
      const bool fast = with_any_shape<FASTL2L_CUDA_SHAPES>(
          rule, [&](auto shape) { error = fast_step<decltype(shape)>(rule, weights, segments, grad_scale, queue); });
      if (fast) continue;
    }
  }
  return error;
}

}  // namespace fastl2l::cuda
