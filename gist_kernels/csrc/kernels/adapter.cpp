// LayerNorm and adapter, a group of rows at a time. CMakeLists.txt compiles this file once per
// instruction set, which defines GIST_IN_SET(adapter_rows).
//
// A group's rows are widened into scratch memory that stays in cache. They are padded with zeros,
// so that everything except stores to tensors works on whole vectors. Two kernels do the matmuls
// with weights, tile by tile in registers: inner products of rows (`project`) and sums of multiples
// of rows (`add_multiples`).

#include "adapter.h"

#include "activation_math.h"
#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

// A matmul's tile in registers: rows or ranks, and vectors of the width.
constexpr int kRows = kVectorBytes == 64 ? 4 : 2, kRanks = 4;
constexpr int kColumns = kVectorBytes == 64 ? 4 : 2;
static_assert(kRowBlock % kRows == 0 && kRankBlock == kRanks, "blocks of the layout");
static_assert(kPaddedWidth * sizeof(float) % kVectorBytes == 0, "whole vectors");

template <class A>
GIST_INLINE Vec<A> at(const A *from) {
  return load(from, Whole{});
}
template <class A>
GIST_INLINE void put(A *to, Vec<A> v) {
  store(to, Whole{}, v);
}

// One vector to or from a row of n numbers; at the row's end, its last lanes only.
template <class S>
GIST_INLINE void put_in_row(S *row, int64_t j, int64_t n, Vec<Arithmetic<S>> v) {
  constexpr int lanes = kLanes<Arithmetic<S>>;
  if (j + lanes <= n)
    store(row + j, Whole{}, v);
  else
    store(row + j, Part{int(n - j)}, v);
}
template <class S>
GIST_INLINE Vec<Arithmetic<S>> take_from_row(const S *row, int64_t j, int64_t n) {
  constexpr int lanes = kLanes<Arithmetic<S>>;
  return j + lanes <= n ? load(row + j, Whole{})
                        : load(row + j, Part{int(n - j)}, Arithmetic<S>(0));
}

// The sums of `kCount` vectors. Each is first folded to 16 bytes.
template <class A, int kLanesLeft = kLanes<A>>
GIST_INLINE typename VectorOf<A, 16 / int(sizeof(A))>::type folded(
    typename VectorOf<A, kLanesLeft>::type v) {
  if constexpr (kLanesLeft * sizeof(A) == 16) {
    return v;
  } else {
    typename VectorOf<A, kLanesLeft / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return folded<A, kLanesLeft / 2>(half[0] + half[1]);
  }
}
template <class A, int kCount>
GIST_INLINE void sums_of(const Vec<A> (&v)[kCount], A *to) {
#if defined(__SSE2__)
  if constexpr (sizeof(A) == 4 && kCount == 4) {
    __m128 a = folded<A>(v[0]), b = folded<A>(v[1]), c = folded<A>(v[2]), d = folded<A>(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, (a + b) + (c + d));
    return;
  }
#endif
  constexpr int left = 16 / int(sizeof(A));
  for (int i = 0; i < kCount; ++i) {
    const auto last = folded<A>(v[i]);
    to[i] = left == 2 ? last[0] + last[1] : (last[0] + last[1]) + (last[left - 2] + last[left - 1]);
  }
}

// to[i][k] = x[i] . w[k] + bias[k], for whole blocks of rows and ranks.
template <class A>
void project(const A *x, const A *w, const A *bias, int64_t rows, int64_t n,
             const AdapterLayout &layout, A *to) {
  const int64_t stride = layout.stride;
  for (int64_t k = 0; k < layout.ranks; k += kRanks) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec<A> total[kRows][kRanks] = {};
      const A *const x_rows = x + i * stride, *const w_rows = w + k * stride;
      for (int64_t j = 0; j < n; j += kLanes<A>) {
        Vec<A> left[kRows];
        for (int r = 0; r < kRows; ++r) left[r] = at(x_rows + r * stride + j);
        for (int s = 0; s < kRanks; ++s) {
          const Vec<A> right = at(w_rows + s * stride + j);
          for (int r = 0; r < kRows; ++r) total[r][s] = fma(left[r], right, total[r][s]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        A *const sums = to + (i + r) * layout.ranks + k;
        sums_of(total[r], sums);
        if (bias != nullptr)
          for (int s = 0; s < kRanks; ++s) sums[s] += bias[k + s];
      }
    }
  }
}

// c[r][j] += sum over k < count of factors[r * row + k * step] * from[k * stride + j lanes]
template <int kWide, class A>
GIST_INLINE void add_multiples(Vec<A> (&c)[kRows][kWide], const A *factors, int64_t row,
                               int64_t step, const A *from, int64_t stride, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    Vec<A> v[kWide];
    for (int j = 0; j < kWide; ++j) v[j] = at(from + k * stride + j * kLanes<A>);
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> factor = broadcast(factors[r * row + k * step]);
      for (int j = 0; j < kWide; ++j) c[r][j] = fma(factor, v[j], c[r][j]);
    }
  }
}

// Calls body(j, wide) for tiles of `wide` vectors that cover n numbers; wide is kColumns, or 1 at
// the end.
template <class A, class Body>
GIST_INLINE void for_each_tile(int64_t n, Body body) {
  constexpr int64_t step = kColumns * kLanes<A>;
  int64_t j = 0;
  for (; j + step <= n; j += step) body(j, std::integral_constant<int, kColumns>());
  for (; j < n; j += kLanes<A>) body(j, std::integral_constant<int, 1>());
}

// sums[k] += the sum of factors[row][k] * from[row] over the rows, for whole blocks of ranks.
template <class A>
void add_outer_products(const A *factors, const A *from, int64_t rows, int64_t n,
                        const AdapterLayout &layout, A *sums) {
  const int64_t stride = layout.stride;
  for (int64_t k = 0; k < layout.ranks; k += kRows)
    for_each_tile<A>(n, [&](int64_t j, auto wide) GIST_LAMBDA {
      Vec<A> c[kRows][wide];
      A *const to = sums + k * stride + j;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < wide; ++v) c[r][v] = at(to + r * stride + v * kLanes<A>);
      add_multiples(c, factors + k, 1, layout.ranks, from + j, stride, rows);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < wide; ++v) put(to + r * stride + v * kLanes<A>, c[r][v]);
    });
}

// The rows [first, last) of a group; a later group follows unless last is `end`.
struct Group {
  int64_t first, last, end;

  int64_t count() const { return last - first; }
};

// The rows of a tensor.
template <class S>
struct Rows {
  const S *tensor;
  int64_t stride;

  Rows(const void *from, int64_t row_stride)
      : tensor(static_cast<const S *>(from)), stride(row_stride) {}

  // Blocks of rows are always whole. Beyond the end they repeat the last row, whose results are
  // then neither stored nor added.
  const S *up_to(int64_t row, int64_t end) const {
    return tensor + (row < end ? row : end - 1) * stride;
  }
  // The same row of the next group. It is prefetched while this group keeps the arithmetic busy:
  // rows are read in bursts, which the processor does not recognise as a stream.
  const S *ahead(int64_t row, const Group &group) const {
    return up_to(row + group.last - group.first, group.end);
  }
};

template <class S>
GIST_INLINE void fetch(const S *at) {
  __builtin_prefetch(at, 0, 2);
}

template <class S, class A = Arithmetic<S>>
void widen_rows(Rows<S> from, const Group &group, int64_t n, int64_t stride, A *to) {
  for (int64_t i = 0; i < rounded_up(group.count(), kRows); ++i) {
    const S *const row = from.up_to(group.first + i, group.last);
    const S *const ahead = from.ahead(group.first + i, group);
    A *const wide = to + i * stride;
    for_each_vector<A>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
      fetch(ahead + j);
      put(wide + j, load(row + j, lanes, A(0)));
    });
  }
}

// A group's arrays in scratch memory, with the layout's strides.
template <class A>
struct Scratch {
  A *x, *d_out, *g, *z, *h, *dz;

  Scratch(void *memory, const AdapterLayout &layout) {
    const int64_t wide = layout.group * layout.stride, narrow = layout.group * layout.ranks;
    x = static_cast<A *>(memory);
    d_out = x + wide;
    g = d_out + wide;
    z = g + wide;
    h = z + narrow;
    dz = h + narrow;
  }
};

GIST_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
GIST_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Mean and 1 / standard deviation of kRows rows of n numbers, padded with zeros. The variance is
// computed about the mean. The same pass finds the mean's rounding error and corrects for it.
template <class A>
GIST_INLINE void row_stats(const A *x, int64_t n, int64_t stride, double eps, A (&mean)[kRows],
                           A (&rstd)[kRows]) {
  Vec<A> sums[kRows] = {}, squares[kRows] = {}, centre[kRows];
  A first[kRows], off[kRows], square[kRows];
  for (int64_t j = 0; j < n; j += kLanes<A>)
    for (int r = 0; r < kRows; ++r) sums[r] += at(x + r * stride + j);
  sums_of(sums, first);
  for (int r = 0; r < kRows; ++r) {
    first[r] /= A(n);
    centre[r] = broadcast(first[r]);
    sums[r] = Vec<A>{};
  }
  const auto add = [&](int64_t j, auto keep) GIST_LAMBDA {
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> d = keep(at(x + r * stride + j) - centre[r]);
      sums[r] += d;
      squares[r] = fma(d, d, squares[r]);
    }
  };
  const int64_t whole = n / kLanes<A> * kLanes<A>;
  for (int64_t j = 0; j < whole; j += kLanes<A>) add(j, [](Vec<A> d) GIST_LAMBDA { return d; });
  if (whole < n)
    add(whole,
        [&](Vec<A> d) GIST_LAMBDA { return lane_numbers<A>() < A(n - whole) ? d : Vec<A>{}; });
  sums_of(sums, off);
  sums_of(squares, square);
  for (int r = 0; r < kRows; ++r) {
    off[r] /= A(n);
    const A variance = square[r] / A(n) - off[r] * off[r];
    mean[r] = first[r] + off[r];
    rstd[r] = 1 / square_root((variance < 0 ? 0 : variance) + A(eps));
    // Where the squares overflow, the row is NaN: its value is unknown, and 0 would hide that.
    rstd[r] += square[r] - square[r];
  }
}

template <class S, class A = Arithmetic<S>>
void normalise_group(const AdapterCall &call, const AdapterLayout &layout,
                     const PackedWeights &packed, const A *x, int64_t begin, int64_t count) {
  const int64_t n = call.width, stride = layout.stride;
  const A *const weight = static_cast<const A *>(packed.norm_weight);
  const A *const bias = static_cast<const A *>(packed.norm_bias);
  A *const stats = static_cast<A *>(call.stats) + 2 * begin;
  S *const to = static_cast<S *>(call.normed) + begin * n;
  for (int64_t i = 0; i < count; i += kRows) {
    A mean[kRows], rstd[kRows];
    const A *const rows = x + i * stride;
    row_stats<A>(rows, n, stride, call.eps, mean, rstd);
    const int here = int(count - i < kRows ? count - i : kRows);
    for (int r = 0; r < here; ++r) {
      stats[2 * (i + r)] = mean[r];
      stats[2 * (i + r) + 1] = rstd[r];
    }
    for (int r = 0; r < here; ++r)
      for_each_vector<A>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
        const Vec<A> xhat = (at(rows + r * stride + j) - mean[r]) * rstd[r];
        store(to + (i + r) * n + j, lanes, fma(xhat, at(weight + j), at(bias + j)));
      });
  }
}

template <class S, class A = Arithmetic<S>>
void forward(const AdapterCall &call, const AdapterLayout &layout, const PackedWeights &packed,
             void *memory, int64_t begin, int64_t end) {
  const Scratch<A> scratch(memory, layout);
  const int64_t n = call.width, stride = layout.stride, ranks = layout.ranks;
  const A *const down = static_cast<const A *>(packed.down);
  const A *const up = static_cast<const A *>(packed.up);
  const A *const constant = static_cast<const A *>(packed.constant);
  const bool adds_x = call.add == call.x && call.add_stride == call.x_stride;
  const Rows<S> x_rows(call.x, call.x_stride), add(call.add, call.add_stride);
  for (int64_t first = begin; first < end; first += layout.group) {
    const Group group = {first, first + layout.group < end ? first + layout.group : end, end};
    const int64_t count = group.count(), rows = rounded_up(count, kRows);
    widen_rows<S>(x_rows, group, n, stride, scratch.x);
    if (call.has_norm) normalise_group<S>(call, layout, packed, scratch.x, first, count);
    if (call.rank == 0) continue;

    project<A>(scratch.x, down, static_cast<const A *>(packed.down_bias), rows, n, layout,
               scratch.z);
    A *const z = static_cast<A *>(call.z) + first * call.rank;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(z + i * call.rank, scratch.z + i * ranks, std::size_t(call.rank) * sizeof(A));
    with_activation<A>(call.activation, [&](auto activation) {
      for (int64_t j = 0; j < rows * ranks; j += kLanes<A>) {
        Vec<A> v[1] = {at(scratch.z + j)};
        activation.value(v, v);
        put(scratch.h + j, v[0]);
      }
    });

    S *const out = static_cast<S *>(call.out) + first * n;
    for (int64_t i = 0; i < rows; i += kRows)
      for_each_tile<A>(n, [&](int64_t j, auto wide) GIST_LAMBDA {
        Vec<A> c[kRows][wide];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < wide; ++v) {
            const int64_t column = j + v * kLanes<A>;
            c[r][v] = at(constant + column);
            if (adds_x)
              c[r][v] += at(scratch.x + (i + r) * stride + column);
            else if (call.add != nullptr) {
              const int64_t row = first + i + r;
              fetch(add.ahead(row, group) + column);
              c[r][v] += take_from_row(add.up_to(row, group.last), column, n);
            }
          }
        add_multiples(c, scratch.h + i * ranks, ranks, 1, up + j, stride, call.rank);
        for (int r = 0; r < kRows && i + r < count; ++r)
          for (int v = 0; v < wide; ++v)
            put_in_row(out + (i + r) * n, j + v * kLanes<A>, n, c[r][v]);
      });
  }
}

// LayerNorm's share of dx is rstd (g - mean g - xhat mean (g xhat)), with xhat = (x - mean) rstd
// and g = d_normed * weight.
template <class A>
struct NormGradient {
  A mean, rstd, mean_g, mean_g_xhat;

  GIST_INLINE Vec<A> normalised(Vec<A> x) const { return (x - mean) * rstd; }
  GIST_INLINE Vec<A> operator()(Vec<A> x, Vec<A> g) const {
    return rstd * (g - mean_g - normalised(x) * mean_g_xhat);
  }
};

// The norm gradients of kRows rows, starting at `first`. Also writes g.
template <class S, class A = Arithmetic<S>>
GIST_INLINE void norm_gradients(const A *weight, const A *stats, Rows<S> d_normed, int64_t first,
                                const Group &group, int64_t n, int64_t stride, const A *x, A *g,
                                NormGradient<A> (&to)[kRows]) {
  const S *from[kRows], *ahead[kRows];
  for (int r = 0; r < kRows; ++r) {
    from[r] = d_normed.up_to(first + r, group.last);
    ahead[r] = d_normed.ahead(first + r, group);
    const int64_t row = first + r < group.last ? first + r : group.last - 1;
    to[r].mean = stats[2 * row];
    to[r].rstd = stats[2 * row + 1];
  }
  Vec<A> sums[kRows] = {}, products[kRows] = {};
  for_each_vector<A>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
    for (int r = 0; r < kRows; ++r) {
      fetch(ahead[r] + j);
      const Vec<A> v = load(from[r] + j, lanes, A(0)) * at(weight + j);
      put(g + r * stride + j, v);
      sums[r] += v;
      products[r] = fma(v, to[r].normalised(at(x + r * stride + j)), products[r]);
    }
  });
  A total[kRows], product[kRows];
  sums_of(sums, total);
  sums_of(products, product);
  for (int r = 0; r < kRows; ++r) {
    to[r].mean_g = total[r] / A(n);
    to[r].mean_g_xhat = product[r] / A(n);
  }
}

// sums += the sum of the rows.
template <class A>
void add_rows(const A *from, int64_t rows, int64_t n, int64_t stride, A *sums) {
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    Vec<A> total = at(from + j);
    for (int64_t i = 1; i < rows; ++i) total += at(from + i * stride + j);
    put(sums + j, at(sums + j) + total);
  }
}

// Computes act(z), dz and the sums of all weights' gradients from d_out in `scratch`.
template <class A>
void adapter_gradients(const AdapterCall &call, const AdapterLayout &layout,
                       const PackedWeights &packed, const Scratch<A> &scratch,
                       const PartialGradients &sums, int64_t first, int64_t count) {
  const int64_t n = call.width, stride = layout.stride, ranks = layout.ranks;
  const int64_t rows = rounded_up(count, kRows);
  const A *const z = static_cast<const A *>(call.z) + first * call.rank;
  std::memset(scratch.z, 0, std::size_t(rows * ranks) * sizeof(A));
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(scratch.z + i * ranks, z + i * call.rank, std::size_t(call.rank) * sizeof(A));
  project<A>(scratch.d_out, static_cast<const A *>(packed.up), nullptr, rows, n, layout,
             scratch.dz);
  with_activation<A>(call.activation, [&](auto activation) {
    for (int64_t j = 0; j < rows * ranks; j += kLanes<A>) {
      const Vec<A> v[1] = {at(scratch.z + j)};
      Vec<A> h[1], slope[1];
      activation.both(v, h, slope);
      put(scratch.h + j, h[0]);
      put(scratch.dz + j, at(scratch.dz + j) * slope[0]);
    }
  });
  add_outer_products<A>(scratch.dz, scratch.x, count, n, layout, static_cast<A *>(sums.down));
  add_outer_products<A>(scratch.h, scratch.d_out, count, n, layout, static_cast<A *>(sums.up));
  add_rows<A>(scratch.d_out, count, n, stride, static_cast<A *>(sums.d_out));
  A *const dz = static_cast<A *>(sums.dz);
  for (int64_t k = 0; k < ranks; ++k) {
    A total = 0;
    for (int64_t i = 0; i < count; ++i) total += scratch.dz[i * ranks + k];
    dz[k] += total;
  }
}

template <class S, class A = Arithmetic<S>>
void backward(const AdapterCall &call, const AdapterLayout &layout, const PackedWeights &packed,
              void *memory, const PartialGradients &sums, int64_t begin, int64_t end) {
  const Scratch<A> scratch(memory, layout);
  const int64_t n = call.width, stride = layout.stride, ranks = layout.ranks;
  const A *const down = static_cast<const A *>(packed.down);
  const A *const weight = static_cast<const A *>(packed.norm_weight);
  const A *const stats = static_cast<const A *>(call.stats);
  const bool reads_d_out = call.rank > 0 || call.pass_through;
  const bool reads_x = call.rank > 0 || call.has_norm;
  const Rows<S> x_rows(call.x, call.x_stride), d_out_rows(call.d_out, call.d_out_stride);
  const Rows<S> d_normed(call.d_normed, call.d_normed_stride);
  for (int64_t first = begin; first < end; first += layout.group) {
    const Group group = {first, first + layout.group < end ? first + layout.group : end, end};
    const int64_t count = group.count();
    if (reads_x) widen_rows<S>(x_rows, group, n, stride, scratch.x);
    if (reads_d_out) widen_rows<S>(d_out_rows, group, n, stride, scratch.d_out);
    if (call.rank > 0) adapter_gradients<A>(call, layout, packed, scratch, sums, first, count);
    if (call.dx == nullptr) continue;

    S *const dx = static_cast<S *>(call.dx) + first * n;
    for (int64_t i = 0; i < count; i += kRows) {
      const A *const x = scratch.x + i * stride, *const d_out = scratch.d_out + i * stride;
      A *const g = scratch.g + i * stride;
      NormGradient<A> norm[kRows];
      if (call.has_norm)
        norm_gradients<S>(weight, stats, d_normed, first + i, group, n, stride, x, g, norm);
      for_each_tile<A>(n, [&](int64_t j, auto wide) GIST_LAMBDA {
        Vec<A> c[kRows][wide];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < wide; ++v) {
            const int64_t column = r * stride + j + v * kLanes<A>;
            c[r][v] = call.pass_through ? at(d_out + column) : Vec<A>{};
            if (call.has_norm) c[r][v] += norm[r](at(x + column), at(g + column));
          }
        add_multiples(c, scratch.dz + i * ranks, ranks, 1, down + j, stride, call.rank);
        for (int r = 0; r < kRows && i + r < count; ++r)
          for (int v = 0; v < wide; ++v)
            put_in_row(dx + (i + r) * n, j + v * kLanes<A>, n, c[r][v]);
      });
    }
  }
}

void forward_any(const AdapterCall &call, const AdapterLayout &layout, const PackedWeights &packed,
                 void *scratch, int64_t begin, int64_t end) {
  const auto run = call.dtype == Dtype::float32    ? forward<float>
                   : call.dtype == Dtype::bfloat16 ? forward<BFloat16>
                   : call.dtype == Dtype::float16  ? forward<Float16>
                                                   : forward<double>;
  run(call, layout, packed, scratch, begin, end);
}

void backward_any(const AdapterCall &call, const AdapterLayout &layout, const PackedWeights &packed,
                  void *scratch, const PartialGradients &sums, int64_t begin, int64_t end) {
  const auto run = call.dtype == Dtype::float32    ? backward<float>
                   : call.dtype == Dtype::bfloat16 ? backward<BFloat16>
                   : call.dtype == Dtype::float16  ? backward<Float16>
                                                   : backward<double>;
  run(call, layout, packed, scratch, sums, begin, end);
}

}  // namespace

extern const AdapterKernels GIST_IN_SET(adapter_rows) = {forward_any, backward_any};

}  // namespace gist
