// The loss against plain loops in double; see kernel_test.h.

#include "loss.h"

#include "kernel_test.h"

namespace {

using namespace gist;
using namespace gist::test;

struct Case {
  Dtype dtype, target_dtype;
  int64_t rows, classes, padding;
  double temperature, smoothing;
  Reduction reduction;
  bool d_cls, d_gist, masked;

  std::string name() const {
    char text[96];
    std::snprintf(text, sizeof text, "dtype %d, %lld x %lld, T %g: ", int(dtype),
                  static_cast<long long>(rows), static_cast<long long>(classes), temperature);
    return text;
  }
};

std::vector<double> log_softmax(const std::vector<double> &x, double temperature) {
  double top = -INFINITY, sum = 0;
  for (double v : x) top = std::fmax(top, v);
  for (double v : x) sum += std::exp((v - top) / temperature);
  std::vector<double> result;
  for (double v : x) result.push_back((v - top) / temperature - std::log(sum));
  return result;
}

void run(const Case &c, int threads) {
  Normal normal(c.rows * 31 + c.classes);
  const int64_t stride = c.classes + c.padding, n = c.rows;
  // The last row ends where the memory does; the padding between rows is NaN.
  const int64_t length = n == 0 ? 0 : (n - 1) * stride + c.classes;
  const Dtype accumulate = accumulated(c.dtype);
  Buffer logits[2], gradients[2], again[2];
  for (int s : kHeads) {
    logits[s] = Buffer(c.dtype, length);
    for (int64_t i = 0; i < length; ++i)
      if (i % stride < c.classes) logits[s].set(i, normal(3));
    gradients[s] = Buffer(c.dtype, n * c.classes);
    again[s] = Buffer(c.dtype, n * c.classes);
  }
  if (c.masked)
    for (int64_t i = 1; i < length; i += 3)
      for (int s : kHeads)
        if (i % stride != 0 && i % stride < c.classes) logits[s].set(i, -INFINITY);
  const bool indices = c.target_dtype == Dtype::int64;
  Buffer target(c.target_dtype, c.target_dtype == Dtype::none ? 0 : indices ? n : n * c.classes);
  for (int64_t row = 0; indices && row < n; ++row)
    target.set(row, double(row == 2 ? -100 : c.masked ? 0 : row % c.classes));
  for (int64_t i = 0; !indices && i < target.size(); ++i)
    target.set(i, i % c.classes == 0 || !c.masked ? 0.5 : 0);

  // With masked classes, also a scale of each row, 0 for one of NaN, and a second temperature.
  Buffer scales(accumulate, n);
  const bool scaled = c.masked && c.reduction != Reduction::mean;
  for (int64_t row = 0; row < n; ++row) scales.set(row, row == 1 ? 0 : 0.5 + double(row % 2));
  for (int64_t j = 0; scaled && n > 1 && j < c.classes; ++j)
    for (int s : kHeads) logits[s].set(stride + j, NAN);

  const int64_t values = c.reduction == Reduction::none ? n : 1;
  Buffer stats(accumulate, n * kRowStats), loss(accumulate, values), terms(accumulate, 4 * values);

  LossCall call = {};
  call.rows = n;
  call.classes = c.classes;
  call.dtype = c.dtype;
  call.target_dtype = c.target_dtype;
  call.target = address(target);
  call.target_stride = indices ? 1 : c.classes;
  call.temperature = c.temperature;
  call.gist_scale = c.masked ? 0.75 : 1;
  for (int s : kHeads) call.from_own[s] = call.from_other[s] = true;
  if (scaled) {
    call.row_scales = address(scales);
    call.row_scales_stride = 1;
  }
  const double weights[4] = {1, 0.5, 0.75, 0.75};
  std::memcpy(call.weights, weights, sizeof weights);
  call.label_smoothing = c.smoothing;
  call.ignore_index = -100;
  call.reduction = c.reduction;
  call.stats = address(stats);
  call.loss = address(loss);
  call.terms = address(terms);
  call.d_logits_stride = c.classes;
  for (int s : kHeads) {
    call.logits[s] = address(logits[s]);
    call.logit_stride[s] = stride;
  }
  const auto row_1 = [&](auto change) {
    for (int s : kHeads)
      if (scaled && n > 1) (logits[s].*change)(stride, c.classes);
  };
  row_1(&Buffer::forbid);
  loss_forward(call, threads);
  call.d_logits[kCls] = c.d_cls ? address(gradients[kCls]) : nullptr;
  call.d_logits[kGist] = c.d_gist ? address(gradients[kGist]) : nullptr;
  loss_backward(call, threads);
  for (int s : kHeads) call.d_logits[s] = address(again[s]);
  loss_forward_backward(call, threads);
  row_1(&Buffer::allow);

  const double relative = tolerance(accumulate);
  const auto near = [&](double value, double exact, double allowed, const char *what) {
    expect(value, exact, allowed * (1 + std::fabs(exact)), c.name() + what);
  };
  double total = 0, kept = 0;
  for (int64_t row = 0; row < n; ++row) {
    double exact = 0;
    if ((!indices || target[row] != -100) && !(scaled && row == 1)) {
      ++kept;
      std::vector<double> x[2], tempered[2], plain[2];
      for (int s : kHeads) {
        for (int64_t j = 0; j < c.classes; ++j) x[s].push_back(logits[s][row * stride + j]);
        tempered[s] =
            log_softmax(x[s], s == kCls ? c.temperature : c.temperature / call.gist_scale);
        plain[s] = log_softmax(x[s], 1);
      }
      for (std::size_t j = 0; j < std::size_t(c.classes); ++j) {
        const double difference = tempered[kCls][j] - tempered[kGist][j];
        if (std::isfinite(difference))
          exact += 0.75 * (std::exp(tempered[kCls][j]) - std::exp(tempered[kGist][j])) * difference;
        double y = 0;
        if (indices)
          y = double(j) == target[row];
        else if (c.target_dtype != Dtype::none)
          y = target[row * c.classes + int64_t(j)];
        if (c.target_dtype != Dtype::none)
          y = y * (1 - c.smoothing) + c.smoothing / double(c.classes);
        if (y != 0) exact -= y * (plain[kCls][j] + 0.5 * plain[kGist][j]);
      }
    }
    if (scaled) exact *= scales[row];
    total += exact;
    if (c.reduction == Reduction::none) near(loss[row], exact, relative, "a row's loss");
  }
  if (c.reduction == Reduction::sum) near(loss[0], total, relative, "sum");
  if (c.reduction == Reduction::mean && kept > 0) near(loss[0], total / kept, relative, "mean");
  // Softmax and target have equal mass, so a row's gradient sums to 0.
  for (int s : kHeads) {
    if (!(s == kCls ? c.d_cls : c.d_gist)) continue;
    if (!(gradients[s] == again[s])) fail(c.name() + "the two gradients differ");
    const bool unit = indices || c.target_dtype == Dtype::none;
    for (int64_t row = 0; row < n && unit; ++row) {
      double sum = 0;
      for (int64_t j = 0; j < c.classes; ++j) sum += gradients[s][row * c.classes + j];
      near(sum, 0, bytes_of(c.dtype) == 2 ? 0.1 : relative, "sum of a gradient");
    }
  }
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    int cases = 0;
    for (int64_t classes : {1, 2, 7, 8, 15, 16, 17, 100, 1023, 1024, 1025, 3000})
      for (Dtype dtype : kFormats)
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
    // Large enough to be written around the cache; rows end anywhere in a cache line.
    for (bool masked : {false, true})
      run({Dtype::float32, Dtype::int64, 66, 65537, 0, 3, 0,
           masked ? Reduction::sum : Reduction::mean, true, true, masked},
          3);
  });
}
