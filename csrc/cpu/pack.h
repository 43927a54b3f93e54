// The rule's weights in the order in which the kernels read them, made once a call; and the way back for gradients.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace fastl2l::cpu {

// Calls visit(first, count) for blocks of `block` items, then for what is left one by one.
template <typename Visit>
void for_blocks(int n, int block, Visit visit) {
  int first = 0;
  for (; first + block <= n; first += block) visit(first, block);
  for (; first < n; ++first) visit(first, 1);
}

// Weights in `weights` are in the order of each_weight() in rule.h.
// Small problems pack as often as they step, so this writes through a pointer into memory that is kept.
template <typename T>
class Packer {
 public:
  PackedWeights<T> pack(const Rule& rule, const std::vector<const T*>& weights, Blocking blocking, bool backward) {
    data_.resize((backward ? 2 : 1) * weight_count(rule));
    layers_.resize(rule.layers);
    T* to = data_.data();
    const int hidden = rule.hidden;
    const T* projection = to;
    for (int unit = 0; unit < rule.projected; ++unit) {
      *to++ = weights[1][unit];
      to = std::copy_n(weights[0] + (int64_t)unit * rule.inputs(), rule.inputs(), to);
    }
    for (int layer = 0; layer < rule.layers; ++layer) {
      const int first = rule.layer_tensor(layer), inputs = rule.layer_inputs(layer);
      const T *w_ih = weights[first], *w_hh = weights[first + 1], *bias = weights[first + 2];
      layers_[layer].forward = to;
      to = pack_forward(w_ih, w_hh, bias, inputs, hidden, blocking.units, to);
      if (!backward) continue;
      layers_[layer].input_backward = to;
      to = pack_backward(w_ih, inputs, hidden, blocking.inputs, to);
      layers_[layer].hidden_backward = to;
      to = pack_backward(w_hh, hidden, hidden, blocking.inputs, to);
    }
    if (rule.output != Output::kNone) {
      const int first = rule.layer_tensor(rule.layers);
      *std::copy_n(weights[first], hidden, to) = *weights[first + 1];
    }
    return {projection, layers_.data(), to};
  }

 private:
  static T* pack_forward(const T* w_ih, const T* w_hh, const T* bias, int inputs, int hidden, int units, T* to) {
    for_blocks(hidden, units, [&](int first, int count) {
      const int row = 4 * count;  // of the packed block: the gates of its units
      for (int unit = 0; unit < count; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const double factor = kGateFactors[gate];
          const int64_t from = gate * hidden + first + unit;
          T* at = to + 4 * unit + gate;
          *at = (T)(factor * bias[from]);
          for (int k = 0; k < inputs; ++k) *(at += row) = (T)(factor * w_ih[from * inputs + k]);
          for (int k = 0; k < hidden; ++k) *(at += row) = (T)(factor * w_hh[from * hidden + k]);
        }
      }
      to += row * (1 + inputs + hidden);
    });
    return to;
  }

  static T* pack_backward(const T* matrix, int inputs, int hidden, int block, T* to) {
    for_blocks(inputs, block, [&](int first, int count) {
      for (int unit = 0; unit < hidden; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          to = std::copy_n(matrix + ((int64_t)gate * hidden + unit) * inputs + first, count, to);
        }
      }
    });
    return to;
  }

  std::vector<T> data_;
  std::vector<typename PackedWeights<T>::Layer> layers_;
};

// From the kernels' order, [unit][inputs, bias] of the projection, for each layer [unit][inputs, bias, h][gate], then
// the output's, to that of the weights.
template <typename T>
void unpack_gradients(const Rule& rule, const double* from, T* to) {
  if (rule.projected > 0) {
    const int inputs = rule.inputs(), columns = inputs + 1;
    for (int unit = 0; unit < rule.projected; ++unit) {
      for (int k = 0; k < inputs; ++k) *to++ = (T)from[unit * columns + k];
    }
    for (int unit = 0; unit < rule.projected; ++unit) *to++ = (T)from[unit * columns + inputs];
    from += (int64_t)rule.projected * columns;
  }
  for (int layer = 0; layer < rule.layers; ++layer) {
    const int inputs = rule.layer_inputs(layer), hidden = rule.hidden;
    const int64_t columns = inputs + 1 + hidden;
    const auto matrix = [&](int first, int width) {
      for (int gate = 0; gate < 4; ++gate) {
        for (int unit = 0; unit < hidden; ++unit) {
          for (int k = 0; k < width; ++k) *to++ = (T)from[(unit * columns + first + k) * 4 + gate];
        }
      }
    };
    matrix(0, inputs);
    matrix(inputs + 1, hidden);
    matrix(inputs, 1);
    from += (int64_t)4 * hidden * columns;
  }
  if (rule.output == Output::kNone) return;
  std::transform(from, from + rule.hidden + 1, to, [](double x) { return (T)x; });
}

}  // namespace fastl2l::cpu
