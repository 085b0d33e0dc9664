"""The bottleneck adapter as one autograd node, and as operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gist_kernels.autograd import shapes
from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.operators import Operation
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


def adapter_operator(
    backend: str,
    x: torch.Tensor,
    weights: AdapterWeights,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`adapter`, by the registered operator."""
    onto_x = residual is x
    tensors = *weights[:4], x, None if onto_x else residual
    out: torch.Tensor = _OPERATORS[backend](
        *tensors, float(weights.scale), weights.activation, onto_x
    )[0]
    return out


def register(backend: str, load: Callable[[], AdapterKernels]) -> None:
    """Define a backend's operators."""
    _OPERATORS[backend] = _OPERATION.register(backend, load, shapes.of_adapter())


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple[AdapterKernels, float, str, bool], *tensors: Any
    ) -> torch.Tensor:
        ctx.options = options
        out, (z,) = _forward(options[0], tensors, options[1:])
        ctx.save_for_backward(*tensors[:-1], z)
        return out

    @staticmethod
    @once_differentiable("adapter")
    def backward(ctx: Any, saved: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernels, *options = ctx.options
        *tensors, z = saved
        *needs, need_residual = ctx.needs_input_grad[1:]
        gradients = _backward(kernels, tensors, options, (z,), needs, d_out)
        return None, *gradients, d_out if need_residual else None


def _forward(
    kernels: AdapterKernels, tensors: Sequence[Any], options: Sequence[Any]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None]]:
    *weights, x, residual = tensors
    scale, activation, onto_x = options
    rows = rows_of(x)
    add = rows if onto_x else None if residual is None else rows_of(residual)
    _, out, z, _ = kernels.forward(
        rows, add, None, AdapterWeights._make((*weights, scale, activation)), None
    )
    assert out is not None
    return as_result(out, x.shape), (z,)


def _backward(
    kernels: AdapterKernels,
    tensors: Sequence[Any],
    options: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
    d_out: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the weights and of x; that of the residual is ``d_out``."""
    *weights, x = tensors[:5]
    scale, activation, onto_x = options
    d_x, *d_weights = kernels.backward(
        rows_of(d_out), None, rows_of(x), None, None,
        AdapterWeights._make((*weights, scale, activation)), saved[0],
        pass_through=onto_x, need_dx=needs[4],
    )  # fmt: skip
    return *d_weights, None if d_x is None else d_x.view(x.shape)


_OPERATORS: dict[str, Any] = {}
_OPERATION = Operation(
    "adapter",
    trained=(
        *("Tensor down_weight", "Tensor? down_bias", "Tensor up_weight", "Tensor? up_bias"),
        "Tensor x",
    ),
    added="Tensor? residual",
    options=("float scale", "str activation", "bool onto_x"),
    saved=("z",),
    forward=_forward,
    backward=_backward,
)
