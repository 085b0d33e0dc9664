"""Logits and the options of a loss over them: what the loss and the divergences share."""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch

from gist_kernels import check
from gist_kernels.autograd.derivatives import under_transform
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.suggest import unknown_name

Reduction: TypeAlias = Literal["mean", "batchmean", "sum", "none"]
REDUCTIONS = get_args(Reduction)


def split_heads(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two (B, C) heads of one (B, 2, C) tensor, as a shared classifier gives them.

    They are views, as ``logits.unbind(1)`` would return. But :func:`gist_loss` writes the gradients
    of such a pair as the halves of one tensor, which the backward pass here hands on as it is,
    where autograd would copy them into another.

    Raises:
        TypeError: not a floating-point tensor. ValueError: another shape.
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
    temperature: float,
    cls_weight: float,
    gist_weight: float,
    kl_weights: tuple[float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    kl_weights_name: str = "kl_weights",
) -> LossOptions:
    check.positive("temperature", temperature)
    if not 1e-15 <= temperature <= 1e15:
        raise ValueError(f"temperature must be in [1e-15, 1e15]; it is {temperature}")
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
    if reduction not in REDUCTIONS:
        raise ValueError(unknown_name("reduction", str(reduction), REDUCTIONS))
    return LossOptions(
        float(temperature),
        float(cls_weight),
        float(gist_weight),
        float(kl_weights[0]),
        float(kl_weights[1]),
        float(label_smoothing),
        int(ignore_index),
        "mean" if reduction == "batchmean" else reduction,
    )


# Typed, for True is not 1.0; a pair is hashed without its types, but True in it is 1.0 there.
_cached_options = lru_cache(maxsize=256, typed=True)(_options)


def plainly_valid(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both logits are what :func:`check_logits` asks for: the common case, told fast."""
    if type(a) is not torch.Tensor or type(b) is not torch.Tensor:
        return False
    shape = a.shape
    return (
        len(shape) == 2
        and shape[1] > 0
        and b.shape == shape
        and a.dtype in check.FLOATING
        and b.dtype is a.dtype
        and b.device == a.device
        and a.layout is torch.strided
        and b.layout is torch.strided
    )


def check_logits(name_a: str, a: torch.Tensor, name_b: str, b: torch.Tensor) -> None:
    check.floating(name_a, a)
    check.shape(name_a, a, (None, None), "(B, C)")
    if a.shape[1] < 1:
        raise ValueError(f"{name_a} must have at least one class; it has shape {tuple(a.shape)}")
    check.shape(name_b, b, tuple(a.shape), f"(B, C) as {name_a}")
    check.alike(name_b, b, name_a, a)
