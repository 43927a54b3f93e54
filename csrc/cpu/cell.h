// The mathematics of the LSTM rule for one block of coordinates: NV vectors, lane = coordinate, weights broadcast.
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

// Features of the gradients, [features][NV]; reference.py says what they are.
template <class P, int NV>
INLINE void write_features(const Rule& rule, const typename P::T* gradient, Rows<P, NV> out) {
  using V = typename P::V;
  using T = typename P::T;
  for (int v = 0; v < NV; ++v) {
    const V g = P::load(gradient + v * P::lanes);
    if (!rule.log_sign) {
      out.store(0, v, P::set1((T)rule.constant) * g);
      continue;
    }
    const V one = P::set1(1), zero = P::set1(0);
    const V magnitude = g < zero ? -g : g;
    const V logarithm = log<P>(magnitude) / P::set1((T)rule.constant);
    const auto large = magnitude >= P::set1((T)rule.log_sign_threshold);
    out.store(0, v, large ? logarithm : (g == g ? -one : g));
    out.store(1, v, large ? (g < zero ? -one : one) : g * P::set1((T)rule.log_sign_slope));
  }
}

// d gradient from d features.
template <class P, int NV>
INLINE void features_backward(const Rule& rule, const typename P::T* gradient, Rows<P, NV> dfeatures,
                              typename P::T* dgradient) {
  using V = typename P::V;
  using T = typename P::T;
  for (int v = 0; v < NV; ++v) {
    const V g = P::load(gradient + v * P::lanes);
    V result;
    if (!rule.log_sign) {
      result = P::set1((T)rule.constant) * dfeatures.load(0, v);
    } else {
      const V magnitude = g < P::set1(0) ? -g : g;
      const auto large = magnitude >= P::set1((T)rule.log_sign_threshold);
      result = large ? dfeatures.load(0, v) / (P::set1((T)rule.constant) * g)
                     : dfeatures.load(1, v) * P::set1((T)rule.log_sign_slope);
    }
    P::store(dgradient + v * P::lanes, result);
  }
}

// The gates of U units before their activations: bias + W_ih input + W_hh h.
template <class P, int NV, int U>
INLINE void gate_sums(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> h, int hidden,
                      typename P::V (&sum)[U][4][NV]) {
  using V = typename P::V;
#pragma GCC unroll 8
  for (int r = 0; r < 4 * U; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r / 4][r % 4][v] = P::set1(weights[r]);
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
        for (int v = 0; v < NV; ++v) sum[r / 4][r % 4][v] = P::fma(w, x[v], sum[r / 4][r % 4][v]);
      }
    }
  };
  accumulate(input, inputs);
  accumulate(h, hidden);
}

template <class P>
struct Cell {
  typename P::V i, f, g, o, c, tanh_c, h;
};

template <class P>
INLINE Cell<P> cell_forward(typename P::V i, typename P::V f, typename P::V g, typename P::V o,
                            typename P::V c_before) {
  Cell<P> cell;
  cell.i = sigmoid<P>(i);
  cell.f = sigmoid<P>(f);
  cell.g = tanh<P>(g);
  cell.o = sigmoid<P>(o);
  cell.c = P::fma(cell.f, c_before, cell.i * cell.g);
  cell.tanh_c = tanh<P>(cell.c);
  cell.h = cell.o * cell.tanh_c;
  return cell;
}

// One layer: `save(unit, v, cell)` receives the activations of every unit. U units at a time, then one by one.
template <class P, int NV, int U, class Save>
INLINE void layer_units(const typename P::T* weights, int first, int last, Rows<P, NV> input, int inputs, Rows<P, NV> h,
                        int hidden, Rows<P, NV> c_before, Save save) {
  for (int unit = first; unit < last; unit += U) {
    typename P::V sum[U][4][NV];
    gate_sums<P, NV, U>(weights + (int64_t)unit * 4 * (1 + inputs + hidden), input, inputs, h, hidden, sum);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        save(unit + u, v,
             cell_forward<P>(sum[u][0][v], sum[u][1][v], sum[u][2][v], sum[u][3][v], c_before.load(unit + u, v)));
      }
    }
  }
}

template <class P, int NV, class Save>
INLINE void layer_forward(const typename P::T* weights, Rows<P, NV> input, int inputs, Rows<P, NV> h, int hidden,
                          Rows<P, NV> c_before, Save save) {
  constexpr int U = P::blocking.units;
  const int whole = hidden / U * U;
  layer_units<P, NV, U>(weights, 0, whole, input, inputs, h, hidden, c_before, save);
  if constexpr (U > 1) layer_units<P, NV, 1>(weights, whole, hidden, input, inputs, h, hidden, c_before, save);
}
