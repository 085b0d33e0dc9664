"""Losses of a linear head's logits, without these logits in memory.

They are what the head and then :func:`gist_kernels.gist_loss`, :func:`~gist_kernels.
bidirectional_kl` or :func:`~gist_kernels.jensen_shannon` would compute. For a vocabulary of 100,000
classes the logits are most of a training step's memory; here a chunk of rows has them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch

from gist_kernels import autograd, check
from gist_kernels.autograd.linear import matmul_dtype
from gist_kernels.backend import BACKENDS, select
from gist_kernels.functional.divergence import _shares
from gist_kernels.functional.logits import (
    Reduction,
    StopGradient,
    check_reduction,
    checked_options,
    checked_temperatures,
)
from gist_kernels.functional.loss import GistLossTerms, check_indices_if_asked, check_target
from gist_kernels.functional.rows import RowOptions, check_rows, flat_rows, row_scale
from gist_kernels.kernels.protocols import LinearLossKernels, LossOptions
from gist_kernels.weights import HeadWeights

for _backend in BACKENDS:
    if _backend.linear_loss is not None:
        autograd.register_linear_loss(_backend.name, _backend.linear_loss)


def linear_gist_loss(
    cls_features: torch.Tensor,
    gist_features: torch.Tensor,
    target: torch.Tensor,
    head: HeadWeights,
    gist_head: HeadWeights | None = None,
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
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    return_terms: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GistLossTerms]:
    """:func:`gist_loss` of the logits that a linear head gives, or two heads.

    The logits of a chunk of rows exist at a time, and gradients are written over them. Gradients
    are computed in the forward pass; for ``reduction="none"`` in the backward pass, which computes
    the logits again. What needs no gradient, a frozen head or detached features, costs neither
    time nor memory. Beside the gradients themselves, that memory is, with logits of s bytes::

        2 chunk_rows C s          while it runs
        4 C D                     to the backward pass, of a trained head

    and twice the first with ``logit_softcap``. A trained head's gradient is summed in float32, or
    in float64 for float64 weights. Of half types, a CPU also takes a float32 copy of the chunk's
    logits, and a GPU one of that gradient. A weight is copied where matmuls have another dtype.

    Args:
        cls_features: (..., D) float32, bfloat16, float16 or float64. Under autocast, matmuls are in
            its dtype.
        gist_features: of the same leading shape, device and dtype; D may be another with a second
            head.
        target: (...) int64 class indices, or (..., C) class probabilities in any floating dtype.
        head: weight (C, D), and bias (C,) or None, of the features' dtype. Weights of a sharded or
            wrapped layer (FSDP, ZeRO-3, LoRA) are not whole: gather or merge them first.
        gist_head: of the Gist features; None for the same head.
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing: as of :func:`gist_loss`.
        ignore_index, mask, row_weight: as of :func:`gist_loss`. Rows that are ignored or masked are
            left out of the matmuls on a CPU; elsewhere the host would have to wait for the device.
        reduction, divisor, stop_gradient, scale_by_temperature_squared, return_terms: as of
            :func:`gist_loss`.
        logit_softcap: c > 0 of ``c tanh(logits / c)`` (Gemma 2, arXiv:2408.00118).
        logits_dtype: compute matmuls and logits in this dtype, for instance float32 for bfloat16
            features and weights, whose rounded logits bias a KL below 1e-4 upward.
        chunk_rows: row pairs of a chunk. Default, a function of C and dtype alone: on a CPU 64 to
            256, with at most 256 MiB of logits if these allow; on a GPU 512 to 2048, and 1 GiB.

    Returns:
        As :func:`gist_loss`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        IndexError: a class index outside [0, C), as of :func:`gist_loss`.
    """
    options = checked_options(
        temperature, cls_weight, gist_weight, kl_weights, label_smoothing, ignore_index, reduction,
        scale_by_temperature_squared, stop_gradient,
    )  # fmt: skip
    call = _checked_call(
        ("cls_features", cls_features, "head", head),
        ("gist_features", gist_features, "gist_head", gist_head),
        RowOptions(mask, row_weight, divisor), reduction, logit_softcap, logits_dtype, chunk_rows,
    )  # fmt: skip
    like = cls_features.new_empty(()).expand(*cls_features.shape[:-1], call.classes)
    check_target(target, like)
    check_indices_if_asked(target, call.classes, options, call.rows)
    loss, terms = _gist_rows(call, target, options, return_terms)
    return loss if terms is None or not return_terms else (loss, GistLossTerms(*terms.unbind()))


def linear_bidirectional_kl(
    features_a: torch.Tensor,
    features_b: torch.Tensor,
    head: HeadWeights,
    head_b: HeadWeights | None = None,
    *,
    temperature: float | tuple[float, float] = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    reduction: Reduction = "batchmean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    stop_gradient: StopGradient | None = None,
    scale_by_temperature_squared: bool = False,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """:func:`bidirectional_kl` of the logits that a linear head gives, or two heads.

    Args:
        features_a, features_b, head, head_b, logit_softcap, logits_dtype, chunk_rows: as of
            :func:`linear_gist_loss`, which says what it costs.
        temperature, weights, reduction, mask, row_weight, divisor: as of :func:`bidirectional_kl`.
        stop_gradient, scale_by_temperature_squared: as of :func:`bidirectional_kl`.
            ``stop_gradient="a"`` keeps the first side's gradient from its features and the head.

    Returns:
        As :func:`bidirectional_kl`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    options = checked_options(
        temperature, 0.0, 0.0, weights, 0.0, -100, reduction,
        scale_by_temperature_squared, stop_gradient, "weights",
    )  # fmt: skip
    call = _checked_call(
        ("features_a", features_a, "head", head), ("features_b", features_b, "head_b", head_b),
        RowOptions(mask, row_weight, divisor), reduction, logit_softcap, logits_dtype, chunk_rows,
    )  # fmt: skip
    return _gist_rows(call, None, options, False)[0]


def linear_jensen_shannon(
    features_a: torch.Tensor,
    features_b: torch.Tensor,
    head: HeadWeights,
    head_b: HeadWeights | None = None,
    *,
    beta: float = 0.5,
    temperature: float | tuple[float, float] = 1.0,
    reduction: Reduction = "batchmean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    scale_by_temperature_squared: bool = False,
    logit_softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """:func:`jensen_shannon` of two sides' logits that a linear head gives, or two heads.

    Args:
        features_a, features_b, head, head_b, logit_softcap, logits_dtype, chunk_rows: as of
            :func:`linear_gist_loss`, which says what it costs.
        beta, temperature, reduction, mask, row_weight, divisor, scale_by_temperature_squared: as of
            :func:`jensen_shannon`.

    Returns:
        As :func:`jensen_shannon`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    shares = _shares(2, beta, None)
    temperatures = checked_temperatures(temperature, 2)
    check_reduction(reduction)
    check.boolean("scale_by_temperature_squared", scale_by_temperature_squared)
    call = _checked_call(
        ("features_a", features_a, "head", head), ("features_b", features_b, "head_b", head_b),
        RowOptions(mask, row_weight, divisor), reduction, logit_softcap, logits_dtype, chunk_rows,
    )  # fmt: skip

    def by_kernels(kernels: LinearLossKernels) -> Any:
        return autograd.JensenShannonRows(kernels.divergence, shares, temperatures)

    def by_reference(sides: list[torch.Tensor], scale: torch.Tensor | None) -> Any:
        from gist_kernels import reference

        return reference.jensen_shannon(sides, shares, temperatures, scale), None

    loss = _evaluate(call, None, None, by_kernels, by_reference, False)[0]
    squared = temperatures[0] * temperatures[1] if scale_by_temperature_squared else 1.0
    return loss if squared == 1.0 else loss * squared


class _Call(NamedTuple):
    """Checked arguments, features flat."""

    features: tuple[torch.Tensor, torch.Tensor]
    leading: torch.Size
    heads: tuple[HeadWeights, HeadWeights | None]
    rows: RowOptions
    reduction: str
    logits: autograd.LogitOptions

    @property
    def classes(self) -> int:
        return self.heads[0].weight.shape[0]


def _checked_call(
    first: tuple[str, torch.Tensor, str, HeadWeights],
    second: tuple[str, torch.Tensor, str, HeadWeights | None],
    rows: RowOptions,
    reduction: str,
    logit_softcap: float | None,
    logits_dtype: torch.dtype | None,
    chunk_rows: int | None,
) -> _Call:
    name, features, head_name, head = first
    other_name, others, other_head_name, other_head = second
    for each, given in ((name, features), (other_name, others)):
        check.floating(each, given)
        if given.ndim < 1:
            raise ValueError(f"{each} must have shape (..., D); it has {tuple(given.shape)}")
    mixed = torch.is_autocast_enabled(features.device.type)
    check.alike(other_name, others, name, features, any_float=mixed)
    check.shape(other_name, others, (*features.shape[:-1], None), f"(..., D) as {name}")
    _check_head(head_name, head, name, features, mixed)
    if other_head is None:
        check.shape(other_name, others, tuple(features.shape), f"(..., D) as {name} with one head")
    else:
        _check_head(other_head_name, other_head, other_name, others, mixed)
        classes = head.weight.shape[0]
        check.shape(
            f"{other_head_name}.weight", other_head.weight, (classes, others.shape[-1]), "(C, D)"
        )
    check_rows(rows, features, reduction)
    if logit_softcap is not None:
        check.positive("logit_softcap", logit_softcap)
    if chunk_rows is not None and (
        isinstance(chunk_rows, bool) or not isinstance(chunk_rows, Integral) or chunk_rows < 1
    ):
        raise ValueError(f"chunk_rows must be an integer above 0, or None; it is {chunk_rows!r}")
    dtype = torch.promote_types(matmul_dtype(features), matmul_dtype(others))
    if logits_dtype is not None:
        known = isinstance(logits_dtype, torch.dtype) and logits_dtype in check.FLOATING
        if not known or torch.promote_types(dtype, logits_dtype) is not logits_dtype:
            raise ValueError(
                f"logits_dtype must be {dtype} or a wider floating dtype; it is {logits_dtype}"
            )
        dtype = logits_dtype
    options = autograd.LogitOptions(dtype, logit_softcap, chunk_rows)
    flat = flat_rows(features), flat_rows(others)
    return _Call(flat, features.shape[:-1], (head, other_head), rows, reduction, options)


def _check_head(
    name: str, head: HeadWeights, of_name: str, features: torch.Tensor, mixed: bool
) -> None:
    if not isinstance(head, tuple) or len(head) != 2:
        raise TypeError(f"{name} must be gk.HeadWeights(weight, bias), not {type(head).__name__}")
    weight, bias = head
    check.shape(f"{name}.weight", weight, (None, features.shape[-1]), "(C, D)")
    if weight.shape[0] < 1:
        raise ValueError(f"{name}.weight must have at least one class; it has none")
    check.alike(f"{name}.weight", weight, of_name, features, any_float=mixed)
    if bias is not None:
        check.shape(f"{name}.bias", bias, (weight.shape[0],), "(C,)")
        check.alike(f"{name}.bias", bias, of_name, features, any_float=mixed)


def _gist_rows(
    call: _Call, target: torch.Tensor | None, options: LossOptions, want_terms: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    options = options._replace(reduction="none")
    flat = None
    if target is not None:
        flat = flat_rows(target) if target.is_floating_point() else target.reshape(-1)

    def by_kernels(kernels: LinearLossKernels) -> Any:
        return autograd.GistRows(kernels.loss, options)

    def by_reference(sides: list[torch.Tensor], scale: torch.Tensor | None) -> Any:
        from gist_kernels import reference

        cls, gist = sides
        return reference.gist_loss(cls, gist, flat, options, want_terms, scale)

    kept = None
    if flat is not None and not flat.is_floating_point():
        kept = flat != options.ignore_index
    return _evaluate(call, flat, kept, by_kernels, by_reference, want_terms)


def _evaluate(
    call: _Call,
    target: torch.Tensor | None,
    kept: torch.Tensor | None,
    by_kernels: Callable[[LinearLossKernels], Any],
    by_reference: Callable[[list[torch.Tensor], torch.Tensor | None], Any],
    want_terms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss, by the kernels that serve the call; ``kept`` is where a class index counts."""
    features, (mask, row_weight, _) = call.features, call.rows
    scale = None
    if mask is not None or row_weight is not None:
        like = features[0].new_empty((len(features[0]), 0), dtype=call.logits.dtype)
        scale = row_scale(call.rows._replace(divisor=None), like, "sum")
    counted = kept
    if mask is not None:
        counted = mask.reshape(-1) if kept is None else kept & mask.reshape(-1)
    summed = call.reduction != "none"
    probe = features[0].new_empty((), dtype=call.logits.dtype)
    kernels = select("linear_loss", probe)
    first, second = call.heads
    if kernels is None:
        from gist_kernels import reference

        heads = first, second or first
        seen = counted
        if scale is not None:
            seen = scale != 0 if kept is None else kept & (scale != 0)
        sides = [
            reference.linear_logits(side, *head, call.logits.dtype, call.logits.softcap, seen)
            for side, head in zip(features, heads, strict=True)
        ]
        loss, terms = by_reference(sides, scale)
        loss = loss.sum() if summed else loss
    else:
        tensors = *features, *first, *(second or (None, None))
        loss, terms = autograd.linear_loss(
            kernels, by_kernels(kernels), call.logits, tensors, target, scale, summed, want_terms
        )
    if not summed:
        loss = loss.reshape(call.leading)
        return loss, None if terms is None else terms.reshape(4, *call.leading)
    terms = None if terms is None else terms.sum(1)
    if call.reduction == "sum":
        return loss, terms
    return _mean(call, loss, terms, counted)


def _mean(
    call: _Call, loss: torch.Tensor, terms: torch.Tensor | None, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the sums. Without a mask or row weights, the mean of no rows is nan, with gradients 0."""
    divisor: Any = call.rows.divisor
    if divisor is not None:
        return (loss / divisor).to(loss.dtype), None if terms is None else terms / divisor
    count: Any = len(call.features[0]) if counted is None else counted.sum()
    at_least_one = max(count, 1) if counted is None else count.clamp(min=1)
    loss = loss / at_least_one
    terms = None if terms is None else terms / at_least_one
    if not call.rows.absent:
        return loss, terms
    empty = torch.as_tensor(count == 0, device=loss.device)
    loss = loss.masked_fill(empty, torch.nan)
    return loss, None if terms is None else terms.masked_fill(empty, torch.nan)
