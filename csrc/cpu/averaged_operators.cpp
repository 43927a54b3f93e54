// Steps and windows of a rule whose coordinates talk by means over all of them (Andrychowicz et al. 2016, appendix D:
// LSTM+GAC): a kernel of csrc/cpu a layer, and between two of them the means of the layer's first units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/run.h"

namespace fastl2l::cpu {
namespace {

// Coordinates that a thread takes the sums of at a time, and that are worth waking one for.
constexpr int64_t kLongest = 4096;

// Coordinates of one function that are neighbours, and so are their lanes.
struct Stretch {
  int64_t coordinate, lane, size, function;
};

// Which coordinates means are over: see fastl2l/ops/coordinates.py.
struct Functions {
  int64_t count, dim;
  std::vector<Stretch> stretches;  // in the order of their coordinates

  // `tensors`: sizes of what begins with a tile of its own; `parts`: sizes of what functions lie side by side in. Both
  // have `numel` coordinates in all.
  Functions(int64_t numel, const std::vector<int64_t>& tensors, const std::vector<int64_t>& parts, int64_t functions)
      : count(functions) {
    STD_TORCH_CHECK(functions >= 1 && functions <= std::max<int64_t>(numel, 1), "functions: expected 1 to ",
                    std::max<int64_t>(numel, 1), ", got ", functions);
    check_sizes("tensors", tensors, numel, 1);
    check_sizes("parts", parts, numel, functions);
    dim = numel / functions;
    size_t tensor = 0;
    int64_t coordinate = 0, in_tensor = 0, tile = 0;
    for (const int64_t part : parts) {
      for (int64_t function = 0; function < functions; ++function) {
        for (int64_t left = part / functions; left > 0;) {
          while (in_tensor == tensors[tensor]) {
            tile += tiles_of(tensors[tensor++]);
            in_tensor = 0;
          }
          const int64_t size = std::min({left, tensors[tensor] - in_tensor, kLongest});
          stretches.push_back({coordinate, tile * kTile + in_tensor, size, function});
          coordinate += size;
          in_tensor += size;
          left -= size;
        }
      }
    }
  }

  // Sizes of parts of `numel` coordinates, each a multiple of so much.
  static void check_sizes(const char* name, const std::vector<int64_t>& sizes, int64_t numel, int64_t multiple) {
    int64_t left = numel;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= left && size % multiple == 0, name, ": expected multiples of ", multiple,
                      " that are ", numel, " in all, got ", size);
      left -= size;
    }
    STD_TORCH_CHECK(left == 0, name, ": expected ", numel, " coordinates in all, got ", numel - left);
  }

  // Calls visit(stretch's number, stretch) on torch's threads.
  template <class Visit>
  void each_stretch(Visit visit) const {
    const int64_t all = (int64_t)stretches.size(), least = all * kLongest / std::max(dim * count, kLongest);
    share_out(all, std::max<int64_t>(least, 1), std::max<int64_t>(least / 4, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(i, stretches[i]);
    });
  }

  // Sums of what visit(stretch, sums [width]) finds, [function][width]. They are of float64, and of the same bits for
  // any number of threads.
  template <class Visit>
  std::vector<double> sums(int64_t width, Visit visit) const {
    std::vector<double> of_stretches(stretches.size() * width), found(count * width);
    each_stretch([&](int64_t i, const Stretch& stretch) { visit(stretch, &of_stretches[i * width]); });
    for (size_t i = 0; i < stretches.size(); ++i) {
      double* to = &found[stretches[i].function * width];
      for (int64_t k = 0; k < width; ++k) to[k] += of_stretches[i * width + k];
    }
    return found;
  }
};

// Calls visit(the first of its lanes in a row of tiles [tile][rows][16], how many) for each tile of a stretch.
template <typename T, class Visit>
void each_tile(T* tiles, int64_t rows, const Stretch& stretch, Visit visit) {
  for (int64_t lane = stretch.lane, end = stretch.lane + stretch.size; lane < end;) {
    const int64_t first = lane % kTile, n = std::min(kTile - first, end - lane);
    visit(tiles + lane / kTile * rows * kTile + first, (int)n);
    lane += n;
  }
}

// Sums of the first `averages` rows over each function, [function][averages].
template <typename T>
std::vector<double> row_sums(const Functions& functions, const T* tiles, int64_t rows, int averages) {
  return functions.sums(averages, [&](const Stretch& stretch, double* sums) {
    for (int row = 0; row < averages; ++row) {
      double lanes[kTile] = {};
      each_tile(tiles + row * kTile, rows, stretch, [&](const T* at, int n) {
        if (n == kTile) {
          for (int i = 0; i < kTile; ++i) lanes[i] += at[i];
        } else {
          for (int i = 0; i < n; ++i) lanes[i] += at[i];
        }
      });
      sums[row] = std::accumulate(lanes, lanes + kTile, 0.0);
    }
  });
}

// Writes values [function][averages] to the first rows of each function's coordinates.
template <typename T>
void spread(const Functions& functions, const std::vector<T>& values, T* tiles, int64_t rows, int averages) {
  functions.each_stretch([&](int64_t, const Stretch& stretch) {
    for (int row = 0; row < averages; ++row) {
      const T value = values[stretch.function * averages + row];
      each_tile(tiles + row * kTile, rows, stretch, [&](T* at, int n) { std::fill_n(at, n, value); });
    }
  });
}

// The layers, each of which is a rule to its kernel, and what they have in common.
struct Layers {
  std::vector<Rule> rules;
  std::vector<std::vector<Tensor>> weights;
  std::vector<int64_t> averages;
  int64_t rows;  // of each one's state
  double scale;

  Layers(const std::vector<Tensor>& all, const std::vector<std::string>& texts, const std::vector<int64_t>& averaged,
         double update_scale)
      : averages(averaged), scale(update_scale) {
    STD_TORCH_CHECK(!texts.empty() && texts.size() == averaged.size(), "averages: expected ", texts.size(),
                    " numbers for as many layers, got ", averaged.size());
    size_t at = 0;
    for (size_t layer = 0; layer < texts.size(); ++layer) {
      const size_t tensors = parse_rule(texts[layer]).tensors(), end = std::min(all.size(), at + tensors);
      weights.emplace_back(all.begin() + at, all.begin() + end);
      rules.push_back(check_rule(weights.back(), texts[layer], update_scale));
      check_layer(layer, layer + 1 == texts.size());
      at = end;
    }
    STD_TORCH_CHECK(at == all.size(), "weights: expected ", at, " tensors, got ", all.size());
    rows = rules[0].state_rows();
    check_number("update_scale", update_scale, dtype());
  }

  int count() const { return (int)rules.size(); }
  ScalarType dtype() const { return weights[0][0].scalar_type(); }
  // Of the last layer, whose averaged units are a part of the update that is known when its kernel has run.
  template <typename T>
  const T* shared() const {
    return static_cast<const T*>(weights.back()[rules.back().layer_tensor(1)].data_ptr());
  }

 private:
  void check_layer(size_t layer, bool is_last) const {
    const Rule& rule = rules[layer];
    STD_TORCH_CHECK(rule.layers == 1 && rule.projected == 0 && rule.feature_rows() == 0 &&
                        rule.hidden == rules[0].hidden && rule.given == (layer ? rule.hidden : 0) &&
                        rule.output == (is_last ? Output::kLinear : Output::kNone),
                    "rules: expected one LSTM of as many units in each, the first with features, the last with a "
                    "linear output, and the others given the units before them");
    STD_TORCH_CHECK(weights[layer][0].scalar_type() == dtype(), "weights: expected one dtype for all");
    STD_TORCH_CHECK(averages[layer] >= 0 && averages[layer] <= rule.hidden, "averages: expected 0 to ", rule.hidden,
                    " units, got ", averages[layer]);
  }
};

// The layers' weights as the kernels read them, in memory that a thread keeps.
template <typename T>
struct Packed {
  std::vector<Packer<T>> packers;
  std::vector<PackedWeights<T>> layers;

  void pack(const Layers& from, bool backward) {
    packers.resize(std::max<size_t>(packers.size(), from.count()));
    layers.clear();
    for (int layer = 0; layer < from.count(); ++layer) {
      const Rule& rule = from.rules[layer];
      std::vector<const T*> weights = pointers<T>(from.weights[layer]);
      std::vector<T> others;  // the output's weights, without those of units that are averaged
      if (rule.output != Output::kNone) {
        others.assign(from.shared<T>(), from.shared<T>() + rule.hidden);
        std::fill_n(others.begin(), from.averages[layer], T(0));
        weights[rule.layer_tensor(1)] = others.data();
      }
      layers.push_back(packers[layer].pack(rule, weights, kernels<T>().blocking, backward));
    }
  }
};

template <typename T>
void copy_numbers(const void* source, T* target, int n) {
  std::copy_n(static_cast<const T*>(source), n, target);
}
template <typename T>
void add_numbers(void* target, double, const T* update, int n) {
  for (int i = 0; i < n; ++i) static_cast<T*>(target)[i] += update[i];
}

template <typename T>
void step_all(const Layers& layers, const Functions& functions, const std::vector<int64_t>& tensors, const T* before,
              T* after, const T* grad, T* update) {
  static thread_local Packed<T> packed;
  packed.pack(layers, false);
  std::vector<int64_t> first_tile{0};
  for (const int64_t size : tensors) first_tile.push_back(first_tile.back() + tiles_of(size));
  const int64_t tile_elements = layers.rows * kTile, layer_elements = first_tile.back() * tile_elements;
  std::vector<Segment<T>> segments(tensors.size());
  const T* given = nullptr;
  for (int layer = 0; layer < layers.count(); ++layer, before += layer_elements, after += layer_elements) {
    int64_t coordinate = 0;
    for (size_t i = 0; i < tensors.size(); coordinate += tensors[i++]) {
      const int64_t element = first_tile[i] * tile_elements;
      segments[i] = {(char*)(update + coordinate),
                     (const char*)(grad + coordinate),
                     after + element,
                     before + element,
                     tensors[i],
                     1,
                     sizeof(T),
                     copy_numbers<T>,
                     add_numbers<T>};
    }
    const Rule& rule = layers.rules[layer];
    run_step<T>({rule, part_constants<T>(rule), packed.layers[layer], 1, 1, given, segments.data(),
                 (int64_t)segments.size(), first_tile.data(), false, (int)layers.rows});
    given = after;
    const int averages = (int)layers.averages[layer];
    if (averages == 0) continue;
    const std::vector<double> sums = row_sums(functions, after, layers.rows, averages);
    std::vector<T> means(sums.size());
    for (size_t i = 0; i < sums.size(); ++i) means[i] = (T)(sums[i] / functions.dim);
    spread(functions, means, after, layers.rows, averages);
    if (rule.output == Output::kNone) continue;
    functions.each_stretch([&](int64_t, const Stretch& stretch) {
      T shared = 0;
      for (int a = 0; a < averages; ++a) shared += layers.shared<T>()[a] * means[stretch.function * averages + a];
      shared *= (T)layers.scale;
      for (int64_t i = 0; i < stretch.size; ++i) update[stretch.coordinate + i] += shared;
    });
  }
}

Tensor averaged_step_(std::optional<Tensor> before, Tensor state, Tensor grad, std::vector<Tensor> weights,
                      std::vector<std::string> rules, std::vector<int64_t> averages, double update_scale,
                      std::vector<int64_t> tensors, std::vector<int64_t> parts, int64_t functions) {
  const Layers layers(weights, rules, averages, update_scale);
  const ScalarType dtype = layers.dtype();
  STD_TORCH_CHECK(grad.dim() == 1, "grad: expected shape [N], got ", shape_of(grad));
  const int64_t numel = grad.numel();
  check_tensor({"grad"}, grad, dtype, {numel});
  const Functions all(numel, tensors, parts, functions);
  int64_t tiles = 0;
  for (const int64_t size : tensors) tiles += tiles_of(size);
  check_tensor({"state"}, state, dtype, {layers.count(), tiles, layers.rows, kTile});
  if (before) check_tensor({"before"}, *before, dtype, {layers.count(), tiles, layers.rows, kTile});
  Tensor update = torch::stable::new_zeros(grad, {numel});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(state.data_ptr());
    const T* from = before ? static_cast<const T*>(before->data_ptr()) : to;
    step_all<T>(layers, all, tensors, from, to, static_cast<const T*>(grad.data_ptr()),
                static_cast<T*>(update.data_ptr()));
  };
  if (numel > 0) dtype == ScalarType::Float ? run(float()) : run(double());
  return update;
}

// The way back of a window, of `steps` steps.
template <typename T>
class WayBack {
 public:
  WayBack(const Layers& layers, const Functions& functions, int64_t numel, int64_t steps, const T* states,
          const T* grads, const T* adjoints, T* dstates)
      : layers_(layers),
        functions_(functions),
        numel_(numel),
        steps_(steps),
        layer_elements_(tiles_of(numel) * layers.rows * kTile),
        states_(states),
        grads_(grads),
        adjoints_(adjoints),
        dstates_(dstates),
        averages_((int)layers.averages.back()),
        dshared_(averages_) {}

  void run(T* dweights) {
    static thread_local Packed<T> packed;
    static thread_local std::vector<WeightSums<T>> sums;
    packed.pack(layers_, true);
    sums.resize(std::max<size_t>(sums.size(), layers_.count()));
    for (int layer = 0; layer < layers_.count(); ++layer) sums[layer].begin(layers_.rules[layer], numel_, 1);
    for (int64_t step = steps_ - 1; step >= 0; --step) {
      const std::vector<double> totals = shared_backward(step);
      for (int layer = layers_.count() - 1; layer >= 0; --layer) {
        average(layer, totals);
        sums[layer].add(window(step, layer, packed.layers[layer]));
      }
    }
    for (int layer = 0; layer < layers_.count(); ++layer) {
      const Rule& rule = layers_.rules[layer];
      sums[layer].write(dweights);
      // After both matrices and the bias are the output's weights: of averaged units not what the kernel saw.
      if (rule.output != Output::kNone) {
        T* of_output = dweights + (int64_t)4 * rule.hidden * (rule.inputs() + rule.hidden + 1);
        for (int a = 0; a < averages_; ++a) of_output[a] = (T)dshared_[a];
      }
      dweights += weight_count(rule);
    }
  }

 private:
  const T* state(int64_t step, int layer) const { return states_ + (step * layers_.count() + layer) * layer_elements_; }
  T* dstate(int layer) const { return dstates_ + layer * layer_elements_; }

  // What averaged units of the last layer have in the update: adds the gradients of their output's weights, and returns
  // by function the update's summed adjoints.
  std::vector<double> shared_backward(int64_t step) {
    if (averages_ == 0) return {};
    const T* adjoints = adjoints_ + step * numel_;
    const T* means = state(step + 1, layers_.count() - 1);
    std::vector<double> totals = functions_.sums(1, [&](const Stretch& stretch, double* sum) {
      for (int64_t i = 0; i < stretch.size; ++i) *sum += adjoints[stretch.coordinate + i];
    });
    for (double& total : totals) total *= layers_.scale;
    std::vector<bool> seen(functions_.count);
    for (const Stretch& stretch : functions_.stretches) {
      if (seen[stretch.function]) continue;
      seen[stretch.function] = true;
      const T* at = means + stretch.lane / kTile * layers_.rows * kTile + stretch.lane % kTile;
      for (int a = 0; a < averages_; ++a) dshared_[a] += (double)at[a * kTile] * totals[stretch.function];
    }
    return totals;
  }

  // That a unit is replaced by its mean is a symmetric projection: its adjoint is averaged likewise.
  void average(int layer, const std::vector<double>& totals) {
    const int averages = (int)layers_.averages[layer];
    if (averages == 0) return;
    const std::vector<double> sums = row_sums(functions_, dstate(layer), layers_.rows, averages);
    std::vector<T> shares(sums.size());
    const bool is_last = layer + 1 == layers_.count();
    for (size_t i = 0; i < sums.size(); ++i) {
      const double of_update = is_last ? layers_.shared<T>()[i % averages] * totals[i / averages] : 0;
      shares[i] = (T)((sums[i] + of_update) / functions_.dim);
    }
    spread(functions_, shares, dstate(layer), layers_.rows, averages);
  }

  // The adjoint of what a layer is given is added to that of the units of the layer before it.
  WindowArgs<T> window(int64_t step, int layer, const PackedWeights<T>& weights) const {
    const bool is_last = layer + 1 == layers_.count();
    return {layers_.rules[layer],
            part_constants<T>(layers_.rules[layer]),
            weights,
            numel_,
            1,
            state(step, layer),
            grads_ + step * numel_,
            is_last ? adjoints_ + step * numel_ : nullptr,
            dstate(layer),
            layer > 0 ? state(step + 1, layer - 1) : nullptr,
            step > 0 ? dstate(layer) : nullptr,
            nullptr,
            layer > 0 ? dstate(layer - 1) : nullptr,
            (int)layers_.rows,
            true};
  }

  const Layers& layers_;
  const Functions& functions_;
  const int64_t numel_, steps_, layer_elements_;
  const T *states_, *grads_, *adjoints_;
  T* dstates_;
  const int averages_;  // of the last layer
  std::vector<double> dshared_;
};

Tensor averaged_window_backward(Tensor states, Tensor grads, Tensor adjoints, std::vector<Tensor> weights,
                                std::vector<std::string> rules, std::vector<int64_t> averages, double update_scale,
                                std::vector<int64_t> parts, int64_t functions) {
  const Layers layers(weights, rules, averages, update_scale);
  const ScalarType dtype = layers.dtype();
  STD_TORCH_CHECK(grads.dim() == 2 && grads.size(0) >= 1, "grads: expected shape [steps >= 1, N], got ",
                  shape_of(grads));
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel);
  check_tensor({"grads"}, grads, dtype, {steps, numel});
  check_tensor({"adjoints"}, adjoints, dtype, {steps, numel});
  check_tensor({"states"}, states, dtype, {steps + 1, layers.count(), tiles, layers.rows, kTile});
  const Functions all(numel, {numel}, parts, functions);
  int64_t count = 0;
  for (const Rule& rule : layers.rules) count += weight_count(rule);
  Tensor dweights = torch::stable::new_zeros(states, {count});
  Tensor dstates = torch::stable::new_zeros(states, {layers.count(), tiles, layers.rows, kTile});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
    WayBack<T>(layers, all, numel, steps, data(states), data(grads), data(adjoints), data(dstates)).run(data(dweights));
  };
  if (numel > 0) dtype == ScalarType::Float ? run(float()) : run(double());
  return dweights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastl2l, CPU, m) {
  m.impl("averaged_step_", TORCH_BOX(&averaged_step_));
  m.impl("averaged_window_backward", TORCH_BOX(&averaged_window_backward));
}

}  // namespace fastl2l::cpu
