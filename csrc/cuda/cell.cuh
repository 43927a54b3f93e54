// The LSTM of one warp's 16 coordinates on tensor cores.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/numbers.cuh"

namespace fastl2l::cuda {

struct Lane {
  int g, q, index, warp;

  DEVICE Lane()
      : g(thread_index() % kWarp / 4),
        q(thread_index() % 4),
        index(thread_index() % kWarp),
        warp(thread_index() / kWarp) {}
};

// The lane's two coordinates of the first unit; whatever else it has of the tile lies at fixed distances from there.
template <class T>
DEVICE T* lanes_part(T* tile, const Lane& lane) {
  return tile + lane.q * kTile + 2 * lane.g;
}

// A lane's unit of one group. A warp reads or writes 4 rows at a time, which are one run of 256 bytes; in bfloat16,
// where both numbers are one word, of 128.
DEVICE Pair<float> load_unit(const float* part, int row) {
  const TwoFloats two = *reinterpret_cast<const TwoFloats*>(part + row * kTile);
  return {{two.x, two.y}};
}
DEVICE Pair<float> load_unit(const BFloat16* part, int row) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(part + row * kTile);
  return {{from_bits(word << 16), from_bits(word & 0xffff0000u)}};
}
DEVICE void store_unit(float* part, int row, const Pair<float>& unit) {
  *reinterpret_cast<TwoFloats*>(part + row * kTile) = TwoFloats{unit[0], unit[1]};
}
DEVICE void store_unit(BFloat16* part, int row, const Pair<float>& unit) {
  *reinterpret_cast<uint32_t*>(part + row * kTile) = to_two_bfloat16(unit[0], unit[1]);
}

template <class S>
FASTL2L_HOST_DEVICE constexpr int h_row(int layer) {
  return 2 * layer * S::kHidden;
}
template <class S>
FASTL2L_HOST_DEVICE constexpr int c_row(int layer) {
  return h_row<S>(layer) + S::kHidden;
}

// A lane's units of one layer's h.
template <class S>
struct Hidden {
  Pair<float> of[S::kGroups];
};

// What the kernels are told of a rule beside its sizes and weights; all threads take the same branches.
struct Branches {
  PartConstants<float> constants;
  int features, feature_rows;
  bool tanh;  // of the output
};

// The features' own state is a group more: lane (g, q) has row q of it, and asks the lanes beside it for the others.
DEVICE Means<Scalar<float>> gather_means(const Branches& branches, float mine, const Lane& lane) {
  const auto row = [&](int q) { return shuffle(mine, 4 * lane.g + q); };
  const float m = row(0), v = row(1), age = row(2);
  return {m, v, age, branches.constants.one_age ? age : row(3)};
}
DEVICE float own_row(const Means<Scalar<float>>& means, const Lane& lane) {
  return lane.q < 2 ? (lane.q == 0 ? means.m : means.v) : (lane.q == 2 ? means.age1 : means.age2);
}

// The features of a lane's two coordinates; its row of their state is brought up to date.
template <class S>
DEVICE void lane_features(const Branches& branches, const Pair<float>& gradient, const Lane& lane, Pair<float>& mine,
                          Pair<float> (&to)[S::kFeatures]) {
  UNROLL for (int i = 0; i < 2; ++i) {
    Means<Scalar<float>> means{};
    if (branches.feature_rows > 0) means = gather_means(branches, mine[i], lane);
    float both[S::kFeatures];
    features(branches.constants, gradient[i], means, both);
    UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) to[feature][i] = both[feature];
    mine[i] = own_row(means, lane);
  }
}

// A lane's unit of one group of the projection. Not on tensor cores: features may be infinite.
template <class S>
DEVICE Pair<float> project(const ForwardWeights<S>& weights, const Pair<float> (&features)[S::kFeatures], int group,
                           const Lane& lane) {
  const ProjectedUnit unit = weights.projection[4 * group + lane.q];
  Pair<float> result;
  UNROLL for (int i = 0; i < 2; ++i) {
    result[i] = elu(fmaf(unit.feature[1], features[1][i], fmaf(unit.feature[0], features[0][i], unit.bias)));
  }
  return result;
}

// What tensor cores take for a layer's gates: its input, unless that is the features, and its h before the step. The
// input is what is projected of the features, or h of the layer below after the step; below(u) is its group u.
template <class S, int Layer>
struct LayerInput {
  Pair<Split> of[2 * S::forward_steps(Layer)];

  template <class Stored, class Below>
  DEVICE LayerInput(const Stored* before, Below below) {
    UNROLL for (int u = 0; u < S::input_groups(Layer); ++u) of[u] = split(below(u));
    UNROLL for (int u = 0; u < S::kGroups; ++u) {
      of[S::input_groups(Layer) + u] = split(load_unit(before, h_row<S>(Layer) + 4 * u));
    }
    // An odd number of groups ends with one of zeros.
    if ((S::input_groups(Layer) + S::kGroups) % 2) of[2 * S::forward_steps(Layer) - 1] = {};
  }
};

struct Gates {
  float i, f, g, o;
};

// The gates of one group's unit, of both coordinates. `Layer` is a constant, as products need their number of steps.
template <class S, int Layer>
DEVICE Pair<Gates> group_gates(const ForwardWeights<S>& weights, const LayerInput<S, Layer>& input,
                               const Pair<float> (&features)[S::kFeatures], int group, const Lane& lane) {
  const int unit = 4 * group + lane.q;
  float sums[2][4] = {};  // by product: gates i and f, or g and o, of the first coordinate, then of the second
  UNROLL for (int half = 0; half < 2; ++half) {
    const RightFragment* right = &weights.fragment[S::forward_start(Layer) + 2 * group + half][lane.index];
    multiply<S::forward_steps(Layer)>(input.of, right, S::kForwardColumns * kWarp, sums[half]);
  }
  const auto add = [&](const FourGates& weight, const Pair<float>& x) {
    UNROLL for (int half = 0; half < 2; ++half) {
      UNROLL for (int i = 0; i < 4; ++i) { sums[half][i] = fmaf(weight.of[2 * half + i % 2], x[i / 2], sums[half][i]); }
    }
  };
  add(weights.bias[Layer][unit], {{1, 1}});
  if (S::reads_features(Layer)) {
    UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) {
      add(weights.feature[feature][unit], features[feature]);
    }
  }
  Pair<Gates> gates;
  UNROLL for (int i = 0; i < 2; ++i) {
    gates[i] = {sigmoid_of_power(sums[0][2 * i]), sigmoid_of_power(sums[0][2 * i + 1]), tanh_of_power(sums[1][2 * i]),
                sigmoid_of_power(sums[1][2 * i + 1])};
  }
  return gates;
}

DEVICE float fast_tanh(float x) { return tanh_of_power(x * (float)(2 * kLog2E)); }

// Brings a tile's state closer, before the gradients are read and their features computed.
template <class S, class Stored>
DEVICE void prefetch_state(const Stored* tile, const Lane& lane) {
  constexpr int line = 128 / sizeof(Stored);
  for (int i = lane.index * line; i < S::kRows * kTile; i += kWarp * line) prefetch(tile + i);
}

// One step of layers Layer, Layer + 1, ...: the state that lies at `before` is read, and written at `after`, which may
// be the same place; `below` is the new h of the layer below, as it was before it was rounded to be stored. Returns the
// lane's part of w_out . h. A lane reads no number that another has written, and groups take turns: together they would
// need more registers than there are.
template <class S, int Layer = 0, class Stored>
DEVICE Pair<float> lstm_step(const ForwardWeights<S>& weights, const Pair<float> (&features)[S::kFeatures],
                             const Lane& lane, const Stored* before, Stored* after, const Hidden<S>& below = {}) {
  const LayerInput<S, Layer> input(before, [&](int u) {
    if constexpr (Layer == 0) {
      return project<S>(weights, features, u, lane);
    } else if constexpr (std::is_same_v<Stored, float>) {
      return load_unit(after, h_row<S>(Layer - 1) + 4 * u);  // not rounded, and in no register meanwhile
    } else {
      return below.of[u];
    }
  });
  Pair<float> out = {};
  Hidden<S> all;
  ONE_AT_A_TIME for (int u = 0; u < S::kGroups; ++u) {
    Pair<float> c = load_unit(before, c_row<S>(Layer) + 4 * u), h;
    const Pair<Gates> gates = group_gates<S, Layer>(weights, input, features, u, lane);
    UNROLL for (int i = 0; i < 2; ++i) {
      c[i] = cell<Scalar<float>>(gates[i].i, gates[i].f, gates[i].g, c[i]);
      h[i] = gates[i].o * fast_tanh(c[i]);
      out[i] = fmaf(weights.out[4 * u + lane.q], h[i], out[i]);
    }
    store_unit(after, c_row<S>(Layer) + 4 * u, c);
    store_unit(after, h_row<S>(Layer) + 4 * u, h);
    // Registers cannot be indexed by u: a new unit comes in at the end, and in the end all are in their places.
    UNROLL for (int k = 0; k + 1 < S::kGroups; ++k) all.of[k] = all.of[k + 1];
    all.of[S::kGroups - 1] = h;
  }
  if constexpr (Layer + 1 < S::kLayers) {
    return lstm_step<S, Layer + 1>(weights, features, lane, before, after, all);
  } else {
    return out;
  }
}

// Adds up over the 4 lanes that hold one coordinate's units; all of them get the sum.
DEVICE float sum_over_units(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace fastl2l::cuda
