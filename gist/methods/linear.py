"""A trained linear layer in the dtype of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gist.untouched import is_bare, is_plain


class CastLinear(nn.Linear):
    """``nn.Linear`` whose weights are cast to the input's dtype at each call.

    Trained parameters are float32 beside activations of any floating dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer is a plain :class:`CastLinear`, whose weights a kernel may read instead."""
    return (
        type(layer) is CastLinear
        and is_bare(layer)
        and is_plain(layer.weight)
        and (layer.bias is None or is_plain(layer.bias))
    )
