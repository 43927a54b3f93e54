// How work is shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fastl2l::cpu {

// Calls work(begin, end) for stretches of [0, count), at most `stretch` long; a further thread is woken for every
// `least` of count. A thread begins with a part of its own, the same one at every call, since its caches may hold what
// lies there. Then it helps the others: cores are not equally fast, and other processes are on them too.
template <class Work>
void share_out(int64_t count, int64_t least, int64_t stretch, const Work& work) {
  const int64_t threads = std::min<int64_t>((count + least - 1) / least, torch::stable::get_num_threads());
  if (threads <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Part> parts(threads);
  for (int64_t i = 0; i < threads; ++i) {
    parts[i].next = i * count / threads;
    parts[i].end = (i + 1) * count / threads;
  }
  const auto help = [&](Part& part) {
    for (;;) {
      const int64_t begin = part.next.fetch_add(stretch, std::memory_order_relaxed);
      if (begin >= part.end) return;
      work(begin, std::min(begin + stretch, part.end));
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      for (int64_t i = 0; i < threads; ++i) help(parts[(own + i) % threads]);
    }
  });
}

}  // namespace fastl2l::cpu
