// The Jensen-Shannon divergence, row by row. Compiled once for each instruction set; CMakeLists.txt
// names the result by GIST_IN_SET(divergence_rows). All but that name has internal linkage.
//
// With p_k the softmax of side k at its temperature T_k, w_k its weight and m = sum w_k p_k,
//
//   JSD = sum_k w_k KL(p_k || m)      dJSD/dlogits_k = w_k / T_k p_k (l_k - sum p_k l_k)
//
// where l_k = log(p_k / m). Class by class, it comes from o_k = log p_k - log b of some base b, as
// l_k = o_k - log1p(y) with y = m / b - 1. Where the sides are alike, b is the first side's
// probability, o_k the difference of two logits and y = sum w_k expm1(o_k): nothing cancels, and an
// error of the log-sum-exps shifts all l_k alike. Elsewhere b is the largest of the probabilities.

#include "divergence.h"

#include <utility>

#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

constexpr int64_t kBlock = 64 * kLanes<float>;
constexpr double kInfinity = __builtin_inf();
// Below this a row's divergence is computed anew, for relative precision.
constexpr double kSmall = 1.0 / 64;

// sum of x^i / ((first + 1) ... (first + i)) over i: of exp without its first terms.
template <class A>
GIST_INLINE Vec<A> exp_tail(Vec<A> x, int first) {
  constexpr int terms = sizeof(A) == 4 ? 8 : 15;  // for |x| <= 1/2
  Vec<A> sum = broadcast(A(1));
  for (int i = terms; i > 0; --i) sum = fma(sum, x * A(1.0 / (first + i)), broadcast(A(1)));
  return sum;
}

// log(1 + y) for y > -1, with the relative precision of y where it is small.
template <class A>
GIST_INLINE Vec<A> log1p(Vec<A> y) {
  using F = Float<A>;
  using Bits = Vec<typename F::Bits>;
  typedef std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t> Int;
  constexpr int terms = sizeof(A) == 4 ? 5 : 11;
  const typename F::Bits root_half = bit_cast<typename F::Bits>(A(0.70710678118654752440));
  const typename F::Bits one = bit_cast<typename F::Bits>(A(1));
  const Vec<A> x = 1 + y;
  const Bits biased = (bit_cast<Bits>(x) - root_half + one) >> F::mantissa;
  const Vec<A> m = bit_cast<Vec<A>>(bit_cast<Bits>(x) - (biased << F::mantissa) + one);
  const Vec<A> k = __builtin_convertvector(bit_cast<Vec<Int>>(biased), Vec<A>) - A(F::bias);
  const Vec<A> above = k == 0 ? y : m - 1;
  const Vec<A> s = above / (m + 1), square = s * s;
  Vec<A> series = broadcast(A(1.0 / (2 * terms + 1)));
  for (int i = terms - 1; i > 0; --i) series = fma(series, square, broadcast(A(1.0 / (2 * i + 1))));
  return fma(k, broadcast(A(0.69314718055994530942)), 2 * fma(s * square, series, s));
}

// A number of sides that the compiler knows, or 0 for any up to kMostSides.
template <class S, int kSides>
struct Row {
  using A = Arithmetic<S>;
  static constexpr int kRoom = kSides ? kSides : kMostSides;
  using Vectors = Vec<A>[kRoom];

  const DivergenceCall &call;
  const int sides;
  const S *logits[kRoom];
  SideStats<A> side[kRoom];
  A weight[kRoom], inverse_t[kRoom], ratio[kRoom];

  Row(const DivergenceCall &call, int64_t row) : call(call), sides(kSides ? kSides : call.sides) {
    for (int k = 0; k < sides; ++k) {
      logits[k] = static_cast<const S *>(call.logits[k]) + row * call.logit_stride[k];
      weight[k] = A(call.weights[k]);
      inverse_t[k] = A(1 / call.temperatures[k]);
      ratio[k] = A(call.temperatures[0] / call.temperatures[k]);
    }
  }

  // Maxima and sums, one side after the other.
  void sum() {
    const A masked = A(-kInfinity);
    double sums[kRoom];
    for (int k = 0; k < sides; ++k) {
      const Exp<A> exponential(1 / call.temperatures[k]);
      Vec<A> top = broadcast(masked);
      for_each_vector<A>(call.classes, [&](int64_t j, auto lanes) GIST_LAMBDA {
        top = max(load(logits[k] + j, lanes, masked), top);
      });
      const A highest = largest<A>(top);
      sums[k] = 0;
      for (int64_t begin = 0; begin < call.classes; begin += kBlock) {
        const int64_t left = call.classes - begin;
        Vec<A> total = {};
        for_each_vector<A>(left < kBlock ? left : kBlock, [&](int64_t j, auto lanes) GIST_LAMBDA {
          const Vec<A> x[1] = {load(logits[k] + begin + j, lanes, masked) - highest};
          Vec<A> e[1];
          exponential(x, e);
          total += e[0];
        });
        sums[k] += ::sum<A>(total);
      }
      side[k].max = highest;
      side[k].inverse_sum = A(1 / sums[k]);
      side[k].log_sum = A(__builtin_log(sums[k]));
      // Divided, so that equal sides give exactly 0.
      side[k].shift = A(__builtin_log(sums[k] / sums[0]));
    }
  }

  // Of a vector of classes: every p_k and l_k = log(p_k / m), and m.
  template <class Lanes>
  GIST_INLINE Vec<A> logarithms(int64_t j, Lanes lanes, const Exp<A> (&exponentials)[kRoom],
                                Vectors &p, Vectors &l) const {
    Vectors x, scaled;
    Vec<A> largest_p = {}, largest_log = broadcast(A(-kInfinity)), far_mean = {}, near_mean = {};
    auto near = Vec<A>{} == 0;
    for (int k = 0; k < sides; ++k) {
      x[k] = load(logits[k] + j, lanes, A(-kInfinity)) - side[k].max;
      const Vec<A> in[1] = {x[k]};
      Vec<A> e[1];
      exponentials[k](in, e);
      p[k] = e[0] * side[k].inverse_sum;
      l[k] = x[k] * inverse_t[k] - side[k].log_sum;
      scaled[k] = k == 0 ? Vec<A>{} : (x[k] * ratio[k] - x[0]) * inverse_t[0] - side[k].shift;
      near &= scaled[k] < A(0.5) && scaled[k] > A(-0.5);
      largest_p = max(largest_p, p[k]);
      largest_log = max(largest_log, l[k]);
    }
    for (int k = 0; k < sides; ++k) {
      far_mean += weight[k] * p[k];
      if (k > 0) near_mean += weight[k] * (scaled[k] * exp_tail<A>(scaled[k], 1));
    }
    const Vec<A> y = near ? near_mean : far_mean / largest_p - 1;
    const Vec<A> log_mean = log1p<A>(y);
    for (int k = 0; k < sides; ++k) l[k] = (near ? scaled[k] : l[k] - largest_log) - log_mean;
    return near ? p[0] + p[0] * y : far_mean;
  }

  // The row's divergence. The means are of l_k under p_k; `refined` sums instead
  // p_k (exp(-l_k) - 1 + l_k) = p_k l_k + m - p_k, which is never negative.
  template <bool kRefined, class Exponentials>
  double divergence(const Exponentials &exponentials) {
    double means[kRoom] = {};
    for (int64_t begin = 0; begin < call.classes; begin += kBlock) {
      const int64_t left = call.classes - begin;
      Vectors totals;
      for (int k = 0; k < sides; ++k) totals[k] = Vec<A>{};
      for_each_vector<A>(left < kBlock ? left : kBlock, [&](int64_t j, auto lanes) GIST_LAMBDA {
        Vectors p, l;
        const Vec<A> m = logarithms(begin + j, lanes, exponentials, p, l), none = {};
        for (int k = 0; k < sides; ++k) {
          const Vec<A> product = p[k] != 0 ? p[k] * l[k] : none;
          if constexpr (kRefined) {
            const Vec<A> series = p[k] * l[k] * l[k] * A(0.5) * exp_tail<A>(-l[k], 2);
            totals[k] += l[k] < A(0.5) && l[k] > A(-0.5) ? series : product + (m - p[k]);
          } else {
            totals[k] += product;
          }
        }
      });
      for (int k = 0; k < sides; ++k) means[k] += ::sum<A>(totals[k]);
    }
    double result = 0;
    for (int k = 0; k < sides; ++k) {
      result += call.weights[k] * means[k];
      if (!kRefined) side[k].mean = A(means[k]);
    }
    return result;
  }
};

// Exponentials of every side, which have no default constructor.
template <class A, int kRoom>
struct SideExponentials {
  Exp<A> of[kRoom];

  template <int... kIndex>
  SideExponentials(const DivergenceCall &call, std::integer_sequence<int, kIndex...>)
      : of{Exp<A>(1 / call.temperatures[kIndex < call.sides ? kIndex : 0])...} {}
};

template <class A>
double row_scale(const DivergenceCall &call, int64_t row) {
  const A *const scales = static_cast<const A *>(call.row_scales);
  return scales == nullptr ? 1 : double(scales[row * call.row_scales_stride]);
}

// How many of n numbers come before the first cache line of their own.
template <class S>
int64_t before_line(const S *to, int64_t n) {
  const std::uintptr_t bytes = -reinterpret_cast<std::uintptr_t>(to) % 64;
  const int64_t before = int64_t(bytes / sizeof(S));
  return bytes % sizeof(S) == 0 && before < n ? before : n;
}

// The gradient of a row that doesn't count: zeros, of which nothing is read.
template <class S>
void clear(const DivergenceCall &call, S *to) {
  using A = Arithmetic<S>;
  const int64_t cached = call.stream ? before_line(to, call.classes) : call.classes;
  const auto write = [&](int64_t j, auto lanes) { store(to + j, lanes, Vec<A>{}); };
  for_each_vector<A>(cached, write);
  for_each_vector<A>(call.classes - cached, [&](int64_t j, auto lanes) {
    if constexpr (std::is_same_v<decltype(lanes), Whole>)
      store_past_cache(to + cached + j, Vec<A>{});
    else
      write(cached + j, lanes);
  });
}

template <class S, int kSides>
void rows_of(const DivergenceCall &call, bool backward, int64_t begin, int64_t end) {
  using R = Row<S, kSides>;
  using A = typename R::A;
  const SideExponentials<A, R::kRoom> exponentials(call,
                                                   std::make_integer_sequence<int, R::kRoom>());
  SideStats<A> *const stats = static_cast<SideStats<A> *>(call.stats);
  for (int64_t index = begin; index < end; ++index) {
    const double scale = row_scale<A>(call, index);
    R row(call, index);
    if (!backward) {
      double value = 0;
      for (SideStats<A> &each : row.side) each = {};
      if (scale != 0) {
        row.sum();
        value = row.template divergence<false>(exponentials.of);
        if (value < kSmall) value = row.template divergence<true>(exponentials.of);
        value *= scale;
      }
      static_cast<A *>(call.loss)[index] = A(value);
      for (int k = 0; k < row.sides; ++k) stats[index * row.sides + k] = row.side[k];
      continue;
    }
    S *to[R::kRoom];
    for (int k = 0; k < row.sides; ++k) {
      S *const gradient = static_cast<S *>(call.d_logits[k]);
      to[k] = gradient == nullptr ? nullptr : gradient + index * call.classes;
      if (scale == 0 && to[k] != nullptr) clear(call, to[k]);
    }
    if (scale == 0) continue;
    const double upstream =
        scale * double(static_cast<const A *>(call.grad)[index * call.grad_stride]);
    A factor[R::kRoom];
    int64_t cached = 0;
    for (int k = 0; k < row.sides; ++k) {
      row.side[k] = stats[index * row.sides + k];
      factor[k] = A(upstream * call.weights[k] / call.temperatures[k]);
      if (to[k] == nullptr) continue;
      const int64_t before = before_line(to[k], call.classes);
      // Past the cache only where all gradients' lines begin at the same number.
      cached = cached == 0 || cached == before ? before : call.classes;
    }
    if (!call.stream) cached = call.classes;
    const auto write = [&](auto past_cache, int64_t from, int64_t count) {
      constexpr bool kPastCache = decltype(past_cache)::value;
      for_each_vector<A>(count, [&](int64_t offset, auto lanes) GIST_LAMBDA {
        const int64_t j = from + offset;
        typename R::Vectors p, l;
        row.logarithms(j, lanes, exponentials.of, p, l);
        for (int k = 0; k < row.sides; ++k) {
          if (to[k] == nullptr) continue;
          const Vec<A> none = {};
          const Vec<A> g = p[k] != 0 ? p[k] * (l[k] - row.side[k].mean) * factor[k] : none;
          if constexpr (kPastCache && std::is_same_v<decltype(lanes), Whole>)
            store_past_cache(to[k] + j, g);
          else
            store(to[k] + j, lanes, g);
        }
      });
    };
    write(std::false_type(), 0, cached);
    write(std::true_type(), cached, call.classes - cached);
  }
#if defined(__SSE2__)
  if (call.stream) _mm_sfence();  // before another thread reads what was streamed
#endif
}

template <class S>
void rows_as(const DivergenceCall &call, bool backward, int64_t begin, int64_t end) {
  if (call.sides == 2)
    rows_of<S, 2>(call, backward, begin, end);
  else if (call.sides == 3)
    rows_of<S, 3>(call, backward, begin, end);
  else
    rows_of<S, 0>(call, backward, begin, end);
}

void rows(const DivergenceCall &call, bool backward, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: rows_as<float>(call, backward, begin, end); break;
    case Dtype::bfloat16: rows_as<BFloat16>(call, backward, begin, end); break;
    case Dtype::float16: rows_as<Float16>(call, backward, begin, end); break;
    default: rows_as<double>(call, backward, begin, end);
  }
}

}  // namespace

extern const DivergenceKernel GIST_IN_SET(divergence_rows) = rows;

}  // namespace gist
