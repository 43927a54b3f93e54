// What the kernels of every device know of a rule. Plain data only: this is compiled for every instruction set.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTL2L_HOST_DEVICE __host__ __device__
#else
#define FASTL2L_HOST_DEVICE
#endif

namespace fastl2l {

// State is kept in tiles of 16 coordinates, [tile][row][16]: a tile's rows are neighbours in memory, whatever N is.
constexpr int kTile = 16;

struct Rule {
  int layers, hidden, features;
  bool log_sign;    // else raw
  double constant;  // p of log_sign, scale of raw
  double update_scale;
  double log_sign_threshold, log_sign_slope;  // exp(-p), exp(p)

  FASTL2L_HOST_DEVICE int inputs(int layer) const { return layer == 0 ? features : hidden; }
  FASTL2L_HOST_DEVICE int state_rows() const { return 2 * layers * hidden; }
};

FASTL2L_HOST_DEVICE constexpr int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

// How many weights a rule has.
FASTL2L_HOST_DEVICE inline int64_t weight_count(const Rule& rule) {
  int64_t n = rule.hidden + 1;
  for (int layer = 0; layer < rule.layers; ++layer) n += 4 * rule.hidden * (rule.inputs(layer) + 1 + rule.hidden);
  return n;
}

// What the gates' sums are multiplied by, in the order i, f, g, o: the kernels take powers of 2 of them, -x log2(e) for
// sigmoid and 2 x log2(e) for tanh.
constexpr double kLog2E = 1.4426950408889634;
constexpr double kGateFactors[4] = {-kLog2E, -kLog2E, 2 * kLog2E, -kLog2E};

}  // namespace fastl2l
