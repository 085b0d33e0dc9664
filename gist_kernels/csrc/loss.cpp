// The loss over a batch: choice of the row kernel, number of threads, reduction.

#include "loss.h"

#include <vector>

#include "dispatch.h"

namespace gist {
namespace {

using std::int64_t;

constexpr const RowKernel *kRowKernels[] = GIST_TABLE(RowKernel, loss_rows);

// Logits of one head that make it worth waking a thread.
constexpr int64_t kLogitsPerThread = 16 * 1024;
// Each thread's share is cut into parts, so that other threads can take over those of a slow one.
// A part has at least this many logits, and at least the rows of a row kernel's group.
constexpr int64_t kPartsPerThread = 8, kLogitsPerPart = 8 * 1024, kRowsPerPart = 8;

void run_rows(const LossCall &call, Pass pass, int threads) {
  const RowKernel rows = *kRowKernels[current_set()];
  const int64_t useful = call.rows * call.classes / kLogitsPerThread;
  const int64_t team = threads < useful ? threads : useful;
  if (team < 2) return rows(call, pass, 0, call.rows);

  const int64_t fair = (call.rows + team * kPartsPerThread - 1) / (team * kPartsPerThread);
  const int64_t least = (kLogitsPerPart + call.classes - 1) / call.classes;
  const int64_t wanted = fair > least ? fair : least;
  // Whole groups, unless threads would then be without work.
  const int64_t whole = (wanted + kRowsPerPart - 1) / kRowsPerPart * kRowsPerPart;
  const int64_t size = whole * team <= call.rows ? whole : wanted;
  const int64_t parts = (call.rows + size - 1) / size;
  parallel_for(parts, team, [&](int64_t part) {
    const int64_t end = (part + 1) * size;
    rows(call, pass, part * size, end < call.rows ? end : call.rows);
  });
}

int64_t count_kept(const LossCall &call) {
  if (call.target_dtype != Dtype::int64) return call.rows;
  const int64_t *target = static_cast<const int64_t *>(call.target);
  int64_t kept = 0;
  for (int64_t row = 0; row < call.rows; ++row)
    kept += target[row * call.target_stride] != call.ignore_index;
  return kept;
}

// Sums in the order of the rows, whichever thread computed them. Returns the first row whose target
// is out of range, or -1.
template <class A>
int64_t reduce(const LossCall &call, int64_t kept) {
  const RowStats<A> *stats = static_cast<const RowStats<A> *>(call.stats);
  A *const loss = static_cast<A *>(call.loss), *const terms = static_cast<A *>(call.terms);
  const A *const row_scales = static_cast<const A *>(call.row_scales);
  const int64_t stride = call.row_scales_stride;
  int64_t invalid = -1;
  double totals[5] = {};
  for (int64_t row = 0; row < call.rows; ++row) {
    const double scale = row_scales == nullptr ? 1 : double(row_scales[row * stride]);
    const bool is_nan = stats[row].scale != stats[row].scale;
    if (is_nan && scale == scale && invalid < 0) invalid = row;
    double weighted = 0;
    for (int t = 0; t < 4; ++t) {
      // A row of scale 0 has terms of 0.
      const double term = double(stats[row].terms[t]) * scale;
      // A term without weight may be infinite.
      if (call.weights[t] != 0) weighted += call.weights[t] * term;
      totals[t] += term;
      if (terms != nullptr && call.reduction == Reduction::none)
        terms[t * call.rows + row] = A(term);
    }
    totals[4] += weighted;
    if (call.reduction == Reduction::none) loss[row] = A(weighted);
  }
  if (call.reduction == Reduction::none) return invalid;
  const double divisor = call.reduction == Reduction::mean ? double(kept) : 1;
  for (int t = 0; t < 4 && terms != nullptr; ++t) terms[t] = A(totals[t] / divisor);
  *loss = A(totals[4] / divisor);
  return invalid;
}

// Larger gradients would leave the cache before anything reads them.
constexpr int64_t kStreamedBytes = 32 << 20;

bool streams(const LossCall &call) {
  // Written over the logits, they are in the cache already, and what reads them comes next.
  for (int s : kHeads)
    if (call.d_logits[s] != nullptr && call.d_logits[s] == call.logits[s]) return false;
  int gradients = 0;
  for (int s : kHeads) gradients += call.d_logits[s] != nullptr;
  return gradients * call.rows * call.classes * bytes_of(call.dtype) > kStreamedBytes;
}

int64_t forward(LossCall &call, Pass pass, int threads) {
  const int64_t kept = count_kept(call);
  call.row_scale = call.reduction == Reduction::mean ? 1 / double(kept) : 1;
  call.stream = streams(call);
  run_rows(call, pass, threads);
  return call.dtype == Dtype::float64 ? reduce<double>(call, kept) : reduce<float>(call, kept);
}

}  // namespace

int64_t loss_forward(LossCall call, int threads) { return forward(call, Pass::forward, threads); }

int64_t loss_forward_backward(LossCall call, int threads) {
  std::vector<double> unread;
  if (call.stats == nullptr) {
    unread.resize(std::size_t(call.rows * kRowStats));  // doubles, for either type of number
    call.stats = unread.data();
  }
  return forward(call, Pass::forward_backward, threads);
}

void loss_backward(LossCall call, int threads) {
  call.stream = streams(call);
  run_rows(call, Pass::backward, threads);
}

}  // namespace gist
