// Attention of one head of one image in bf16, by AMX's matmuls of bf16 numbers that are added up in
// float. CMakeLists.txt compiles this file for AMX, and as plain C++ for the tests of processors
// without it. See attention.cpp for the mathematics, and attention_parts.h for what both share.
//
// Probabilities and gradients of scores are computed in float and rounded to bf16 once, where a
// matmul reads them.
//
// A matmul reads its left matrix row by row, and its right one in pairs: a 32-bit word holds a
// column's numbers of two rows. Scores are kept transposed, a row per key. So pairs of queries and
// of gradients come from a transposition of words, and pairs of probabilities from two keys' rows.

#include "attention_parts.h"

#if defined(__AMX_BF16__) && !defined(__AVX512BF16__)
#error "AMX comes with AVX-512's bf16 instructions"
#endif

namespace gist {
namespace {

using Word = std::uint32_t;

// Rows and columns of matmuls come in tiles of 16, and depths in 16 pairs.
constexpr int64_t kTile = 16, kDeep = 32;
// Keys whose scores are taken at once.
constexpr int64_t kChunkKeys = 32;
// Queries in a block, at least 16. A block has up to 14 bytes of scores for each query and key, and
// they should fill no more than half of an L2 cache of 1 MiB.
constexpr int64_t kMostQueries = 224;
int64_t most_queries(int64_t keys) {
  const int64_t fit = (int64_t(512) << 10) / (14 * keys) / kTile * kTile;
  return std::min(std::max(fit, kTile), kMostQueries);
}

using Numbers = MatrixOf<BFloat16>;
using Pairs = MatrixOf<Word>;

GIST_INLINE Words load_words(const void *from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

GIST_INLINE Words words(Halves halves) {
#if defined(__AVX512F__)
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(-1, bit_cast<__m256i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

GIST_INLINE Halves narrowed(Floats floats) {
#if defined(__AVX512BF16__)
  return bit_cast<Halves>(_mm512_cvtneps_pbh(floats));
#else
  return narrow(BFloat16{}, floats);
#endif
}

GIST_INLINE Halves load_halves(const BFloat16 *from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return halves;
}

GIST_INLINE void store_halves(BFloat16 *to, Halves halves) {
  std::memcpy(to, &halves, sizeof halves);
}

// Numbers of two rows in pairs.
GIST_INLINE void store_pairs(Word *to, Halves first, Halves second) {
  const Words pairs = words(first) | words(second) << 16;
  std::memcpy(to, &pairs, sizeof pairs);
}

#if defined(__AMX_BF16__)

// The configuration of all eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know what is read and written for tiles.
GIST_INLINE void tile_barrier(const void *what) { asm volatile("" : : "r"(what) : "memory"); }

// Configures the tiles for as long as it lives. Another library on this thread may count on its own
// configuration, which returns afterwards.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    const TileConfiguration ours;
    tile_barrier(&ours);
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    tile_barrier(before_);
    _tile_loadconfig(before_);
  }
  Tiles(const Tiles &) = delete;

 private:
  alignas(64) std::uint8_t before_[64];
};

// c = a b, or c += a b, for kRows and kColumns tiles of c.
template <int kRows, int kColumns>
void part_of_product(int64_t depth, const BFloat16 *a, int64_t a_row, const Word *b, int64_t b_row,
                     float *c, int64_t c_row, bool add) {
  const int64_t a_bytes = 2 * a_row, b_bytes = 4 * b_row, c_bytes = 4 * c_row;
  float *const below = c + kTile * c_row;
  tile_barrier(c);
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (kRows == 2) _tile_loadd(2, below, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kDeep) {
    const Word *const right = b + k / 2 * b_row;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, right, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, right + kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + kTile * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns == 2) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (kRows == 2) _tile_stored(2, below, c_bytes);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, below + kTile, c_bytes);
  tile_barrier(c);
}

#else

struct Tiles {
  Tiles() {}
};

// sum + the dot product of each lane's pairs.
GIST_INLINE Floats add_dot(Floats sum, Words left, Words right) {
  const Words second = Words{} + 0xffff0000;
  sum = fma(bit_cast<Floats>(left << 16), bit_cast<Floats>(right << 16), sum);
  return fma(bit_cast<Floats>(left & second), bit_cast<Floats>(right & second), sum);
}

template <int kRows, int kColumns>
void part_of_product(int64_t depth, const BFloat16 *a, int64_t a_row, const Word *b, int64_t b_row,
                     float *c, int64_t c_row, bool add) {
  for (int64_t i = 0; i < kRows * kTile; ++i) {
    for (int64_t j = 0; j < kColumns * kTile; j += kWide) {
      float *const to = c + i * c_row + j;
      Floats sum = add ? load(to, Whole{}) : Floats{};
      for (int64_t k = 0; k < depth; k += 2) {
        Word pair;
        std::memcpy(&pair, a + i * a_row + k, sizeof pair);
        sum = add_dot(sum, Words{} + pair, load_words(b + k / 2 * b_row + j));
      }
      store(to, Whole{}, sum);
    }
  }
}

#endif

// c = a b, or c += a b, for `rows` rows of a and c and `columns` of b and c, in whole tiles.
void product(int64_t rows, int64_t columns, int64_t depth, Numbers a, Pairs b, Matrix c, bool add) {
  for (int64_t j = 0; j < columns; j += 2 * kTile) {
    const bool wide = columns - j > kTile;
    for (int64_t i = 0; i < rows; i += 2 * kTile) {
      const bool tall = rows - i > kTile;
      const auto part = tall ? (wide ? part_of_product<2, 2> : part_of_product<2, 1>)
                             : (wide ? part_of_product<1, 2> : part_of_product<1, 1>);
      part(depth, a.at(i), a.row, b.data + j, b.row, c.at(i) + j, c.row, add);
    }
  }
}

template <class T>
void clear(T *to, int64_t n) {
  std::memset(to, 0, std::size_t(n) * sizeof(T));
}

// The rows of numbers, two in one: word (i, j) has numbers (2 i, j) and (2 i + 1, j).
void interleave(Numbers from, int64_t rows, int64_t columns, Pairs to) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += kWide)
      store_pairs(to.at(i / 2) + j, load_halves(from.at(i) + j), load_halves(from.at(i + 1) + j));
}

// Moves words: to(j, i) = from(i, j).
void transpose_words(MatrixOf<Word> from, int64_t rows, int64_t columns, MatrixOf<Word> to) {
  transpose({reinterpret_cast<float *>(from.data), from.row}, rows, columns,
            {reinterpret_cast<float *>(to.data), to.row});
}

Pairs as_words(Numbers numbers) {
  return {reinterpret_cast<Word *>(numbers.data), numbers.row / 2};
}

// The layout of scratch memory.
class Scratch {
 public:
  Scratch(int64_t head_dim, Direction direction, AttentionSizes sizes, float *memory)
      : memory_(memory) {
    tall = round_up(sizes.keys, kDeep);
    wide = round_up(head_dim, kDeep);
    // Blocks of nearly equal size.
    const int64_t most = most_queries(tall), blocks = (sizes.queries + most - 1) / most;
    block = round_up((sizes.queries + blocks - 1) / blocks, kTile);
    const int64_t deep = round_up(block, kDeep);
    keys = numbers(tall, wide);
    values = numbers(tall, wide);
    across = numbers(wide, tall);
    pairs_of_keys = pairs(tall / 2, wide);
    queries = numbers(deep, wide);
    queries_t = pairs(wide / 2, deep);
    one = floats(1, wide);
    result_t = floats(wide, block);
    result = floats(block, wide);
    p = floats(tall, block);
    pairs_of_scores = pairs(tall / 2, block);
    shift = floats(1, block).data;
    total = floats(1, block).data;
    if (direction == Direction::forward) return;
    d_out = numbers(deep, wide);
    d_out_t = pairs(wide / 2, deep);
    pairs_of_queries = pairs(deep / 2, wide);
    pairs_of_d_out = pairs(deep / 2, wide);
    d_s = floats(tall, block);
    rounded_p = numbers(tall, deep);
    rounded_d_s = numbers(tall, deep);
    inverse = floats(1, block).data;
    delta = floats(1, block).data;
    d_keys = floats(tall, wide);
    d_values = floats(tall, wide);
  }

  int64_t size() const { return used_; }

  int64_t tall, wide, block;  // keys and columns in whole tiles; queries at a time
  Numbers keys, values;
  Numbers across;  // the transpose of values, or of keys for their queries' gradients
  Pairs pairs_of_keys;
  Numbers queries, d_out;
  Pairs queries_t, d_out_t;                // transposed words: a row per pair of columns
  Pairs pairs_of_queries, pairs_of_d_out;  // a row per pair of queries
  Matrix one, result_t, result;
  Matrix p, d_s;                   // transposed: a row per key
  Pairs pairs_of_scores;           // a row per pair of keys
  Numbers rounded_p, rounded_d_s;  // a row per key
  float *shift, *total, *inverse, *delta;
  Matrix d_keys, d_values;

 private:
  float *take(int64_t count) {
    float *const at = memory_ != nullptr ? memory_ + used_ : nullptr;
    used_ += round_up(count, kLine);
    return at;
  }
  Matrix floats(int64_t rows, int64_t row) { return {take(rows * row), row}; }
  Pairs pairs(int64_t rows, int64_t row) {
    return {reinterpret_cast<Word *>(take(rows * row)), row};
  }
  Numbers numbers(int64_t rows, int64_t row) {
    return {reinterpret_cast<BFloat16 *>(take(rows * row / 2)), row};
  }

  float *memory_;
  int64_t used_ = 0;
};

class Head : HeadOf<BFloat16> {
 public:
  Head(const AttentionCall &call, Direction direction, AttentionSizes sizes, int64_t image,
       int64_t head, float *memory)
      : HeadOf(call, sizes, image, head), at_(call.head_dim, direction, sizes, memory) {}

  void forward() {
    copy(call_.k, 0, sizes_.keys, at_.tall, true, at_.keys);
    copy(call_.v, 0, sizes_.keys, at_.tall, false, at_.values);
    transpose_numbers(at_.values);
    for_each_block(at_.block, kTile, [&](int64_t first, int64_t count, int64_t lanes) {
      copy_queries(first, count, lanes);
      fill(at_.shift, lanes, -__builtin_inff());
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        scores(key, lanes);
        raise_tops(part(at_.p, key, keys, lanes), power_scale(), at_.shift);
      });
      fill(at_.total, lanes, 0);
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        const Scores p = part(at_.p, key, keys, lanes);
        exponentials(p, power_scale(), at_.shift, at_.total, power_);
        round_to_pairs(at_.p, key, lanes);
      });
      product(at_.wide, lanes, at_.tall, at_.across, at_.pairs_of_scores, at_.result_t, false);
      transpose(at_.result_t, at_.wide, lanes, at_.result);
      finish(first, count, at_.shift, at_.total);
      const auto inverse = [&](int64_t i) { return at_.total[i]; };
      unpack(at_.result, call_.head_dim, inverse, rows(call_.out, first, count));
    });
  }

  void backward() {
    const float scale = float(call_.scale);
    copy(call_.k, 0, sizes_.keys, at_.tall, true, at_.keys);
    copy(call_.v, 0, sizes_.keys, at_.tall, false, at_.values);
    transpose_numbers(at_.keys);
    for_each_block(at_.block, kTile, [&](int64_t first, int64_t count, int64_t lanes) {
      const int64_t deep = round_up(lanes, kDeep);
      copy_queries(first, count, lanes);
      interleave(at_.queries, deep, at_.wide, at_.pairs_of_queries);
      copy(call_.d_out, first, count, deep, false, at_.d_out);
      interleave(at_.d_out, deep, at_.wide, at_.pairs_of_d_out);
      transpose_words(as_words(at_.d_out), lanes, at_.wide / 2, at_.d_out_t);
      fill(at_.shift, lanes, 0);
      for (int64_t i = 0; i < count; ++i) at_.shift[i] = float(lse()[first + i] / kLogOfBase);
      fill(at_.total, lanes, 0);
      fill(at_.delta, lanes, 0);
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        scores(key, lanes);
        const Scores p = part(at_.p, key, keys, lanes), d_p = part(at_.d_s, key, keys, lanes);
        exponentials(p, power_scale(), at_.shift, at_.total, power_);
        product(kChunkKeys, lanes, at_.wide, {at_.values.at(key), at_.values.row}, at_.d_out_t,
                {at_.d_s.at(key), at_.d_s.row}, false);
        add_products(p, d_p, at_.delta);
      });
      for (int64_t i = 0; i < lanes; ++i) {
        at_.inverse[i] = 1 / at_.total[i];
        at_.delta[i] *= at_.inverse[i];
        at_.total[i] = scale * at_.inverse[i];
      }
      for_each_chunk(kChunkKeys, [&](int64_t key, int64_t keys) {
        const Scores p = part(at_.p, key, keys, lanes), d_s = part(at_.d_s, key, keys, lanes);
        score_gradients(p, d_s, at_.total, at_.delta);
        round_to_pairs(at_.d_s, key, lanes);
        const auto itself = [](Floats x, int64_t) { return x; };
        round_to_rows(at_.d_s, key, lanes, deep, itself, at_.rounded_d_s);
        const auto normalised = [&](Floats x, int64_t lane) {
          return x * load(at_.inverse + lane, Whole{});
        };
        round_to_rows(at_.p, key, lanes, deep, normalised, at_.rounded_p);
      });
      const bool more = first > 0;
      product(at_.tall, at_.wide, deep, at_.rounded_d_s, at_.pairs_of_queries, at_.d_keys, more);
      product(at_.tall, at_.wide, deep, at_.rounded_p, at_.pairs_of_d_out, at_.d_values, more);
      product(at_.wide, lanes, at_.tall, at_.across, at_.pairs_of_scores, at_.result_t, false);
      transpose(at_.result_t, at_.wide, lanes, at_.result);
      rotate_back(at_.result, first, count);
      unpack_gradient(at_.result, rows(call_.d_q, first, count));
    });
    rotate_back(at_.d_keys, 0, sizes_.keys);
    unpack_gradient(at_.d_keys, rows(call_.d_k, 0, sizes_.keys));
    unpack_gradient(at_.d_values, rows(call_.d_v, 0, sizes_.keys));
  }

 private:
  // Copies `count` rows of a tensor, rotated if they are queries or keys, padded with 0 to whole
  // tiles of `height` rows.
  void copy(const AttentionTensor &tensor, int64_t first, int64_t count, int64_t height,
            bool rotated, Numbers to) const {
    const Rows<BFloat16> from = rows(tensor, first, count);
    const AttentionRotation &r = call_.rotation;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i;
      for (int64_t j = 0; j < call_.head_dim; j += kDeep) __builtin_prefetch(from.ahead(i) + j);
      if (rotated && r.sin != nullptr && token >= r.start && token < r.start + r.rows) {
        pack(Rows<BFloat16>(from.at(i), 0, 1), call_.head_dim, at_.one);
        rotate(at_.one, token, 1);
        for_each_vector<float>(call_.head_dim, [&](int64_t j, auto lanes) GIST_LAMBDA {
          store(to.at(i) + j, lanes, load(at_.one.data + j, Whole{}));
        });
      } else {
        std::memcpy(to.at(i), from.at(i), std::size_t(call_.head_dim) * sizeof(BFloat16));
      }
      clear(to.at(i) + call_.head_dim, at_.wide - call_.head_dim);
    }
    clear(to.at(count), (height - count) * at_.wide);
  }

  void copy_queries(int64_t first, int64_t count, int64_t lanes) const {
    copy(call_.q, first, count, round_up(lanes, kDeep), true, at_.queries);
    transpose_words(as_words(at_.queries), lanes, at_.wide / 2, at_.queries_t);
  }

  // Writes the transpose of keys or values to at_.across.
  void transpose_numbers(Numbers of) const {
    interleave(of, at_.tall, at_.wide, at_.pairs_of_keys);
    transpose_words(at_.pairs_of_keys, at_.tall / 2, at_.wide, as_words(at_.across));
  }

  // Computes a block's scores with a chunk of keys, before scaling.
  void scores(int64_t key, int64_t lanes) const {
    product(kChunkKeys, lanes, at_.wide, {at_.keys.at(key), at_.keys.row}, at_.queries_t,
            {at_.p.at(key), at_.p.row}, false);
  }

  // Rounds a chunk's scores to pairs of keys. What there is beyond the last key is multiplied by 0.
  void round_to_pairs(Matrix of, int64_t key, int64_t lanes) const {
    for (int64_t i = key; i < key + kChunkKeys; i += 2)
      for (int64_t lane = 0; lane < lanes; lane += kWide) {
        const auto at = [&](int64_t row) { return narrowed(load(of.at(row) + lane, Whole{})); };
        store_pairs(at_.pairs_of_scores.at(i / 2) + lane, at(i), at(i + 1));
      }
  }

  // Rounds what value(x, lane) makes of a chunk's scores x to rows of `deep` numbers, of which
  // those beyond the lanes are 0.
  template <class Value>
  void round_to_rows(Matrix of, int64_t key, int64_t lanes, int64_t deep, Value value,
                     Numbers to) const {
    for (int64_t i = key; i < key + kChunkKeys; ++i) {
      for (int64_t lane = 0; lane < lanes; lane += kWide)
        store_halves(to.at(i) + lane, narrowed(value(load(of.at(i) + lane, Whole{}), lane)));
      clear(to.at(i) + lanes, deep - lanes);
    }
  }

  const Scratch at_;
};

int64_t scratch(const AttentionCall &call, Direction direction, AttentionSizes sizes) {
  return Scratch(call.head_dim, direction, sizes, nullptr).size();
}

void run(const AttentionCall &call, Direction direction, AttentionSizes sizes, int64_t image,
         int64_t head, float *memory) {
  const Tiles tiles;
  Head of(call, direction, sizes, image, head, memory);
  direction == Direction::forward ? of.forward() : of.backward();
}

}  // namespace

const AttentionKernels GIST_IN_SET(attention_bf16_rows) = {scratch, run};

}  // namespace gist
