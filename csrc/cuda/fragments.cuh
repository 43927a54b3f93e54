// How the LSTM of a warp's 16 coordinates is laid out for tensor cores, so that no number ever changes threads.
//
// A lane is 4 g + q, with g < 8 and q < 4. Rows of every matrix product are coordinates: rows g and g + 8 of a fragment
// are the coordinates 2 g and 2 g + 1 of the tile, so a lane reads neighbours. Columns of products and of their left
// factors are units, in groups of 4: lane (g, q) holds unit 4 u + q of every group u, of its two coordinates, for the
// left factor (columns q and q + 4 of an 8 x 8 step are two groups) as well as for the result (columns 2 q and 2 q + 1:
// the gates i and f of one unit, or g and o, or two groups). What one product gives, the next one takes as it is.
//
// Numbers are split into a big and a small part of 11 bits each (3xTF32): a b = a_small b_big + a_big b_small +
// a_big b_big, and what is left out is 2^-22 of the product. Tensor cores do not round their sums, they cut them off,
// which over many steps of a window adds up; so every step's product of the big parts is added to the sum in float32,
// with rounding. The small parts have a sum of their own, where it does not matter.
#pragma once

#include <type_traits>

#include "cuda/arguments.h"
#include "cuda/device.cuh"

namespace fastl2l::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;

struct Split {
  uint32_t big, small;
};

DEVICE Split split(float x) {
  const uint32_t big = to_tf32(x);
  return {big, to_tf32(x - from_bits(big))};
}

// Both numbers that a lane holds of an 8 x 8 right factor: rows q and q + 4, column g.
struct alignas(16) RightFragment {
  uint32_t big[2], small[2];
};

DEVICE RightFragment right_fragment(const Split& one, const Split& other) {
  return {{one.big, other.big}, {one.small, other.small}};
}

// The same in half the memory, for what has to be split whenever it is read.
struct alignas(8) WholeFragment {
  float of[2];
};

DEVICE const RightFragment& split(const RightFragment& fragment) { return fragment; }
DEVICE RightFragment split(const WholeFragment& whole) {
  return right_fragment(split(whole.of[0]), split(whole.of[1]));
}

// A lane's part of one group: its unit's number for each of its two coordinates.
template <typename T>
struct Pair {
  T of[2];

  DEVICE T& operator[](int i) { return of[i]; }
  DEVICE const T& operator[](int i) const { return of[i]; }
};

DEVICE Pair<Split> split(const Pair<float>& x) { return {{split(x[0]), split(x[1])}}; }

// sum += (16 x 8) (8 x 8), over `Steps` steps; the left factor is 2 groups a step, and right factors lie `stride`
// apart.
template <int Steps, int Groups, class Fragment>
DEVICE void multiply(const Pair<Split> (&left)[Groups], const Fragment* right, int stride, float (&sum)[4]) {
  static_assert(2 * Steps <= Groups);
  float small[4] = {0, 0, 0, 0};
  UNROLL for (int step = 0; step < Steps; ++step) {
    const RightFragment b = split(right[step * stride]);
    const Pair<Split>&x = left[2 * step], &y = left[2 * step + 1];
    const uint32_t a_big[4] = {x[0].big, x[1].big, y[0].big, y[1].big};
    const uint32_t a_small[4] = {x[0].small, x[1].small, y[0].small, y[1].small};
    float big[4] = {0, 0, 0, 0};
    multiply_add_tf32(big, a_big, b.big);
    multiply_add_tf32(small, a_small, b.big);
    multiply_add_tf32(small, a_big, b.small);
    UNROLL for (int i = 0; i < 4; ++i) sum[i] += big[i];
  }
  UNROLL for (int i = 0; i < 4; ++i) sum[i] += small[i];
}

// Sizes of a rule that has kernels of its own, and where its weights lie in shared memory. Which features and which
// output it has are branches that all threads take alike.
template <int HiddenUnits, int LayerCount, int ProjectedUnits>
struct Shape {
  static constexpr int kHidden = HiddenUnits, kLayers = LayerCount, kProjected = ProjectedUnits;
  static constexpr bool kProjects = kProjected > 0;
  static constexpr int kGroups = kHidden / 4;
  static constexpr int kRows = 2 * kLayers * kHidden;  // of the LSTM's state
  static constexpr int kGates = 4 * kHidden;
  static constexpr int kFeatures = 2;  // of log_sign and adam; those of raw end with a 0
  static_assert(kHidden % 4 == 0 && kProjected % 4 == 0);

  // Forward: the left factor is a layer's input, unless that is the features, and its h. Features do not go through
  // tensor cores, be it to the gates or to a projection: they may be infinite, which cannot be split.
  FASTL2L_HOST_DEVICE static constexpr int input_groups(int layer) { return layer == 0 ? kProjected / 4 : kGroups; }
  FASTL2L_HOST_DEVICE static constexpr int forward_steps(int layer) { return (input_groups(layer) + kGroups + 1) / 2; }
  static constexpr int kForwardColumns = 2 * kGroups;  // products of 8 columns: gates i and f, or g and o, of a group
  FASTL2L_HOST_DEVICE static constexpr int forward_start(int layer) {
    return layer == 0 ? 0 : forward_start(layer - 1) + forward_steps(layer - 1) * kForwardColumns;
  }
  static constexpr int kForwardFragments = forward_start(kLayers);

  // Backward: the left factor is the gradients of the gates, two of a group a step; the result is h, and before it the
  // input, or after it the features.
  static constexpr int kBackwardSteps = 2 * kGroups;
  FASTL2L_HOST_DEVICE static constexpr bool reads_features(int layer) { return layer == 0 && !kProjects; }
  FASTL2L_HOST_DEVICE static constexpr int result_groups(int layer) {
    return reads_features(layer) ? kGroups + 1 : input_groups(layer) + kGroups;
  }
  FASTL2L_HOST_DEVICE static constexpr int backward_columns(int layer) { return (result_groups(layer) + 1) / 2; }
  FASTL2L_HOST_DEVICE static constexpr int backward_start(int layer) {
    return layer == 0 ? 0 : backward_start(layer - 1) + backward_columns(layer - 1) * kBackwardSteps;
  }
  static constexpr int kBackwardFragments = backward_start(kLayers);

  // Weight gradients: the left factor is the gradients of the gates, 16 rows of weights at a time; the right factor is
  // what they are multiplied with, 8 columns at a time: the features and a 1 for the bias, the input, and h.
  static constexpr int kGradientRows = kGates / 16;
  FASTL2L_HOST_DEVICE static constexpr int gradient_columns(int layer) {
    return (1 + input_groups(layer) + kGroups + 1) / 2;
  }
  FASTL2L_HOST_DEVICE static constexpr int gradient_products(int layer) {
    return kGradientRows * gradient_columns(layer);
  }
  static constexpr int kMostGradientColumns = gradient_columns(0) > gradient_columns(kLayers - 1)
                                                  ? gradient_columns(0)
                                                  : gradient_columns(kLayers - 1);

  // Where the weights begin and end in the order of ops/schema.py.
  FASTL2L_HOST_DEVICE static constexpr int inputs(int layer, int features) {
    return reads_features(layer) ? features : 4 * input_groups(layer);
  }
  FASTL2L_HOST_DEVICE static constexpr int weights_before(int layer, int features) {
    const int projection = kProjected * (features + 1), first = kGates * (inputs(0, features) + kHidden + 1);
    return projection + (layer == 0 ? 0 : first + (layer - 1) * kGates * (2 * kHidden + 1));
  }
};

// What the gates' sums of one unit begin with, gates in the order i, f, g, o.
struct alignas(16) FourGates {
  float of[4];
};

// A unit of the projection.
struct alignas(16) ProjectedUnit {
  float bias, feature[2];
};

template <class S>
struct ForwardWeights {
  RightFragment fragment[S::kForwardFragments][kWarp];
  FourGates bias[S::kLayers][S::kHidden];
  FourGates feature[S::kFeatures][S::kHidden];  // without a projection
  ProjectedUnit projection[S::kProjects ? S::kProjected : 1];
  float out[S::kHidden];
  float out_bias;
};

template <class S>
struct BackwardWeights {
  // With a projection there is no room for more.
  using Fragment = std::conditional_t<S::kProjects, WholeFragment, RightFragment>;
  Fragment fragment[S::kBackwardFragments][kWarp];
};

DEVICE void put_fragment(float one, float other, RightFragment& to) { to = right_fragment(split(one), split(other)); }
DEVICE void put_fragment(float one, float other, WholeFragment& to) { to = {{one, other}}; }

DEVICE float gate_factor(int gate) { return (float)(gate == 2 ? 2 * kLog2E : -kLog2E); }

// A weight times the factor of its gate, with more bits than a float has: both parts of it are there anyway.
DEVICE Split split_product(float weight, int gate) {
  const float factor = gate_factor(gate), rest = (float)((gate == 2 ? 2 * kLog2E : -kLog2E) - (double)factor);
  const float product = weight * factor, low = fmaf(weight, rest, fmaf(weight, factor, -product));
  const uint32_t big = to_tf32(product);
  return {big, to_tf32(product - from_bits(big) + low)};
}

// All threads of a block put the weights where multiply() wants them.
template <class S>
DEVICE void load_forward_weights(const WeightPointers<S::kLayers>& from, int features, ForwardWeights<S>& to) {
  constexpr int H = S::kHidden;
  UNROLL for (int layer = 0; layer < S::kLayers; ++layer) {
    const auto& weights = from.layer[layer];
    const int fragments = S::forward_steps(layer) * S::kForwardColumns;
    for (int i = thread_index(); i < fragments * kWarp; i += kThreads) {
      const int lane = i % kWarp, g = lane / 4, q = lane % 4, column = i / kWarp % S::kForwardColumns;
      const int step = i / kWarp / S::kForwardColumns;
      const int gate = 2 * (column % 2) + g % 2, row = gate * H + 4 * (column / 2) + g / 2;
      const auto weight = [&](int group) {
        const int inputs = 4 * S::input_groups(layer), unit = 4 * group + q - inputs;
        if (unit >= H) return Split{};
        return split_product(unit < 0 ? weights.w_ih[row * inputs + unit + inputs] : weights.w_hh[row * H + unit],
                             gate);
      };
      to.fragment[S::forward_start(layer) + i / kWarp][lane] = right_fragment(weight(2 * step), weight(2 * step + 1));
    }
    for (int row = thread_index(); row < S::kGates; row += kThreads) {
      const int gate = row / H, unit = row % H;
      to.bias[layer][unit].of[gate] = gate_factor(gate) * weights.bias[row];
      if (!S::reads_features(layer)) continue;
      for (int feature = 0; feature < S::kFeatures; ++feature) {
        to.feature[feature][unit].of[gate] =
            feature < features ? gate_factor(gate) * weights.w_ih[row * features + feature] : 0.0f;
      }
    }
  }
  for (int unit = thread_index(); unit < S::kProjected; unit += kThreads) {
    const float* weights = from.w_in + unit * features;
    to.projection[unit] = {from.b_in[unit], {weights[0], features > 1 ? weights[1] : 0.0f}};
  }
  for (int unit = thread_index(); unit < H; unit += kThreads) to.out[unit] = from.w_out[unit];
  if (thread_index() == 0) to.out_bias = *from.b_out;
}

template <class S>
DEVICE void load_backward_weights(const WeightPointers<S::kLayers>& from, int features, BackwardWeights<S>& to) {
  constexpr int H = S::kHidden;
  UNROLL for (int layer = 0; layer < S::kLayers; ++layer) {
    const auto& weights = from.layer[layer];
    const int fragments = S::backward_columns(layer) * S::kBackwardSteps;
    for (int i = thread_index(); i < fragments * kWarp; i += kThreads) {
      const int lane = i % kWarp, g = lane / 4, q = lane % 4, step = i / kWarp % S::kBackwardSteps;
      const int group = 2 * (i / kWarp / S::kBackwardSteps) + g % 2, place = g / 2;
      const auto weight = [&](int gate) {
        const int row = gate * H + 4 * (step / 2) + q, inputs = 4 * S::input_groups(layer);
        const int unit = 4 * group + place - inputs;  // of h
        if (unit < 0) return weights.w_ih[row * inputs + unit + inputs];
        if (unit < H) return weights.w_hh[row * H + unit];
        return S::reads_features(layer) && unit - H < features ? weights.w_ih[row * features + unit - H] : 0.0f;
      };
      const int gate = 2 * (step % 2);
      put_fragment(weight(gate), weight(gate + 1), to.fragment[S::backward_start(layer) + i / kWarp][lane]);
    }
  }
}

}  // namespace fastl2l::cuda
