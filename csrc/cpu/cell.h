// The mathematics of a rule for one block of coordinates: NV vectors, lane = coordinate, weights broadcast.
// Included inside the namespace of an instruction set.

// Rows of a block: row r of vector v is at at[v] + r * stride.
template <class P, int NV>
struct Rows {
  typename P::T* at[NV];
  int stride;

  INLINE typename P::V load(int row, int v) const { return P::load(at[v] + (int64_t)row * stride); }
  INLINE void store(int row, int v, typename P::V x) const { P::store(at[v] + (int64_t)row * stride, x); }
  INLINE Rows from(int row) const {
    Rows rows = *this;
    for (int v = 0; v < NV; ++v) rows.at[v] += (int64_t)row * stride;
    return rows;
  }
};

// Rows that lie one after the other, NV vectors each.
template <class P, int NV>
INLINE Rows<P, NV> dense(typename P::T* base) {
  Rows<P, NV> rows;
  for (int v = 0; v < NV; ++v) rows.at[v] = base + v * P::lanes;
  rows.stride = NV * P::lanes;
  return rows;
}

// The means of Adam's features in rows of their own.
template <class P, int NV>
INLINE Means<P> load_means(const PartConstants<typename P::T>& constants, Rows<P, NV> rows, int v) {
  const typename P::V age = rows.load(2, v);
  return {rows.load(0, v), rows.load(1, v), age, constants.one_age ? age : rows.load(3, v)};
}
template <class P, int NV>
INLINE void store_means(const PartConstants<typename P::T>& constants, Rows<P, NV> rows, int v, const Means<P>& means) {
  rows.store(0, v, means.m);
  rows.store(1, v, means.v);
  rows.store(2, v, means.age1);
  if (!constants.one_age) rows.store(3, v, means.age2);
}

// Features of the gradients, [features][NV]; their state before the step is read, and written after it, which may be
// the same place.
template <class P, int NV>
INLINE void write_features(const PartConstants<typename P::T>& constants, const typename P::T* gradient,
                           Rows<P, NV> before, Rows<P, NV> after, Rows<P, NV> out) {
  for (int v = 0; v < NV; ++v) {
    Means<P> means = {};
    typename P::V found[2];
    if (constants.has_means) means = load_means<P, NV>(constants, before, v);
    features<P>(constants, P::load(gradient + v * P::lanes), means, found);
    if (constants.has_means) store_means<P, NV>(constants, after, v, means);
    for (int k = 0; k < constants.count; ++k) out.store(k, v, found[k]);
  }
}

// d gradient from d features. `dstate` holds the gradients with respect to the features' state after the step, and then
// to that before it.
template <class P, int NV>
INLINE void read_dfeatures(const PartConstants<typename P::T>& constants, const typename P::T* gradient,
                           Rows<P, NV> after, Rows<P, NV> dfeatures, Rows<P, NV> dstate, typename P::T* dgradient) {
  for (int v = 0; v < NV; ++v) {
    Means<P> means = {}, dmeans = {};
    typename P::V found[2] = {};
    if (constants.has_means) means = load_means<P, NV>(constants, after, v);
    if (constants.has_means) dmeans = load_means<P, NV>(constants, dstate, v);
    for (int k = 0; k < constants.count; ++k) found[k] = dfeatures.load(k, v);
    const typename P::V g = P::load(gradient + v * P::lanes);
    P::store(dgradient + v * P::lanes, features_backward<P>(constants, g, means, found, dmeans));
    if (constants.has_means) store_means<P, NV>(constants, dstate, v, dmeans);
  }
}

// U units of the projection, bias + W input and its activation.
template <class P, int NV, int U>
INLINE void project_units(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> out) {
  typename P::V sums[U * NV];
  for (int u = 0; u < U; ++u, weights += inputs + 1) {
    for (int v = 0; v < NV; ++v) {
      sums[u * NV + v] = P::set1(weights[0]);
      for (int k = 0; k < inputs; ++k) {
        sums[u * NV + v] = P::fma(P::set1(weights[1 + k]), input.load(k, v), sums[u * NV + v]);
      }
    }
  }
  elu<P>(sums);
  for (int u = 0; u < U; ++u) {
    for (int v = 0; v < NV; ++v) out.store(u, v, sums[u * NV + v]);
  }
}

template <class P, int NV>
INLINE void project(const Rule& rule, const typename P::T* weights, Rows<P, NV> input, Rows<P, NV> out) {
  constexpr int U = 2;
  const int inputs = rule.inputs(), stride = inputs + 1;
  int unit = 0;
  for (; unit + U <= rule.projected; unit += U) {
    project_units<P, NV, U>(weights + (int64_t)unit * stride, input, inputs, out.from(unit));
  }
  for (; unit < rule.projected; ++unit) {
    project_units<P, NV, 1>(weights + (int64_t)unit * stride, input, inputs, out.from(unit));
  }
}

// What a rule makes of the last layer's h, without the update's scale.
template <class P, int NV>
INLINE void output(const Rule& rule, const typename P::T* weights, Rows<P, NV> h, typename P::V (&out)[NV]) {
  for (int v = 0; v < NV; ++v) out[v] = P::set1(weights[rule.hidden]);
  for (int unit = 0; unit < rule.hidden; ++unit) {
    for (int v = 0; v < NV; ++v) out[v] = P::fma(P::set1(weights[unit]), h.load(unit, v), out[v]);
  }
  if (rule.output != Output::kTanh) return;
  for (int v = 0; v < NV; ++v) out[v] = out[v] * P::set1(Constants<P>::two_log2e);
  tanh<P>(out);
}

// The sums of U units' gates, bias + W_ih input + W_hh h, times the factors of pack.h.
template <class P, int NV, int U>
INLINE void gate_sums_of_units(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> h, int hidden,
                               Rows<P, NV> sums) {
  using V = typename P::V;
  V sum[4 * U][NV];
#pragma GCC unroll 8
  for (int r = 0; r < 4 * U; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = P::set1(weights[r]);
  }
  const auto accumulate = [&](Rows<P, NV> rows, int n) INLINE_LAMBDA {
    for (int k = 0; k < n; ++k) {
      weights += 4 * U;
      V x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) x[v] = rows.load(k, v);
#pragma GCC unroll 8
      for (int r = 0; r < 4 * U; ++r) {
        const V w = P::set1(weights[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = P::fma(w, x[v], sum[r][v]);
      }
    }
  };
  accumulate(input, inputs);
  accumulate(h, hidden);
#pragma GCC unroll 8
  for (int r = 0; r < 4 * U; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums.store(r, v, sum[r][v]);
  }
}

// Row 4 * unit + gate of `sums` for all units of a layer.
template <class P, int NV>
INLINE void gate_sums(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> h, int hidden,
                      Rows<P, NV> sums) {
  constexpr int U = P::blocking.units;
  const int64_t unit_weights = 4 * (1 + inputs + hidden);
  int unit = 0;
  for (; unit + U <= hidden; unit += U) {
    gate_sums_of_units<P, NV, U>(weights + unit * unit_weights, input, inputs, h, hidden, sums.from(4 * unit));
  }
  for (; unit < hidden; ++unit) {
    gate_sums_of_units<P, NV, 1>(weights + unit * unit_weights, input, inputs, h, hidden, sums.from(4 * unit));
  }
}

// From sums to gates, in place: i, f and o through sigmoid, g through tanh.
template <class P, int NV>
INLINE void activate_gates(Rows<P, NV> gates, int hidden) {
  for (int unit = 0; unit < hidden; ++unit) {
    const Rows<P, NV> unit_gates = gates.from(4 * unit);
    typename P::V ifo[3 * NV], g[NV];
    constexpr int row[3] = {0, 1, 3};
    each<3 * NV>([&](int j) INLINE_LAMBDA { ifo[j] = unit_gates.load(row[j / NV], j % NV); });
    each<NV>([&](int v) INLINE_LAMBDA { g[v] = unit_gates.load(2, v); });
    tanh<P>(g);
    sigmoid<P>(ifo);
    each<3 * NV>([&](int j) INLINE_LAMBDA { unit_gates.store(row[j / NV], j % NV, ifo[j]); });
    each<NV>([&](int v) INLINE_LAMBDA { unit_gates.store(2, v, g[v]); });
  }
}

// One layer: gates [4 * unit + gate] and the new c and h; `save_tanh_c(unit, v, x)` receives tanh(c). h may be h_before
// and c c_before. The sums, the gates and the cells each are a loop of their own: within each the units are
// independent, and hide the latency of each other's long chains of operations.
template <class P, int NV, class Save>
INLINE void layer_forward(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> h_before,
                          Rows<P, NV> c_before, int hidden, Rows<P, NV> gates, Rows<P, NV> c, Rows<P, NV> h,
                          Save save_tanh_c) {
  gate_sums<P, NV>(weights, input, inputs, h_before, hidden, gates);
  activate_gates<P, NV>(gates, hidden);
  for (int unit = 0; unit < hidden; ++unit) {
    const Rows<P, NV> unit_gates = gates.from(4 * unit);
    typename P::V c_now[NV], tanh_c[NV];
    each<NV>([&](int v) INLINE_LAMBDA {
      c_now[v] = cell<P>(unit_gates.load(0, v), unit_gates.load(1, v), unit_gates.load(2, v), c_before.load(unit, v));
      tanh_c[v] = c_now[v] * P::set1(Constants<P>::two_log2e);
    });
    tanh<P>(tanh_c);
    each<NV>([&](int v) INLINE_LAMBDA {
      c.store(unit, v, c_now[v]);
      save_tanh_c(unit, v, tanh_c[v]);
      h.store(unit, v, unit_gates.load(3, v) * tanh_c[v]);
    });
  }
}
