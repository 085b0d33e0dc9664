// Attention of one head of one image. CMakeLists.txt compiles this file once per instruction set,
// which defines GIST_IN_SET(attention_rows). Everything else has internal linkage (see simd.h).
//
// With S = Q K^T, P = softmax(scale S), and dO the gradient of O = P V,
//
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      delta = sum P dP, row by row
//   dQ = scale dS K                   dK = scale dS^T Q
//
// The head's rows are first copied out of the packed tensors into scratch memory, as floats, each
// row in whole vectors. Keys, and in backward values, are transposed too. One kernel then does
// every matmul. It multiplies numbers of a left matrix, read in either order, by vectors of rows of
// a right matrix. Queries are taken a block at a time, so that their scores stay in the L2 cache.
// Backward recomputes the sums of exponentials. A log-sum-exp has a rounding error in proportion to
// the scores, and probabilities computed only from it would not sum to 1. Where values are alike,
// delta nearly cancels dP. Computed as sum dO O, with a rounded O, delta would be too inexact.

#include "attention.h"

#include <array>
#include <utility>

#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

constexpr int64_t kWide = kLanes<float>;
constexpr int64_t kLine = 64 / sizeof(float);

// A matmul's tile stays in registers: its sums, one row of the right matrix, one number.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
// Rows of the right matrix that tiles take at once, so that they stay in the L1 cache.
constexpr int64_t kDepth = 128;
// Fewer for scores: these may be large and differ by little, so they need a shorter chain of
// roundings. Heads of up to 64 columns are taken at once.
constexpr int64_t kScoreDepth = 64;
// Scores in a block of queries: 128 KiB, and as much again for their gradients.
constexpr int64_t kBlockScores = 32 * 1024;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// A right matrix or a result: each row has whole vectors.
struct Matrix {
  float *data;
  int64_t row;

  float *at(int64_t i) const { return data + i * row; }
};

Left by_rows(Matrix m) { return {m.data, m.row, 1}; }
Left by_columns(Matrix m) { return {m.data, 1, m.row}; }

using Tile = void (*)(int64_t depth, Left a, const float *b, int64_t b_row, float *c, int64_t c_row,
                      bool add);

// The sums stay in registers only where the compiler unrolls every loop over them early.
#define GIST_UNROLL _Pragma("GCC unroll 16")

template <int kRows, int kVectors>
void tile(int64_t depth, Left a, const float *b, int64_t b_row, float *c, int64_t c_row, bool add) {
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
      const Floats left = broadcast(a.data[i * a.row + k * a.step]);
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

template <int... kIndex>
constexpr std::array<Tile, sizeof...(kIndex)> all_tiles(std::integer_sequence<int, kIndex...>) {
  return {&tile<kIndex / kTileVectors + 1, kIndex % kTileVectors + 1>...};
}
// Indexed by rows - 1, then by vectors - 1.
constexpr auto kTiles = all_tiles(std::make_integer_sequence<int, kTileRows * kTileVectors>());

// c = a b, or c += a b, for `rows` rows of a and c and `columns` of b and c.
void product(int64_t rows, int64_t columns, int64_t depth, Left a, Matrix b, Matrix c, bool add,
             int64_t at_once = kDepth) {
  const int64_t vectors = (columns + kWide - 1) / kWide;
  const int64_t groups = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t k = 0; k < depth; k += at_once) {
    const int64_t some = depth - k < at_once ? depth - k : at_once;
    int64_t column = 0;
    for (int64_t group = 0; group < groups; ++group) {
      // Widths are as even as possible: a tile of one vector has too few sums to keep the processor
      // busy.
      const int64_t width = vectors / groups + (group < vectors % groups);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t height = rows - i < kTileRows ? rows - i : kTileRows;
        const Left from = {a.data + i * a.row + k * a.step, a.row, a.step};
        kTiles[(height - 1) * kTileVectors + width - 1](some, from, b.at(k) + column, b.row,
                                                        c.at(i) + column, c.row, add || k > 0);
      }
      column += width * kWide;
    }
  }
}

// How many rows ahead a tensor is prefetched: its rows are too far apart for the processor's own
// prefetching.
constexpr int64_t kAhead = 24;

// Some rows of a tensor, one head's columns.
template <class S>
class Rows {
 public:
  Rows(const S *first, int64_t stride, int64_t count)
      : first_(first), stride_(stride), count_(count) {}

  int64_t count() const { return count_; }
  const S *at(int64_t i) const { return first_ + i * stride_; }
  const S *ahead(int64_t i) const { return at(i + kAhead < count_ ? i + kAhead : count_ - 1); }

 private:
  const S *first_;
  int64_t stride_, count_;
};

// Copies rows of a tensor to scratch memory, each padded with 0 up to a whole vector.
template <class S>
void pack(Rows<S> from, int64_t columns, Matrix to) {
  for (int64_t i = 0; i < from.count(); ++i)
    for_each_vector<float>(columns, [&](int64_t j, auto lanes) GIST_LAMBDA {
      __builtin_prefetch(from.ahead(i) + j);
      store(to.at(i) + j, Whole{}, load(from.at(i) + j, lanes, 0.0f));
    });
}

template <class S>
void unpack_row(const float *from, int64_t columns, float factor, S *to) {
  for_each_vector<float>(columns, [&](int64_t j, auto lanes) GIST_LAMBDA {
    store(to + j, lanes, factor * load(from + j, Whole{}));
  });
}

// to(j, i) = from(i, j), in blocks of whole vectors both ways.
void transpose(Matrix from, int64_t rows, int64_t columns, Matrix to) {
#if defined(__AVX512F__) || defined(__AVX2__)
  for (int64_t j = 0; j < columns; j += 4) {
    for (int64_t i = 0; i < rows; i += kWide) {
      // Each quarter of a vector holds four numbers of a row; these 4 x 4 blocks are transposed.
      Floats r[4];
      for (int k = 0; k < 4; ++k) {
        const float *const at = from.at(i + k) + j;
        const auto quarter = [&](int64_t q) { return _mm_loadu_ps(at + 4 * q * from.row); };
#if defined(__AVX512F__)
        __m512 all = _mm512_zextps128_ps512(quarter(0));
        all = _mm512_maskz_insertf32x4(-1, all, quarter(1), 1);
        all = _mm512_maskz_insertf32x4(-1, all, quarter(2), 2);
        r[k] = _mm512_maskz_insertf32x4(-1, all, quarter(3), 3);
#else
        r[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter(0)), quarter(1), 1);
#endif
      }
#if defined(__AVX512F__)
#define GIST_UNPACK(half, type, x, y) _mm512_maskz_unpack##half##_##type(-1, x, y)
#define GIST_PAIRS(x) __m512d(x)
#else
#define GIST_UNPACK(half, type, x, y) _mm256_unpack##half##_##type(x, y)
#define GIST_PAIRS(x) __m256d(x)
#endif
      const auto low_02 = GIST_PAIRS(GIST_UNPACK(lo, ps, r[0], r[1]));
      const auto high_02 = GIST_PAIRS(GIST_UNPACK(hi, ps, r[0], r[1]));
      const auto low_13 = GIST_PAIRS(GIST_UNPACK(lo, ps, r[2], r[3]));
      const auto high_13 = GIST_PAIRS(GIST_UNPACK(hi, ps, r[2], r[3]));
      store(to.at(j) + i, Whole{}, Floats(GIST_UNPACK(lo, pd, low_02, low_13)));
      store(to.at(j + 1) + i, Whole{}, Floats(GIST_UNPACK(hi, pd, low_02, low_13)));
      store(to.at(j + 2) + i, Whole{}, Floats(GIST_UNPACK(lo, pd, high_02, high_13)));
      store(to.at(j + 3) + i, Whole{}, Floats(GIST_UNPACK(hi, pd, high_02, high_13)));
#undef GIST_UNPACK
#undef GIST_PAIRS
    }
  }
#else
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to.at(j)[i] = from.at(i)[j];
#endif
}

// The largest scale * s.
float row_max(const float *s, int64_t n, float scale) {
  Floats top = broadcast(scale * s[0]);
  for_each_vector<float>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
    const Floats scaled = scale * load(s + j, lanes, s[0]);
    top = max(top, scaled);
  });
  return largest<float>(top);
}

// Replaces s by exp(scale s - shift) and returns the sum. A large scale s is never rounded: one
// fused operation subtracts the shift.
double exponentials(float *s, int64_t n, float scale, float shift, const Exp<float> &exp) {
  constexpr int abreast = kVectorBytes == 64 ? 4 : 2;
  Floats total[abreast] = {};
  int64_t j = 0;
  const auto next = [&](auto count, auto inside) GIST_LAMBDA {
    Floats x[count], e[count];
    for (int i = 0; i < count; ++i)
      x[i] = fma(load(s + j + i * kWide, Whole{}), broadcast(scale), broadcast(-shift));
    exp(x, e);
    for (int i = 0; i < count; ++i) {
      store(s + j + i * kWide, Whole{}, e[i]);
      total[i] += inside(e[i]);
    }
    j += count * kWide;
  };
  const auto all = [](Floats e) GIST_LAMBDA { return e; };
  const std::integral_constant<int, abreast> several;
  const std::integral_constant<int, 1> one;
  while (j + abreast * kWide <= n) next(several, all);
  while (j + kWide <= n) next(one, all);
  if (j < n) {
    const Floats inside = broadcast(float(n - j));
    next(one, [&](Floats e) GIST_LAMBDA { return lane_numbers<float>() < inside ? e : Floats{}; });
  }
  for (int i = 1; i < abreast; ++i) total[0] += total[i];
  return sum<float>(total[0]);
}

// Replaces p, not yet normalised, by P of its row, and d_p by dS.
void score_gradients(float *p, int64_t n, float inverse, float *d_p) {
  Floats products = {};
  for_each_vector<float>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
    products = fma(load(p + j, lanes, 0.0f), load(d_p + j, lanes, 0.0f), products);
  });
  const float delta = inverse * float(sum<float>(products));
  for (int64_t j = 0; j < n; j += kWide) {
    const Floats normalised = inverse * load(p + j, Whole{});
    store(p + j, Whole{}, normalised);
    store(d_p + j, Whole{}, normalised * (load(d_p + j, Whole{}) - delta));
  }
}

// The layout of scratch memory.
class Scratch {
 public:
  Scratch(const AttentionCall &call, Direction direction, float *memory) : memory_(memory) {
    const int64_t n = call.keys, columns = padded(call.head_dim), scores = padded(n);
    const int64_t whole_n = round_up(n, kWide), whole_dim = round_up(call.head_dim, kWide);
    // Blocks of equal size, and of whole tiles.
    const int64_t most = round_up(kBlockScores / scores + 1, kTileRows);
    const int64_t blocks = (call.queries + most - 1) / most;
    block = round_up((call.queries + blocks - 1) / blocks, kTileRows);
    keys = matrix(whole_n, columns);
    keys_t = matrix(whole_dim, scores);
    values = matrix(whole_n, columns);
    queries = matrix(block, columns);
    result = matrix(block, columns);
    p = matrix(block, scores);
    inverse = matrix(1, padded(block)).data;
    if (direction == Direction::forward) return;
    values_t = matrix(whole_dim, scores);
    d_out = matrix(block, columns);
    d_s = matrix(block, scores);
    d_keys = matrix(n, columns);
    d_values = matrix(n, columns);
  }

  int64_t floats() const { return used_; }

  int64_t block;  // queries at a time
  Matrix keys, keys_t, values, queries, result, p;
  float *inverse;  // 1 / sum of each row of p
  Matrix values_t, d_out, d_s, d_keys, d_values;

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
class Head {
 public:
  Head(const AttentionCall &call, Direction direction, int64_t image, int64_t head, float *memory)
      : call_(call), image_(image), head_(head), at_(call, direction, memory), exp_(1) {}

  void forward() {
    pack_transposed(call_.k, at_.keys, at_.keys_t);
    pack(rows(call_.v, 0, call_.keys), call_.head_dim, at_.values);
    for_each_block([&](int64_t first, int64_t count) {
      scores(first, count);
      softmax(first, count);
      product(count, call_.head_dim, call_.keys, by_rows(at_.p), at_.values, at_.result, false);
      for (int64_t i = 0; i < count; ++i)
        unpack_row(at_.result.at(i), call_.head_dim, at_.inverse[i], row(call_.out, first + i));
    });
  }

  void backward() {
    const int64_t n = call_.keys, columns = call_.head_dim;
    const float scale = float(call_.scale);
    pack_transposed(call_.k, at_.keys, at_.keys_t);
    pack_transposed(call_.v, at_.values, at_.values_t);
    for_each_block([&](int64_t first, int64_t count) {
      scores(first, count);
      for (int64_t i = 0; i < count; ++i) {
        const double total = exponentials(at_.p.at(i), n, scale, lse()[first + i], exp_);
        at_.inverse[i] = float(1 / total);
      }
      pack(rows(call_.d_out, first, count), columns, at_.d_out);
      product(count, n, columns, by_rows(at_.d_out), at_.values_t, at_.d_s, false);
      for (int64_t i = 0; i < count; ++i)
        score_gradients(at_.p.at(i), n, at_.inverse[i], at_.d_s.at(i));
      product(count, columns, n, by_rows(at_.d_s), at_.keys, at_.result, false);
      for (int64_t i = 0; i < count; ++i)
        unpack_row(at_.result.at(i), columns, scale, row(call_.d_q, first + i));
      const bool add = first > 0;
      product(n, columns, count, by_columns(at_.d_s), at_.queries, at_.d_keys, add);
      product(n, columns, count, by_columns(at_.p), at_.d_out, at_.d_values, add);
    });
    for (int64_t i = 0; i < n; ++i) {
      unpack_row(at_.d_keys.at(i), columns, scale, row(call_.d_k, i));
      unpack_row(at_.d_values.at(i), columns, 1, row(call_.d_v, i));
    }
  }

 private:
  S *row(const AttentionTensor &tensor, int64_t i) const {
    return static_cast<S *>(tensor.data) + image_ * tensor.batch_stride + i * tensor.row_stride +
           head_ * call_.head_dim;
  }
  Rows<S> rows(const AttentionTensor &tensor, int64_t first, int64_t count) const {
    return {row(tensor, first), tensor.row_stride, count};
  }
  float *lse() const { return call_.lse + (image_ * call_.heads + head_) * call_.queries; }

  // Calls body(first, count) for each block of queries.
  template <class Body>
  void for_each_block(Body body) const {
    for (int64_t first = 0; first < call_.queries; first += at_.block)
      body(first, first + at_.block < call_.queries ? at_.block : call_.queries - first);
  }

  // Copies keys or values, plain and transposed. The padding beyond them, up to a whole vector,
  // ends in columns of matmuls that nothing reads.
  void pack_transposed(const AttentionTensor &tensor, Matrix to, Matrix to_t) const {
    pack(rows(tensor, 0, call_.keys), call_.head_dim, to);
    transpose(to, round_up(call_.keys, kWide), call_.head_dim, to_t);
  }

  // Packs a block's queries and computes their scores, before scaling.
  void scores(int64_t first, int64_t count) const {
    pack(rows(call_.q, first, count), call_.head_dim, at_.queries);
    product(count, call_.keys, call_.head_dim, by_rows(at_.queries), at_.keys_t, at_.p, false,
            kScoreDepth);
  }

  // Replaces a block's scores by P, not yet normalised.
  void softmax(int64_t first, int64_t count) const {
    const float scale = float(call_.scale);
    // As many rows as a vector of doubles has lanes, for one call of log().
    constexpr int64_t group = kLanes<double>;
    for (int64_t i = 0; i < count; i += group) {
      const int64_t end = i + group < count ? i + group : count;
      float top[group];
      Vec<double> total = broadcast(1.0);
      for (int64_t row = i; row < end; ++row)
        top[row - i] = row_max(at_.p.at(row), call_.keys, scale);
      for (int64_t row = i; row < end; ++row)
        total[row - i] = exponentials(at_.p.at(row), call_.keys, scale, top[row - i], exp_);
      const Vec<double> logarithm = log(total), inverse = 1 / total;
      for (int64_t row = i; row < end; ++row) {
        lse()[first + row] = float(top[row - i] + logarithm[row - i]);
        at_.inverse[row] = float(inverse[row - i]);
      }
    }
  }

  const AttentionCall &call_;
  const int64_t image_, head_;
  const Scratch at_;
  const Exp<float> exp_;
};

template <class S>
void run_as(const AttentionCall &call, Direction direction, int64_t image, int64_t head,
            float *memory) {
  Head<S> of(call, direction, image, head, memory);
  direction == Direction::forward ? of.forward() : of.backward();
}

int64_t scratch(const AttentionCall &call, Direction direction) {
  return Scratch(call, direction, nullptr).floats();
}

void run(const AttentionCall &call, Direction direction, int64_t image, int64_t head,
         float *memory) {
  switch (call.dtype) {
    case Dtype::float32: return run_as<float>(call, direction, image, head, memory);
    case Dtype::bfloat16: return run_as<BFloat16>(call, direction, image, head, memory);
    default: return run_as<Float16>(call, direction, image, head, memory);
  }
}

}  // namespace

const AttentionKernels GIST_IN_SET(attention_rows) = {scratch, run};

}  // namespace gist
