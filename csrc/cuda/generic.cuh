// Every rule, in float32 and float64: a thread a coordinate, no tensor cores, nothing kept on chip. For sizes that have
// no kernel of their own, and to compare those with.
#pragma once

#include "cuda/arguments.h"
#include "cuda/device.cuh"
#include "cuda/numbers.cuh"

namespace fastl2l::cuda {

constexpr int kGenericThreads = 32;  // of a block, which is a warp

// All weights one after the other, in the order of ops/schema.py.
template <typename T>
struct GenericRule {
  const T* weights;
  Preprocessing<T> preprocessing;
  int layers, hidden, features;
  T update_scale;

  FASTL2L_HOST_DEVICE int inputs(int layer) const { return layer == 0 ? features : hidden; }
  FASTL2L_HOST_DEVICE int rows() const { return 2 * layers * hidden; }
  FASTL2L_HOST_DEVICE int64_t layer_weights(int layer) const {
    return (int64_t)4 * hidden * (inputs(layer) + hidden + 1);
  }
  FASTL2L_HOST_DEVICE int64_t before(int layer) const {
    return layer == 0 ? 0 : layer_weights(0) + (layer - 1) * layer_weights(1);
  }
  DEVICE const T* w_ih(int layer) const { return weights + before(layer); }
  DEVICE const T* w_hh(int layer) const { return w_ih(layer) + (int64_t)4 * hidden * inputs(layer); }
  DEVICE const T* bias(int layer) const { return w_hh(layer) + (int64_t)4 * hidden * hidden; }
  DEVICE const T* out() const { return weights + before(layers); }
};

// One coordinate's numbers: rows lie `stride` apart.
template <typename T>
struct Column {
  T* at;
  int stride;

  DEVICE T& operator[](int64_t row) const { return at[row * stride]; }
  DEVICE Column from(int64_t row) const { return {at + row * stride, stride}; }
};

// One layer of one coordinate; visit(unit, gates, c before) for each unit, gates in the order i, f, g, o.
template <typename T, class Visit>
DEVICE void generic_layer(const GenericRule<T>& rule, int layer, Column<T> input, Column<T> h, Column<T> c,
                          Visit visit) {
  const int H = rule.hidden, inputs = rule.inputs(layer);
  const T *w_ih = rule.w_ih(layer), *w_hh = rule.w_hh(layer), *bias = rule.bias(layer);
  for (int unit = 0; unit < H; ++unit) {
    T gates[4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t row = gate * H + unit;
      T sum = bias[row];
      for (int k = 0; k < inputs; ++k) sum = fused(w_ih[row * inputs + k], input[k], sum);
      for (int k = 0; k < H; ++k) sum = fused(w_hh[row * H + k], h[k], sum);
      gates[gate] = gate == 2 ? hyperbolic_tangent(sum) : sigmoid(sum);
    }
    visit(unit, gates, c[unit]);
  }
}

template <typename T>
struct GenericStepArguments {
  Segments segments;
  GenericRule<T> rule;
  T grad_scale;
  T* workspace;  // [blocks][hidden + features][threads]
};

template <typename T>
KERNEL(kGenericThreads, 8)
generic_step_kernel(KERNEL_ARGUMENT GenericStepArguments<T> arguments) {
  if (!arguments.segments.wanted()) return;
  const GenericRule<T>& rule = arguments.rule;
  const int H = rule.hidden;
  T* workspace = arguments.workspace + (int64_t)block_index() * (H + rule.features) * kGenericThreads;
  const Column<T> h_new{workspace + thread_index(), kGenericThreads}, features = h_new.from(H);
  const int64_t stride = (int64_t)block_count() * kGenericThreads;
  const int64_t end = arguments.segments.tiles * kTile;
  for (int64_t i = (int64_t)block_index() * kGenericThreads + thread_index(); i < end; i += stride) {
    const Segment& segment = arguments.segments.of(i / kTile);
    const int64_t coordinate = i - segment.first_tile * kTile;
    if (coordinate >= segment.numel) continue;
    T both[2];
    rule.preprocessing.features(element<T>(segment.grad, segment.dtype, coordinate) * arguments.grad_scale, both);
    for (int feature = 0; feature < rule.features; ++feature) features[feature] = both[feature];
    T* tile = static_cast<T*>(segment.state) + coordinate / kTile * rule.rows() * kTile;
    const Column<T> state{tile + coordinate % kTile, kTile};
    Column<T> input = features;
    for (int layer = 0; layer < rule.layers; ++layer) {
      const Column<T> h = state.from((int64_t)2 * layer * H), c = h.from(H);
      generic_layer(rule, layer, input, h, c, [&](int unit, const T(&gates)[4], T c_before) {
        c[unit] = fused(gates[1], c_before, gates[0] * gates[2]);
        h_new[unit] = gates[3] * hyperbolic_tangent(c[unit]);
      });
      for (int unit = 0; unit < H; ++unit) h[unit] = h_new[unit];  // all units have seen h before the step
      input = h;
    }
    T out = rule.out()[H];
    for (int unit = 0; unit < H; ++unit) out = fused(rule.out()[unit], input[unit], out);
    add_to_element(segment.param, segment.dtype, coordinate, out * rule.update_scale);
  }
}

// Where a block keeps the whole window of its 32 coordinates; counted in rows.
struct GenericWindowLayout {
  int layers, hidden, features;
  int64_t steps;

  // Gates, later their gradients, and tanh(c); h and c have steps + 1 entries, of the state before step t.
  FASTL2L_HOST_DEVICE int64_t gates(int layer, int64_t t) const { return (layer * steps + t) * 4 * hidden; }
  FASTL2L_HOST_DEVICE int64_t h(int layer, int64_t t) const {
    return gates(layers, 0) + (layer * (steps + 1) + t) * hidden;
  }
  FASTL2L_HOST_DEVICE int64_t c(int layer, int64_t t) const {
    return h(layers, 0) + (layer * (steps + 1) + t) * hidden;
  }
  FASTL2L_HOST_DEVICE int64_t feature(int64_t t) const { return c(layers, 0) + t * features; }
  FASTL2L_HOST_DEVICE int64_t dupdate(int64_t t) const { return feature(steps) + t; }
  // Carried backwards through time.
  FASTL2L_HOST_DEVICE int64_t dh(int layer) const { return dupdate(steps) + (int64_t)2 * layer * hidden; }
  FASTL2L_HOST_DEVICE int64_t dc(int layer) const { return dh(layer) + hidden; }
  FASTL2L_HOST_DEVICE int64_t rows() const { return dh(layers); }
};

template <typename T>
struct GenericWindowArguments {
  Window<T> window;
  GenericRule<T> rule;
  GenericWindowLayout layout;
  Parts parts;
  T* workspace;  // [blocks][layout.rows()][threads]
};

template <typename T>
struct GenericWindow {
  const GenericWindowArguments<T>& arguments;
  const GenericRule<T>& rule;
  const GenericWindowLayout& layout;
  T* workspace;
  int64_t coordinate;

  DEVICE bool exists() const { return coordinate < arguments.window.numel; }
  DEVICE Column<T> column(int64_t row) const {
    return {workspace + row * kGenericThreads + thread_index(), kGenericThreads};
  }
  template <typename Element>
  DEVICE Column<Element> state(Element* from, int layer) const {
    Element* tile = from + coordinate / kTile * rule.rows() * kTile;
    return {tile + (int64_t)2 * layer * rule.hidden * kTile + coordinate % kTile, kTile};
  }
  DEVICE T read(const T* from, int64_t t) const {
    return exists() ? from[t * arguments.window.numel + coordinate] : T(0);
  }

  DEVICE void load() const {
    for (int layer = 0; layer < rule.layers; ++layer) {
      for (int row = 0; row < 2 * rule.hidden; ++row) {  // h, then c
        const bool is_c = row >= rule.hidden;
        const int64_t unit = is_c ? row - rule.hidden : row;
        const T* first = arguments.window.state;
        const T* last = arguments.window.dstate;
        column(is_c ? layout.c(layer, 0) : layout.h(layer, 0))[unit] = exists() ? state(first, layer)[row] : T(0);
        column(layout.dh(layer))[row] = last && exists() ? state(last, layer)[row] : T(0);
      }
    }
    for (int64_t t = 0; t < layout.steps; ++t) {
      T both[2];
      rule.preprocessing.features(read(arguments.window.grads, t), both);
      for (int feature = 0; feature < rule.features; ++feature) column(layout.feature(t))[feature] = both[feature];
      column(layout.dupdate(t))[0] = read(arguments.window.adjoints, t) * rule.update_scale;
    }
  }

  DEVICE void forward() const {
    for (int64_t t = 0; t < layout.steps; ++t) {
      Column<T> input = column(layout.feature(t));
      for (int layer = 0; layer < rule.layers; ++layer) {
        const Column<T> c = column(layout.c(layer, t + 1)), h = column(layout.h(layer, t + 1));
        const Column<T> kept = column(layout.gates(layer, t));
        generic_layer(rule, layer, input, column(layout.h(layer, t)), column(layout.c(layer, t)),
                      [&](int unit, const T(&gates)[4], T c_before) {
                        for (int gate = 0; gate < 4; ++gate) kept[gate * rule.hidden + unit] = gates[gate];
                        c[unit] = fused(gates[1], c_before, gates[0] * gates[2]);
                        h[unit] = gates[3] * hyperbolic_tangent(c[unit]);
                      });
        input = h;
      }
    }
  }

  // The gradient of one input or unit of h from those of the gates, W^T dgates.
  DEVICE T input_gradient(const T* weights, int inputs, int k, Column<T> dgates) const {
    T sum = 0;
    for (int64_t row = 0; row < 4 * rule.hidden; ++row) sum = fused(weights[row * inputs + k], dgates[row], sum);
    return sum;
  }

  DEVICE void layer_backward(int layer, int64_t t) const {
    const int H = rule.hidden;
    const Column<T> gates = column(layout.gates(layer, t)), dh = column(layout.dh(layer));
    const Column<T> dc = column(layout.dc(layer)), c_before = column(layout.c(layer, t));
    const T dupdate = column(layout.dupdate(t))[0];
    for (int unit = 0; unit < H; ++unit) {
      const T i = gates[unit], f = gates[H + unit], g = gates[2 * H + unit], o = gates[3 * H + unit];
      const T tanh_c = hyperbolic_tangent(column(layout.c(layer, t + 1))[unit]);
      const T above = layer + 1 < rule.layers ? dh[unit] : fused(rule.out()[unit], dupdate, dh[unit]);
      const T dtanh = above * o, dc_now = fused(-dtanh * tanh_c, tanh_c, dc[unit] + dtanh);
      gates[unit] = dc_now * g * i * (1 - i);
      gates[H + unit] = dc_now * c_before[unit] * f * (1 - f);
      gates[2 * H + unit] = dc_now * i * fused(-g, g, T(1));
      gates[3 * H + unit] = above * tanh_c * o * (1 - o);
      dc[unit] = dc_now * f;
    }
    for (int unit = 0; unit < H; ++unit) dh[unit] = input_gradient(rule.w_hh(layer), H, unit, gates);
    if (layer > 0) {
      const Column<T> below = column(layout.dh(layer - 1));
      for (int unit = 0; unit < H; ++unit) below[unit] += input_gradient(rule.w_ih(layer), H, unit, gates);
    } else if (arguments.window.dgrads && exists()) {
      T dfeatures[2] = {0, 0};
      for (int k = 0; k < rule.features; ++k) {
        dfeatures[k] = input_gradient(rule.w_ih(0), rule.features, k, gates);
      }
      arguments.window.dgrads[t * arguments.window.numel + coordinate] =
          rule.preprocessing.backward(read(arguments.window.grads, t), dfeatures);
    }
  }

  DEVICE void backward() const {
    for (int64_t t = layout.steps - 1; t >= 0; --t) {
      for (int layer = rule.layers - 1; layer >= 0; --layer) layer_backward(layer, t);
    }
    if (!arguments.window.dstate_first || !exists()) return;
    for (int layer = 0; layer < rule.layers; ++layer) {
      const Column<T> to = state(arguments.window.dstate_first, layer);
      for (int row = 0; row < 2 * rule.hidden; ++row) to[row] = column(layout.dh(layer))[row];
    }
  }

  // The sum over the block's coordinates and all steps of row d times row x; a row of -1 is one of ones.
  DEVICE double product(int64_t d, int64_t d_step, int64_t x, int64_t x_step) const {
    double sum = 0;
    for (int64_t t = 0; t < layout.steps; ++t) {
      const T* left = workspace + (d + t * d_step) * kGenericThreads;
      const T* right = workspace + (x + t * x_step) * kGenericThreads;
      for (int lane = 0; lane < kGenericThreads; ++lane) {
        sum += (double)left[lane] * (x < 0 ? 1.0 : (double)right[lane]);
      }
    }
    return sum;
  }

  // Every thread adds up some of the weights' gradients over all coordinates of the block.
  DEVICE void add_weight_gradients(double* sums) const {
    const int H = rule.hidden;
    for (int layer = 0; layer < rule.layers; ++layer) {
      const int inputs = rule.inputs(layer);
      const int64_t rows = 4 * H, input = layer == 0 ? layout.feature(0) : layout.h(layer - 1, 1);
      const int64_t input_step = layer == 0 ? rule.features : H;
      double* to = sums + rule.before(layer);
      for (int64_t i = thread_index(); i < rule.layer_weights(layer); i += kGenericThreads) {
        const int64_t j = i - rows * inputs, k = j - rows * H;  // within W_hh, within the bias
        const int64_t row = j < 0 ? i / inputs : (k < 0 ? j / H : k);
        const int64_t d = layout.gates(layer, 0) + row;
        to[i] += j < 0   ? product(d, rows, input + i % inputs, input_step)
                 : k < 0 ? product(d, rows, layout.h(layer, 0) + j % H, H)
                         : product(d, rows, -1, 0);
      }
    }
    double* out = sums + rule.before(rule.layers);
    for (int unit = thread_index(); unit <= H; unit += kGenericThreads) {
      const int64_t h = layout.h(rule.layers - 1, 1);
      out[unit] += unit < H ? product(layout.dupdate(0), 1, h + unit, H) : product(layout.dupdate(0), 1, -1, 0);
    }
  }
};

template <typename T>
KERNEL(kGenericThreads, 8)
generic_window_backward_kernel(KERNEL_ARGUMENT GenericWindowArguments<T> arguments) {
  const Parts& parts = arguments.parts;
  T* workspace = arguments.workspace + block_index() * arguments.layout.rows() * kGenericThreads;
  for (int64_t part = block_index(); part < parts.parts; part += block_count()) {
    double* sums = parts.sums + part * parts.count;
    for (int64_t i = thread_index(); i < parts.count; i += kGenericThreads) sums[i] = 0;
    sync_block();
    for (int64_t group = parts.begin(part); group < parts.begin(part + 1); ++group) {
      const GenericWindow<T> window{arguments, arguments.rule, arguments.layout, workspace,
                                    group * kGenericThreads + thread_index()};
      window.load();
      window.forward();
      window.backward();
      sync_block();
      window.add_weight_gradients(sums);
      sync_block();
    }
  }
}

}  // namespace fastl2l::cuda
