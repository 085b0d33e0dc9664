"""The operations as ``torch.library`` operators, for calls that are traced or intercepted.

``torch.compile``, ``torch.export`` and selective activation checkpointing see operators only. Each
operation is one for forward and one for backward, ``gist_kernels::{backend}_{operation}`` and
``..._backward``. Their arguments are flat. What backward reads beside them is results of forward,
so that whoever plans memory sees it. The equations are those of the eager nodes, which are the
shorter way of a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.derivatives import second_derivative


class Operation(NamedTuple):
    """One operation, before a backend's kernels are given to it."""

    name: str
    """That of the public function."""
    trained: tuple[str, ...]
    """The tensors that may have a gradient, as the schema declares them."""
    options: tuple[str, ...]
    """The arguments that are no tensors."""
    saved: tuple[str, ...]
    """The names of what forward keeps for backward; each may be None."""
    forward: Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor | None]]]
    """``forward(kernels, tensors, options)`` to the result and what is saved."""
    backward: Callable[..., Sequence[Any]]
    """``backward(kernels, tensors, options, saved, needs, d_out)`` to the gradients of
    ``trained``, at least where ``needs`` says so."""
    added: str | None = None
    """A tensor that is added to the result: its gradient is the upstream one."""
    frozen: tuple[str, ...] = ()
    """The other tensors."""

    def register(self, backend: str, load: Callable[[], Any], shapes: Any) -> Any:
        """Define both operators; returns forward's. ``load`` returns the backend's kernels,
        ``shapes`` are kernels of :mod:`gist_kernels.autograd.shapes`."""
        added = () if self.added is None else (self.added,)
        declared = (*self.trained, *added, *self.frozen)
        arguments = ", ".join((*declared, *self.options))
        results = ", ".join(["Tensor"] * (1 + len(self.saved)))
        kept_ones = "".join(f", Tensor? {name}" for name in self.saved)
        forward = _define(f"{backend}_{self.name}", f"({arguments}) -> ({results})")
        backward = _define(
            f"{backend}_{self.name}_backward",
            f"(Tensor d_out, {arguments}{kept_ones}, bool[] needs) -> Tensor[]",
        )
        trained, tensors, values = len(self.trained), len(declared), len(declared + self.options)

        def computed(kernels: Any, *given: Any) -> tuple[torch.Tensor, ...]:
            result, kept = self.forward(kernels, given[:tensors], given[tensors:])
            # An operator's results are tensors: one of a single dimension stands for None.
            return result, *(result.new_empty(0) if t is None else t for t in kept)

        def gradients(d_out: torch.Tensor, *given: Any) -> list[torch.Tensor]:
            needs = given[-1]
            found = self.backward(
                load(), given[:tensors], given[tensors:values], given[values:-1], needs, d_out
            )
            return [d.contiguous() for d, need in zip(found, needs, strict=True) if need]

        def gradients_like(d_out: torch.Tensor, *given: Any) -> list[torch.Tensor]:
            needs = given[-1]
            return [
                tensor.new_empty(tensor.shape)
                for tensor, need in zip(given[:trained], needs, strict=True)
                if need
            ]

        def setup_context(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            kept = [None if t.ndim == 1 else t for t in output[1:]]
            ctx.save_for_backward(*inputs[:tensors], *kept)
            ctx.options = inputs[tensors:]
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        def differentiate(ctx: Any, d_out: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
            result: list[Any] = [None] * values
            if d_out is None:
                return tuple(result)
            if self.added is not None and ctx.needs_input_grad[trained]:
                result[trained] = d_out
            needs, saved = list(ctx.needs_input_grad[:trained]), ctx.saved_tensors
            given = *saved[:tensors], *ctx.options, *saved[tensors:]
            found = iter(backward(d_out, *given, needs) if any(needs) else ())
            result[:trained] = [next(found) if need else None for need in needs]
            return tuple(result)

        def refuse(ctx: Any, *_: Any) -> None:
            raise second_derivative(self.name)

        _implement(forward, lambda *v: computed(load(), *v), lambda *v: computed(shapes, *v))
        _implement(backward, gradients, gradients_like)
        torch.library.register_autograd(
            _qualified(forward), differentiate, setup_context=setup_context
        )
        torch.library.register_autograd(_qualified(backward), refuse)
        return forward


def _define(name: str, schema: str) -> Any:
    qualified = f"gist_kernels::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.gist_kernels, name).default


def _implement(operator: Any, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # Not torch.library.custom_op, whose Python around each call takes as long as a small kernel.
    torch.library.impl(_qualified(operator), "default", run)
    torch.library.register_fake(_qualified(operator), fake)


def _qualified(operator: Any) -> str:
    return f"gist_kernels::{operator._schema.name.partition('::')[2]}"
