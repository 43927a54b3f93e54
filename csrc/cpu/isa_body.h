// The kernels of one instruction set. Included inside its namespace, after its precisions F32 and F64.

constexpr int kMaxBlockLanes = 32;

#include "cpu/vector_math.h"
#define FORMULA INLINE
#include "formulas.h"
#undef FORMULA
#include "cpu/cell.h"
#include "cpu/step.h"
#include "cpu/window_backward.h"

template <class P>
void elementwise(Function function, const typename P::T* from, typename P::T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += P::lanes) {
    typename P::V x[1] = {P::load(from + i)};
    if (function == Function::kSigmoid) sigmoid<P>(x);
    if (function == Function::kTanh) tanh<P>(x);
    if (function == Function::kLog) x[0] = logarithm<P>(x[0]);
    if (function == Function::kElu) elu<P>(x);
    P::store(to + i, x[0]);
  }
}

template <class P>
constexpr Kernels<typename P::T> table() {
  static_assert(P::vectors * P::lanes <= kMaxBlockLanes);
  return {P::blocking,    P::block_tiles, step<P>,        window_backward<P>,
          elementwise<P>, step_scratch,   window_scratch, blocks_together};
}

const Kernels<float> kF32 = table<F32>();
const Kernels<double> kF64 = table<F64>();
