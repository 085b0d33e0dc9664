"""Reference of the bottleneck adapter (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gist_kernels.activations import ACTIVATIONS


def adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    scale: float,
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``residual + scale * (act(x Wd^T + bd) Wu^T + bu)``, see :func:`gist_kernels.adapter`."""
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    # Under autocast the linears return fp16 or bf16. The result keeps x's dtype, for the residual.
    update = scale * F.linear(hidden, up_weight, up_bias).to(x.dtype)
    return update if residual is None else residual + update
