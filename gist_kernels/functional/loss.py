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
from typing import Literal, NamedTuple, overload

import torch

from gist_kernels import autograd, check, reference
from gist_kernels.backend import BACKENDS, select
from gist_kernels.functional.logits import Reduction, check_logits, checked_options, plainly_valid
from gist_kernels.kernels.protocols import LossOptions

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
    options = checked_options(
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
    options = checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction
    )
    _check_tensors(cls_logits, gist_logits, target, options)
    kernels = select("loss", cls_logits)
    if kernels is None:
        return reference.gist_loss_and_grad(cls_logits, gist_logits, target, options)
    return autograd.gist_loss_and_grad(kernels, cls_logits, gist_logits, target, options)


def _check_tensors(
    cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor, options: LossOptions
) -> None:
    plain = (
        plainly_valid(cls, gist)
        and type(target) is torch.Tensor
        and target.dtype is torch.int64
        and target.shape == cls.shape[:1]
        and target.device == cls.device
        and target.layout is torch.strided
    )
    if not plain:
        check_logits("cls_logits", cls, "gist_logits", gist)
        _check_target(target, cls)
    if _CHECK_TARGETS and not (torch.compiler.is_compiling() or check.batched(target)):
        check.class_indices("target", target, cls.shape[1], options.ignore_index)


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
