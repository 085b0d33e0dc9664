"""A loss of a linear head's logits over chunks of rows, and its gradients.

The logits of all rows never exist. With U a chunk's features of both sides, W and b the head::

    L = U W^T + b      L <- dL      dU = dL W      dW += dL^T U      db += sum of dL's rows

where the loss' kernels write the gradient dL over the logits L. A weight's gradient is summed in
float32 at least: its error does not grow with the number of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from gist_kernels import check
from gist_kernels.kernels.protocols import DivergenceKernels, HeadKernels, LossKernels, LossOptions

TENSORS = 6
Chunk: TypeAlias = "slice | torch.Tensor"
"""Which rows: neighbours, or by their numbers."""
Tensors: TypeAlias = "tuple[torch.Tensor | None, ...]"
"""Both sides' features, then weight and bias of the head and of a second head, which may be
None; or whether each needs a gradient; or these gradients."""


class LogitOptions(NamedTuple):
    """How logits come from features."""

    dtype: torch.dtype
    """Of the matmuls and the logits."""
    softcap: float | None = None
    """c of ``c tanh(logits / c)``."""
    chunk_rows: int | None = None
    """None for what suits the device."""


class GistRows(NamedTuple):
    """Each row's GIST loss, of which the KL terms alone have no target."""

    kernels: LossKernels
    options: LossOptions
    """With the reduction "none"."""

    @property
    def reached(self) -> tuple[bool, bool]:
        """Whether each side's logits get a gradient."""
        from_p, from_q, to_q, to_p = self.options.kl_gradient_weights()
        of_cls, of_gist = self.options.cls_weight, self.options.gist_weight
        return any((of_cls, from_p, to_p)), any((of_gist, from_q, to_q))

    def of(
        self,
        sides: Sequence[torch.Tensor],
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        differentiate: bool,
        want_terms: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(rows, terms)``; ``differentiate`` writes the gradients over the logits."""
        (cls, gist), options = sides, self.options
        if differentiate and not want_terms:
            rows, *_ = self.kernels.forward_backward(
                cls, gist, target, options, row_scale, in_place=True
            )
            return rows, None
        rows, terms, stats = self.kernels.forward(cls, gist, target, options, want_terms, row_scale)
        if differentiate:
            self.kernels.backward(
                rows.new_ones(()), cls, gist, target, stats, options, True, True, row_scale,
                in_place=True,
            )  # fmt: skip
        return rows, terms


class JensenShannonRows(NamedTuple):
    """Each row's Jensen-Shannon divergence of two sides."""

    kernels: DivergenceKernels
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]

    @property
    def reached(self) -> tuple[bool, bool]:
        return True, True

    def of(
        self,
        sides: Sequence[torch.Tensor],
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        differentiate: bool,
        want_terms: bool,
    ) -> tuple[torch.Tensor, None]:
        """As of :class:`GistRows`; there are no terms."""
        settings = self.weights, self.temperatures
        rows, stats = self.kernels.forward(sides, *settings, row_scale)
        if differentiate:
            ones = rows.new_ones(()).expand(rows.shape)
            self.kernels.backward(
                ones, sides, *settings, stats, (True, True), row_scale, in_place=True
            )
        return rows, None


RowLoss: TypeAlias = "GistRows | JensenShannonRows"
Call: TypeAlias = "tuple[HeadKernels, RowLoss, LogitOptions]"


def run(
    call: Call,
    tensors: Sequence[Any],
    target: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    needs: Sequence[bool],
    want_terms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """Each row's loss (B,) and terms (4, B), and the gradients of the rows' sum: the features' in
    their dtype, the heads' in float32 at least."""
    kernels, loss, how = call
    features, weight = tensors[:2], tensors[2]
    rows, classes = len(features[0]), len(weight)
    counted = _counted(loss, target, row_scale)
    numbers = None
    if kernels.SKIPS_ROWS and counted is not None:
        _check_indices(loss, target, row_scale, classes)
        if not counted.all():
            numbers = counted.nonzero()[:, 0]
        counted = None

    with torch.autocast(features[0].device.type, enabled=False):
        # Rows that are left out have a loss and a gradient of 0.
        new = torch.Tensor.new_empty if numbers is None else torch.Tensor.new_zeros
        reached = loss.reached
        sides = [
            _Side(side, new(side, side.shape) if need else None, is_reached)
            for side, need, is_reached in zip(features, needs[:2], reached, strict=True)
        ]
        if tensors[4] is None:
            heads = [_Head(kernels, how, sides, tensors[2:4], needs[2:4])]
        else:
            heads = [
                _Head(kernels, how, sides[:1], tensors[2:4], needs[2:4]),
                _Head(kernels, how, sides[1:], tensors[4:6], needs[4:6]),
            ]
        dtype = torch.promote_types(how.dtype, torch.float32)
        losses = new(weight, (rows,), dtype=dtype)
        terms = new(weight, (4, rows), dtype=dtype) if want_terms else None
        size = how.chunk_rows or kernels.chunk_rows(classes, how.dtype.itemsize)
        for chunk in _chunks(rows, size, numbers):
            logits = [x for head in heads for x in head.logits(chunk, counted)]
            found, found_terms = loss.of(
                logits,
                None if target is None else target[chunk],
                None if row_scale is None else row_scale[chunk],
                any(needs),
                want_terms,
            )
            losses[chunk] = found
            if terms is not None and found_terms is not None:
                terms[:, chunk] = found_terms
            del logits  # their memory is the next chunk's, also where each allocates its own
            for head in heads:
                head.backward(chunk)
    gradients = [side.gradient for side in sides]
    for head in heads:
        gradients += [head.d_weight, head.d_bias]
    return losses, terms, gradients + [None] * (TENSORS - len(gradients))


def _counted(
    loss: RowLoss, target: torch.Tensor | None, row_scale: torch.Tensor | None
) -> torch.Tensor | None:
    """Which rows count; None for all of them."""
    counted = None if row_scale is None else row_scale != 0
    if target is None or target.is_floating_point() or not isinstance(loss, GistRows):
        return counted
    kept = target != loss.options.ignore_index
    return kept if counted is None else counted & kept


def _check_indices(
    loss: RowLoss, target: torch.Tensor | None, row_scale: torch.Tensor | None, classes: int
) -> None:
    """Before there are chunks: an error names the row in the batch."""
    if target is None or target.is_floating_point() or not isinstance(loss, GistRows):
        return
    ignored = loss.options.ignore_index
    seen = target if row_scale is None else target.masked_fill(row_scale == 0, ignored)
    check.class_indices("target", seen, classes, ignored)


def _chunks(rows: int, size: int, numbers: torch.Tensor | None) -> Sequence[Chunk]:
    if numbers is not None:
        return numbers.split(size) if len(numbers) else ()
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Side(NamedTuple):
    features: torch.Tensor
    gradient: torch.Tensor | None
    """Where it is written to; None where none is needed."""
    reached: bool


class _Head:
    """A head's matmuls for the sides that it serves, chunk by chunk, and its gradients."""

    def __init__(
        self,
        kernels: HeadKernels,
        how: LogitOptions,
        sides: Sequence[_Side],
        weights: Sequence[Any],
        needs: Sequence[bool],
    ) -> None:
        self.kernels, self.softcap, self.sides = kernels, how.softcap, sides
        weight, bias = weights
        frozen = not needs[0]
        self.weight = weight.to(how.dtype)
        self.bias = None if bias is None else bias.to(how.dtype)
        total = torch.promote_types(weight.dtype, torch.float32)
        self.d_weight = None if frozen else torch.zeros_like(weight, dtype=total)
        needs_bias = bias is not None and needs[1]
        self.d_bias = torch.zeros_like(bias, dtype=total) if needs_bias else None
        self.buffer: torch.Tensor | None = None
        self.differentiated = self._span([side.reached for side in sides])
        self.wanted = self._span([s.reached and s.gradient is not None for s in sides])
        for side in sides:
            if side.gradient is not None and not side.reached:
                side.gradient.zero_()

    @staticmethod
    def _span(sides: list[bool]) -> tuple[int, int] | None:
        """From the first to behind the last of these sides."""
        return (sides.index(True), len(sides) - sides[::-1].index(True)) if any(sides) else None

    def logits(self, chunk: Chunk, counted: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Each side's logits; what is written over them is what :meth:`backward` reads."""
        self.rows = torch.cat([side.features[chunk] for side in self.sides]).to(self.weight.dtype)
        if counted is not None:
            # In the weight's gradient, 0 times what such a row holds may be nan.
            dropped = ~counted[chunk].repeat(len(self.sides))
            self.rows.masked_fill_(dropped[:, None], 0.0)
        if self.buffer is None:  # no later chunk is larger than the first
            self.buffer = self.kernels.buffer(self.rows, self.weight)
        out = None if self.buffer is None else self.buffer[: len(self.rows)]
        self.outputs = self.kernels.logits(self.rows, self.weight, self.bias, out)
        self.slope = None
        if self.softcap is not None:
            self.outputs.div_(self.softcap).tanh_()
            if self.d_weight is not None or self.d_bias is not None or self.wanted:
                self.slope = torch.mul(self.outputs, self.outputs).neg_().add_(1)
            self.outputs.mul_(self.softcap)
        return self.outputs.chunk(len(self.sides))

    def backward(self, chunk: Chunk) -> None:
        """From gradients of the logits to those of the features and the head."""
        rows, outputs, slope = self.rows, self.outputs, self.slope
        del self.rows, self.outputs, self.slope
        count = len(rows) // len(self.sides)
        if slope is not None:
            outputs.mul_(slope)
        if self.wanted is not None:
            first, last = self.wanted
            d_rows = self.kernels.rows_gradient(outputs[first * count : last * count], self.weight)
            for side, d_side in zip(self.sides[first:last], d_rows.split(count), strict=True):
                if side.gradient is not None and side.reached:
                    side.gradient[chunk] = d_side.to(side.gradient.dtype)
        if self.differentiated is None:
            return
        first, last = self.differentiated
        outputs, rows = outputs[first * count : last * count], rows[first * count : last * count]
        if self.d_weight is not None:
            self.kernels.add_weight_gradient(self.d_weight, outputs, rows)
        if self.d_bias is not None:
            self.d_bias += outputs.sum(0, dtype=self.d_bias.dtype)
