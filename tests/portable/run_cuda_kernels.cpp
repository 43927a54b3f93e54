// The CUDA kernels on the host, for tests/test_cuda_kernels.py: built as a shared library with cuda_emulator.h in place
// of CUDA. All pointers are to the host's memory; tensors as in ops/schema.py.
#ifndef FASTL2L_CUDA_SHAPES
#define FASTL2L_CUDA_SHAPES \
  Shape<20, 2, 0>, Shape<20, 2, 20>, Shape<20, 1, 0>, Shape<12, 3, 0>, Shape<12, 3, 8>, Shape<12, 1, 4>
#endif
#include "cuda/launch.cuh"
#include "rule_text.h"

using namespace fastl2l;
using namespace fastl2l::cuda;

extern "C" {
int emulated_multiprocessors = 3;  // few, so that every block has several turns
}

namespace {

struct Workspaces {
  std::vector<std::unique_ptr<char[]>> memory;

  Queue queue() {
    return {0, emulated_multiprocessors, [this](size_t bytes) {
              memory.emplace_back(new char[bytes]);
              std::memset(memory.back().get(), 0xff, bytes);  // NaN
              return (void*)memory.back().get();
            }};
  }
};

Rule make_rule(const char* text, double update_scale) {
  Rule rule = parse_rule(text);
  rule.update_scale = update_scale;
  return rule;
}

template <typename T>
std::vector<const T*> weights_of(const Rule& rule, void** weights) {
  return std::vector<const T*>((const T**)weights, (const T**)weights + rule.tensors());
}

}  // namespace

extern "C" {

int emulated_step(const char* text, double update_scale, double grad_scale, double decay, const void* rate,
                  int is_double, int is_bfloat16, void** weights, int count, void** params, void** grads, void** states,
                  const int64_t* numels, const int* dtypes, bool* finite, const void* given, const void* units) {
  const Rule rule = make_rule(text, update_scale);
  std::vector<Segment> segments;
  for (int i = 0; i < count; ++i) {
    segments.push_back({params[i], grads[i], states[i], numels[i], 0, (Dtype)dtypes[i], i});
  }
  Workspaces workspaces;
  const auto run = [&](auto zero, auto stored_zero) {
    using T = decltype(zero);
    using Stored = decltype(stored_zero);
    const Factors<T> factors{update_scale, decay, (const T*)rate, (const T*)units};
    return step<T, Stored>(rule, weights_of<T>(rule, weights), segments, factors, grad_scale, (const T*)given, finite,
                           workspaces.queue());
  };
  if (is_bfloat16) return run(float(), BFloat16());
  return is_double ? run(double(), double()) : run(float(), float());
}

int emulated_find_nonfinite(int count, void** tensors, const int64_t* numels, const int* dtypes, int in_float32,
                            bool* finite) {
  std::vector<Segment> segments;
  for (int i = 0; i < count; ++i) {
    segments.push_back({nullptr, tensors[i], nullptr, numels[i], 0, (Dtype)dtypes[i], i});
  }
  Workspaces workspaces;
  return find_nonfinite(segments, finite, in_float32, workspaces.queue());
}

int emulated_window_backward(const char* text, double update_scale, int is_double, void** weights, int64_t numel,
                             int64_t steps, const void* state, const void* grads, const void* adjoints,
                             const void* dstate, const void* given, void* dstate_first, void* dgrads, void* dgiven,
                             void* dweights) {
  const Rule rule = make_rule(text, update_scale);
  Workspaces workspaces;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Window<T> window{numel,
                           steps,
                           (const T*)state,
                           (const T*)grads,
                           (const T*)adjoints,
                           (const T*)dstate,
                           (const T*)given,
                           (T*)dstate_first,
                           (T*)dgrads,
                           (T*)dgiven};
    return window_backward<T>(rule, weights_of<T>(rule, weights), window, (T*)dweights, workspaces.queue());
  };
  return is_double ? run(double()) : run(float());
}

// Where the kernels for every size find the output's weights, which come last.
int64_t emulated_offset_of_output(const char* text) {
  const GenericRule<float> rule{parse_rule(text), nullptr, {}};
  return rule.before(rule.layers);
}

// The activations of the fast kernels, as csrc/cpu's operator elementwise has them.
void emulated_elementwise(int is_tanh, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = is_tanh ? tanh_of_power(from[i]) : sigmoid_of_power(from[i]);
}
}
