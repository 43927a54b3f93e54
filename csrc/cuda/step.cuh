// One optimizer step over tiles of many parameters, a warp a tile, in one pass over the state: 4 rows of a tile are one
// run of 256 bytes, its state is in registers from the first read to the last write, and the weights are in shared
// memory, ready for tensor cores.
#pragma once

#include "cuda/cell.cuh"

namespace fastl2l::cuda {

constexpr int kStepBlocks = 2;  // on a multiprocessor

template <class S>
struct StepArguments {
  Segments segments;
  WeightPointers<S::kLayers> weights;
  Preprocessing<float> preprocessing;
  int features;
  float grad_scale, update_scale;
};

template <class S>
DEVICE void step_tile(const StepArguments<S>& arguments, const ForwardWeights<S>& weights, int64_t tile,
                      const Lane& lane) {
  const Segment& segment = arguments.segments.of(tile);
  const int64_t tile_in_segment = tile - segment.first_tile, first = tile_in_segment * kTile + 2 * lane.g;
  float* memory = static_cast<float*>(segment.state) + tile_in_segment * (S::kRows * kTile);
  prefetch_state<S>(memory, lane);
  Pair<float> features[S::kFeatures];
  UNROLL for (int i = 0; i < 2; ++i) {
    const bool exists = first + i < segment.numel;
    const float gradient = exists ? element<float>(segment.grad, segment.dtype, first + i) : 0.0f;
    float both[S::kFeatures];
    arguments.preprocessing.features(gradient * arguments.grad_scale, both);
    UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) features[feature][i] = both[feature];
  }
  sync_warp();  // products on tensor cores are the whole warp's, and the last tile's lanes may have parted
  float* part = lanes_part(memory, lane);
  const Pair<float> out = lstm_step<S>(weights, features, lane, part, part);
  Pair<float> update;
  UNROLL for (int i = 0; i < 2; ++i) {
    update[i] = (sum_over_units(out[i]) + weights.out_bias) * arguments.update_scale;
  }
  // All 4 lanes of a coordinate have its update: two of them write one each.
  if (lane.q < 2 && first + lane.q < segment.numel) {
    add_to_element(segment.param, segment.dtype, first + lane.q, lane.q == 0 ? update[0] : update[1]);
  }
}

template <class S>
KERNEL(kThreads, kStepBlocks)
step_kernel(KERNEL_ARGUMENT StepArguments<S> arguments) {
  if (!arguments.segments.wanted()) return;
  auto& weights = *reinterpret_cast<ForwardWeights<S>*>(shared_memory());
  load_forward_weights<S>(arguments.weights, arguments.features, weights);
  sync_block();
  const Lane lane;
  const int64_t stride = (int64_t)block_count() * kWarps;
  for (int64_t tile = (int64_t)block_index() * kWarps + lane.warp; tile < arguments.segments.tiles; tile += stride) {
    step_tile<S>(arguments, weights, tile, lane);
  }
}

}  // namespace fastl2l::cuda
