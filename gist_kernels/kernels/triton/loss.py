"""The interaction loss on GPUs: Triton kernels, and the launches that serve a call.

For one row, let a be the class token's logits, b the Gist token's, x = a - max(a) and
z = b - max(b). S is a sum over the classes::

    p = exp(x / T) / S_p        d = log(p / q) = (x - z) / T - log(S_p / S_q)
    q = exp(z / T) / S_q        KL(p || q) = sum p phi(d),  KL(q || p) = sum q phi(-d)

where phi(d) = exp(-d) - 1 + d >= 0. Both p and q sum to 1, so this is sum p d; but no summand is
negative, so nothing cancels where p is close to q, and an error of log(S_p / S_q) enters squared.
Maxima and sums stay apart: a - max(a) is exact where a - logsumexp(a) has lost every digit to a
common offset. Where T is 1, 2, 3 or 4, exp(x) is the T-th power of exp(x / T). Where the Gist side
has a temperature of its own, z is multiplied by T over that one in p, q and d.

Three regimes, by the number of classes alone:

- few classes: many rows per program;
- up to some thousands: one row per program, both sides held in registers and read once;
- above: a row is cut into chunks, each treated as a row, and merged by the chain rule
  KL(p || q) = sum_c P_c KL(p | c || q | c) + KL(P || Q), with P and Q the chunks' masses, in which
  again nothing cancels.

The backward pass is element-wise, given nine numbers per row. The last program to finish sums the
batch, in the order of the rows: one launch, no float atomics, the same bits every time.

Shapes: B rows, C classes, K chunks of a row, P programs that sum up rows. Statistics, terms and
losses are float32. Optional tensors are None if absent. The number of classes and the row strides
come in units of ALIGN elements, see :func:`gist_kernels.kernels.triton.launch.alignment`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import heuristics, launch
from gist_kernels.kernels.triton.loss_rows import (
    close_rows,
    count_rows,
    expected,
    gist_exponentials,
    is_skipped,
    log_ratio,
    means,
    row_targets,
    store_gradients,
    tile_gradients,
)
from gist_kernels.kernels.triton.rows import address, exponentials, load_logits, row_max

NAME = "triton"
MIXED_DTYPES = True
AHEAD = 0  # the host would wait to see an upstream gradient of 1

# The forward pass keeps nine float32 numbers per row, side by side: for each side the
# maximum, the sum of exp(x / T) and the sum of exp(x); E_p[d] and E_q[d]; the target's total. One
# more number ends `stats`, the divisor of a mean. A chunk leaves the same nine numbers, and three
# for its share of the terms.
STATS = 9
PARTIALS = 12

# Sizes and strides. Kernels are specialised only on ALIGN, the power of two that divides them all.
_SIZES = (
    "rows", "classes", "class_units", "stride_a", "stride_b", "target_stride", "d_stride",
    "grad_stride", "scale_stride", "ignore_index",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _count_kernel(
    target,  # (B,) class indices
    count,  # written: ()
    rows,
    target_stride,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Count the rows that are not ignored, in one program."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        index = tl.load(target + row.to(tl.int64) * target_stride, row < rows, ignore_index)
        found += (index != ignore_index).to(tl.int32)
    tl.store(count, tl.sum(found).to(tl.float32))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    a, b,  # (B, C)
    target, row_scale,  # (B,) class indices or (B, C) probabilities; (B,)
    loss, terms, stats,  # written: () or (B,), (4,) or (4, B), (STATS B + 1,)
    sums, counter,  # written, of the batch, if it is reduced: (5 P,), ()
    partials,  # written instead of the five above where K > 1: (PARTIALS K B,)
    d_a, d_b,  # written: (B, C)
    count,  # () rows that count; None: all do, or programs count them
    rows, target_stride, scale_stride, class_units, stride_a, stride_b, d_stride,
    tempered_scale, inverse_t,  # log2(e) / T, 1 / T
    gist_scale, smoothing, ignore_index,
    weights, kl_weights,  # of the four terms; of the KL terms' gradients
    ALIGN: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, SLOPES: tl.constexpr,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, COUNT_ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile of logits; for whole rows also the loss and, if asked, gradients."""
    classes = class_units * ALIGN
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    row = program * ROWS + tl.arange(0, ROWS)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    index, kept, outside, scale = row_targets(
        target, target_stride, row_scale, scale_stride, row, inside, classes, ignore_index, TARGET
    )
    if is_skipped(row_scale, scale_stride, program, ROWS):
        zero = tl.zeros([ROWS], tl.float32)
        if partials is None:
            close_rows(
                row, inside, kept, outside, scale,
                (zero, zero, zero, zero, zero, zero, zero, zero, zero), zero, zero, zero, zero,
                weights, loss, terms, stats, sums, counter, rows, program, tl.num_programs(0),
                TARGET, REDUCTION, STATS,
            )  # fmt: skip
        none = tl.zeros([ROWS, BLOCK], tl.float32)
        mask = (column < classes)[None, :]
        store_gradients(d_a, d_b, row, d_stride, column, mask, none, none, ALIGN)
        return
    mask = kept[:, None] & (column < classes)[None, :]
    x = load_logits(address(a, row, stride_a, column, ALIGN), mask)
    z = load_logits(address(b, row, stride_b, column, ALIGN), mask)
    max_a = row_max(x)
    max_b = row_max(z)
    x -= max_a[:, None]
    z -= max_b[:, None]

    tempered_a, plain_a = exponentials(x, tempered_scale, POWER)
    level, tempered_b, plain_b = gist_exponentials(z, gist_scale, tempered_scale, POWER, SCALED)
    # 1 for rows that don't count, so that they yield no nan.
    sum_p = tl.where(kept, tl.sum(tempered_a, 1), 1.0)
    sum_q = tl.where(kept, tl.sum(tempered_b, 1), 1.0)
    sum_a = tl.full([ROWS], 1.0, tl.float32)
    sum_b = tl.full([ROWS], 1.0, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked_a = tl.zeros([ROWS], tl.float32)
    picked_b = tl.zeros([ROWS], tl.float32)
    if TARGET is not None:
        sum_a = tl.where(kept, tl.sum(plain_a, 1), 1.0)
        sum_b = tl.where(kept, tl.sum(plain_b, 1), 1.0)
    rest = smoothing / classes
    y = expected(target, target_stride, row, index, column, mask, rest, smoothing, TARGET)
    if TARGET == "probability":
        counts = mask & (y != 0)
        picked_a = tl.sum(tl.where(counts, y * x, 0.0), 1)
        picked_b = tl.sum(tl.where(counts, y * z, 0.0), 1)
        total = tl.sum(tl.where(mask, y, 0.0), 1)
    elif TARGET is not None:
        here = kept & ~outside & (index // BLOCK == chunk)
        total = tl.where(here, 1.0, 0.0)
        if ROWS == 1:
            at = row.to(tl.int64) * ALIGN
            picked_a = tl.load(a + at * stride_a + index, here, 0.0).to(tl.float32) - max_a
            picked_b = tl.load(b + at * stride_b + index, here, 0.0).to(tl.float32) - max_b
            picked_a = tl.where(here, picked_a, 0.0)
            picked_b = tl.where(here, picked_b, 0.0)
        else:
            hit = column[None, :] == index[:, None]
            picked_a = tl.sum(tl.where(hit, x, 0.0), 1)
            picked_b = tl.sum(tl.where(hit, z, 0.0), 1)
        if TARGET == "smoothed":
            total = total * (1 - smoothing) + rest * tl.minimum(classes - chunk * BLOCK, BLOCK)
            picked_a = picked_a * (1 - smoothing) + rest * tl.sum(tl.where(mask, x, 0.0), 1)
            picked_b = picked_b * (1 - smoothing) + rest * tl.sum(tl.where(mask, z, 0.0), 1)

    d = log_ratio(x, level, sum_p, sum_q, inverse_t)
    mean_p, mean_q, change = means(tempered_a, tempered_b, sum_p, sum_q, d)
    row_stats = (max_a, max_b, sum_p, sum_q, sum_a, sum_b, mean_p, mean_q, total)
    if partials is not None:
        step = rows.to(tl.int64) * tl.num_programs(1)
        at = partials + chunk * rows.to(tl.int64) + row
        for k in tl.static_range(STATS):
            tl.store(at + k * step, row_stats[k], inside)
        tl.store(at + STATS * step, change, inside)
        tl.store(at + (STATS + 1) * step, picked_a, inside)
        tl.store(at + (STATS + 2) * step, picked_b, inside)
    else:
        close_rows(
            row, inside, kept, outside, scale, row_stats,
            mean_p + change, -mean_q - change, picked_a, picked_b, weights,
            loss, terms, stats, sums, counter, rows, program, tl.num_programs(0),
            TARGET, REDUCTION, STATS,
        )  # fmt: skip

    if d_a is not None:
        upstream = tl.full([ROWS], 1.0, tl.float32)
        if REDUCTION == "mean":
            upstream /= count_rows(
                count, target, target_stride, rows, ignore_index, TARGET, COUNT_ROWS
            )
        # A zero that the compiler can't fold. It then recomputes the exponentials; otherwise it
        # would hold five values per class in registers across the sums above.
        zero = tl.minimum(sum_p, 0.0)[:, None]
        x += zero
        z += zero
        tempered_a, plain_a = exponentials(x, tempered_scale, POWER)
        level, tempered_b, plain_b = gist_exponentials(z, gist_scale, tempered_scale, POWER, SCALED)
        d = log_ratio(x, level, sum_p, sum_q, inverse_t)
        p = tempered_a * (1 / sum_p)[:, None]
        q = tempered_b * (1 / sum_q)[:, None]
        upstream = tl.where(kept, tl.where(outside, float("nan"), upstream * scale), 0.0)
        grad_a, grad_b = tile_gradients(
            p, q, d, plain_a, plain_b, y, mean_p, mean_q, total / sum_a, total / sum_b,
            upstream, inverse_t, weights, kl_weights, TARGET, SLOPES,
        )  # fmt: skip
        mask = inside[:, None] & (column < classes)[None, :]
        store_gradients(d_a, d_b, row, d_stride, column, mask, grad_a, grad_b, ALIGN)


@triton.jit(do_not_specialize=_SIZES)
def _combine_kernel(
    partials,  # (PARTIALS K B,)
    target, row_scale,  # (B,) class indices or (B, C) probabilities; (B,)
    loss, terms, stats,  # written: () or (B,), (4,) or (4, B), (STATS B + 1,)
    sums, counter,  # written, of the batch, if it is reduced: (5 P,), ()
    rows, classes, target_stride, scale_stride, inverse_t, gist_scale, ignore_index, weights,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of rows, from those of their chunks."""
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    _, kept, outside, scale = row_targets(
        target, target_stride, row_scale, scale_stride, row, inside, classes, ignore_index, TARGET
    )
    chunks = tl.cdiv(classes, CHUNK)
    chunk = tl.arange(0, BLOCK)
    # A row that doesn't count may have left nothing.
    mask = kept[:, None] & (chunk < chunks)[None, :]
    step = rows.to(tl.int64) * chunks
    at = partials + chunk[None, :] * rows.to(tl.int64) + row[:, None]
    max_a = tl.load(at, mask, 0.0)
    max_b = tl.load(at + step, mask, 0.0)
    sum_p = tl.load(at + 2 * step, mask, 0.0)
    sum_q = tl.load(at + 3 * step, mask, 0.0)
    sum_a = tl.load(at + 4 * step, mask, 0.0)
    sum_b = tl.load(at + 5 * step, mask, 0.0)
    mean_p = tl.load(at + 6 * step, mask, 0.0)
    mean_q = tl.load(at + 7 * step, mask, 0.0)
    total = tl.load(at + 8 * step, mask, 0.0)
    change = tl.load(at + 9 * step, mask, 0.0)
    picked_a = tl.load(at + 10 * step, mask, 0.0)
    picked_b = tl.load(at + 11 * step, mask, 0.0)

    top_a, x, mass_a, all_p, all_a = _masses(max_a, sum_p, sum_a, inverse_t)
    top_b, z, mass_b, all_q, all_b = _masses(max_b, sum_q, sum_b, inverse_t * gist_scale)
    d = (x - z * gist_scale) * inverse_t + tl.log(sum_p / sum_q) - tl.log(all_p / all_q)[:, None]
    all_mean_p, all_mean_q, all_change = means(mass_a, mass_b, all_p, all_q, d)
    # A chunk that one side masks has no d of its own to add: the divergence is infinite already.
    share_p = tl.where(sum_q > 0, mass_a / all_p[:, None], 0.0)
    share_q = tl.where(sum_p > 0, mass_b / all_q[:, None], 0.0)
    all_mean_p += _weighted_sum(share_p, mean_p)
    all_mean_q += _weighted_sum(share_q, mean_q)
    kl_pq = all_mean_p + all_change + _weighted_sum(share_p, change)
    kl_qp = -all_mean_q - all_change - _weighted_sum(share_q, change)
    total_y = tl.sum(total, 1)
    row_stats = (top_a, top_b, all_p, all_q, all_a, all_b, all_mean_p, all_mean_q, total_y)
    picked_a = tl.sum(picked_a + total * (max_a - top_a[:, None]), 1)
    picked_b = tl.sum(picked_b + total * (max_b - top_b[:, None]), 1)
    close_rows(
        row, inside, kept, outside, scale, row_stats, kl_pq, kl_qp, picked_a, picked_b, weights,
        loss, terms, stats, sums, counter, rows, program, tl.num_programs(0),
        TARGET, REDUCTION, STATS,
    )  # fmt: skip


@triton.jit
def _weighted_sum(weight, x):
    return tl.sum(tl.where(weight > 0, weight * x, 0.0), 1)


@triton.jit
def _masses(tops, tempered, plain, inverse_t):
    """One side of a row, from its chunks.

    Returns the row's maximum; the chunks' maxima less the row's; the chunks' sums of exp(x / T)
    relative to the row's maximum; the row's sum of exp(x / T); the row's sum of exp(x).
    """
    # A chunk whose classes are all masked has sums of 0.
    tops = tl.where(tempered > 0, tops, -float("inf"))
    top = row_max(tops)
    x = tops - top[:, None]
    mass = tempered * tl.exp(x * inverse_t)
    return top, x, mass, tl.sum(mass, 1), tl.sum(plain * tl.exp(x), 1)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad,  # () or (B,); None for 1
    a, b,  # (B, C)
    target, row_scale,  # (B,) class indices or (B, C) probabilities; (B,)
    stats,  # (STATS B + 1,)
    d_a, d_b,  # written: (B, C)
    rows, target_stride, scale_stride, grad_stride, class_units, stride_a, stride_b, d_stride,
    tempered_scale, inverse_t,  # log2(e) / T, 1 / T
    gist_scale, smoothing, ignore_index,
    weights, kl_weights,  # of the four terms; of the KL terms' gradients
    ALIGN: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, SLOPES: tl.constexpr,
    TARGET: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of logits, from the statistics of its rows."""
    classes = class_units * ALIGN
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    index, kept, outside, scale = row_targets(
        target, target_stride, row_scale, scale_stride, row, inside, classes, ignore_index, TARGET
    )
    if is_skipped(row_scale, scale_stride, program, ROWS):
        none = tl.zeros([ROWS, BLOCK], tl.float32)
        mask = (column < classes)[None, :]
        store_gradients(d_a, d_b, row, d_stride, column, mask, none, none, ALIGN)
        return
    mask = kept[:, None] & (column < classes)[None, :]
    x = load_logits(address(a, row, stride_a, column, ALIGN), mask)
    z = load_logits(address(b, row, stride_b, column, ALIGN), mask)

    at = stats + row.to(tl.int64) * STATS
    x -= tl.load(at, kept, 1.0)[:, None]
    z -= tl.load(at + 1, kept, 1.0)[:, None]
    sum_p = tl.load(at + 2, kept, 1.0)
    sum_q = tl.load(at + 3, kept, 1.0)
    sum_a = tl.load(at + 4, kept, 1.0)
    sum_b = tl.load(at + 5, kept, 1.0)
    mean_p = tl.load(at + 6, kept, 1.0)
    mean_q = tl.load(at + 7, kept, 1.0)
    total = tl.load(at + 8, kept, 1.0)
    upstream = tl.full([ROWS], 1.0, tl.float32) / tl.load(stats + STATS * rows.to(tl.int64))
    if grad is not None:
        upstream *= tl.load(grad + row.to(tl.int64) * grad_stride, kept, 0.0)
    upstream = tl.where(kept, tl.where(outside, float("nan"), upstream * scale), 0.0)

    tempered_a, plain_a = exponentials(x, tempered_scale, POWER)
    z, tempered_b, plain_b = gist_exponentials(z, gist_scale, tempered_scale, POWER, SCALED)
    rest = smoothing / classes
    grad_a, grad_b = tile_gradients(
        tempered_a * (1 / sum_p)[:, None], tempered_b * (1 / sum_q)[:, None],
        log_ratio(x, z, sum_p, sum_q, inverse_t), plain_a, plain_b,
        expected(target, target_stride, row, index, column, mask, rest, smoothing, TARGET),
        mean_p, mean_q, total / sum_a, total / sum_b, upstream, inverse_t, weights, kl_weights,
        TARGET, SLOPES,
    )  # fmt: skip
    mask = inside[:, None] & (column < classes)[None, :]
    store_gradients(d_a, d_b, row, d_stride, column, mask, grad_a, grad_b, ALIGN)


def stats_shape(rows: int) -> tuple[int]:
    return (STATS * rows + 1,)


def forward(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool = True,
    row_scale: torch.Tensor | None = None,
    stateless: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The loss, the four unweighted terms, and the statistics that :func:`backward` needs.

    A ``stateless`` call leaves no tensor behind for later calls.
    """
    rows, classes = cls.shape
    stats = torch.empty(stats_shape(rows), dtype=torch.float32, device=cls.device)
    loss, terms = _outputs(cls, options, want_terms)
    if rows:
        probabilities = target is not None and target.dtype != torch.int64
        tile = heuristics.forward(classes, probabilities)
        with launch.on(cls.device):
            _forward(
                cls, gist, target, row_scale, options, tile, loss, terms, stats, None, None,
                stateless,
            )  # fmt: skip
    return loss, terms, stats


def backward(
    grad: torch.Tensor | None,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    stats: torch.Tensor,
    options: LossOptions,
    need_cls: bool,
    need_gist: bool,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the sides that need one; ``grad`` is the gradient of the loss, None for 1."""
    rows, classes = cls.shape
    d_cls, d_gist = _empty_gradients(cls, gist, need_cls, need_gist, in_place)
    if rows and (need_cls or need_gist):
        tile = heuristics.backward(classes)
        with launch.on(cls.device):
            _backward_kernel[(tile.programs(rows), tile.chunks(classes))](
                grad, cls, gist, target, row_scale, stats, d_cls, d_gist, rows,
                0 if target is None else target.stride(0),
                0 if row_scale is None else row_scale.stride(0),
                0 if grad is None or grad.ndim == 0 else grad.stride(0),
                **_settings(cls, gist, d_cls if need_cls else d_gist, target, options, tile),
            )  # fmt: skip
    return d_cls, d_gist


def forward_backward(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The loss and both gradients. A row that fits into registers is read once."""
    rows, classes = cls.shape
    tile = heuristics.kept(classes)
    if tile is None:
        loss, _, stats = forward(cls, gist, target, options, False, row_scale)
        gradients = backward(
            None, cls, gist, target, stats, options, True, True, row_scale, in_place
        )
        return loss, *gradients
    loss, _ = _outputs(cls, options, False)
    gradients = _empty_gradients(cls, gist, True, True, in_place)
    if rows:
        with launch.on(cls.device):
            _forward(cls, gist, target, row_scale, options, tile, loss, None, None, *gradients)
    return loss, *gradients


def _outputs(
    cls: torch.Tensor, options: LossOptions, want_terms: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tensors for the loss and the terms. Without rows to compute, they hold the results."""
    rows = cls.shape[0]
    each = (rows,) if options.reduction == "none" else ()
    loss = torch.empty(each, dtype=torch.float32, device=cls.device)
    terms = torch.empty((4, *each), dtype=torch.float32, device=cls.device) if want_terms else None
    if rows == 0:
        for result in (loss, terms):
            if result is not None:
                result.fill_(float("nan") if options.reduction == "mean" else 0.0)
    return loss, terms


def _forward(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    options: LossOptions,
    tile: heuristics.Tile,
    loss: torch.Tensor,
    terms: torch.Tensor | None,
    stats: torch.Tensor | None,
    d_cls: torch.Tensor | None,
    d_gist: torch.Tensor | None,
    stateless: bool = False,
) -> None:
    rows, classes = cls.shape
    reduction, device = options.reduction, cls.device
    chunks = tile.chunks(classes)
    last = tile if chunks == 1 else heuristics.combine(chunks)
    sums = counter = partials = count = None
    if reduction != "none":
        sums = torch.empty(5 * last.programs(rows), dtype=torch.float32, device=device)
        counter = _counter(device, stateless)
    if chunks > 1:
        partials = torch.empty(PARTIALS * rows * chunks, dtype=torch.float32, device=device)
    target_stride = 0 if target is None else target.stride(0)
    scale_stride = 0 if row_scale is None else row_scale.stride(0)
    settings = _settings(cls, gist, d_cls, target, options, tile)
    counts = reduction == "mean" and settings["TARGET"] in ("index", "smoothed")
    if d_cls is not None and counts and rows > heuristics.COUNT_INLINE:
        count = torch.empty((), dtype=torch.float32, device=device)
        _count_kernel[(1,)](
            target, count, rows, target_stride, options.ignore_index,
            heuristics.COUNT_BLOCK, enable_fp_fusion=True,
        )  # fmt: skip

    _forward_kernel[(tile.programs(rows), chunks)](
        cls, gist, target, row_scale, loss, terms, stats, sums, counter, partials, d_cls, d_gist,
        count, rows, target_stride, scale_stride, REDUCTION=reduction,
        COUNT_ROWS=heuristics.COUNT_INLINE, **settings,
    )  # fmt: skip
    if chunks > 1:
        _combine_kernel[(last.programs(rows),)](
            partials, target, row_scale, loss, terms, stats, sums, counter, rows, classes,
            target_stride, scale_stride, settings["inverse_t"], options.gist_scale,
            options.ignore_index, settings["weights"], settings["TARGET"], reduction, STATS,
            tile.block, **last.meta(launch.warp_size(device)),
        )  # fmt: skip


def _settings(
    cls: torch.Tensor,
    gist: torch.Tensor,
    gradient: torch.Tensor | None,
    target: torch.Tensor | None,
    options: LossOptions,
    tile: heuristics.Tile,
) -> dict[str, Any]:
    kind = None
    if target is not None:
        kind = "index" if target.dtype == torch.int64 else "probability"
    strides = cls.stride(0), gist.stride(0), 0 if gradient is None else gradient.stride(0)
    warp_size = launch.warp_size(cls.device)
    return _cached_settings(cls.shape[1], strides, kind, options, tile, warp_size)


@lru_cache(maxsize=1024)
def _cached_settings(
    classes: int,
    strides: tuple[int, int, int],
    kind: str | None,
    options: LossOptions,
    tile: heuristics.Tile,
    warp_size: int,
) -> dict[str, Any]:
    """Arguments of both kernels that are no tensors and don't depend on the number of rows."""
    if kind == "index" and options.label_smoothing:
        kind = "smoothed"
    temperature, gist_scale = options.temperature, options.gist_scale
    from_p, from_q, to_q, to_p = options.kl_gradient_weights()
    align = launch.alignment(classes, *strides[:2])
    return {
        "class_units": classes // align,
        "stride_a": strides[0] // align,
        "stride_b": strides[1] // align,
        "d_stride": strides[2] // align,
        "tempered_scale": 1.4426950408889634 / temperature,
        "inverse_t": 1 / temperature,
        "gist_scale": gist_scale,
        "smoothing": options.label_smoothing,
        "ignore_index": options.ignore_index,
        "weights": options[1:5],
        "kl_weights": (from_p, from_q * gist_scale, to_q * gist_scale, to_p),
        "ALIGN": align,
        "POWER": int(temperature) if temperature in (1.0, 2.0, 3.0, 4.0) else 0,
        "SCALED": gist_scale != 1,
        "SLOPES": from_p != 0 or from_q != 0,
        "TARGET": kind,
        "STATS": STATS,
        **tile.meta(warp_size),
    }


def _empty_gradients(
    cls: torch.Tensor, gist: torch.Tensor, need_cls: bool, need_gist: bool, in_place: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One tensor where both sides are the halves of one (B, 2, C) tensor; or the logits."""
    rows, classes = cls.shape
    if in_place:  # a program has read its tile before it writes there
        if cls.stride(0) != gist.stride(0):
            raise ValueError("gradients in place need one stride for both logits")
        return cls if need_cls else None, gist if need_gist else None
    if need_cls and need_gist and cls.dtype is gist.dtype:
        apart = gist.data_ptr() - cls.data_ptr()
        if cls.stride(0) == gist.stride(0) == 2 * classes and apart == classes * cls.itemsize:
            both = torch.empty((rows, 2, classes), dtype=cls.dtype, device=cls.device)
            return both[:, 0], both[:, 1]
    d_cls = torch.empty((rows, classes), dtype=cls.dtype, device=cls.device) if need_cls else None
    d_gist = (
        torch.empty((rows, classes), dtype=gist.dtype, device=cls.device) if need_gist else None
    )
    return d_cls, d_gist


_counters: dict[tuple[int | None, int], torch.Tensor] = {}


def _counter(device: torch.device, stateless: bool) -> torch.Tensor:
    """A zero with which the programs of one launch count themselves. The last one resets it.

    Launches on one stream run one after the other and share a counter. A captured graph may be
    replayed on any stream, beside any launch. It gets its own counter, which the graph zeroes. So
    does a ``stateless`` call: compiled code is run once outside a capture, but with the memory of
    the graph that follows.
    """
    stream = 0
    if device.type == "cuda":
        stateless = stateless or torch.cuda.is_current_stream_capturing()
        if not stateless:
            stream = triton.runtime.driver.active.get_current_stream(device.index)
    if stateless:
        return torch.zeros((), dtype=torch.int32, device=device)
    key = device.index, stream
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros((), dtype=torch.int32, device=device)
    return counter
