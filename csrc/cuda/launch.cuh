// From arguments on the host to launches: which kernel, how many blocks, how much memory.
#pragma once

#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

#include "cuda/generic.cuh"
#include "cuda/reduce.cuh"
#include "cuda/step.cuh"
#include "cuda/window_backward.cuh"
#include "rule_text.h"

// Sizes of rules that have kernels of their own, on tensor cores; all others take those of generic.cuh.
#ifndef FASTL2L_CUDA_SHAPES
#define FASTL2L_CUDA_SHAPES Shape<20, 2, 0>, Shape<20, 2, 20>
#endif

namespace fastl2l::cuda {

// Weight gradients are summed in at most so many parts: a multiple of 132, of which an H100 or H200 has as many
// multiprocessors, and several for each of those of others, so that none is idle for long.
constexpr int64_t kMostParts = 528;
// Memory that the generic kernels may take, and that sums may take, in bytes; a block of theirs may need more.
constexpr int64_t kMostWorkspace = int64_t(1) << 28;

// What a multiprocessor of compute capability 8.0 has, less what every block takes of it.
constexpr size_t kMostShared = 163 * 1024;

struct Queue {
  Stream stream;
  int multiprocessors;
  std::function<void*(size_t bytes)> workspace;  // device memory that lives until the caller is done
};

template <class S, class F>
bool with_shape(const Rule& rule, F f) {
  if (rule.hidden != S::kHidden || rule.layers != S::kLayers || rule.projected != S::kProjected) return false;
  f(S());
  return true;
}

template <class... S>
struct Shapes {};
using FastShapes = Shapes<FASTL2L_CUDA_SHAPES>;

// Calls f(Shape()) for the shape of the rule; false if it has none, other parts than the fast kernels know, or another
// dtype than float32.
template <typename T, class F, class... S>
bool with_any_shape(const Rule& rule, F f, Shapes<S...>) {
  if constexpr (std::is_same_v<T, float>) {
    return rule.given == 0 && rule.output != Output::kNone && (with_shape<S>(rule, f) || ...);
  } else {
    return false;
  }
}

template <int Layers>
WeightPointers<Layers> pointers(const Rule& rule, const std::vector<const float*>& weights) {
  WeightPointers<Layers> result{};
  if (rule.projected > 0) {
    result.w_in = weights[0];
    result.b_in = weights[1];
  }
  for (int layer = 0; layer < Layers; ++layer) {
    const int first = rule.layer_tensor(layer);
    result.layer[layer] = {weights[first], weights[first + 1], weights[first + 2]};
  }
  result.w_out = weights[rule.layer_tensor(Layers)];
  result.b_out = weights[rule.layer_tensor(Layers) + 1];
  return result;
}

inline Branches branches_of(const Rule& rule) {
  return {part_constants<float>(rule), rule.feature_count(), rule.feature_rows(), rule.output == Output::kTanh};
}

// The weights one after the other, in a workspace.
template <typename T>
Error generic_rule(const Rule& rule, const std::vector<const T*>& weights, const Queue& queue, GenericRule<T>& result) {
  T* to = static_cast<T*>(queue.workspace(weight_count(rule) * sizeof(T)));
  result = {rule, to, part_constants<T>(rule)};
  Error error{};
  auto from = weights.begin();
  each_weight(rule, [&](int, int64_t rows, int64_t columns) {
    if (error == Error{}) error = copy_on_device(to, *from++, rows * columns * sizeof(T), queue.stream);
    to += rows * columns;
  });
  return error;
}

// How many blocks of so many bytes each, at least one, a workspace has room for.
inline int64_t blocks_that_fit(int64_t bytes, int64_t most) {
  return std::clamp<int64_t>(kMostWorkspace / bytes, 1, most);
}

// As many segments as one launch takes, from `first` on; empty ones are left out.
inline Segments collect_segments(const std::vector<Segment>& all, size_t first, bool* finite) {
  Segments segments{};
  segments.finite = finite;
  for (size_t i = first; i < std::min(all.size(), first + kMostSegments); ++i) {
    if (all[i].numel == 0) continue;
    Segment& segment = segments.at[segments.count++];
    segment = all[i];
    segment.first_tile = segments.tiles;
    segments.tiles += tiles_of(segment.numel);
  }
  return segments;
}

// Launches something for all segments, whose first_tile is filled in here. Returns the device's error.
template <class F>
Error each_launch(const std::vector<Segment>& all, bool* finite, F launch_segments) {
  Error error{};
  int64_t tiles = 0;
  for (size_t first = 0; first < all.size() && error == Error{}; first += kMostSegments) {
    Segments segments = collect_segments(all, first, finite);
    segments.tiles_before = tiles;
    tiles += segments.tiles;
    if (segments.tiles > 0) error = launch_segments(segments);
  }
  return error;
}

// Clears the flag if a gradient is not finite; the rest of the segments may be missing. Returns the device's error.
inline Error find_nonfinite(const std::vector<Segment>& all, bool* finite, bool in_float32, const Queue& queue) {
  return each_launch(all, finite, [&](Segments segments) {
    segments.in_float32 = in_float32;
    const int64_t most = (int64_t)queue.multiprocessors * 8;
    const int64_t blocks = std::min((segments.tiles * kTile + kReduceThreads - 1) / kReduceThreads, most);
    return launch(find_nonfinite_kernel, blocks, kReduceThreads, 0, queue.stream, segments);
  });
}

// One step of all segments, whose state is stored as numbers of this type, if all gradients are finite or there is no
// flag to say so; `given` is null for a rule without given rows. Returns the device's error.
template <typename T, typename Stored>
Error step(const Rule& rule, const std::vector<const T*>& weights, const std::vector<Segment>& all,
           const Factors<T>& factors, double grad_scale, const T* given, bool* finite, const Queue& queue) {
  Error error = finite ? find_nonfinite(all, finite, std::is_same_v<T, float>, queue) : Error{};
  if (error != Error{}) return error;
  const auto fast = [&](auto shape) {
    using S = decltype(shape);
    static_assert(kStepBlocks * sizeof(StepShared<S>) <= kMostShared);
    error = each_launch(all, finite, [&](const Segments& segments) {
      const StepArguments<S> arguments{segments, pointers<S::kLayers>(rule, weights), branches_of(rule), factors,
                                       (float)grad_scale};
      const int64_t most = (int64_t)queue.multiprocessors * kStepBlocks;
      const int64_t blocks = std::min((segments.tiles + kWarps - 1) / kWarps, most);
      return launch(step_kernel<S, Stored>, blocks, kThreads, sizeof(StepShared<S>), queue.stream, arguments);
    });
  };
  // It reads two numbers of the state at a time.
  const bool aligned = std::all_of(all.begin(), all.end(), [](const Segment& segment) {
    return reinterpret_cast<uintptr_t>(segment.state) % (2 * sizeof(Stored)) == 0;
  });
  if (aligned && with_any_shape<T>(rule, fast, FastShapes())) return error;

  constexpr int kBlocks = 32;  // a multiprocessor
  GenericStepArguments<T> arguments{{}, {}, factors, (T)grad_scale, given, nullptr};
  error = generic_rule(rule, weights, queue, arguments.rule);
  if (error != Error{}) return error;
  const int64_t bytes = arguments.rows() * kGenericThreads * sizeof(T);  // of a block
  const int64_t most = blocks_that_fit(bytes, (int64_t)queue.multiprocessors * kBlocks);
  arguments.workspace = static_cast<T*>(queue.workspace(most * bytes));
  return each_launch(all, finite, [&](const Segments& segments) {
    arguments.segments = segments;
    const int64_t blocks = std::min((segments.tiles * kTile + kGenericThreads - 1) / kGenericThreads, most);
    return launch(generic_step_kernel<T, Stored>, blocks, kGenericThreads, 0, queue.stream, arguments);
  });
}

// Parts for `numel` coordinates in groups, and memory for their sums.
inline Parts make_parts(const Rule& rule, int64_t numel, int64_t group, const Queue& queue) {
  const int64_t groups = (numel + group - 1) / group, count = weight_count(rule);
  const int64_t parts = std::min(groups, blocks_that_fit(count * sizeof(double), kMostParts));
  return {groups, parts, count, static_cast<double*>(queue.workspace(parts * count * sizeof(double)))};
}

template <class S>
Error fast_window_backward(const Rule& rule, const std::vector<const float*>& weights, const Window<float>& window,
                           const Queue& queue, Parts& parts) {
  static_assert(sizeof(WindowShared<S>) <= kMostShared);
  parts = make_parts(rule, window.numel, kWarps * kTile, queue);
  const int64_t blocks = std::min<int64_t>(parts.parts, queue.multiprocessors);
  const SegmentsOfSteps segments(window.steps);
  WindowArguments<S> arguments{
      window, pointers<S::kLayers>(rule, weights), branches_of(rule), (float)rule.update_scale, segments, parts,
      nullptr};
  const int64_t floats = blocks * kWarps * segments.tiles() * arguments.kept_rows() * kTile;
  arguments.workspace = static_cast<float*>(queue.workspace(floats * sizeof(float)));
  return launch(window_backward_kernel<S>, blocks, kThreads, sizeof(WindowShared<S>), queue.stream, arguments);
}

template <typename T>
Error generic_window_backward(const Rule& rule, const std::vector<const T*>& weights, const Window<T>& window,
                              const Queue& queue, Parts& parts) {
  GenericRule<T> copied;
  const Error error = generic_rule(rule, weights, queue, copied);
  if (error != Error{}) return error;
  parts = make_parts(rule, window.numel, kGenericThreads, queue);
  const GenericWindowLayout layout(rule, window.steps);
  const int64_t bytes = layout.rows() * kGenericThreads * sizeof(T);  // of a block
  const int64_t blocks = blocks_that_fit(bytes, parts.parts);
  const GenericWindowArguments<T> arguments{window, copied, layout, parts,
                                            static_cast<T*>(queue.workspace(blocks * bytes))};
  return launch(generic_window_backward_kernel<T>, blocks, kGenericThreads, 0, queue.stream, arguments);
}

// All gradients of a window of at least one coordinate. Returns the device's error.
template <typename T>
Error window_backward(const Rule& rule, const std::vector<const T*>& weights, const Window<T>& window, T* dweights,
                      const Queue& queue) {
  Error error{};
  Parts parts;
  const bool fast = with_any_shape<T>(
      rule, [&](auto shape) { error = fast_window_backward<decltype(shape)>(rule, weights, window, queue, parts); },
      FastShapes());
  if (!fast) error = generic_window_backward(rule, weights, window, queue, parts);
  if (error != Error{}) return error;
  const int64_t blocks = (parts.count + kReduceWidth - 1) / kReduceWidth;
  return launch(sum_parts_kernel<T>, blocks, kReduceThreads, kReduceThreads * sizeof(double), queue.stream, parts,
                dweights);
}

}  // namespace fastl2l::cuda
