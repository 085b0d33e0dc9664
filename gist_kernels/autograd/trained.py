"""What a sublayer's node is given: frozen weights, and one holder for all that may be trained.

The holder has one shape for the tensors, for whether each needs a gradient, and for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.linear import FrozenLinear, LinearParts, LinearSaved
from gist_kernels.autograd.tensors import as_result, column_sums, rows_of, versions_of
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.weights import AdapterWeights, NormWeights


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


class Sublayer(NamedTuple):
    """What a node is given beside x."""

    kernels: SublayerKernels
    norm: NormWeights
    weights: Any
    """AttentionWeights or MlpWeights, for what is not in the linear layers."""
    first: FrozenLinear
    last: FrozenLinear
    drop_path: torch.Tensor | None
    adapter: AdapterWeights | None
    versions: list[int]
    """Version counters of what is frozen, as forward found it."""

    def trained(self) -> Trained:
        adapter = AdapterParts() if self.adapter is None else AdapterParts(*self.adapter[:4])
        return Trained(adapter, NormParts(*self.norm[:2]), self.first.parts, self.last.parts)

    def with_trained(self, trained: Trained) -> Sublayer:
        """The sublayer of tensors that autograd has found unchanged since forward.

        Raises:
            RuntimeError: a frozen tensor has changed, as autograd raises for those that it saves.
        """
        if self.versions != versions_of(*self.norm, *self.weights, self.drop_path):
            raise RuntimeError(
                "a frozen weight of a sublayer, or its drop_path, was modified by an inplace "
                "operation after forward, which backward needs it for; modify it after backward"
            )
        adapter = self.adapter
        return self._replace(
            adapter=adapter and AdapterWeights(*trained.adapter, *adapter[4:]),
            norm=NormWeights(*trained.norm, self.norm.eps),
            first=self.first._replace(parts=trained.first),
            last=self.last._replace(parts=trained.last),
        )

    def output_factors(self) -> list[torch.Tensor]:
        """What scales the last layer's output, bias included."""
        return [f for f in (self.weights.layer_scale, self.drop_path) if f is not None]

    def normed(self, x: torch.Tensor) -> Any:
        """``norm(x)``, which the first layer reads, computed once more."""
        return self.kernels.adapter.forward(x, None, self.norm, None, None)[0]

    def normed_and_adapted(self, x: torch.Tensor, norm: NormWeights | None) -> Any:
        """``(norm(x), x + adapter(x), z, stats)``, the second with the last layer's bias where
        nothing scales that."""
        scaled = self.output_factors() or self.last.parts.scale is not None
        bias = None if scaled else self.last.parts.bias
        return self.kernels.adapter.forward(x, x, norm, self.adapter, bias)

    def add_last(
        self, x: torch.Tensor, adapted: torch.Tensor | None, inner: torch.Tensor
    ) -> tuple[torch.Tensor, LinearSaved]:
        """The sublayer's output: the last layer of (B, N, I) ``inner``, added to ``adapted``."""
        last, rows, factors = self.last, rows_of(inner), self.output_factors()
        shape = *inner.shape[:2], last.weight.shape[0]
        if adapted is not None and not factors and last.parts.scale is None:
            last = last.without_bias()  # which adapted has
            if adapted.dtype is rows.dtype:
                linear = self.kernels.linear
                out, low = linear.add_linear(adapted, rows, last.weight), None
                _, _, down, up = last.computed()
                if down is not None:
                    low = linear.linear(rows, down, None)
                    out = linear.add_linear(out, low, up)
                return as_result(out, shape), LinearSaved(None, low)
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
        for factor in self.output_factors():
            d_out = d_out * factor
        return self.last.backward(rows_of(d_out), inner, saved, needs, need_dx)

    def first_backward(
        self, d_first: torch.Tensor, saved: LinearSaved, needs: Trained, rows: SublayerRows
    ) -> tuple[torch.Tensor, Trained]:
        """The gradient of x, and those of adapter, norm and first layer, from that of the first
        layer's output."""
        d_normed, first = self.first.backward(
            rows_of(d_first), lambda: self.normed(rows.x), saved, needs.first
        )
        assert d_normed is not None
        d_normed = d_normed.to(rows.x.dtype)
        norm = self.norm_grads(d_normed, rows, needs.norm)
        d_x, *adapter = self.kernels.adapter.backward(
            rows.d_out, d_normed, rows.x, self.norm, rows.stats, self.adapter, rows.z,
            pass_through=True,
        )  # fmt: skip
        assert d_x is not None
        return d_x, Trained(AdapterParts(*adapter), norm, first)

    def norm_grads(self, d_normed: torch.Tensor, rows: SublayerRows, needs: NormParts) -> NormParts:
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
