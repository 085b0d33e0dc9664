"""Divergences between sets of logits, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gist_kernels import autograd, check
from gist_kernels.backend import BACKENDS, select
from gist_kernels.functional.logits import (
    Reduction,
    StopGradient,
    check_logits,
    check_reduction,
    checked_options,
    checked_temperatures,
    evaluate,
    plainly_valid,
)
from gist_kernels.functional.rows import check_rows, flat_rows, row_options, row_scale

for _backend in BACKENDS:
    if _backend.divergence is not None:
        autograd.register_divergence(_backend.name, _backend.divergence)

_MOST_SIDES = 8


def bidirectional_kl(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    *,
    temperature: float | tuple[float, float] = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    reduction: Reduction = "batchmean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    stop_gradient: StopGradient | None = None,
    scale_by_temperature_squared: bool = False,
) -> torch.Tensor:
    """``weights[0] * KL(p || q) + weights[1] * KL(q || p)`` of two logit tensors' softmaxes.

    ``p = softmax(logits_a / temperature)``, ``q = softmax(logits_b / temperature)``. Computed from
    log-sum-exps: finite for any finite logits. A logit of -inf is a masked class: masked on both
    sides it adds nothing; masked in q alone, KL(p || q) is +inf, as it should be (give that
    direction the weight 0 to leave it out).

    A mean over rows r, each one distribution over C classes, with the divergence d_r, is::

        sum of row_weight_r * d_r over rows with mask_r / (divisor or the number of such rows)

    Args:
        logits_a: (..., C) float32, bfloat16, float16 or float64. No copy is made where one stride
            leads from each row to the next and classes are contiguous.
        logits_b: same shape and device; any of the dtypes.
        temperature: T > 0, or a pair, one for each side.
        weights: of the two directions.
        reduction: "batchmean" or "mean" (both divide by the number of rows, never by C), "sum", or
            "none" for (...).
        mask: (...) bool, True where a row counts. What other rows hold, nan included, reaches no
            result, and their gradient is 0.
        row_weight: (...) floating point, of each row. A row of weight 0 adds nothing, as if masked,
            but a mean still counts it.
        divisor: a number or a 0-dim tensor, which no one reads on the host: what a mean divides by
            instead of the number of rows, for instance ``num_items_in_batch`` under gradient
            accumulation, or ``row_weight.sum()``.
        stop_gradient: "a" or "b": no gradient for these logits. "targets": each KL takes the
            distribution that it starts from, p in KL(p || q), for a constant, as SMART, CR-CTC and
            deep mutual learning do; cheaper than both gradients.
        scale_by_temperature_squared: multiply by T^2 (by the product of a pair), as knowledge
            distillation does.

    Returns:
        A scalar, or (...) for "none", masked rows 0; float32, float64 for float64 logits. No rows
        give nan for a mean and 0 for a sum; with a mask or row weights, a mean of no rows is 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    # Of a whole side, the gradient is not asked for in the first place.
    in_kernels = stop_gradient if stop_gradient not in ("a", "b") else None
    options = checked_options(
        temperature, 0.0, 0.0, weights, 0.0, -100, reduction,
        scale_by_temperature_squared, in_kernels, "weights",
    )  # fmt: skip
    if not plainly_valid(logits_a, logits_b):
        check_logits("logits_a", logits_a, "logits_b", logits_b)
    rows = row_options(mask, row_weight, divisor)
    check_rows(rows, logits_a, reduction)
    logits_a = logits_a.detach() if stop_gradient == "a" else logits_a
    logits_b = logits_b.detach() if stop_gradient == "b" else logits_b
    return evaluate(logits_a, logits_b, None, options, rows)[0]


def jensen_shannon(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    *more: torch.Tensor,
    beta: float | None = None,
    weights: Sequence[float] | None = None,
    temperature: float | Sequence[float] = 1.0,
    reduction: Reduction = "batchmean",
    mask: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    divisor: float | torch.Tensor | None = None,
    scale_by_temperature_squared: bool = False,
) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence ``sum_k w_k KL(p_k || m)``, ``m = sum_k w_k p_k``.

    ``p_k = softmax(logits_k / temperature)``. Two sides with ``beta`` are the JSD of generalised
    knowledge distillation (arXiv:2306.13649), ``beta KL(p_a || m) + (1 - beta) KL(p_b || m)``;
    three sides are AugMix' consistency loss (arXiv:1912.02781). Every side gets its gradient; pass
    ``logits.detach()`` for one that should not. Nothing cancels where the sides are alike: the
    divergence keeps its digits. It is finite for any finite logits, and for classes masked by -inf
    on any side.

    Args:
        logits_a: (..., C) float32, bfloat16, float16 or float64.
        logits_b: same shape and device; any of the dtypes, of which the widest is computed in.
        more: up to 6 further sides.
        beta: in (0, 1), the weight of the first of two sides; default 0.5. At 0 and 1 the
            divergence is 0, and its limit for a small weight is a KL: take
            :func:`bidirectional_kl` with ``weights=(1, 0)`` or ``(0, 1)``.
        weights: instead of beta, a positive weight for each side; they must sum to 1. Default: the
            same for all.
        temperature: T > 0, or one for each side.
        reduction, mask, row_weight, divisor: as of :func:`bidirectional_kl`.
        scale_by_temperature_squared: multiply by T^2, by the product of the first two if each side
            has its own.

    Returns:
        A scalar, or (...) for "none"; float32, float64 if a side is float64. No rows give nan for a
        mean and 0 for a sum; with a mask or row weights, a mean of no rows is 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    sides = [logits_a, logits_b, *more]
    if len(sides) > _MOST_SIDES:
        raise ValueError(f"at most {_MOST_SIDES} sides are taken; there are {len(sides)}")
    shares = _shares(len(sides), beta, weights)
    temperatures = checked_temperatures(temperature, len(sides), "one for each side")
    check_reduction(reduction)
    check.boolean("scale_by_temperature_squared", scale_by_temperature_squared)
    names = ["logits_a", "logits_b", *(f"more[{i}]" for i in range(len(more)))]
    for name, side in zip(names[1:], sides[1:], strict=True):
        if not plainly_valid(logits_a, side):
            check_logits("logits_a", logits_a, name, side)
    options = row_options(mask, row_weight, divisor)
    check_rows(options, logits_a, reduction)

    leading = logits_a.shape[:-1]
    dtype = logits_a.dtype
    for side in sides[1:]:
        dtype = torch.promote_types(dtype, side.dtype)
    sides = [flat_rows(side.to(dtype)) for side in sides]
    reduction = "mean" if reduction == "batchmean" else reduction
    scale = None if options.absent else row_scale(options, sides[0], reduction)
    kernels = select("divergence", sides[0])
    if kernels is None:
        from gist_kernels import reference

        rows = reference.jensen_shannon(sides, shares, temperatures, scale)
    else:
        rows = autograd.jensen_shannon(kernels, sides, shares, temperatures, scale)
    if scale_by_temperature_squared:
        rows = rows * (temperatures[0] * temperatures[1])
    if reduction == "none":
        return rows.reshape(leading)
    return rows.mean() if reduction == "mean" and scale is None else rows.sum()


def _shares(sides: int, beta: float | None, weights: Sequence[float] | None) -> tuple[float, ...]:
    """Each side's weight in the mixture."""
    if beta is not None:
        if weights is not None or sides != 2:
            raise ValueError("beta is of two sides; give weights, one for each side, instead")
        check.finite("beta", beta)
        if not 0 < beta < 1:
            raise ValueError(
                f"beta must be in (0, 1), where a divergence of both sides is left; it is {beta}. "
                "KL(p_a || p_b) is bidirectional_kl with weights=(1, 0)"
            )
        return float(beta), 1 - float(beta)
    if weights is None:
        return (1 / sides,) * sides
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != sides:
        raise ValueError(f"weights must be {sides} numbers, one for each side; it is {weights!r}")
    for index, weight in enumerate(weights):
        check.positive(f"weights[{index}]", weight)
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1; they sum to {math.fsum(weights)}")
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
