// Stands in for csrc/cuda/device.cuh on the host: the very same kernels, compiled by any C++ compiler, with every
// thread of a block as a fiber. Fibers run until they wait for their warp or their block, so a kernel that deadlocks,
// or whose threads meet in different places, is found out. Tensor cores are emulated from the documented layout of
// their fragments, and are no more accurate than the real ones: what is not TF32 is cut off, and so are their sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DEVICE inline
#define KERNEL(threads, blocks_per_multiprocessor) void
#define KERNEL_ARGUMENT const
#define UNROLL
#define ONE_AT_A_TIME

namespace fastl2l::cuda {

using Error = int;
using Stream = int;
using Half = _Float16;
struct alignas(8) TwoFloats {
  float x, y;
};

struct BFloat16 {
  uint16_t bits;
};

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulator: %s\n", message);
  std::abort();
}

// Switching of stacks. ucontext would do everywhere, but makes two system calls each time.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
asm(R"(
.text
.type fastl2l_switch_stack, @function
fastl2l_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" void fastl2l_switch_stack(Context* from, Context* to);
inline void switch_to(Context& from, Context& to) { fastl2l_switch_stack(&from, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // as after a call
  *--top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
#else
struct Context {
  ucontext_t context;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// Where threads meet; the last one to come does what is to be done for all.
struct Meeting {
  int expected, arrived = 0, generation = 0;
  const void* place = nullptr;
};

struct Warp {
  Meeting meeting{kLanes};
  float operands[kLanes][8];
  float results[kLanes][4];
};

struct Thread {
  Context context;
  bool done;
  const Meeting* waits_for;
  int generation;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  std::unique_ptr<char[]> shared;
  std::function<void()> kernel;
  Context scheduler;
  int current, index, count;
};

inline Block* block;

inline Warp& warp() { return block->warps[block->current / kLanes]; }
inline int lane() { return block->current % kLanes; }

template <class F>
void meet(Meeting& meeting, const void* place, F all_are_here) {
  if (meeting.arrived > 0 && meeting.place != place) fail("threads of a warp or block meet in different functions");
  meeting.place = place;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    all_are_here();
    return;
  }
  Thread& me = block->threads[block->current];
  me.waits_for = &meeting;
  me.generation = meeting.generation;
  switch_to(me.context, block->scheduler);
}

inline void run_thread() {
  block->kernel();
  Thread& me = block->threads[block->current];
  me.done = true;
  switch_to(me.context, block->scheduler);
}

// Runs the threads in turn, each as far as it gets, until all are done.
inline void run_block() {
  for (size_t left = block->threads.size(); left > 0;) {
    bool moved = false;
    for (block->current = 0; block->current < (int)block->threads.size(); ++block->current) {
      Thread& thread = block->threads[block->current];
      if (thread.done || (thread.waits_for && thread.waits_for->generation == thread.generation)) continue;
      moved = true;
      thread.waits_for = nullptr;
      switch_to(block->scheduler, thread.context);
      left -= thread.done;
    }
    if (!moved) fail("threads wait for others that are done");
  }
}

// What the documentation allows an approximation to be wrong by, drawn from the argument's bits.
inline float blur(double exact, float argument, double relative) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof bits);
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  bits ^= bits >> 16;
  return (float)(exact * (1 + relative * (bits / 2147483648.0 - 1)));
}

inline float without_subnormal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

}  // namespace emulator

inline int thread_index() { return emulator::block->current; }
inline int block_index() { return emulator::block->index; }
inline int block_count() { return emulator::block->count; }
inline char* shared_memory() { return emulator::block->shared.get(); }
inline void prefetch(const void*) {}
inline int computed_here(int x) { return x; }

inline void sync_block() {
  emulator::meet(emulator::block->meeting, (void*)&sync_block, [] {});
}
inline void sync_warp() {
  emulator::meet(emulator::warp().meeting, (void*)&sync_warp, [] {});
}

inline float shuffle(float x, int lane) {
  emulator::Warp& warp = emulator::warp();
  float* mine = warp.operands[emulator::lane()];
  mine[0] = x;
  mine[1] = (float)lane;
  emulator::meet(warp.meeting, (void*)&shuffle, [&] {
    for (int i = 0; i < emulator::kLanes; ++i) warp.results[i][0] = warp.operands[(int)warp.operands[i][1]][0];
  });
  return warp.results[emulator::lane()][0];
}
inline float shuffle_xor(float x, int lanes) { return shuffle(x, emulator::lane() ^ lanes); }

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Towards 0, as tensor cores do it.
inline float cut_off(double x) {
  const float nearest = (float)x;
  return std::fabs((double)nearest) > std::fabs(x) ? from_bits(bits_of(nearest) - 1) : nearest;
}

inline uint32_t to_tf32(float x) {
  return std::isnan(x) ? 0x7fffffffu : (bits_of(x) + 0x1000u) & 0xffffe000u;  // halves away from 0
}

// Fragments as in the PTX ISA, matrix multiply-accumulate .m16n8k8 with .tf32: with group = lane / 4 and place = lane %
// 4,
//   a_i: row group (+ 8 for i = 1, 3), column place (+ 4 for i = 2, 3)
//   b_i: row place (+ 4 for i = 1), column group
//   d_i: row group (+ 8 for i = 2, 3), column 2 place (+ 1 for i = 1, 3)
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Warp& warp = emulator::warp();
  float* mine = warp.operands[emulator::lane()];
  for (int i = 0; i < 4; ++i) mine[i] = from_bits(a[i] & 0xffffe000u);
  for (int i = 0; i < 2; ++i) mine[4 + i] = from_bits(b[i] & 0xffffe000u);
  for (int i = 0; i < 4; ++i) warp.results[emulator::lane()][i] = d[i];
  emulator::meet(warp.meeting, (void*)&multiply_add_tf32, [&] {
    float left[16][8], right[8][8], sum[16][8];
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int i = 0; i < 4; ++i) {
        left[group + 8 * (i % 2)][place + 4 * (i / 2)] = warp.operands[lane][i];
        sum[group + 8 * (i / 2)][2 * place + i % 2] = warp.results[lane][i];
      }
      for (int i = 0; i < 2; ++i) right[place + 4 * i][group] = warp.operands[lane][4 + i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        for (int half = 0; half < 8; half += 4) {  // the older ones take 4 products at a time
          double exact = sum[row][column];
          for (int k = half; k < half + 4; ++k) exact += (double)left[row][k] * right[k][column];
          sum[row][column] = cut_off(exact);
        }
      }
    }
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) warp.results[lane][i] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = warp.results[emulator::lane()][i];
}

inline float approximate_exp2(float x) {
  const float argument = emulator::without_subnormal(x);
  return emulator::without_subnormal(emulator::blur(std::exp2((double)argument), argument, 0x1p-22));
}
inline float approximate_reciprocal(float x) {
  const float argument = emulator::without_subnormal(x);
  int exponent;
  const bool power_of_2 = std::fabs(std::frexp(argument, &exponent)) == 0.5f;  // the inverse is exact
  return emulator::without_subnormal(emulator::blur(1 / (double)argument, argument, power_of_2 ? 0 : 0x1p-23));
}

inline float wide(Half x) { return (float)x; }
inline float wide(BFloat16 x) { return from_bits((uint32_t)x.bits << 16); }
inline void round_to(float x, Half& y) { y = (Half)x; }
inline void round_to(float x, BFloat16& y) {
  const uint32_t bits = bits_of(x);
  y.bits = std::isnan(x) ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t to_two_bfloat16(float first, float second) {
  BFloat16 low, high;
  round_to(first, low);
  round_to(second, high);
  return low.bits | (uint32_t)high.bits << 16;
}

inline Error copy_on_device(void* to, const void* from, size_t bytes, Stream) {
  std::memcpy(to, from, bytes);
  return 0;
}

template <typename... Parameters, typename... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream,
             Arguments&&... arguments) {
  static const std::unique_ptr<char[]> stacks(new char[1024 * emulator::kStack]);
  emulator::Block block;
  emulator::block = &block;
  block.count = (int)blocks;
  block.kernel = [&] { kernel(arguments...); };
  for (block.index = 0; block.index < block.count; ++block.index) {
    block.threads.assign(threads, {});
    block.warps.assign(threads / emulator::kLanes, {});
    block.meeting = {threads};
    block.shared.reset(new char[shared_bytes]);
    std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN
    for (int i = 0; i < threads; ++i) {
      block.threads[i].done = false;
      emulator::prepare(block.threads[i].context, stacks.get() + i * emulator::kStack, emulator::run_thread);
    }
    emulator::run_block();
  }
  return 0;
}

}  // namespace fastl2l::cuda
