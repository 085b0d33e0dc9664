"""Divergences between sets of logits, without labels."""

from __future__ import annotations

import torch

from gist_kernels.functional.logits import (
    Reduction,
    StopGradient,
    check_logits,
    checked_options,
    evaluate,
    plainly_valid,
)
from gist_kernels.functional.rows import RowOptions, check_rows


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
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    # Of a whole side, the gradient is not asked for in the first place.
    in_kernels = stop_gradient if stop_gradient not in ("a", "b") else None
    options = checked_options(
        temperature, 0.0, 0.0, weights, 0.0, -100, reduction,
        scale_by_temperature_squared, in_kernels, "weights",
    )  # fmt: skip
    if not plainly_valid(logits_a, logits_b):
        check_logits("logits_a", logits_a, "logits_b", logits_b)
    rows = RowOptions(mask, row_weight, divisor)
    check_rows(rows, logits_a, reduction)
    logits_a = logits_a.detach() if stop_gradient == "a" else logits_a
    logits_b = logits_b.detach() if stop_gradient == "b" else logits_b
    return evaluate(logits_a, logits_b, None, options, rows)[0]
