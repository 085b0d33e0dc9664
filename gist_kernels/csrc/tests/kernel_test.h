// Shared by the kernels' own tests: memory of exactly the right size, numbers in every dtype, and
// the comparison with plain loops in double. These tests are for sanitizers, which see only code
// built with them (CMakeLists.txt says how), and for processors that only an emulator has. The
// Python tests check values more thoroughly.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gist::test {

using std::int64_t;

// `size` numbers, all NaN: not written yet. The memory ends at an inaccessible page, since
// AddressSanitizer does not see the masked accesses of AVX-512. AddressSanitizer guards the memory
// in front.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Dtype dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_(std::size_t(size * bytes_of(dtype))) {
    const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
    usable_ = (bytes_ + page - 1) / page * page + page;
    void *const memory =
        mmap(nullptr, usable_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::perror("mmap"), std::abort();
    memory_ = static_cast<unsigned char *>(memory);
    if (mprotect(memory_ + usable_, page, PROT_NONE) != 0) std::perror("mprotect"), std::abort();
    mapped_ = usable_ + page;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory_, usable_ - bytes_);
#endif
    std::memset(data(), 0xff, bytes_);
  }
  Buffer(Buffer &&other) noexcept { swap(other); }
  Buffer &operator=(Buffer &&other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (memory_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_, usable_);
#endif
    munmap(memory_, mapped_);
  }

  int64_t size() const { return size_; }
  Dtype dtype() const { return dtype_; }
  unsigned char *data() const { return memory_ + usable_ - bytes_; }
  bool operator==(const Buffer &other) const {
    if (bytes_ != other.bytes_ || bytes_ == 0) return bytes_ == other.bytes_;
    return std::memcmp(data(), other.data(), bytes_) == 0;
  }

  double operator[](int64_t index) const {
    const unsigned char *const at = place(index);
    if (dtype_ == Dtype::float64) return take<double>(at);
    if (dtype_ == Dtype::int64) return double(take<int64_t>(at));
    if (dtype_ == Dtype::float16) {
      const std::uint16_t bits = take<std::uint16_t>(at);
      const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
      const double size = exponent == 31  ? mantissa != 0 ? NAN : INFINITY
                          : exponent == 0 ? std::ldexp(mantissa, -24)
                                          : std::ldexp(1024 + mantissa, exponent - 25);
      return bits >> 15 ? -size : size;
    }
    if (dtype_ == Dtype::float32) return double(take<float>(at));
    unsigned char wide[4] = {};
    std::memcpy(wide + 2, at, 2);
    return double(take<float>(wide));
  }

  // The number, rounded to the dtype.
  void set(int64_t index, double value) {
    unsigned char *const at = place(index);
    const float single = float(value);
    if (dtype_ == Dtype::float64) {
      std::memcpy(at, &value, 8);
    } else if (dtype_ == Dtype::int64) {
      const int64_t integer = int64_t(value);
      std::memcpy(at, &integer, 8);
    } else if (dtype_ == Dtype::float32) {
      std::memcpy(at, &single, 4);
    } else if (dtype_ == Dtype::bfloat16) {
      std::memcpy(at, reinterpret_cast<const unsigned char *>(&single) + 2, 2);
    } else {
      const std::uint16_t bits = half_of(value);
      std::memcpy(at, &bits, 2);
    }
  }
  // Have AddressSanitizer report whatever reads or writes n numbers, until they are allowed again.
  // It sees neither prefetches nor the masked accesses of AVX-512.
  void forbid([[maybe_unused]] int64_t index, [[maybe_unused]] int64_t n) const {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(place(index), std::size_t(n * bytes_of(dtype_)));
#endif
  }
  void allow([[maybe_unused]] int64_t index, [[maybe_unused]] int64_t n) const {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(place(index), std::size_t(n * bytes_of(dtype_)));
#endif
  }
  void erase(int64_t index) { std::memset(place(index), 0xff, std::size_t(bytes_of(dtype_))); }
  bool is_blank() const {
    return std::all_of(data(), data() + bytes_, [](unsigned char byte) { return byte == 0xff; });
  }

 private:
  unsigned char *place(int64_t index) const { return data() + index * bytes_of(dtype_); }
  template <class T>
  static T take(const unsigned char *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  static std::uint16_t half_of(double value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (std::isnan(value)) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    const int last = std::max(exponent - 11, -24);  // power of two of the last digit
    return std::uint16_t(sign + ((last + 25) << 10) + int(std::nearbyint(std::ldexp(size, -last))) -
                         1024);
  }
  void swap(Buffer &other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
    std::swap(usable_, other.usable_);
    std::swap(mapped_, other.mapped_);
    std::swap(memory_, other.memory_);
  }

  Dtype dtype_ = Dtype::none;
  int64_t size_ = 0;
  std::size_t bytes_ = 0, usable_ = 0, mapped_ = 0;
  unsigned char *memory_ = nullptr;
};

inline void *address(const Buffer &buffer) { return buffer.size() == 0 ? nullptr : buffer.data(); }

// The type of arithmetic on numbers of a dtype.
inline Dtype accumulated(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

class Normal {
 public:
  explicit Normal(int64_t seed) : random_(static_cast<unsigned>(seed)) {}

  double operator()(double spread = 1) { return spread * normal_(random_); }
  Buffer filled(Dtype dtype, int64_t size, double spread = 1) {
    Buffer buffer(dtype, size);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, (*this)(spread));
    return buffer;
  }

 private:
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
};

inline const Dtype kFormats[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64};

// The tolerance of a sum of some hundred terms, relative to the largest number of its tensor. A
// 16-bit dtype is rounded to once, at the end.
inline double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 1e-12;
    case Dtype::bfloat16: return 1e-5 + 0x1p-8;
    case Dtype::float16: return 1e-5 + 0x1p-11;
    default: return 1e-5;
  }
}

inline int64_t failures = 0, compared = 0;

inline void fail(const std::string &message) {
  if (++failures <= 20) std::printf("%s: %s\n", instruction_set(), message.c_str());
}

// Equal where `exact` is not finite.
inline void expect(double value, double exact, double allowed, const std::string &what) {
  ++compared;
  if (std::isnan(exact) ? std::isnan(value) : value == exact) return;
  if (std::fabs(value - exact) <= allowed && std::isfinite(exact)) return;
  char numbers[96];
  std::snprintf(numbers, sizeof numbers, " is %.9g, not %.9g (allowed %.2g)", value, exact,
                allowed);
  fail(what + numbers);
}

// Compares each number of a tensor, number i at place(i). Errors are relative to the largest
// number, or to `least` if that is larger. Numbers that were compared are erased.
template <class Place>
void compare(Buffer &found, const std::vector<double> &exact, double least, const std::string &what,
             Place place, int roundings = 1) {
  double largest = least;
  for (double x : exact)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  const double allowed = roundings * tolerance(found.dtype()) * largest;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const int64_t at = place(int64_t(i));
    expect(found[at], exact[i], allowed, what + "[" + std::to_string(i) + "]");
    found.erase(at);
  }
}
inline void compare(Buffer &found, const std::vector<double> &exact, const std::string &what,
                    double least = 0) {
  compare(found, exact, least, what, [](int64_t i) { return i; });
}
// Checks that nothing else was written to a tensor that was compared.
inline void expect_blank(const Buffer &found, const std::string &what) {
  if (!found.is_blank()) fail(what + " was written outside of its rows");
}

// Runs body() with every instruction set of this processor. Returns main()'s status.
template <class Body>
int on_every_instruction_set(Body body) {
  for (const char *name : {"amx", "avx512", "avx2", "portable", "portable_bf16"})
    if (use_instruction_set(name)) {
      const int64_t before = compared;
      body();
      std::printf("%s: %lld numbers compared\n", name, static_cast<long long>(compared - before));
    }
  std::printf("%lld wrong\n", static_cast<long long>(failures));
  return failures > 0 || compared == 0;
}

}  // namespace gist::test
