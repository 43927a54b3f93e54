// Runs the kernels without torch: reads weights, state, gradients and adjoints as float32 from a file, and writes the
// updates and the state after the steps, and the gradients of the weights. tests/test_portable.py builds it, for this
// machine and for others.
//
//     run_kernels IN OUT RULE N steps
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "rule_text.h"

using namespace fastl2l;
using namespace fastl2l::cpu;

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  Rule rule = parse_rule(argv[3]);
  rule.update_scale = 0.1;
  const int64_t n = std::atol(argv[4]), steps = std::atol(argv[5]), tiles = tiles_of(n);
  std::FILE* in = std::fopen(argv[1], "rb");
  const auto read = [&](size_t count) {
    std::vector<float> numbers(count);
    if (std::fread(numbers.data(), sizeof(float), count, in) != count) std::exit(3);
    return numbers;
  };
  std::vector<std::vector<float>> weights;
  each_weight(rule, [&](int, int64_t rows, int64_t columns) { weights.push_back(read(rows * columns)); });
  const std::vector<float> first = read(tiles * rule.state_rows() * kTile);
  const std::vector<float> gradients = read(steps * n), adjoints = read(steps * n);

  const Kernels<float>& kernel = *instruction_set().f32;
  std::vector<const float*> pointers;
  for (const auto& weight : weights) pointers.push_back(weight.data());
  Packer<float> packer;
  const PartConstants<float> constants = part_constants<float>(rule);
  const PackedWeights<float> packed = packer.pack(rule, pointers, kernel.blocking, true);
  std::vector<float> scratch(std::max(kernel.step_scratch(rule), kernel.window_scratch(rule, steps)));

  std::vector<float> updates(n), state = first;
  const int64_t first_tile[2] = {0, tiles};
  for (int64_t t = 0; t < steps; ++t) {
    const Segment<float> segment{
        reinterpret_cast<char*>(updates.data()),
        reinterpret_cast<const char*>(&gradients[t * n]),
        state.data(),
        state.data(),
        n,
        1,
        sizeof(float),
        [](const void* from, float* to, int count) { std::copy_n(static_cast<const float*>(from), count, to); },
        [](void* to, double kept, const float* update, int count) {
          float* numbers = static_cast<float*>(to);
          for (int i = 0; i < count; ++i) numbers[i] = (float)kept * numbers[i] + update[i];
        }};
    kernel.step({rule, constants, packed, 1.0f, 1.0, nullptr, &segment, 1, first_tile, false, rule.given}, 0, tiles,
                scratch.data());
  }
  std::vector<double> sums(weight_count(rule));
  kernel.window_backward({rule, constants, packed, n, steps, first.data(), gradients.data(), adjoints.data(), nullptr,
                          nullptr, nullptr, nullptr, nullptr, rule.given, false},
                         0, tiles, sums.data(), scratch.data());
  std::vector<float> dweights(sums.size());
  unpack_gradients(rule, sums.data(), dweights.data());

  std::FILE* out = std::fopen(argv[2], "wb");
  for (const auto* numbers : {&updates, &state, &dweights}) {
    std::fwrite(numbers->data(), sizeof(float), numbers->size(), out);
  }
  return std::fclose(out);
}
