"""Losses of a linear head's logits as differentiable operations.

The forward pass of a summed loss computes its gradients too; the backward pass multiplies them by
the upstream gradient, out of place. Where each row has an upstream gradient of its own, the
backward pass computes the logits again, and scales the rows by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gist_kernels.autograd.derivatives import (
    once_differentiable,
    refusing_second_derivative,
    second_derivative,
)
from gist_kernels.autograd.linear_chunks import (
    TENSORS,
    GistRows,
    JensenShannonRows,
    LogitOptions,
    RowLoss,
    Tensors,
    run,
)
from gist_kernels.autograd.loss import _flat, _options_of
from gist_kernels.autograd.tensors import in_memory
from gist_kernels.kernels.protocols import LinearLossKernels
from gist_kernels.tracing import needs_dispatcher

_OPERATION = "a linear head's loss"


def linear_loss(
    kernels: LinearLossKernels,
    rows: RowLoss,
    logits: LogitOptions,
    tensors: Tensors,
    target: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    summed: bool,
    want_terms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(loss, terms)``, differentiable once: the sum over rows or (B,); the GIST loss' terms of
    each row, (4, B), or None."""
    differentiable = torch.is_grad_enabled()
    needs = [differentiable and t is not None and t.requires_grad for t in tensors]
    if needs_dispatcher(*tensors, target, row_scale):
        found = _OPERATORS[kernels.NAME](
            *tensors, target, row_scale, *_flattened(rows), *_in_schema(logits), needs, summed
        )
        return found[0], found[1] if want_terms else None
    call = kernels.head, rows, logits
    if any(needs):
        node: Any = _Summed if summed else _EachRow
        loss, terms = node.apply((call, want_terms), target, row_scale, *tensors)
        return loss, terms
    loss, terms, _ = run(call, tensors, target, row_scale, (False,) * TENSORS, want_terms)
    return loss.sum() if summed else loss, terms


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Any,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        call, want_terms = settings
        needs = ctx.needs_input_grad[3:]
        rows, terms, gradients = run(call, tensors, target, row_scale, needs, want_terms)
        # The tensors are what a second derivative would depend on.
        ctx.save_for_backward(*gradients, *tensors)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return rows.sum(), terms

    @staticmethod
    @once_differentiable(_OPERATION)
    def backward(
        ctx: Any, saved: tuple[torch.Tensor, ...], grad: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + TENSORS)
        gradients = zip(saved[:TENSORS], ctx.dtypes, strict=True)
        return None, None, None, *(_scaled(d, grad, dtype) for d, dtype in gradients)


class _EachRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Any,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        call, want_terms = ctx.settings = settings
        rows, terms, _ = run(call, tensors, target, row_scale, (False,) * TENSORS, want_terms)
        ctx.save_for_backward(target, row_scale, *tensors)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return rows, terms

    @staticmethod
    @once_differentiable(_OPERATION)
    def backward(
        ctx: Any, saved: tuple[torch.Tensor, ...], grad: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + TENSORS)
        target, row_scale, *tensors = saved
        scale = _upstream_scale(row_scale, grad)
        needs = ctx.needs_input_grad[3:]
        call, _ = ctx.settings
        found = zip(run(call, tensors, target, scale, needs, False)[2], tensors, strict=True)
        return None, None, None, *(None if d is None else d.to(t.dtype) for d, t in found)


def _scaled(
    gradient: torch.Tensor | None, grad: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor | None:
    """A new tensor: what is saved serves the next backward pass too."""
    if gradient is None:
        return None
    return torch.mul(gradient, grad.to(gradient.dtype)).to(dtype)


def _upstream_scale(row_scale: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
    grad = in_memory(grad)
    return grad if row_scale is None else torch.where(row_scale == 0, 0.0, row_scale * grad)


# ---- as registered operators

_OPERATORS: dict[str, Any] = {}
_LOSS, _JENSEN_SHANNON = "gist_loss", "jensen_shannon"


def _flattened(rows: RowLoss) -> tuple[str, list[float], int, str]:
    """A row loss in an operator schema's types; the inverse of :func:`_rows_of`."""
    if isinstance(rows, JensenShannonRows):
        return _JENSEN_SHANNON, [*rows.weights, *rows.temperatures], 0, ""
    settings, ignore_index, _, stop_gradient = _flat(rows.options)
    return _LOSS, settings, ignore_index, stop_gradient


def _rows_of(
    kernels: LinearLossKernels,
    kind: str,
    settings: Sequence[float],
    ignore_index: int,
    stop_gradient: str,
) -> RowLoss:
    if kind == _JENSEN_SHANNON:
        return JensenShannonRows(kernels.divergence, tuple(settings[:2]), tuple(settings[2:]))
    options = _options_of(settings, ignore_index, "none", stop_gradient)
    return GistRows(kernels.loss, options)


def _in_schema(logits: LogitOptions) -> tuple[torch.dtype, float, int]:
    return logits.dtype, logits.softcap or 0.0, logits.chunk_rows or 0


def register(backend: str, load: Callable[[], LinearLossKernels]) -> None:
    """Register ``gist_kernels::{backend}_linear_loss`` and ``..._gradients``, for tracing.

    What an operator returns has a fixed number of tensors: an empty one stands for None.
    """

    def computed(
        tensors: Tensors,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        row_loss: tuple[str, Sequence[float], int, str],
        logits: tuple[torch.dtype, float, int],
        needs: Sequence[bool],
        want_terms: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        dtype, softcap, chunk_rows = logits
        how = LogitOptions(dtype, softcap or None, chunk_rows or None)
        kernels = load()
        rows = _rows_of(kernels, *row_loss)
        loss, terms, gradients = run(
            (kernels.head, rows, how), tensors, target, row_scale, needs, want_terms
        )
        features = tensors[0]
        assert features is not None
        return loss, terms, [features.new_empty(0) if d is None else d for d in gradients]

    def fake_gradients(tensors: Tensors, needs: Sequence[bool]) -> list[torch.Tensor]:
        found = []
        for index, (tensor, need) in enumerate(zip(tensors, needs, strict=True)):
            if tensor is None or not need:
                found.append(tensors[0].new_empty(0))  # type: ignore[union-attr]
            else:
                total = torch.promote_types(tensor.dtype, torch.float32)
                dtype = tensor.dtype if index < 2 else total
                found.append(tensor.new_empty(tensor.shape, dtype=dtype))
        return found

    @torch.library.custom_op(f"gist_kernels::{backend}_linear_loss", mutates_args=())
    def forward(
        cls: torch.Tensor,
        gist: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gist_weight: torch.Tensor | None,
        gist_bias: torch.Tensor | None,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        kind: str,
        settings: Sequence[float],
        ignore_index: int,
        stop_gradient: str,
        dtype: torch.dtype,
        softcap: float,
        chunk_rows: int,
        needs: Sequence[bool],
        summed: bool,
    ) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
        torch.Tensor, torch.Tensor,
    ]:  # fmt: skip
        loss, terms, gradients = computed(
            (cls, gist, weight, bias, gist_weight, gist_bias), target, row_scale,
            (kind, settings, ignore_index, stop_gradient), (dtype, softcap, chunk_rows),
            needs if summed else (False,) * TENSORS, kind == _LOSS,
        )  # fmt: skip
        loss = loss.sum() if summed else loss
        terms = loss.new_empty(0) if terms is None else terms
        found: Any = loss, terms, *gradients
        return found

    @forward.register_fake
    def _(*arguments):  # type: ignore[no-untyped-def]
        tensors, (_, _, kind, _, _, _, dtype, _, _, needs, summed) = arguments[:6], arguments[6:]
        rows = tensors[0].shape[0]
        dtype = torch.promote_types(dtype, torch.float32)
        loss = tensors[0].new_empty(() if summed else (rows,), dtype=dtype)
        terms = loss.new_empty((4, rows) if kind == _LOSS else 0)
        needs = needs if summed else (False,) * TENSORS
        return loss, terms, *fake_gradients(tensors, needs)

    @torch.library.custom_op(f"gist_kernels::{backend}_linear_loss_gradients", mutates_args=())
    def gradients_of(
        cls: torch.Tensor,
        gist: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gist_weight: torch.Tensor | None,
        gist_bias: torch.Tensor | None,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        kind: str,
        settings: Sequence[float],
        ignore_index: int,
        stop_gradient: str,
        dtype: torch.dtype,
        softcap: float,
        chunk_rows: int,
        needs: Sequence[bool],
    ) -> list[torch.Tensor]:
        return computed(
            (cls, gist, weight, bias, gist_weight, gist_bias), target, row_scale,
            (kind, settings, ignore_index, stop_gradient), (dtype, softcap, chunk_rows),
            needs, False,
        )[2]  # fmt: skip

    @gradients_of.register_fake
    def _(*arguments):  # type: ignore[no-untyped-def]
        return fake_gradients(arguments[:6], arguments[15])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *tensors, target, row_scale = inputs[:8]
        ctx.settings, ctx.needs, ctx.summed = inputs[8:15], inputs[15], inputs[16]
        ctx.save_for_backward(target, row_scale, *tensors, *(output[2:] if ctx.summed else ()))
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        target, row_scale, *saved = ctx.saved_tensors
        tensors, gradients = saved[:TENSORS], saved[TENSORS:]
        if ctx.summed:
            gradients = [
                _scaled(d, grad, t.dtype) if need else None
                for d, t, need in zip(gradients, tensors, ctx.needs, strict=True)
            ]
        else:
            scale = _upstream_scale(row_scale, grad)
            found = gradients_of(*tensors, target, scale, *ctx.settings, ctx.needs)
            gradients = [
                d.to(t.dtype) if need else None
                for d, t, need in zip(found, tensors, ctx.needs, strict=True)
            ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = refusing_second_derivative(_OPERATION, gradients, (grad, *tensors))
        return *gradients, *(None,) * 11

    def refuse(ctx: Any, *_: Any) -> None:
        raise second_derivative(_OPERATION)

    forward.register_autograd(backward, setup_context=setup_context)
    gradients_of.register_autograd(refuse)
    _OPERATORS[backend] = forward
