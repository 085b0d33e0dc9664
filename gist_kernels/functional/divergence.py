"""Divergences between two sets of logits, without labels."""

from __future__ import annotations

import torch

from gist_kernels import autograd, reference
from gist_kernels.backend import select
from gist_kernels.functional.logits import Reduction, check_logits, checked_options, plainly_valid


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
    options = checked_options(temperature, 0.0, 0.0, weights, 0.0, -100, reduction, "weights")
    if not plainly_valid(logits_a, logits_b):
        check_logits("logits_a", logits_a, "logits_b", logits_b)
    kernels = select("loss", logits_a)
    if kernels is None:
        return reference.gist_loss(logits_a, logits_b, None, options, False)[0]
    return autograd.gist_loss(kernels, logits_a, logits_b, None, options, False)[0]
