"""The knowledge-interaction loss of GIST."""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple, overload

import torch

from gist_kernels import autograd, check
from gist_kernels.backend import BACKENDS, select
from gist_kernels.functional.logits import (
    Reduction,
    StopGradient,
    check_logits,
    checked_options,
    evaluate,
    evaluate_with_gradients,
    plainly_valid,
)
from gist_kernels.functional.rows import RowOptions, check_rows, row_options
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.tracing import batched, needs_dispatcher

for _backend in BACKENDS:
    if _backend.loss is not None:
        autograd.register_loss(_backend.name, _backend.loss)

_CHECK_TARGETS = os.environ.get("GIST_KERNELS_CHECK_TARGETS", "0") not in ("", "0")


class GistLossTerms(NamedTuple):
    """The loss's four terms, unweighted, reduced as the loss is, without gradient."""

    cls_cross_entropy: torch.Tensor
    """Of the class token's logits, at temperature 1."""
    gist_cross_entropy: torch.Tensor
    """Of the Gist token's logits, at temperature 1."""
    kl_cls_gist: torch.Tensor
    """KL(p || q), p of the class token, q of the Gist token."""
    kl_gist_cls: torch.Tensor
    """KL(q || p)."""


@overload
def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = ...,
    cls_weight: float = ...,
    gist_weight: float = ...,
    kl_weights: tuple[float, float] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    mask: torch.Tensor | None = ...,
    row_weight: torch.Tensor | None = ...,
    divisor: float | torch.Tensor | None = ...,
    stop_gradient: StopGradient | None = ...,
    scale_by_temperature_squared: bool = ...,
    return_terms: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = ...,
    cls_weight: float = ...,
    gist_weight: float = ...,
    kl_weights: tuple[float, float] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    mask: torch.Tensor | None = ...,
    row_weight: torch.Tensor | None = ...,
    divisor: float | torch.Tensor | None = ...,
    stop_gradient: StopGradient | None = ...,
    scale_by_temperature_squared: bool = ...,
    return_terms: Literal[True],
) -> tuple[torch.Tensor, GistLossTerms]: ...


def gist_loss(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = 3.0,
    cls_weight: float = 1.0,
    gist_weight: float = 0.5,
    kl_weights: tuple[float, float] = (0.75, 0.75),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    stop_gradient: StopGradient | None = None,
    scale_by_temperature_squared: bool = False,
    return_terms: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GistLossTerms]:
    """The knowledge-interaction loss of GIST (arXiv:2312.07255), with its published weights.

    With ``p = softmax(cls / T)`` and ``q = softmax(gist / T)``::

        loss = cls_weight * CE(cls, y) + gist_weight * CE(gist, y)
             + kl_weights[0] * KL(p || q) + kl_weights[1] * KL(q || p)

    Gradients flow into both sides, and there is no factor T^2, unless an option asks for it. A row
    is one distribution over C classes: an image, or a token of a sequence.

    Args:
        cls_logits: (..., C) logits of the class token; float32, bfloat16, float16 or float64. No
            copy is made where one stride leads from each row to the next and classes are
            contiguous.
        gist_logits: logits of the Gist token, of the same shape and device; any of the dtypes.
        target: (...) int64 class indices, or (..., C) class probabilities (mixup) in any floating
            dtype, which are not checked to sum to 1 and get no gradient.
        temperature: T > 0 (1e-15 to 1e15), of the KL terms only; or a pair, of the class and of the
            Gist logits.
        cls_weight, gist_weight: of the two cross-entropies.
        kl_weights: of KL(cls || gist) and KL(gist || cls). A weight of 0 leaves its term out.
        label_smoothing: in [0, 1), as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: rows with this class index count in no term, no mean and no gradient.
        reduction: "mean" or "batchmean" (both divide by the number of rows that count, never by
            C), "sum", or "none" for (...), rows that don't count 0.
        mask: (...) bool, True where a row counts. What other rows hold, nan included, reaches no
            result, and their gradient is 0.
        row_weight: (...) floating point, what each row's loss and terms are multiplied by. A row of
            weight 0 adds nothing, as if masked, but a mean still counts it.
        divisor: a number or a 0-dim tensor, which no one reads on the host: what a mean divides by
            instead of the number of rows that count, for instance ``num_items_in_batch`` under
            gradient accumulation, or ``row_weight.sum()``.
        stop_gradient: "a": the KL terms give the class logits no gradient; "b": nor the Gist
            logits; "targets": each KL takes the distribution that it starts from, p in
            KL(p || q), for a constant. The cross-entropies keep their gradients.
        scale_by_temperature_squared: multiply the KL terms in the loss by T^2 (by the product of a
            pair), so that their gradients keep their size as T grows.
        return_terms: return ``(loss, GistLossTerms)`` instead.

    Returns:
        The loss: a scalar, or (...) for "none"; float32, float64 for float64 logits. No rows, or
        none that count, give nan for a mean and 0 for a sum, as in PyTorch; with a mask or row
        weights a mean of no rows is 0. It can be
        differentiated once; for second derivatives take ``use_backend("reference")``. torch.func
        transforms and forward-mode differentiation take the reference by themselves.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, C), for CPU tensors. On other devices the check would
            cost a synchronisation, and that row's loss and gradient are nan; the environment
            variable ``GIST_KERNELS_CHECK_TARGETS=1`` has it made there too. Targets that
            ``torch.vmap`` has batched are never checked.
    """
    options = checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction,
        scale_by_temperature_squared, stop_gradient,
    )  # fmt: skip
    rows = row_options(mask, row_weight, divisor)
    kernels = _direct_kernels(cls_logits, gist_logits, target) if rows.absent else None
    if kernels is not None:
        loss, terms = autograd.eager_gist_loss(
            kernels, cls_logits, gist_logits, target, options, return_terms
        )
    else:
        _check_tensors(cls_logits, gist_logits, target, options, rows)
        loss, terms = evaluate(cls_logits, gist_logits, target, options, rows, return_terms)
    return loss if terms is None or not return_terms else (loss, GistLossTerms(*terms.unbind()))


def gist_loss_and_grad(
    cls_logits: torch.Tensor,
    gist_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = 3.0,
    cls_weight: float = 1.0,
    gist_weight: float = 0.5,
    kl_weights: tuple[float, float] = (0.75, 0.75),
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    stop_gradient: StopGradient | None = None,
    scale_by_temperature_squared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gist_loss` and its gradients in one call, outside autograd: all three are detached.

    Takes the same arguments and raises the same errors; the logits' ``requires_grad`` does not
    matter. With ``reduction="none"`` the gradients are those of the sum of the rows' losses.

    Returns:
        ``(loss, d_cls, d_gist)``: the loss as :func:`gist_loss` returns it and two gradients of the
        logits' shape, each in its side's dtype. Those of stacked logits (:func:`split_heads`) are
        the halves of one tensor.
    """
    options = checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction,
        scale_by_temperature_squared, stop_gradient,
    )  # fmt: skip
    rows = row_options(mask, row_weight, divisor)
    kernels = _direct_kernels(cls_logits, gist_logits, target) if rows.absent else None
    if kernels is not None:
        return autograd.eager_gist_loss_and_grad(kernels, cls_logits, gist_logits, target, options)
    _check_tensors(cls_logits, gist_logits, target, options, rows)
    return evaluate_with_gradients(cls_logits, gist_logits, target, options, rows)


def _direct_kernels(cls: Any, gist: Any, target: Any) -> Any:
    """The kernels of a call that needs neither a check nor a conversion, else None.

    At few classes a call takes microseconds. This question to the common one, of dense (B, C)
    logits in one dtype and class indices, takes less than the checks with their explanations do.
    """
    if not type(cls) is type(gist) is type(target) is torch.Tensor or needs_dispatcher():
        return None
    shape, dtype, device = cls.shape, cls.dtype, cls.device
    direct = (
        cls.layout is gist.layout is target.layout is torch.strided
        and len(shape) == 2
        and shape[1] > 0
        and gist.shape == shape
        and target.shape == shape[:1]
        and dtype in check.FLOATING
        and gist.dtype is dtype
        and target.dtype is torch.int64
        and gist.device == device
        and target.device == device
        and cls.stride(1) == 1
        and gist.stride(1) == 1
        and not (cls.is_neg() or gist.is_neg() or target.is_neg() or _CHECK_TARGETS)
    )
    return select("loss", cls) if direct else None


def _check_tensors(
    cls: torch.Tensor,
    gist: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    rows: RowOptions,
) -> None:
    if not plainly_valid(cls, gist):
        check_logits("cls_logits", cls, "gist_logits", gist)
    check_target(target, cls)
    check_rows(rows, cls, options.reduction)
    check_indices_if_asked(target, cls.shape[-1], options, rows)


def check_indices_if_asked(
    target: torch.Tensor, classes: int, options: LossOptions, rows: RowOptions
) -> None:
    """What ``GIST_KERNELS_CHECK_TARGETS=1`` asks for on every device."""
    if _CHECK_TARGETS and not (torch.compiler.is_compiling() or batched(target)):
        seen = target.flatten()
        if rows.mask is not None and not target.is_floating_point():
            seen = seen.masked_fill(~rows.mask.flatten(), options.ignore_index)
        check.class_indices("target", seen, classes, options.ignore_index)


def check_target(target: torch.Tensor, logits: torch.Tensor) -> None:
    check.tensor("target", target)
    if target.device != logits.device:
        raise ValueError(
            f"target is on {target.device} and the logits on {logits.device}; move one of them"
        )
    if target.dtype in check.FLOATING:
        check.shape("target", target, tuple(logits.shape), "(..., C) for class probabilities")
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError("target requires a gradient, and gets none; pass target.detach()")
        return
    if target.dtype != torch.int64:
        raise TypeError(
            "target must be int64 class indices or floating-point class probabilities; "
            f"it is {target.dtype} (convert with target.long())"
        )
    check.shape("target", target, tuple(logits.shape[:-1]), "(...) for class indices")
