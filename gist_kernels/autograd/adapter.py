"""The bottleneck adapter as one autograd node."""

from __future__ import annotations

from typing import Any

import torch

from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.tensors import as_result, rows_of
from gist_kernels.kernels.protocols import AdapterKernels
from gist_kernels.weights import AdapterWeights


def adapter(
    kernels: AdapterKernels,
    x: torch.Tensor,
    weights: AdapterWeights,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``residual + adapter(x)`` of (..., D), differentiable in every tensor."""
    onto_x = residual is x
    options = kernels, weights.scale, weights.activation, onto_x
    result: torch.Tensor = _Adapter.apply(options, *weights[:4], x, None if onto_x else residual)
    return result


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple[AdapterKernels, float, str, bool], *tensors: Any
    ) -> torch.Tensor:
        kernels, scale, activation, onto_x = ctx.options = options
        *weights, x, residual = tensors
        rows = rows_of(x)
        add = rows if onto_x else None if residual is None else rows_of(residual)
        _, out, z, _ = kernels.forward(
            rows, add, None, AdapterWeights._make((*weights, scale, activation)), None
        )
        assert out is not None
        ctx.save_for_backward(*weights, x, z)
        return as_result(out, x.shape)

    @staticmethod
    @once_differentiable("adapter")
    def backward(ctx: Any, saved: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernels, scale, activation, onto_x = ctx.options
        *weights, x, z = saved
        need_dx, need_residual = ctx.needs_input_grad[5:7]
        d_x, *d_weights = kernels.backward(
            rows_of(d_out), None, rows_of(x), None, None,
            AdapterWeights._make((*weights, scale, activation)), z,
            pass_through=onto_x, need_dx=need_dx,
        )  # fmt: skip
        d_x = d_x.view(x.shape) if need_dx else None
        return None, *d_weights, d_x, d_out if need_residual else None
