"""Reference of a linear head's losses: the head's logits of all rows, then the loss of these."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_logits(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    softcap: float | None,
    counted: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C) logits in ``dtype`` of (B, D) features; those of rows that don't count are the bias'.

    In the weight's gradient, 0 times what such a row holds may be nan.
    """
    if counted is not None:
        features = features.masked_fill(~counted[:, None], 0)
    with torch.autocast(features.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        logits = F.linear(features.to(dtype), weight.to(dtype), bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
