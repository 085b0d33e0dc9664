// What the kernels of attention share: rows of the tensors and of scratch memory, rotations, and
// the softmax on transposed scores. Internal linkage: see simd.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

constexpr int64_t kWide = kLanes<float>;
constexpr int64_t kLine = 64 / sizeof(float);

// Exponentials are powers of 2, which take fewer operations. Without a fused multiply-add they are
// powers of e: scores times log2(e) would be rounded, while a usual scale is a power of 2 itself.
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr double kLogOfBase = 0.69314718055994530942;
using Power = Exp2;
#else
constexpr double kLogOfBase = 1;
struct Power : Exp<float> {
  Power() : Exp<float>(1) {}
};
#endif

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows in scratch memory.
template <class T>
struct MatrixOf {
  T *data;
  int64_t row;

  T *at(int64_t i) const { return data + i * row; }
};
// A right matrix or a result: each row has whole vectors.
using Matrix = MatrixOf<float>;

// The sums stay in registers only where the compiler unrolls every loop over them early.
#define GIST_UNROLL _Pragma("GCC unroll 16")

// How many rows ahead a tensor is prefetched: its rows are too far apart for the processor's own
// prefetching.
constexpr int64_t kAhead = 24;

// Some rows of a tensor, one head's columns.
template <class S>
class Rows {
 public:
  Rows(S *first, int64_t stride, int64_t count) : first_(first), stride_(stride), count_(count) {}

  int64_t count() const { return count_; }
  S *at(int64_t i) const { return first_ + i * stride_; }
  const S *ahead(int64_t i) const { return at(i + kAhead < count_ ? i + kAhead : count_ - 1); }

 private:
  S *first_;
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

// Copies rows of scratch memory to a tensor, row i multiplied by factor(i).
template <class S, class Factor>
void unpack(Matrix from, int64_t columns, Factor factor, Rows<S> to) {
  for (int64_t i = 0; i < to.count(); ++i) {
    const float by = factor(i);
    for_each_vector<float>(columns, [&](int64_t j, auto lanes) GIST_LAMBDA {
      __builtin_prefetch(to.ahead(i) + j, 1);
      store(to.at(i) + j, lanes, by * load(from.at(i) + j, Whole{}));
    });
  }
}

// The numbers as memory of type S would hold them.
template <class S>
GIST_INLINE Floats rounded(Floats v) {
  if constexpr (sizeof(S) == 2)
    return widen(S{}, narrow(S{}, v));
  else
    return v;
}

// The vector with the lanes of each pair exchanged: 1, 0, 3, 2, ...
GIST_INLINE Floats swap_pairs(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_permute_ps(0xffff, x, 0xb1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(x, 0xb1);
#elif defined(__SSE2__)
  return _mm_shuffle_ps(x, x, 0xb1);
#else
  const Vec<std::uint64_t> pairs = bit_cast<Vec<std::uint64_t> >(x);
  return bit_cast<Floats>(pairs << 32 | pairs >> 32);
#endif
}

// Rotates a row's pairs of features j and j + columns / 2, or with kTransposed its gradient. What
// is rotated forward is rounded to S, the dtype: so do backends that hand it to another kernel, and
// log-sum-exps fit the scores of whoever computes them again from such numbers.
template <class S, bool kTransposed>
void rotate_halves(float *x, const float *sin, const float *cos, int64_t columns) {
  const int64_t half = columns / 2;
  for_each_vector<float>(half, [&](int64_t j, auto lanes) GIST_LAMBDA {
    const int64_t i = half + j;
    const Floats a = load(x + j, lanes, 0.0f), b = load(x + i, lanes, 0.0f);
    const Floats sin_a = load(sin + j, lanes, 0.0f), sin_b = load(sin + i, lanes, 0.0f);
    const Floats cos_a = load(cos + j, lanes, 0.0f), cos_b = load(cos + i, lanes, 0.0f);
    if constexpr (kTransposed) {
      store(x + j, lanes, fma(a, cos_a, b * sin_b));
      store(x + i, lanes, fma(b, cos_b, -a * sin_a));
    } else {
      store(x + j, lanes, rounded<S>(fma(a, cos_a, -b * sin_a)));
      store(x + i, lanes, rounded<S>(fma(b, cos_b, a * sin_b)));
    }
  });
}

// The same for the features 2 j and 2 j + 1.
template <class S, bool kTransposed>
void rotate_neighbours(float *x, const float *sin, const float *cos, int64_t columns) {
  Floats sign;
  for (int lane = 0; lane < kWide; ++lane) sign[lane] = lane % 2 ? 1 : -1;
  for_each_vector<float>(columns, [&](int64_t j, auto lanes) GIST_LAMBDA {
    const Floats v = load(x + j, lanes, 0.0f), s = load(sin + j, lanes, 0.0f);
    const Floats c = load(cos + j, lanes, 0.0f);
    if constexpr (kTransposed)
      store(x + j, lanes, fma(v, c, -sign * swap_pairs(v * s)));
    else
      store(x + j, lanes, rounded<S>(fma(v, c, sign * swap_pairs(v) * s)));
  });
}

void fill(float *to, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
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

// Scores of some keys: rows of a transposed matrix, and `lanes` queries in whole vectors.
struct Scores {
  Matrix of;
  int64_t keys, lanes;

  float *at(int64_t key, int64_t lane) const { return of.at(key) + lane; }
};

// A matrix's rows of some keys.
Scores part(Matrix of, int64_t key, int64_t keys, int64_t lanes) {
  return {{of.at(key), of.row}, keys, lanes};
}

// Keys whose vectors are computed side by side, so that their chains of operations overlap.
constexpr int kSideBySide = kVectorBytes == 64 ? 4 : 2;

// Raises top to the largest scale * s of each query.
void raise_tops(Scores s, float scale, float *top) {
  for (int64_t lane = 0; lane < s.lanes; lane += kWide) {
    Floats most = load(top + lane, Whole{});
    for (int64_t key = 0; key < s.keys; ++key) {
      const Floats scaled = scale * load(s.at(key, lane), Whole{});
      most = max(most, scaled);
    }
    store(top + lane, Whole{}, most);
  }
}

// Replaces s by base^(scale s - shift) and adds each query's to its total. A large scale s is never
// rounded: one fused operation subtracts the shift.
void exponentials(Scores s, float scale, const float *shift, float *total, const Power &power) {
  for (int64_t lane = 0; lane < s.lanes; lane += kWide) {
    const Floats below = -load(shift + lane, Whole{});
    Floats sums[kSideBySide] = {};
    int64_t key = 0;
    const auto next = [&](auto count) GIST_LAMBDA {
      Floats x[count], e[count];
      for (int i = 0; i < count; ++i)
        x[i] = fma(load(s.at(key + i, lane), Whole{}), broadcast(scale), below);
      power(x, e);
      for (int i = 0; i < count; ++i) {
        store(s.at(key + i, lane), Whole{}, e[i]);
        sums[i] += e[i];
      }
      key += count;
    };
    while (key + kSideBySide <= s.keys) next(std::integral_constant<int, kSideBySide>());
    while (key < s.keys) next(std::integral_constant<int, 1>());
    for (int i = 1; i < kSideBySide; ++i) sums[0] += sums[i];
    store(total + lane, Whole{}, load(total + lane, Whole{}) + sums[0]);
  }
}

// Adds each query's sum of p d_p to its total.
void add_products(Scores p, Scores d_p, float *total) {
  for (int64_t lane = 0; lane < p.lanes; lane += kWide) {
    Floats sum = {};
    for (int64_t key = 0; key < p.keys; ++key)
      sum = fma(load(p.at(key, lane), Whole{}), load(d_p.at(key, lane), Whole{}), sum);
    store(total + lane, Whole{}, load(total + lane, Whole{}) + sum);
  }
}

// Replaces d_p by factor p (d_p - delta); factor and delta are the queries'.
void score_gradients(Scores p, Scores d_p, const float *factor, const float *delta) {
  for (int64_t lane = 0; lane < p.lanes; lane += kWide) {
    const Floats by = load(factor + lane, Whole{}), less = load(delta + lane, Whole{});
    for (int64_t key = 0; key < p.keys; ++key) {
      float *const to = d_p.at(key, lane);
      store(to, Whole{}, by * load(p.at(key, lane), Whole{}) * (load(to, Whole{}) - less));
    }
  }
}

// One head of one image: its rows in the call's tensors, which have numbers of type S.
template <class S>
class HeadOf {
 public:
  HeadOf(const AttentionCall &call, AttentionSizes sizes, int64_t image, int64_t head)
      : call_(call), sizes_(sizes), image_(image), head_(head) {}

 protected:
  Rows<S> rows(const AttentionTensor &tensor, int64_t first, int64_t count) const {
    S *const head =
        static_cast<S *>(tensor.data) + image_ * tensor.batch_stride + head_ * call_.head_dim;
    return {head + first * tensor.row_stride, tensor.row_stride, count};
  }
  // The scale of exponents.
  float power_scale() const { return float(call_.scale / kLogOfBase); }
  float *lse() const { return call_.lse + (image_ * call_.heads + head_) * call_.queries; }

  // Calls body(first, count, lanes) for each block of queries; lanes are count in whole steps.
  template <class Body>
  void for_each_block(int64_t block, int64_t step, Body body) const {
    for (int64_t first = 0; first < sizes_.queries; first += block) {
      const int64_t count = std::min(block, sizes_.queries - first);
      body(first, count, round_up(count, step));
    }
  }
  // Calls body(first, count) for each chunk of keys, of which only the last may have fewer.
  template <class Body>
  void for_each_chunk(int64_t chunk, Body body) const {
    for (int64_t first = 0; first < sizes_.keys; first += chunk)
      body(first, std::min(chunk, sizes_.keys - first));
  }

  void unpack_gradient(Matrix from, Rows<S> to) const {
    unpack(from, call_.head_dim, [](int64_t) { return 1.0f; }, to);
  }

  // Rotates some tokens' rows in scratch memory, as far as the tables have them.
  void rotate(Matrix of, int64_t first, int64_t count) const { turn<false>(of, first, count); }
  // The same for their gradients.
  void rotate_back(Matrix of, int64_t first, int64_t count) const { turn<true>(of, first, count); }

  // Writes a block's log-sum-exps and replaces totals by their inverses.
  void finish(int64_t first, int64_t count, const float *shift, float *totals) const {
    // As many as a vector of doubles has lanes, for one call of log().
    constexpr int64_t group = kLanes<double>;
    for (int64_t i = 0; i < count; i += group) {
      Vec<double> total;
      for (int64_t lane = 0; lane < group; ++lane) total[lane] = totals[i + lane];
      const Vec<double> logarithm = log(total), inverse = 1 / total;
      for (int64_t lane = 0; lane < group && i + lane < count; ++lane) {
        lse()[first + i + lane] = float(kLogOfBase * shift[i + lane] + logarithm[lane]);
        totals[i + lane] = float(inverse[lane]);
      }
    }
  }

  const AttentionCall &call_;
  const AttentionSizes sizes_;
  const int64_t image_, head_;
  const Power power_{};

 private:
  template <bool kTransposed>
  void turn(Matrix of, int64_t first, int64_t count) const {
    const AttentionRotation &r = call_.rotation;
    if (r.sin == nullptr) return;
    const int64_t columns = call_.head_dim, table = r.per_head ? head_ * r.rows : 0;
    const int64_t begin = std::max(first, r.start);
    const int64_t end = std::min(first + count, r.start + r.rows);
    const auto turned = r.half ? rotate_halves<S, kTransposed> : rotate_neighbours<S, kTransposed>;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t at = (table + token - r.start) * columns;
      turned(of.at(token - first), r.sin + at, r.cos + at, columns);
    }
  }
};

}  // namespace
}  // namespace gist
