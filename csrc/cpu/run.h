// The kernels on torch's threads: what every operator runs them by.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace fastl2l::cpu {

// Tiles that are worth waking another thread for.
constexpr int64_t kTilesPerThread = 16;
// Tiles of a step that a thread takes at a time: some microseconds.
constexpr int64_t kTilesAtOnce = 8;
// Weight gradients are summed in at most so many parts, whose bounds depend on N and the steps alone: the same bits for
// any number of threads. Of a single step, which rules whose coordinates talk go by, a part has as many blocks as the
// kernel reduces together; windows are summed as they were in the first version.
constexpr int64_t kMostParts = 64;
// And so few that their sums, of float64, stay below so many bytes for a rule, or a layer of one whose coordinates
// talk; what is more than a few megabytes of them is given back after the call.
constexpr int64_t kMostSums = int64_t(1) << 28, kMostKept = int64_t(1) << 24;

// Memory that a thread keeps from call to call, aligned to cache lines.
template <typename T>
T* scratch(size_t elements) {
  struct Free {
    void operator()(void* at) const { ::operator delete(at, std::align_val_t(64)); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t bytes = 0;
  if (bytes < elements * sizeof(T)) {
    memory.reset();
    bytes = 0;
    memory.reset(::operator new(elements * sizeof(T), std::align_val_t(64)));
    bytes = elements * sizeof(T);
  }
  return static_cast<T*>(memory.get());
}

template <typename T>
std::vector<const T*> pointers(const std::vector<torch::stable::Tensor>& tensors) {
  std::vector<const T*> result;
  for (const auto& tensor : tensors) result.push_back(static_cast<const T*>(tensor.data_ptr()));
  return result;
}

template <typename T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return *instruction_set().f32;
  } else {
    return *instruction_set().f64;
  }
}

// What a segment reads and writes its numbers by, which are stored as `Stored`.
template <typename T, typename Stored>
void read(const void* source, T* target, int n) {
  const Stored* from = static_cast<const Stored*>(source);
  for (int i = 0; i < n; ++i) target[i] = static_cast<T>(from[i]);
}

template <typename T, typename Stored>
void add(void* param, double kept, const T* update, int n) {
  using Wide = std::conditional_t<sizeof(Stored) == 8 || sizeof(T) == 8, double, float>;
  Stored* to = static_cast<Stored*>(param);
  const Wide factor = static_cast<Wide>(kept);  // 1 changes no bit
  for (int i = 0; i < n; ++i) {
    to[i] = static_cast<Stored>(factor * static_cast<Wide>(to[i]) + static_cast<Wide>(update[i]));
  }
}

// A step of all tiles.
template <typename T>
void run_step(const StepArgs<T>& args) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t tiles = args.first_tile[args.segment_count];
  const int64_t block = kernel.block_tiles, blocks = (tiles + block - 1) / block;
  share_out(blocks, kTilesPerThread / block, kTilesAtOnce / block, [&](int64_t begin, int64_t end) {
    kernel.step(args, begin * block, std::min(end * block, tiles), scratch<T>(kernel.step_scratch(args.rule)));
  });
}

// The weight gradients of all tiles, of one window or several of as many steps.
template <typename T>
class WeightSums {
 public:
  void begin(const Rule& rule, int64_t numel, int64_t steps) {
    const Kernels<T>& kernel = kernels<T>();
    rule_ = rule;
    tiles_ = tiles_of(numel);
    blocks_ = (tiles_ + kernel.block_tiles - 1) / kernel.block_tiles;
    count_ = weight_count(rule);
    const int64_t most = kMostSums / (count_ * (int64_t)sizeof(double));
    const int64_t together = steps == 1 ? kernel.blocks_together(1) : 1;
    parts_ = std::min((blocks_ + together - 1) / together, std::clamp<int64_t>(most, 1, kMostParts));
    sums_.assign(std::max<int64_t>(parts_, 1) * count_, 0.0);
  }

  void add(const WindowArgs<T>& args) {
    const Kernels<T>& kernel = kernels<T>();
    share_out(parts_, 1, 1, [&](int64_t begin, int64_t end) {
      T* memory = scratch<T>(kernel.window_scratch(args.rule, args.steps));
      for (int64_t part = begin; part < end; ++part) {
        kernel.window_backward(args, tile_of(part), tile_of(part + 1), &sums_[part * count_], memory);
      }
    });
  }

  // In the order of the weights; nothing is left then.
  void write(T* dweights) {
    for (int64_t part = 1; part < parts_; ++part) {
      for (int64_t i = 0; i < count_; ++i) sums_[i] += sums_[part * count_ + i];
    }
    unpack_gradients(rule_, sums_.data(), dweights);
    if ((int64_t)(sums_.size() * sizeof(double)) > kMostKept) std::vector<double>().swap(sums_);
  }

 private:
  int64_t tile_of(int64_t part) const { return std::min(part * blocks_ / parts_ * kernels<T>().block_tiles, tiles_); }

  Rule rule_;
  int64_t tiles_ = 0, blocks_ = 0, count_ = 0, parts_ = 0;
  std::vector<double> sums_;
};

}  // namespace fastl2l::cpu
