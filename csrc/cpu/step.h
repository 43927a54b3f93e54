// One optimizer step over tiles of many parameters: gather gradients, features, LSTM, update, in one pass over the
// state. State in bfloat16 is widened tile by tile into the thread's scratch, and rounded when it goes back. Included
// inside the namespace of an instruction set.

template <class P>
struct TileOf {
  const Segment<typename P::T>* segment;
  int64_t number;  // over all segments
  int64_t offset;  // of the first coordinate in the segment
  int count;       // coordinates of the tile that exist
  typename P::T* state;
  const typename P::T* before;
  uint16_t* rounded;  // where the state is stored in bfloat16, or null
};

// Inputs, what is projected of them, and gates of a block, then its state if that is stored in bfloat16.
inline size_t block_scratch(const Rule& rule) {
  return (size_t)kMaxBlockLanes * (rule.inputs() + rule.projected + 4 * rule.hidden);
}
inline size_t step_scratch(const Rule& rule) {
  return block_scratch(rule) + (size_t)kMaxBlockLanes * rule.state_rows();
}

// A bfloat16 is the upper half of a float.
typedef uint32_t FloatBits __attribute__((may_alias));

INLINE void widen(const uint16_t* __restrict__ from, FloatBits* __restrict__ to, int n) {
  for (int i = 0; i < n; ++i) to[i] = (uint32_t)from[i] << 16;
}

// To the nearest, and halfway to the even one; NaN becomes a quiet NaN, as adding to its bits could make it infinite.
INLINE void round_to_bfloat16(const FloatBits* __restrict__ from, uint16_t* __restrict__ to, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = from[i], nearest = bits + 0x7fff + (bits >> 16 & 1);
    to[i] = (uint16_t)(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : nearest) >> 16);
  }
}

// A block is NV vectors: several whole tiles, or a part of one. `before`, `state` and `given` point at each vector's
// first row; the state may be where it was before.
template <class P, int NV>
INLINE void step_block(const StepArgs<typename P::T>& args, const typename P::T* gradient, typename P::T* update,
                       Rows<P, NV> before, Rows<P, NV> state, Rows<P, NV> given, typename P::T* scratch) {
  using V = typename P::V;
  const Rule& rule = args.rule;
  const int hidden = rule.hidden;
  const Rows<P, NV> features = dense<P, NV>(scratch), projected = features.from(rule.inputs());
  const Rows<P, NV> gates = projected.from(rule.projected);
  const int lstm_rows = rule.lstm_rows();
  write_features<P, NV>(args.constants, gradient, before.from(lstm_rows), state.from(lstm_rows), features);
  for (int k = 0; k < rule.given; ++k) {
    for (int v = 0; v < NV; ++v) features.store(rule.feature_count() + k, v, given.load(k, v));
  }
  Rows<P, NV> input = features;
  if (rule.projected > 0) {
    project<P, NV>(rule, args.weights.projection, features, projected);
    input = projected;
  }
  for (int layer = 0; layer < rule.layers; ++layer) {
    const Rows<P, NV> h_before = before.from(2 * layer * hidden), h = state.from(2 * layer * hidden);
    layer_forward<P, NV>(args.weights.layer[layer].forward, input, rule.layer_inputs(layer), h_before,
                         h_before.from(hidden), hidden, gates, h.from(hidden), h, [](int, int, V) INLINE_LAMBDA {});
    input = h;
  }
  if (rule.output == Output::kNone) return;
  V out[NV];
  output<P, NV>(rule, args.weights.out, input, out);
  for (int v = 0; v < NV; ++v) P::store(update + v * P::lanes, out[v] * P::set1((typename P::T)rule.update_scale));
}

// NT tiles, wherever each of them lies.
template <class P, int NT>
INLINE void step_tiles(const StepArgs<typename P::T>& args, const TileOf<P>* tiles, typename P::T* scratch) {
  using T = typename P::T;
  constexpr int vectors = NT * kTile / P::lanes, NV = vectors < P::vectors ? vectors : P::vectors;
  alignas(64) T gradient[NT * kTile], update[NT * kTile];
  const int tile_elements = kTile * args.rule.state_rows();
  for (int t = 0; t < NT; ++t) {
    const auto& tile = tiles[t];
    if (tile.rounded) widen(tile.rounded, (FloatBits*)tile.state, tile_elements);
    T* target = gradient + t * kTile;
    for (int i = 0; i < kTile; ++i) target[i] = 0;
    tile.segment->read(tile.segment->grad + tile.offset * tile.segment->element_size, target, tile.count);
    for (int i = 0; i < kTile; ++i) target[i] *= args.grad_scale;
  }
  for (int first = 0; first < vectors; first += NV) {
    Rows<P, NV> before, state, given;
    before.stride = state.stride = given.stride = kTile;
    for (int v = 0; v < NV; ++v) {
      const int lane = (first + v) * P::lanes;
      const auto& tile = tiles[lane / kTile];
      before.at[v] = const_cast<T*>(tile.before) + lane % kTile;
      state.at[v] = tile.state + lane % kTile;
      given.at[v] = const_cast<T*>(args.given) + (tile.number * args.given_rows * kTile + lane % kTile);
    }
    step_block<P, NV>(args, gradient + first * P::lanes, update + first * P::lanes, before, state, given, scratch);
  }
  for (int t = 0; t < NT; ++t) {
    const auto& tile = tiles[t];
    if (args.rule.output != Output::kNone) {
      for (int i = 0; i < kTile; ++i) update[t * kTile + i] *= tile.segment->unit;  // 1 changes no bit
      tile.segment->add(tile.segment->param + tile.offset * tile.segment->element_size, args.kept, update + t * kTile,
                        tile.count);
    }
    if (tile.rounded) round_to_bfloat16((const FloatBits*)tile.state, tile.rounded, tile_elements);
  }
}

// The segment that a tile is in: the last one, of those that are not empty, that does not begin behind it.
template <typename T>
INLINE int64_t segment_of(const StepArgs<T>& args, int64_t tile) {
  int64_t low = 0, high = args.segment_count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (args.first_tile[middle] <= tile ? low : high) = middle;
  }
  return low;
}

template <class P>
void step(const StepArgs<typename P::T>& args, int64_t begin, int64_t end, typename P::T* scratch) {
  constexpr int NT = P::block_tiles;
  const int64_t tile_elements = (int64_t)kTile * args.rule.state_rows();
  typename P::T* widened = scratch + block_scratch(args.rule);
  int64_t s = segment_of(args, begin);
  const auto locate = [&](int64_t tile, int place) {
    while (args.first_tile[s + 1] <= tile) ++s;
    const auto& segment = args.segments[s];
    const int64_t in_segment = tile - args.first_tile[s], offset = in_segment * kTile;
    const int64_t left = segment.numel - offset, element = in_segment * tile_elements;
    TileOf<P> found{&segment, tile, offset, left < kTile ? (int)left : kTile, nullptr, nullptr, nullptr};
    if (args.state_is_bfloat16) {
      found.before = found.state = widened + place * tile_elements;
      found.rounded = (uint16_t*)segment.state + element;
    } else {
      found.state = (typename P::T*)segment.state + element;
      found.before = (const typename P::T*)segment.before + element;
    }
    return found;
  };
  int64_t tile = begin;
  TileOf<P> tiles[NT];
  for (; tile + NT <= end; tile += NT) {
    for (int t = 0; t < NT; ++t) tiles[t] = locate(tile + t, t);
    step_tiles<P, NT>(args, tiles, scratch);
  }
  for (; tile < end; ++tile) {
    tiles[0] = locate(tile, 0);
    step_tiles<P, 1>(args, tiles, scratch);
  }
}
