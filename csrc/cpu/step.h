// One optimizer step over tiles of many parameters: gather gradients, features, LSTM, update, in one pass over the
// state. Included inside the namespace of an instruction set.

template <class P>
struct TileOf {
  const Segment<typename P::T>* segment;
  int64_t offset;  // of the first coordinate in the segment
  int count;       // coordinates of the tile that exist
  typename P::T* state;
};

inline size_t step_scratch(const Rule& rule) {
  const int most = kMaxBlockLanes;
  return (size_t)most * (rule.features + 4 * rule.hidden);
}

// A block is NV vectors: several whole tiles, or a part of one. `state` points at each vector's first row.
template <class P, int NV>
INLINE void step_block(const Rule& rule, const PackedWeights<typename P::T>& weights, const typename P::T* gradient,
                       typename P::T* update, Rows<P, NV> state, typename P::T* scratch) {
  using V = typename P::V;
  const int hidden = rule.hidden;
  const Rows<P, NV> features = dense<P, NV>(scratch);
  const Rows<P, NV> gates = features.from(rule.features);
  write_features<P, NV>(rule, gradient, features);
  Rows<P, NV> input = features;
  for (int layer = 0; layer < rule.layers; ++layer) {
    const Rows<P, NV> h = state.from(2 * layer * hidden), c = h.from(hidden);
    layer_forward<P, NV>(weights.layer[layer].forward, input, rule.inputs(layer), h, c, hidden, gates, c, h,
                         [](int, int, V) INLINE_LAMBDA {});
    input = h;
  }
  V out[NV];
  for (int v = 0; v < NV; ++v) out[v] = P::set1(weights.out[hidden]);
  for (int unit = 0; unit < hidden; ++unit) {
    for (int v = 0; v < NV; ++v) out[v] = P::fma(P::set1(weights.out[unit]), input.load(unit, v), out[v]);
  }
  for (int v = 0; v < NV; ++v) P::store(update + v * P::lanes, out[v] * P::set1((typename P::T)rule.update_scale));
}

// NT tiles, wherever each of them lies.
template <class P, int NT>
INLINE void step_tiles(const StepArgs<typename P::T>& args, const TileOf<P>* tiles, typename P::T* scratch) {
  using T = typename P::T;
  constexpr int vectors = NT * kTile / P::lanes, NV = vectors < P::vectors ? vectors : P::vectors;
  alignas(64) T gradient[NT * kTile], update[NT * kTile];
  for (int t = 0; t < NT; ++t) {
    const auto& tile = tiles[t];
    T* target = gradient + t * kTile;
    for (int i = 0; i < kTile; ++i) target[i] = 0;
    tile.segment->read(tile.segment->grad + tile.offset * tile.segment->element_size, target, tile.count);
    for (int i = 0; i < kTile; ++i) target[i] *= args.grad_scale;
  }
  for (int first = 0; first < vectors; first += NV) {
    Rows<P, NV> state;
    state.stride = kTile;
    for (int v = 0; v < NV; ++v) {
      const int lane = (first + v) * P::lanes;
      state.at[v] = tiles[lane / kTile].state + lane % kTile;
    }
    step_block<P, NV>(args.rule, args.weights, gradient + first * P::lanes, update + first * P::lanes, state, scratch);
  }
  for (int t = 0; t < NT; ++t) {
    const auto& tile = tiles[t];
    tile.segment->add(tile.segment->param + tile.offset * tile.segment->element_size, update + t * kTile, tile.count);
  }
}

template <class P>
void step(const StepArgs<typename P::T>& args, int64_t begin, int64_t end, typename P::T* scratch) {
  constexpr int NT = P::block_tiles;
  const int64_t tile_elements = (int64_t)kTile * args.rule.state_rows();
  int64_t s = 0;
  const auto locate = [&](int64_t tile) {
    while (args.first_tile[s + 1] <= tile) ++s;
    const auto& segment = args.segments[s];
    const int64_t in_segment = tile - args.first_tile[s], offset = in_segment * kTile;
    const int64_t left = segment.numel - offset;
    return TileOf<P>{&segment, offset, left < kTile ? (int)left : kTile, segment.state + in_segment * tile_elements};
  };
  int64_t tile = begin;
  TileOf<P> tiles[NT];
  for (; tile + NT <= end; tile += NT) {
    for (int t = 0; t < NT; ++t) tiles[t] = locate(tile + t);
    step_tiles<P, NT>(args, tiles, scratch);
  }
  for (; tile < end; ++tile) {
    tiles[0] = locate(tile);
    step_tiles<P, 1>(args, tiles, scratch);
  }
}
