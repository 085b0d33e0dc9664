"""What a block's sublayers run on here: Triton, and PyTorch's own products and attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gist_kernels import sdpa
from gist_kernels.fused import SublayerKernels
from gist_kernels.gpu import activation, adapter


def _attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: None,
    graph: Any,
    num_heads: int,
    scale: float | None,
    *gradients: torch.Tensor,
) -> None:
    sdpa.backward(d_out, graph, *gradients)


def _add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return out.addmm_(x, weight.t())


KERNELS = SublayerKernels(
    adapter_forward=adapter.forward,
    adapter_backward=adapter.backward,
    activation=activation.forward,
    activation_backward=partial(activation.backward, into_d_a=True),
    attention_forward=sdpa.forward,
    attention_backward=_attention_backward,
    linear=F.linear,
    add_linear=_add_linear,
)
