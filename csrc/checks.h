// What every operator asks of its arguments, whatever the device. Messages name the argument, what was expected and
// what came; nothing has been changed when they are thrown.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "rule.h"

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

// Sizes of an LSTM rule, read off its weights.
struct RuleSizes {
  int layers, hidden, features;
};

inline RuleSizes check_weights(const std::vector<Tensor>& weights, const std::string& preprocess) {
  STD_TORCH_CHECK(weights.size() >= 5 && weights.size() % 3 == 2,
                  "weights: expected W_ih, W_hh and bias of each layer, then w_out and b_out; got ", weights.size(),
                  " tensors");
  STD_TORCH_CHECK(preprocess == "raw" || preprocess == "log_sign", "preprocess: expected raw or log_sign, got ",
                  preprocess);
  const Tensor& w_out = weights[weights.size() - 2];
  const ScalarType dtype = w_out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "weights: expected float32 or float64, got ", dtype_name(dtype));
  const RuleSizes sizes{(int)(weights.size() / 3), (int)w_out.numel(), preprocess == "raw" ? 1 : 2};
  const int64_t hidden = sizes.hidden;
  STD_TORCH_CHECK(hidden >= 1, "weights: expected at least one hidden unit");
  for (int layer = 0; layer < sizes.layers; ++layer) {
    const int64_t at = 3 * layer;
    check_tensor({"weights", at}, weights[at], dtype, {4 * hidden, layer == 0 ? sizes.features : hidden});
    check_tensor({"weights", at + 1}, weights[at + 1], dtype, {4 * hidden, hidden});
    check_tensor({"weights", at + 2}, weights[at + 2], dtype, {4 * hidden});
  }
  check_tensor({"weights", 3 * sizes.layers}, w_out, dtype, {hidden});
  check_tensor({"weights", 3 * sizes.layers + 1}, weights.back(), dtype, {});
  return sizes;
}

inline Rule make_rule(const RuleSizes& sizes, const std::string& preprocess, double constant, double update_scale) {
  return {sizes.layers, sizes.hidden, sizes.features,      preprocess == "log_sign",
          constant,     update_scale, std::exp(-constant), std::exp(constant)};
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

// The dtype that the states of one call are stored in: the rule's, or bfloat16 where that is float32.
inline ScalarType check_state_dtype(const std::vector<Tensor>& states, ScalarType dtype) {
  if (states.empty()) return dtype;
  const ScalarType stored = states[0].scalar_type();
  const bool is_float = dtype == ScalarType::Float;
  STD_TORCH_CHECK(stored == dtype || (is_float && stored == ScalarType::BFloat16), "states[0]: expected ",
                  dtype_name(dtype), is_float ? " or bfloat16" : "", ", got ", dtype_name(stored));
  return stored;
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
                         const std::optional<Tensor>& dstate, ScalarType dtype, int64_t state_rows) {
  STD_TORCH_CHECK(grads.dim() == 2 && grads.size(0) >= 1, "grads: expected shape [steps >= 1, N], got ",
                  shape_of(grads));
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel);
  check_tensor({"grads"}, grads, dtype, {steps, numel});
  check_tensor({"adjoints"}, adjoints, dtype, {steps, numel});
  check_tensor({"state"}, state, dtype, {tiles, state_rows, kTile});
  if (dstate) check_tensor({"dstate"}, *dstate, dtype, {tiles, state_rows, kTile});
}

}  // namespace fastl2l
