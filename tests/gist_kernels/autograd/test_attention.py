"""Gradients of a few tokens through attention, in half types."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from sublayer_cases import rotation_of

from gist_kernels.autograd.attention import token_gradients
from gist_kernels.weights import AttentionWeights, Rotation

B, N, H, D = 2, 40, 3, 64
TOKENS = slice(1, 2)


def by_head(
    qkv: torch.Tensor, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    if rotation is not None:  # as models do: computed in float32, rounded to the dtype of v
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k = (oracles.rotated(part.to(wide), H, rotation).to(v.dtype) for part in (q, k))
    q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in (q, k, v))
    return q, k, v


def by_sdpa(
    qkv: torch.Tensor, d_out: torch.Tensor, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the gradients of qkv's chosen tokens."""
    qkv = qkv.clone().requires_grad_()
    q, k, v = by_head(qkv, rotation)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0][:, TOKENS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [5, 15, 33])
@pytest.mark.parametrize("rotated", [None, (1, True), (0, False), (5, True)])
def test_of_half_types_are_as_exact_as_those_of_sdpa(largest, dtype, rotated):
    rotation = None
    if rotated is not None:
        start, half = rotated
        rotation = rotation_of((start, N - 6), D, half=half, heads=H)
    generator = torch.Generator().manual_seed(largest)
    errors = []
    for _ in range(8):
        qkv, d_out = (
            torch.randn(B, N, width, generator=generator, dtype=torch.float64)
            for width in (3 * H * D, H * D)
        )
        q, k, _ = by_head(qkv, rotation)
        qkv[..., : H * D] *= largest / (q @ k.mT * D**-0.5).abs().max()
        qkv, d_out = qkv.to(dtype), d_out.to(dtype)
        _, exact = by_sdpa(qkv.double(), d_out.double(), rotation)
        out, theirs = by_sdpa(qkv, d_out, rotation)
        q, k, _ = by_head(qkv, rotation)
        lse = (q.float() @ k.mT.float() * D**-0.5).logsumexp(-1)
        weights = AttentionWeights(None, None, None, None, H, rotation=rotation)
        ours = token_gradients(d_out, qkv, out, lse, weights, TOKENS)
        assert ours.dtype is dtype
        parts = zip(
            *(each.double().chunk(3, dim=-1) for each in (ours, theirs, exact)), strict=True
        )
        errors.append([[(each - truth).norm() / truth.norm() for each in pair]
                       for *pair, truth in parts])  # fmt: skip
    ours, theirs = torch.tensor(errors).mean(0).unbind(1)
    assert (ours <= 1.2 * theirs).all(), (ours, theirs)
