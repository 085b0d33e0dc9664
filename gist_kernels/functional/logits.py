"""Logits and the options of a loss over them: what the loss and the divergences share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch

from gist_kernels import autograd, check
from gist_kernels.backend import select
from gist_kernels.check import unknown_name
from gist_kernels.functional.rows import RowOptions, in_rows
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.tracing import under_transform

Reduction: TypeAlias = Literal["mean", "batchmean", "sum", "none"]
REDUCTIONS = get_args(Reduction)
StopGradient: TypeAlias = Literal["a", "b", "targets"]
STOP_GRADIENT = get_args(StopGradient)


def split_heads(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two (B, C) heads of one (B, 2, C) tensor, as a shared classifier gives them.

    They are views, as ``logits.unbind(1)`` would return. But :func:`gist_loss` writes the gradients
    of such a pair as the halves of one tensor, which the backward pass here hands on as it is,
    where autograd would copy them into another.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape.
    """
    check.floating("logits", logits)
    check.shape("logits", logits, (None, 2, None), "(B, 2, C)")
    if not torch.compiler.is_compiling() and under_transform():  # no place for a node
        return logits[:, 0], logits[:, 1]
    cls_logits, gist_logits = _SplitHeads.apply(logits)
    return cls_logits, gist_logits


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits[:, 0], logits[:, 1]

    @staticmethod
    def backward(ctx: Any, d_cls: torch.Tensor, d_gist: torch.Tensor) -> torch.Tensor:
        traced = torch.compiler.is_compiling() or torch.is_grad_enabled() or under_transform()
        if not traced and type(d_cls) is type(d_gist) is torch.Tensor:
            rows, classes = d_cls.shape
            halves = (
                d_cls.stride() == d_gist.stride() == (2 * classes, 1)
                and d_cls.untyped_storage().data_ptr() == d_gist.untyped_storage().data_ptr()
                and d_gist.storage_offset() == d_cls.storage_offset() + classes
            )
            if halves:
                return d_cls.as_strided((rows, 2, classes), (2 * classes, classes, 1))
        return torch.stack((d_cls, d_gist), dim=1)


def checked_options(*arguments: Any) -> LossOptions:
    """The arguments of :func:`_options`, checked, once for all calls with the same."""
    # A traced call needs no cache, and the tracer would warn of it.
    if not torch.compiler.is_compiling():
        try:
            return _cached_options(*arguments)
        except TypeError:  # one that can't be hashed, or one that is explained here:
            pass
    return _options(*arguments)


def _options(
    temperature: float | tuple[float, float],
    cls_weight: float,
    gist_weight: float,
    kl_weights: tuple[float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    scale_by_temperature_squared: bool,
    stop_gradient: str | None,
    kl_weights_name: str = "kl_weights",
) -> LossOptions:
    first, second = checked_temperatures(temperature, 2)
    check.finite("cls_weight", cls_weight)
    check.finite("gist_weight", gist_weight)
    check.weight_pair(kl_weights_name, kl_weights)
    check.finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); it is {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits; it is {ignore_index}")
    check_reduction(reduction)
    check.boolean("scale_by_temperature_squared", scale_by_temperature_squared)
    if stop_gradient is not None and stop_gradient not in STOP_GRADIENT:
        raise ValueError(unknown_name("stop_gradient", str(stop_gradient), STOP_GRADIENT))
    squared = first * second if scale_by_temperature_squared else 1.0
    return LossOptions(
        first,
        float(cls_weight),
        float(gist_weight),
        float(kl_weights[0]) * squared,
        float(kl_weights[1]) * squared,
        float(label_smoothing),
        int(ignore_index),
        "mean" if reduction == "batchmean" else reduction,
        first / second,
        stop_gradient or "",
    )


# Typed, for True is not 1.0; a pair is hashed without its types, but True in it is 1.0 there.
_cached_options = lru_cache(maxsize=256, typed=True)(_options)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(unknown_name("reduction", str(reduction), REDUCTIONS))


def checked_temperatures(
    temperature: float | Sequence[float], sides: int, meaning: str = "a pair, one for each side"
) -> tuple[float, ...]:
    """One temperature for each side, given one for all or as many as there are sides."""
    if not isinstance(temperature, Sequence) or isinstance(temperature, str):
        return (_checked_temperature("temperature", temperature),) * sides
    if len(temperature) != sides:
        raise ValueError(f"temperature must be a number or {meaning}; it is {temperature!r}")
    found = tuple(_checked_temperature(f"temperature[{i}]", t) for i, t in enumerate(temperature))
    if max(found) > 1e6 * min(found):
        raise ValueError(f"temperature: at most a factor of 1e6 between sides; it is {temperature}")
    return found


def _checked_temperature(name: str, temperature: float) -> float:
    check.positive(name, temperature)
    if not 1e-15 <= temperature <= 1e15:
        raise ValueError(f"{name} must be in [1e-15, 1e15]; it is {temperature}")
    return float(temperature)


def plainly_valid(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both logits are what :func:`check_logits` asks for: the common case, told fast."""
    if type(a) is not torch.Tensor or type(b) is not torch.Tensor:
        return False
    shape, dtype = a.shape, a.dtype
    return (
        len(shape) > 0
        and shape[-1] > 0
        and b.shape == shape
        and dtype in check.FLOATING
        and (b.dtype is dtype or b.dtype in check.FLOATING)
        and b.device == a.device
        and a.layout is b.layout is torch.strided
    )


def check_logits(name_a: str, a: torch.Tensor, name_b: str, b: torch.Tensor) -> None:
    check.floating(name_a, a)
    if a.ndim < 1:
        raise ValueError(f"{name_a} must have shape (..., C); it has {tuple(a.shape)}")
    if a.shape[-1] < 1:
        raise ValueError(f"{name_a} must have at least one class; it has shape {tuple(a.shape)}")
    check.floating(name_b, b)
    if b.shape != a.shape:
        other = ""
        if b.ndim and b.shape[-1] != a.shape[-1]:
            other = (
                f": {b.shape[-1]} classes, where {name_a} has {a.shape[-1]}; "
                "cut or pad one side to the vocabulary of the other"
            )
        raise ValueError(
            f"{name_b} must have shape (..., C) as {name_a}, here {tuple(a.shape)}; "
            f"it has {tuple(b.shape)}{other}"
        )
    check.alike(name_b, b, name_a, a, any_float=True)


def evaluate(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    rows: RowOptions,
    want_terms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss and its terms of checked arguments, by the kernels that serve them."""
    shape = cls.shape
    cls, gist, kernels = _served(cls, gist)
    cls, gist, target, options, scale = in_rows(cls, gist, target, options, rows)
    if kernels is None:
        from gist_kernels import reference

        loss, terms = reference.gist_loss(cls, gist, target, options, want_terms, scale)
    else:
        loss, terms = autograd.gist_loss(kernels, cls, gist, target, options, want_terms, scale)
    if options.reduction == "none" and len(shape) != 2:
        leading = shape[:-1]
        loss = loss.reshape(leading)
        terms = None if terms is None else terms.reshape(4, *leading)
    return loss, terms


def evaluate_with_gradients(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    rows: RowOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and both gradients of checked arguments, by the kernels that serve them."""
    shape, dtypes = cls.shape, (cls.dtype, gist.dtype)
    cls, gist, kernels = _served(cls, gist)
    cls, gist, flat, options, scale = in_rows(cls, gist, target, options, rows)
    assert flat is not None
    if kernels is None:
        from gist_kernels import reference

        found = reference.gist_loss_and_grad(cls, gist, flat, options, scale)
    else:
        found = autograd.gist_loss_and_grad(kernels, cls, gist, flat, options, scale)
    loss, *gradients = found
    if len(shape) != 2:
        gradients = [d.reshape(shape) for d in gradients]
        loss = loss.reshape(shape[:-1]) if options.reduction == "none" else loss
    d_cls, d_gist = (d.to(dtype) for d, dtype in zip(gradients, dtypes, strict=True))
    return loss, d_cls, d_gist


def _served(cls: torch.Tensor, gist: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Both sides as the kernels that serve them take them, and these kernels."""
    if cls.dtype is gist.dtype:
        return cls, gist, select("loss", cls)
    common = torch.promote_types(cls.dtype, gist.dtype)
    kernels = select("loss", cls if cls.dtype is common else gist.to(common))
    if common is torch.float64 or kernels is None or not kernels.MIXED_DTYPES:
        cls, gist = cls.to(common), gist.to(common)
    return cls, gist, kernels
