// Gradient of a window of truncated BPTT with respect to the rule's weights. A block walks through its groups of
// coordinates, a warp a tile, and stays with a tile for the whole window: forward, keeping the state before every step,
// then in reverse, with the gates computed again from it. Of the gates nothing is kept: they would be 200 numbers more
// a step and coordinate to write and read, which takes longer than computing them a second time.
//
// Memory: per warp, the states of one segment of steps, at least kSegment long, those before every segment, and dh and
// dc: 5 KB each for the papers' rule, whatever the number of coordinates is. With more than one segment, states inside
// of it are computed once more. All of it is written and read by the same lanes; dh and dc, which are used at every
// step, are few enough to stay in the multiprocessor's cache.
//
// Weight gradients are products over coordinates, which lie along the wrong side of a lane's fragments: gate gradients
// and inputs change lanes through shared memory, where every warp of the block takes its share of the products for the
// tiles of all 8. Sums are kept in registers for a segment, and then in float64, one for each part of the coordinates;
// parts depend on the number of coordinates alone and are added in order, so there is only one result.
#pragma once

#include "cuda/cell.cuh"

namespace fastl2l::cuda {

constexpr int kSegment = 32;

// How the steps of a window are cut into segments.
struct SegmentsOfSteps {
  int steps, length, count;

  explicit SegmentsOfSteps(int64_t all_steps) : steps((int)all_steps), length(kSegment) {
    while ((int64_t)length * length < all_steps) ++length;
    if (length > steps) length = steps;
    count = (int)((all_steps + length - 1) / length);
  }
  // Tiles of state: those before the segments, those after each step of one, and dh and dc.
  FASTL2L_HOST_DEVICE int tiles() const { return count + length + 1; }
};

template <class S>
struct WindowArguments {
  Window<float> window;
  WeightPointers<S::kLayers> weights;
  Branches branches;
  float update_scale;
  SegmentsOfSteps segments;
  Parts parts;
  float* workspace;  // [blocks][warps][segments.tiles()][kept_rows()][16]

  FASTL2L_HOST_DEVICE int rows() const { return S::kRows + branches.feature_rows; }
  FASTL2L_HOST_DEVICE int kept_rows() const { return (rows() + 3) / 4 * 4; }  // whole groups
};

// What a warp gives to the others of its block: columns are coordinates. Rows lie 20 floats apart, so that the 8 rows
// and 4 columns of a fragment are in 32 different banks.
template <class S>
struct Stage {
  static constexpr int kStride = kTile + 4;
  float dgates[S::kGates][kStride];
  float inputs[8 * S::kMostGradientColumns][kStride];

  // The gradients of the projection's sums take what is left of the rows above: 4 numbers of each.
  DEVICE float& dprojected(int unit, int coordinate) {
    static_assert(kTile == 4 * (kStride - kTile) && 4 * S::kProjected <= S::kGates);
    return dgates[4 * unit + coordinate / 4][kTile + coordinate % 4];
  }
};

template <class S>
struct WindowShared {
  ForwardWeights<S> forward;
  BackwardWeights<S> backward;
  Stage<S> stage[kWarps];
};

// A lane's share of the weight gradients' sums.
template <class S>
struct GradientSums {
  FASTL2L_HOST_DEVICE static constexpr int products(int layer) {
    return (S::gradient_products(layer) + kWarps - 1) / kWarps;
  }
  static constexpr int kMost = products(0) > products(S::kLayers - 1) ? products(0) : products(S::kLayers - 1);
  float of[S::kLayers][kMost][4];
  float feature;
  float out[S::kGroups], out_bias;

  DEVICE void clear() {
    UNROLL for (int layer = 0; layer < S::kLayers; ++layer) {
      UNROLL for (int product = 0; product < kMost; ++product) {
        UNROLL for (int i = 0; i < 4; ++i) of[layer][product][i] = 0;
      }
    }
    UNROLL for (int u = 0; u < S::kGroups; ++u) out[u] = 0;
    feature = out_bias = 0;
  }
};

// One warp's tile in the window. The last group may have fewer tiles than a block has warps: those left over only take
// their share of the weight gradients' products.
template <class S>
struct WindowTile {
  const WindowArguments<S>& arguments;
  WindowShared<S>& shared;
  GradientSums<S>& sums;
  const Lane& lane;
  float* workspace;  // of the warp
  int64_t tile;
  int active;  // warps of the block that have a tile

  DEVICE bool is_active() const { return lane.warp < active; }

  DEVICE int64_t coordinate(int i) const { return tile * kTile + 2 * lane.g + i; }
  DEVICE bool exists(int i) const { return coordinate(i) < arguments.window.numel; }
  // The lane's part of the tile that is number `index` in the workspace.
  DEVICE float* part(int index) const {
    return lanes_part(workspace + (int64_t)index * (arguments.kept_rows() * kTile), lane);
  }
  DEVICE float* carry() const { return part(arguments.segments.count + arguments.segments.length); }
  DEVICE float* checkpoint(int segment) const { return part(segment); }
  // The state before step t of a segment, or after the last one.
  DEVICE float* state(int segment, int t) const {
    return t == 0 ? checkpoint(segment) : part(arguments.segments.count + t - 1);
  }
  DEVICE int steps(int segment) const {
    const int left = arguments.segments.steps - segment * arguments.segments.length;
    return left < arguments.segments.length ? left : arguments.segments.length;
  }

  // Copies this tile's rows of [tile][row][16]; what belongs to no coordinate is 0.
  DEVICE void read_tile(const float* from, float* to) const {
    const float* at = from ? lanes_part(from + tile * (arguments.rows() * kTile), lane) : nullptr;
    for (int row = 0; row < arguments.kept_rows(); row += 4) {
      Pair<float> unit = {};
      const bool is_there = from && row + lane.q < arguments.rows();
      if (is_there && exists(0)) unit[0] = at[row * kTile];
      if (is_there && exists(1)) unit[1] = at[row * kTile + 1];
      store_unit(to, row, unit);
    }
  }
  // Copies `rows` rows of the tile.
  DEVICE void copy_part(const float* from, float* to, int rows) const {
    for (int row = 0; row + lane.q < rows; row += 4) store_unit(to, row, load_unit(from, row));
  }

  // Of one step and the lane's two coordinates; 0 where there is none.
  DEVICE Pair<float> read_coordinates(const float* from, int t) const {
    Pair<float> x = {};
    UNROLL for (int i = 0; i < 2; ++i) {
      if (exists(i)) x[i] = from[(int64_t)t * arguments.window.numel + coordinate(i)];
    }
    return x;
  }

  // Of the step from the state `before`; returns the lane's row of the features' state after it.
  DEVICE Pair<float> read_features(int t, const float* before, Pair<float> (&features)[S::kFeatures]) const {
    const Pair<float> gradient = read_coordinates(arguments.window.grads, t);
    Pair<float> mine = {};
    if (arguments.branches.feature_rows > 0) mine = load_unit(before, S::kRows);
    lane_features<S>(arguments.branches, gradient, lane, mine, features);
    return mine;
  }

  // The gradient of w_out . h + b_out, of the step that ends with the state `after`.
  DEVICE Pair<float> read_dupdate(int t, const float* after) const {
    Pair<float> dupdate = read_coordinates(arguments.window.adjoints, t);
    UNROLL for (int i = 0; i < 2; ++i) dupdate[i] *= arguments.update_scale;
    if (arguments.branches.tanh) {
      Pair<float> out = {};
      UNROLL for (int u = 0; u < S::kGroups; ++u) {
        const Pair<float> h = load_unit(after, h_row<S>(S::kLayers - 1) + 4 * u);
        UNROLL for (int i = 0; i < 2; ++i) out[i] = fmaf(shared.forward.out[4 * u + lane.q], h[i], out[i]);
      }
      UNROLL for (int i = 0; i < 2; ++i) {
        const float tanh_out = fast_tanh(sum_over_units(out[i]) + shared.forward.out_bias);
        dupdate[i] = tanh_backward<Scalar<float>>(tanh_out, dupdate[i]);
      }
    }
    return dupdate;
  }

  DEVICE void forward(int segment) const {
    ONE_AT_A_TIME for (int t = 0; t < steps(segment); ++t) {
      const float* before = state(segment, t);
      float* after = state(segment, t + 1);
      Pair<float> features[S::kFeatures];
      const Pair<float> mine = read_features(segment * arguments.segments.length + t, before, features);
      if (arguments.branches.feature_rows > 0) store_unit(after, S::kRows, mine);
      sync_warp();  // see step_tile()
      lstm_step<S>(shared.forward, features, lane, before, after);
    }
  }

  DEVICE void stage_unit(float (*rows)[Stage<S>::kStride], int row, const Pair<float>& unit) const {
    *reinterpret_cast<TwoFloats*>(&rows[row][2 * lane.g]) = TwoFloats{unit[0], unit[1]};
  }

  template <int Layer>
  DEVICE void stage_inputs(const Pair<float> (&features)[S::kFeatures], const float* before, const float* after) const {
    auto* rows = shared.stage[lane.warp].inputs;
    UNROLL for (int i = 0; i < 2; ++i) {
      const float first = lane.q == 0 ? features[0][i] : features[1][i];
      rows[lane.q][2 * lane.g + i] = lane.q < 2 ? first : (lane.q == 2 ? 0.0f : 1.0f);
    }
    ONE_AT_A_TIME for (int u = 0; u < S::input_groups(Layer); ++u) {
      if constexpr (Layer == 0) {
        stage_unit(rows, input_row(u), project<S>(shared.forward, features, u, lane));
      } else {
        stage_unit(rows, input_row(u), load_unit(after, h_row<S>(Layer - 1) + 4 * u));
      }
    }
    ONE_AT_A_TIME for (int u = 0; u < S::kGroups; ++u) {
      stage_unit(rows, input_row(S::input_groups(Layer) + u), load_unit(before, h_row<S>(Layer) + 4 * u));
    }
  }
  DEVICE int input_row(int group) const { return 4 + 4 * group + lane.q; }
  // The lane's part of what stage_inputs() has left of the layer's input, and a group of it.
  DEVICE const float* staged() const { return &shared.stage[lane.warp].inputs[input_row(0)][2 * lane.g]; }
  DEVICE static Pair<float> staged_unit(const float* part, int group) {
    const float* at = part + 4 * group * Stage<S>::kStride;
    return {{at[0], at[1]}};
  }

  // The gates of one group from their gradients' sources: dh and dc, which become those of the step before.
  template <int Layer>
  DEVICE void group_backward(int u, const Pair<Gates>& gates, const Pair<float>& dupdate, const float* before,
                             Pair<float> (&dgates)[4]) const {
    const Pair<float> c_before = load_unit(before, c_row<S>(Layer) + 4 * u);
    const Pair<float> dh = load_unit(carry(), h_row<S>(Layer) + 4 * u);
    Pair<float> dc = load_unit(carry(), c_row<S>(Layer) + 4 * u);
    UNROLL for (int i = 0; i < 2; ++i) {
      const Gates& gate = gates[i];
      const float tanh_c = fast_tanh(cell<Scalar<float>>(gate.i, gate.f, gate.g, c_before[i]));
      const float above = Layer + 1 < S::kLayers ? dh[i] : fmaf(shared.forward.out[4 * u + lane.q], dupdate[i], dh[i]);
      float both[4];
      cell_backward<Scalar<float>>(gate.i, gate.f, gate.g, gate.o, tanh_c, c_before[i], above, dc[i], both);
      UNROLL for (int k = 0; k < 4; ++k) dgates[k][i] = both[k];
    }
    store_unit(carry(), c_row<S>(Layer) + 4 * u, dc);
  }

  // A group of what the products of the gates' gradients and the weights give.
  template <int Columns>
  DEVICE static Pair<float> result(const float (&results)[Columns][4], int group) {
    return {{results[group / 2][group % 2], results[group / 2][2 + group % 2]}};
  }

  // dh of the step before and of the layer below.
  template <int Layer>
  DEVICE void carry_results(const float (&results)[S::backward_columns(Layer)][4]) const {
    UNROLL for (int u = 0; u < S::kGroups; ++u) {
      store_unit(carry(), h_row<S>(Layer) + 4 * u, result(results, S::input_groups(Layer) + u));
      if constexpr (Layer > 0) {
        Pair<float> dh = load_unit(carry(), h_row<S>(Layer - 1) + 4 * u);
        UNROLL for (int i = 0; i < 2; ++i) dh[i] += result(results, u)[i];
        store_unit(carry(), h_row<S>(Layer - 1) + 4 * u, dh);
      }
    }
  }

  // Gradients of the features, which all 4 lanes of a coordinate get.
  DEVICE void find_dfeatures(const float (&results)[S::backward_columns(0)][4],
                             Pair<float> (&dfeatures)[S::kFeatures]) const {
    if constexpr (S::kProjects) {
      UNROLL for (int u = 0; u < S::input_groups(0); ++u) {
        const Pair<float> y = staged_unit(staged(), u), dy = result(results, u);
        UNROLL for (int i = 0; i < 2; ++i) {
          const float dsum = elu_backward<Scalar<float>>(y[i], dy[i]);
          shared.stage[lane.warp].dprojected(4 * u + lane.q, 2 * lane.g + i) = dsum;
          UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) {
            const float weight = shared.forward.projection[4 * u + lane.q].feature[feature];
            dfeatures[feature][i] = fmaf(weight, dsum, dfeatures[feature][i]);
          }
        }
      }
      UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) {
        UNROLL for (int i = 0; i < 2; ++i) dfeatures[feature][i] = sum_over_units(dfeatures[feature][i]);
      }
    } else {
      // Their group comes after those of h: lane (g, q) has feature q.
      const Pair<float> mine = result(results, S::kGroups);
      UNROLL for (int feature = 0; feature < S::kFeatures; ++feature) {
        UNROLL for (int i = 0; i < 2; ++i) dfeatures[feature][i] = shuffle(mine[i], 4 * lane.g + feature);
      }
    }
  }

  // The way back through the features, to the gradients and the features' state.
  DEVICE void features_backward(int t, const float* after, const Pair<float> (&dfeatures)[S::kFeatures]) const {
    const Branches& branches = arguments.branches;
    const bool has_state = branches.feature_rows > 0;
    const Pair<float> gradient = read_coordinates(arguments.window.grads, t);
    Pair<float> mine = {}, dmine = {};
    if (has_state) {
      mine = load_unit(after, S::kRows);
      dmine = load_unit(carry(), S::kRows);
    }
    UNROLL for (int i = 0; i < 2; ++i) {
      Means<Scalar<float>> means{}, dmeans{};
      if (has_state) {
        means = gather_means(branches, mine[i], lane);
        dmeans = gather_means(branches, dmine[i], lane);
      }
      const float both[S::kFeatures] = {dfeatures[0][i], dfeatures[1][i]};
      const float found = cuda::features_backward(branches.constants, gradient[i], means, both, dmeans);
      dmine[i] = own_row(dmeans, lane);
      if (arguments.window.dgrads && lane.q == 0 && exists(i)) {
        arguments.window.dgrads[(int64_t)t * arguments.window.numel + coordinate(i)] = found;
      }
    }
    if (has_state) store_unit(carry(), S::kRows, dmine);
  }

  // This warp's share of a layer's weight gradients, for the tiles of all warps.
  template <int Layer>
  DEVICE void add_products() const {
    UNROLL for (int i = 0; i < GradientSums<S>::products(Layer); ++i) {
      const int product = lane.warp + i * kWarps;
      if (product >= S::gradient_products(Layer)) break;
      const int row = 16 * (product % S::kGradientRows) + lane.g, column = 8 * (product / S::kGradientRows) + lane.g;
      ONE_AT_A_TIME for (int warp = 0; warp < active; ++warp) {
        const Stage<S>& stage = shared.stage[warp];
        Pair<Split> left[4];
        RightFragment right[2];
        UNROLL for (int step = 0; step < 2; ++step) {
          const int k = 8 * step + lane.q;
          left[2 * step] = {{split(stage.dgates[row][k]), split(stage.dgates[row + 8][k])}};
          left[2 * step + 1] = {{split(stage.dgates[row][k + 4]), split(stage.dgates[row + 8][k + 4])}};
          right[step] = right_fragment(split(stage.inputs[column][k]), split(stage.inputs[column][k + 4]));
        }
        multiply<2>(left, right, 1, sums.of[Layer][i]);
      }
    }
  }

  // The output's weights and bias, for the lane's units and coordinates.
  DEVICE void add_out_products(const Pair<float>& dupdate, const float* after) const {
    UNROLL for (int u = 0; u < S::kGroups; ++u) {
      const Pair<float> h = load_unit(after, h_row<S>(S::kLayers - 1) + 4 * u);
      UNROLL for (int i = 0; i < 2; ++i) sums.out[u] = fmaf(dupdate[i], h[i], sums.out[u]);
    }
    sums.out_bias += dupdate[0] + dupdate[1];
  }

  // Gradients of the features' weights, one a thread: gradients of the optimizee may be too small or too large for two
  // numbers of 11 bits. They are those of the gates, whose biases tensor cores do, or of the projection and its biases.
  static constexpr int kFeatureRows = S::kProjects ? S::kProjected : S::kGates;

  DEVICE void add_feature_products() const {
    static_assert((S::kFeatures + S::kProjects) * kFeatureRows <= kThreads);
    const int row = thread_index() % kFeatureRows, feature = thread_index() / kFeatureRows;
    if (feature >= arguments.branches.features + S::kProjects) return;
    const int input = feature < arguments.branches.features ? feature : 3;  // the row of ones
    ONE_AT_A_TIME for (int warp = 0; warp < active; ++warp) {
      Stage<S>& stage = shared.stage[warp];
      const float *dgates = stage.dgates[row], *inputs = stage.inputs[input];
      float sum = 0;
      UNROLL for (int k = 0; k < kTile; ++k) {
        sum = fmaf(S::kProjects ? stage.dprojected(row, k) : dgates[k], inputs[k], sum);
      }
      sums.feature += sum;
    }
  }
  DEVICE void flush_feature(double* to) const {
    const int row = thread_index() % kFeatureRows, feature = thread_index() / kFeatureRows;
    const int features = arguments.branches.features;
    if (feature >= features + S::kProjects) return;
    to[feature < features ? row * features + feature : kFeatureRows * features + row] += sums.feature;
  }

  // One layer of step t, which begins with the state `before` and ends with `after`.
  template <int Layer>
  DEVICE void layer_backward(int t, const float* before, const float* after) const {
    Pair<float> features[S::kFeatures] = {}, dupdate = {};
    if constexpr (Layer == 0) read_features(t, before, features);
    if constexpr (Layer + 1 == S::kLayers) {
      dupdate = read_dupdate(t, after);
      add_out_products(dupdate, after);
    }
    sync_warp();  // see step_tile()
    stage_inputs<Layer>(features, before, after);
    float results[S::backward_columns(Layer)][4] = {};
    const float* part = staged();
    const LayerInput<S, Layer> input(before, [part](int u) { return staged_unit(part, u); });
    ONE_AT_A_TIME for (int u = 0; u < S::kGroups; ++u) {
      Pair<float> dgates[4];
      group_backward<Layer>(u, group_gates<S, Layer>(shared.forward, input, features, u, lane), dupdate, before,
                            dgates);
      Pair<Split> left[4];
      UNROLL for (int gate = 0; gate < 4; ++gate) {
        stage_unit(shared.stage[lane.warp].dgates, gate * S::kHidden + 4 * u + lane.q, dgates[gate]);
        left[gate] = split(dgates[gate]);
      }
      const auto* right = &shared.backward.fragment[S::backward_start(Layer) + 2 * u][lane.index];
      UNROLL for (int column = 0; column < S::backward_columns(Layer); ++column) {
        multiply<2>(left, right + column * S::kBackwardSteps * kWarp, kWarp, results[column]);
      }
    }
    carry_results<Layer>(results);
    if constexpr (Layer == 0) {
      const bool goes_on = arguments.window.needs_inputs(arguments.branches.feature_rows);
      Pair<float> dfeatures[S::kFeatures] = {};
      if (S::kProjects || goes_on) find_dfeatures(results, dfeatures);
      if (goes_on) features_backward(t, after, dfeatures);
    }
  }

  // Layers Layer, Layer - 1, ... of a step.
  template <int Layer>
  DEVICE void layers_backward(int t, const float* before, const float* after) const {
    if (is_active()) layer_backward<Layer>(t, before, after);
    sync_block();
    add_products<Layer>();
    if (Layer == 0) add_feature_products();
    sync_block();
    if constexpr (Layer > 0) layers_backward<Layer - 1>(t, before, after);
  }

  DEVICE void backward(int segment) const {
    ONE_AT_A_TIME for (int i = steps(segment) - 1; i >= 0; --i) {
      const int t = segment * arguments.segments.length + i;
      const float *before = state(segment, i), *after = state(segment, i + 1);
      layers_backward<S::kLayers - 1>(t, before, after);
    }
  }

  // Adds the lane's products to the sums of a part, in float64 and the order of the weights.
  template <int Layer>
  DEVICE void flush_products(double* to) const {
    constexpr int H = S::kHidden;
    const int inputs = S::inputs(Layer, arguments.branches.features);
    double* layer = to + S::weights_before(Layer, arguments.branches.features);
    const int warp = computed_here(lane.warp);
    UNROLL for (int i = 0; i < GradientSums<S>::products(Layer); ++i) {
      const int product = warp + i * kWarps;
      if (product >= S::gradient_products(Layer)) break;
      UNROLL for (int element = 0; element < 4; ++element) {
        const int row = 16 * (product % S::kGradientRows) + lane.g + 8 * (element / 2);
        // As stage_inputs() puts them: features, nothing and a 1 in 4 columns, then the input, then h.
        const int column = 8 * (product / S::kGradientRows) + 2 * lane.q + element % 2;
        const int input = column - 4, unit = input - 4 * S::input_groups(Layer);
        double* at = nullptr;
        if (column == 3) {
          at = layer + S::kGates * (inputs + H) + row;
        } else if (column > 3 && unit < 0) {
          at = layer + row * inputs + input;
        } else if (column > 3 && unit < H) {
          at = layer + S::kGates * inputs + row * H + unit;
        }
        if (at) *at += sums.of[Layer][i][element];
      }
    }
    if constexpr (Layer + 1 < S::kLayers) flush_products<Layer + 1>(to);
  }

  // The output's weights are summed over lanes, and over warps in order.
  DEVICE void flush_out(double* to) const {
    const auto sum_over_coordinates = [](float x) {
      x += shuffle_xor(x, 4);
      x += shuffle_xor(x, 8);
      return x + shuffle_xor(x, 16);
    };
    const auto row = [&](int warp) { return &shared.stage[warp].dgates[0][0]; };
    UNROLL for (int u = 0; u < S::kGroups; ++u) {
      const float sum = sum_over_coordinates(sums.out[u]);
      if (lane.g == 0) row(lane.warp)[4 * u + lane.q] = sum;
    }
    const float bias = sum_over_coordinates(sums.out_bias);
    if (lane.index == 0) row(lane.warp)[S::kHidden] = bias;
    sync_block();
    double* out = to + S::weights_before(S::kLayers, arguments.branches.features);
    for (int i = thread_index(); i <= S::kHidden; i += kThreads) {
      for (int warp = 0; warp < kWarps; ++warp) out[i] += row(warp)[i];
    }
    sync_block();
  }

  DEVICE void run(double* part_sums) const {
    const int last = arguments.segments.count - 1;
    if (is_active()) {
      read_tile(arguments.window.state, checkpoint(0));
      read_tile(arguments.window.dstate, carry());
      for (int segment = 0; segment < last; ++segment) {
        forward(segment);
        copy_part(state(segment, steps(segment)), checkpoint(segment + 1), arguments.kept_rows());
      }
    }
    for (int segment = last; segment >= 0; --segment) {
      if (is_active()) forward(segment);
      sums.clear();
      backward(segment);
      flush_products<0>(part_sums);
      flush_feature(part_sums);
      flush_out(part_sums);
    }
    if (arguments.window.dstate_first && is_active()) {
      const int rows = arguments.rows();
      copy_part(carry(), lanes_part(arguments.window.dstate_first + tile * (rows * kTile), lane), rows);
    }
  }
};

template <class S>
KERNEL(kThreads, 1)
window_backward_kernel(KERNEL_ARGUMENT WindowArguments<S> arguments) {
  auto& shared = *reinterpret_cast<WindowShared<S>*>(shared_memory());
  load_forward_weights<S>(arguments.weights, arguments.branches.features, shared.forward);
  load_backward_weights<S>(arguments.weights, arguments.branches.features, shared.backward);
  const Lane lane;
  const int64_t warp = (int64_t)block_index() * kWarps + lane.warp;
  float* workspace = arguments.workspace + warp * arguments.segments.tiles() * (arguments.kept_rows() * kTile);
  GradientSums<S> sums;
  const Parts& parts = arguments.parts;
  for (int64_t part = block_index(); part < parts.parts; part += block_count()) {
    double* part_sums = parts.sums + part * parts.count;
    for (int64_t i = thread_index(); i < parts.count; i += kThreads) part_sums[i] = 0;
    sync_block();
    for (int64_t group = parts.begin(part); group < parts.begin(part + 1); ++group) {
      const int64_t first = group * kWarps, left = tiles_of(arguments.window.numel) - first;
      const WindowTile<S> tile{
          arguments, shared, sums, lane, workspace, first + lane.warp, (int)(left < kWarps ? left : kWarps)};
      tile.run(part_sums);
    }
  }
}

}  // namespace fastl2l::cuda
