// What the kernels of every device know of a rule. Plain data only: this is compiled for every instruction set.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTL2L_HOST_DEVICE __host__ __device__
#else
#define FASTL2L_HOST_DEVICE
#endif

namespace fastl2l {

// State is kept in tiles of 16 coordinates, [tile][row][16]: a tile's rows are neighbours in memory, whatever N is.
constexpr int kTile = 16;

enum class Features : int32_t { kNone, kRaw, kLogSign, kAdam, kLogAndSign };
enum class Projection : int32_t { kNone, kElu };
enum class Output : int32_t { kLinear, kTanh, kNone };

// The parts of a rule; rule_text.h reads them from its text.
struct Rule {
  Features features = Features::kNone;
  double constants[3] = {0, 0, 0};  // of the features, as the text has them
  int given = 0;                    // rows of input from outside
  Projection projection = Projection::kNone;
  int projected = 0;  // units of the projection
  int layers = 0, hidden = 0;
  Output output = Output::kLinear;
  double update_scale = 1;

  FASTL2L_HOST_DEVICE int feature_count() const {
    return features == Features::kNone ? 0 : (features == Features::kRaw ? 1 : 2);
  }
  // Of the means of Adam's features: two, and the weights that correct them.
  FASTL2L_HOST_DEVICE int feature_rows() const {
    return features != Features::kAdam ? 0 : (constants[0] == constants[1] ? 3 : 4);
  }
  // What the network of a coordinate reads: features, then given rows.
  FASTL2L_HOST_DEVICE int inputs() const { return feature_count() + given; }
  FASTL2L_HOST_DEVICE int layer_inputs(int layer) const {
    return layer > 0 ? hidden : (projected > 0 ? projected : inputs());
  }
  FASTL2L_HOST_DEVICE int lstm_rows() const { return 2 * layers * hidden; }
  FASTL2L_HOST_DEVICE int state_rows() const { return lstm_rows() + feature_rows(); }
  // Tensors of weights, and the first of a layer's.
  FASTL2L_HOST_DEVICE int layer_tensor(int layer) const { return (projected > 0 ? 2 : 0) + 3 * layer; }
  FASTL2L_HOST_DEVICE int tensors() const { return layer_tensor(layers) + (output == Output::kNone ? 0 : 2); }
};

FASTL2L_HOST_DEVICE constexpr int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

// Calls visit(dimensions, rows, columns) for each tensor of weights, in their order.
template <class Visit>
void each_weight(const Rule& rule, Visit visit) {
  if (rule.projected > 0) {
    visit(2, rule.projected, rule.inputs());
    visit(1, rule.projected, 1);
  }
  for (int layer = 0; layer < rule.layers; ++layer) {
    visit(2, 4 * rule.hidden, rule.layer_inputs(layer));
    visit(2, 4 * rule.hidden, rule.hidden);
    visit(1, 4 * rule.hidden, 1);
  }
  if (rule.output == Output::kNone) return;
  visit(1, rule.hidden, 1);
  visit(0, 1, 1);
}

// How many weights a rule has.
inline int64_t weight_count(const Rule& rule) {
  int64_t count = 0;
  each_weight(rule, [&](int, int64_t rows, int64_t columns) { count += rows * columns; });
  return count;
}

// The constants of a rule's parts in the dtype that it computes in.
template <typename T>
struct PartConstants {
  Features features;
  int count;       // features, of a gradient
  bool has_means;  // a state of their own
  bool one_age;    // both means of Adam's features are of the same age
  T scale;         // of raw
  T p, inverse_p, threshold, slope;
  T beta1, beta2, new1, new2, epsilon;

  PartConstants() = default;
  // exp(-p) and exp(p) come from outside: what is compiled here must be free of the standard library.
  PartConstants(const Rule& rule, double exp_minus_p, double exp_p)
      : features(rule.features),
        count(rule.feature_count()),
        has_means(rule.feature_rows() > 0),
        one_age(rule.constants[0] == rule.constants[1]),
        scale((T)rule.constants[0]),
        p((T)rule.constants[0]),
        inverse_p((T)(1 / rule.constants[0])),
        threshold((T)exp_minus_p),
        slope((T)exp_p),
        beta1((T)rule.constants[0]),
        beta2((T)rule.constants[1]),
        new1((T)(1 - rule.constants[0])),
        new2((T)(1 - rule.constants[1])),
        epsilon((T)rule.constants[2]) {}
};

// What the gates' sums are multiplied by, in the order i, f, g, o: the kernels take powers of 2 of them, -x log2(e) for
// sigmoid and 2 x log2(e) for tanh.
constexpr double kLog2E = 1.4426950408889634;
constexpr double kGateFactors[4] = {-kLog2E, -kLog2E, 2 * kLog2E, -kLog2E};

}  // namespace fastl2l
