"""What a block consists of: its layers, as a family of backbones gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from gist_kernels.autograd.casts import frozen_joined
from gist_kernels.autograd.linear import matmul_dtype
from gist_kernels.quantised import QuantisedWeight, is_quantised
from gist_kernels.tracing import needs_dispatcher

DropPath: TypeAlias = Callable[[torch.Tensor], "torch.Tensor | None"]
"""Draws the (B, 1, 1) factors on a sublayer's update of its input, or gives None for 1."""

Forwards: TypeAlias = Mapping[type[nn.Module], "Callable[..., Any] | None"]
"""The ``forward`` that each class of a library has, which the fused sublayers take the place of.
None where another one stood in its place when gist was imported."""


class Linears(NamedTuple):
    """A linear layer, or several with one input, whose outputs are joined in this order."""

    weights: tuple[torch.Tensor, ...]
    """(out, in) each."""
    biases: tuple[torch.Tensor | None, ...]
    """Of each weight, or parts of the only weight's."""

    @classmethod
    def of(cls, *layers: nn.Linear) -> Linears:
        return cls(tuple(x.weight for x in layers), tuple(x.bias for x in layers))

    @property
    def read_in_place(self) -> bool:
        """Whether weight and bias are the layer's own tensors, not joined by each call."""
        return len(self.weights) == len(self.biases) == 1

    def matrix(self, gathered: bool) -> Any:
        """(all out, in): joined in the dtype of matmuls, or a QuantisedWeight.

        ``gathered`` weights are freed after forward. Each matmul then joins and converts them for
        itself: what is made once would live until the backward pass.
        """
        first = self.weights[0]
        # An operator that is traced converts by itself.
        dtype = first.dtype if needs_dispatcher() else matmul_dtype(first)
        in_place = len(self.weights) == 1 and dtype is first.dtype
        if any(is_quantised(weight) for weight in self.weights) or (gathered and not in_place):
            return QuantisedWeight(self.weights)
        return first if len(self.weights) == 1 else frozen_joined(self.weights, dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        if len(self.biases) == 1:
            return self.biases[0]
        if all(bias is None for bias in self.biases):
            return None
        return torch.cat(
            [
                _zeros(self.weights[i]) if bias is None else bias
                for i, bias in enumerate(self.biases)
            ]
        )


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    """A bias of 0; torchao's tensors have no ``new_zeros``."""
    return torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)


class Scores(NamedTuple):
    """What a block's own attention does with its scores before their softmax."""

    bias: torch.Tensor
    """(B or 1, H or 1, N, N), which is added."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosine and sine, (N, Dh) each, of the positions of queries and keys."""


class OwnAttention(NamedTuple):
    """An attention sublayer by a block's own modules, with their norm and hooks, and by PyTorch's
    attention: for scores that kernels don't compute."""

    run: Callable[[torch.Tensor, Scores, int | None], torch.Tensor]
    """The first tokens of the sublayer's output, or all."""
    reason: str
    """Why, or for which calls."""
    always: bool
    """Whether every call has :class:`Scores` for it."""


class BlockLayers(NamedTuple):
    """The layers of a block ``x + ls1 * attention(norm1(x))``, then ``x + ls2 * mlp(norm2(x))``; or
    of a post-norm block ``norm1(x + attention(x))``, then ``norm2(x + mlp(x))``."""

    norms: tuple[Any, Any]
    """LayerNorms: ``weight``, ``bias`` and ``eps``. The first may be None, for no norm."""
    qkv: Linears
    proj: Linears
    num_heads: int
    scale: float | None
    """As :class:`gist_kernels.AttentionWeights` has it."""
    fc1: Linears
    fc2: Linears
    activation: str
    """A name in :data:`gist_kernels.activations.Activation`."""
    gated: bool = False
    """Whether the first half of fc1's outputs, activated, multiplies the second half."""
    attention_norm: Any = None
    """A LayerNorm of what proj reads, or None."""
    mlp_norm: Any = None
    """A LayerNorm of what fc2 reads, or None."""
    layer_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    drop_paths: tuple[DropPath | None, DropPath | None] = (None, None)
    post_norm: bool = False
    own_attention: OwnAttention | None = None
    """The attention of calls with :class:`Scores`."""

    @property
    def inner_norms(self) -> dict[str, Any]:
        """The frozen norms within the sublayers."""
        found = {"attention": self.attention_norm, "MLP": self.mlp_norm}
        return {name: norm for name, norm in found.items() if norm is not None}

    @property
    def matrices(self) -> list[torch.Tensor]:
        """The weights of its linear layers."""
        return [*self.qkv.weights, *self.proj.weights, *self.fc1.weights, *self.fc2.weights]

    @property
    def frozen(self) -> list[torch.Tensor]:
        """The weights for which the fused sublayers compute no gradient."""
        return [*self.matrices, *(scale for scale in self.layer_scales if scale is not None)]
