// Which coordinates means are over, and what goes on over those of each function: sums, and rows of numbers between the
// order of coordinates and tiles.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "rule.h"

namespace fastl2l::cpu {

// Coordinates that a thread takes the sums of at a time, and that are worth waking one for.
constexpr int64_t kLongest = 4096;

// Coordinates of one function that are neighbours, and so are their lanes.
struct Stretch {
  int64_t coordinate, lane, size, function;
};

// Which coordinates means are over: see fastl2l/ops/coordinates.py.
struct Functions {
  int64_t count, dim;
  std::vector<Stretch> stretches;  // in the order of their coordinates

  // `tensors`: sizes of what begins with a tile of its own; `parts`: sizes of what functions lie side by side in. Both
  // have `numel` coordinates in all.
  Functions(int64_t numel, const std::vector<int64_t>& tensors, const std::vector<int64_t>& parts, int64_t functions)
      : count(functions) {
    STD_TORCH_CHECK(functions >= 1 && functions <= std::max<int64_t>(numel, 1), "functions: expected 1 to ",
                    std::max<int64_t>(numel, 1), ", got ", functions);
    check_sizes("tensors", tensors, numel, 1);
    check_sizes("parts", parts, numel, functions);
    dim = numel / functions;
    size_t tensor = 0;
    int64_t coordinate = 0, in_tensor = 0, tile = 0;
    for (const int64_t part : parts) {
      for (int64_t function = 0; function < functions; ++function) {
        for (int64_t left = part / functions; left > 0;) {
          while (in_tensor == tensors[tensor]) {
            tile += tiles_of(tensors[tensor++]);
            in_tensor = 0;
          }
          const int64_t size = std::min({left, tensors[tensor] - in_tensor, kLongest});
          stretches.push_back({coordinate, tile * kTile + in_tensor, size, function});
          coordinate += size;
          in_tensor += size;
          left -= size;
        }
      }
    }
  }

  // Sizes of parts of `numel` coordinates, each a multiple of so much.
  static void check_sizes(const char* name, const std::vector<int64_t>& sizes, int64_t numel, int64_t multiple) {
    int64_t left = numel;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 0 && size <= left && size % multiple == 0, name, ": expected multiples of ", multiple,
                      " that are ", numel, " in all, got ", size);
      left -= size;
    }
    STD_TORCH_CHECK(left == 0, name, ": expected ", numel, " coordinates in all, got ", numel - left);
  }

  // Calls visit(stretch's number, stretch) on torch's threads.
  template <class Visit>
  void each_stretch(Visit visit) const {
    const int64_t all = (int64_t)stretches.size(), least = all * kLongest / std::max(dim * count, kLongest);
    share_out(all, std::max<int64_t>(least, 1), std::max<int64_t>(least / 4, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(i, stretches[i]);
    });
  }

  // Sums of what visit(stretch, sums [width]) finds, [function][width]. They are of float64, and of the same bits for
  // any number of threads.
  template <class Visit>
  std::vector<double> sums(int64_t width, Visit visit) const {
    std::vector<double> of_stretches(stretches.size() * width), found(count * width);
    each_stretch([&](int64_t i, const Stretch& stretch) { visit(stretch, &of_stretches[i * width]); });
    for (size_t i = 0; i < stretches.size(); ++i) {
      double* to = &found[stretches[i].function * width];
      for (int64_t k = 0; k < width; ++k) to[k] += of_stretches[i * width + k];
    }
    return found;
  }
};

// Calls visit(the first of its lanes in a row of tiles [tile][rows][16], how many) for each tile of a stretch.
template <typename T, class Visit>
void each_tile(T* tiles, int64_t rows, const Stretch& stretch, Visit visit) {
  for (int64_t lane = stretch.lane, end = stretch.lane + stretch.size; lane < end;) {
    const int64_t first = lane % kTile, n = std::min(kTile - first, end - lane);
    visit(tiles + lane / kTile * rows * kTile + first, (int)n);
    lane += n;
  }
}

// Sums of the first `averages` rows over each function, [function][averages].
template <typename T>
std::vector<double> row_sums(const Functions& functions, const T* tiles, int64_t rows, int averages) {
  return functions.sums(averages, [&](const Stretch& stretch, double* sums) {
    for (int row = 0; row < averages; ++row) {
      double lanes[kTile] = {};
      each_tile(tiles + row * kTile, rows, stretch, [&](const T* at, int n) {
        if (n == kTile) {
          for (int i = 0; i < kTile; ++i) lanes[i] += at[i];
        } else {
          for (int i = 0; i < n; ++i) lanes[i] += at[i];
        }
      });
      sums[row] = std::accumulate(lanes, lanes + kTile, 0.0);
    }
  });
}

// Writes values [function][averages] to the first rows of each function's coordinates.
template <typename T>
void spread(const Functions& functions, const std::vector<T>& values, T* tiles, int64_t rows, int averages) {
  functions.each_stretch([&](int64_t, const Stretch& stretch) {
    for (int row = 0; row < averages; ++row) {
      const T value = values[stretch.function * averages + row];
      each_tile(tiles + row * kTile, rows, stretch, [&](T* at, int n) { std::fill_n(at, n, value); });
    }
  });
}

// Copies or adds `count` rows of numbers between `rows` [row][coordinate] and tiles [tile][tile_rows][16], whose first
// row is `tiles`'s: visit(a row's first lane in a tile, the coordinate in that row, how many).
template <typename Row, typename Tile, class Visit>
void each_run(const Functions& functions, Row* rows, int count, Tile* tiles, int64_t tile_rows, Visit visit) {
  const int64_t numel = functions.count * functions.dim;
  functions.each_stretch([&](int64_t, const Stretch& stretch) {
    int64_t coordinate = stretch.coordinate;
    each_tile(tiles, tile_rows, stretch, [&](Tile* at, int n) {
      for (int row = 0; row < count; ++row) visit(at + row * kTile, rows + row * numel + coordinate, n);
      coordinate += n;
    });
  });
}

}  // namespace fastl2l::cpu
