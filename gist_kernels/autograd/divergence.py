"""The Jensen-Shannon divergence's kernels as a differentiable operation: a node in eager mode, a
registered operator where a call is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gist_kernels.autograd.derivatives import once_differentiable, second_derivative
from gist_kernels.autograd.tensors import dense_rows, in_memory
from gist_kernels.kernels.protocols import DivergenceKernels
from gist_kernels.tracing import needs_dispatcher

_OPERATION = "jensen_shannon"
_OPERATORS: dict[str, Any] = {}


def jensen_shannon(
    kernels: DivergenceKernels,
    sides: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    temperatures: tuple[float, ...],
    row_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Each row's divergence (B,), differentiable once in every side."""
    sides = [dense_rows(side) for side in sides]
    if needs_dispatcher(*sides, row_scale):
        rows, _ = _OPERATORS[kernels.NAME](sides, row_scale, weights, temperatures)
    elif torch.is_grad_enabled() and any(side.requires_grad for side in sides):
        rows = _JensenShannon.apply((kernels, weights, temperatures), row_scale, *sides)
    else:
        rows, _ = kernels.forward(sides, weights, temperatures, row_scale)
    found: torch.Tensor = rows
    return found


class _JensenShannon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], row_scale: torch.Tensor | None, *sides: torch.Tensor
    ) -> torch.Tensor:
        ctx.settings = settings
        kernels, weights, temperatures = settings
        rows, ctx.stats = kernels.forward(sides, weights, temperatures, row_scale)
        ctx.save_for_backward(row_scale, *sides)
        found: torch.Tensor = rows
        return found

    @staticmethod
    @once_differentiable(_OPERATION)
    def backward(
        ctx: Any, saved: tuple[torch.Tensor, ...], grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        kernels, weights, temperatures = ctx.settings
        row_scale, *sides = saved
        needs = ctx.needs_input_grad[2:]
        gradients = kernels.backward(
            in_memory(grad), sides, weights, temperatures, ctx.stats, needs, row_scale
        )
        return None, None, *gradients


def register(backend: str, load: Callable[[], DivergenceKernels]) -> None:
    """Register ``gist_kernels::{backend}_jensen_shannon`` and ``..._backward``, for tracing."""

    @torch.library.custom_op(f"gist_kernels::{backend}_jensen_shannon", mutates_args=())
    def forward(
        sides: Sequence[torch.Tensor],
        row_scale: torch.Tensor | None,
        weights: Sequence[float],
        temperatures: Sequence[float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return load().forward(sides, tuple(weights), tuple(temperatures), row_scale)

    @forward.register_fake
    def _(sides, row_scale, weights, temperatures):  # type: ignore[no-untyped-def]
        dtype = torch.promote_types(sides[0].dtype, torch.float32)
        rows = sides[0].shape[0]
        shapes = (rows,), load().stats_shape(rows, len(sides))
        return tuple(sides[0].new_empty(shape, dtype=dtype) for shape in shapes)

    @torch.library.custom_op(f"gist_kernels::{backend}_jensen_shannon_backward", mutates_args=())
    def backward(
        grad: torch.Tensor,
        sides: Sequence[torch.Tensor],
        row_scale: torch.Tensor | None,
        stats: torch.Tensor,
        weights: Sequence[float],
        temperatures: Sequence[float],
        needs: Sequence[bool],
    ) -> list[torch.Tensor]:
        found = load().backward(
            grad, sides, tuple(weights), tuple(temperatures), stats, needs, row_scale
        )
        return [d for d in found if d is not None]

    @backward.register_fake
    def _(grad, sides, row_scale, stats, weights, temperatures, needs):  # type: ignore[no-untyped-def]
        return [side.new_empty(side.shape) for side, need in zip(sides, needs, strict=True) if need]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        sides, row_scale, *ctx.settings = inputs
        ctx.save_for_backward(row_scale, output[1], *sides)
        ctx.mark_non_differentiable(output[1])
        ctx.needs = [side.requires_grad for side in sides]

    def differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        row_scale, stats, *sides = ctx.saved_tensors
        found = iter(backward(grad, sides, row_scale, stats, *ctx.settings, ctx.needs))
        return [next(found) if need else None for need in ctx.needs], None, None, None

    def refuse(ctx: Any, *_: Any) -> None:
        raise second_derivative(_OPERATION)

    forward.register_autograd(differentiate, setup_context=setup_context)
    backward.register_autograd(refuse)
    _OPERATORS[backend] = forward
