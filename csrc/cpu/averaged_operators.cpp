// Steps and windows of the layers of a rule whose coordinates talk by means over all of them (Andrychowicz et al. 2016,
// appendix D): a kernel of csrc/cpu a layer, and between two of them the means of the layer's first units. What a
// memory has to do with them are rows that layers are given besides, and the units of the last one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/functions.h"
#include "cpu/run.h"

namespace fastl2l::cpu {
namespace {

// The layers, each of which is a rule to its kernel, and what they have in common.
struct Layers {
  std::vector<Rule> rules;
  std::vector<std::vector<Tensor>> weights;
  std::vector<int64_t> averages;
  int64_t rows;       // of each one's state
  int64_t extra = 0;  // rows that all of them are given besides units
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
      extra += extra_given((int)layer);
      at = end;
    }
    STD_TORCH_CHECK(at == all.size(), "weights: expected ", at, " tensors, got ", all.size());
    rows = rules[0].state_rows();
    check_number("update_scale", update_scale, dtype());
  }

  int count() const { return (int)rules.size(); }
  int hidden() const { return rules[0].hidden; }
  bool is_last(int layer) const { return layer + 1 == count(); }
  // Units of the layer before that a layer is given, and rows besides.
  int units_given(int layer) const { return layer ? hidden() : 0; }
  int extra_given(int layer) const { return rules[layer].given - units_given(layer); }
  ScalarType dtype() const { return weights[0][0].scalar_type(); }
  // Of the last layer, whose averaged units are a part of the update that is known when its kernel has run.
  template <typename T>
  const T* shared() const {
    return static_cast<const T*>(weights.back()[rules.back().layer_tensor(1)].data_ptr());
  }

 private:
  void check_layer(size_t layer, bool is_last) const {
    const Rule& rule = rules[layer];
    STD_TORCH_CHECK(rule.layers == 1 && rule.projected == 0 && rule.feature_rows() == 0 && rule.hidden == hidden() &&
                        extra_given((int)layer) >= 0 && rule.output == (is_last ? Output::kLinear : Output::kNone),
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

// What a layer is given: its own units' memory where those are all of it, or tiles in memory that a thread keeps.
template <typename T>
class Given {
 public:
  // `units`: the state of the layer before, after its step; `extra`: [row][coordinate]. Returns how many rows are
  // between two tiles.
  int64_t gather(const Layers& layers, int layer, const Functions& functions, int64_t tiles, const T* units,
                 const T* extra) {
    const int own = layers.units_given(layer), more = layers.extra_given(layer);
    at_ = units;
    if (more == 0) return layers.rows;
    const int64_t rows = own + more;
    T* own_tiles = room(tiles * rows * kTile);
    at_ = own_tiles;
    share_out(tiles, kTilesPerThread, kTilesAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        T* to = own_tiles + tile * rows * kTile;
        if (own) std::copy_n(units + tile * layers.rows * kTile, own * kTile, to);
        std::fill_n(to + own * kTile, more * kTile, T(0));  // lanes that are no coordinate's
      }
    });
    each_run(functions, extra, more, own_tiles + own * kTile, rows,
             [](T* tile, const T* row, int n) { std::copy_n(row, n, tile); });
    return rows;
  }
  const T* tiles() const { return at_; }

  // Memory for so many numbers; what is more than a few megabytes is given back at the next call.
  T* room(int64_t numbers) {
    if (memory_.size() > kMostKept / sizeof(T)) std::vector<T>().swap(memory_);
    memory_.resize(std::max<size_t>(memory_.size(), numbers));
    return memory_.data();
  }

 private:
  const T* at_ = nullptr;
  std::vector<T> memory_;
};

template <typename T>
struct Step {
  const T* before;  // [layer][tile][row][16]
  T* after;         // the same
  const T* grad;    // [coordinate]
  const T* extra;   // [row][coordinate], what the layers are given besides
  T* update;        // [coordinate]
  T* units;         // [unit][coordinate] of the last layer, or null
};

// Replaces a layer's averaged units by their means, and adds what they have in the update.
template <typename T>
void average(const Layers& layers, int layer, const Functions& functions, const Step<T>& step) {
  const int averages = (int)layers.averages[layer];
  if (averages == 0) return;
  const std::vector<double> sums = row_sums(functions, step.after, layers.rows, averages);
  std::vector<T> means(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) means[i] = (T)(sums[i] / functions.dim);
  spread(functions, means, step.after, layers.rows, averages);
  if (!layers.is_last(layer)) return;
  functions.each_stretch([&](int64_t, const Stretch& stretch) {
    T shared = 0;
    for (int a = 0; a < averages; ++a) shared += layers.shared<T>()[a] * means[stretch.function * averages + a];
    shared *= (T)layers.scale;
    for (int64_t i = 0; i < stretch.size; ++i) step.update[stretch.coordinate + i] += shared;
  });
}

template <typename T>
void step_all(const Layers& layers, const Functions& functions, const std::vector<int64_t>& tensors, Step<T> step) {
  static thread_local Packed<T> packed;
  static thread_local Given<T> given;
  packed.pack(layers, false);
  std::vector<int64_t> first_tile{0};
  for (const int64_t size : tensors) first_tile.push_back(first_tile.back() + tiles_of(size));
  const int64_t tiles = first_tile.back(), tile_elements = layers.rows * kTile, numel = functions.count * functions.dim;
  std::vector<Segment<T>> segments(tensors.size());
  const T* units = nullptr;
  for (int layer = 0; layer < layers.count(); ++layer) {
    int64_t coordinate = 0;
    for (size_t i = 0; i < tensors.size(); coordinate += tensors[i++]) {
      const int64_t element = first_tile[i] * tile_elements;
      segments[i] = {(char*)(step.update + coordinate),
                     (const char*)(step.grad + coordinate),
                     step.after + element,
                     step.before + element,
                     tensors[i],
                     1,
                     sizeof(T),
                     read<T, T>,
                     add<T, T>};
    }
    const Rule& rule = layers.rules[layer];
    const int64_t given_rows = given.gather(layers, layer, functions, tiles, units, step.extra);
    run_step<T>({rule, part_constants<T>(rule), packed.layers[layer], 1, 1, given.tiles(), segments.data(),
                 (int64_t)segments.size(), first_tile.data(), false, (int)given_rows});
    average(layers, layer, functions, step);
    units = step.after;
    step.before += tiles * tile_elements;
    step.after += tiles * tile_elements;
    step.extra += layers.extra_given(layer) * numel;
  }
  if (step.units) {
    each_run(functions, step.units, layers.hidden(), units, layers.rows,
             [](const T* tile, T* row, int n) { std::copy_n(tile, n, row); });
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// What is written may not lie where something else is read.
void check_apart(const char* name, const Tensor& written, const char* other, const Tensor& read) {
  const auto range = [](const Tensor& tensor) {
    const char* begin = static_cast<const char*>(tensor.data_ptr());
    const int64_t size = tensor.scalar_type() == ScalarType::Double ? 8 : 4;
    return std::pair(begin, begin + tensor.numel() * size);
  };
  const auto [begin, end] = range(written);
  const auto [other_begin, other_end] = range(read);
  STD_TORCH_CHECK(end <= other_begin || other_end <= begin, name,
                  ": expected memory of its own, but it shares that of ", other);
}

// What the layers are given besides, [.., row, coordinate].
void check_extra(const Layers& layers, const std::optional<Tensor>& extra, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(extra.has_value() == (layers.extra > 0), "extra: expected ", layers.extra > 0 ? "a tensor" : "None",
                  " for rules that are given ", layers.extra, " rows besides units, got ", extra ? "a tensor" : "None");
  if (extra) check_tensor({"extra"}, *extra, layers.dtype(), shape);
}

std::tuple<Tensor, Tensor> averaged_step_(std::optional<Tensor> before, Tensor state, Tensor grad,
                                          std::optional<Tensor> extra, std::vector<Tensor> weights,
                                          std::vector<std::string> rules, std::vector<int64_t> averages,
                                          double update_scale, std::vector<int64_t> tensors, std::vector<int64_t> parts,
                                          int64_t functions, bool need_units) {
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
  check_extra(layers, extra, {layers.extra, numel});
  check_apart("state", state, "grad", grad);
  if (extra) check_apart("state", state, "extra", *extra);
  if (before && before->data_ptr() != state.data_ptr()) check_apart("state", state, "before", *before);
  Tensor update = torch::stable::new_zeros(grad, {numel});
  Tensor units = torch::stable::new_empty(grad, {need_units ? layers.hidden() : 0, numel});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* to = data<T>(state);
    step_all<T>(layers, all, tensors,
                {before ? data<T>(before) : to, to, data<T>(grad), data<T>(extra), data<T>(update),
                 need_units ? data<T>(units) : nullptr});
  };
  if (numel > 0) dtype == ScalarType::Float ? run(float()) : run(double());
  return {update, units};
}

template <typename T>
struct Window {
  int64_t numel, steps;
  std::vector<const T*> states;  // [layer][tile][row][16], before the first step and after each
  const T* grads;                // [steps][coordinate]
  const T* extra;                // [steps][row][coordinate], what the layers are given besides, or null
  const T* adjoints;             // [steps][coordinate], of the updates
  const T* dunits;               // [steps][unit][coordinate], of the last layer's, or null
  T* dstates;                    // [layer][tile][row][16], of the last state; overwritten
  bool need_first;               // whether it is to become that of the first one
  T* dgrads;                     // as grads, or null
  T* dextra;                     // as extra, or null
};

// The way back of a window.
template <typename T>
class WayBack {
 public:
  WayBack(const Layers& layers, const Functions& functions, const Window<T>& window)
      : layers_(layers),
        functions_(functions),
        window_(window),
        tiles_(tiles_of(window.numel)),
        layer_elements_(tiles_ * layers.rows * kTile),
        averages_((int)layers.averages.back()),
        dshared_(averages_) {}

  void run(T* dweights) {
    static thread_local Packed<T> packed;
    static thread_local std::vector<WeightSums<T>> sums;
    packed.pack(layers_, true);
    sums.resize(std::max<size_t>(sums.size(), layers_.count()));
    for (int layer = 0; layer < layers_.count(); ++layer) sums[layer].begin(layers_.rules[layer], window_.numel, 1);
    for (int64_t step = window_.steps - 1; step >= 0; --step) {
      const std::vector<double> totals = shared_backward(step);
      add_dunits(step);
      int64_t first_extra = layers_.extra;
      for (int layer = layers_.count() - 1; layer >= 0; --layer) {
        average(layer, totals);
        first_extra -= layers_.extra_given(layer);
        layer_backward(step, layer, (step * layers_.extra + first_extra) * window_.numel, packed.layers[layer],
                       sums[layer]);
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
  const T* state(int64_t step, int layer) const { return window_.states[step] + layer * layer_elements_; }
  T* dstate(int layer) const { return window_.dstates + layer * layer_elements_; }

  // What averaged units of the last layer have in the update: adds the gradients of their output's weights, and returns
  // by function the update's summed adjoints.
  std::vector<double> shared_backward(int64_t step) {
    if (averages_ == 0) return {};
    const T* adjoints = window_.adjoints + step * window_.numel;
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

  void add_dunits(int64_t step) const {
    if (!window_.dunits) return;
    each_run(functions_, window_.dunits + step * layers_.hidden() * window_.numel, layers_.hidden(),
             dstate(layers_.count() - 1), layers_.rows, [](T* tile, const T* row, int n) {
               for (int i = 0; i < n; ++i) tile[i] += row[i];
             });
  }

  // That a unit is replaced by its mean is a symmetric projection: its adjoint is averaged likewise.
  void average(int layer, const std::vector<double>& totals) {
    const int averages = (int)layers_.averages[layer];
    if (averages == 0) return;
    const std::vector<double> sums = row_sums(functions_, dstate(layer), layers_.rows, averages);
    std::vector<T> shares(sums.size());
    for (size_t i = 0; i < sums.size(); ++i) {
      const double of_update = layers_.is_last(layer) ? layers_.shared<T>()[i % averages] * totals[i / averages] : 0;
      shares[i] = (T)((sums[i] + of_update) / functions_.dim);
    }
    spread(functions_, shares, dstate(layer), layers_.rows, averages);
  }

  // The adjoint of units that a layer is given is added to that of the layer before it; rows besides are at `extra_at`.
  void layer_backward(int64_t step, int layer, int64_t extra_at, const PackedWeights<T>& weights,
                      WeightSums<T>& sums) const {
    static thread_local Given<T> given, dgiven;
    const Rule& rule = layers_.rules[layer];
    const int own = layers_.units_given(layer), more = layers_.extra_given(layer);
    const T* units = own ? state(step + 1, layer - 1) : nullptr;
    const int64_t rows = given.gather(layers_, layer, functions_, tiles_, units, window_.extra + extra_at);
    T* back = own ? dstate(layer - 1) : nullptr;
    if (more) back = own || window_.dextra ? dgiven.room(tiles_ * rows * kTile) : nullptr;
    sums.add({rule, part_constants<T>(rule), weights, window_.numel, 1, state(step, layer),
              window_.grads + step * window_.numel,
              layers_.is_last(layer) ? window_.adjoints + step * window_.numel : nullptr, dstate(layer), given.tiles(),
              step > 0 || window_.need_first ? dstate(layer) : nullptr,
              window_.dgrads && layer == 0 ? window_.dgrads + step * window_.numel : nullptr, back, (int)rows,
              more == 0});
    if (more == 0 || !back) return;
    if (own) add_to_units(back, rows, dstate(layer - 1));
    if (!window_.dextra) return;
    each_run(functions_, window_.dextra + extra_at, more, back + own * kTile, rows,
             [](const T* tile, T* row, int n) { std::copy_n(tile, n, row); });
  }

  void add_to_units(const T* from, int64_t rows, T* to) const {
    share_out(tiles_, kTilesPerThread, kTilesAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const T* at = from + tile * rows * kTile;
        T* units = to + tile * layers_.rows * kTile;
        for (int i = 0; i < layers_.hidden() * kTile; ++i) units[i] += at[i];
      }
    });
  }

  const Layers& layers_;
  const Functions& functions_;
  const Window<T> window_;
  const int64_t tiles_, layer_elements_;
  const int averages_;  // of the last layer
  std::vector<double> dshared_;
};

std::tuple<Tensor, Tensor, Tensor> averaged_window_backward(std::vector<Tensor> states, Tensor grads,
                                                            std::optional<Tensor> extra, Tensor adjoints,
                                                            std::optional<Tensor> dunits, std::optional<Tensor> dstate,
                                                            std::vector<Tensor> weights, std::vector<std::string> rules,
                                                            std::vector<int64_t> averages, double update_scale,
                                                            std::vector<int64_t> parts, int64_t functions,
                                                            bool need_dgrads, bool need_dextra) {
  const Layers layers(weights, rules, averages, update_scale);
  const ScalarType dtype = layers.dtype();
  STD_TORCH_CHECK(grads.dim() == 2 && grads.size(0) >= 1, "grads: expected shape [steps >= 1, N], got ",
                  shape_of(grads));
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel);
  check_tensor({"grads"}, grads, dtype, {steps, numel});
  check_tensor({"adjoints"}, adjoints, dtype, {steps, numel});
  check_length("states", states.size(), steps + 1);
  for (size_t i = 0; i < states.size(); ++i) {
    check_tensor({"states", (int64_t)i}, states[i], dtype, {layers.count(), tiles, layers.rows, kTile});
  }
  check_extra(layers, extra, {steps, layers.extra, numel});
  if (dunits) check_tensor({"dunits"}, *dunits, dtype, {steps, layers.hidden(), numel});
  if (dstate) {
    check_tensor({"dstate"}, *dstate, dtype, {layers.count(), tiles, layers.rows, kTile});
    for (const Tensor& state : states) check_apart("dstate", *dstate, "states", state);
    for (const auto& [name, read] : {std::pair("grads", &grads), std::pair("adjoints", &adjoints)}) {
      check_apart("dstate", *dstate, name, *read);
    }
  }
  const Functions all(numel, {numel}, parts, functions);
  int64_t count = 0;
  for (const Rule& rule : layers.rules) count += weight_count(rule);
  Tensor dweights = torch::stable::new_zeros(grads, {count});
  Tensor dgrads = torch::stable::new_empty(grads, {need_dgrads ? steps : 0, numel});
  Tensor dextra = torch::stable::new_empty(grads, {need_dextra ? steps : 0, layers.extra, numel});
  const std::optional<Tensor> own =
      dstate ? dstate : torch::stable::new_zeros(grads, {layers.count(), tiles, layers.rows, kTile});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Window<T> window{numel,
                           steps,
                           pointers<T>(states),
                           data<T>(grads),
                           data<T>(extra),
                           data<T>(adjoints),
                           data<T>(dunits),
                           data<T>(own),
                           dstate.has_value(),
                           need_dgrads ? data<T>(dgrads) : nullptr,
                           need_dextra ? data<T>(dextra) : nullptr};
    WayBack<T>(layers, all, window).run(data<T>(dweights));
  };
  if (numel > 0) dtype == ScalarType::Float ? run(float()) : run(double());
  return {dweights, dgrads, dextra};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastl2l, CPU, m) {
  m.impl("averaged_step_", TORCH_BOX(&averaged_step_));
  m.impl("averaged_window_backward", TORCH_BOX(&averaged_window_backward));
}

}  // namespace fastl2l::cpu
