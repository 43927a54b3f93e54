// The operators on CUDA tensors: checks, workspaces from torch's allocator, and launches on the current stream. Nothing
// waits for the device, so all can be captured in a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/launch.cuh"

namespace fastl2l::cuda {
namespace {

void check_cuda(Error error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA says: ", cudaGetErrorString(error));
}

void check_device(Name name, const Tensor& tensor, int device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device() == device, name.string(),
                  ": expected a tensor on cuda:", device, ", got one on ",
                  tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device()) : std::string("another device"));
}

void check_devices(const char* name, const std::vector<Tensor>& tensors, int device) {
  for (size_t i = 0; i < tensors.size(); ++i) check_device({name, (int64_t)i}, tensors[i], device);
}

// The current stream of the device of `like`, which becomes the current device, and memory on it.
class Work {
 public:
  explicit Work(const Tensor& like) : guard_(like.get_device()), like_(like) {
    const int device = like.get_device();
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "device: cannot get the current stream of cuda:", device);
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
    STD_TORCH_CHECK(major >= 8, "device: expected a GPU of compute capability 8.0 or newer, got cuda:", device, " of ",
                    major, ".", minor, "; take backend=\"reference\" there");
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
    queue_ = {static_cast<Stream>(stream), multiprocessors, [this](size_t bytes) {
                memory_.push_back(torch::stable::new_empty(like_, {(int64_t)bytes}, ScalarType::Byte));
                return memory_.back().data_ptr();
              }};
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  const Queue& queue() const { return queue_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  std::vector<Tensor> memory_;  // goes back to torch in the stream's order
  Queue queue_;
};

std::vector<Segment> segments_of(const std::vector<Parameter>& parameters) {
  const auto dtype_of = [](ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Float: return Dtype::kFloat32;
      case ScalarType::Double: return Dtype::kFloat64;
      case ScalarType::Half: return Dtype::kFloat16;
      default: return Dtype::kBFloat16;
    }
  };
  std::vector<Segment> segments;
  for (const Parameter& parameter : parameters) {
    segments.push_back({parameter.data, parameter.grad, parameter.state, parameter.numel, 0, dtype_of(parameter.dtype),
                        (int)segments.size()});
  }
  return segments;
}

template <typename T>
std::vector<const T*> weight_pointers(const std::vector<Tensor>& weights) {
  std::vector<const T*> result;
  for (const Tensor& weight : weights) result.push_back(static_cast<const T*>(weight.data_ptr()));
  return result;
}

void check_flag(const Tensor& finite, int device) {
  check_tensor({"finite"}, finite, ScalarType::Bool, {1});
  check_device({"finite"}, finite, device);
}

void find_nonfinite_(Tensor finite, std::vector<Tensor> tensors, bool in_float32) {
  const std::vector<Segment> segments = segments_of(check_gradients(tensors));
  const int device = finite.get_device();
  check_flag(finite, device);
  check_devices("tensors", tensors, device);
  const Work work(finite);
  check_cuda(find_nonfinite(segments, static_cast<bool*>(finite.data_ptr()), in_float32, work.queue()),
             "find_nonfinite_");
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

void step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states,
           std::vector<Tensor> weights, std::string text, double update_scale, double grad_scale,
           std::optional<Tensor> finite, std::optional<Tensor> given, double decay, std::optional<Tensor> rate,
           std::optional<Tensor> units) {
  const Rule rule = check_rule(weights, text, update_scale);
  const ScalarType dtype = weights[0].scalar_type(), stored = check_state_dtype(rule, states, dtype);
  const std::vector<Parameter> parameters = check_parameters(params, grads, states, stored, rule.state_rows());
  check_given(rule, given, dtype, {tiles_of_all(parameters), rule.given, kTile});
  check_number("update_scale", update_scale, dtype);
  check_number("decay", decay, dtype);
  if (rate) check_tensor({"rate"}, *rate, dtype, {});
  if (units) check_tensor({"units"}, *units, dtype, {(int64_t)params.size()});
  if (params.empty()) return;
  const int device = params[0].get_device();
  check_devices("params", params, device);
  check_devices("grads", grads, device);
  check_devices("states", states, device);
  check_devices("weights", weights, device);
  if (finite) check_flag(*finite, device);
  if (given) check_device({"given"}, *given, device);
  if (rate) check_device({"rate"}, *rate, device);
  if (units) check_device({"units"}, *units, device);
  bool* flag = finite ? static_cast<bool*>(finite->data_ptr()) : nullptr;
  const std::vector<Segment> segments = segments_of(parameters);
  const Work work(params[0]);
  const auto run = [&](auto zero, auto stored_zero) {
    using T = decltype(zero);
    using Stored = decltype(stored_zero);
    const Factors<T> factors{update_scale, decay, data_or_null<T>(rate), data_or_null<T>(units)};
    check_cuda(step<T, Stored>(rule, weight_pointers<T>(weights), segments, factors, grad_scale, data_or_null<T>(given),
                               flag, work.queue()),
               "step_");
  };
  if (stored == ScalarType::BFloat16) {
    run(float(), BFloat16());
  } else if (dtype == ScalarType::Float) {
    run(float(), float());
  } else {
    run(double(), double());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_gradients(Tensor state, Tensor grads, Tensor adjoints,
                                                            std::vector<Tensor> weights, std::string text,
                                                            double update_scale, std::optional<Tensor> dstate,
                                                            bool need_dstate, bool need_dgrads,
                                                            std::optional<Tensor> given, bool need_dgiven) {
  const Rule rule = check_rule(weights, text, update_scale);
  const ScalarType dtype = weights[0].scalar_type();
  check_window(state, grads, adjoints, dstate, given, dtype, rule);
  check_number("update_scale", update_scale, dtype);
  const int64_t steps = grads.size(0), numel = grads.size(1), tiles = tiles_of(numel);
  STD_TORCH_CHECK(steps <= INT32_MAX, "grads: expected at most ", INT32_MAX, " steps, got ", steps);
  const int device = weights[0].get_device();
  check_devices("weights", weights, device);
  check_device({"state"}, state, device);
  check_device({"grads"}, grads, device);
  check_device({"adjoints"}, adjoints, device);
  if (dstate) check_device({"dstate"}, *dstate, device);
  if (given) check_device({"given"}, *given, device);
  need_dgiven = need_dgiven && given;

  const Work work(state);
  Tensor dweights = torch::stable::new_zeros(state, {weight_count(rule)});
  Tensor dstate_first = torch::stable::new_zeros(state, {need_dstate ? tiles : 0, rule.state_rows(), kTile});
  Tensor dgrads = torch::stable::new_empty(state, {need_dgrads ? steps : 0, numel});
  Tensor dgiven = need_dgiven ? torch::stable::new_zeros(state, {steps, tiles, rule.given, kTile})
                              : torch::stable::new_empty(state, {0});
  if (numel == 0) return {dweights, dstate_first, dgrads, dgiven};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
    const Window<T> window{numel,
                           steps,
                           data(state),
                           data(grads),
                           data(adjoints),
                           data_or_null<T>(dstate),
                           data_or_null<T>(given),
                           need_dstate ? data(dstate_first) : nullptr,
                           need_dgrads ? data(dgrads) : nullptr,
                           need_dgiven ? data(dgiven) : nullptr};
    check_cuda(window_backward<T>(rule, weight_pointers<T>(weights), window, data(dweights), work.queue()),
               "window_backward");
  };
  if (dtype == ScalarType::Float) {
    run(float());
  } else {
    run(double());
  }
  return {dweights, dstate_first, dgrads, dgiven};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastl2l, CUDA, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("window_backward", TORCH_BOX(&window_gradients));
  m.impl("find_nonfinite_", TORCH_BOX(&find_nonfinite_));
}

}  // namespace fastl2l::cuda
