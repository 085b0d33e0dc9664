"""The Jensen-Shannon divergence on GPUs.

With p_k the softmax of side k at its temperature T_k, w_k its weight and m = sum w_k p_k::

    JSD = sum_k w_k KL(p_k || m)      d JSD / d logits_k = w_k / T_k p_k (l_k - sum p_k l_k)

where l_k = log(p_k / m). Class by class, it comes from o_k = log p_k - log b of some base b, as
l_k = o_k - log1p(y) with y = m / b - 1. Where the sides are alike, b is the first side's
probability, o_k the difference of two logits and y = sum w_k expm1(o_k): nothing cancels, and an
error of the log-sum-exps shifts all l_k alike. Elsewhere b is the largest of the probabilities. The
divergence is summed as p_k (exp(-l_k) - 1 + l_k), of which no summand is negative.

A program of the forward pass takes a row: in registers, or, where it is too long, block by block,
twice. The backward pass is element-wise, given three numbers per side of each row.

Shapes: B rows, C classes. An absent ``row_scale`` is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import heuristics, launch

NAME = "triton"
# What the forward pass keeps of a side: its maximum, the sum of exp((x - max) / T), its KL.
STATS = 3


@triton.jit
def _side(sides, strides, row, column, mask, k: tl.constexpr):
    """A block of one side's logits. What is masked is -inf: a class that adds nothing."""
    at = sides[k] + row.to(tl.int64) * strides[k] + column
    return tl.load(at, mask, -float("inf")).to(tl.float32)


@triton.jit
def _load(sides, strides, row, column, mask, SIDES: tl.constexpr):
    xs = ()
    for k in tl.static_range(SIDES):
        xs = xs + (_side(sides, strides, row, column, mask, k),)  # noqa: RUF005
    return xs


@triton.jit
def _exp_tail(x, FIRST: tl.constexpr):
    """sum of x^i / ((FIRST + 1) ... (FIRST + i)): exp without its first terms, for |x| <= 1/2."""
    total = 1.0 + x * (1 / (FIRST + 8))
    for i in tl.static_range(7):
        total = 1.0 + total * x * (1 / (FIRST + 7 - i))
    return total


@triton.jit
def _log1p(y):
    """log(1 + y), with the relative precision of y where it is small."""
    s = y / (2 + y)
    square = s * s
    series = square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    return tl.where(tl.abs(y) < 0.25, 2 * (s + s * series), tl.log(1 + y))


@triton.jit
def _logarithms(xs, tops, sums, weights, inverse_ts, ratios, SIDES: tl.constexpr):
    """Of a block of classes: every p_k, every l_k = log(p_k / m), and m."""
    first = xs[0] - tops[0]
    highest_p = tl.zeros_like(first)
    highest_log = highest_p - float("inf")
    far_mean = highest_p
    near_mean = highest_p
    near = highest_p == 0
    ps = ()
    logs = ()
    offsets = ()
    for k in tl.static_range(SIDES):
        x = xs[k] - tops[k]
        p = tl.exp2(x * (inverse_ts[k] * 1.4426950408889634)) / sums[k]
        log = x * inverse_ts[k] - tl.log(sums[k])
        offset = tl.zeros_like(x)
        if k > 0:
            # Divided, so that equal sides give exactly 0.
            offset = (x * ratios[k] - first) * inverse_ts[0] - tl.log(sums[k] / sums[0])
            near_mean += weights[k] * (offset * _exp_tail(offset, 1))
        near = near & (tl.abs(offset) < 0.5)
        far_mean += weights[k] * p
        highest_p = tl.maximum(highest_p, p)
        highest_log = tl.maximum(highest_log, log)
        ps = ps + (p,)  # noqa: RUF005
        logs = logs + (log,)  # noqa: RUF005
        offsets = offsets + (offset,)  # noqa: RUF005
    y = tl.where(near, near_mean, far_mean / highest_p - 1)
    log_mean = _log1p(y)
    ls = ()
    for k in tl.static_range(SIDES):
        l = tl.where(near, offsets[k], logs[k] - highest_log) - log_mean  # noqa: E741
        ls = ls + (l,)  # noqa: RUF005
    return ps, ls, tl.where(near, ps[0] + ps[0] * y, far_mean)


@triton.jit
def _terms(xs, tops, sums, weights, inverse_ts, ratios, SIDES: tl.constexpr):
    """A block's share of each side's KL, in the first of 8 numbers, and of the divergence."""
    ps, ls, m = _logarithms(xs, tops, sums, weights, inverse_ts, ratios, SIDES)
    side = tl.arange(0, 8)
    means = tl.zeros([8], tl.float32)
    divergence = 0.0
    for k in tl.static_range(SIDES):
        p = ps[k]
        l = ls[k]  # noqa: E741
        # Probability 0 adds 0 whatever its logarithm.
        product = tl.where(p != 0, p * l, 0.0)
        means += tl.where(side == k, tl.sum(product, 0), 0.0)
        series = p * l * l * 0.5 * _exp_tail(-l, 2)
        term = tl.where(tl.abs(l) < 0.5, series, product + (m - p))
        divergence += weights[k] * tl.sum(term, 0)
    return means, divergence


@triton.jit
def _forward_kernel(
    sides,  # a tuple of SIDES logits (B, C)
    row_scale,  # (B,)
    loss, stats,  # written: (B,), (B, SIDES, STATS)
    strides, scale_stride, classes,
    weights, inverse_ts, ratios,  # a number per side: w_k, 1 / T_k, T_0 / T_k
    SIDES: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's divergence and statistics."""
    row = tl.program_id(0)
    scale = 1.0
    if row_scale is not None:
        scale = tl.load(row_scale + row.to(tl.int64) * scale_stride)
        if scale == 0:  # nothing of it is looked at
            tl.store(loss + row, 0.0)
            return
    column = tl.arange(0, BLOCK)
    tops = ()
    sums = ()
    if WHOLE:
        xs = _load(sides, strides, row, column, column < classes, SIDES)
        for k in tl.static_range(SIDES):
            top = tl.max(xs[k], 0)
            total = tl.sum(tl.exp2((xs[k] - top) * (inverse_ts[k] * 1.4426950408889634)), 0)
            tops = tops + (top,)  # noqa: RUF005
            sums = sums + (total,)  # noqa: RUF005
        means, divergence = _terms(xs, tops, sums, weights, inverse_ts, ratios, SIDES)
    else:
        for k in tl.static_range(SIDES):
            highest = tl.full([BLOCK], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, classes, BLOCK):
                x = _side(sides, strides, row, start + column, start + column < classes, k)
                # A nan stays one: it is larger than nothing, and not less.
                above = tl.where(x > highest, x, highest)
                above = tl.where(x == x, above, x)
                exponent = inverse_ts[k] * 1.4426950408889634
                seen = tl.where(total > 0, total * tl.exp2((highest - above) * exponent), 0.0)
                new = tl.where(x == -float("inf"), 0.0, tl.exp2((x - above) * exponent))
                total = seen + new
                highest = above
            top = tl.max(highest, 0)
            exponent = inverse_ts[k] * 1.4426950408889634
            total = tl.where(total == 0, 0.0, total * tl.exp2((highest - top) * exponent))
            tops = tops + (top,)  # noqa: RUF005
            sums = sums + (tl.sum(total, 0),)  # noqa: RUF005
        means = tl.zeros([8], tl.float32)
        divergence = 0.0
        for start in range(0, classes, BLOCK):
            mask = start + column < classes
            xs = _load(sides, strides, row, start + column, mask, SIDES)
            more, term = _terms(xs, tops, sums, weights, inverse_ts, ratios, SIDES)
            means += more
            divergence += term
    tl.store(loss + row, divergence * scale)
    if stats is not None:
        at = stats + row.to(tl.int64) * (SIDES * STATS)
        for k in tl.static_range(SIDES):
            tl.store(at + k * STATS, tops[k])
            tl.store(at + k * STATS + 1, sums[k])
        side = tl.arange(0, 8)
        tl.store(at + side * STATS + 2, means, side < SIDES)


@triton.jit
def _backward_kernel(
    grad,  # (B,)
    sides,  # a tuple of SIDES logits (B, C)
    row_scale,  # (B,)
    stats,  # (B, SIDES, STATS)
    gradients,  # a tuple, written where NEEDS says so: (B, C)
    strides, scale_stride, grad_stride, classes,
    weights, inverse_ts, ratios,  # a number per side: w_k, 1 / T_k, T_0 / T_k
    SIDES: tl.constexpr, NEEDS: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of a row, from the row's statistics; NEEDS has a bit for each side."""
    chunks = tl.cdiv(classes, BLOCK)
    program = tl.program_id(0)
    row = program // chunks
    column = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < classes
    here = row.to(tl.int64) * classes + column
    upstream = tl.load(grad + row.to(tl.int64) * grad_stride)
    if row_scale is not None:
        scale = tl.load(row_scale + row.to(tl.int64) * scale_stride)
        upstream *= scale
        if scale == 0:
            for k in tl.static_range(SIDES):
                if (NEEDS >> k) % 2 == 1:
                    none = tl.zeros([BLOCK], tl.float32).to(gradients[k].dtype.element_ty)
                    tl.store(gradients[k] + here, none, mask)
            return
    at = stats + row.to(tl.int64) * (SIDES * STATS)
    tops = ()
    sums = ()
    for k in tl.static_range(SIDES):
        tops = tops + (tl.load(at + k * STATS),)  # noqa: RUF005
        sums = sums + (tl.load(at + k * STATS + 1),)  # noqa: RUF005
    xs = _load(sides, strides, row, column, mask, SIDES)
    ps, ls, _ = _logarithms(xs, tops, sums, weights, inverse_ts, ratios, SIDES)
    for k in tl.static_range(SIDES):
        if (NEEDS >> k) % 2 == 1:
            factor = upstream * weights[k] * inverse_ts[k]
            mean = tl.load(at + k * STATS + 2)
            gradient = tl.where(ps[k] != 0, ps[k] * (ls[k] - mean) * factor, 0.0)
            tl.store(gradients[k] + here, gradient.to(gradients[k].dtype.element_ty), mask)


def stats_shape(rows: int, sides: int) -> tuple[int, int, int]:
    return rows, sides, STATS


def forward(
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's divergence, and the statistics that :func:`backward` needs."""
    rows, classes = sides[0].shape
    device = sides[0].device
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    stats = torch.empty(stats_shape(rows, len(sides)), dtype=torch.float32, device=device)
    if rows:
        tile = heuristics.divergence_forward(classes, len(sides))
        with launch.on(device):
            _forward_kernel[(rows,)](
                tuple(sides), row_scale, loss, stats,
                **_settings(sides, weights, temperatures, row_scale),
                WHOLE=classes <= tile.block,
                **heuristics.divergence_meta(tile, launch.warp_size(device)),
            )  # fmt: skip
    return loss, stats


def backward(
    grad: torch.Tensor,
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    stats: torch.Tensor,
    needs: Sequence[bool],
    row_scale: torch.Tensor | None,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients asked for, each a tensor of its own, or that of the logits."""
    rows, classes = sides[0].shape
    device = sides[0].device
    if in_place and not all(side.is_contiguous() for side in sides):
        raise ValueError("gradients in place need contiguous logits")

    def gradient(side: torch.Tensor) -> torch.Tensor:
        return side if in_place else side.new_empty((rows, classes))

    found = tuple(gradient(side) if need else None for side, need in zip(sides, needs, strict=True))
    if rows and any(needs):
        tile = heuristics.divergence_backward(classes, len(sides))
        # Where none is needed, some address that nothing is written to.
        to = tuple(s if d is None else d for s, d in zip(sides, found, strict=True))
        with launch.on(device):
            _backward_kernel[(rows * tile.chunks(classes),)](
                grad, tuple(sides), row_scale, stats, to, grad_stride=grad.stride(0),
                **_settings(sides, weights, temperatures, row_scale),
                NEEDS=sum(bool(need) << k for k, need in enumerate(needs)),
                **heuristics.divergence_meta(tile, launch.warp_size(device)),
            )  # fmt: skip
    return found


def _settings(
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None,
) -> dict[str, Any]:
    return {
        "strides": tuple(side.stride(0) for side in sides),
        "scale_stride": 0 if row_scale is None else row_scale.stride(0),
        "classes": sides[0].shape[1],
        "weights": tuple(weights),
        "inverse_ts": tuple(1 / t for t in temperatures),
        "ratios": tuple(temperatures[0] / t for t in temperatures),
        "SIDES": len(sides),
        "STATS": STATS,
    }
