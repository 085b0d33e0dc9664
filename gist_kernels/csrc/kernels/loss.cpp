// The loss, row by row. CMakeLists.txt compiles this file once per instruction set, which defines
// GIST_IN_SET(loss_rows). Everything else has internal linkage (see simd.h).
//
// Let x = logits - max(logits) for each head, p and q the softmaxes of x / T, c the logarithm of
// the ratio of their sums, and d = (x_cls - x_gist) / T - c = log p - log q. Then
//
//   KL(p || q) = sum p d        KL(q || p) = -sum q d        CE = sum y (log sum e^x - x)
//   dL/d cls  = v (softmax(cls)  - y) + 1/T [ a p ( d - KL(p || q)) + b (p - q) ]
//   dL/d gist = w (softmax(gist) - y) + 1/T [ b q (-d - KL(q || p)) + a (q - p) ]
//
// for the loss v CE(cls) + w CE(gist) + a KL(p || q) + b KL(q || p). In d - KL(p || q) the constant
// c cancels: it is D - mean D under p, over T, with D = x_cls - x_gist; under q for the other head.
// Where the heads differ in temperature, x_gist is scaled by T / T_gist in p, q and D: the rest is
// as at one temperature.
// Everything is relative to the maxima, which are never added to a logarithm: that would lose its
// digits to a large common offset.

#include "loss.h"

#include "storage.h"

namespace gist {
namespace {

using std::int64_t;

// Logits summed in float: a block fits into the L1 cache, and its sums are those of its runs.
constexpr int64_t kBlock = 64 * kLanes<float>, kRun = 8 * kLanes<float>;
// Rows up to this size are prefetched a row ahead: two rows of both heads fit into an L2 cache.
constexpr int64_t kFetchedBytes = 128 << 10;
constexpr double kInfinity = __builtin_inf();
// Rows up to this size keep their exponentials from the forward pass to the backward pass of one
// call: those of a group of rows then stay in the L1 cache, or nearly.
constexpr int64_t kKeptClasses = 1024;

// How e^x, for the cross-entropies, comes from e^(x/T): as its power where T is 1, 2, 3 or 4, by
// a second exponential for any other T, by one of each head's for two T, or not at all.
constexpr int kTwoTemperatures = -2, kAnyTemperature = -1, kNoPlain = 0;

template <class A, int kPower>
struct Exponentials {
  Exp<A> tempered, plain, plain_gist;

  explicit Exponentials(const LossCall &call)
      : tempered(1 / call.temperature), plain(1), plain_gist(1 / call.gist_scale) {}

  template <int kCount>
  GIST_INLINE void untemper(const Vec<A> (&x)[kCount], const Vec<A> (&e)[kCount],
                            Vec<A> (&to)[kCount]) const {
    if constexpr (kPower == kAnyTemperature) {
      plain(x, to);
    } else if constexpr (kPower == kTwoTemperatures) {
      for (int i = 0; i < kCount; i += 2) {
        const Vec<A> cls[1] = {x[i + kCls]}, gist[1] = {x[i + kGist]};
        Vec<A> e[1];
        plain(cls, e);
        to[i + kCls] = e[0];
        plain_gist(gist, e);
        to[i + kGist] = e[0];
      }
    } else {
      for (int i = 0; i < kCount; ++i) {
        const Vec<A> square = e[i] * e[i];
        to[i] = kPower == 1   ? e[i]
                : kPower == 2 ? square
                : kPower == 3 ? square * e[i]
                              : square * square;
      }
    }
  }
};

// The logits of both heads in one row, or in a run of it.
template <class S>
struct Pair {
  const S *cls, *gist;

  Pair at(int64_t j) const { return {cls + j, gist + j}; }
};

// Vectors of both heads side by side, cls and gist in turn, less their maxima, gist's scaled.
template <class S, class Lanes, class A, int kCount>
GIST_INLINE void load_shifted(Pair<S> from, Lanes lanes, const A (&max)[2], A gist_scale,
                              Vec<A> (&x)[kCount]) {
  for (int i = 0; i < kCount; i += 2) {
    const Pair<S> at = from.at(i / 2 * kLanes<A>);
    x[i + kCls] = load(at.cls, lanes, A(-kInfinity)) - max[kCls];
    x[i + kGist] = (load(at.gist, lanes, A(-kInfinity)) - max[kGist]) * gist_scale;
  }
}

// Calls body(begin, count) for each run of at most `length` numbers.
template <int64_t length, class Body>
GIST_INLINE void for_each_run(int64_t n, Body body) {
  for (int64_t begin = 0; begin < n; begin += length)
    body(begin, n - begin < length ? n - begin : length);
}

// The largest logit of each head, and x_cls - x_gist at that class. Sums of such differences are
// centred there. A class with nearly all the probability then leaves no large numbers to cancel.
template <class A>
struct Peaks {
  A max[2];
  A difference[2];
  A gist_scale;
};

template <class S, class A = Arithmetic<S>>
Peaks<A> row_peaks(Pair<S> logits, int64_t n, double gist_scale) {
  const A masked = A(-kInfinity);
  Vec<A> top_cls = broadcast(masked), top_gist = top_cls, other_cls = {}, other_gist = {};
  for_each_vector<A>(n, [&](int64_t j, auto lanes) GIST_LAMBDA {
    const Vec<A> cls = load(logits.cls + j, lanes, masked);
    const Vec<A> gist = load(logits.gist + j, lanes, masked);
    other_cls = cls > top_cls ? gist : other_cls;
    other_gist = gist > top_gist ? cls : other_gist;
    top_cls = max(cls, top_cls);
    top_gist = max(gist, top_gist);
  });
  const Vec<A> top[2] = {top_cls, top_gist}, other[2] = {other_cls, other_gist};
  Peaks<A> peaks;
  peaks.gist_scale = A(gist_scale);
  for (int s : kHeads) peaks.max[s] = largest<A>(top[s]);
  for (int s : kHeads) {
    const A at_peak = largest<A>(top[s] == broadcast(peaks.max[s]) ? other[s] : broadcast(masked));
    const A below = at_peak - peaks.max[1 - s];
    peaks.difference[s] = below - below != 0 ? A(0) : s == kCls ? -below * peaks.gist_scale : below;
  }
  return peaks;
}

// Sums over a row, with x = logits - maximum.
struct Sums {
  double tempered[2] = {};    // sum of e = exp(x / T)
  double difference[2] = {};  // sum of e (x_cls - x_gist - the peak's)
  double plain[2] = {};       // sum of exp(x)
};

// `next` is the row that follows. It is prefetched while `row` keeps the arithmetic busy. The
// tempered exponentials are written to `kept`, if not null: vectors of both heads in turn.
template <class S, int kPower, class A = Arithmetic<S>>
Sums row_sums(Pair<S> row, Pair<S> next, int64_t n, Peaks<A> peaks,
              Exponentials<A, kPower> exponentials, A *kept) {
  Sums sums;
  for_each_run<kBlock>(n, [&](int64_t begin, int64_t count) {
    Vec<A> tempered[2] = {}, difference[2] = {}, plain[2] = {};
    // Short sums are added to longer ones, so that fewer small numbers are added to a large one.
    for_each_run<kRun>(count, [&](int64_t run, int64_t run_count) {
      const Pair<S> logits = row.at(begin + run), ahead = next.at(begin + run);
      Vec<A> run_tempered[2] = {}, run_difference[2] = {}, run_plain[2] = {};
      for_each_vectors<A>(run_count, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
        Vec<A> x[2 * count], e[2 * count];
        load_shifted(logits.at(j), lanes, peaks.max, peaks.gist_scale, x);
        exponentials.tempered(x, e);
        if (kept != nullptr) {
          A *const to = kept + 2 * (begin + run + j);
          for (int i = 0; i < 2 * count; ++i) store(to + i * kLanes<A>, Whole{}, e[i]);
        }
        for (int i = 0; i < 2 * count; i += 2) {
          __builtin_prefetch(ahead.cls + j + i / 2 * kLanes<A>);
          __builtin_prefetch(ahead.gist + j + i / 2 * kLanes<A>);
          for (int s : kHeads) {
            const Vec<A> centred = x[i + kCls] - x[i + kGist] - peaks.difference[s];
            run_tempered[s] += e[i + s];
            // 0 * inf is 0 here: a class without probability adds nothing.
            run_difference[s] =
                fma(e[i + s], e[i + s] != 0 ? centred : Vec<A>{}, run_difference[s]);
          }
        }
        if constexpr (kPower != kNoPlain) {
          exponentials.untemper(x, e, e);
          for (int i = 0; i < 2 * count; ++i) run_plain[i % 2] += e[i];
        }
      });
      for (int s : kHeads) {
        tempered[s] += run_tempered[s];
        difference[s] += run_difference[s];
        plain[s] += run_plain[s];
      }
    });
    for (int s : kHeads) {
      sums.tempered[s] += sum<A>(tempered[s]);
      sums.difference[s] += sum<A>(difference[s]);
      sums.plain[s] += sum<A>(plain[s]);
    }
  });
  return sums;
}

// Both KL terms if they are small. sum p d would be a difference of nearly equal numbers;
//   KL(p || q) = sum p (e^-d - 1 + d)      KL(q || p) = sum q (e^d - 1 - d)
// have no negative summand. Both factors are computed from the even and the odd part of one series.
template <class S, class A = Arithmetic<S>>
void refine_kl(const LossCall &call, Pair<S> logits, A log_ratio, RowStats<A> &stats) {
  constexpr int terms = sizeof(A) == 4 ? 5 : 9;
  const A masked = A(-kInfinity);
  const Exp<A> exponential(1 / call.temperature);
  const A scale_p = stats.tempered[kCls], scale_q = stats.tempered[kGist];
  const A inverse_temperature = A(1 / call.temperature), gist_scale = A(call.gist_scale);
  const A max_cls = stats.max[kCls], max_gist = stats.max[kGist];
  double kl_pq = 0, kl_qp = 0;
  for_each_run<kBlock>(call.classes, [&](int64_t begin, int64_t count) {
    const Pair<S> block = logits.at(begin);
    Vec<A> sum_pq = {}, sum_qp = {};
    for_each_vector<A>(count, [&](int64_t j, auto lanes) GIST_LAMBDA {
      const Vec<A> x[2] = {load(block.cls + j, lanes, masked) - max_cls,
                           (load(block.gist + j, lanes, masked) - max_gist) * gist_scale};
      Vec<A> e[2];
      exponential(x, e);
      const Vec<A> p = e[kCls] * scale_p, q = e[kGist] * scale_q;
      const Vec<A> d = (x[kCls] - x[kGist]) * inverse_temperature - log_ratio;
      const Vec<A> square = d * d;
      Vec<A> even = broadcast(A(1)), odd = even;
      for (int k = terms; k > 1; --k) {
        even = fma(even, square * A(1.0 / ((2 * k - 1) * (2 * k))), broadcast(A(1)));
        odd = fma(odd, square * A(1.0 / (2 * k * (2 * k + 1))), broadcast(A(1)));
      }
      even *= square * A(1.0 / 2);
      odd *= square * d * A(1.0 / 6);
      const Vec<A> none = {};
      sum_pq += square < 1 ? p * (even - odd) : (p != 0 ? p * d : none) + (q - p);
      sum_qp += square < 1 ? q * (even + odd) : (q != 0 ? -(q * d) : none) + (p - q);
    });
    kl_pq += sum<A>(sum_pq);
    kl_qp += sum<A>(sum_qp);
  });
  stats.terms[2] = A(kl_pq);
  stats.terms[3] = A(kl_qp);
}

// The target y of a row. With a class index, y = 1 at `index`; probabilities are read in blocks.
struct RowTarget {
  enum State { kept, ignored, invalid } state = kept;
  int64_t index = -1;
  const char *probabilities = nullptr;
};

template <class A>
double row_scale(const LossCall &call, int64_t row) {
  const A *const scales = static_cast<const A *>(call.row_scales);
  return scales == nullptr ? call.row_scale : double(scales[row * call.row_scales_stride]);
}

template <class A>
RowTarget row_target(const LossCall &call, int64_t row) {
  RowTarget target;
  if (call.row_scales != nullptr && row_scale<A>(call, row) == 0) {
    target.state = RowTarget::ignored;
    return target;
  }
  if (call.target_dtype == Dtype::int64) {
    target.index = static_cast<const int64_t *>(call.target)[row * call.target_stride];
    if (target.index == call.ignore_index)
      target.state = RowTarget::ignored;
    else if (target.index < 0 || target.index >= call.classes)
      target.state = RowTarget::invalid;
  } else if (call.target_dtype != Dtype::none) {
    target.probabilities = static_cast<const char *>(call.target) +
                           row * call.target_stride * bytes_of(call.target_dtype);
  }
  return target;
}

// The first row behind `row` that counts, or `row` if there is none. Of the others nothing is read.
template <class A>
int64_t next_kept(const LossCall &call, int64_t row) {
  for (int64_t next = row + 1; next < call.rows; ++next)
    if (row_target<A>(call, next).state == RowTarget::kept) return next;
  return row;
}

// Converts `from[begin]` and the following n - 1 numbers to A, in `buffer` if necessary.
template <class S, class A>
const A *as_arithmetic(const void *from, int64_t begin, int64_t n, A *buffer) {
  const S *values = static_cast<const S *>(from) + begin;
  if constexpr (std::is_same_v<S, A>) {
    return values;
  } else {
    using B = Arithmetic<S>;
    for_each_vector<B>(n, [&](int64_t j, auto lanes) {
      B widened[kLanes<B>];
      store(widened, Whole{}, load(values + j, lanes, B(0)));
      for (int i = 0; i < kLanes<B> && j + i < n; ++i) buffer[j + i] = A(widened[i]);
    });
    return buffer;
  }
}

template <class A>
const A *probabilities(const LossCall &call, const void *row, int64_t begin, int64_t n, A *buffer) {
  switch (call.target_dtype) {
    case Dtype::float32: return as_arithmetic<float>(row, begin, n, buffer);
    case Dtype::bfloat16: return as_arithmetic<BFloat16>(row, begin, n, buffer);
    case Dtype::float16: return as_arithmetic<Float16>(row, begin, n, buffer);
    default: return as_arithmetic<double>(row, begin, n, buffer);
  }
}

// Sums over the target y, smoothing included.
struct TargetSums {
  double mass = 0;          // sum y
  double weighted[2] = {};  // sum y x
};

template <class S, class A = Arithmetic<S>>
TargetSums target_sums(const LossCall &call, const RowTarget &target, Pair<S> x, Peaks<A> peaks) {
  const int64_t n = call.classes;
  const A max_cls = peaks.max[kCls], max_gist = peaks.max[kGist];
  TargetSums sums;
  if (target.index >= 0) {
    sums.mass = 1;
    sums.weighted[kCls] = double(load(x.cls + target.index, Part{1}, A(0))[0]) - double(max_cls);
    sums.weighted[kGist] = double(load(x.gist + target.index, Part{1}, A(0))[0]) - double(max_gist);
  } else {
    for_each_run<kBlock>(n, [&](int64_t begin, int64_t count) {
      A buffer[kBlock];
      const A *y = probabilities(call, target.probabilities, begin, count, buffer);
      Vec<A> mass = {}, cls = {}, gist = {};
      for_each_vector<A>(count, [&](int64_t j, auto lanes) GIST_LAMBDA {
        const Vec<A> weight = load(y + j, lanes, A(0)), none = {};
        const Vec<A> x_cls = load(x.cls + begin + j, lanes, max_cls) - max_cls;
        const Vec<A> x_gist = load(x.gist + begin + j, lanes, max_gist) - max_gist;
        mass += weight;
        cls += weight != 0 ? weight * x_cls : none;
        gist += weight != 0 ? weight * x_gist : none;
      });
      sums.mass += sum<A>(mass);
      sums.weighted[kCls] += sum<A>(cls);
      sums.weighted[kGist] += sum<A>(gist);
    });
  }
  if (call.label_smoothing == 0) return sums;

  double uniform[2] = {};  // sum x
  for_each_run<kBlock>(n, [&](int64_t begin, int64_t count) {
    Vec<A> cls = {}, gist = {};
    for_each_vector<A>(count, [&](int64_t j, auto lanes) GIST_LAMBDA {
      cls += load(x.cls + begin + j, lanes, max_cls) - max_cls;
      gist += load(x.gist + begin + j, lanes, max_gist) - max_gist;
    });
    uniform[kCls] += sum<A>(cls);
    uniform[kGist] += sum<A>(gist);
  });
  const double kept = 1 - call.label_smoothing;
  sums.mass = kept * sums.mass + call.label_smoothing;
  for (int s : kHeads)
    sums.weighted[s] = kept * sums.weighted[s] + call.label_smoothing / double(n) * uniform[s];
  return sums;
}

// Rows whose statistics are computed together, each in a lane of its own. They share instructions,
// but no number.
constexpr int kGroup = kLanes<double>;
using Lanes = Vec<double>;

// The sums over each row of a group, from which its statistics are computed.
template <class A>
struct GroupSums {
  using Numbers = double[2][kGroup];
  alignas(kVectorBytes) Numbers max = {}, peak = {}, tempered = {}, difference = {}, plain = {};
  alignas(kVectorBytes) Numbers weighted = {};
  alignas(kVectorBytes) double mass[kGroup] = {};

  void put(int lane, const Peaks<A> &peaks, const Sums &sums, const TargetSums &y) {
    for (int s : kHeads) {
      max[s][lane] = double(peaks.max[s]);
      peak[s][lane] = double(peaks.difference[s]);
      tempered[s][lane] = sums.tempered[s];
      difference[s][lane] = sums.difference[s];
      plain[s][lane] = sums.plain[s];
      weighted[s][lane] = y.weighted[s];
    }
    mass[lane] = y.mass;
  }
};

// A KL below this is recomputed, for relative precision. The first value of a larger one has it.
constexpr double kSmallKl = 1.0 / 64;

// The statistics of a group, row by row. `small_kl` marks the rows to refine, by `log_ratio`.
template <class A>
struct GroupStats {
  RowStats<A> row[kGroup];
  A log_ratio[kGroup];
  bool small_kl[kGroup];

  GroupStats(const LossCall &call, const GroupSums<A> &sums) {
    const Lanes inverse[2] = {1 / load(sums.tempered[kCls], Whole{}),
                              1 / load(sums.tempered[kGist], Whole{})};
    // The logarithm of a quotient, so that equal heads give exactly 0.
    const Lanes ratio =
        log(load(sums.tempered[kCls], Whole{}) / load(sums.tempered[kGist], Whole{}));
    const double inverse_temperature = 1 / call.temperature;
    for_each_lane(ratio, [&](int i, double x) { log_ratio[i] = A(x); });
    for (bool &small : small_kl) small = false;
    for (int s : kHeads) {
      const Lanes mean =
          load(sums.peak[s], Whole{}) + load(sums.difference[s], Whole{}) * inverse[s];
      const Lanes kl =
          s == kCls ? mean * inverse_temperature - ratio : ratio - mean * inverse_temperature;
      const Lanes mass = load(sums.mass, Whole{}), plain = load(sums.plain[s], Whole{});
      const bool target = call.target_dtype != Dtype::none;
      const Lanes cross_entropy =
          target ? mass * log(plain) - load(sums.weighted[s], Whole{}) : Lanes{};
      const Lanes share = target ? mass / plain : Lanes{};
      for_each_lane(inverse[s], [&](int i, double x) { row[i].tempered[s] = A(x); });
      for_each_lane(share, [&](int i, double x) { row[i].plain[s] = A(x); });
      for_each_lane(cross_entropy, [&](int i, double x) { row[i].terms[s] = A(x); });
      for_each_lane(mean, [&](int i, double x) {
        row[i].max[s] = A(sums.max[s][i]);
        row[i].mean[s] = A(x);
        row[i].mean_rest[s] = A(x - double(A(x)));
      });
      for_each_lane(kl, [&](int i, double x) {
        row[i].terms[2 + s] = A(x);
        small_kl[i] |= x < kSmallKl;
      });
    }
  }

 private:
  template <class Body>
  static GIST_INLINE void for_each_lane(Lanes v, Body body) {
    double numbers[kGroup];
    store(numbers, Whole{}, v);
    for (int i = 0; i < kGroup; ++i) body(i, numbers[i]);
  }
};

template <class A>
RowStats<A> uniform_stats(A value) {
  RowStats<A> stats;
  A *const values = &stats.max[0];
  static_assert(sizeof stats == kRowStats * sizeof(A), "");
  for (int i = 0; i < kRowStats; ++i) values[i] = value;
  return stats;
}

// The gradient of one head s, with D = x_cls - x_gist, is
//   p_s (slope (D - mean) + rest) + cross (p - q) + plain exp(x_s) - uniform - target y
template <class A>
struct Gradient {
  A max[2], tempered[2];
  A mean[2] = {}, slope[2] = {}, rest[2] = {}, cross[2] = {};
  A plain[2] = {}, uniform[2] = {}, target[2] = {};
  A gist_scale;
  bool has_kl, has_slope = false;

  // Coefficients of weight 0 stay 0: their factors may be infinite.
  Gradient(const LossCall &call, const RowStats<A> &stats, double upstream)
      : gist_scale(A(call.gist_scale)), has_kl(call.weights[2] != 0 || call.weights[3] != 0) {
    for (int s : kHeads) {
      max[s] = stats.max[s];
      tempered[s] = stats.tempered[s];
      const double sign = s == kCls ? 1 : -call.gist_scale, t = call.temperature;
      const double own_kl = call.from_own[s] ? call.weights[2 + s] : 0;
      const double other_kl = call.from_other[s] ? call.weights[3 - s] : 0;
      cross[s] = A(sign * upstream * other_kl / t);
      if (own_kl != 0) {
        has_slope = true;
        const double steepness = sign * upstream * own_kl / (t * t);
        mean[s] = stats.mean[s];
        slope[s] = A(steepness);
        rest[s] = A(-steepness * double(stats.mean_rest[s]));
      }
      const double weight = upstream * call.weights[s];
      if (call.weights[s] != 0 && call.target_dtype != Dtype::none) {
        plain[s] = A(weight * double(stats.plain[s]));
        uniform[s] = A(weight * call.label_smoothing / double(call.classes));
        target[s] = A(weight * (1 - call.label_smoothing));
      }
    }
  }
};

// `y` holds probabilities. If it is null, `index` is the target's place in this run, or outside it.
// `kept` holds this run's exponentials as row_sums wrote them, or is null.
template <bool kPastCache, class S, int kPower, class A = Arithmetic<S>>
void gradient_block(Pair<S> logits, int64_t n, Exponentials<A, kPower> exponentials, Gradient<A> k,
                    const A *kept, const A *y, int64_t index, S *to_cls, S *to_gist) {
  for_each_vectors<A>(n, [&](int64_t j, auto lanes, auto count) GIST_LAMBDA {
    Vec<A> x[2 * count], e[2 * count], plain[2 * count];
    load_shifted(logits.at(j), lanes, k.max, k.gist_scale, x);
    if (kept == nullptr) {
      exponentials.tempered(x, e);
    } else {
      for (int i = 0; i < 2 * count; ++i) e[i] = load(kept + 2 * j + i * kLanes<A>, Whole{});
    }
    if constexpr (kPower != kNoPlain) exponentials.untemper(x, e, plain);
    for (int i = 0; i < 2 * count; i += 2, j += kLanes<A>) {
      const Vec<A> p[2] = {e[i + kCls] * k.tempered[kCls], e[i + kGist] * k.tempered[kGist]};
      const Vec<A> p_minus_q = p[kCls] - p[kGist];
      const Vec<A> difference = finite_or_zero(x[i + kCls] - x[i + kGist]);
      for (int s : kHeads) {
        S *const to = s == kCls ? to_cls : to_gist;
        if (to == nullptr) continue;
        Vec<A> g = broadcast(-k.uniform[s]);
        if constexpr (kPower != kNoPlain) g = fma(plain[i + s], broadcast(k.plain[s]), g);
        if (k.has_kl) g = fma(p_minus_q, broadcast(k.cross[s]), g);
        if (k.has_slope) {
          const Vec<A> centred = difference - k.mean[s];
          g = fma(p[s], fma(centred, broadcast(k.slope[s]), broadcast(k.rest[s])), g);
        }
        if (y != nullptr)
          g -= k.target[s] * load(y + j, lanes, A(0));
        else if (std::uint64_t(index - j) < std::uint64_t(kLanes<A>))
          g -= lane_numbers<A>() == A(index - j) ? broadcast(k.target[s]) : Vec<A>{};
        if constexpr (kPastCache && std::is_same_v<decltype(lanes), Whole>)
          store_past_cache(to + j, g);
        else
          store(to + j, lanes, g);
      }
    }
  });
}

// How many of n numbers come before the first cache line to be written around the cache: all n if
// the cache lines of the two gradients begin at different numbers.
template <class S>
int64_t before_lines(const S *cls, const S *gist, int64_t n) {
  constexpr std::uintptr_t line = 64;
  const std::uintptr_t to_cls = -reinterpret_cast<std::uintptr_t>(cls ? cls : gist) % line;
  const std::uintptr_t to_gist = -reinterpret_cast<std::uintptr_t>(gist ? gist : cls) % line;
  const int64_t before = int64_t(to_cls / sizeof(S));
  return to_cls == to_gist && to_cls % sizeof(S) == 0 && before < n ? before : n;
}

template <class S, int kPower, class A = Arithmetic<S>>
void row_gradient(const LossCall &call, const RowTarget &target, Pair<S> x, double upstream,
                  const RowStats<A> &stats, const Exponentials<A, kPower> &exponentials,
                  const A *kept, S *to_cls, S *to_gist) {
  const Gradient<A> gradient(call, stats, upstream * double(stats.scale));
  const auto write = [&](auto past_cache, int64_t from, int64_t to) {
    for_each_run<kBlock>(to - from, [&](int64_t run, int64_t count) {
      A buffer[kBlock];
      const int64_t begin = from + run;
      const A *y = target.probabilities == nullptr
                       ? nullptr
                       : probabilities(call, target.probabilities, begin, count, buffer);
      gradient_block<past_cache>(x.at(begin), count, exponentials, gradient,
                                 kept ? kept + 2 * begin : nullptr, y, target.index - begin,
                                 to_cls ? to_cls + begin : nullptr,
                                 to_gist ? to_gist + begin : nullptr);
    });
  };
  const int64_t n = call.classes, cached = call.stream ? before_lines(to_cls, to_gist, n) : n;
  write(std::false_type(), 0, cached);
  write(std::true_type(), cached, n);
}

template <class S>
void fill(const LossCall &call, S *to, Arithmetic<S> value) {
  if (to == nullptr) return;
  const auto write = [&](int64_t j, auto lanes) { store(to + j, lanes, broadcast(value)); };
  const int64_t cached = call.stream ? before_lines<S>(to, nullptr, call.classes) : call.classes;
  for_each_vector<Arithmetic<S>>(cached, write);
  for_each_vector<Arithmetic<S>>(call.classes - cached, [&](int64_t j, auto lanes) {
    if constexpr (std::is_same_v<decltype(lanes), Whole>)
      store_past_cache(to + cached + j, broadcast(value));
    else
      write(cached + j, lanes);
  });
}

template <class S>
Pair<S> row_of(const LossCall &call, int64_t row) {
  return {static_cast<const S *>(call.logits[kCls]) + row * call.logit_stride[kCls],
          static_cast<const S *>(call.logits[kGist]) + row * call.logit_stride[kGist]};
}

// Exponentials of a group's rows. Nothing is kept, nor memory touched, where `row` gives null.
template <class A>
class Kept {
 public:
  Kept(const LossCall &call, Pass pass)
      : row_(round_up(call.classes)),
        // Past the cache, runs do not start at whole vectors.
        some_(pass == Pass::forward_backward && call.classes <= kKeptClasses && !call.stream) {}

  A *row(int64_t i) { return some_ ? numbers_ + 2 * i * row_ : nullptr; }

 private:
  static int64_t round_up(int64_t n) { return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  alignas(64) A numbers_[2 * kKeptClasses * kGroup];
  const int64_t row_;
  const bool some_;
};

// Statistics and terms of rows [begin, end), at most a group.
template <class S, int kPower, class A = Arithmetic<S>>
void forward_group(const LossCall &call, int64_t begin, int64_t end, bool fetch_ahead,
                   const Exponentials<A, kPower> &exponentials, Kept<A> &kept) {
  RowStats<A> *const stats = static_cast<RowStats<A> *>(call.stats);
  GroupSums<A> sums;
  RowTarget targets[kGroup];
  Peaks<A> peaks[kGroup];
  const int rows = int(end - begin);
  for (int i = 0; i < rows; ++i) {
    targets[i] = row_target<A>(call, begin + i);
    if (targets[i].state == RowTarget::kept)
      peaks[i] = row_peaks(row_of<S>(call, begin + i), call.classes, call.gist_scale);
  }
  for (int i = 0; i < rows; ++i) {
    if (targets[i].state != RowTarget::kept) continue;
    const Pair<S> x = row_of<S>(call, begin + i);
    const Pair<S> next = fetch_ahead ? row_of<S>(call, next_kept<A>(call, begin + i)) : x;
    sums.put(i, peaks[i], row_sums(x, next, call.classes, peaks[i], exponentials, kept.row(i)),
             call.target_dtype == Dtype::none ? TargetSums()
                                              : target_sums(call, targets[i], x, peaks[i]));
  }
  GroupStats<A> group(call, sums);
  for (int i = 0; i < rows; ++i) {
    RowStats<A> &to = stats[begin + i];
    if (targets[i].state == RowTarget::kept) {
      to = group.row[i];
      to.scale = A(row_scale<A>(call, begin + i));
      if (group.small_kl[i]) refine_kl(call, row_of<S>(call, begin + i), group.log_ratio[i], to);
    } else {
      to = uniform_stats(targets[i].state == RowTarget::ignored ? A(0) : A(__builtin_nan("")));
    }
  }
}

template <class S, int kPower, class A = Arithmetic<S>>
void backward_row(const LossCall &call, int64_t row, const Exponentials<A, kPower> &exponentials,
                  const A *kept) {
  const RowStats<A> &stats = static_cast<const RowStats<A> *>(call.stats)[row];
  const RowTarget target = row_target<A>(call, row);
  S *to[2];
  for (int s : kHeads)
    to[s] = call.d_logits[s] == nullptr
                ? nullptr
                : static_cast<S *>(call.d_logits[s]) + row * call.d_logits_stride;
  if (target.state == RowTarget::kept) {
    const A *grad = static_cast<const A *>(call.grad);
    row_gradient(call, target, row_of<S>(call, row),
                 grad ? double(grad[row * call.grad_stride]) : 1, stats, exponentials, kept,
                 to[kCls], to[kGist]);
  } else {
    const A value = target.state == RowTarget::ignored ? A(0) : A(__builtin_nan(""));
    for (S *row_to : to) fill(call, row_to, value);
  }
}

// The size up to which a group's rows stay in an L2 cache from one pass over them to the next.
constexpr int64_t kGroupBytes = 128 << 10;

template <class S, int kPower>
void rows_as(const LossCall &call, Pass pass, int64_t begin, int64_t end) {
  const Exponentials<Arithmetic<S>, kPower> exponentials(call);
  Kept<Arithmetic<S>> kept(call, pass);
  const int64_t bytes = call.classes * int64_t(sizeof(S));
  const bool fetch_ahead = bytes <= kFetchedBytes;
  const int64_t group = 2 * bytes * kGroup <= kGroupBytes ? kGroup : 1;
  for (int64_t row = begin; row < end; row += group) {
    const int64_t last = row + group < end ? row + group : end;
    if (pass != Pass::backward) forward_group<S>(call, row, last, fetch_ahead, exponentials, kept);
    for (int64_t i = row; i < last && pass != Pass::forward; ++i)
      backward_row<S>(call, i, exponentials, kept.row(i - row));
  }
}

template <class S>
void rows_of(const LossCall &call, Pass pass, int64_t begin, int64_t end) {
  const bool no_weight = call.weights[kCls] == 0 && call.weights[kGist] == 0;
  if (call.target_dtype == Dtype::none || (pass == Pass::backward && no_weight))
    rows_as<S, kNoPlain>(call, pass, begin, end);
  else if (call.gist_scale != 1)
    rows_as<S, kTwoTemperatures>(call, pass, begin, end);
  else if (call.temperature == 1)
    rows_as<S, 1>(call, pass, begin, end);
  else if (call.temperature == 2)
    rows_as<S, 2>(call, pass, begin, end);
  else if (call.temperature == 3)
    rows_as<S, 3>(call, pass, begin, end);
  else if (call.temperature == 4)
    rows_as<S, 4>(call, pass, begin, end);
  else
    rows_as<S, kAnyTemperature>(call, pass, begin, end);
}

void rows(const LossCall &call, Pass pass, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case Dtype::float32: rows_of<float>(call, pass, begin, end); break;
    case Dtype::bfloat16: rows_of<BFloat16>(call, pass, begin, end); break;
    case Dtype::float16: rows_of<Float16>(call, pass, begin, end); break;
    default: rows_of<double>(call, pass, begin, end);
  }
#if defined(__SSE2__)
  if (call.stream) _mm_sfence();  // before another thread reads what was streamed
#endif
}

}  // namespace

extern const RowKernel GIST_IN_SET(loss_rows) = rows;

}  // namespace gist
