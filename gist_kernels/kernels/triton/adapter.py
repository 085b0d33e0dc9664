"""The parallel adapter, LayerNorm and residual of a sublayer on GPUs: Triton kernels, launches.

``forward`` is one launch: a program reads some rows of x and writes the outputs of LayerNorm and
the adapter for them. In ``backward`` every program walks through some rows and keeps its own sums
for the gradients of the weights. A second launch adds up these sums in a fixed order, so the bits
are the same every time. Rank and width select one of two regimes (``heuristics``):

- small ranks: a row stays in registers between its sums and the results computed from them. The
  rank is far below a tensor core's tile, so matmuls are sums across the row, like its mean;
- larger ranks: a row is read in chunks of features, a second time from the cache, and matmuls are
  ``tl.dot``. The weights' gradients are then too large for one multiprocessor's registers. A launch
  of their own computes them from the dz of the first launch; its programs divide the features.

Shapes: M rows, D features, R rank, P programs with sums of their own. z, dz, stats and partials are
float32. Optional tensors are None if absent. The number of features and the row strides come in
units of ALIGN elements, see :func:`gist_kernels.kernels.triton.launch.alignment`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gist_kernels.kernels.triton import heuristics, launch
from gist_kernels.kernels.triton.activation import activate, slope
from gist_kernels.weights import AdapterWeights, NormWeights

_SIZES = (
    "rows", "feature_units", "stride_x", "stride_add", "stride_out", "stride_normed", "each",
    "parts",
)  # fmt: skip


@triton.jit
def _tile(pointer, row, stride, column, mask, ALIGN: tl.constexpr):
    """A tile of rows in float32, 0 where masked. Offsets can exceed 2^31."""
    at = pointer + row.to(tl.int64)[:, None] * stride * ALIGN + column[None, :]
    return tl.load(at, mask, 0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, stride, column, mask, value, ALIGN: tl.constexpr):
    at = pointer + row.to(tl.int64)[:, None] * stride * ALIGN + column[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _down(weight, k, column, features, RANK: tl.constexpr):
    """A tile of Wd, ranks by features."""
    mask = (k < RANK)[:, None] & (column < features)[None, :]
    return tl.load(weight + k[:, None] * features + column[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _up(weight, k, column, features, RANK: tl.constexpr):
    """A tile of Wu^T, ranks by features. Wu is (D, R) in memory."""
    mask = (k < RANK)[:, None] & (column < features)[None, :]
    return tl.load(weight + column[None, :] * RANK + k[:, None], mask, 0.0).to(tl.float32)


@triton.jit
def _vector(pointer, index, mask, otherwise):
    """A weight or bias in float32; ``otherwise`` for an absent one."""
    value = otherwise
    if pointer is not None:
        value = tl.load(pointer + index, mask, 0.0).to(tl.float32)
    return value


@triton.jit
def _ranks(row, k, inside, RANK: tl.constexpr):
    """Offsets and mask of some rows of z or dz, which are contiguous."""
    at = row.to(tl.int64)[:, None] * RANK + k[None, :]
    return at, inside[:, None] & (k < RANK)[None, :]


@triton.jit
def _hidden(z, row, k, inside, total, down_bias, scale, RANK: tl.constexpr, KIND: tl.constexpr):
    """scale * act(z) for z = total + bd; stores z for the backward pass."""
    total += _vector(down_bias, k, k < RANK, 0.0)
    at, mask = _ranks(row, k, inside, RANK)
    tl.store(z + at, total, mask)
    return scale * activate(total, KIND)


@triton.jit
def _write_out(
    out, add,  # (M, D)
    x_tile, update,  # (ROWS, BLOCK)
    up_bias, bias,  # (D,)
    scale, row, stride_add, column, mask, features, feature_units,
    ADD_X: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store add + update + scale * bu + bias."""
    within = column < features
    update += scale * _vector(up_bias, column, within, 0.0) + _vector(bias, column, within, 0.0)
    if ADD_X:
        update += x_tile
    elif add is not None:
        update += _tile(add, row, stride_add, column, mask, ALIGN)
    _store(out, row, feature_units, column, mask, update, ALIGN)


@triton.jit
def _write_normed(
    normed,  # (M, D)
    xhat,  # (ROWS, BLOCK)
    norm_weight,  # (D,)
    norm_bias,  # (D,)
    row,
    column,
    mask,
    features,
    feature_units,
    ALIGN: tl.constexpr,
):
    within = column < features
    y = xhat * _vector(norm_weight, column, within, 1.0)
    y += _vector(norm_bias, column, within, 0.0)
    _store(normed, row, feature_units, column, mask, y, ALIGN)


@triton.jit
def _inverse_deviation(squares, features, eps):
    """1 / sqrt(variance + eps), correctly rounded; the variance is squares / features.

    NaN where the squares overflow; 0 would make the row look like one of zeros.
    """
    return tl.div_rn(1.0, tl.sqrt_rn(squares / features + eps)) + (squares - squares)


@triton.jit
def _write_stats(stats, row, inside, mean, rstd):
    at = stats + 2 * row.to(tl.int64)
    tl.store(at, mean, inside)
    tl.store(at + 1, rstd, inside)


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x, add,  # (M, D); with ADD_X, add is x
    down, down_bias, up, up_bias,  # (R, D), (R,), (D, R), (D,)
    bias, norm_weight, norm_bias,  # (D,)
    normed, out, z, stats,  # written: (M, D), (M, D), (M, R), (M, 2)
    rows, feature_units, stride_x, stride_add, scale, eps, each,
    ADD_X: tl.constexpr, ALIGN: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``each`` rows, one by one. The weights stay in registers; the next rows are prefetched."""
    features = feature_units * ALIGN
    column = tl.arange(0, BLOCK)
    mask = column < features
    k = tl.arange(0, RANKS)
    if out is not None:
        wd = _down(down, k, column, features, RANK)
        wu = _up(up, k, column, features, RANK)
        bd = _vector(down_bias, k, k < RANK, 0.0)
        constant = scale * _vector(up_bias, column, mask, 0.0) + _vector(bias, column, mask, 0.0)
    if normed is not None:
        gamma = _vector(norm_weight, column, mask, 1.0)
        beta = _vector(norm_bias, column, mask, 0.0)
    first = tl.program_id(0).to(tl.int64) * each
    for i in tl.range(0, tl.minimum(each, rows - first), num_stages=STAGES):
        row = first + i
        x_row = tl.load(x + row * stride_x * ALIGN + column, mask, 0.0).to(tl.float32)
        if out is not None:
            total = tl.sum(wd * x_row[None, :], 1) + bd
            tl.store(z + row * RANK + k, total, k < RANK)
            hidden = scale * activate(total, KIND)
            update = tl.sum(hidden[:, None] * wu, 0) + constant
            if ADD_X:
                update += x_row
            elif add is not None:
                at = add + row * stride_add * ALIGN + column
                update += tl.load(at, mask, 0.0).to(tl.float32)
            tl.store(out + row * features + column, update.to(out.dtype.element_ty), mask)
        if normed is not None:
            mean = tl.sum(x_row) / features
            centred = tl.where(mask, x_row - mean, 0.0)
            rstd = _inverse_deviation(tl.sum(centred * centred), features, eps)
            tl.store(stats + 2 * row, mean)
            tl.store(stats + 2 * row + 1, rstd)
            y = tl.fma(centred * rstd, gamma, beta)
            tl.store(normed + row * features + column, y.to(normed.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def _forward_chunks_kernel(
    x, add,  # (M, D); with ADD_X, add is x
    down, down_bias, up, up_bias,  # (R, D), (R,), (D, R), (D,)
    bias, norm_weight, norm_bias,  # (D,)
    normed, out, z, stats,  # written: (M, D), (M, D), (M, R), (M, 2)
    rows, feature_units, stride_x, stride_add, scale, eps,
    ADD_X: tl.constexpr, ALIGN: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for rows read in chunks: first their sums, then the outputs, chunk by chunk."""
    features = feature_units * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANKS)
    inside = row < rows
    total = tl.zeros([ROWS, RANKS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < features)[None, :]
        x_tile = _tile(x, row, stride_x, column, mask, ALIGN)
        if out is not None:
            wd = _down(down, k, column, features, RANK)
            total = tl.dot(x_tile, tl.trans(wd), total, input_precision=PRECISION)
        if normed is not None:
            # The chunk's mean and squares about it, merged with those of the previous chunks.
            count = tl.minimum(features - start, BLOCK)
            chunk_mean = tl.sum(x_tile, 1) / count
            centred = tl.where(mask, x_tile - chunk_mean[:, None], 0.0)
            apart = chunk_mean - mean
            share = count / (start + count)
            squares += tl.sum(centred * centred, 1) + apart * apart * (start * share)
            mean += apart * share
    hidden = total
    if out is not None:
        hidden = _hidden(z, row, k, inside, total, down_bias, scale, RANK, KIND)
    rstd = _inverse_deviation(squares, features, eps)
    if normed is not None:
        _write_stats(stats, row, inside, mean, rstd)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < features)[None, :]
        x_tile = _tile(x, row, stride_x, column, mask, ALIGN)
        if out is not None:
            wu = _up(up, k, column, features, RANK)
            update = tl.dot(hidden, wu, input_precision=PRECISION)
            _write_out(
                out, add, x_tile, update, up_bias, bias, scale, row, stride_add, column, mask,
                features, feature_units, ADD_X, ALIGN,
            )  # fmt: skip
        if normed is not None:
            _write_normed(
                normed, (x_tile - mean[:, None]) * rstd[:, None], norm_weight, norm_bias, row,
                column, mask, features, feature_units, ALIGN,
            )  # fmt: skip


@triton.jit
def _normalised(x_tile, stats, row, inside, mask):
    """xhat and 1 / std of some rows, from the forward pass's statistics."""
    at = stats + 2 * row.to(tl.int64)
    mean = tl.load(at, inside, 0.0)
    rstd = tl.load(at + 1, inside, 0.0)
    return tl.where(mask, (x_tile - mean[:, None]) * rstd[:, None], 0.0), rstd


@triton.jit
def _dz(total, z, row, k, inside, scale, RANK: tl.constexpr, KIND: tl.constexpr):
    """dz and scale * act(z), given total = d_out Wu."""
    at, mask = _ranks(row, k, inside, RANK)
    value = tl.load(z + at, mask, 0.0)
    # Beyond the last rank, total is 0, but the slope of act(0) is not. Beyond the last row, both
    # are 0.
    return scale * total * slope(value, KIND), scale * activate(value, KIND)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    d_out, d_normed, x,  # (M, D)
    norm_weight, stats,  # (D,), (M, 2)
    down, up, z,  # (R, D), (D, R), (M, R)
    dx,  # written: (M, D)
    rows, feature_units, stride_x, stride_out, stride_normed, scale,
    partials,  # written: (P, _part_size)
    each,
    PASS: tl.constexpr, ALIGN: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of ``each`` rows, one by one, and their share of the weights' gradients."""
    features = feature_units * ALIGN
    column = tl.arange(0, BLOCK)
    mask = column < features
    k = tl.arange(0, RANKS)
    if RANK:
        wu = _up(up, k, column, features, RANK)
        if dx is not None:
            wd = _down(down, k, column, features, RANK)
    if d_normed is not None:
        gamma = _vector(norm_weight, column, mask, 1.0)
    d_down = tl.zeros([RANKS, BLOCK], tl.float32)
    d_up = tl.zeros([RANKS, BLOCK], tl.float32)
    d_down_bias = tl.zeros([RANKS], tl.float32)
    d_up_bias = tl.zeros([BLOCK], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    first = program * each
    for i in tl.range(0, tl.minimum(each, rows - first), num_stages=STAGES):
        row = first + i
        x_row = tl.load(x + row * stride_x * ALIGN + column, mask, 0.0).to(tl.float32)
        gradient = tl.zeros([BLOCK], tl.float32)
        if d_out is not None:
            at = d_out + row * stride_out * ALIGN + column
            d_out_row = tl.load(at, mask, 0.0).to(tl.float32)
            if PASS:
                gradient += d_out_row
            if RANK:
                value = tl.load(z + row * RANK + k, k < RANK, 0.0)
                total = tl.sum(wu * d_out_row[None, :], 1)
                dz = scale * total * slope(value, KIND)
                hidden = scale * activate(value, KIND)
                d_down = tl.fma(dz[:, None], x_row[None, :], d_down)
                d_up = tl.fma(hidden[:, None], d_out_row[None, :], d_up)
                d_down_bias += dz
                d_up_bias = tl.fma(d_out_row, scale, d_up_bias)
                if dx is not None:
                    gradient += tl.sum(dz[:, None] * wd, 0)
        if dx is not None:
            if d_normed is not None:
                at = d_normed + row * stride_normed * ALIGN + column
                g = tl.load(at, mask, 0.0).to(tl.float32) * gamma
                rstd = tl.load(stats + 2 * row + 1)
                xhat = tl.where(mask, (x_row - tl.load(stats + 2 * row)) * rstd, 0.0)
                sum_g, sum_gx = tl.reduce((g, g * xhat), 0, _add_pairs)
                centred = tl.fma(xhat, -sum_gx / features, g - sum_g / features)
                gradient = tl.fma(centred, rstd, gradient)
            tl.store(dx + row * features + column, gradient.to(dx.dtype.element_ty), mask)
    if RANK:
        at = partials + program * _part_size(features, RANK)
        _write_part(at, d_down, d_up, d_up_bias, k, column, features, RANK)
        tl.store(at + (2 * RANK + 1) * features + k, d_down_bias, k < RANK)


@triton.jit
def _part_size(features, RANK: tl.constexpr):
    """The size of a program's sums: d_down_weight, d_up_weight^T, d_up_bias, d_down_bias."""
    return (2 * RANK + 1) * features + RANK


@triton.jit
def _write_part(at, d_down, d_up, d_up_bias, k, column, features, RANK: tl.constexpr):
    """Store the sums of some features: all but d_down_bias, which is per rank."""
    within = column < features
    mask = (k < RANK)[:, None] & within[None, :]
    offset = k[:, None] * features + column[None, :]
    tl.store(at + offset, d_down, mask)
    tl.store(at + RANK * features + offset, d_up, mask)
    tl.store(at + 2 * RANK * features + column, d_up_bias, within)


@triton.jit(do_not_specialize=_SIZES)
def _backward_chunks_kernel(
    d_out, d_normed, x,  # (M, D)
    norm_weight, stats,  # (D,), (M, 2)
    down, up, z,  # (R, D), (D, R), (M, R)
    dx,  # written: (M, D)
    rows, feature_units, stride_x, stride_out, stride_normed, scale,
    dz,  # written: (M, R)
    PASS: tl.constexpr, ALIGN: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz and dx of rows read in chunks: first their sums, then dx, chunk by chunk."""
    features = feature_units * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANKS)
    inside = row < rows
    total = tl.zeros([ROWS, RANKS], tl.float32)
    sum_g = tl.zeros([ROWS], tl.float32)
    sum_gx = tl.zeros([ROWS], tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < features)[None, :]
        if RANK:
            d_out_tile = _tile(d_out, row, stride_out, column, mask, ALIGN)
            wu = _up(up, k, column, features, RANK)
            total = tl.dot(d_out_tile, tl.trans(wu), total, input_precision=PRECISION)
        if dx is not None and d_normed is not None:
            x_tile = _tile(x, row, stride_x, column, mask, ALIGN)
            xhat, _ = _normalised(x_tile, stats, row, inside, mask)
            g = _tile(d_normed, row, stride_normed, column, mask, ALIGN)
            g *= _vector(norm_weight, column, column < features, 1.0)
            sum_g += tl.sum(g, 1)
            sum_gx += tl.sum(g * xhat, 1)
    if RANK:
        total, _ = _dz(total, z, row, k, inside, scale, RANK, KIND)
        at, given = _ranks(row, k, inside, RANK)
        tl.store(dz + at, total, given)
    if dx is not None:
        for start in range(0, features, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = inside[:, None] & (column < features)[None, :]
            gradient = tl.zeros([ROWS, BLOCK], tl.float32)
            if PASS:
                gradient += _tile(d_out, row, stride_out, column, mask, ALIGN)
            if RANK:
                wd = _down(down, k, column, features, RANK)
                gradient = tl.dot(total, wd, gradient, input_precision=PRECISION)
            if d_normed is not None:
                x_tile = _tile(x, row, stride_x, column, mask, ALIGN)
                xhat, rstd = _normalised(x_tile, stats, row, inside, mask)
                g = _tile(d_normed, row, stride_normed, column, mask, ALIGN)
                g *= _vector(norm_weight, column, column < features, 1.0)
                mean_g = (sum_g / features)[:, None]
                mean_gx = (sum_gx / features)[:, None]
                gradient += rstd[:, None] * (g - mean_g - xhat * mean_gx)
            _store(dx, row, feature_units, column, mask, gradient, ALIGN)


@triton.jit(do_not_specialize=_SIZES)
def _weights_kernel(
    d_out, x,  # (M, D)
    z, dz,  # (M, R)
    partials,  # written: (P, _part_size)
    rows, feature_units, stride_x, stride_out, scale, each,
    ALIGN: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights' gradients for some features, summed over ``each`` tiles of rows."""
    features = feature_units * ALIGN
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, RANKS)
    d_down = tl.zeros([RANKS, BLOCK], tl.float32)
    d_up = tl.zeros([RANKS, BLOCK], tl.float32)
    d_down_bias = tl.zeros([RANKS], tl.float32)
    d_up_bias = tl.zeros([BLOCK], tl.float32)
    for tile in range(part * each, tl.minimum((part + 1) * each, tl.cdiv(rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        mask = inside[:, None] & (column < features)[None, :]
        x_tile = _tile(x, row, stride_x, column, mask, ALIGN)
        d_out_tile = _tile(d_out, row, stride_out, column, mask, ALIGN)
        offsets, given = _ranks(row, k, inside, RANK)
        hidden = scale * activate(tl.load(z + offsets, given, 0.0), KIND)
        dz_tile = tl.load(dz + offsets, given, 0.0)
        d_down = tl.dot(tl.trans(dz_tile), x_tile, d_down, input_precision=PRECISION)
        d_up = tl.dot(tl.trans(hidden), d_out_tile, d_up, input_precision=PRECISION)
        d_down_bias += tl.sum(dz_tile, 0)
        d_up_bias += scale * tl.sum(d_out_tile, 0)
    at = partials + part.to(tl.int64) * _part_size(features, RANK)
    _write_part(at, d_down, d_up, d_up_bias, k, column, features, RANK)
    # It is the same for all features: only the first program stores it.
    mask = tl.program_id(0) * RANKS + k < RANK
    tl.store(at + (2 * RANK + 1) * features + k, d_down_bias, mask)


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    partials,  # (P, _part_size)
    d_down,  # written: (R, D)
    d_down_bias,  # written: (R,)
    d_up,  # written: (D, R)
    d_up_bias,  # written: (D,)
    parts,
    feature_units,
    ALIGN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights' gradients from all programs' sums, always added in the same order."""
    features = feature_units * ALIGN
    size = _part_size(features, RANK)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        mask = (part < parts)[:, None] & (element < size)[None, :]
        at = partials + part.to(tl.int64)[:, None] * size + element[None, :]
        total += tl.load(at, mask, 0.0)
    value = tl.sum(total, 0)

    weights = RANK * features
    tl.store(d_down + element, value.to(d_down.dtype.element_ty), element < weights)
    other = element - weights
    mask = (other >= 0) & (other < weights)
    at = d_up + other % features * RANK + other // features
    tl.store(at, value.to(d_up.dtype.element_ty), mask)
    if d_up_bias is not None:
        other = element - 2 * weights
        mask = (other >= 0) & (other < features)
        tl.store(d_up_bias + other, value.to(d_up_bias.dtype.element_ty), mask)
    if d_down_bias is not None:
        other = element - 2 * weights - features
        mask = (other >= 0) & (other < RANK)
        tl.store(d_down_bias + other, value.to(d_down_bias.dtype.element_ty), mask)


def forward(
    x: torch.Tensor,
    add: torch.Tensor | None,
    norm: NormWeights | None,
    adapter: AdapterWeights | None,
    bias: torch.Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``(normed, out, z, stats)``, in one launch.

    ``normed`` (M, D) is LayerNorm(x), in ``matmul_dtype`` or x's. ``stats`` (M, 2) float32 is the
    mean and 1 / std of each row.
    ``out`` (M, D) is ``add + scale * (act(z) Wu^T + bu) + bias``, with ``z = x Wd^T + bd`` (M, R)
    float32. Without ``norm``, normed and stats are None; without ``adapter``, out and z are. If
    ``add`` is None, nothing is added. If ``add`` is ``x`` itself, x is read once.
    """
    rows, features = x.shape
    normed = out = z = stats = None
    if norm is not None:
        normed = torch.empty((rows, features), dtype=matmul_dtype or x.dtype, device=x.device)
        stats = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    rank = 0
    if adapter is not None:
        rank = adapter.down_weight.shape[0]
        out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
        z = torch.empty((rows, rank), dtype=torch.float32, device=x.device)
    if not rows or (norm is None and adapter is None):
        return normed, out, z, stats
    add_x = add is x
    x, add = _by_row(x), None if add is None or add_x else _by_row(add)
    tf32 = launch.tensor_cores_take_bf16(x.device)
    tile = heuristics.adapter_forward(features, rank, tf32)
    down, down_bias, up, up_bias, scale, kind = _parameters(adapter)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    strides = x.stride(0), 0 if add is None else add.stride(0)
    align = launch.alignment(features, *strides, most=4)
    settings = {"ADD_X": add_x, "ALIGN": align, "RANK": rank, "KIND": kind}
    settings |= _meta(tile, matmul_dtype or x.dtype, x.device)
    arguments = (
            x, add, down, down_bias, up, up_bias, _dense(bias), _dense(norm_weight),
            _dense(norm_bias), normed, out, z, stats,
            rows, features // align, strides[0] // align, strides[1] // align, scale, eps,
    )  # fmt: skip
    with launch.on(x.device):
        if tile.chunked:
            _forward_chunks_kernel[(tile.programs(rows),)](*arguments, **settings)
        else:
            parts, each = tile.parts(rows, launch.multiprocessors(x.device))
            _forward_kernel[(parts,)](*arguments, each, **settings)
    return normed, out, z, stats


def backward(
    d_out: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    x: torch.Tensor,
    norm: NormWeights | None,
    stats: torch.Tensor | None,
    adapter: AdapterWeights | None,
    z: torch.Tensor | None,
    *,
    pass_through: bool,
    need_dx: bool = True,
) -> tuple[
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """``(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias)`` from the gradients of ``out``
    and ``normed``, either of which may be None.

    With ``pass_through``, ``dx`` (M, D) includes ``d_out`` itself: ``x`` was added to ``out``.
    ``dx`` is None unless needed. The weights' gradients are None without an adapter or without
    ``d_out``, and those of absent biases are None. Each has its weight's dtype.
    """
    rows, features = x.shape
    dx = torch.empty((rows, features), dtype=x.dtype, device=x.device) if need_dx else None
    if d_out is None:
        adapter = None
    elif adapter is None and not pass_through:
        d_out = None
    if dx is None or norm is None:
        d_normed = None
    gradients: _Gradients = (None, None, None, None)
    if adapter is not None:
        down, down_bias, up, up_bias = (
            None if w is None else torch.empty(w.shape, dtype=w.dtype, device=w.device)
            for w in adapter[:4]
        )
        gradients = down, down_bias, up, up_bias
    if rows and (adapter is not None or d_normed is not None):
        with launch.on(x.device):
            _backward(d_out, d_normed, x, norm, stats, adapter, z, pass_through, dx, gradients)
    else:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        if dx is not None:
            dx.copy_(d_out) if d_out is not None else dx.zero_()
    return dx, *gradients


_Gradients = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def _backward(
    d_out: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    x: torch.Tensor,
    norm: NormWeights | None,
    stats: torch.Tensor | None,
    adapter: AdapterWeights | None,
    z: torch.Tensor | None,
    pass_through: bool,
    dx: torch.Tensor | None,
    gradients: _Gradients,
) -> None:
    rows, features = x.shape
    device = x.device
    x = _by_row(x)
    d_out, d_normed = (None if d is None else _by_row(d) for d in (d_out, d_normed))
    z, stats = _dense(z), _dense(stats)  # those of a part of the tokens may have gaps
    strides = tuple(0 if t is None else t.stride(0) for t in (x, d_out, d_normed))
    align = launch.alignment(features, *strides, most=4)
    units = features // align
    x_step, out_step, normed_step = (stride // align for stride in strides)
    down, _, up, _, scale, kind = _parameters(adapter)
    rank = 0 if down is None else down.shape[0]
    tf32 = launch.tensor_cores_take_bf16(device)
    tile = heuristics.adapter_backward(features, rank, tf32)
    common = {"ALIGN": align, "RANK": rank, "KIND": kind}
    arguments = (
        d_out, d_normed, x, None if norm is None else _dense(norm.weight), stats, down, up, z, dx,
        rows, units, x_step, out_step, normed_step, scale,
    )  # fmt: skip
    matmul_dtype = x.dtype if d_normed is None else d_normed.dtype
    settings = common | {"PASS": pass_through} | _meta(tile, matmul_dtype, device)
    parts, each = tile.parts(rows, launch.multiprocessors(device))
    if not tile.chunked:
        partials = _partials(parts, features, rank, device)
        _backward_kernel[(parts,)](*arguments, partials, each, **settings)
    else:
        dz = torch.empty((rows, rank), dtype=torch.float32, device=device)
        _backward_chunks_kernel[(tile.programs(rows),)](*arguments, dz, **settings)
        if rank:
            tile = heuristics.adapter_weights(features, rank, tf32)
            parts, each = tile.parts(rows, launch.multiprocessors(device))
            partials = _partials(parts, features, rank, device)
            _weights_kernel[(tile.chunks(features), parts)](
                d_out, x, z, dz, partials, rows, units, x_step, out_step, scale, each,
                **common, **_meta(tile, matmul_dtype, device),
            )  # fmt: skip
    if rank:
        d_down, d_down_bias, d_up, d_up_bias = gradients
        sums = heuristics.ADAPTER_SUMS
        _sum_kernel[(-(-partials.shape[1] // sums.block),)](
            partials, d_down, d_down_bias, d_up, d_up_bias, parts, units, align, rank,
            **sums.meta(launch.warp_size(device)),
        )  # fmt: skip


def _partials(parts: int, features: int, rank: int, device: torch.device) -> torch.Tensor:
    """Memory for the programs' sums, see :func:`_part_size`."""
    size = (2 * rank + 1) * features + rank if rank else 0
    return torch.empty((parts, size), dtype=torch.float32, device=device)


def _parameters(adapter: AdapterWeights | None) -> tuple[Any, ...]:
    """The weights, dense, the scale and the activation."""
    if adapter is None:
        return None, None, None, None, 1.0, "identity"
    return *(_dense(weight) for weight in adapter[:4]), adapter.scale, adapter.activation


def _dense(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.contiguous()


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous features; ``x`` itself if they are."""
    return x if x.stride(1) == 1 else x.contiguous()


def _meta(tile: heuristics.AdapterTile, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel with matmuls.

    Tensor cores round float32 to 10 bits of mantissa (TF32), no more than fp16 and bf16 inputs are
    rounded already, and no more than autocast asks for: ``dtype`` is that of the matmuls around.
    float32 inputs are split into two such numbers each, which is nearly exact. AMD's matrix cores
    take float32 itself.
    """
    meta = tile.meta(launch.warp_size(device))
    if tile.chunked:
        meta["PRECISION"] = "tf32x3" if dtype == torch.float32 else "tf32"
        if torch.version.hip is not None:
            meta["PRECISION"] = "ieee"
    return meta
