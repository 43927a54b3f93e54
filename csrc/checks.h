// What every operator asks of its arguments, whatever the device. Messages name the argument, what was expected and
// what came; nothing has been changed when they are thrown.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "rule_text.h"

namespace fastl2l {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Text is put together only for a message: these checks run at every step.
inline std::string join(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return join(sizes.data(), sizes.size());
}

// The name of an argument, or of the index-th tensor of a list.
struct Name {
  const char* text;
  int64_t index = -1;

  std::string string() const { return index < 0 ? text : std::string(text) + "[" + std::to_string(index) + "]"; }
};

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline void check_tensor(Name name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name.string(), ": expected ", dtype_name(dtype), ", got ",
                  dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(has_shape(tensor, shape), name.string(), ": expected shape ", join(shape.begin(), shape.size()),
                  ", got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), name.string(), ": expected a contiguous tensor");
}

inline void check_length(const char* name, size_t length, size_t expected) {
  STD_TORCH_CHECK(length == expected, name, ": expected ", expected, " tensors, got ", length);
}

// The rule of this text, whose weights must be these.
inline Rule check_rule(const std::vector<Tensor>& weights, const std::string& text, double update_scale) {
  Rule rule = parse_rule(text);
  STD_TORCH_CHECK((int)weights.size() == rule.tensors(), "weights: expected ", rule.tensors(), " tensors for ", text,
                  ", got ", weights.size());
  const ScalarType dtype = weights[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "weights: expected float32 or float64, got ", dtype_name(dtype));
  int64_t at = 0;
  each_weight(rule, [&](int dimensions, int64_t rows, int64_t columns) {
    const Name name{"weights", at};
    const Tensor& weight = weights[at++];
    if (dimensions == 2) return check_tensor(name, weight, dtype, {rows, columns});
    if (dimensions == 1) return check_tensor(name, weight, dtype, {rows});
    check_tensor(name, weight, dtype, {});
  });
  rule.update_scale = update_scale;
  return rule;
}

// A factor of the update, in the dtype that the rule computes in.
inline void check_number(const char* name, double number, ScalarType dtype) {
  const double most =
      dtype == ScalarType::Float ? std::numeric_limits<float>::max() : std::numeric_limits<double>::max();
  STD_TORCH_CHECK(std::abs(number) <= most, name, ": expected a finite ", dtype_name(dtype), ", got ", number);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// One parameter's coordinates: where its numbers lie, and its state. Tensors are asked once for each of these, as every
// question is a call into torch and there may be hundreds of tensors.
struct Parameter {
  void* data;  // null where only the gradient is wanted
  const void* grad;
  char* state;
  int64_t numel;
  ScalarType dtype;  // of the parameter and its gradient
};

inline std::vector<Parameter> check_gradients(const std::vector<Tensor>& tensors) {
  std::vector<Parameter> found(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const Name name{"tensors", (int64_t)i};
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(tensor.is_contiguous(), name.string(), ": expected a contiguous tensor");
    STD_TORCH_CHECK(is_floating(dtype), name.string(), ": expected a floating dtype");
    found[i] = {nullptr, tensor.data_ptr(), nullptr, tensor.numel(), dtype};
  }
  return found;
}

// The dtype that the states of one call are stored in: the rule's, or bfloat16 where that is float32 and all of the
// state is the LSTM's.
inline ScalarType check_state_dtype(const Rule& rule, const std::vector<Tensor>& states, ScalarType dtype) {
  if (states.empty()) return dtype;
  const ScalarType stored = states[0].scalar_type();
  const bool halved = dtype == ScalarType::Float && rule.feature_rows() == 0;
  STD_TORCH_CHECK(stored == dtype || (halved && stored == ScalarType::BFloat16), "states[0]: expected ",
                  dtype_name(dtype), halved ? " or bfloat16" : "", ", got ", dtype_name(stored));
  return stored;
}

inline void check_given(const Rule& rule, const std::optional<Tensor>& given, ScalarType dtype,
                        std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(given.has_value() == (rule.given > 0), "given: expected ", rule.given, " rows, got ",
                  given ? "some" : "none");
  if (given) check_tensor({"given"}, *given, dtype, shape);
}

// `dtype` is that of the states.
inline std::vector<Parameter> check_parameters(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                               const std::vector<Tensor>& states, ScalarType dtype,
                                               int64_t state_rows) {
  check_length("grads", grads.size(), params.size());
  const bool together = states.size() == 1;  // one state for all parameters
  if (!together) check_length("states", states.size(), params.size());
  std::vector<Parameter> found(params.size());
  int64_t tiles = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Name param{"params", (int64_t)i}, grad{"grads", (int64_t)i};
    const ScalarType stored = params[i].scalar_type(), grad_dtype = grads[i].scalar_type();
    const int64_t numel = params[i].numel(), grad_numel = grads[i].numel();
    STD_TORCH_CHECK(is_floating(stored), param.string(), ": expected float32, float64, float16 or bfloat16, got ",
                    dtype_name(stored));
    STD_TORCH_CHECK(params[i].is_contiguous(), param.string(), ": expected a contiguous tensor");
    STD_TORCH_CHECK(grads[i].is_contiguous(), grad.string(), ": expected a contiguous tensor");
    STD_TORCH_CHECK(grad_dtype == stored, grad.string(), ": expected ", dtype_name(stored), ", got ",
                    dtype_name(grad_dtype));
    STD_TORCH_CHECK(grad_numel == numel, grad.string(), ": expected ", numel, " elements, got ", grad_numel);
    found[i] = {params[i].data_ptr(), grads[i].data_ptr(), nullptr, numel, stored};
    if (!together) {
      check_tensor({"states", (int64_t)i}, states[i], dtype, {tiles_of(numel), state_rows, kTile});
      found[i].state = static_cast<char*>(states[i].data_ptr());
    }
    tiles += tiles_of(numel);
  }
  if (!together) return found;
  check_tensor({"states", 0}, states[0], dtype, {tiles, state_rows, kTile});
  char* at = static_cast<char*>(states[0].data_ptr());
  const int64_t tile_bytes = state_rows * kTile * (int64_t)states[0].element_size();
  for (Parameter& parameter : found) {
    parameter.state = at;
    at += tiles_of(parameter.numel) * tile_bytes;
  }
  return found;
}

inline void check_window(const Tensor& state, const Tensor& grads, const Tensor& adjoints,
                         const std::optional<Tensor>& dstate, const std::optional<Tensor>& given, ScalarType dtype,
                         const Rule& rule) {
  STD_TORCH_CHECK(grads.dim() == 2 && grads.size(0) >= 1, "grads: expected shape [steps >= 1, N], got ",
                  shape_of(grads));
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel), state_rows = rule.state_rows();
  check_tensor({"grads"}, grads, dtype, {steps, numel});
  check_tensor({"adjoints"}, adjoints, dtype, {steps, numel});
  check_tensor({"state"}, state, dtype, {tiles, state_rows, kTile});
  if (dstate) check_tensor({"dstate"}, *dstate, dtype, {tiles, state_rows, kTile});
  check_given(rule, given, dtype, {steps, tiles, rule.given, kTile});
}

inline int64_t tiles_of_all(const std::vector<Parameter>& parameters) {
  int64_t tiles = 0;
  for (const Parameter& parameter : parameters) tiles += tiles_of(parameter.numel);
  return tiles;
}

}  // namespace fastl2l
