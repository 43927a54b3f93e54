// In place of torch's header, for run_share_out.cpp: as many threads as asked for, one for every number.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t threads = 1;
inline uint32_t get_num_threads() { return threads; }

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  std::vector<std::thread> running;
  for (int64_t i = begin; i < end; ++i) running.emplace_back([&work, i] { work(i, i + 1); });
  for (std::thread& thread : running) thread.join();
}

}  // namespace torch::stable
