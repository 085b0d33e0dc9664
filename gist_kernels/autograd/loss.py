"""The loss kernels as differentiable operations.

Eager calls go through a bare ``torch.autograd.Function``: at VTAB's sizes a call takes
microseconds, less than the dispatcher's Python layers would add. Under torch.compile and
torch.export, and for tensors without memory of their own, the same kernels appear as
``torch.library`` operators with fake kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gist_kernels.autograd.derivatives import once_differentiable, second_derivative
from gist_kernels.autograd.tensors import dense_rows, in_memory
from gist_kernels.kernels.protocols import LossKernels, LossOptions
from gist_kernels.tracing import needs_dispatcher


def gist_loss(
    kernels: LossKernels,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(loss, terms)``, differentiable once in both logits."""
    cls, gist, target = dense_rows(cls), dense_rows(gist), dense_rows(target)
    if needs_dispatcher(cls, gist, target, row_scale):
        forward, _ = _OPERATORS[kernels.NAME]
        loss, terms, _ = forward(cls, gist, target, row_scale, *_flat(options))
        return loss, terms
    return eager_gist_loss(kernels, cls, gist, target, options, want_terms, row_scale)


def eager_gist_loss(
    kernels: LossKernels,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`gist_loss` of dense rows, where nothing is traced."""
    if torch.is_grad_enabled() and (cls.requires_grad or gist.requires_grad):
        settings = target, row_scale, kernels, options, want_terms
        found = _GistLoss.apply(cls, gist, settings)
        return found if want_terms else (found, None)
    return kernels.forward(cls, gist, target, options, want_terms, row_scale)[:2]


def gist_loss_and_grad(
    kernels: LossKernels,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(loss, d_cls, d_gist)`` for an upstream gradient of 1."""
    cls, gist, target = dense_rows(cls), dense_rows(gist), dense_rows(target)
    if needs_dispatcher(cls, gist, target, row_scale):
        forward, backward = _OPERATORS[kernels.NAME]
        cls, gist, target = cls.detach(), gist.detach(), target.detach()
        loss, _, stats = forward(cls, gist, target, row_scale, *_flat(options))
        one = torch.ones_like(loss)
        d_cls, d_gist = backward(
            one, cls, gist, target, row_scale, stats, *_flat(options), True, True
        )
        return loss, d_cls, d_gist
    return eager_gist_loss_and_grad(kernels, cls, gist, target, options, row_scale)


def eager_gist_loss_and_grad(
    kernels: LossKernels,
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gist_loss_and_grad` of dense rows, where nothing is traced."""
    found: Any = kernels.forward_backward(cls, gist, target, options, row_scale)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = found
    return result


class _GistLoss(torch.autograd.Function):
    """``settings`` are one argument: each further one costs every call time.

    Where the kernels compute both gradients ahead, they are those of an upstream gradient of 1.
    A call takes them once: its caller may write to what it got.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cls: torch.Tensor,
        gist: torch.Tensor,
        settings: tuple[torch.Tensor | None, torch.Tensor | None, LossKernels, LossOptions, bool],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        target, row_scale, kernels, options, want_terms = settings
        ctx.save_for_backward(cls, gist, target, row_scale)
        ctx.set_materialize_grads(False)
        if want_terms:
            loss, terms, stats = kernels.forward(cls, gist, target, options, True, row_scale)
            ctx.settings, ctx.ahead = (kernels, options, stats), None
            ctx.mark_non_differentiable(terms)
            return loss, terms
        need_cls, need_gist, _ = ctx.needs_input_grad
        both = need_cls and need_gist and options.reduction != "none"
        if both and cls.numel() < kernels.AHEAD:
            loss, *ctx.ahead = kernels.forward_backward(cls, gist, target, options, row_scale)
            ctx.settings = kernels, options, None
        else:
            loss, _, stats = kernels.forward(cls, gist, target, options, False, row_scale)
            ctx.settings, ctx.ahead = (kernels, options, stats), None
        return loss

    @staticmethod
    @once_differentiable("the loss")
    def backward(
        ctx: Any, saved: tuple[torch.Tensor, ...], grad: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None
        ahead, ctx.ahead = ctx.ahead, None
        if ahead is not None:
            upstream = grad.item()
            if upstream == 1:
                return *ahead, None
            # In a half type, a number too small for it would have been lost already.
            if upstream and math.isfinite(upstream) and grad.dtype is ahead[0].dtype:
                return ahead[0].mul_(upstream), ahead[1].mul_(upstream), None
        cls, gist, target, row_scale = saved
        kernels, options, stats = ctx.settings
        if stats is None:
            _, _, stats = kernels.forward(cls, gist, target, options, False, row_scale)
        need_cls, need_gist, _ = ctx.needs_input_grad
        gradients = kernels.backward(
            in_memory(grad), cls, gist, target, stats, options, need_cls, need_gist, row_scale
        )
        return *gradients, None


def _flat(options: LossOptions) -> tuple[list[float], int, str, str]:
    """The options in an operator schema's types; the inverse of :func:`_options_of`."""
    numbers = [*options[:6], options.gist_scale]
    return numbers, options.ignore_index, options.reduction, options.stop_gradient


def _options_of(
    settings: Sequence[float], ignore_index: int, reduction: str, stop_gradient: str
) -> LossOptions:
    *numbers, gist_scale = settings
    return LossOptions._make((*numbers, ignore_index, reduction, gist_scale, stop_gradient))


_OPERATORS: dict[str, tuple[Any, Any]] = {}


def register(backend: str, load: Callable[[], LossKernels]) -> None:
    """Register ``gist_kernels::{backend}_loss`` and ``..._backward``, for tracing."""

    @torch.library.custom_op(f"gist_kernels::{backend}_loss", mutates_args=())
    def loss_forward(
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        settings: Sequence[float],
        ignore_index: int,
        reduction: str,
        stop_gradient: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        options = _options_of(settings, ignore_index, reduction, stop_gradient)
        loss, terms, stats = load().forward(
            cls, gist, target, options, True, row_scale, stateless=True
        )
        assert terms is not None
        return loss, terms, stats

    @loss_forward.register_fake
    def _(  # type: ignore[no-untyped-def]
        cls, gist, target, row_scale, settings, ignore_index, reduction, stop_gradient
    ):
        rows = cls.shape[0]
        each = (rows,) if reduction == "none" else ()
        dtype = torch.promote_types(cls.dtype, torch.float32)
        return tuple(
            torch.empty(shape, dtype=dtype, device=cls.device)
            for shape in (each, (4, *each), load().stats_shape(rows))
        )

    @torch.library.custom_op(f"gist_kernels::{backend}_loss_backward", mutates_args=())
    def loss_backward(
        grad: torch.Tensor,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        stats: torch.Tensor,
        settings: Sequence[float],
        ignore_index: int,
        reduction: str,
        stop_gradient: str,
        need_cls: bool,
        need_gist: bool,
    ) -> list[torch.Tensor]:
        options = _options_of(settings, ignore_index, reduction, stop_gradient)
        d_cls, d_gist = load().backward(
            grad, cls, gist, target, stats, options, need_cls, need_gist, row_scale
        )
        found = [d for d in (d_cls, d_gist) if d is not None]
        # An operator's results may not share memory, as two halves of one tensor do.
        storages = {d.untyped_storage().data_ptr() for d in found}
        if len(storages) < len(found):
            return [d.clone(memory_format=torch.contiguous_format) for d in found]
        return found

    @loss_backward.register_fake
    def _(  # type: ignore[no-untyped-def]
        grad, cls, gist, target, row_scale, stats, settings, ignore_index, reduction, stop_gradient,
        need_cls, need_gist,
    ):  # fmt: skip
        return [
            side.new_empty(side.shape)
            for side, need in ((cls, need_cls), (gist, need_gist))
            if need
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        cls, gist, target, row_scale, *ctx.settings = inputs
        _, terms, stats = output
        ctx.save_for_backward(cls, gist, target, row_scale, stats)
        ctx.mark_non_differentiable(terms, stats)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        gradients: list[torch.Tensor | None] = [None, None]
        needed = ctx.needs_input_grad[:2]
        if grad is not None:
            found = iter(loss_backward(grad, *ctx.saved_tensors, *ctx.settings, *needed))
            gradients = [next(found) if need else None for need in needed]
        return *gradients, None, None, None, None, None, None

    def refuse(ctx: Any, *_: Any) -> None:
        raise second_derivative("the loss")

    loss_forward.register_autograd(backward, setup_context=setup_context)
    loss_backward.register_autograd(refuse)
    _OPERATORS[backend] = loss_forward, loss_backward
