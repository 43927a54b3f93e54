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

// Weights in `weights` are W_ih, W_hh and bias of each layer, then w_out and b_out (see LSTMConfig.weight_shapes).
// Small problems pack as often as they step, so this writes through a pointer into memory that is kept.
template <typename T>
class Packer {
 public:
  PackedWeights<T> pack(const Rule& rule, const std::vector<const T*>& weights, Blocking blocking, bool backward) {
    data_.resize((backward ? 2 : 1) * weight_count(rule));
    layers_.resize(rule.layers);
    T* to = data_.data();
    const int hidden = rule.hidden;
    for (int layer = 0; layer < rule.layers; ++layer) {
      const T *w_ih = weights[3 * layer], *w_hh = weights[3 * layer + 1], *bias = weights[3 * layer + 2];
      const int inputs = rule.inputs(layer);
      layers_[layer].forward = to;
      to = pack_forward(w_ih, w_hh, bias, inputs, hidden, blocking.units, to);
      if (!backward) continue;
      layers_[layer].input_backward = to;
      to = pack_backward(w_ih, inputs, hidden, blocking.inputs, to);
      layers_[layer].hidden_backward = to;
      to = pack_backward(w_hh, hidden, hidden, blocking.inputs, to);
    }
    const T* out = to;
    to = std::copy_n(weights[3 * rule.layers], hidden, to);
    *to = *weights[3 * rule.layers + 1];
    return {layers_.data(), out};
  }

 private:
  static T* pack_forward(const T* w_ih, const T* w_hh, const T* bias, int inputs, int hidden, int units, T* to) {
    for_blocks(hidden, units, [&](int first, int count) {
      const int row = 4 * count;  // of the packed block: the gates of its units
      for (int unit = 0; unit < count; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const double factor = kGateFactors[gate];
          const int from = gate * hidden + first + unit;
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
          to = std::copy_n(matrix + (gate * hidden + unit) * inputs + first, count, to);
        }
      }
    });
    return to;
  }

  std::vector<T> data_;
  std::vector<typename PackedWeights<T>::Layer> layers_;
};

// From the kernels' order, for each layer [unit][inputs, bias, h][gate], to that of the weights.
template <typename T>
void unpack_gradients(const Rule& rule, const double* from, T* to) {
  for (int layer = 0; layer < rule.layers; ++layer) {
    const int inputs = rule.inputs(layer), hidden = rule.hidden, columns = inputs + 1 + hidden;
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
  std::transform(from, from + rule.hidden + 1, to, [](double x) { return (T)x; });
}

}  // namespace fastl2l::cpu
