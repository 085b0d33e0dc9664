"""Kernels that compute only the shapes, dtypes and strides of their results.

With them a forward pass is the fake implementation of its own operator: no shape is written down
twice. Each function allocates what its protocol names and reads no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gist_kernels.kernels.protocols import AttentionKernels, SublayerKernels
from gist_kernels.weights import AdapterWeights, NormWeights, Rotation


class _Adapter:
    @staticmethod
    def forward(
        x: torch.Tensor,
        add: torch.Tensor | None,
        norm: NormWeights | None,
        adapter: AdapterWeights | None,
        bias: torch.Tensor | None,
        matmul_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        rows = x.shape[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = stats = out = z = None
        if norm is not None:
            normed = x.new_empty(x.shape, dtype=matmul_dtype or x.dtype)
            stats = x.new_empty((rows, 2), dtype=wide)
        if adapter is not None:
            rank = adapter.down_weight.shape[0]
            out, z = x.new_empty(x.shape), x.new_empty((rows, rank), dtype=wide)
        return normed, out, z, stats


class _Activation:
    @staticmethod
    def forward(u: torch.Tensor, activation: str) -> torch.Tensor:
        return u.new_empty(u.shape)

    @staticmethod
    def gated_forward(u: torch.Tensor, activation: str) -> torch.Tensor:
        return u.new_empty((u.shape[0], u.shape[1] // 2))


class _Attention:
    def __init__(self, load: Callable[[], AttentionKernels]) -> None:
        self._load = load

    def serves(self, q: torch.Tensor, k: torch.Tensor, num_heads: int) -> bool:
        return self._load().serves(q, k, num_heads)

    @staticmethod
    def rotates(q: torch.Tensor, k: torch.Tensor, num_heads: int, rotation: Rotation) -> bool:
        return True

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_heads: int,
        scale: float,
        rotation: Rotation | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
        return q.new_empty(q.shape), lse


class _Linear:
    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return out.new_empty(out.shape)


def of_adapter() -> Any:
    return _Adapter


def of_attention(load: Callable[[], AttentionKernels]) -> Any:
    return _Attention(load)


def of_sublayers(load: Callable[[], SublayerKernels]) -> Any:
    attention = _Attention(lambda: load().attention)
    return SublayerKernels(*(_Adapter, _Activation, attention, _Linear))  # type: ignore[arg-type]
