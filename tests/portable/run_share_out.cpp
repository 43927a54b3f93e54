// How cpu/parallel.h shares work out, for tests/test_portable.py: exits with 0 if all is as it should be.
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

using namespace fastl2l::cpu;

bool everything_is_done_once(int64_t count, int64_t least, int64_t stretch) {
  std::vector<std::atomic<int>> times(count);
  share_out(count, least, stretch, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++times[i];
  });
  return std::all_of(times.begin(), times.end(), [](const std::atomic<int>& done) { return done == 1; });
}

// The thread that has 0 waits until all else is done, half of which was its own to do.
bool a_late_thread_is_helped() {
  constexpr int64_t count = 64;
  std::atomic<int64_t> done = 0;
  bool helped = false;
  share_out(count, 1, 1, [&](int64_t begin, int64_t) {
    for (int tries = 0; begin == 0 && !helped && tries < 10000; ++tries) {
      helped = done == count - 1;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ++done;
  });
  return helped;
}

int main() {
  for (const uint32_t threads : {1, 2, 3, 8}) {
    torch::stable::threads = threads;
    for (const int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t least : {1, 16}) {
        for (const int64_t stretch : {1, 3, 64}) {
          if (everything_is_done_once(count, least, stretch)) continue;
          std::printf("not once: threads %u, count %ld, least %ld, stretch %ld\n", threads, count, least, stretch);
          return 1;
        }
      }
    }
  }
  torch::stable::threads = 2;
  if (a_late_thread_is_helped()) return 0;
  std::printf("the late thread was not helped\n");
  return 1;
}
