// What every operator asks of its arguments, whatever the device. Messages name the argument, what was expected and
// what came; nothing has been changed when they are thrown.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

namespace fastl2l {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != (int64_t)shape.size()) return false;
  int64_t i = 0;
  for (int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

inline void check_tensor(const std::string& name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", dtype_name(dtype), ", got ",
                  dtype_name(tensor.scalar_type()));
  std::ostringstream wanted;
  for (int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  STD_TORCH_CHECK(has_shape(tensor, shape), name, ": expected shape [", wanted.str(), "], got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
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
    const std::string at = "weights, layer " + std::to_string(layer);
    check_tensor(at + ", W_ih", weights[3 * layer], dtype, {4 * hidden, layer == 0 ? sizes.features : hidden});
    check_tensor(at + ", W_hh", weights[3 * layer + 1], dtype, {4 * hidden, hidden});
    check_tensor(at + ", bias", weights[3 * layer + 2], dtype, {4 * hidden});
  }
  check_tensor("weights, w_out", w_out, dtype, {hidden});
  check_tensor("weights, b_out", weights.back(), dtype, {});
  return sizes;
}

}  // namespace fastl2l
