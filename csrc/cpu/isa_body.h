// The kernels of one instruction set. Included inside its namespace, after its precisions F32 and F64.

constexpr int kMaxBlockLanes = 32;

#include "cpu/vector_math.h"
#include "cpu/cell.h"
#include "cpu/step.h"
#include "cpu/window_backward.h"

template <class P>
constexpr Kernels<typename P::T> table() {
  static_assert(P::vectors * P::lanes <= kMaxBlockLanes);
  return {P::blocking, P::block_tiles, step<P>, window_backward<P>, step_scratch, window_scratch};
}

const Kernels<float> kF32 = table<F32>();
const Kernels<double> kF64 = table<F64>();
