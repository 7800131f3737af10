// The skeleton of an indexer path: scores of one tile of keys against all heads of one query row.
//
// A row of numbers is cut into 32-bit words: a float, two bfloat16 or int16, four int8. Lanes are
// heads: the query is packed as [word][head] once per row, and a word of a key is broadcast from
// where the key lies (or from a widened copy). V vectors of heads and kSums / V keys are summed in
// registers over the whole width; relu, weights and the sum over vectors follow while the sums are
// there. What is left is one vector per key, whose lanes are added sixteen (W) keys at a time.
//
// An instruction set provides, in a struct D: type Acc and Word, kPack (numbers per word), kInts,
// kMaxV, kSums, kTile, load, splat, dot, positive (relu as floats), raw (keys are read in place),
// widen and widen_query (rows to words; the latter returns what the head's sums start from, see
// `start`).
#ifndef SFA_ONNX_KERNELS_CORE_INDEXER_PATH_H_
#define SFA_ONNX_KERNELS_CORE_INDEXER_PATH_H_

#include "indexer.h"
#include "vec.h"

namespace sfa {
namespace {

inline int words_of(int width, int pack) { return (width + pack - 1) / pack; }

// Heads of one group: start [V * W] | weights [V * W] | mask [W] | words [steps][V * W].
struct Group {
  int v;
  const int32_t* start;
  const float* weights;
  const int32_t* mask;
  const uint32_t* words;
};

template <class D>
class Layout {
 public:
  Layout(const IndexerGeom& g, void* scratch)
      : steps(words_of(g.width, D::kPack)),
        vectors((g.heads + W - 1) / W),
        groups((vectors + D::kMaxV - 1) / D::kMaxV),
        base_((uint32_t*)scratch) {
    sums = (float*)(base_ + groups * group_words());
    words = (uint32_t*)(sums + (size_t)(kMaxTile + kRowPad + W) * W);
    bytes = (size_t)((char*)(words + (size_t)(kMaxTile + kRowPad) * padded_steps()) - (char*)base_);
  }

  // A multiple of sixteen words, so that widening may write whole vectors.
  size_t padded_steps() const { return (size_t)(steps + 15) / 16 * 16; }

  uint32_t* group_at(int i) const { return base_ + i * group_words(); }
  int vectors_of(int i) const {
    const int left = vectors - i * D::kMaxV;
    return left < D::kMaxV ? left : D::kMaxV;
  }
  Group group(int i) const {
    const int v = vectors_of(i);
    const uint32_t* at = group_at(i);
    return {v, (const int32_t*)at, (const float*)(at + v * W), (const int32_t*)(at + 2 * v * W),
            at + (2 * v + 1) * W};
  }

  const int steps, vectors, groups;
  float* sums;      // [kMaxTile + pad][W]
  uint32_t* words;  // widened keys [kMaxTile + pad][padded_steps]
  size_t bytes;

 private:
  size_t group_words() const { return (size_t)D::kMaxV * W * (steps + 2) + W; }
  uint32_t* base_;
};

template <class D>
size_t scratch_bytes(const IndexerGeom& g) {
  return Layout<D>(g, nowhere()).bytes + 64;
}

template <class D>
void load_query(const IndexerGeom& g, const void* query, const float* weights, void* scratch) {
  const Layout<D> layout(g, scratch);
  const int item = dtype_size(g.dtype), lanes = D::kMaxV * W;
  for (int i = 0; i < layout.groups; ++i) {
    const int v = layout.vectors_of(i), wide = v * W;
    uint32_t* at = layout.group_at(i);
    memset(at, 0, (size_t)wide * (layout.steps + 2) * 4 + W * 4);
    for (int lane = 0; lane < wide && i * lanes + lane < g.heads; ++lane) {
      const int head = i * lanes + lane;
      memcpy(at + wide + lane, &weights[head], 4);
      if (lane >= wide - W) at[2 * wide + lane - (wide - W)] = ~0u;
      const uint8_t* row = (const uint8_t*)query + (size_t)head * g.width * item;
      const int32_t start = D::widen_query(row, g.width, g.dtype, layout.words);
      memcpy(at + lane, &start, 4);
      uint32_t* column = at + 2 * wide + W + lane;
      for (int s = 0; s < layout.steps; ++s) column[(size_t)s * wide] = layout.words[s];
    }
  }
}

// Adds the lanes' part of the scores of kSums / V keys to sums [key][W]. A function of its own, so
// that nothing around it competes for registers. Every loop but the one over steps must be unrolled
// where GCC still takes the sums for an array: else they live in memory before and after that loop.
// No branches: what is fused to one rounding must not depend on where in a tile a key lies.
template <class D, int V, bool kHalf>
__attribute__((noinline)) void score_block(const Group& group, int steps,
                                           const uint8_t* const* rows, float* sums) {
  constexpr int R = D::kSums / V;
  typename D::Acc acc[R][V];
  const uint8_t* row[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 24
    for (int v = 0; v < V; ++v) acc[r][v] = D::start(group.start + v * W);
  }
  const uint32_t* q = group.words;
#pragma GCC unroll 2
  for (int s = 0; s < steps; ++s, q += V * W) {
    typename D::Word words[V];
#pragma GCC unroll 24
    for (int v = 0; v < V; ++v) words[v] = D::load(q + v * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const typename D::Word key = D::splat(row[r] + 4 * (size_t)s);
#pragma GCC unroll 24
      for (int v = 0; v < V; ++v) acc[r][v] = D::dot(acc[r][v], words[v], key);
    }
  }
  const vi mask = *(const vi*)group.mask;
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    vf total = load(sums + r * W);
#pragma GCC unroll 24
    for (int v = 0; v < V; ++v) {
      vf x = D::positive(acc[r][v]);
      if (kHalf) x = simd::round_f16(x * splat(1.0f / 1024));
      // Lanes past the last head: infinite keys make NaN of their zeros.
      if (v == V - 1) x = (vf)((vi)x & mask);
      total += x * load(group.weights + v * W);
    }
    store(sums + r * W, total);
  }
}

// Asks for the lines of the next tile, some of them before each block of this one: in one burst
// they would wait for each other, and the products for them. Every block asks for as many of the
// rows, a share of each row's lines per group of heads. (Always inline: GCC drops calls of
// functions that do nothing but prefetch.)
struct Ahead {
  const KeyTile* tile;      // may be null
  int row_bytes, from, to;  // the share

  static inline __attribute__((always_inline)) void lines(const uint8_t* at, int64_t bytes) {
    for (; bytes > 192; bytes -= 256, at += 256) {
#pragma GCC unroll 4
      for (int i = 0; i < 256; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
    for (; bytes > 0; bytes -= 64, at += 64) __builtin_prefetch(at, 0, 2);
  }

  inline __attribute__((always_inline)) void prefetch(int first, int rows) const {
    if (!tile || first >= tile->n) return;
    const uint8_t* const* const row = tile->row + first;
    // Rows mostly lie behind each other: then the counting is done once for all.
    if (row[rows - 1] - row[0] == (int64_t)row_bytes * (rows - 1)) {
      return lines(row[0] + rows * from, (int64_t)rows * (to - from));
    }
    for (int r = 0; r < rows; ++r) lines(row[r] + from, to - from);
  }
};

inline Ahead share_of(const KeyTile* tile, int row_bytes, int group, int groups) {
  const int lines = (row_bytes + 63) / 64, last = lines * (group + 1) / groups * 64;
  return {tile, row_bytes, lines * group / groups * 64, last < row_bytes ? last : row_bytes};
}

// Lane i of the result is the sum of the lanes of row i, for W rows [W][W]. Each step adds halves
// of two vectors: lane bit `unit` tells which of the two a lane belongs to. Half of the numbers are
// in their place already.
template <int kUnit>
inline vf add_halves(vf a, vf b) {
  vi here, there;
  for (int i = 0; i < W; ++i) {
    here[i] = i & kUnit ? W + i : i;
    there[i] = i & kUnit ? W + i - kUnit : i + kUnit;
  }
#if defined(__clang__)  // which has no shuffle by a vector of lanes
  vf sum;
  for (int i = 0; i < W; ++i) {
    const int t = i & kUnit ? i - kUnit : i + kUnit;
    sum[i] = i & kUnit ? b[i] + b[t] : a[i] + a[t];
  }
  return sum;
#else
  return __builtin_shuffle(a, b, here) + __builtin_shuffle(a, b, there);
#endif
}
template <int kUnit>
inline vf add_lanes(const float* rows) {
  if constexpr (kUnit == 0) {
    return load(rows);
  } else {
    return add_halves<kUnit>(add_lanes<kUnit / 2>(rows), add_lanes<kUnit / 2>(rows + kUnit * W));
  }
}

// Turns sums into scores, W keys at a time.
struct Finish {
  const KeyTile& tile;
  const float* sums;
  float* out;
  bool scaled;
  int done = 0;

  void next() {
    vf score = add_lanes<W / 2>(sums + done * W);
    if (scaled) score *= simd::load_f16((const uint8_t*)(tile.scale + done));
    storeu(out + done, score);
    done += W;
  }
};

template <class D, int V, bool kHalf>
void score_group(const Group& group, int steps, const uint8_t* const* rows, const Ahead& ahead,
                 int n, bool first, float* sums, Finish* finish) {
  if constexpr (V > 1) {
    if (group.v < V) {
      return score_group<D, V - 1, kHalf>(group, steps, rows, ahead, n, first, sums, finish);
    }
  }
  constexpr int R = D::kSums / V;
  static_assert(D::kTile % R == 0, "the rows of a whole tile are not padded");
  for (int k = 0; k < n; k += R, sums += R * W) {
    ahead.prefetch(k, R);
    // What the products of one more block have covered costs no time of its own: the processor has
    // enough of them in hand.
    if (finish && finish->done + W <= k - R) finish->next();
    if (first) {
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) store(sums + r * W, vf{});
    }
    score_block<D, V, kHalf>(group, steps, rows + k, sums);
  }
}

template <class D, bool kHalf>
void scores(const IndexerGeom& g, const KeyTile& tile, const KeyTile* ahead, void* scratch,
            float* out) {
  const Layout<D> layout(g, scratch);
  const uint8_t* copies[kMaxTile + kRowPad];
  const uint8_t* const* rows = tile.row;
  if (!D::raw(g)) {
    const size_t stride = layout.padded_steps();
    for (int i = 0; i < tile.n; ++i) {
      D::widen(tile.row[i], g.width, g.dtype, layout.words + i * stride);
      copies[i] = (const uint8_t*)(layout.words + i * stride);
    }
    for (int i = tile.n; i < tile.n + kRowPad; ++i) copies[i] = copies[tile.n - 1];
    rows = copies;
  }
  Finish finish = {tile, layout.sums, out, g.dtype == SFA_CORE_I8};
  for (int i = 0; i < layout.groups; ++i) {
    const Ahead share = share_of(ahead, g.width * dtype_size(g.dtype), i, layout.groups);
    score_group<D, D::kMaxV, kHalf>(layout.group(i), layout.steps, rows, share, tile.n, i == 0,
                                    layout.sums, i + 1 < layout.groups ? nullptr : &finish);
  }
  while (finish.done < tile.n) finish.next();
}

template <class D>
void scores(const IndexerGeom& g, const KeyTile& tile, const KeyTile* ahead, void* scratch,
            float* out) {
  if constexpr (D::kInts) {
    if (g.half) return scores<D, true>(g, tile, ahead, scratch, out);
  }
  scores<D, false>(g, tile, ahead, scratch, out);
}

// Calls convert(numbers, words) for every N numbers of a row; the last ones are padded with zeros,
// and nothing is read past the row.
template <int N, int kItem, class Convert>
inline void in_pieces(const uint8_t* row, int width, int pack, uint32_t* words, Convert convert) {
  int i = 0;
  for (; i + N <= width; i += N) convert(row + i * kItem, words + i / pack);
  if (i == width) return;
  alignas(64) uint8_t piece[N * kItem] = {};
  memcpy(piece, row + i * kItem, (size_t)(width - i) * kItem);
  convert(piece, words + i / pack);
}

// Rows of a float type as floats.
inline void widen_floats(const uint8_t* row, int width, int dtype, uint32_t* words) {
  if (dtype == SFA_CORE_F32) {
    memcpy(words, row, (size_t)width * 4);
  } else if (dtype == SFA_CORE_F16) {
    in_pieces<W, 2>(row, width, 1, words,
                    [](const uint8_t* x, uint32_t* at) { storeu((float*)at, simd::load_f16(x)); });
  } else {
    in_pieces<W, 2>(row, width, 1, words,
                    [](const uint8_t* x, uint32_t* at) { storeu((float*)at, simd::load_bf16(x)); });
  }
}

// What float words and fused multiply-add need, for every instruction set.
template <int kVectors, int kRegisters, int kKeys>
struct FloatWords {
  static constexpr bool kInts = false;
  typedef vf Acc;
  typedef vf Word;
  static constexpr int kPack = 1, kMaxV = kVectors, kSums = kRegisters, kTile = kKeys;
  static bool raw(const IndexerGeom& g) { return g.dtype == SFA_CORE_F32; }
  static vf start(const int32_t*) { return vf{}; }
  static vf load(const uint32_t* p) { return *(const vf*)p; }
  static vf splat(const uint8_t* p) {
    float x;
    memcpy(&x, p, 4);
    return sfa::splat(x);
  }
  static vf dot(vf acc, vf a, vf b) { return acc + a * b; }
  static vf positive(vf x) { return simd::relu(x); }
  static void widen(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen_floats(row, width, dtype, words);
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen_floats(row, width, dtype, words);
    return 0;
  }
};

// int8 as words of int32: what every instruction set can multiply exactly.
template <int kVectors, int kRegisters>
struct IntWords {
  static constexpr bool kInts = true;
  typedef vi Acc;
  typedef vi Word;
  static constexpr int kPack = 1, kMaxV = kVectors, kSums = kRegisters, kTile = 24;
  static bool raw(const IndexerGeom&) { return false; }
  static vi start(const int32_t*) { return vi{}; }
  static vi load(const uint32_t* p) { return *(const vi*)p; }
  static vi splat(const uint8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x - vi{};
  }
  static vi dot(vi acc, vi a, vi b) { return acc + a * b; }
  static vf positive(vi x) { return simd::relu(__builtin_convertvector(x, vf)); }
  static void widen(const uint8_t* row, int width, int, uint32_t* words) {
    for (int i = 0; i < width; ++i) words[i] = (uint32_t)(int8_t)row[i];
  }
  static int32_t widen_query(const uint8_t* row, int width, int dtype, uint32_t* words) {
    widen(row, width, dtype, words);
    return 0;
  }
};

}  // namespace
}  // namespace sfa

#endif  // SFA_ONNX_KERNELS_CORE_INDEXER_PATH_H_
