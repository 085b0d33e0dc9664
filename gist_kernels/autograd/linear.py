"""A frozen linear layer and what is trained beside it, forward and backward on rows.

The backward pass computes no gradient of the frozen weight, and keeps nothing that only such a
gradient would need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.tensors import column_sums, in_dtype
from gist_kernels.kernels.protocols import LinearKernels
from gist_kernels.tracing import autocast_enabled


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a sublayer's matmuls: x's, or autocast's."""
    device = x.device.type
    if x.dtype is torch.float64 or not autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class LinearParts(NamedTuple):
    """The tensors that may be trained beside a frozen weight; also whether each needs a gradient,
    and these gradients."""

    bias: Any = None
    scale: Any = None
    down: Any = None
    up: Any = None


class LinearSaved(NamedTuple):
    """What a forward pass keeps for backward, each None where there is none."""

    unscaled: torch.Tensor | None = None
    """``W x``, (M, O), before the scale."""
    low: torch.Tensor | None = None
    """``down x``, (M, r)."""


class QuantisedMatmuls:
    """The LinearKernels of a layer with a :class:`gist_kernels.quantised.QuantisedWeight`. The
    backend's own compute what is plain beside it."""

    def __init__(self, plain: LinearKernels) -> None:
        self.plain = plain

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return self.plain.linear(x, weight, bias)
        result: torch.Tensor = weight.linear(x, bias)
        return result

    def add_linear(self, out: torch.Tensor, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return self.plain.add_linear(out, x, weight)
        return out.add_(weight.linear(x, None))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype)


class FrozenLinear(NamedTuple):
    """``y = scale * (W x) + bias + up (down x)`` of (M, I) rows, with a frozen W of (O, I)."""

    kernels: LinearKernels
    weight: Any
    """A matrix, or a QuantisedWeight where ``kernels`` take one."""
    parts: LinearParts
    computed: LinearParts
    """The parts in the weight's dtype."""

    @classmethod
    def of(
        cls,
        kernels: LinearKernels,
        weight: Any,
        parts: LinearParts,
        cast: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = _cast,
    ) -> FrozenLinear:
        dtype = weight.dtype
        if all(t is None or t.dtype is dtype for t in parts):
            return cls(kernels, weight, parts, parts)
        computed = LinearParts(*(None if t is None else cast(t, dtype) for t in parts))
        return cls(kernels, weight, parts, computed)

    def outputs(self, chosen: slice) -> FrozenLinear:
        """The layer of some of its outputs."""
        parts, computed = (
            each._replace(
                bias=None if each.bias is None else each.bias[chosen],
                scale=None if each.scale is None else each.scale[chosen],
                up=None if each.up is None else each.up[chosen],
            )
            for each in (self.parts, self.computed)
        )
        return FrozenLinear(self.kernels, self.weight[chosen], parts, computed)

    def without_bias(self) -> FrozenLinear:
        return self._replace(
            parts=self.parts._replace(bias=None), computed=self.computed._replace(bias=None)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, LinearSaved]:
        """``y`` (M, O) in the weight's dtype."""
        linear, unscaled, low = self.kernels.linear, None, None
        bias, scale, down, up = self.computed
        x = in_dtype(x, self.weight.dtype)
        if scale is None:
            y = linear(x, self.weight, bias)
        else:
            unscaled = linear(x, self.weight, None)
            y = unscaled * scale
            y = y if bias is None else y.add_(bias)
        if down is not None:
            low = linear(x, down, None)
            y = self.kernels.add_linear(y, low, up)
        return y, LinearSaved(unscaled, low)

    def backward(
        self,
        d_y: torch.Tensor,
        x: Callable[[], torch.Tensor],
        saved: LinearSaved,
        needs: LinearParts,
        need_dx: bool = True,
    ) -> tuple[torch.Tensor | None, LinearParts]:
        """``d_x`` in the weight's dtype, or None, and the parts' gradients. ``x`` is called only
        where ``down`` is trained."""
        linear, d_x, d_bias, d_scale, d_down, d_up = self.kernels.linear, *(None,) * 5
        _, scale, down, up = self.computed
        if needs.bias and self.parts.bias is not None:
            d_bias = column_sums(d_y, self.parts.bias)
        if needs.scale and self.parts.scale is not None and saved.unscaled is not None:
            d_scale = column_sums(d_y * saved.unscaled, self.parts.scale)
        d_y = in_dtype(d_y, self.weight.dtype)
        if need_dx:
            d_x = linear(d_y if scale is None else d_y * scale, self.weight.t(), None)
        if down is not None and up is not None:
            d_low = linear(d_y, up.t(), None)
            if needs.down:
                d_down = (d_low.t() @ x().to(d_low.dtype)).to(self.parts.down.dtype)
            if needs.up:
                assert saved.low is not None
                d_up = (d_y.t() @ saved.low).to(self.parts.up.dtype)
            if d_x is not None:
                d_x = self.kernels.add_linear(d_x, d_low, down.t())
        return d_x, LinearParts(d_bias, d_scale, d_down, d_up)


def split_projection(qkv: FrozenLinear) -> tuple[FrozenLinear, FrozenLinear]:
    """The layers of the queries, and of the keys and values."""
    inner = qkv.weight.shape[0] // 3
    return qkv.outputs(slice(0, inner)), qkv.outputs(slice(inner, None))


def joined_grads(queries: LinearParts, keys_values: LinearParts) -> LinearParts:
    """The gradients of a layer that :func:`split_projection` has split."""

    def stacked(q: torch.Tensor | None, kv: torch.Tensor | None) -> torch.Tensor | None:
        return None if q is None or kv is None else torch.cat((q, kv))

    return LinearParts(
        stacked(queries.bias, keys_values.bias),
        stacked(queries.scale, keys_values.scale),
        None if keys_values.down is None else queries.down + keys_values.down,
        stacked(queries.up, keys_values.up),
    )
