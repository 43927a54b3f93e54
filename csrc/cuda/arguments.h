// What the kernels are given: plain data that is passed by value, so that a launch copies nothing to the device itself.
#pragma once

#include <cstdint>

#include "cuda/numbers.cuh"
#include "rule.h"

namespace fastl2l::cuda {

// One parameter's coordinates.
struct Segment {
  void* param;
  const void* grad;
  void* state;
  int64_t numel;
  int64_t first_tile;  // running number over all segments
  Dtype dtype;         // of param and grad
  int number;          // among all parameters
};

// As many segments as one launch takes: the arguments of a kernel have to fit into 4 KB.
constexpr int kMostSegments = 64;

struct Segments {
  Segment at[kMostSegments];
  int count;
  int64_t tiles;
  int64_t tiles_before;  // of what other launches take
  bool in_float32;       // whether numbers must be finite as float32
  bool* finite;          // null, or whether all gradients are: nothing is changed while they are not

  DEVICE bool wanted() const { return finite == nullptr || *finite; }

  // The segment that a tile belongs to.
  DEVICE const Segment& of(int64_t tile) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (at[middle].first_tile <= tile ? low : high) = middle;
    }
    return at[low];
  }
};

// What updates and parameters are multiplied by.
template <typename T>
struct Factors {
  double update_scale, decay;
  const T* rate;   // multiplies both, or null: it is read by the device, so that the host need not wait for it
  const T* units;  // of each parameter a number that multiplies its update, or null

  DEVICE double rate_now() const { return rate ? (double)*rate : 1.0; }
  DEVICE T of_update() const { return (T)(update_scale * rate_now()); }
  DEVICE double of_parameter() const { return 1 - decay * rate_now(); }
  DEVICE T unit_of(const Segment& segment) const { return units ? units[segment.number] : (T)1; }
};

// The weights of a rule of few layers, where they lie in torch's memory.
template <int Layers>
struct WeightPointers {
  const float *w_in, *b_in;  // of the projection, or null
  struct Layer {
    const float *w_ih, *w_hh, *bias;
  };
  Layer layer[Layers];
  const float *w_out, *b_out;
};

// A window of truncated BPTT; see ops/schema.py.
template <typename T>
struct Window {
  int64_t numel, steps;
  const T* state;     // [tile][row][16], before the first step
  const T* grads;     // [steps][numel]
  const T* adjoints;  // [steps][numel]
  const T* dstate;    // [tile][row][16], or null
  const T* given;     // [steps][tile][given row][16], or null
  T* dstate_first;    // [tile][row][16], or null
  T* dgrads;          // [steps][numel], or null
  T* dgiven;          // as given, or null

  // Whether the way back goes on to the rule's inputs.
  DEVICE bool needs_inputs(int feature_rows) const { return dgrads || dgiven || (dstate_first && feature_rows > 0); }
};

// Weight gradients are summed in parts, whose bounds depend on the number of coordinates alone.
struct Parts {
  int64_t groups;  // of coordinates, each of them one turn of a block
  int64_t parts;
  int64_t count;  // weights
  double* sums;   // [parts][count], in the order of the weights

  // The first group of a part.
  FASTL2L_HOST_DEVICE int64_t begin(int64_t part) const { return part * groups / parts; }
};

}  // namespace fastl2l::cuda
