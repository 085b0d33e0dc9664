// Attention against plain loops in double; see kernel_test.h.

#include "attention.h"

#include "kernel_test.h"

namespace {

using namespace gist;
using namespace gist::test;

struct Case {
  Dtype dtype;
  int64_t batch, heads, queries, keys, head_dim;
  double scale;
  bool packed;  // q, k and v are slices of one tensor; otherwise each is dense
  enum Turn { none, halves, neighbours } turn = none;
  std::vector<int64_t> lengths = {};  // of each image; empty for all keys

  std::string name() const {
    return "dtype " + std::to_string(int(dtype)) + ", " + std::to_string(batch) + " x " +
           std::to_string(heads) + " heads of " + std::to_string(head_dim) + ", " +
           std::to_string(queries) + " queries, " + std::to_string(keys) + " keys, turn " +
           std::to_string(turn) + (lengths.empty() ? ": " : ", padded: ");
  }
  int64_t length(int64_t image) const {
    return lengths.empty() ? std::max(queries, keys) : lengths[std::size_t(image)];
  }
};

// A (batch, rows, width) tensor within a buffer.
struct Slice {
  Buffer *buffer;
  int64_t offset, batch_stride, row_stride, rows, width;

  int64_t at(int64_t image, int64_t row, int64_t column) const {
    return offset + image * batch_stride + row * row_stride + column;
  }
  int64_t place(int64_t i) const { return at(i / (rows * width), i / width % rows, i % width); }
  double get(int64_t image, int64_t row, int64_t column) const {
    return (*buffer)[at(image, row, column)];
  }
  AttentionTensor tensor() const {
    return {buffer->data() + offset * bytes_of(buffer->dtype()), batch_stride, row_stride};
  }
};

// Rotary positions: the tokens from the second on but the last two, or the first only, with a table
// per head if packed.
struct Tables {
  Buffer sin, cos;
  AttentionRotation rotation = {};
  int64_t heads, columns;

  explicit Tables(const Case &c) : heads(c.packed ? c.heads : 1), columns(c.head_dim) {
    if (c.turn == Case::none) return;
    const bool few = c.keys < 4;
    rotation.start = few ? 0 : 1;
    rotation.rows = few ? 1 : c.keys - 3;
    rotation.per_head = c.packed;
    rotation.half = c.turn == Case::halves;
    Normal normal(c.keys);
    for (Buffer *table : {&sin, &cos}) {
      *table = Buffer(Dtype::float32, heads * rotation.rows * columns);
      for (int64_t i = 0; i < table->size(); ++i) table->set(i, normal());
    }
    rotation.sin = reinterpret_cast<const float *>(sin.data());
    rotation.cos = reinterpret_cast<const float *>(cos.data());
  }

  // Rotates a head's features of a token, or rotates their gradient back.
  void turn(double *x, int64_t head, int64_t token, bool back) const {
    const int64_t row = token - rotation.start;
    if (row < 0 || row >= rotation.rows) return;
    const int64_t first = ((rotation.per_head ? head : 0) * rotation.rows + row) * columns;
    const std::vector<double> from(x, x + columns);
    for (int64_t j = 0; j < columns; ++j) {
      const bool second = rotation.half ? j >= columns / 2 : j % 2 != 0;
      const int64_t other = (rotation.half ? columns / 2 : 1) * (second ? -1 : 1) + j;
      const double sign = second != back ? 1 : -1;
      const double by = sin[first + (back ? other : j)];
      x[j] = from[std::size_t(j)] * cos[first + j] + sign * from[std::size_t(other)] * by;
    }
  }
};

// Queries, keys and values, or their gradients.
struct Tensors {
  Buffer buffers[3];
  Slice q, k, v;

  Tensors(const Case &c, Dtype dtype) {
    const int64_t width = c.heads * c.head_dim, rows = std::max(c.queries, c.keys);
    if (c.packed) {
      // The values' last row ends where the memory does.
      const int64_t stride = 3 * width + 5, image = rows * stride + 2;
      const int64_t last = (c.batch - 1) * image + (rows - 1) * stride + 3 * width;
      buffers[0] = Buffer(dtype, c.batch ? last : 0);
      q = {&buffers[0], 0, image, stride, c.queries, width};
      k = {&buffers[0], width, image, stride, c.keys, width};
      v = {&buffers[0], 2 * width, image, stride, c.keys, width};
    } else {
      const int64_t sizes[] = {c.queries, c.keys, c.keys};
      Slice *const slices[] = {&q, &k, &v};
      for (int i = 0; i < 3; ++i) {
        buffers[i] = Buffer(dtype, c.batch * sizes[i] * width);
        *slices[i] = {&buffers[i], 0, sizes[i] * width, width, sizes[i], width};
      }
    }
  }
};

void run(const Case &c, int threads) {
  const Dtype dtype = c.dtype;
  const int64_t width = c.heads * c.head_dim;
  Normal normal(c.queries * 31 + c.keys * 7 + c.head_dim);
  Tensors in(c, dtype);
  const Tables tables(c);
  // Numbers for the tokens that there are; padding stays NaN.
  const auto fill = [&](const Slice &slice) {
    for (int64_t i = 0; i < c.batch * slice.rows * width; ++i)
      if (i / width % slice.rows < c.length(i / width / slice.rows))
        slice.buffer->set(slice.place(i), normal());
  };
  for (const Slice *slice : {&in.q, &in.k, &in.v}) fill(*slice);
  const int64_t gap = c.packed ? 3 : 0;
  const auto dense = [&](Buffer &buffer) {
    const int64_t stride = width + gap, image = c.queries * stride;
    buffer = Buffer(dtype, c.batch ? c.batch * image - gap : 0);
    return Slice{&buffer, 0, image, stride, c.queries, width};
  };
  Buffer of_d_out;
  const Slice d_out = dense(of_d_out);
  fill(d_out);
  const auto of_padding = [&](void (Buffer::*act)(int64_t, int64_t) const) {
    for (const Slice *slice : std::initializer_list<const Slice *>{&in.q, &in.k, &in.v, &d_out})
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t row = c.length(b); row < slice->rows; ++row)
          (slice->buffer->*act)(slice->at(b, row, 0), width);
  };

  struct Found {
    Buffer of_out, lse;
    Slice out;
    Tensors gradients;
  };
  const auto compute = [&](Found &found, int team) {
    found.out = dense(found.of_out);
    found.lse = Buffer(Dtype::float32, c.batch * c.heads * c.queries);
    AttentionCall call = {};
    call.dtype = c.dtype;
    call.batch = c.batch;
    call.heads = c.heads;
    call.queries = c.queries;
    call.keys = c.keys;
    call.head_dim = c.head_dim;
    call.scale = c.scale;
    call.q = in.q.tensor();
    call.k = in.k.tensor();
    call.v = in.v.tensor();
    call.rotation = tables.rotation;
    if (!c.lengths.empty()) call.lengths = c.lengths.data();
    call.out = found.out.tensor();
    call.lse = reinterpret_cast<float *>(found.lse.data());
    attention_forward(call, team);
    call.d_out = d_out.tensor();
    call.d_q = found.gradients.q.tensor();
    call.d_k = found.gradients.k.tensor();
    call.d_v = found.gradients.v.tensor();
    attention_backward(call, team);
  };
  Found found = {Buffer(), Buffer(), Slice(), Tensors(c, dtype)};
  of_padding(&Buffer::forbid);
  compute(found, threads);
  if (threads > 1) {
    Found alone = {Buffer(), Buffer(), Slice(), Tensors(c, dtype)};
    compute(alone, 1);
    bool same = found.of_out == alone.of_out && found.lse == alone.lse;
    for (int i = 0; i < 3; ++i) same &= found.gradients.buffers[i] == alone.gradients.buffers[i];
    if (!same) fail(c.name() + "differs with the number of threads");
  }
  of_padding(&Buffer::allow);

  using Doubles = std::vector<double>;
  Doubles out(std::size_t(c.batch * c.queries * width)), lse, d_q(out.size()),
      d_k(std::size_t(c.batch * c.keys * width)), d_v(d_k.size()), q(d_q.size()), k(d_k.size());
  const auto copy = [&](const Slice &from, Doubles &to) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = (*from.buffer)[from.place(int64_t(i))];
  };
  const auto turn = [&](Doubles &x, int64_t rows, bool back) {
    for (int64_t i = 0; i < c.batch * rows * c.heads; ++i)
      tables.turn(&x[std::size_t(i * c.head_dim)], i % c.heads, i / c.heads % rows, back);
  };
  copy(in.q, q), copy(in.k, k);
  turn(q, c.queries, false), turn(k, c.keys, false);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t first = h * c.head_dim, end = first + c.head_dim;
        const int64_t keys = std::min(c.keys, c.length(b));
        if (i >= c.length(b)) {
          lse.push_back(0);
          continue;
        }
        Doubles p, d_p;
        double top = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double score = 0, product = 0;
          for (int64_t e = first; e < end; ++e) {
            score += q[std::size_t((b * c.queries + i) * width + e)] *
                     k[std::size_t((b * c.keys + j) * width + e)];
            product += d_out.get(b, i, e) * in.v.get(b, j, e);
          }
          p.push_back(c.scale * score);
          d_p.push_back(product);
          top = std::max(top, p.back());
        }
        for (double s : p) sum += std::exp(s - top);
        lse.push_back(top + std::log(sum));
        for (int64_t j = 0; j < keys; ++j) {
          double &s = p[std::size_t(j)];
          s = std::exp(s - lse.back());
          delta += s * d_p[std::size_t(j)];
        }
        for (int64_t j = 0; j < keys; ++j) {
          const double weight = p[std::size_t(j)];
          const double d_s = c.scale * weight * (d_p[std::size_t(j)] - delta);
          for (int64_t e = first; e < end; ++e) {
            const std::size_t query = std::size_t((b * c.queries + i) * width + e);
            const std::size_t key = std::size_t((b * c.keys + j) * width + e);
            out[query] += weight * in.v.get(b, j, e);
            d_q[query] += d_s * k[key];
            d_k[key] += d_s * q[query];
            d_v[key] += weight * d_out.get(b, i, e);
          }
        }
      }
  turn(d_q, c.queries, true), turn(d_k, c.keys, true);
  const auto check = [&](const Slice &slice, const Doubles &exact, const char *what) {
    // Matmuls of bf16 read probabilities, or gradients of scores, that have been rounded too.
    const std::string set = instruction_set();
    const bool twice = dtype == Dtype::bfloat16 && (set == "amx" || set == "portable_bf16");
    // Nearly all of a gradient may cancel out, and so may values once probabilities are rounded.
    const double least = what[0] == 'd' || twice ? 1 : 0;
    compare(
        *slice.buffer, exact, least, c.name() + what, [&](int64_t i) { return slice.place(i); },
        twice ? 2 : 1);
  };
  check(found.out, out, "out");
  compare(found.lse, lse, c.name() + "lse", 1);
  check(found.gradients.q, d_q, "d_q");
  check(found.gradients.k, d_k, "d_k");
  check(found.gradients.v, d_v, "d_v");
  expect_blank(found.of_out, c.name() + "out");
  for (const Buffer &buffer : found.gradients.buffers)
    if (buffer.size()) expect_blank(buffer, c.name() + "a gradient");
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    int count = 0;
    // In float32, as rotated halves are rounded.
    for (Case::Turn turn : {Case::halves, Case::neighbours})
      for (int64_t head_dim : {2, 6, 16, 34, 64})
        for (int64_t keys : {1, 2, 7, 9, 100})
          for (bool packed : {false, true})
            run({Dtype::float32, 2, 3, packed ? keys : 1, keys, head_dim, 0.2, packed, turn}, 1);
    // Rows that end before the first rotated token, or among those that are.
    run({Dtype::float32, 3, 2, 20, 40, 6, 0.2, true, Case::halves, {1, 40, 13}}, 1);
    for (Dtype dtype : kAttentionDtypes) {
      for (int64_t head_dim : {1, 3, 8, 16, 17, 33, 65})
        for (int64_t keys : {1, 2, 7, 8, 9, 17, 33, 65})
          for (int64_t queries : {1, 6, 13}) {
            const bool odd = ++count % 2 != 0;
            run({dtype, odd ? 2 : 1, count % 3 + 1, queries, keys, head_dim,
                 odd ? 1 / std::sqrt(double(head_dim)) : -0.3, odd},
                1);
          }
      // The widest heads, matmuls of several depths, several blocks of queries.
      run({dtype, 1, 1, 9, 140, 256, 0.06, true}, 1);
      run({dtype, 1, 2, 75, 1001, 20, 0.2, true}, 1);
      run({dtype, 0, 2, 3, 4, 5, 1, false}, 2);
      run({dtype, 3, 3, 60, 61, 40, 0.15, true}, 4);
      // Rows of a padded batch, short ones in blocks of queries of another size.
      for (bool packed : {false, true}) {
        run({dtype, 4, 2, 5, 33, 17, 0.2, packed, Case::none, {1, 33, 5, 8}}, 1);
        run({dtype, 3, 3, 75, 75, 16, 0.2, packed, Case::none, {75, 72, 1}}, 4);
      }
    }
  });
}
