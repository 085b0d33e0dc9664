"""The knowledge-interaction loss.

The method and its weights are those of GIST, "Improving Parameter Efficient Fine Tuning via
Knowledge Interaction" (arXiv:2312.07255). With ``p = softmax(cls / T)`` and
``q = softmax(gist / T)``::

    loss = cls_weight * CE(cls, y) + gist_weight * CE(gist, y)
         + kl_weights[0] * KL(p || q) + kl_weights[1] * KL(q || p)

There is no factor T^2, and nothing is detached: gradients flow into both logits. To stop them on
one side, pass ``logits.detach()``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch

from gist_kernels import autograd, check, reference
from gist_kernels.backend import BACKENDS, select
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.suggest import unknown_name
from gist_kernels.tracing import batched, under_transform

Reduction: TypeAlias = Literal["mean", "batchmean", "sum", "none"]
REDUCTIONS = get_args(Reduction)

for _backend in BACKENDS:
    if _backend.loss is not None:
        autograd.register(_backend.loss)

_CHECK_TARGETS = os.environ.get("GIST_KERNELS_CHECK_TARGETS", "0") not in ("", "0")


class GistLossTerms(NamedTuple):
    """The loss's four terms, unweighted, reduced as the loss is, without gradient."""

    cls_cross_entropy: torch.Tensor
    gist_cross_entropy: torch.Tensor
    kl_cls_gist: torch.Tensor
    """KL(p || q), p of the class token, q of the Gist token."""
    kl_gist_cls: torch.Tensor
    """KL(q || p)."""


def bidirectional_kl(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    *,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    reduction: Reduction = "batchmean",
) -> torch.Tensor:
    """``weights[0] * KL(p || q) + weights[1] * KL(q || p)`` of two logit tensors' softmaxes.

    ``p = softmax(logits_a / temperature)``, ``q = softmax(logits_b / temperature)``, without a
    factor of temperature^2. Computed from log-sum-exps: finite for any finite logits. A logit of
    -inf is a masked class: masked on both sides it adds nothing; masked in q alone, KL(p || q) is
    +inf, as it should be (give that direction the weight 0 to leave it out).

    Args:
        logits_a: (B, C) float32, bfloat16, float16 or float64.
        logits_b: same shape, dtype and device.
        temperature: T > 0.
        weights: of the two directions.
        reduction: "batchmean" or "mean" (both divide by B, never by C), "sum", or "none" for (B,).

    Returns:
        A scalar, or (B,) for "none"; float32, float64 for float64 logits. An empty batch gives
        nan for a mean and 0 for a sum.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    options = _checked_options(temperature, 0.0, 0.0, weights, 0.0, -100, reduction, "weights")
    if not _plainly_valid(logits_a, logits_b):
        _check_logits("logits_a", logits_a, "logits_b", logits_b)
    return _gist_loss(logits_a, logits_b, None, options, False)[0]


@overload
def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = ...,
    cls_weight: float = ...,
    gist_weight: float = ...,
    kl_weights: tuple[float, float] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    return_terms: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = ...,
    cls_weight: float = ...,
    gist_weight: float = ...,
    kl_weights: tuple[float, float] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    return_terms: Literal[True],
) -> tuple[torch.Tensor, GistLossTerms]: ...


def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 3.0,
    cls_weight: float = 1.0,
    gist_weight: float = 0.5,
    kl_weights: tuple[float, float] = (0.75, 0.75),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_terms: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GistLossTerms]:
    """The GIST training loss (formula at the top of this module), defaults as published.

    Args:
        cls_logits: (B, C) logits of the class token; float32, bfloat16, float16 or float64.
        gist_logits: (B, C) logits of the Gist token; same dtype and device.
        target: (B,) int64 class indices, or (B, C) class probabilities (mixup) in any floating
            dtype, which are not checked to sum to 1 and get no gradient.
        temperature: T > 0 (1e-15 to 1e15), of the KL terms only. No factor T^2 is applied.
        cls_weight, gist_weight: of the two cross-entropies.
        kl_weights: of KL(cls || gist) and KL(gist || cls). A weight of 0 leaves its term out.
        label_smoothing: in [0, 1), as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: rows with this class index count in no term, no mean and no gradient.
        reduction: "mean" or "batchmean" (both divide by the number of rows not ignored, never by
            C), "sum", or "none" for (B,), ignored rows 0.
        return_terms: return ``(loss, GistLossTerms)`` instead.

    Returns:
        The loss: a scalar, or (B,) for "none"; float32, float64 for float64 logits. No rows, or
        none that count, give nan for a mean and 0 for a sum, as in PyTorch. It can be
        differentiated once; for second derivatives take ``use_backend("reference")``. torch.func
        transforms and forward-mode differentiation take the reference by themselves.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, C), for CPU tensors. On other devices the check would
            cost a synchronisation, and that row's loss and gradient are nan; the environment
            variable ``GIST_KERNELS_CHECK_TARGETS=1`` has it made there too. Targets that
            ``torch.vmap`` has batched are never checked.
    """
    options = _checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction
    )
    _check_tensors(cls_logits, gist_logits, target, options)
    loss, terms = _gist_loss(cls_logits, gist_logits, target, options, return_terms)
    return loss if terms is None or not return_terms else (loss, GistLossTerms(*terms.unbind()))


def _gist_loss(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor | None,
    options: LossOptions,
    want_terms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    kernels = select("loss", cls)
    if kernels is None:
        return reference.gist_loss(cls, gist, target, options, want_terms)
    return autograd.gist_loss(kernels, cls, gist, target, options, want_terms)


def gist_loss_and_grad(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 3.0,
    cls_weight: float = 1.0,
    gist_weight: float = 0.5,
    kl_weights: tuple[float, float] = (0.75, 0.75),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gist_loss` and its gradients in one call, outside autograd: all three are detached.

    Takes the same arguments and raises the same errors; the logits' ``requires_grad`` does not
    matter. With ``reduction="none"`` the gradients are those of the sum of the rows' losses.

    Returns:
        ``(loss, d_cls, d_gist)``: the loss as :func:`gist_loss` returns it and two
        (B, C) gradients in the logits' dtype. Those of stacked logits (:func:`split_heads`) are
        the halves of one tensor.
    """
    options = _checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction
    )
    _check_tensors(cls_logits, gist_logits, target, options)
    kernels = select("loss", cls_logits)
    if kernels is None:
        return reference.gist_loss_and_grad(cls_logits, gist_logits, target, options)
    return autograd.gist_loss_and_grad(kernels, cls_logits, gist_logits, target, options)


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


def _checked_options(*arguments: Any) -> LossOptions:
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


def _check_tensors(
    cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, options: LossOptions
) -> None:
    plain = (
        _plainly_valid(cls, gist)
        and type(target) is torch.Tensor
        and target.dtype is torch.int64
        and target.shape == cls.shape[:1]
        and target.device == cls.device
        and target.layout is torch.strided
    )
    if not plain:
        _check_logits("cls_logits", cls, "gist_logits", gist)
        _check_target(target, cls)
    if _CHECK_TARGETS and not (torch.compiler.is_compiling() or batched(target)):
        check.class_indices("target", target, cls.shape[1], options.ignore_index)


def _plainly_valid(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both logits are what :func:`_check_logits` asks for: the common case, told fast."""
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


def _check_logits(name_a: str, a: torch.Tensor, name_b: str, b: torch.Tensor) -> None:
    check.floating(name_a, a)
    check.shape(name_a, a, (None, None), "(B, C)")
    if a.shape[1] < 1:
        raise ValueError(f"{name_a} must have at least one class; it has shape {tuple(a.shape)}")
    check.shape(name_b, b, tuple(a.shape), f"(B, C) as {name_a}")
    check.alike(name_b, b, name_a, a)


def _check_target(target: torch.Tensor, logits: torch.Tensor) -> None:
    check.tensor("target", target)
    rows, classes = logits.shape
    if target.device != logits.device:
        raise ValueError(
            f"target is on {target.device} and the logits on {logits.device}; move one of them"
        )
    if target.dtype in check.FLOATING:
        check.shape("target", target, (rows, classes), "(B, C) for class probabilities")
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError("target requires a gradient, and gets none; pass target.detach()")
        return
    if target.dtype != torch.int64:
        raise TypeError(
            "target must be int64 class indices or floating-point class probabilities; "
            f"it is {target.dtype} (convert with target.long())"
        )
    check.shape("target", target, (rows,), "(B,) for class indices")
