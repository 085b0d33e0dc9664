// The kernels on arrays of exactly the right size, against plain loops in double: for sanitizers,
// which see only code built with them (CMakeLists.txt says how). Python's tests say more of values.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "loss.h"

namespace {

using namespace gist;
using std::int64_t;

struct Case {
  Dtype dtype, target_dtype;
  int64_t rows, classes, padding;
  double temperature, smoothing;
  Reduction reduction;
  bool d_cls, d_gist, masked;
};

double read(const std::vector<unsigned char> &memory, Dtype dtype, int64_t index) {
  const unsigned char *at = memory.data() + index * bytes_of(dtype);
  if (dtype == Dtype::float64) {
    double x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
  std::uint32_t bits = 0;
  if (dtype == Dtype::bfloat16) {
    std::memcpy(reinterpret_cast<unsigned char *>(&bits) + 2, at, 2);
  } else {
    std::memcpy(&bits, at, 4);
  }
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return double(x);
}

void write(std::vector<unsigned char> &memory, Dtype dtype, int64_t index, double value) {
  unsigned char *at = memory.data() + index * bytes_of(dtype);
  const float single = float(value);
  if (dtype == Dtype::float64)
    std::memcpy(at, &value, 8);
  else if (dtype == Dtype::bfloat16)
    std::memcpy(at, reinterpret_cast<const unsigned char *>(&single) + 2, 2);
  else
    std::memcpy(at, &single, 4);
}

std::vector<double> log_softmax(const std::vector<double> &x, double temperature) {
  double top = -INFINITY, sum = 0;
  for (double v : x) top = std::fmax(top, v);
  for (double v : x) sum += std::exp((v - top) / temperature);
  std::vector<double> result;
  for (double v : x) result.push_back((v - top) / temperature - std::log(sum));
  return result;
}

int failures = 0;

void expect(double value, double exact, double tolerance, const char *what, const Case &c) {
  if (std::fabs(value - exact) <= tolerance * (1 + std::fabs(exact))) return;
  ++failures;
  std::printf("%s: %s is %.9g, not %.9g (dtype %d, %lld x %lld, T %g)\n", instruction_set(), what,
              value, exact, int(c.dtype), static_cast<long long>(c.rows),
              static_cast<long long>(c.classes), c.temperature);
}

void run(const Case &c, int threads) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 31 + c.classes));
  std::normal_distribution<double> normal(0, 3);
  const int64_t stride = c.classes + c.padding, n = c.rows;
  // The last row ends where the memory does.
  const int64_t length = n == 0 ? 0 : (n - 1) * stride + c.classes;
  const Dtype accumulate = c.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const int64_t a = bytes_of(accumulate);
  std::vector<unsigned char> logits[2], gradients[2];
  for (int s : kHeads) {
    logits[s].resize(std::size_t(length * bytes_of(c.dtype)));
    for (int64_t i = 0; i < length; ++i) write(logits[s], c.dtype, i, normal(random));
    gradients[s].resize(std::size_t(n * c.classes * bytes_of(c.dtype)));
  }
  if (c.masked)
    for (int64_t i = 1; i < length; i += 3)
      for (int s : kHeads)
        if (i % stride != 0) write(logits[s], c.dtype, i, -INFINITY);
  std::vector<int64_t> index(std::size_t(n), 0);
  std::vector<unsigned char> probabilities(std::size_t(n * c.classes * bytes_of(c.target_dtype)));
  if (c.target_dtype == Dtype::int64)
    for (int64_t row = 1; row < n; ++row)
      index[std::size_t(row)] = row == 2 ? -100 : c.masked ? 0 : row % c.classes;
  else if (c.target_dtype != Dtype::none)
    for (int64_t i = 0; i < n * c.classes; ++i)
      write(probabilities, c.target_dtype, i, i % c.classes == 0 || !c.masked ? 0.5 : 0);

  const int64_t values = c.reduction == Reduction::none ? n : 1;
  std::vector<unsigned char> stats(std::size_t(n * kRowStats * a)), loss(std::size_t(values * a)),
      terms(std::size_t(4 * values * a)), again[2] = {gradients[0], gradients[1]};

  LossCall call = {};
  call.rows = n;
  call.classes = c.classes;
  call.dtype = c.dtype;
  call.target_dtype = c.target_dtype;
  call.target = c.target_dtype == Dtype::int64 ? static_cast<const void *>(index.data())
                                               : probabilities.data();
  call.target_stride = c.target_dtype == Dtype::int64 ? 1 : c.classes;
  call.temperature = c.temperature;
  const double weights[4] = {1, 0.5, 0.75, 0.75};
  std::memcpy(call.weights, weights, sizeof weights);
  call.label_smoothing = c.smoothing;
  call.ignore_index = -100;
  call.reduction = c.reduction;
  call.stats = stats.data();
  call.loss = loss.data();
  call.terms = terms.data();
  call.d_logits_stride = c.classes;
  for (int s : kHeads) {
    call.logits[s] = logits[s].data();
    call.logit_stride[s] = stride;
  }
  loss_forward(call, threads);
  call.d_logits[kCls] = c.d_cls ? gradients[kCls].data() : nullptr;
  call.d_logits[kGist] = c.d_gist ? gradients[kGist].data() : nullptr;
  loss_backward(call, threads);
  for (int s : kHeads) call.d_logits[s] = again[s].data();
  loss_forward(call, threads);

  const double tolerance = c.dtype == Dtype::float64 ? 1e-11 : 1e-5;
  double total = 0, kept = 0;
  for (int64_t row = 0; row < n; ++row) {
    double exact = 0;
    if (c.target_dtype != Dtype::int64 || index[std::size_t(row)] != -100) {
      ++kept;
      std::vector<double> x[2], tempered[2], plain[2];
      for (int s : kHeads) {
        for (int64_t j = 0; j < c.classes; ++j)
          x[s].push_back(read(logits[s], c.dtype, row * stride + j));
        tempered[s] = log_softmax(x[s], c.temperature);
        plain[s] = log_softmax(x[s], 1);
      }
      for (std::size_t j = 0; j < std::size_t(c.classes); ++j) {
        const double difference = tempered[kCls][j] - tempered[kGist][j];
        if (std::isfinite(difference))
          exact += 0.75 * (std::exp(tempered[kCls][j]) - std::exp(tempered[kGist][j])) * difference;
        double y = 0;
        if (c.target_dtype == Dtype::int64)
          y = int64_t(j) == index[std::size_t(row)];
        else if (c.target_dtype != Dtype::none)
          y = read(probabilities, c.target_dtype, row * c.classes + int64_t(j));
        if (c.target_dtype != Dtype::none)
          y = y * (1 - c.smoothing) + c.smoothing / double(c.classes);
        if (y != 0) exact -= y * (plain[kCls][j] + 0.5 * plain[kGist][j]);
      }
    }
    total += exact;
    if (c.reduction == Reduction::none)
      expect(read(loss, accumulate, row), exact, tolerance, "a row's loss", c);
  }
  if (c.reduction == Reduction::sum) expect(read(loss, accumulate, 0), total, tolerance, "sum", c);
  if (c.reduction == Reduction::mean && kept > 0)
    expect(read(loss, accumulate, 0), total / kept, tolerance, "mean", c);
  // Softmaxes and targets of equal mass: a row's gradient sums to 0.
  for (int s : kHeads) {
    if (!(s == kCls ? c.d_cls : c.d_gist)) continue;
    if (gradients[s] != again[s]) expect(1, 0, 0, "difference of the two gradients", c);
    const bool unit = c.target_dtype == Dtype::int64 || c.target_dtype == Dtype::none;
    for (int64_t row = 0; row < n && unit; ++row) {
      double sum = 0;
      for (int64_t j = 0; j < c.classes; ++j)
        sum += read(gradients[s], c.dtype, row * c.classes + j);
      expect(sum, 0, c.dtype == Dtype::bfloat16 ? 0.1 : tolerance, "sum of a gradient", c);
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const char *name : {"avx512", "avx2", "portable"}) {
    if (!use_instruction_set(name)) continue;
    for (int64_t classes : {1, 2, 7, 8, 15, 16, 17, 100, 1023, 1024, 1025, 3000})
      for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float64})
        for (Dtype target : {Dtype::int64, Dtype::none, Dtype::float32, Dtype::float64})
          for (double temperature : {0.5, 1.0, 3.0, 4.7}) {
            const bool odd = cases++ % 2 != 0, third = cases % 3 == 0;
            run({dtype, target, odd ? 5 : 1, classes, odd ? 3 : 0, temperature,
                 odd && !third ? 0.1 : 0, static_cast<Reduction>(cases % 3), !third, odd || third,
                 third},
                1);
          }
    for (Reduction reduction : {Reduction::none, Reduction::mean}) {
      run({Dtype::float32, Dtype::int64, 0, 9, 0, 3, 0, reduction, true, true, false}, 2);
      run({Dtype::float32, Dtype::int64, 67, 1500, 1, 3, 0, reduction, true, true, false}, 4);
    }
    // Large enough to be written past the cache, rows ending anywhere in a cache line.
    run({Dtype::float32, Dtype::int64, 66, 65537, 0, 3, 0, Reduction::mean, true, true, false}, 3);
  }
  std::printf("%d passed, %d failed\n", cases - (failures > 0), failures);
  return failures > 0;
}
