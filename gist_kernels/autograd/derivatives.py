"""Kernels have first derivatives only: every way to a further one refuses, none drops a term."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeAlias

import torch

from gist_kernels.tracing import transformed

Gradients: TypeAlias = "tuple[torch.Tensor | None, ...]"


def once_differentiable(
    operation: str,
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate a node's ``backward(ctx, saved, *upstream)``, ``saved`` being what it saved.

    The gradients can be differentiated by nothing. PyTorch's decorator of that name refuses where
    an upstream gradient requires a gradient. This one also refuses where a saved tensor does:
    gradients depend on both.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def refusing(ctx: Any, *upstream: torch.Tensor | None) -> Gradients:
            for gradient in upstream:
                if transformed(gradient):
                    raise second_derivative(operation)
            saved = ctx.saved_tensors  # once: checkpointing recomputes them once
            if not torch.is_grad_enabled():
                return backward(ctx, saved, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, saved, *upstream)
            return refusing_second_derivative(operation, gradients, (*upstream, *saved))

        return refusing

    return decorate


def refusing_second_derivative(
    operation: str, gradients: Iterable[torch.Tensor | None], sources: Iterable[torch.Tensor | None]
) -> Gradients:
    """The gradients, which raise if they are differentiated with respect to the sources."""
    given = [t for t in sources if t is not None and t.requires_grad]
    return tuple(d if d is None else _NotTwice.apply(operation, d, *given) for d in gradients)


def second_derivative(operation: str) -> NotImplementedError:
    return NotImplementedError(
        f"{operation} has no second derivative in its kernels; compute it inside "
        'gist_kernels.use_backend("reference"), forward pass included'
    )


class _NotTwice(torch.autograd.Function):
    """A gradient that raises if it is differentiated."""

    @staticmethod
    def forward(
        ctx: Any, operation: str, gradient: torch.Tensor, *sources: torch.Tensor
    ) -> torch.Tensor:
        ctx.operation = operation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise second_derivative(ctx.operation)
