// Gradient of a window of truncated BPTT with respect to the rule's weights. For one block of coordinates at a time:
// the activations of all steps are recomputed into a workspace that stays in cache, the window is walked in reverse,
// gate gradients overwriting the gates, and the weight gradients are one small matrix product over lanes and steps.
// Included inside the namespace of an instruction set.

// Where the workspace of one block keeps what; counted in rows of NV vectors.
struct WindowLayout {
  int layers, hidden, inputs, projected, feature_state;
  int64_t steps;

  WindowLayout(const Rule& rule, int64_t all_steps)
      : layers(rule.layers),
        hidden(rule.hidden),
        inputs(rule.inputs()),
        projected(rule.projected),
        feature_state(rule.feature_rows()),
        steps(all_steps) {}

  // inputs, what is projected of them, and h end with a row of ones, the input of the biases
  int64_t input_rows() const { return inputs + 1; }
  int64_t projected_rows() const { return projected > 0 ? projected + 1 : 0; }
  int64_t h_rows() const { return hidden + 1; }
  int64_t gates(int layer, int64_t t) const { return (layer * steps + t) * 4 * hidden; }
  int64_t tanh_c(int layer, int64_t t) const { return gates(layers, 0) + (layer * steps + t) * hidden; }
  // h and c have steps + 1 entries: entry t is the state before step t
  int64_t h(int layer, int64_t t) const { return tanh_c(layers, 0) + (layer * (steps + 1) + t) * h_rows(); }
  int64_t c(int layer, int64_t t) const { return h(layers, 0) + (layer * (steps + 1) + t) * hidden; }
  int64_t input(int64_t t) const { return c(layers, 0) + t * input_rows(); }
  int64_t gradient(int64_t t) const { return input(steps) + t; }
  int64_t dupdate(int64_t t) const { return gradient(steps) + t; }
  int64_t project(int64_t t) const { return dupdate(steps) + t * projected_rows(); }
  int64_t dproject(int64_t t) const { return project(steps) + t * projected; }
  // of the features, steps + 1 entries too
  int64_t state(int64_t t) const { return dproject(steps) + t * feature_state; }
  int64_t rows() const { return state(steps + 1); }
  // what the first layer reads
  int64_t first_input(int64_t t) const { return projected > 0 ? project(t) : input(t); }
  int64_t first_input_rows() const { return projected > 0 ? projected_rows() : input_rows(); }
  // carried backwards through time, once a thread: dh and dc, the gradient of a layer's input, of the rule's inputs,
  // and of the features' state
  int64_t dinput() const { return 2 * layers * hidden; }
  int64_t dinputs() const { return dinput() + (projected > hidden ? projected : hidden); }
  int64_t dstate() const { return dinputs() + inputs; }
  int64_t carry_rows() const { return dstate() + feature_state; }
};

// Blocks whose weight gradients are summed before they are reduced over lanes: with few steps the reduction would
// otherwise cost more than the product.
inline int64_t blocks_together(int64_t steps) { return steps >= 16 ? 1 : 16 / steps; }

inline size_t window_scratch(const Rule& rule, int64_t steps) {
  const WindowLayout layout(rule, steps);
  return (size_t)kMaxBlockLanes * (blocks_together(steps) * layout.rows() + layout.carry_rows());
}

template <class P, int NV>
struct WindowBlock {
  using T = typename P::T;
  using V = typename P::V;
  static constexpr int lanes = NV * P::lanes;

  const WindowArgs<T>& args;
  const WindowLayout layout;
  T* base;
  T* carry;
  int64_t first;  // coordinate

  INLINE Rows<P, NV> rows(int64_t row) const { return dense<P, NV>(base + row * lanes); }
  INLINE Rows<P, NV> dh(int layer) const { return dense<P, NV>(carry + (int64_t)2 * layer * layout.hidden * lanes); }
  INLINE Rows<P, NV> dc(int layer) const { return dh(layer).from(layout.hidden); }
  INLINE Rows<P, NV> carried(int64_t row) const { return dense<P, NV>(carry + row * lanes); }
  INLINE int64_t valid() const { return args.numel - first < lanes ? args.numel - first : lanes; }

  // Calls visit(row of the state, where it is kept before the first step, its gradient) for every row of the state.
  template <class Visit>
  INLINE void each_state_row(Visit visit) const {
    int row = 0;
    for (int layer = 0; layer < layout.layers; ++layer) {
      for (int unit = 0; unit < layout.hidden; ++unit, ++row)
        visit(row, layout.h(layer, 0) + unit, dh(layer).from(unit));
      for (int unit = 0; unit < layout.hidden; ++unit, ++row)
        visit(row, layout.c(layer, 0) + unit, dc(layer).from(unit));
    }
    for (int i = 0; i < layout.feature_state; ++i, ++row) {
      visit(row, layout.state(0) + i, carried(layout.dstate() + i));
    }
  }
  // Rows of tensors [tile][rows][16]: the lanes of this block that lie in one tile are next to each other in them.
  static constexpr int run = lanes < kTile ? lanes : kTile;
  INLINE int64_t row_at(int rows, int row, int lane) const {
    const int64_t coordinate = first + lane;
    return (coordinate / kTile * rows + row) * kTile + coordinate % kTile;
  }
  // Lanes that are no coordinate's are read, and written, as 0.
  INLINE void read_row(const T* from, int rows, int row, T* target) const {
    const int64_t n = valid();
    for (int lane = 0; lane < lanes; lane += run) {
      const T* at = from + row_at(rows, row, lane);
      if (lane + run <= n) {
        for (int i = 0; i < run; i += P::lanes) P::store(target + lane + i, P::load(at + i));
      } else {
        for (int i = 0; i < run; ++i) target[lane + i] = lane + i < n ? at[i] : T(0);
      }
    }
  }
  INLINE void write_row(T* to, int rows, int row, const T* source) const {
    const int64_t n = valid();
    for (int lane = 0; lane < lanes; lane += run) {
      T* at = to + row_at(rows, row, lane);
      if (lane + run <= n) {
        for (int i = 0; i < run; i += P::lanes) P::store(at + i, P::load(source + lane + i));
      } else {
        for (int i = 0; i < run; ++i) at[i] = lane + i < n ? source[lane + i] : T(0);
      }
    }
  }
  INLINE void add_to_row(T* to, int rows, int row, const T* source) const {
    const int64_t n = valid();
    for (int lane = 0; lane < lanes; lane += run) {
      T* at = to + row_at(rows, row, lane);
      if (lane + run <= n) {
        for (int i = 0; i < run; i += P::lanes) P::store(at + i, P::load(at + i) + P::load(source + lane + i));
      } else {
        for (int i = 0; lane + i < n; ++i) at[i] += source[lane + i];
      }
    }
  }
  INLINE void read_coordinates(const T* source, T* target) const {
    const int64_t n = valid();
    for (int i = 0; i < lanes; ++i) target[i] = i < n ? source[first + i] : T(0);
  }

  // Where given rows of step t begin.
  INLINE int64_t given_at(int64_t t) const { return t * tiles_of(args.numel) * args.given_rows * kTile; }

  INLINE void load_inputs() const {
    each_state_row([&](int row, int64_t kept, Rows<P, NV>)
                       INLINE_LAMBDA { read_row(args.state, args.rule.state_rows(), row, base + kept * lanes); });
    for (int64_t t = 0; t < layout.steps; ++t) {
      T* gradient = base + layout.gradient(t) * lanes;
      read_coordinates(args.grads + t * args.numel, gradient);
      write_features<P, NV>(args.constants, gradient, rows(layout.state(t)), rows(layout.state(t + 1)),
                            rows(layout.input(t)));
      T* given = base + (layout.input(t) + args.rule.feature_count()) * lanes;
      for (int k = 0; k < args.rule.given; ++k) {
        read_row(args.given + given_at(t), args.given_rows, k, given + k * lanes);
      }
      write_ones(layout.input(t) + layout.inputs);
      if (layout.projected > 0) write_ones(layout.project(t) + layout.projected);
      for (int layer = 0; layer < layout.layers; ++layer) write_ones(layout.h(layer, t + 1) + layout.hidden);
      load_adjoints(t);
    }
  }
  INLINE void load_adjoints(int64_t t) const {
    if (args.adjoints) read_coordinates(args.adjoints + t * args.numel, base + layout.dupdate(t) * lanes);
    const Rows<P, NV> dupdate = rows(layout.dupdate(t));
    for (int v = 0; v < NV; ++v) {
      const V adjoint = args.adjoints ? dupdate.load(0, v) : P::set1(0);
      dupdate.store(0, v, adjoint * P::set1((T)args.rule.update_scale));
    }
  }
  INLINE void write_ones(int64_t row) const {
    for (int v = 0; v < NV; ++v) rows(row).store(0, v, P::set1(1));
  }

  INLINE void forward() const {
    for (int64_t t = 0; t < layout.steps; ++t) {
      Rows<P, NV> input = rows(layout.input(t));
      if (layout.projected > 0) {
        project<P, NV>(args.rule, args.weights.projection, input, rows(layout.project(t)));
        input = rows(layout.project(t));
      }
      for (int layer = 0; layer < layout.layers; ++layer) {
        const Rows<P, NV> tanh_c = rows(layout.tanh_c(layer, t)), h = rows(layout.h(layer, t + 1));
        layer_forward<P, NV>(args.weights.layer[layer].forward, input, args.rule.layer_inputs(layer),
                             rows(layout.h(layer, t)), rows(layout.c(layer, t)), layout.hidden,
                             rows(layout.gates(layer, t)), rows(layout.c(layer, t + 1)), h,
                             [&](int unit, int v, V x) INLINE_LAMBDA { tanh_c.store(unit, v, x); });
        input = h;
      }
      if (args.rule.output == Output::kTanh) output_backward(input, t);
    }
  }

  // The gradient of w_out . h + b_out, in place of that of its tanh.
  INLINE void output_backward(Rows<P, NV> h, int64_t t) const {
    const Rows<P, NV> dupdate = rows(layout.dupdate(t));
    V out[NV];
    output<P, NV>(args.rule, args.weights.out, h, out);
    for (int v = 0; v < NV; ++v) dupdate.store(0, v, tanh_backward<P>(out[v], dupdate.load(0, v)));
  }

  // Gate gradients of one layer and step, in place of the gates; dh and dc of the step before.
  INLINE void cells_backward(int layer, int64_t t) const {
    const bool last = layer + 1 == layout.layers, has_output = args.rule.output != Output::kNone;
    const Rows<P, NV> gates = rows(layout.gates(layer, t)), tanh_c = rows(layout.tanh_c(layer, t));
    const Rows<P, NV> c_before = rows(layout.c(layer, t)), dupdate = rows(layout.dupdate(t));
    const Rows<P, NV> dh_rows = dh(layer), dc_rows = dc(layer), from_above = carried(layout.dinput());
    for (int unit = 0; unit < layout.hidden; ++unit) {
      const V w_out = P::set1(has_output ? args.weights.out[unit] : T(0));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V above = !last        ? dh_rows.load(unit, v) + from_above.load(unit, v)
                        : has_output ? P::fma(w_out, dupdate.load(0, v), dh_rows.load(unit, v))
                                     : dh_rows.load(unit, v);
        V dc_now = dc_rows.load(unit, v), dgates[4];
        cell_backward<P>(gates.load(4 * unit, v), gates.load(4 * unit + 1, v), gates.load(4 * unit + 2, v),
                         gates.load(4 * unit + 3, v), tanh_c.load(unit, v), c_before.load(unit, v), above, dc_now,
                         dgates);
        for (int gate = 0; gate < 4; ++gate) gates.store(4 * unit + gate, v, dgates[gate]);
        dc_rows.store(unit, v, dc_now);
      }
    }
  }

  // out[k] = sum over gates of W[gate][k] * dgate, K inputs at a time.
  template <int K>
  INLINE void inputs_block(const T* weights, Rows<P, NV> dgates, Rows<P, NV> out) const {
    V sum[K][NV];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[k][v] = P::set1(0);
    }
    for (int row = 0; row < 4 * layout.hidden; ++row) {
      V d[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) d[v] = dgates.load(row, v);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const V w = P::set1(weights[row * K + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[k][v] = P::fma(w, d[v], sum[k][v]);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) out.store(k, v, sum[k][v]);
    }
  }
  INLINE void inputs_backward(const T* weights, int inputs, Rows<P, NV> dgates, Rows<P, NV> out) const {
    constexpr int K = P::blocking.inputs;
    int k = 0;
    for (; k + K <= inputs; k += K) inputs_block<K>(weights + (int64_t)k * 4 * layout.hidden, dgates, out.from(k));
    for (; k < inputs; ++k) inputs_block<1>(weights + (int64_t)k * 4 * layout.hidden, dgates, out.from(k));
  }

  // Whether the way back goes on to the rule's inputs.
  INLINE bool needs_inputs() const {
    return args.dgrads || args.dgiven || (args.dstate_first && layout.feature_state > 0);
  }

  INLINE void backward() const {
    each_state_row([&](int row, int64_t, Rows<P, NV> gradient) INLINE_LAMBDA {
      if (args.dstate) {
        read_row(args.dstate, args.rule.state_rows(), row, gradient.at[0]);
      } else {
        for (int v = 0; v < NV; ++v) gradient.store(0, v, P::set1(0));
      }
    });
    const Rows<P, NV> dinput = carried(layout.dinput());
    for (int64_t t = layout.steps - 1; t >= 0; --t) {
      for (int layer = layout.layers - 1; layer >= 0; --layer) {
        cells_backward(layer, t);
        const auto& weights = args.weights.layer[layer];
        const Rows<P, NV> dgates = rows(layout.gates(layer, t));
        inputs_backward(weights.hidden_backward, layout.hidden, dgates, dh(layer));
        if (layer > 0) {
          inputs_backward(weights.input_backward, layout.hidden, dgates, dinput);
        } else if (layout.projected > 0) {
          inputs_backward(weights.input_backward, layout.projected, dgates, dinput);
          projection_backward(dinput, t);
        } else if (needs_inputs()) {
          inputs_backward(weights.input_backward, layout.inputs, dgates, carried(layout.dinputs()));
        }
      }
      if (needs_inputs()) write_dinputs(t);
    }
    if (args.dstate_first) {
      each_state_row([&](int row, int64_t, Rows<P, NV> gradient)
                         INLINE_LAMBDA { write_row(args.dstate_first, args.rule.state_rows(), row, gradient.at[0]); });
    }
  }

  INLINE void projection_backward(Rows<P, NV> dprojected, int64_t t) const {
    const Rows<P, NV> projected = rows(layout.project(t)), sums = rows(layout.dproject(t));
    for (int unit = 0; unit < layout.projected; ++unit) {
      for (int v = 0; v < NV; ++v) {
        sums.store(unit, v, elu_backward<P>(projected.load(unit, v), dprojected.load(unit, v)));
      }
    }
    if (!needs_inputs()) return;
    const Rows<P, NV> dinputs = carried(layout.dinputs());
    for (int k = 0; k < layout.inputs; ++k) {
      for (int v = 0; v < NV; ++v) {
        V sum = P::set1(0);
        for (int unit = 0; unit < layout.projected; ++unit) {
          const T weight = args.weights.projection[(int64_t)unit * (layout.inputs + 1) + 1 + k];
          sum = P::fma(P::set1(weight), sums.load(unit, v), sum);
        }
        dinputs.store(k, v, sum);
      }
    }
  }

  INLINE void write_dinputs(int64_t t) const {
    alignas(64) T dgradient[lanes];
    const Rows<P, NV> dinputs = carried(layout.dinputs());
    read_dfeatures<P, NV>(args.constants, base + layout.gradient(t) * lanes, rows(layout.state(t + 1)), dinputs,
                          carried(layout.dstate()), dgradient);
    if (args.dgrads) {
      for (int64_t i = 0, n = valid(); i < n; ++i) args.dgrads[t * args.numel + first + i] = dgradient[i];
    }
    if (!args.dgiven) return;
    const T* found = dinputs.from(args.rule.feature_count()).at[0];
    for (int k = 0; k < args.rule.given; ++k) {
      if (args.adds_dgiven) {
        add_to_row(args.dgiven + given_at(t), args.given_rows, k, found + k * lanes);
      } else {
        write_row(args.dgiven + given_at(t), args.given_rows, k, found + k * lanes);
      }
    }
  }
};

// dweights[x][row] += sum over blocks, steps and lanes of d[row] * x[k], for R rows and X inputs.
// `block_rows` rows lie between blocks, `d_step` and `x_step` rows between steps.
template <class P, int NV, int R, int X>
INLINE void outer_block(const typename P::T* d, int64_t d_step, const typename P::T* x, int64_t x_step, int64_t blocks,
                        int64_t block_rows, int64_t steps, double* dweights) {
  using V = typename P::V;
  constexpr int lanes = NV * P::lanes;
  V sum[X][R];
#pragma GCC unroll 8
  for (int k = 0; k < X; ++k) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[k][r] = P::set1(0);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const typename P::T* d_at = d + b * block_rows * lanes;
    const typename P::T* x_at = x + b * block_rows * lanes;
    for (int64_t t = 0; t < steps; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        V dv[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) dv[r] = P::load(d_at + r * lanes + v * P::lanes);
#pragma GCC unroll 8
        for (int k = 0; k < X; ++k) {
          const V xv = P::load(x_at + k * lanes + v * P::lanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[k][r] = P::fma(dv[r], xv, sum[k][r]);
        }
      }
      d_at += d_step * lanes;
      x_at += x_step * lanes;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < X; ++k) {
    if constexpr (R == 4) {
      P::add_sums(sum[k][0], sum[k][1], sum[k][2], sum[k][3], dweights + k * R);
    } else {
      double sums[4];
      for (int i = 0; i < 4; ++i) sums[i] = 0;
      P::add_sums(sum[k][0], P::set1(0), P::set1(0), P::set1(0), sums);
      dweights[k] += sums[0];
    }
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<n>), 1 <= n <= Most.
template <int Most, class F>
INLINE void with_constant(int n, F f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, f);
  }
  f(Constant<Most>());
}

// The weight gradients of one matrix of `rows` / R row groups and `inputs` columns, laid out [group][input][R].
template <class P, int NV, int R>
INLINE void outer_product(const typename P::T* d, int64_t d_step, int rows, const typename P::T* x, int64_t x_step,
                          int inputs, int64_t blocks, int64_t block_rows, int64_t steps, double* dweights,
                          int64_t group_stride) {
  constexpr int lanes = NV * P::lanes;
  // Inputs outside: the few rows of x stay in L1 while all rows of d stream past. Blocks are as equal as can be, so
  // that none is so small that loads outnumber multiply-adds.
  const int input_blocks = (inputs + P::outer_inputs - 1) / P::outer_inputs;
  for (int b = 0, k = 0; b < input_blocks; ++b) {
    const int size = (inputs - k) / (input_blocks - b);
    with_constant<P::outer_inputs>(size, [&](auto constant) INLINE_LAMBDA {
      for (int r = 0; r < rows; r += R) {
        outer_block<P, NV, R, constant.value>(d + r * lanes, d_step, x + k * lanes, x_step, blocks, block_rows, steps,
                                              dweights + (r / R) * group_stride + k * R);
      }
    });
    k += size;
  }
}

// `dweights`: [projected][inputs, bias], for each layer [unit][inputs, bias, h][4], then [out][hidden + 1].
template <class P, int NV>
INLINE void weight_gradients(const Rule& rule, const WindowLayout& layout, typename P::T* base, int64_t blocks,
                             double* dweights) {
  constexpr int lanes = NV * P::lanes;
  const auto at = [&](int64_t row) { return base + row * lanes; };
  const int hidden = rule.hidden;
  const int64_t block_rows = layout.rows(), steps = layout.steps;
  if (rule.projected > 0) {
    const int columns = layout.inputs + 1;
    outer_product<P, NV, 1>(at(layout.dproject(0)), layout.projected, layout.projected, at(layout.input(0)),
                            layout.input_rows(), columns, blocks, block_rows, steps, dweights, columns);
    dweights += (int64_t)rule.projected * columns;
  }
  for (int layer = 0; layer < rule.layers; ++layer) {
    const auto product = [&](int64_t x, int64_t x_step, int inputs, int column, int64_t group) INLINE_LAMBDA {
      outer_product<P, NV, 4>(at(layout.gates(layer, 0)), 4 * hidden, 4 * hidden, at(x), x_step, inputs, blocks,
                              block_rows, steps, dweights + 4 * column, group);
    };
    const int inputs = rule.layer_inputs(layer);
    const int64_t group = 4 * ((int64_t)inputs + 1 + hidden);
    if (layer == 0) {
      product(layout.first_input(0), layout.first_input_rows(), inputs + 1, 0, group);
    } else {
      product(layout.h(layer - 1, 1), layout.h_rows(), inputs + 1, 0, group);
    }
    product(layout.h(layer, 0), layout.h_rows(), hidden, inputs + 1, group);
    dweights += hidden * group;
  }
  if (rule.output == Output::kNone) return;
  outer_product<P, NV, 1>(at(layout.dupdate(0)), 1, 1, at(layout.h(rule.layers - 1, 1)), layout.h_rows(), hidden + 1,
                          blocks, block_rows, steps, dweights, 0);
}

template <class P, int NV>
void window_blocks(const WindowArgs<typename P::T>& args, int64_t first, int64_t blocks, double* dweights,
                   typename P::T* scratch) {
  constexpr int lanes = NV * P::lanes;
  const WindowLayout layout(args.rule, args.steps);
  const int64_t together = blocks_together(args.steps);
  typename P::T* carry = scratch + together * layout.rows() * lanes;
  for (int64_t done = 0; done < blocks; done += together) {
    const int64_t now = blocks - done < together ? blocks - done : together;
    for (int64_t b = 0; b < now; ++b) {
      const WindowBlock<P, NV> block{args, layout, scratch + b * layout.rows() * lanes, carry,
                                     (first + (done + b) * lanes)};
      block.load_inputs();
      block.forward();
      block.backward();
    }
    weight_gradients<P, NV>(args.rule, layout, scratch, now, dweights);
  }
}

template <class P>
void window_backward(const WindowArgs<typename P::T>& args, int64_t begin, int64_t end, double* dweights,
                     typename P::T* scratch) {
  constexpr int lanes = P::vectors * P::lanes;
  const int64_t first = begin * kTile, last = end * kTile;
  const int64_t whole = (last - first) / lanes;
  window_blocks<P, P::vectors>(args, first, whole, dweights, scratch);
  if constexpr (lanes > kTile) {  // an odd tile at the end
    if (first + whole * lanes < last) {
      window_blocks<P, kTile / P::lanes>(args, first + whole * lanes, 1, dweights, scratch);
    }
  }
}
