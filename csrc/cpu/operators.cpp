// The operators on CPU tensors: checks, packed weights, and the kernels on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/run.h"

namespace fastl2l::cpu {
namespace {

template <typename T>
void set_dtype(Segment<T>& segment, ScalarType dtype) {
  const auto use = [&](auto* example) {
    using Stored = std::remove_pointer_t<decltype(example)>;
    segment.element_size = sizeof(Stored);
    segment.read = read<T, Stored>;
    segment.add = add<T, Stored>;
  };
  switch (dtype) {
    case ScalarType::Float: return use((float*)nullptr);
    case ScalarType::Double: return use((double*)nullptr);
    case ScalarType::Half: return use((torch::headeronly::Half*)nullptr);
    default: return use((torch::headeronly::BFloat16*)nullptr);
  }
}

template <typename T>
void step_all(const std::vector<Parameter>& parameters, const std::vector<Tensor>& weights, const Rule& rule,
              double grad_scale, double decay, const T* given, const T* units, bool state_is_bfloat16) {
  const Kernels<T>& kernel = kernels<T>();
  std::vector<Segment<T>> segments(parameters.size());
  std::vector<int64_t> first_tile{0};
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& parameter = parameters[i];
    segments[i].param = static_cast<char*>(parameter.data);
    segments[i].grad = static_cast<const char*>(parameter.grad);
    segments[i].state = parameter.state;
    segments[i].before = parameter.state;
    segments[i].numel = parameter.numel;
    segments[i].unit = units ? units[i] : 1;
    set_dtype(segments[i], parameter.dtype);
    first_tile.push_back(first_tile.back() + tiles_of(parameter.numel));
  }
  static thread_local Packer<T> packer;
  const PackedWeights<T> packed = packer.pack(rule, pointers<T>(weights), kernel.blocking, false);
  run_step<T>({rule, part_constants<T>(rule), packed, (T)grad_scale, 1 - decay, given, segments.data(),
               (int64_t)segments.size(), first_tile.data(), state_is_bfloat16, rule.given});
}

// x - x is 0 for finite x and NaN otherwise; the sum of such terms is vectorized by any compiler.
template <typename Stored, typename Wide>
bool finite(const void* data, int64_t n) {
  const Stored* x = static_cast<const Stored*>(data);
  constexpr int lanes = 16;
  constexpr int64_t stretch = 4096;
  for (int64_t first = 0; first < n; first += stretch) {
    const int64_t last = std::min(n, first + stretch);
    Wide sums[lanes] = {};
    int64_t i = first;
    for (; i + lanes <= last; i += lanes) {
      for (int k = 0; k < lanes; ++k) sums[k] += (Wide)x[i + k] - (Wide)x[i + k];
    }
    for (; i < last; ++i) sums[0] += (Wide)x[i] - (Wide)x[i];
    for (Wide sum : sums) {
      if (!(sum == 0)) return false;
    }
  }
  return true;
}

bool all_finite(const std::vector<Parameter>& parameters, bool in_float32) {
  return std::all_of(parameters.begin(), parameters.end(), [&](const Parameter& parameter) {
    const auto holds = [&](auto* function) { return function(parameter.grad, parameter.numel); };
    switch (parameter.dtype) {
      case ScalarType::Float: return holds(finite<float, float>);
      case ScalarType::Double: return in_float32 ? holds(finite<double, float>) : holds(finite<double, double>);
      case ScalarType::Half: return holds(finite<torch::headeronly::Half, float>);
      default: return holds(finite<torch::headeronly::BFloat16, float>);
    }
  });
}

// Clears a flag that says that all gradients are finite, if one is not; returns the flag.
bool find_nonfinite(Tensor& finite, const std::vector<Parameter>& parameters, bool in_float32) {
  check_tensor({"finite"}, finite, ScalarType::Bool, {1});
  bool& flag = *static_cast<bool*>(finite.data_ptr());
  return flag = flag && all_finite(parameters, in_float32);
}

void find_nonfinite_(Tensor finite, std::vector<Tensor> tensors, bool in_float32) {
  find_nonfinite(finite, check_gradients(tensors), in_float32);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

double number_in(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? *static_cast<const float*>(tensor.data_ptr())
                                                   : *static_cast<const double*>(tensor.data_ptr());
}

void step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states,
           std::vector<Tensor> weights, std::string text, double update_scale, double grad_scale,
           std::optional<Tensor> finite, std::optional<Tensor> given, double decay, std::optional<Tensor> rate,
           std::optional<Tensor> units) {
  Rule rule = check_rule(weights, text, update_scale);
  const ScalarType dtype = weights[0].scalar_type(), stored = check_state_dtype(rule, states, dtype);
  const std::vector<Parameter> parameters = check_parameters(params, grads, states, stored, rule.state_rows());
  check_given(rule, given, dtype, {tiles_of_all(parameters), rule.given, kTile});
  check_number("update_scale", update_scale, dtype);
  check_number("decay", decay, dtype);
  if (rate) {
    check_tensor({"rate"}, *rate, dtype, {});
    rule.update_scale *= number_in(*rate);
    decay *= number_in(*rate);
  }
  if (units) check_tensor({"units"}, *units, dtype, {(int64_t)params.size()});
  if (finite && !find_nonfinite(*finite, parameters, dtype == ScalarType::Float)) return;
  if (parameters.empty()) return;
  if (dtype == ScalarType::Float) {
    const bool is_bfloat16 = stored == ScalarType::BFloat16;
    step_all<float>(parameters, weights, rule, grad_scale, decay, data_or_null<float>(given),
                    data_or_null<float>(units), is_bfloat16);
  } else {
    step_all<double>(parameters, weights, rule, grad_scale, decay, data_or_null<double>(given),
                     data_or_null<double>(units), false);
  }
}

// Sums the weight gradients of all coordinates into `dweights`.
template <typename T>
void window_all(WindowArgs<T> args, const std::vector<Tensor>& weights, T* dweights) {
  static thread_local Packer<T> packer;
  static thread_local WeightSums<T> sums;
  args.weights = packer.pack(args.rule, pointers<T>(weights), kernels<T>().blocking, true);
  sums.begin(args.rule, args.numel, args.steps);
  sums.add(args);
  sums.write(dweights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_backward(Tensor state, Tensor grads, Tensor adjoints,
                                                           std::vector<Tensor> weights, std::string text,
                                                           double update_scale, std::optional<Tensor> dstate,
                                                           bool need_dstate, bool need_dgrads,
                                                           std::optional<Tensor> given, bool need_dgiven) {
  const Rule rule = check_rule(weights, text, update_scale);
  const ScalarType dtype = weights[0].scalar_type();
  check_window(state, grads, adjoints, dstate, given, dtype, rule);
  check_number("update_scale", update_scale, dtype);
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel);
  need_dgiven = need_dgiven && given;

  Tensor dweights = torch::stable::new_empty(state, {weight_count(rule)});
  Tensor dstate_first = torch::stable::new_empty(state, {need_dstate ? tiles : 0, rule.state_rows(), kTile});
  Tensor dgrads = torch::stable::new_empty(state, {need_dgrads ? steps : 0, numel});
  Tensor dgiven = need_dgiven ? torch::stable::new_empty(state, {steps, tiles, rule.given, kTile})
                              : torch::stable::new_empty(state, {0});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
    const WindowArgs<T> args{rule,
                             part_constants<T>(rule),
                             {},
                             numel,
                             steps,
                             data(state),
                             data(grads),
                             data(adjoints),
                             data_or_null<T>(dstate),
                             data_or_null<T>(given),
                             need_dstate ? data(dstate_first) : nullptr,
                             need_dgrads ? data(dgrads) : nullptr,
                             need_dgiven ? data(dgiven) : nullptr,
                             rule.given,
                             false};
    window_all<T>(args, weights, data(dweights));
  };
  if (dtype == ScalarType::Float) {
    run(float());
  } else {
    run(double());
  }
  return {dweights, dstate_first, dgrads, dgiven};
}

Tensor elementwise(Tensor x, std::string function) {
  static const struct {
    const char* name;
    Function function;
  } kAll[] = {
      {"sigmoid", Function::kSigmoid}, {"tanh", Function::kTanh}, {"log", Function::kLog}, {"elu", Function::kElu}};
  const auto* which = std::find_if(std::begin(kAll), std::end(kAll), [&](auto& one) { return function == one.name; });
  STD_TORCH_CHECK(which != std::end(kAll), "function: expected sigmoid, tanh, log or elu, got ", function);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "x: expected float32 or float64, got ", dtype_name(x.scalar_type()));
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() % kTile == 0, "x: expected a contiguous tensor of a multiple of ",
                  kTile, " elements, got ", x.numel());
  Tensor result = torch::stable::empty_like(x);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(result.data_ptr());
    torch::stable::parallel_for(0, x.numel() / kTile, 64, [&](int64_t begin, int64_t end) {
      kernels<T>().elementwise(which->function, from + begin * kTile, to + begin * kTile, (end - begin) * kTile);
    });
  };
  if (x.scalar_type() == ScalarType::Float) {
    run(float());
  } else {
    run(double());
  }
  return result;
}

// All that is read of a rule's text, for a test that holds the readers against each other.
std::string describe_rule(std::string text) {
  const Rule& rule = parse_rule(text);
  std::string found = std::to_string(rule.state_rows()) + " rows, " + std::to_string(rule.feature_count()) + "+" +
                      std::to_string(rule.given) + " inputs, weights";
  each_weight(rule, [&](int dimensions, int64_t rows, int64_t columns) {
    const int64_t shape[2] = {rows, columns};
    found += " " + join(shape, dimensions);
  });
  found += ", constants";
  for (const double constant : rule.constants) {
    char number[32];
    found += " " + std::string(number, std::to_chars(number, number + sizeof(number), constant).ptr);
  }
  return found;
}

std::string cpu_isa() { return instruction_set().name; }
std::string cpu_isas() { return instruction_sets(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastl2l, CPU, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("window_backward", TORCH_BOX(&window_backward));
  m.impl("find_nonfinite_", TORCH_BOX(&find_nonfinite_));
  m.impl("elementwise", TORCH_BOX(&elementwise));
}

STABLE_TORCH_LIBRARY_IMPL(fastl2l, CompositeExplicitAutograd, m) {
  m.impl("describe_rule", TORCH_BOX(&describe_rule));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace fastl2l::cpu
