"""Rotary positions in plain PyTorch, and their transpose."""

from __future__ import annotations

import torch

from gist_kernels.weights import Rotation


def rotate(
    x: torch.Tensor, rotation: Rotation, first: int = 0, *, transposed: bool = False
) -> torch.Tensor:
    """Tokens ``first`` and following, (B, T, H, Dh), rotated as far as the rotation has them.

    Computed in float32 at least, returned in x's dtype. ``transposed`` gives the gradient of x from
    that of the rotated x.
    """
    begin, end, table = _rotated(x, rotation, first)
    if begin >= end:
        return x
    rows = _rows(x[:, begin:end], rotation, table, transposed)
    if (begin, end) == (0, x.shape[1]):
        return rows
    return torch.cat((x[:, :begin], rows, x[:, end:]), dim=1)


def rotate_gradient_(d_x: torch.Tensor, num_heads: int, rotation: Rotation) -> None:
    """Replace the gradient of the rotated x, (B, T, H Dh) from the first token on, by that of x."""
    d_x = d_x.unflatten(-1, (num_heads, -1))
    begin, end, table = _rotated(d_x, rotation, 0)
    if begin < end:
        rows = d_x[:, begin:end]
        rows.copy_(_rows(rows, rotation, table, True))


def _rotated(x: torch.Tensor, rotation: Rotation, first: int) -> tuple[int, int, slice]:
    """The rotated ones of x's tokens, from the first to that after the last, and their rows of the
    tables."""
    count, start = rotation.sin.shape[-2], rotation.start
    begin, end = max(start, first), min(start + count, first + x.shape[1])
    return begin - first, end - first, slice(begin - start, end - start)


def _rows(x: torch.Tensor, rotation: Rotation, table: slice, transposed: bool) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    sin, cos = (_by_token(t[..., table, :].to(wide)) for t in (rotation.sin, rotation.cos))
    rows = x.to(wide)
    if transposed:
        out = rows * cos - _partners(rows * sin, rotation.half)
    else:
        out = rows * cos + _partners(rows, rotation.half) * sin
    return out.to(x.dtype)


def _by_token(table: torch.Tensor) -> torch.Tensor:
    """(R, 1, Dh) or (R, H, Dh)."""
    return table.unsqueeze(-2) if table.ndim == 2 else table.transpose(0, 1)


def _partners(x: torch.Tensor, half: bool) -> torch.Tensor:
    """(-b, a) for each pair (a, b) of features. The transpose is its negative."""
    if half:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
