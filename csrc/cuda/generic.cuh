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
struct GenericRule : Rule {
  const T* weights;
  PartConstants<T> of_parts;

  FASTL2L_HOST_DEVICE int64_t before(int layer) const {
    const int64_t projection = (int64_t)projected * (inputs() + 1), layers_own = (int64_t)layer * (hidden + 1);
    const int64_t layers_inputs = layer == 0 ? 0 : layer_inputs(0) + (int64_t)hidden * (layer - 1);
    return projection + 4 * hidden * (layers_inputs + layers_own);
  }
  DEVICE const T* w_in() const { return weights; }
  DEVICE const T* b_in() const { return weights + (int64_t)projected * inputs(); }
  DEVICE const T* w_ih(int layer) const { return weights + before(layer); }
  DEVICE const T* w_hh(int layer) const { return w_ih(layer) + (int64_t)4 * hidden * layer_inputs(layer); }
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

// A coordinate of [tile][row][16], if there is any.
template <typename T>
DEVICE Column<T> column_of_tiles(T* tiles, int rows, int64_t coordinate) {
  return {tiles ? tiles + coordinate / kTile * rows * kTile + coordinate % kTile : nullptr, kTile};
}

// The means of features that have some, in rows of their own.
template <typename T, class Stored>
DEVICE Means<Scalar<T>> load_means(const PartConstants<T>& constants, Column<Stored> rows) {
  if (constants.features != Features::kAdam) return {};
  const T age = wide(rows[2]);
  return {wide(rows[0]), wide(rows[1]), age, constants.one_age ? age : wide(rows[3])};
}
template <typename T, class Stored>
DEVICE void store_means(const PartConstants<T>& constants, Column<Stored> rows, const Means<Scalar<T>>& means) {
  if (constants.features != Features::kAdam) return;
  round_to(means.m, rows[0]);
  round_to(means.v, rows[1]);
  round_to(means.age1, rows[2]);
  if (!constants.one_age) round_to(means.age2, rows[3]);
}

// The rule's inputs: what is made of the gradient, whose state is read `before` the step and written `after` it, which
// may be the same place, and given rows.
template <typename T, class Stored>
DEVICE void generic_inputs(const GenericRule<T>& rule, T gradient, Column<Stored> before, Column<Stored> after,
                           Column<const T> given, Column<T> to) {
  Means<Scalar<T>> means = load_means(rule.of_parts, before);
  T both[2];
  features(rule.of_parts, gradient, means, both);
  store_means(rule.of_parts, after, means);
  const int count = rule.feature_count();
  for (int k = 0; k < count; ++k) to[k] = both[k];
  for (int k = 0; k < rule.given; ++k) to[count + k] = given[k];
}

template <typename T>
DEVICE void generic_projection(const GenericRule<T>& rule, Column<T> input, Column<T> to) {
  const int inputs = rule.inputs();
  for (int64_t unit = 0; unit < rule.projected; ++unit) {
    T sum = rule.b_in()[unit];
    for (int k = 0; k < inputs; ++k) sum = fused(rule.w_in()[unit * inputs + k], input[k], sum);
    to[unit] = elu(sum);
  }
}

// One layer of one coordinate; visit(unit, gates, c before) for each unit, gates in the order i, f, g, o.
template <typename T, class Stored, class Visit>
DEVICE void generic_layer(const GenericRule<T>& rule, int layer, Column<T> input, Column<Stored> h, Column<Stored> c,
                          Visit visit) {
  const int H = rule.hidden, inputs = rule.layer_inputs(layer);
  const T *w_ih = rule.w_ih(layer), *w_hh = rule.w_hh(layer), *bias = rule.bias(layer);
  for (int unit = 0; unit < H; ++unit) {
    T gates[4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t row = gate * H + unit;
      T sum = bias[row];
      for (int k = 0; k < inputs; ++k) sum = fused(w_ih[row * inputs + k], input[k], sum);
      for (int k = 0; k < H; ++k) sum = fused(w_hh[row * H + k], wide(h[k]), sum);
      gates[gate] = gate == 2 ? hyperbolic_tangent(sum) : sigmoid(sum);
    }
    visit(unit, gates, wide(c[unit]));
  }
}

// What the rule makes of the last layer's h, without the update's scale.
template <typename T>
DEVICE T generic_output(const GenericRule<T>& rule, Column<T> h) {
  T out = rule.out()[rule.hidden];
  for (int unit = 0; unit < rule.hidden; ++unit) out = fused(rule.out()[unit], h[unit], out);
  return rule.output == Output::kTanh ? hyperbolic_tangent(out) : out;
}

template <typename T>
struct GenericStepArguments {
  Segments segments;
  GenericRule<T> rule;
  Factors<T> factors;
  T grad_scale;
  const T* given;  // [tile][given row][16] over the segments of all launches, or null
  T* workspace;    // [blocks][rows()][threads]

  // The new h of two layers, as it was before it was rounded to be stored, inputs, and what is projected of them.
  FASTL2L_HOST_DEVICE int64_t rows() const { return 2 * rule.hidden + rule.inputs() + rule.projected; }
};

template <typename T, class Stored>
KERNEL(kGenericThreads, 8)
generic_step_kernel(KERNEL_ARGUMENT GenericStepArguments<T> arguments) {
  if (!arguments.segments.wanted()) return;
  const GenericRule<T>& rule = arguments.rule;
  const int H = rule.hidden;
  T* workspace = arguments.workspace + block_index() * arguments.rows() * kGenericThreads;
  const Column<T> hidden{workspace + thread_index(), kGenericThreads}, inputs = hidden.from(2 * H);
  const Column<T> projected = inputs.from(rule.inputs());
  const int64_t stride = (int64_t)block_count() * kGenericThreads;
  const int64_t end = arguments.segments.tiles * kTile, before = arguments.segments.tiles_before * kTile;
  for (int64_t i = (int64_t)block_index() * kGenericThreads + thread_index(); i < end; i += stride) {
    const Segment& segment = arguments.segments.of(i / kTile);
    const int64_t coordinate = i - segment.first_tile * kTile;
    if (coordinate >= segment.numel) continue;
    const Column<Stored> state = column_of_tiles(static_cast<Stored*>(segment.state), rule.state_rows(), coordinate);
    const Column<Stored> own = state.from(rule.lstm_rows());
    generic_inputs(rule, element<T>(segment.grad, segment.dtype, coordinate) * arguments.grad_scale, own, own,
                   column_of_tiles(arguments.given, rule.given, before + i), inputs);
    Column<T> input = inputs;
    if (rule.projected > 0) {
      generic_projection(rule, inputs, projected);
      input = projected;
    }
    for (int layer = 0; layer < rule.layers; ++layer) {
      const Column<Stored> h = state.from((int64_t)2 * layer * H), c = h.from(H);
      const Column<T> h_new = hidden.from(layer % 2 * H);
      generic_layer(rule, layer, input, h, c, [&](int unit, const T(&gates)[4], T c_before) {
        const T c_new = cell<Scalar<T>>(gates[0], gates[1], gates[2], c_before);
        round_to(c_new, c[unit]);
        h_new[unit] = gates[3] * hyperbolic_tangent(c_new);
      });
      for (int unit = 0; unit < H; ++unit) round_to(h_new[unit], h[unit]);  // all units have seen h before the step
      input = h_new;
    }
    if (rule.output == Output::kNone) continue;
    const T update = generic_output(rule, input) * arguments.factors.of_update() * arguments.factors.unit_of(segment);
    add_to_element(segment.param, segment.dtype, coordinate, arguments.factors.of_parameter(), update);
  }
}

// Where a block keeps the whole window of its 32 coordinates; counted in rows.
struct GenericWindowLayout {
  int layers, hidden, inputs, projected, feature_rows;
  int64_t steps;

  GenericWindowLayout(const Rule& rule, int64_t all_steps)
      : layers(rule.layers),
        hidden(rule.hidden),
        inputs(rule.inputs()),
        projected(rule.projected),
        feature_rows(rule.feature_rows()),
        steps(all_steps) {}

  // Gates, later their gradients; h, c and the features' state have steps + 1 entries, of the state before step t.
  FASTL2L_HOST_DEVICE int64_t gates(int layer, int64_t t) const { return (layer * steps + t) * 4 * hidden; }
  FASTL2L_HOST_DEVICE int64_t h(int layer, int64_t t) const {
    return gates(layers, 0) + (layer * (steps + 1) + t) * hidden;
  }
  FASTL2L_HOST_DEVICE int64_t c(int layer, int64_t t) const {
    return h(layers, 0) + (layer * (steps + 1) + t) * hidden;
  }
  FASTL2L_HOST_DEVICE int64_t state(int64_t t) const { return c(layers, 0) + t * feature_rows; }
  FASTL2L_HOST_DEVICE int64_t input(int64_t t) const { return state(steps + 1) + t * inputs; }
  FASTL2L_HOST_DEVICE int64_t project(int64_t t) const { return input(steps) + t * projected; }
  FASTL2L_HOST_DEVICE int64_t dproject(int64_t t) const { return project(steps) + t * projected; }
  FASTL2L_HOST_DEVICE int64_t dupdate(int64_t t) const { return dproject(steps) + t; }
  // Carried backwards through time.
  FASTL2L_HOST_DEVICE int64_t dh(int layer) const { return dupdate(steps) + (int64_t)2 * layer * hidden; }
  FASTL2L_HOST_DEVICE int64_t dc(int layer) const { return dh(layer) + hidden; }
  FASTL2L_HOST_DEVICE int64_t dstate() const { return dh(layers); }
  // Of one step: the gradients of the rule's inputs.
  FASTL2L_HOST_DEVICE int64_t dinputs() const { return dstate() + feature_rows; }
  FASTL2L_HOST_DEVICE int64_t rows() const { return dinputs() + inputs; }
  // What the first layer reads.
  FASTL2L_HOST_DEVICE int64_t first_input(int64_t t) const { return projected > 0 ? project(t) : input(t); }
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
  DEVICE T read(const T* from, int64_t t) const {
    return exists() ? from[t * arguments.window.numel + coordinate] : T(0);
  }
  // Given rows of step t, or their gradients.
  template <typename Element>
  DEVICE Column<Element> given(Element* from, int64_t t) const {
    return column_of_tiles(from + t * tiles_of(arguments.window.numel) * rule.given * kTile, rule.given, coordinate);
  }

  // Calls visit(row of the state, where it is kept before the first step, its gradient) for every row of the state.
  template <class Visit>
  DEVICE void each_state_row(Visit visit) const {
    int row = 0;
    for (int layer = 0; layer < rule.layers; ++layer) {
      for (int unit = 0; unit < rule.hidden; ++unit) visit(row++, layout.h(layer, 0) + unit, layout.dh(layer) + unit);
      for (int unit = 0; unit < rule.hidden; ++unit) visit(row++, layout.c(layer, 0) + unit, layout.dc(layer) + unit);
    }
    for (int i = 0; i < layout.feature_rows; ++i) visit(row++, layout.state(0) + i, layout.dstate() + i);
  }

  DEVICE void load() const {
    const Column<const T> first = column_of_tiles(arguments.window.state, rule.state_rows(), coordinate);
    const Column<const T> last = column_of_tiles(arguments.window.dstate, rule.state_rows(), coordinate);
    each_state_row([&](int row, int64_t kept, int64_t gradient) {
      column(kept)[0] = exists() ? first[row] : T(0);
      column(gradient)[0] = arguments.window.dstate && exists() ? last[row] : T(0);
    });
    for (int64_t t = 0; t < layout.steps; ++t) {
      const Column<T> to = column(layout.input(t));
      if (exists()) {
        generic_inputs(rule, read(arguments.window.grads, t), column(layout.state(t)), column(layout.state(t + 1)),
                       given(arguments.window.given, t), to);
      } else {
        for (int row = 0; row < layout.inputs; ++row) to[row] = 0;
      }
      column(layout.dupdate(t))[0] = read(arguments.window.adjoints, t) * (T)rule.update_scale;
    }
  }

  DEVICE void forward() const {
    for (int64_t t = 0; t < layout.steps; ++t) {
      Column<T> input = column(layout.first_input(t));
      if (rule.projected > 0) generic_projection(rule, column(layout.input(t)), input);
      for (int layer = 0; layer < rule.layers; ++layer) {
        const Column<T> c = column(layout.c(layer, t + 1)), h = column(layout.h(layer, t + 1));
        const Column<T> kept = column(layout.gates(layer, t));
        generic_layer(rule, layer, input, column(layout.h(layer, t)), column(layout.c(layer, t)),
                      [&](int unit, const T(&gates)[4], T c_before) {
                        for (int gate = 0; gate < 4; ++gate) kept[gate * rule.hidden + unit] = gates[gate];
                        c[unit] = cell<Scalar<T>>(gates[0], gates[1], gates[2], c_before);
                        h[unit] = gates[3] * hyperbolic_tangent(c[unit]);
                      });
        input = h;
      }
      if (rule.output != Output::kTanh) continue;
      const Column<T> dupdate = column(layout.dupdate(t));  // now that of w_out . h + b_out
      dupdate[0] = tanh_backward<Scalar<T>>(generic_output(rule, input), dupdate[0]);
    }
  }

  // The gradient of one input, column k of the weights, from those of the `rows` sums that it is in.
  DEVICE T input_gradient(const T* weights, int64_t rows, int inputs, int k, Column<T> dsums) const {
    T sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum = fused(weights[row * inputs + k], dsums[row], sum);
    return sum;
  }

  DEVICE void layer_backward(int layer, int64_t t) const {
    const int H = rule.hidden;
    const Column<T> gates = column(layout.gates(layer, t)), dh = column(layout.dh(layer));
    const Column<T> dc = column(layout.dc(layer)), c_before = column(layout.c(layer, t));
    const bool updates = layer + 1 == rule.layers && rule.output != Output::kNone;
    const T dupdate = column(layout.dupdate(t))[0];
    for (int unit = 0; unit < H; ++unit) {
      const T tanh_c = hyperbolic_tangent(column(layout.c(layer, t + 1))[unit]);
      const T above = updates ? fused(rule.out()[unit], dupdate, dh[unit]) : dh[unit];
      T dgates[4];
      cell_backward<Scalar<T>>(gates[unit], gates[H + unit], gates[2 * H + unit], gates[3 * H + unit], tanh_c,
                               c_before[unit], above, dc[unit], dgates);
      for (int gate = 0; gate < 4; ++gate) gates[gate * H + unit] = dgates[gate];
    }
    for (int unit = 0; unit < H; ++unit) dh[unit] = input_gradient(rule.w_hh(layer), 4 * H, H, unit, gates);
    if (layer == 0) return first_layer_backward(t, gates);
    const Column<T> below = column(layout.dh(layer - 1));
    for (int unit = 0; unit < H; ++unit) below[unit] += input_gradient(rule.w_ih(layer), 4 * H, H, unit, gates);
  }

  // On to the projection and the rule's inputs.
  DEVICE void first_layer_backward(int64_t t, Column<T> dgates) const {
    const int64_t rows = 4 * rule.hidden;
    const Column<T> project = column(layout.project(t)), dproject = column(layout.dproject(t));
    for (int unit = 0; unit < rule.projected; ++unit) {
      const T dunit = input_gradient(rule.w_ih(0), rows, rule.projected, unit, dgates);
      dproject[unit] = elu_backward<Scalar<T>>(project[unit], dunit);
    }
    if (!arguments.window.needs_inputs(layout.feature_rows)) return;
    const Column<T> dinputs = column(layout.dinputs());
    for (int k = 0; k < layout.inputs; ++k) {
      dinputs[k] = rule.projected > 0 ? input_gradient(rule.w_in(), rule.projected, layout.inputs, k, dproject)
                                      : input_gradient(rule.w_ih(0), rows, layout.inputs, k, dgates);
    }
    if (exists()) inputs_backward(t, dinputs);
  }

  DEVICE void inputs_backward(int64_t t, Column<T> dinputs) const {
    const int count = rule.feature_count();
    T dfeatures[2] = {0, 0};
    for (int k = 0; k < count; ++k) dfeatures[k] = dinputs[k];
    const Column<T> dstate = column(layout.dstate());
    Means<Scalar<T>> dmeans = load_means(rule.of_parts, dstate);
    const T dgradient = features_backward(rule.of_parts, read(arguments.window.grads, t),
                                          load_means(rule.of_parts, column(layout.state(t + 1))), dfeatures, dmeans);
    store_means(rule.of_parts, dstate, dmeans);
    if (arguments.window.dgrads) arguments.window.dgrads[t * arguments.window.numel + coordinate] = dgradient;
    if (!arguments.window.dgiven) return;
    for (int k = 0; k < rule.given; ++k) given(arguments.window.dgiven, t)[k] = dinputs[count + k];
  }

  DEVICE void backward() const {
    for (int64_t t = layout.steps - 1; t >= 0; --t) {
      for (int layer = rule.layers - 1; layer >= 0; --layer) layer_backward(layer, t);
    }
    if (!arguments.window.dstate_first || !exists()) return;
    const Column<T> to = column_of_tiles(arguments.window.dstate_first, rule.state_rows(), coordinate);
    each_state_row([&](int row, int64_t, int64_t gradient) { to[row] = column(gradient)[0]; });
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
  DEVICE void add_weight_gradients(double* to) const {
    const auto add = [&](int64_t d, int64_t rows, int64_t x, int64_t columns) {
      for (int64_t i = thread_index(); i < rows * columns; i += kGenericThreads) {
        to[i] += product(d + i / columns, rows, x + i % columns, columns);
      }
      to += rows * columns;
    };
    const auto add_bias = [&](int64_t d, int64_t rows) {
      for (int64_t row = thread_index(); row < rows; row += kGenericThreads) to[row] += product(d + row, rows, -1, 0);
      to += rows;
    };
    if (rule.projected > 0) {
      add(layout.dproject(0), rule.projected, layout.input(0), layout.inputs);
      add_bias(layout.dproject(0), rule.projected);
    }
    for (int layer = 0; layer < rule.layers; ++layer) {
      const int64_t gates = layout.gates(layer, 0), rows = 4 * rule.hidden;
      add(gates, rows, layer == 0 ? layout.first_input(0) : layout.h(layer - 1, 1), rule.layer_inputs(layer));
      add(gates, rows, layout.h(layer, 0), rule.hidden);
      add_bias(gates, rows);
    }
    if (rule.output == Output::kNone) return;
    add(layout.dupdate(0), 1, layout.h(rule.layers - 1, 1), rule.hidden);
    add_bias(layout.dupdate(0), 1);
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
