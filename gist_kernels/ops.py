"""Loss kernels as differentiable operations.

A kernel module (``gist_kernels.cpu.loss``, ``gist_kernels.gpu.loss``) offers forward and backward
on plain tensors. In eager mode they are called through a bare ``torch.autograd.Function``: at
VTAB's sizes a call takes microseconds, less than the dispatcher's Python layers would add. Under
torch.compile and torch.export, and for tensors without memory of their own, the same kernels
appear as ``torch.library`` operators with fake kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from gist_kernels.options import LossOptions

Tensors2 = tuple[torch.Tensor, torch.Tensor]


class LossKernels(Protocol):
    """What a kernel module offers. ``target`` is None, (B,) indices or (B, C) probabilities."""

    def forward(
        self,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(loss, terms, stats)``: terms (4,) or (4, B), stats what ``backward`` needs."""

    def backward(
        self,
        grad: torch.Tensor,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        stats: torch.Tensor,
        options: LossOptions,
        need_cls: bool,
        need_gist: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both gradients, in the logits' dtype; None for a side that needs none."""

    def forward_backward(
        self,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(loss, terms, d_cls, d_gist)`` for an upstream gradient of 1, neither None."""


def loss_operations(
    backend: str, kernels: LossKernels, stats_shape: Callable[[int], tuple[int, ...]]
) -> dict[str, Callable[..., Any]]:
    """The loss family as a backend's table takes it, served by ``kernels``.

    ``stats_shape`` gives the shape of the kernels' statistics for a number of rows.
    """
    traced, traced_backward = _register(backend, kernels, stats_shape)

    def differentiable(
        cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor | None, options: LossOptions
    ) -> Tensors2:
        cls, gist = _dense_rows(cls), _dense_rows(gist)
        if target is not None and target.ndim == 2:
            target = _dense_rows(target)
        if _needs_dispatcher(cls, gist):
            loss, terms, _ = traced(cls, gist, target, *_flat(options))
            return loss, terms
        if torch.is_grad_enabled() and (cls.requires_grad or gist.requires_grad):
            return _InteractionLoss.apply(cls, gist, target, options, kernels)
        return kernels.forward(cls, gist, target, options)[:2]

    def bidirectional_kl(
        logits_a: torch.Tensor,
        logits_b: torch.Tensor,
        *,
        temperature: float,
        weights: tuple[float, float],
        reduction: str,
    ) -> torch.Tensor:
        options = LossOptions(temperature, 0.0, 0.0, *weights, 0.0, -100, _REDUCTION[reduction])
        return differentiable(logits_a, logits_b, None, options)[0]

    def gist_loss(
        cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        loss, terms = differentiable(cls, gist, target, _options(**options))
        return loss, terms.unbind()

    def gist_loss_and_grad(
        cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        cls, gist, target = cls.detach(), gist.detach(), target.detach()
        settings = _options(**options)
        if _needs_dispatcher(cls, gist):
            loss, terms, stats = traced(cls, gist, target, *_flat(settings))
            gradients = traced_backward(
                torch.ones_like(loss), cls, gist, target, stats, *_flat(settings), True, True
            )
            return loss, terms.unbind(), *gradients
        target = _dense_rows(target) if target.ndim == 2 else target
        loss, terms, d_cls, d_gist = kernels.forward_backward(
            _dense_rows(cls), _dense_rows(gist), target, settings
        )
        return loss, terms.unbind(), d_cls, d_gist

    return {
        "bidirectional_kl": bidirectional_kl,
        "gist_loss": gist_loss,
        "gist_loss_and_grad": gist_loss_and_grad,
    }


class _InteractionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
        kernels: LossKernels,
    ) -> Tensors2:
        loss, terms, stats = kernels.forward(cls, gist, target, options)
        ctx.save_for_backward(cls, gist, target, stats)
        ctx.settings = options, kernels
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        options, kernels = ctx.settings
        gradients = kernels.backward(grad, *ctx.saved_tensors, options, *ctx.needs_input_grad[:2])
        return *gradients, None, None, None


_REDUCTION = {"mean": "mean", "batchmean": "mean", "sum": "sum", "none": "none"}


def _options(
    *,
    temperature: float,
    cls_weight: float,
    gist_weight: float,
    kl_weights: tuple[float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> LossOptions:
    return LossOptions(
        temperature,
        cls_weight,
        gist_weight,
        *kl_weights,
        label_smoothing,
        ignore_index,
        _REDUCTION[reduction],
    )


def _flat(options: LossOptions) -> tuple[list[float], int, str]:
    """The options in an operator schema's types; the inverse of :func:`_options_of`."""
    return [float(value) for value in options[:6]], options.ignore_index, options.reduction


def _options_of(settings: Sequence[float], ignore_index: int, reduction: str) -> LossOptions:
    temperature, cls_weight, gist_weight, kl_cls_gist, kl_gist_cls, smoothing = settings
    return LossOptions(
        temperature,
        cls_weight,
        gist_weight,
        kl_cls_gist,
        kl_gist_cls,
        smoothing,
        ignore_index,
        reduction,
    )


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Kernels take any row stride, but classes side by side."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _needs_dispatcher(*tensors: torch.Tensor) -> bool:
    """Whether a call is traced, or its tensors have no memory to give a kernel."""
    return torch.compiler.is_compiling() or any(
        type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter for t in tensors
    )


def _register(
    backend: str, kernels: LossKernels, stats_shape: Callable[[int], tuple[int, ...]]
) -> tuple[Any, Any]:
    """The kernels as ``gist_kernels::{backend}_loss`` and ``..._backward``, for tracing."""

    @torch.library.custom_op(f"gist_kernels::{backend}_loss", mutates_args=())
    def loss_forward(
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        settings: Sequence[float],
        ignore_index: int,
        reduction: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return kernels.forward(cls, gist, target, _options_of(settings, ignore_index, reduction))

    @loss_forward.register_fake
    def _(cls, gist, target, settings, ignore_index, reduction):  # type: ignore[no-untyped-def]
        rows = cls.shape[0]
        each = (rows,) if reduction == "none" else ()
        dtype = torch.promote_types(cls.dtype, torch.float32)
        return tuple(
            torch.empty(shape, dtype=dtype, device=cls.device)
            for shape in (each, (4, *each), stats_shape(rows))
        )

    @torch.library.custom_op(f"gist_kernels::{backend}_loss_backward", mutates_args=())
    def loss_backward(
        grad: torch.Tensor,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        stats: torch.Tensor,
        settings: Sequence[float],
        ignore_index: int,
        reduction: str,
        need_cls: bool,
        need_gist: bool,
    ) -> list[torch.Tensor]:
        options = _options_of(settings, ignore_index, reduction)
        d_cls, d_gist = kernels.backward(
            grad, cls, gist, target, stats, options, need_cls, need_gist
        )
        # An operator's results may not share memory, as two halves of one tensor do.
        return [
            d.contiguous() if d._base is None else d.clone(memory_format=torch.contiguous_format)
            for d in (d_cls, d_gist)
            if d is not None
        ]

    @loss_backward.register_fake
    def _(  # type: ignore[no-untyped-def]
        grad, cls, gist, target, stats, settings, ignore_index, reduction, need_cls, need_gist
    ):
        return [cls.new_empty(cls.shape) for need in (need_cls, need_gist) if need]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        cls, gist, target, *ctx.settings = inputs
        _, terms, stats = output
        ctx.save_for_backward(cls, gist, target, stats)
        ctx.mark_non_differentiable(terms, stats)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
        gradients: list[torch.Tensor | None] = [None, None]
        needed = ctx.needs_input_grad[:2]
        if grad is not None:
            found = iter(loss_backward(grad, *ctx.saved_tensors, *ctx.settings, *needed))
            gradients = [next(found) if need else None for need in needed]
        return *gradients, None, None, None, None

    loss_forward.register_autograd(backward, setup_context=setup_context)
    return loss_forward, loss_backward
