"""The bottleneck adapter."""

from __future__ import annotations

import torch

from gist_kernels import autograd, check
from gist_kernels.activations import ACTIVATIONS, Activation
from gist_kernels.autograd.tensors import negated
from gist_kernels.backend import BACKENDS, select, serving
from gist_kernels.check import unknown_name
from gist_kernels.tracing import autocast_enabled, needs_dispatcher, takes_operators
from gist_kernels.weights import AdapterWeights

for _backend in BACKENDS:
    if _backend.adapter is not None:
        autograd.register_adapter(_backend.name, _backend.adapter)


def adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    scale: float = 1.0,
    activation: Activation = "gelu",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bottleneck adapter ``scale * (act(x Wd^T + bd) Wu^T + bu)``, plus ``residual`` if given.

    The formula is that of Houlsby et al., "Parameter-Efficient Transfer Learning for NLP"
    (arXiv:1902.00751), with the scale of He et al. (arXiv:2110.04366). It is differentiable in
    every tensor argument.

    Args:
        x: (..., D), floating point.
        down_weight: (r, D), Wd.
        down_bias: (r,) or None, bd.
        up_weight: (D, r), Wu.
        up_bias: (D,) or None, bu.
        scale: factor on the update, not on the residual.
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu" or "identity".
        residual: same shape, dtype and device as ``x``; added to the update.

    Returns:
        (..., D) in x's dtype, also under autocast.

    Raises:
        TypeError: a tensor is not floating point, or differs in dtype from ``x`` (outside
            autocast).
        ValueError: shapes or devices don't match, or the activation or scale is not valid.
    """
    check.floating("x", x)
    if x.ndim < 1:
        raise ValueError("x must have at least one dimension, (..., D); it is a scalar")
    width = x.shape[-1]
    check.shape("down_weight", down_weight, (None, width), "(rank, D) with x's D")
    rank = down_weight.shape[0]
    check.shape("up_weight", up_weight, (width, rank), "(D, rank) with down_weight's rank")
    if rank < 1:
        raise ValueError("down_weight must have a rank of at least 1; it has shape (0, D)")
    if down_bias is not None:
        check.shape("down_bias", down_bias, (rank,), "(rank,)")
    if up_bias is not None:
        check.shape("up_bias", up_bias, (width,), "(D,)")
    if residual is not None:
        check.shape("residual", residual, tuple(x.shape), "x's shape")
    autocast = autocast_enabled(x.device.type)
    named = {
        "down_weight": down_weight,
        "down_bias": down_bias,
        "up_weight": up_weight,
        "up_bias": up_bias,
        "residual": residual,
    }
    for name, tensor in named.items():
        if tensor is not None:
            check.alike(name, tensor, "x", x, any_float=autocast)
    check.finite("scale", scale)
    if activation not in ACTIVATIONS:
        raise ValueError(unknown_name("activation", activation, ACTIVATIONS))
    kernels = select("adapter", x)
    weights = AdapterWeights(down_weight, down_bias, up_weight, up_bias, scale, activation)
    tensors = x, residual, *weights[:4]
    traced = needs_dispatcher(*tensors)
    plain = traced or not negated(*tensors)  # an operator's arguments are made so
    # Under autocast the matmuls are in autocast's dtype. The kernels can't do that.
    if kernels is None or autocast or not plain or (traced and not takes_operators(*tensors)):
        from gist_kernels import reference

        return reference.adapter(
            x, *weights[:4], scale=scale, activation=activation, residual=residual
        )
    if traced:
        backend = serving("adapter", x.device.type, x.dtype)
        return autograd.adapter_operator(backend, x, weights, residual)
    return autograd.adapter(kernels, x, weights, residual)
