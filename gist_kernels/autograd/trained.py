"""What a sublayer's node is given: frozen weights, and one holder for all that may be trained.

The holder has one shape for the tensors, for whether each needs a gradient, and for the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.linear import FrozenLinear, LinearParts, LinearSaved
from gist_kernels.autograd.tensors import (
    as_result,
    column_sums,
    rows_of,
    watched_tensors,
)
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.weights import AdapterWeights, NormWeights, Rotation


class AdapterParts(NamedTuple):
    """An adapter's tensors; also whether each needs a gradient, and these gradients."""

    down_weight: Any = None
    down_bias: Any = None
    up_weight: Any = None
    up_bias: Any = None


class NormParts(NamedTuple):
    """A norm's tensors; also whether each needs a gradient, and these gradients."""

    weight: Any = None
    bias: Any = None


class Trained(NamedTuple):
    """All of a sublayer that may be trained beside x; also which of it needs a gradient, and these
    gradients. The one place that knows the flat order that autograd takes."""

    adapter: AdapterParts = AdapterParts()
    norm: NormParts = NormParts()
    first: LinearParts = LinearParts()
    last: LinearParts = LinearParts()

    def flat(self) -> tuple[Any, ...]:
        return *self.adapter, *self.norm, *self.first, *self.last

    @classmethod
    def from_flat(cls, values: Sequence[Any]) -> Trained:
        return cls(
            AdapterParts._make(values[0:4]),
            NormParts._make(values[4:6]),
            LinearParts._make(values[6:10]),
            LinearParts._make(values[10:14]),
        )


TRAINED = len(Trained().flat())
"""How many values :meth:`Trained.flat` has."""


class Sublayer:
    """What a node is given beside x, for one call or for all calls with the same weights.

    Args:
        kernels: the backend's.
        norm: the LayerNorm before the first layer, or None.
        weights: AttentionWeights or MlpWeights, for what is not in the linear layers.
        first: the layer that reads the normed x.
        last: the layer whose output is added to x.
        adapter: the bottleneck beside them, or None.
        drop_path: (B, 1, 1) factors on the last layer's output, or None.
        lengths: (B,) numbers of tokens that attention is over, or None for all.
    """

    def __init__(
        self,
        kernels: SublayerKernels,
        norm: NormWeights | None,
        weights: Any,
        first: FrozenLinear,
        last: FrozenLinear,
        adapter: AdapterWeights | None,
        drop_path: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> None:
        self.kernels, self.norm, self.weights = kernels, norm, weights
        self.first, self.last, self.adapter = first, last, adapter
        parts = AdapterParts() if adapter is None else AdapterParts(*adapter[:4])
        of_norm = NormParts() if norm is None else NormParts(*norm[:2])
        self.trained = Trained(parts, of_norm, first.parts, last.parts).flat()
        self._set_call(drop_path, lengths)

    def _set_call(self, drop_path: torch.Tensor | None, lengths: torch.Tensor | None) -> None:
        self.lengths = lengths
        # What scales the last layer's output, bias included.
        self.factors = [f for f in (self.weights.layer_scale, drop_path) if f is not None]
        # Backward reads them, and autograd doesn't save them.
        rotation = getattr(self.weights, "rotation", None) or ()  # an MLP has none
        inner_norm = self.weights.norm or ()
        self._watched = watched_tensors(
            *(self.norm or ()), *self.weights, *rotation, *inner_norm, drop_path, lengths
        )

    @property
    def reads_in_place(self) -> bool:
        """Whether every tensor is the one that was given, so that it shows what is written there
        later."""
        weights = self.weights
        given = weights[0] is self.first.weight and weights[2] is self.last.weight
        return given and all(layer.parts is layer.computed for layer in (self.first, self.last))

    def of_call(
        self,
        drop_path: torch.Tensor | None,
        rotation: Rotation | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Sublayer:
        """The sublayer of one call that has drawn factors, or positions or lengths of its own."""
        if drop_path is None and rotation is None and lengths is None:
            return self
        found = copy.copy(self)
        if rotation is not None:
            found.weights = self.weights._replace(rotation=rotation)
        found._set_call(drop_path, lengths)
        return found

    def versions(self) -> list[int]:
        """The version counters of what is frozen."""
        return [t._version for t in self._watched]

    def check_versions(self, at_forward: list[int]) -> None:
        """Raises RuntimeError where a frozen tensor has changed since forward, as autograd raises
        for those that it saves."""
        if at_forward != self.versions():
            raise RuntimeError(
                "a frozen weight of a sublayer, or its drop_path, was modified by an inplace "
                "operation after forward, which backward needs it for; modify it after backward"
            )

    def normed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``norm(x)``, which the first layer reads, and the norm's statistics."""
        dtype = self.first.weight.dtype
        if self.norm is None:
            return x.to(dtype), None
        normed, _, _, stats = self.kernels.adapter.forward(x, None, self.norm, None, None, dtype)
        assert normed is not None
        return normed, stats

    def adapted(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``(x + adapter(x), z)`` without the norm, as of :meth:`normed_and_adapted`."""
        if self.adapter is None:
            return None, None
        _, out, z, _ = self.kernels.adapter.forward(x, x, None, self.adapter, self._added_bias)
        return out, z

    def normed_and_adapted(self, x: torch.Tensor) -> Any:
        """``(norm(x), x + adapter(x), z, stats)``, the second with the last layer's bias where
        nothing scales that."""
        dtype = self.first.weight.dtype
        if self.norm is None:
            return x.to(dtype), *self.adapted(x), None
        return self.kernels.adapter.forward(x, x, self.norm, self.adapter, self._added_bias, dtype)

    @property
    def _added_bias(self) -> torch.Tensor | None:
        scaled = self.factors or self.last.parts.scale is not None
        return None if scaled else self.last.parts.bias

    def add_last(
        self, x: torch.Tensor, adapted: torch.Tensor | None, inner: torch.Tensor
    ) -> tuple[torch.Tensor, LinearSaved]:
        """The sublayer's output: the last layer of (B, N, I) ``inner``, added to ``adapted``."""
        last, rows, factors = self.last, rows_of(inner), self.factors
        shape = *inner.shape[:2], last.weight.shape[0]
        if adapted is not None and not factors and last.parts.scale is None:
            if adapted.dtype in (rows.dtype, torch.float32):
                linear = last.kernels
                out, low = linear.add_linear(adapted, rows, last.weight), None
                _, _, down, up = last.computed
                if down is not None:
                    low = linear.linear(rows, down, None)
                    out = linear.add_linear(out, low, up)
                return as_result(out, shape), LinearSaved(None, low)
            last = last.without_bias()  # which adapted has
        update, saved = last.forward(rows)
        update = as_result(update, shape)
        for factor in factors:
            update = update * factor
        out = (x if adapted is None else adapted).view(shape)
        return (update.add_(out) if update.dtype is out.dtype else out + update), saved

    def last_backward(
        self,
        d_out: torch.Tensor,
        inner: Callable[[], torch.Tensor],
        saved: LinearSaved,
        needs: LinearParts,
        need_dx: bool,
    ) -> tuple[Any, LinearParts]:
        """The gradient of the last layer's input, and those of its parts, from that of the
        sublayer's output, (B, N, D)."""
        for factor in self.factors:
            d_out = d_out * factor
        return self.last.backward(rows_of(d_out), inner, saved, needs, need_dx)

    def first_backward(
        self, d_first: torch.Tensor, saved: LinearSaved, needs: Trained, rows: SublayerRows
    ) -> tuple[torch.Tensor, Trained]:
        """The gradient of x, and those of adapter, norm and first layer, from that of the first
        layer's output."""
        d_normed, first = self.first.backward(
            rows_of(d_first), lambda: self.normed(rows.x)[0], saved, needs.first
        )
        assert d_normed is not None
        if self.norm is None:
            d_adapted, adapter_grads = self.adapted_backward(rows.d_out, rows.x, rows.z)
            return d_adapted + d_normed.to(d_adapted.dtype), Trained(adapter_grads, first=first)
        norm = self.norm_grads(d_normed, rows, needs.norm)
        d_x, *adapter = self.kernels.adapter.backward(
            rows.d_out, d_normed, rows.x, self.norm, rows.stats, self.adapter, rows.z,
            pass_through=True,
        )  # fmt: skip
        assert d_x is not None
        return d_x, Trained(AdapterParts(*adapter), norm, first)

    def normed_backward(self, d_normed: torch.Tensor, rows: SublayerRows) -> torch.Tensor:
        """The gradient of x that leads through :meth:`normed`."""
        if self.norm is None:
            return d_normed.to(rows.x.dtype)
        d_x, *_ = self.kernels.adapter.backward(
            None, d_normed, rows.x, self.norm, rows.stats, None, None, pass_through=False
        )
        assert d_x is not None
        return d_x

    def adapted_backward(
        self, d_out: torch.Tensor, x: torch.Tensor, z: torch.Tensor | None
    ) -> tuple[torch.Tensor, AdapterParts]:
        """The gradient of x that leads through :meth:`adapted`, and the adapter's."""
        if self.adapter is None:
            return d_out, AdapterParts()
        d_x, *grads = self.kernels.adapter.backward(
            d_out, None, x, None, None, self.adapter, z, pass_through=True
        )
        assert d_x is not None
        return d_x, AdapterParts(*grads)

    def norm_grads(self, d_normed: torch.Tensor, rows: SublayerRows, needs: NormParts) -> NormParts:
        if self.norm is None:
            return NormParts()
        weight, bias, _ = self.norm
        d_weight = d_bias = None
        if needs.weight and weight is not None:
            centred = rows.x.to(rows.stats.dtype).sub(rows.stats[:, :1]).mul_(rows.stats[:, 1:])
            d_weight = column_sums(centred.mul_(d_normed), weight)
        if needs.bias and bias is not None:
            d_bias = column_sums(d_normed, bias)
        return NormParts(d_weight, d_bias)

    def adapter_grads(
        self, d_out: torch.Tensor, x: torch.Tensor, z: torch.Tensor | None
    ) -> AdapterParts:
        """The gradients of the adapter's tensors, without that of x."""
        if self.adapter is None:
            return AdapterParts()
        _, *grads = self.kernels.adapter.backward(
            d_out, None, x, None, None, self.adapter, z, pass_through=False, need_dx=False
        )
        return AdapterParts(*grads)


class SublayerRows(NamedTuple):
    """What the backward pass through norm and adapter reads, as (M, ...) rows."""

    d_out: torch.Tensor
    x: torch.Tensor
    z: Any
    stats: Any

    def of_tokens(self, shape: tuple[int, int], tokens: slice) -> SublayerRows:
        """The rows of some tokens, ``shape`` being (B, N)."""
        return SublayerRows._make(
            t if t is None else rows_of(t.view(*shape, t.shape[1])[:, tokens]) for t in self
        )
