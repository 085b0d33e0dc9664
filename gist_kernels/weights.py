"""Groups of weights that an operation takes as one argument."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NormWeights(NamedTuple):
    """A LayerNorm over D features."""

    weight: torch.Tensor | None
    """(D,), or None for 1."""
    bias: torch.Tensor | None
    """(D,), or None for 0."""
    eps: float


class HeadWeights(NamedTuple):
    """A linear head, D features to C classes."""

    weight: torch.Tensor
    """(C, D)."""
    bias: torch.Tensor | None = None
    """(C,), or None for 0."""


class AdapterWeights(NamedTuple):
    """A bottleneck ``scale * (act(x Wd^T + bd) Wu^T + bu)`` of rank r on D features."""

    down_weight: torch.Tensor
    """(r, D), Wd."""
    down_bias: torch.Tensor | None
    """(r,), bd."""
    up_weight: torch.Tensor
    """(D, r), Wu."""
    up_bias: torch.Tensor | None
    """(D,), bu."""
    scale: float
    activation: str
    """A name in :data:`gist_kernels.activations.Activation`."""


class LinearUpdate(NamedTuple):
    """The trained update of a frozen linear layer W, b from I features to O::

        y = scale * (W x) + b + up (down x)

    LoRA (arXiv:2106.09685) is ``down`` and ``up``; its factor alpha / rank is part of ``up``. SSF
    (arXiv:2210.08823) is ``scale``; its shift is part of the bias.
    """

    scale: torch.Tensor | None = None
    """(O,), or None for 1."""
    down: torch.Tensor | None = None
    """(r, I)."""
    up: torch.Tensor | None = None
    """(O, r), or None if down is None."""


class Rotation(NamedTuple):
    """Rotary positions (RoPE, arXiv:2104.09864) of queries and keys, with frozen tables::

        x * cos + rotated(x) * sin

    The tables are timm's (``apply_rot_embed_cat``). The two features of a pair may have different
    entries. ``rotated`` turns each pair (a, b) of a head's features into (-b, a).
    """

    sin: torch.Tensor
    """(R, Dh), or (H, R, Dh) with a table per head, R at least 1."""
    cos: torch.Tensor
    """As ``sin``."""
    start: int
    """The first rotated token: tokens start to start + R - 1 are rotated, others are not."""
    half: bool
    """True pairs feature j with j + Dh / 2 (DINOv3), False pairs 2 j with 2 j + 1 (EVA-02)."""


class AttentionWeights(NamedTuple):
    """Multi-head self-attention on D features, with H heads of Dh features each::

        proj(norm(attention(qkv(x))))

    Only biases and updates are trained.
    """

    qkv_weight: torch.Tensor
    """(3 H Dh, D): the rows of the queries, then of the keys, then of the values."""
    qkv_bias: torch.Tensor | None
    """(3 H Dh,)."""
    proj_weight: torch.Tensor
    """(D, H Dh)."""
    proj_bias: torch.Tensor | None
    """(D,)."""
    num_heads: int
    scale: float | None = None
    """Factor on the scores; None for ``Dh ** -0.5``."""
    layer_scale: torch.Tensor | None = None
    """(D,), factor on the projection's output."""
    qkv_update: LinearUpdate | None = None
    proj_update: LinearUpdate | None = None
    rotation: Rotation | None = None
    """Of queries and keys, or None for none."""
    norm: NormWeights | None = None
    """A frozen LayerNorm over the H Dh features that the projection reads (EVA-02's CLIP, BEiT-3);
    None for none."""


class MlpWeights(NamedTuple):
    """A two-layer perceptron on D features with F hidden ones, plain or gated::

        fc2(norm(activation(fc1(x))))
        fc2(norm(activation(gate) * value)), where gate, value = fc1(x)

    SwiGLU and GEGLU (arXiv:2002.05202) are the second with "silu" and "gelu". Only biases and
    updates are trained.
    """

    fc1_weight: torch.Tensor
    """(F, D). If gated, (2 F, D): the rows of the gate, then of the value."""
    fc1_bias: torch.Tensor | None
    """(F,), or (2 F,) if gated."""
    fc2_weight: torch.Tensor
    """(D, F)."""
    fc2_bias: torch.Tensor | None
    """(D,)."""
    activation: str = "gelu"
    """A name in :data:`gist_kernels.activations.Activation`."""
    layer_scale: torch.Tensor | None = None
    """(D,), factor on the second layer's output."""
    fc1_update: LinearUpdate | None = None
    fc2_update: LinearUpdate | None = None
    gated: bool = False
    norm: NormWeights | None = None
    """A frozen LayerNorm over the F hidden features."""
