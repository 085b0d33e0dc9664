// LayerNorm, adapter and activation against plain loops in double; see kernel_test.h.

#include "adapter.h"

#include "activation.h"
#include "kernel_test.h"

namespace {

using namespace gist;
using namespace gist::test;

enum class Add { nothing, x, other };

struct Case {
  Dtype dtype;
  int64_t rows, width, rank;  // rank 0: no adapter
  Activation activation;
  bool norm, biases;
  Add add;
  bool pass_through, need_dx;
  int64_t padding;  // between the rows of what is read

  std::string name() const {
    return "dtype " + std::to_string(int(dtype)) + ", " + std::to_string(rows) + " x " +
           std::to_string(width) + ", rank " + std::to_string(rank) + ", activation " +
           std::to_string(int(activation)) + (norm ? ", norm" : "") + (biases ? ", biases" : "") +
           ", add " + std::to_string(int(add)) + ": ";
  }
};

// The activation and its derivative.
void activate(Activation activation, double u, double &value, double &slope) {
  constexpr double root_half = 0.70710678118654752440, density = 0.39894228040143267794;
  constexpr double cube = 0.044715;
  const bool far = std::fabs(u) > 1e3, linear = activation == Activation::identity;
  double gate = u > 0, steepness = 0;  // act(u) = u gate(u)
  if (linear) {
    gate = 1;
  } else if (activation == Activation::gelu && !far) {
    gate = 0.5 * std::erfc(-u * root_half);
    steepness = density * std::exp(-0.5 * u * u);
  } else if (activation == Activation::gelu_tanh && !far) {
    const double t = std::tanh(2 * density * (u + cube * u * u * u));
    gate = 0.5 * (1 + t);
    steepness = (1 - t * t) * density * (1 + 3 * cube * u * u);
  } else if (activation == Activation::silu && !far) {
    gate = 1 / (1 + std::exp(-u));
    steepness = gate * (1 - gate);
  }
  value = gate == 0 ? 0 : u * gate;
  slope = far ? gate : gate + u * steepness;
  if (std::isnan(u)) value = slope = NAN;
  if (linear) slope = 1;
  if (activation == Activation::relu && std::isnan(u)) slope = 1;  // PyTorch's
}

using Doubles = std::vector<double>;

Doubles rows_of(const Buffer &buffer, int64_t rows, int64_t width, int64_t stride) {
  Doubles values;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) values.push_back(buffer[i * stride + j]);
  return values;
}

void run(const Case &c, int threads) {
  const int64_t m = c.rows, n = c.width, r = c.rank, stride = n + c.padding;
  const Dtype wide = accumulated(c.dtype);
  const double scale = 0.7, eps = 1e-6;
  Normal normal(m * 31 + n * 7 + r);
  // The last row ends where the memory does; the padding between rows is NaN.
  const auto rows = [&](bool present) {
    Buffer buffer(c.dtype, !present || m == 0 ? 0 : (m - 1) * stride + n);
    for (int64_t i = 0; present && i < m; ++i)
      for (int64_t j = 0; j < n; ++j) buffer.set(i * stride + j, normal());
    return buffer;
  };
  const auto weight = [&](bool present, int64_t size, double spread) {
    return normal.filled(wide, present ? size : 0, spread);
  };
  const auto result = [&](Dtype dtype, bool present, int64_t size) {
    return Buffer(dtype, present ? size : 0);
  };
  const bool adapter = r > 0, reads_d_out = adapter || c.pass_through;
  const Buffer x = rows(true), other = rows(c.add == Add::other), d_out = rows(reads_d_out),
               d_normed = rows(c.norm);
  const Buffer norm_weight = weight(c.norm && c.biases, n, 1),
               norm_bias = weight(c.norm && c.biases, n, 1),
               bias = weight(adapter && c.biases, n, 1),
               down = weight(adapter, r * n, 1 / std::sqrt(double(n))),
               down_bias = weight(adapter && c.biases, r, 1),
               up = weight(adapter, n * r, adapter ? 1 / std::sqrt(double(r)) : 0),
               up_bias = weight(adapter && c.biases, n, 1);

  AdapterCall forward = {};
  forward.rows = m;
  forward.width = n;
  forward.rank = r;
  forward.dtype = c.dtype;
  forward.activation = c.activation;
  forward.has_norm = c.norm;
  forward.eps = eps;
  forward.scale = scale;
  forward.x = address(x);
  forward.x_stride = stride;
  forward.add = c.add == Add::x ? forward.x : address(other);
  forward.add_stride = stride;
  forward.norm_weight = address(norm_weight);
  forward.norm_bias = address(norm_bias);
  forward.bias = address(bias);
  forward.down_weight = address(down);
  forward.down_bias = address(down_bias);
  forward.up_weight = address(up);
  forward.up_bias = address(up_bias);
  AdapterCall backward = forward;
  backward.add = backward.bias = nullptr;
  backward.d_out = address(d_out);
  backward.d_normed = address(d_normed);
  backward.d_out_stride = backward.d_normed_stride = stride;
  backward.pass_through = c.pass_through;

  enum { kNormed, kStats, kOut, kZ, kDx, kDown, kDownBias, kUp, kUpBias, kResults };
  const auto compute = [&](int team) {
    std::vector<Buffer> found(kResults);
    found[kNormed] = result(c.dtype, c.norm, m * n);
    found[kStats] = result(wide, c.norm, 2 * m);
    found[kOut] = result(c.dtype, adapter, m * n);
    found[kZ] = result(wide, adapter, m * r);
    found[kDx] = result(c.dtype, c.need_dx, m * n);
    found[kDown] = result(wide, adapter, r * n);
    found[kDownBias] = result(wide, adapter && c.biases, r);
    found[kUp] = result(wide, adapter, n * r);
    found[kUpBias] = result(wide, adapter && c.biases, n);
    forward.normed = address(found[kNormed]);
    forward.stats = backward.stats = address(found[kStats]);
    forward.out = address(found[kOut]);
    forward.z = backward.z = address(found[kZ]);
    adapter_forward(forward, team);
    backward.dx = address(found[kDx]);
    backward.d_down_weight = address(found[kDown]);
    backward.d_down_bias = address(found[kDownBias]);
    backward.d_up_weight = address(found[kUp]);
    backward.d_up_bias = address(found[kUpBias]);
    adapter_backward(backward, team);
    return found;
  };
  std::vector<Buffer> found = compute(threads);
  if (threads > 1) {
    const std::vector<Buffer> alone = compute(1);
    for (int i = 0; i < kResults; ++i)
      if (found[std::size_t(i)].size() && !(found[std::size_t(i)] == alone[std::size_t(i)]))
        fail(c.name() + "differs with the number of threads");
  }

  const auto at = [](const Buffer &buffer, int64_t i, double missing) {
    return buffer.size() == 0 ? missing : buffer[i];
  };
  const auto zeros = [](int64_t size) { return Doubles(std::size_t(size)); };
  const Doubles of_x = rows_of(x, m, n, stride);
  const Doubles g_out = reads_d_out ? rows_of(d_out, m, n, stride) : zeros(m * n);
  Doubles normed, stats, out, zs, dx = zeros(m * n), d_down = zeros(r * n), d_down_bias = zeros(r),
                                  d_up = zeros(n * r), d_up_bias = zeros(n);
  double largest_g = 0, largest_dz = 0;  // their sums may cancel
  for (int64_t i = 0; i < m; ++i) {
    const double *const xs = of_x.data() + i * n, *const gs = g_out.data() + i * n;
    double *const to = dx.data() + i * n;
    if (c.pass_through)
      for (int64_t j = 0; j < n; ++j) to[j] += gs[j];
    if (c.norm) {
      double mean = 0, variance = 0, mean_g = 0, mean_g_xhat = 0;
      for (int64_t j = 0; j < n; ++j) mean += xs[j] / double(n);
      for (int64_t j = 0; j < n; ++j) variance += (xs[j] - mean) * (xs[j] - mean) / double(n);
      const double rstd = 1 / std::sqrt(variance + eps);
      stats.push_back(mean);
      stats.push_back(rstd);
      const auto xhat = [&](int64_t j) { return (xs[j] - mean) * rstd; };
      const auto g = [&](int64_t j) { return d_normed[i * stride + j] * at(norm_weight, j, 1); };
      for (int64_t j = 0; j < n; ++j) {
        normed.push_back(xhat(j) * at(norm_weight, j, 1) + at(norm_bias, j, 0));
        mean_g += g(j) / double(n);
        mean_g_xhat += g(j) * xhat(j) / double(n);
        largest_g = std::max(largest_g, std::fabs(rstd * g(j)));
      }
      for (int64_t j = 0; j < n; ++j) to[j] += rstd * (g(j) - mean_g - xhat(j) * mean_g_xhat);
    }
    if (!adapter) continue;
    Doubles update = zeros(n);
    for (int64_t k = 0; k < r; ++k) {
      double z = at(down_bias, k, 0), dh = 0, h, slope;
      for (int64_t j = 0; j < n; ++j) {
        z += xs[j] * down[k * n + j];
        dh += scale * gs[j] * up[j * r + k];
      }
      activate(c.activation, z, h, slope);
      zs.push_back(z);
      for (int64_t j = 0; j < n; ++j) {
        update[std::size_t(j)] += h * up[j * r + k];
        to[j] += dh * slope * down[k * n + j];
        d_down[std::size_t(k * n + j)] += dh * slope * xs[j];
        d_up[std::size_t(j * r + k)] += scale * gs[j] * h;
      }
      d_down_bias[std::size_t(k)] += dh * slope;
      largest_dz = std::max(largest_dz, std::fabs(dh * slope));
    }
    for (int64_t j = 0; j < n; ++j) {
      const double added = c.add == Add::nothing ? 0
                           : c.add == Add::x     ? xs[j]
                                                 : other[i * stride + j];
      out.push_back(added + scale * (update[std::size_t(j)] + at(up_bias, j, 0)) + at(bias, j, 0));
      d_up_bias[std::size_t(j)] += scale * gs[j];
    }
  }
  if (!c.need_dx) dx.clear();
  if (!adapter || !c.biases) d_down_bias.clear(), d_up_bias.clear();
  const Doubles *const exact[] = {&normed, &stats,       &out,  &zs,       &dx,
                                  &d_down, &d_down_bias, &d_up, &d_up_bias};
  const char *const names[] = {"normed", "stats",       "out",  "z",        "dx",
                               "d_down", "d_down_bias", "d_up", "d_up_bias"};
  for (std::size_t i = 0; i < kResults; ++i)
    compare(found[i], *exact[i], c.name() + names[i],
            i == kDx         ? largest_g
            : i == kDownBias ? largest_dz
                             : 0);
}

void run_activation(Dtype dtype, Activation activation, int64_t size, bool in_place, int threads) {
  Normal normal(size);
  Buffer u = normal.filled(dtype, size, 3), d = normal.filled(dtype, size), value(dtype, size),
         slope(dtype, size);
  // Values beyond every range of the formulas, infinities and NaN.
  const double edges[] = {0,    -0.0, 1e-30, -1e-30, 14.5,     -14.5,     200,
                          -200, 3e4,  -3e4,  6e4,    INFINITY, -INFINITY, NAN};
  for (int64_t i = 3; i < size; i += 5) u.set(i, edges[std::size_t(i) % std::size(edges)]);
  ActivationCall call = {};
  call.size = size;
  call.dtype = dtype;
  call.activation = activation;
  call.u = address(u);
  call.result = address(value);
  activation_forward(call, threads);
  Doubles values, slopes;
  for (int64_t i = 0; i < size; ++i) {
    double h, s;
    activate(activation, u[i], h, s);
    values.push_back(h);
    slopes.push_back(s * d[i]);
  }
  call.d_a = address(d);
  call.result = in_place ? address(d) : address(slope);
  activation_backward(call, threads);
  const std::string name = "dtype " + std::to_string(int(dtype)) + ", activation " +
                           std::to_string(int(activation)) + " of " + std::to_string(size) + ": ";
  // Each by itself, so that the 3e4 among them does not widen the tolerance of the others.
  Buffer &gradient = in_place ? d : slope;
  for (int64_t i = 0; i < size; ++i) {
    const double by = tolerance(dtype);
    expect(value[i], values[std::size_t(i)], by * (1e-2 + std::fabs(values[std::size_t(i)])),
           name + "value");
    expect(gradient[i], slopes[std::size_t(i)], by * (1e-2 + std::fabs(slopes[std::size_t(i)])),
           name + "gradient");
  }
}

void run_gated(Dtype dtype, Activation activation, int64_t rows, int64_t width, int threads) {
  const int64_t size = rows * width;
  Normal normal(size + width);
  Buffer u = normal.filled(dtype, 2 * size, 3), d = normal.filled(dtype, size), hidden(dtype, size),
         d_u(dtype, 2 * size);
  GatedCall call = {};
  call.size = size;
  call.width = width;
  call.dtype = dtype;
  call.activation = activation;
  call.u = address(u);
  call.result = address(hidden);
  gated_forward(call, threads);
  call.d_a = address(d);
  call.result = address(d_u);
  gated_backward(call, threads);
  const std::string name = "dtype " + std::to_string(int(dtype)) + ", gated " +
                           std::to_string(int(activation)) + " of " + std::to_string(rows) + " x " +
                           std::to_string(width) + ": ";
  const auto check = [&](double found, double exact, double factor, const std::string &what) {
    const double by = tolerance(dtype);
    expect(found, exact, by * (1e-2 * (1 + std::fabs(factor)) + std::fabs(exact)), name + what);
  };
  for (int64_t i = 0; i < size; ++i) {
    const int64_t gate = i / width * 2 * width + i % width, value = gate + width;
    double h, s;
    activate(activation, u[gate], h, s);
    check(hidden[i], h * u[value], u[value], "result");
    check(d_u[gate], d[i] * u[value] * s, d[i] * u[value], "gradient of a gate");
    check(d_u[value], d[i] * h, d[i], "gradient of a value");
  }
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    int count = 0;
    for (Dtype dtype : kFormats) {
      // Widths and ranks around every number of lanes and every block; groups have 4 or 16 rows.
      for (int64_t width : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 197})
        for (int64_t rank : {0, 1, 3, 4, 5, 8, 17, 33})
          for (int64_t rows : {1, 3, 4, 5, 17}) {
            const bool odd = ++count % 2 != 0, third = count % 3 == 0, fifth = count % 5 == 0;
            run({dtype, rows, width, rank, kActivations[count % 5].code, !third || rank == 0,
                 !fifth, static_cast<Add>(count / 2 % 3), odd || rank == 0, !fifth, odd ? 3 : 0},
                1);
          }
      for (int64_t rank : {0, 5})
        run({dtype, 0, 9, rank, Activation::gelu, true, true, Add::x, true, true, 0}, 2);
      // Several parts of rows, and several threads.
      run({dtype, 301, 197, 5, Activation::gelu, true, true, Add::x, true, true, 1}, 4);
      run({dtype, 261, 133, 34, Activation::silu, true, false, Add::other, false, true, 0}, 3);
      run({dtype, 530, 99, 0, Activation::gelu, true, true, Add::nothing, false, true, 2}, 3);

      for (const auto &[name, activation] : kActivations)
        for (int64_t size : {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 95, 1000})
          run_activation(dtype, activation, size, size % 2 != 0, 1);
      run_activation(dtype, Activation::gelu, 3 * 32 * 1024 + 5, dtype == Dtype::float32, 4);

      for (const auto &[name, activation] : kActivations)
        for (int64_t width : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100})
          run_gated(dtype, activation, width % 4, width, 1);
      // Parts that end within a row.
      run_gated(dtype, Activation::silu, 99, 1001, 4);
    }
  });
}
