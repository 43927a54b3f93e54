// One optimizer step over tiles of many parameters, a warp a tile, in one pass over the state: 4 rows of a tile are one
// run of 256 bytes, its state is in registers from the first read to the last write, and the weights are in shared
// memory, ready for tensor cores. State is stored as float or BFloat16, and float32 in between: it is rounded where it
// is written, and nothing of the step is computed from a rounded number.
#pragma once

#include "cuda/cell.cuh"

namespace fastl2l::cuda {

constexpr int kStepBlocks = 2;  // on a multiprocessor

template <class S>
struct StepArguments {
  Segments segments;
  WeightPointers<S::kLayers> weights;
  Branches branches;
  Factors<float> factors;
  float grad_scale;
};

template <class S>
struct StepShared {
  ForwardWeights<S> weights;
  double of_parameter;  // what it is multiplied by
  float of_update;
};

template <class S, class Stored>
DEVICE void step_tile(const StepArguments<S>& arguments, const StepShared<S>& shared, int64_t tile, const Lane& lane) {
  const Branches& branches = arguments.branches;
  const Segment& segment = arguments.segments.of(tile);
  const int64_t tile_in_segment = tile - segment.first_tile, first = tile_in_segment * kTile + 2 * lane.g;
  Stored* memory = static_cast<Stored*>(segment.state) + tile_in_segment * ((S::kRows + branches.feature_rows) * kTile);
  prefetch_state<S>(memory, lane);
  Stored* part = lanes_part(memory, lane);
  Pair<float> gradient, features[S::kFeatures], mine = {};
  UNROLL for (int i = 0; i < 2; ++i) {
    const bool exists = first + i < segment.numel;
    gradient[i] = (exists ? element<float>(segment.grad, segment.dtype, first + i) : 0.0f) * arguments.grad_scale;
  }
  const bool has_row = std::is_same_v<Stored, float> && lane.q < branches.feature_rows;  // see check_state_dtype()
  if (has_row) mine = load_unit(part, S::kRows);
  lane_features<S>(branches, gradient, lane, mine, features);
  if (has_row) store_unit(part, S::kRows, mine);
  sync_warp();  // products on tensor cores are the whole warp's, and the last tile's lanes may have parted
  const Pair<float> out = lstm_step<S>(shared.weights, features, lane, part, part);
  const float unit = arguments.factors.unit_of(segment);
  Pair<float> update;
  UNROLL for (int i = 0; i < 2; ++i) {
    const float sum = sum_over_units(out[i]) + shared.weights.out_bias;
    update[i] = (branches.tanh ? fast_tanh(sum) : sum) * shared.of_update * unit;
  }
  // All 4 lanes of a coordinate have its update: two of them write one each.
  if (lane.q < 2 && first + lane.q < segment.numel) {
    add_to_element(segment.param, segment.dtype, first + lane.q, shared.of_parameter,
                   lane.q == 0 ? update[0] : update[1]);
  }
}

template <class S, class Stored>
KERNEL(kThreads, kStepBlocks)
step_kernel(KERNEL_ARGUMENT StepArguments<S> arguments) {
  if (!arguments.segments.wanted()) return;
  auto& shared = *reinterpret_cast<StepShared<S>*>(shared_memory());
  load_forward_weights<S>(arguments.weights, arguments.branches.features, shared.weights);
  if (thread_index() == 0) {
    shared.of_parameter = arguments.factors.of_parameter();
    shared.of_update = arguments.factors.of_update();
  }
  sync_block();
  const Lane lane;
  const int64_t stride = (int64_t)block_count() * kWarps;
  for (int64_t tile = (int64_t)block_index() * kWarps + lane.warp; tile < arguments.segments.tiles; tile += stride) {
    step_tile<S, Stored>(arguments, shared, tile, lane);
  }
}

}  // namespace fastl2l::cuda
