// The rule's weights in the order in which the kernels read them, made once a call; and the way back for gradients.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/kernels.h"

namespace fastl2l::cpu {

// What the gates' sums are multiplied by, in the order i, f, g, o: the kernels take powers of 2 of them, -x log2(e) for
// sigmoid and 2 x log2(e) for tanh.
constexpr double kLog2E = 1.4426950408889634;
constexpr double kGateFactors[4] = {-kLog2E, -kLog2E, 2 * kLog2E, -kLog2E};

// Calls visit(first, count) for blocks of `block` items, then for what is left one by one.
template <typename Visit>
void for_blocks(int n, int block, Visit visit) {
  int first = 0;
  for (; first + block <= n; first += block) visit(first, block);
  for (; first < n; ++first) visit(first, 1);
}

// Weights in `weights` are W_ih, W_hh and bias of each layer, then w_out and b_out (see LSTMConfig.weight_shapes).
template <typename T>
class Packer {
 public:
  PackedWeights<T> pack(const Rule& rule, const std::vector<const T*>& weights, Blocking blocking, bool backward) {
    data_.clear();
    std::vector<std::array<size_t, 3>> offsets;
    for (int layer = 0; layer < rule.layers; ++layer) {
      const T *w_ih = weights[3 * layer], *w_hh = weights[3 * layer + 1], *bias = weights[3 * layer + 2];
      const int inputs = rule.inputs(layer), hidden = rule.hidden;
      offsets.push_back({data_.size(), 0, 0});
      pack_forward(w_ih, w_hh, bias, inputs, hidden, blocking.units);
      if (!backward) continue;
      offsets.back()[1] = data_.size();
      pack_backward(w_ih, inputs, hidden, blocking.inputs);
      offsets.back()[2] = data_.size();
      pack_backward(w_hh, hidden, hidden, blocking.inputs);
    }
    const size_t out = data_.size();
    data_.insert(data_.end(), weights[3 * rule.layers], weights[3 * rule.layers] + rule.hidden);
    data_.push_back(*weights[3 * rule.layers + 1]);
    layers_.clear();
    for (const auto& at : offsets) layers_.push_back({&data_[at[0]], &data_[at[1]], &data_[at[2]]});
    return {layers_.data(), &data_[out]};
  }

 private:
  void pack_forward(const T* w_ih, const T* w_hh, const T* bias, int inputs, int hidden, int units) {
    for_blocks(hidden, units, [&](int first, int count) {
      const auto column = [&](const T* matrix, int width, int k) {
        for (int unit = first; unit < first + count; ++unit) {
          for (int gate = 0; gate < 4; ++gate) {
            data_.push_back((T)(kGateFactors[gate] * matrix[(gate * hidden + unit) * width + k]));
          }
        }
      };
      column(bias, 1, 0);
      for (int k = 0; k < inputs; ++k) column(w_ih, inputs, k);
      for (int k = 0; k < hidden; ++k) column(w_hh, hidden, k);
    });
  }

  void pack_backward(const T* matrix, int inputs, int hidden, int block) {
    for_blocks(inputs, block, [&](int first, int count) {
      for (int unit = 0; unit < hidden; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const T* row = matrix + (gate * hidden + unit) * inputs + first;
          data_.insert(data_.end(), row, row + count);
        }
      }
    });
  }

  std::vector<T> data_;  // keeps its memory from call to call
  std::vector<typename PackedWeights<T>::Layer> layers_;
};

// How many weights a rule has.
inline int64_t weight_count(const Rule& rule) {
  int64_t n = rule.hidden + 1;
  for (int layer = 0; layer < rule.layers; ++layer) n += 4 * rule.hidden * (rule.inputs(layer) + 1 + rule.hidden);
  return n;
}

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
