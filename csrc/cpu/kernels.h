// What every instruction set's kernels take and offer. Plain data only: the files of an instruction set are compiled
// for it, so anything inline that they shared with the rest could end up in code that older machines run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "rule.h"

namespace fastl2l::cpu {

// Weights as the kernels read them; offsets count elements from `data`. See pack.h.
template <typename T>
struct PackedWeights {
  struct Layer {
    const T* forward;          // [unit block][bias, inputs, h][units of the block * 4 gates]
    const T* input_backward;   // [input block][4 * unit + gate][inputs of the block]
    const T* hidden_backward;  // the same for W_hh
  };
  const T* projection;  // [unit][bias, inputs]
  const Layer* layer;
  const T* out;  // [hidden], then the bias
};

// One parameter's coordinates. `read` widens n gradients to T, `add` multiplies n numbers of the parameter by `kept`
// and adds updates, in its dtype.
template <typename T>
struct Segment {
  char* param;
  const char* grad;
  void* state;         // of T, or bfloat16; written
  const void* before;  // read; the state itself, or of T elsewhere
  int64_t numel;
  T unit;  // what updates are multiplied by
  int element_size;
  void (*read)(const void* source, T* target, int n);
  void (*add)(void* param, double kept, const T* update, int n);
};

template <typename T>
struct StepArgs {
  Rule rule;
  PartConstants<T> constants;
  PackedWeights<T> weights;
  T grad_scale;
  double kept;     // what the parameters are multiplied by
  const T* given;  // [tile][given row][16] over all segments, or null
  const Segment<T>* segments;
  int64_t segment_count;
  const int64_t* first_tile;  // [segment_count + 1]: running number of each segment's first tile
  bool state_is_bfloat16;     // for T = float
  int given_rows;             // between tiles of `given`, which may be the first rows of something larger
};

template <typename T>
struct WindowArgs {
  Rule rule;
  PartConstants<T> constants;
  PackedWeights<T> weights;
  int64_t numel, steps;
  const T* state;     // [tile][row][16], before the first step
  const T* grads;     // [steps][numel]
  const T* adjoints;  // [steps][numel]: dL/dupdate, or null
  const T* dstate;    // [tile][row][16], dL/d(state after the last step), or null
  const T* given;     // [steps][tile][given row][16], or null
  T* dstate_first;    // [tile][row][16], or null; may be where dstate is
  T* dgrads;          // [steps][numel], or null
  T* dgiven;          // as given, or null
  int given_rows;     // between tiles of `given` and `dgiven`, which may be the first rows of something larger
  bool adds_dgiven;   // to what is there
};

// How an instruction set blocks its loops; the packed weights follow it.
struct Blocking {
  int units;   // LSTM units whose gates are accumulated together
  int inputs;  // inputs whose adjoints are accumulated together
};

enum class Function { kSigmoid, kTanh, kLog, kElu };

template <typename T>
struct Kernels {
  Blocking blocking;
  int block_tiles;  // tiles that the fast path takes together
  // Steps tiles [begin, end) of all segments.
  void (*step)(const StepArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // Adds the weight gradients of tiles [begin, end) to `dweights`, in the order of weight_gradient_index().
  void (*window_backward)(const WindowArgs<T>&, int64_t begin, int64_t end, double* dweights, T* scratch);
  // One of the functions of vector_math.h, for tests: n is a multiple of kTile.
  void (*elementwise)(Function, const T* from, T* to, int64_t n);
  size_t (*step_scratch)(const Rule&);                   // elements
  size_t (*window_scratch)(const Rule&, int64_t steps);  // elements
  int64_t (*blocks_together)(int64_t steps);             // whose weight gradients are reduced over lanes at once
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

extern const InstructionSet kAvx512, kAvx2, kGeneric;

// The instruction set in use: the best that the machine has, or what FASTL2L_CPU_ISA names.
const InstructionSet& instruction_set();

// Names of all that the machine has, the best first, separated by commas.
std::string instruction_sets();

}  // namespace fastl2l::cpu
