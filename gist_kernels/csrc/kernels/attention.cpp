// Attention of one head of one image. CMakeLists.txt compiles this file once per instruction set,
// which defines GIST_IN_SET(attention_rows). Everything else has internal linkage (see simd.h).
//
// With S = Q K^T, P = softmax(scale S), and dO the gradient of O = P V,
//
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      delta = sum P dP, row by row
//   dQ = scale dS K                   dK = scale dS^T Q
//
// The head's rows are first copied out of the packed tensors into scratch memory, as floats, each
// row in whole vectors. Queries are taken a block at a time, and scores are kept transposed: a row
// per key, a lane per query. So the softmax needs no sum across lanes, one row serves every matmul
// of a block, and only the block's queries and gradients have to be transposed, never keys or
// values. One kernel does every matmul. It multiplies numbers of a left matrix, read in either
// order, by vectors of rows of a right matrix.
// Backward recomputes the sums of exponentials. A log-sum-exp has a rounding error in proportion to
// the scores, and probabilities computed only from it would not sum to 1. Where values are alike,
// delta nearly cancels dP. Computed as sum dO O, with a rounded O, delta would be too inexact.

#include <array>
#include <utility>

#include "attention_parts.h"

namespace gist {
namespace {

// A matmul's tile stays in registers: its sums, one row of the right matrix, one number. Each load
// of that row or number should serve several sums, and eight or more sums hide the latency of a
// multiplication. AVX2 has 16 registers, so that 12 sums fit: 6 rows of 2 vectors, which take the
// fewest loads, or 4 rows of 3, which take an odd vector along, or 12 rows of 1, for few queries.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4, kWidestTile = 4, kTallestTile = 6;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2, kWidestTile = 3, kTallestTile = 12;
#else
constexpr int kTileRows = 4, kTileVectors = 2, kWidestTile = 2, kTallestTile = 4;
#endif
constexpr int tile_rows(int vectors) {
  return std::min(kTallestTile, kTileRows * kTileVectors / vectors);
}
// Rows of the right matrix that tiles take at once, so that they stay in the L1 cache: 32 KiB with
// AVX-512, else 16 KiB.
constexpr int64_t kDepth = kVectorBytes == 64 ? 128 : 256;
// Fewer for scores: these may be large and differ by little, so they need a shorter chain of
// roundings. Heads of up to 64 columns are taken at once.
constexpr int64_t kScoreDepth = 64;
// Queries in a block: whole tiles and whole vectors. More make matmuls over queries deeper; fewer
// keep a block's scores, gradients and transposed rows in the L2 cache, beside keys and values.
constexpr int64_t kBlockStep = kTileRows * kWide / 2;
constexpr int64_t kBlockQueries = kVectorBytes == 64 ? 144 : 72;
// Keys whose scores are taken at once, from the matmul on while they are in the L1 cache.
constexpr int64_t kChunkKeys = 24;

// The stride of rows of n floats in scratch memory. If a tile takes only a part of each row, an odd
// number of cache lines keeps these parts from competing for the same cache sets.
int64_t padded(int64_t n) {
  const int64_t lines = (n + kLine - 1) / kLine;
  return kLine * (n > kTileVectors * kWide ? lines | 1 : lines);
}

// The left matrix of a matmul: element (i, k) is data[i * row + k * step].
struct Left {
  const float *data;
  int64_t row, step;
};

Left by_rows(Matrix m) { return {m.data, m.row, 1}; }
Left by_columns(Matrix m) { return {m.data, 1, m.row}; }

using Tile = void (*)(int64_t depth, const float *a, int64_t a_stride, const float *b,
                      int64_t b_row, float *c, int64_t c_row, bool add);

// The left matrix is read along its rows, which are a_stride apart, or else along its columns.
template <bool kAlongRows, int kRows, int kVectors>
void tile(int64_t depth, const float *a, int64_t a_stride, const float *b, int64_t b_row, float *c,
          int64_t c_row, bool add) {
  Floats sum[kRows][kVectors];
  GIST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    GIST_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[kVectors];
    GIST_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_row + v * kWide, Whole{});
    GIST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Floats left = broadcast(kAlongRows ? a[i * a_stride + k] : a[k * a_stride + i]);
      GIST_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  GIST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    GIST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float *const to = c + i * c_row + v * kWide;
      store(to, Whole{}, add ? load(to, Whole{}) + sum[i][v] : sum[i][v]);
    }
  }
}

template <bool kAlongRows, int... kIndex>
constexpr std::array<Tile, sizeof...(kIndex)> all_tiles(std::integer_sequence<int, kIndex...>) {
  return {&tile<kAlongRows, std::min(kIndex / kWidestTile + 1, tile_rows(kIndex % kWidestTile + 1)),
                kIndex % kWidestTile + 1>...};
}
// Indexed by rows - 1, then by vectors - 1.
constexpr std::make_integer_sequence<int, kTallestTile * kWidestTile> kEveryTile;
constexpr auto kTilesAlongRows = all_tiles<true>(kEveryTile);
constexpr auto kTilesAlongColumns = all_tiles<false>(kEveryTile);

// c = a b, or c += a b, for `rows` rows of a and c and `columns` of b and c.
void product(int64_t rows, int64_t columns, int64_t depth, Left a, Matrix b, Matrix c, bool add,
             int64_t at_once = kDepth) {
  const int64_t vectors = (columns + kWide - 1) / kWide;
  const int64_t narrow = kWidestTile > kTileVectors ? vectors / kTileVectors
                                                    : (vectors + kTileVectors - 1) / kTileVectors;
  const int64_t groups = narrow < 1 ? 1 : narrow;
  const auto &tiles = a.step == 1 ? kTilesAlongRows : kTilesAlongColumns;
  const int64_t stride = a.step == 1 ? a.row : a.step;
  // Parts of the depth are of equal size, as widths of tiles are: a tile of one vector has too few
  // sums to keep the processor busy.
  const int64_t parts = (depth + at_once - 1) / at_once, deep = (depth + parts - 1) / parts;
  for (int64_t k = 0; k < depth; k += deep) {
    const int64_t some = depth - k < deep ? depth - k : deep;
    int64_t column = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t width = vectors / groups + (group < vectors % groups);
      const int64_t most = tile_rows(int(width));
      for (int64_t i = 0; i < rows; i += most) {
        const int64_t height = rows - i < most ? rows - i : most;
        tiles[(height - 1) * kWidestTile + width - 1](some, a.data + i * a.row + k * a.step, stride,
                                                      b.at(k) + column, b.row, c.at(i) + column,
                                                      c.row, add || k > 0);
      }
      column += width * kWide;
    }
  }
}

// The layout of scratch memory.
class Scratch {
 public:
  Scratch(int64_t head_dim, Direction direction, AttentionSizes sizes, float *memory)
      : memory_(memory) {
    const int64_t n = sizes.keys, columns = padded(head_dim);
    const int64_t whole_dim = round_up(head_dim, kWide);
    // Blocks of nearly equal size.
    const int64_t blocks = (sizes.queries + kBlockQueries - 1) / kBlockQueries;
    block = round_up((sizes.queries + blocks - 1) / blocks, kBlockStep);
    const int64_t lanes = padded(block);
    keys = matrix(n, columns);
    values = matrix(n, columns);
    queries = matrix(block, columns);
    queries_t = matrix(whole_dim, lanes);
    result = matrix(block, columns);
    p = matrix(n, lanes);
    shift = matrix(1, lanes).data;
    total = matrix(1, lanes).data;
    if (direction == Direction::forward) return;
    d_out = matrix(block, columns);
    d_out_t = matrix(whole_dim, lanes);
    d_s = matrix(n, lanes);
    delta = matrix(1, lanes).data;
    d_keys = matrix(n, columns);
    d_values = matrix(n, columns);
  }

  int64_t floats() const { return used_; }

  int64_t block;  // queries at a time
  Matrix keys, values, queries, queries_t, result;
  Matrix p, d_s;                 // transposed: a row per key
  float *shift, *total, *delta;  // of each query
  Matrix d_out, d_out_t, d_keys, d_values;

 private:
  Matrix matrix(int64_t rows, int64_t row) {
    const Matrix m = {memory_ != nullptr ? memory_ + used_ : nullptr, row};
    used_ += rows * row;
    return m;
  }

  float *memory_;
  int64_t used_ = 0;
};

template <class S>
class Head : HeadOf<S> {
 public:
  Head(const AttentionCall &call, Direction direction, AttentionSizes sizes, int64_t image,
       int64_t head, float *memory)
      : HeadOf<S>(call, sizes, image, head), at_(call.head_dim, direction, sizes, memory) {}

  void forward() {
    const int64_t n = sizes_.keys, columns = call_.head_dim;
    const float scale = power_scale();
    pack(rows(call_.k, 0, n), columns, at_.keys);
    rotate(at_.keys, 0, n);
    pack(rows(call_.v, 0, n), columns, at_.values);
    for_each_block(at_.block, kWide, [&](int64_t first, int64_t count, int64_t lanes) {
      pack_queries(first, count, lanes);
      fill(at_.shift, lanes, -__builtin_inff());
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        raise_tops(scores(key, keys, lanes), scale, at_.shift);
      });
      fill(at_.total, lanes, 0);
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        exponentials(part(at_.p, key, keys, lanes), scale, at_.shift, at_.total, power_);
      });
      product(count, columns, n, by_columns(at_.p), at_.values, at_.result, false);
      finish(first, count, at_.shift, at_.total);
      const auto inverse = [&](int64_t i) { return at_.total[i]; };
      unpack(at_.result, columns, inverse, rows(call_.out, first, count));
    });
  }

  void backward() {
    const int64_t n = sizes_.keys, columns = call_.head_dim;
    const float scale = float(call_.scale);
    pack(rows(call_.k, 0, n), columns, at_.keys);
    rotate(at_.keys, 0, n);
    pack(rows(call_.v, 0, n), columns, at_.values);
    for_each_block(at_.block, kWide, [&](int64_t first, int64_t count, int64_t lanes) {
      pack_queries(first, count, lanes);
      pack(rows(call_.d_out, first, count), columns, at_.d_out);
      transpose_rows(at_.d_out, count, lanes, at_.d_out_t);
      fill(at_.shift, lanes, 0);
      for (int64_t i = 0; i < count; ++i) at_.shift[i] = float(lse()[first + i] / kLogOfBase);
      fill(at_.total, lanes, 0);
      fill(at_.delta, lanes, 0);
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        const Scores p = scores(key, keys, lanes), d_p = part(at_.d_s, key, keys, lanes);
        exponentials(p, power_scale(), at_.shift, at_.total, power_);
        const Left values = {at_.values.at(key), at_.values.row, 1};
        product(keys, lanes, columns, values, at_.d_out_t, d_p.of, false);
        add_products(p, d_p, at_.delta);
      });
      // The sums normalise what is multiplied by P: dO instead of P itself.
      for (int64_t i = 0; i < count; ++i) {
        const float inverse = 1 / at_.total[i];
        at_.delta[i] *= inverse;
        at_.total[i] = scale * inverse;
        for (int64_t j = 0; j < columns; j += kWide)
          store(at_.d_out.at(i) + j, Whole{}, inverse * load(at_.d_out.at(i) + j, Whole{}));
      }
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        const Scores p = part(at_.p, key, keys, lanes), d_s = part(at_.d_s, key, keys, lanes);
        score_gradients(p, d_s, at_.total, at_.delta);
        const Matrix d_keys = {at_.d_keys.at(key), at_.d_keys.row};
        product(keys, columns, count, by_rows(d_s.of), at_.queries, d_keys, first > 0);
      });
      product(n, columns, count, by_rows(at_.p), at_.d_out, at_.d_values, first > 0);
      product(count, columns, n, by_columns(at_.d_s), at_.keys, at_.result, false);
      rotate_back(at_.result, first, count);
      unpack_gradient(at_.result, rows(call_.d_q, first, count));
    });
    rotate_back(at_.d_keys, 0, n);
    unpack_gradient(at_.d_keys, rows(call_.d_k, 0, n));
    unpack_gradient(at_.d_values, rows(call_.d_v, 0, n));
  }

 private:
  using Of = HeadOf<S>;
  using Of::call_, Of::sizes_, Of::power_, Of::rows, Of::lse, Of::power_scale, Of::finish;
  using Of::for_each_block, Of::for_each_chunk;
  using Of::rotate, Of::rotate_back, Of::unpack_gradient;

  void pack_queries(int64_t first, int64_t count, int64_t lanes) const {
    pack(rows(call_.q, first, count), call_.head_dim, at_.queries);
    rotate(at_.queries, first, count);
    transpose_rows(at_.queries, count, lanes, at_.queries_t);
  }

  // Transposes a block's rows, with rows of 0 up to a whole vector.
  void transpose_rows(Matrix of, int64_t count, int64_t lanes, Matrix to) const {
    for (int64_t i = count; i < lanes; ++i) fill(of.at(i), of.row, 0);
    transpose(of, lanes, call_.head_dim, to);
  }

  // Computes a block's scores with some keys, before scaling.
  Scores scores(int64_t key, int64_t keys, int64_t lanes) const {
    const Scores s = part(at_.p, key, keys, lanes);
    const Left of_keys = {at_.keys.at(key), at_.keys.row, 1};
    product(keys, lanes, call_.head_dim, of_keys, at_.queries_t, s.of, false, kScoreDepth);
    return s;
  }

  const Scratch at_;
};

template <class S>
void run_as(const AttentionCall &call, Direction direction, AttentionSizes sizes, int64_t image,
            int64_t head, float *memory) {
  Head<S> of(call, direction, sizes, image, head, memory);
  direction == Direction::forward ? of.forward() : of.backward();
}

int64_t scratch(const AttentionCall &call, Direction direction, AttentionSizes sizes) {
  return Scratch(call.head_dim, direction, sizes, nullptr).floats();
}

void run(const AttentionCall &call, Direction direction, AttentionSizes sizes, int64_t image,
         int64_t head, float *memory) {
  switch (call.dtype) {
    case Dtype::float32: return run_as<float>(call, direction, sizes, image, head, memory);
    case Dtype::bfloat16: return run_as<BFloat16>(call, direction, sizes, image, head, memory);
    default: return run_as<Float16>(call, direction, sizes, image, head, memory);
  }
}

}  // namespace

const AttentionKernels GIST_IN_SET(attention_rows) = {scratch, run};

}  // namespace gist
