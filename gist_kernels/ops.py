"""Loss kernels as differentiable operations.

A kernel module (``kernels.cpu.loss``, ``kernels.triton.loss``) offers forward and backward on plain
tensors. In eager mode they are called through a bare ``torch.autograd.Function``: at
VTAB's sizes a call takes microseconds, less than the dispatcher's Python layers would add. Under
torch.compile and torch.export, and for tensors without memory of their own, the same kernels
appear as ``torch.library`` operators with fake kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from gist_kernels.options import LossOptions


class LossKernels(Protocol):
    """What a kernel module offers. ``target`` is None, (B,) indices or (B, C) probabilities."""

    def stats_shape(self, rows: int) -> tuple[int, ...]:
        """Of the statistics that forward leaves for backward."""

    def forward(
        self,
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
        want_terms: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
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
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(loss, d_cls, d_gist)``, none of them None, for an upstream gradient of 1."""


def loss_operations(backend: str, kernels: LossKernels) -> dict[str, Callable[..., Any]]:
    """The loss family as a backend's table takes it, served by ``kernels``."""
    traced, traced_backward = _register(backend, kernels)

    def gist_loss(
        cls: torch.Tensor,
        gist: torch.Tensor,
        target: torch.Tensor | None,
        options: LossOptions,
        want_terms: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cls, gist, target = _dense_rows(cls), _dense_rows(gist), _dense_rows(target)
        if needs_dispatcher(cls, gist, target):
            loss, terms, _ = traced(cls, gist, target, *_flat(options))
            return loss, terms
        if torch.is_grad_enabled() and (cls.requires_grad or gist.requires_grad):
            return _InteractionLoss.apply(cls, gist, target, (kernels, options, want_terms))
        return kernels.forward(cls, gist, target, options, want_terms)[:2]

    def gist_loss_and_grad(
        cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, options: LossOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        cls, gist, target = _dense_rows(cls), _dense_rows(gist), _dense_rows(target)
        if needs_dispatcher(cls, gist, target):
            cls, gist, target = cls.detach(), gist.detach(), target.detach()
            loss, _, stats = traced(cls, gist, target, *_flat(options))
            one = torch.ones_like(loss)
            d_cls, d_gist = traced_backward(
                one, cls, gist, target, stats, *_flat(options), True, True
            )
            return loss, d_cls, d_gist
        return kernels.forward_backward(cls, gist, target, options)

    return {
        "bidirectional_kl": gist_loss,
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
        settings: tuple[LossKernels, LossOptions, bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kernels, options, want_terms = ctx.settings = settings
        loss, terms, ctx.stats = kernels.forward(cls, gist, target, options, want_terms)
        ctx.save_for_backward(cls, gist, target)
        if terms is not None:
            ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        kernels, options, _ = ctx.settings
        cls, gist, target = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = kernels.backward(
            grad.resolve_neg(), cls, gist, target, ctx.stats, options, needs[0], needs[1]
        )
        if torch.is_grad_enabled():
            gradients = tuple(
                d if d is None else _Once.apply(d, grad, cls, gist) for d in gradients
            )
        return *gradients, None, None


class _Once(torch.autograd.Function):
    """A gradient that would have to be differentiated by what comes after it, and can't be."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise NotImplementedError(
            "the loss kernels have no second derivative; compute the loss inside "
            "gist_kernels.use_backend('reference')"
        )


def _flat(options: LossOptions) -> tuple[list[float], int, str]:
    """The options in an operator schema's types; the inverse of :func:`_options_of`."""
    return list(options[:6]), options.ignore_index, options.reduction


def _options_of(settings: Sequence[float], ignore_index: int, reduction: str) -> LossOptions:
    return LossOptions._make((*settings, ignore_index, reduction))


_T = TypeVar("_T", torch.Tensor, "torch.Tensor | None")


def _dense_rows(tensor: _T) -> _T:
    """Kernels take any row stride, but classes side by side, and numbers as they lie in memory."""
    if tensor is None:
        return tensor
    if not torch.compiler.is_compiling() and tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.ndim == 1 or tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous()


def needs_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether a call is traced, or its tensors have no memory to give a kernel."""
    return (
        torch.compiler.is_compiling()
        or any(tensor is not None and type(tensor) not in _PLAIN for tensor in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _register(backend: str, kernels: LossKernels) -> tuple[Any, Any]:
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
        options = _options_of(settings, ignore_index, reduction)
        loss, terms, stats = kernels.forward(cls, gist, target, options, True)
        assert terms is not None
        return loss, terms, stats

    @loss_forward.register_fake
    def _(cls, gist, target, settings, ignore_index, reduction):  # type: ignore[no-untyped-def]
        rows = cls.shape[0]
        each = (rows,) if reduction == "none" else ()
        dtype = torch.promote_types(cls.dtype, torch.float32)
        return tuple(
            torch.empty(shape, dtype=dtype, device=cls.device)
            for shape in (each, (4, *each), kernels.stats_shape(rows))
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
        found = [d for d in (d_cls, d_gist) if d is not None]
        # An operator's results may not share memory, as two halves of one tensor do.
        storages = {d.untyped_storage().data_ptr() for d in found}
        if len(storages) < len(found):
            return [d.clone(memory_format=torch.contiguous_format) for d in found]
        return found

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
