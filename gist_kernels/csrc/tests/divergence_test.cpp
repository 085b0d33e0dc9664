// The Jensen-Shannon divergence against plain loops in double; see kernel_test.h.

#include "divergence.h"

#include "kernel_test.h"

namespace {

using namespace gist;
using namespace gist::test;

struct Case {
  Dtype dtype;
  int sides;
  int64_t rows, classes, padding;
  bool scaled, infinite, one_side, in_place;

  std::string name() const {
    char text[96];
    std::snprintf(text, sizeof text, "dtype %d, %d sides, %lld x %lld: ", int(dtype), sides,
                  static_cast<long long>(rows), static_cast<long long>(classes));
    return text;
  }
};

// What the equations give for a row.
struct Exact {
  double divergence = 0;
  std::vector<std::vector<double>> gradients;  // of each side

  Exact(const std::vector<std::vector<double>> &x, const DivergenceCall &call) {
    const std::size_t sides = x.size(), classes = x[0].size();
    std::vector<std::vector<double>> logs;
    for (std::size_t k = 0; k < sides; ++k) {
      double top = -INFINITY, sum = 0;
      for (double v : x[k]) top = std::fmax(top, v);
      for (double v : x[k]) sum += std::exp((v - top) / call.temperatures[k]);
      logs.emplace_back();
      for (double v : x[k]) logs[k].push_back((v - top) / call.temperatures[k] - std::log(sum));
    }
    std::vector<double> mixture(classes, 0.0);
    for (std::size_t k = 0; k < sides; ++k)
      for (std::size_t j = 0; j < classes; ++j)
        mixture[j] += call.weights[k] * std::exp(logs[k][j]);
    for (std::size_t k = 0; k < sides; ++k) {
      double kl = 0;
      for (std::size_t j = 0; j < classes; ++j)
        if (std::isfinite(logs[k][j]))
          kl += std::exp(logs[k][j]) * (logs[k][j] - std::log(mixture[j]));
      divergence += call.weights[k] * kl;
      gradients.emplace_back();
      for (std::size_t j = 0; j < classes; ++j)
        gradients[k].push_back(std::isfinite(logs[k][j])
                                   ? call.weights[k] / call.temperatures[k] * std::exp(logs[k][j]) *
                                         (logs[k][j] - std::log(mixture[j]) - kl)
                                   : 0);
    }
  }
};

void run(const Case &c, int threads) {
  Normal normal(c.rows * 31 + c.classes + c.sides);
  // The last row ends where the memory does; the padding between rows is NaN.
  const int64_t stride = c.classes + c.padding, n = c.rows;
  const int64_t length = n == 0 ? 0 : (n - 1) * stride + c.classes;
  const Dtype accumulate = accumulated(c.dtype);
  std::vector<Buffer> logits, gradients;
  for (int k = 0; k < c.sides; ++k) {
    logits.emplace_back(c.dtype, length);
    gradients.emplace_back(c.dtype, c.in_place ? 0 : n * c.classes);
    for (int64_t i = 0; i < length; ++i)
      if (i % stride < c.classes) logits.back().set(i, normal(2));
  }
  // Classes that some sides leave out, and one that none has.
  for (int64_t i = 0; c.infinite && i < length; ++i)
    for (int k = 0; k < c.sides; ++k)
      if (i % stride > 1 && i % stride < c.classes && (i % 5 == 0 || i % 7 == k))
        logits[std::size_t(k)].set(i, -INFINITY);

  Buffer scales(accumulate, n), grad(accumulate, n);
  for (int64_t row = 0; row < n; ++row) {
    scales.set(row, row % 3 == 1 ? 0 : 0.5 + double(row % 2));
    grad.set(row, row % 2 ? -3 : 0.75);
  }
  Buffer stats(accumulate, n * c.sides * kSideStats), loss(accumulate, n);

  DivergenceCall call = {};
  call.rows = n;
  call.classes = c.classes;
  call.dtype = c.dtype;
  call.sides = c.sides;
  for (int k = 0; k < c.sides; ++k) {
    call.logits[k] = address(logits[std::size_t(k)]);
    call.logit_stride[k] = stride;
    call.weights[k] = 2.0 * (k + 1) / (c.sides * (c.sides + 1));
    call.temperatures[k] = k == 1 ? 2 : 1;
  }
  if (c.scaled) {
    call.row_scales = address(scales);
    call.row_scales_stride = 1;
  }
  call.stats = address(stats);
  call.loss = address(loss);
  call.grad = address(grad);
  call.grad_stride = 1;

  std::vector<Exact> exact;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<std::vector<double>> x;
    for (const Buffer &side : logits) {
      x.emplace_back();
      for (int64_t j = 0; j < c.classes; ++j) x.back().push_back(side[row * stride + j]);
    }
    exact.emplace_back(x, call);
  }
  const auto masked = [&](int64_t row) { return c.scaled && scales[row] == 0; };
  const auto for_each_masked_row = [&](auto body) {
    for (Buffer &side : logits)
      for (int64_t row = 0; row < n; ++row)
        if (masked(row)) body(side, row * stride, c.classes);
  };

  // In place, their gradients are written there.
  if (!c.in_place)
    for_each_masked_row([](Buffer &side, int64_t at, int64_t n) { side.forbid(at, n); });
  divergence_forward(call, threads);
  for (int k = 0; k < c.sides; ++k)
    call.d_logits[k] = c.one_side && k != 1 ? nullptr
                       : c.in_place         ? address(logits[std::size_t(k)])
                                            : address(gradients[std::size_t(k)]);
  divergence_backward(call, threads);
  if (!c.in_place)
    for_each_masked_row([](Buffer &side, int64_t at, int64_t n) { side.allow(at, n); });

  const double relative = tolerance(accumulate);
  for (int64_t row = 0; row < n; ++row) {
    const double scale = masked(row) ? 0 : c.scaled ? scales[row] : 1;
    const Exact &of = exact[std::size_t(row)];
    expect(loss[row], scale * of.divergence, relative, c.name() + "a row's divergence");
    for (int k = 0; k < c.sides; ++k) {
      if (call.d_logits[k] == nullptr) continue;
      Buffer &found = (c.in_place ? logits : gradients)[std::size_t(k)];
      for (int64_t j = 0; j < c.classes; ++j) {
        const double truth = scale * grad[row] * of.gradients[std::size_t(k)][std::size_t(j)];
        expect(found[row * c.classes + j], truth, tolerance(c.dtype) * (1e-2 + std::fabs(truth)),
               c.name() + "a gradient");
      }
    }
  }
  for (int k = 0; k < c.sides; ++k)
    if (call.d_logits[k] == nullptr) expect_blank(gradients[std::size_t(k)], c.name() + "a side");
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    int cases = 0;
    for (int64_t classes : {1, 2, 7, 8, 15, 16, 17, 100, 1023, 1024, 1025, 3000})
      for (Dtype dtype : kFormats)
        for (int sides : {2, 3, 5, kMostSides}) {
          const bool odd = cases++ % 2 != 0, third = cases % 3 == 0;
          run({dtype, sides, odd ? 5 : 1, classes, odd && !third ? 3 : 0, odd, third,
               cases % 5 == 0, third && odd},
              1);
        }
    run({Dtype::float32, 2, 0, 9, 0, true, false, false, false}, 2);
    run({Dtype::float32, 3, 67, 1500, 1, true, true, false, false}, 4);
    // Large enough to be written around the cache; rows end anywhere in a cache line.
    for (bool scaled : {false, true})
      run({Dtype::float32, 2, 66, 65537, 0, scaled, scaled, false, false}, 3);
  });
}
