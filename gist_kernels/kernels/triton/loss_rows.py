"""The loss of a tile of rows: what its kernels are made of. The formulas are in loss.py."""

from __future__ import annotations

import triton
import triton.language as tl

from gist_kernels.kernels.triton.rows import address, exponentials


@triton.jit
def row_targets(
    target, stride, row_scale, scale_stride, row, inside, classes, ignore_index,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Each row's class index, whether the row counts, whether the index is out of range, and what
    the row's loss is multiplied by."""
    index = row.to(tl.int64)
    kept = inside
    outside = row < 0
    scale = 1.0
    if row_scale is not None:
        scale = tl.load(row_scale + index * scale_stride, inside, 0.0)
        kept = inside & (scale != 0)
    if TARGET == "index" or TARGET == "smoothed":
        index = tl.load(target + index * stride, inside, 0)
        kept = kept & (index != ignore_index)
        outside = kept & ((index < 0) | (index >= classes))
    # Of an index within the classes nothing is lost, and comparing 32 bits costs half.
    return index.to(tl.int32), kept, outside, scale


@triton.jit
def is_skipped(row_scale, scale_stride, row, ROWS: tl.constexpr):
    """Whether a program's only row doesn't count: it then has nothing to compute."""
    skipped = False
    if row_scale is not None and ROWS == 1:
        skipped = tl.load(row_scale + row.to(tl.int64) * scale_stride) == 0
    return skipped


@triton.jit
def expected(target, stride, row, index, column, mask, rest, smoothing, TARGET: tl.constexpr):
    """The target's probabilities y. Smoothing gives every class ``rest``."""
    y = 0.0
    if TARGET == "probability":
        given = tl.load(address(target, row, stride, column, 1), mask, 0).to(tl.float32)
        y = given * (1 - smoothing) + rest
    elif TARGET is not None:
        y = tl.where(column[None, :] == index[:, None], 1 - smoothing + rest, rest)
    return y


@triton.jit
def gist_exponentials(z, gist_scale, tempered_scale, POWER: tl.constexpr, SCALED: tl.constexpr):
    """z at the other side's temperature, then exp(z / T) and exp(z), as of that side."""
    if SCALED:
        plain = tl.exp2(z * 1.4426950408889634)
        z *= gist_scale
        tempered = tl.exp2(z * tempered_scale)
    else:
        tempered, plain = exponentials(z, tempered_scale, POWER)
    return z, tempered, plain


@triton.jit
def log_ratio(x, z, sum_p, sum_q, inverse_t):
    """log(p / q) of each class, for p = exp(x / T) / sum_p and q = exp(z / T) / sum_q."""
    return tl.fma(x - z, inverse_t, -tl.log(sum_p / sum_q)[:, None])


@triton.jit
def means(u, v, sum_u, sum_v, d):
    """E_p[d], E_q[d] and a correction, for p = u / sum_u, q = v / sum_v and d = log(p / q).

    KL(p || q) = E_p[d] + correction, and KL(q || p) = -E_q[d] - correction.
    """
    # sum p phi(d) = sum p d + sum (q - p). The second sum is 0 but for rounding, and cancels the
    # rounding of the first. Near d = 0 the difference q - p has lost its digits: use p expm1(-d).
    series = tl.fma(d, tl.fma(d, tl.fma(d, 1 / 24, -1 / 6), 1 / 2), -1.0)
    # Probability 0 adds 0, whatever d is: infinite for a class that one side masks, nan for both.
    u_d = u * tl.where(u > 0, d, 0.0)
    v_d = v * tl.where(v > 0, d, 0.0)
    change = tl.where(tl.abs(d) < 0.0625, u_d * series, tl.fma(v, (sum_u / sum_v)[:, None], -u))
    inverse_u = 1 / sum_u
    return tl.sum(u_d, 1) * inverse_u, tl.sum(v_d, 1) * (1 / sum_v), tl.sum(change, 1) * inverse_u


@triton.jit
def tile_gradients(
    p, q, d, plain_a, plain_b, y, mean_p, mean_q, share_a, share_b, upstream, inverse_t, weights,
    kl_weights, TARGET: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Both sides' gradients; a share is the target's total over the sum of exp(x).

    They take E_p[d] where the formula has KL(p || q): what d and its mean have in common of the
    error of log(S_p / S_q) cancels. Without SLOPES no KL has a gradient where it starts.
    """
    grad_a = (upstream * inverse_t * kl_weights[3])[:, None] * (p - q)
    grad_b = (upstream * inverse_t * kl_weights[2])[:, None] * (q - p)
    if SLOPES:
        scale_pq = (upstream * inverse_t * kl_weights[0])[:, None]
        scale_qp = (upstream * inverse_t * kl_weights[1])[:, None]
        # A direction of scale 0 may be infinite: it is left out, not multiplied by 0.
        pull_p = tl.where((p > 0) & (scale_pq != 0), scale_pq * (d - mean_p[:, None]), 0.0)
        pull_q = tl.where((q > 0) & (scale_qp != 0), scale_qp * (mean_q[:, None] - d), 0.0)
        grad_a = tl.fma(p, pull_p, grad_a)
        grad_b = tl.fma(q, pull_q, grad_b)
    if TARGET is not None:
        scale_a = upstream * weights[0]
        scale_b = upstream * weights[1]
        grad_a += tl.fma(plain_a, (scale_a * share_a)[:, None], -scale_a[:, None] * y)
        grad_b += tl.fma(plain_b, (scale_b * share_b)[:, None], -scale_b[:, None] * y)
    return grad_a, grad_b


@triton.jit
def store_gradients(d_a, d_b, row, stride, column, mask, grad_a, grad_b, ALIGN: tl.constexpr):
    """Store the gradients; a side that needs none costs nothing."""
    if d_a is not None:
        tl.store(address(d_a, row, stride, column, ALIGN), grad_a.to(d_a.dtype.element_ty), mask)
    if d_b is not None:
        tl.store(address(d_b, row, stride, column, ALIGN), grad_b.to(d_b.dtype.element_ty), mask)


@triton.jit
def close_rows(
    row, inside, kept, outside, scale, row_stats, kl_pq, kl_qp, picked_a, picked_b, weights,
    loss, terms, stats, sums, counter, rows, program, programs,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Compute `stats`, the terms and the loss from complete row statistics."""
    rows = rows.to(tl.int64)
    _, _, _, _, sum_a, sum_b, _, _, total = row_stats
    cls_ce = tl.zeros_like(kl_pq)
    gist_ce = tl.zeros_like(kl_pq)
    if TARGET is not None:
        cls_ce = total * tl.log(sum_a) - picked_a
        gist_ce = total * tl.log(sum_b) - picked_b
    if stats is not None:
        at = stats + row.to(tl.int64) * STATS
        for k in tl.static_range(STATS):
            tl.store(at + k, row_stats[k], inside)

    row_terms = (cls_ce, gist_ce, kl_pq, kl_qp)
    row_loss = tl.zeros_like(kl_pq)
    for k in tl.static_range(4):
        term = tl.where(kept, tl.where(outside, float("nan"), row_terms[k] * scale), 0.0)
        if REDUCTION == "none":
            if terms is not None:
                tl.store(terms + k * rows + row, term, inside)
            # A weight of 0 leaves its term out: the term may be infinite.
            row_loss += tl.where(weights[k] != 0, weights[k] * term, 0.0)
        else:
            tl.store(sums + program.to(tl.int64) * 5 + k, tl.sum(term))
    if REDUCTION == "none":
        tl.store(loss + row, row_loss, inside)
        if stats is not None:
            tl.store(stats + STATS * rows, 1.0)
    else:
        tl.store(sums + program.to(tl.int64) * 5 + 4, tl.sum(kept.to(tl.float32)))
        divisor = stats if stats is None else stats + STATS * rows
        reduce_batch(sums, programs, counter, loss, terms, divisor, weights, REDUCTION)


@triton.jit
def reduce_batch(
    sums, programs, counter, loss, terms, divisor, weights, REDUCTION: tl.constexpr
):  # fmt: skip
    """Add up the sums of all programs. Every program calls this; the last one does the work."""
    # The barrier orders every thread's stores before the atomic. The atomic releases them and, in
    # the last program, acquires those of all others. The loads then bypass the L1 cache.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(counter, 0)
        k = tl.arange(0, 8)
        batch = tl.zeros([8, 128], tl.float32)
        for start in range(0, programs, 128):
            other = start + tl.arange(0, 128)
            mask = (k < 5)[:, None] & (other < programs)[None, :]
            at = sums + other.to(tl.int64)[None, :] * 5 + k[:, None]
            batch += tl.load(at, mask, 0.0, cache_modifier=".cg")
        batch = tl.sum(batch, 1)
        over = 1.0
        if REDUCTION == "mean":
            over = tl.sum(tl.where(k == 4, batch, 0.0))
        term = batch / over
        weight = tl.zeros_like(term)
        for i in tl.static_range(4):
            weight = tl.where(k == i, weights[i], weight)
        if terms is not None:
            tl.store(terms + k, term, k < 4)
        tl.store(loss, tl.sum(tl.where(weight != 0, weight * term, 0.0)))
        if divisor is not None:
            tl.store(divisor, over)


@triton.jit
def count_rows(
    count, target, stride, rows, ignore_index, TARGET: tl.constexpr, COUNT_ROWS: tl.constexpr
):
    """The number of rows that are not ignored: all, ``count``, or counted here if rows are few."""
    if TARGET == "probability" or TARGET is None:
        found = rows.to(tl.float32)
    elif count is not None:
        found = tl.load(count)
    else:
        row = tl.arange(0, COUNT_ROWS)
        index = tl.load(target + row.to(tl.int64) * stride, row < rows, ignore_index)
        found = tl.sum((index != ignore_index).to(tl.float32))
    return found
