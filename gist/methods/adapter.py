"""The adapter as GIST releases it: one bottleneck a block, used by both of its sublayers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import gist_kernels
from gist.methods.base import Method, new_parameters
from gist_kernels.reference.adapter import ACTIVATIONS
from gist_kernels.suggest import unknown_name


@dataclass(frozen=True)
class Adapter(Method):
    """Parallel bottleneck adapter, shared by a block's two sublayers (arXiv:2312.07255).

    With ``A(x) = scale * (up(act(down(x))))`` every block computes::

        x = x + drop_path(attn(norm1(x))) + A(x)
        x = x + drop_path(mlp(norm2(x))) + A(x)

    A reads the residual stream before its norm, and drop-path never drops it. Weights start
    truncated-normal with standard deviation 0.02, biases at 0, as the ViT's own linears do.

    Parameters: ``depth * (2 * D * rank + rank + D)``; 82,992 for ViT-B/16 at rank 4.

    Args:
        rank: bottleneck width, at least 1.
        scale: factor on the update.
        activation: one of those of :func:`gist_kernels.adapter`.
    """

    name: ClassVar[str] = "adapter"
    rank: int = 4
    scale: float = 0.1
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1; it is {self.rank!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite; it is {self.scale}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))

    def attach(self, backbone: VisionTransformer) -> nn.Module:
        blocks = []
        for index, block in enumerate(backbone.blocks):
            if not isinstance(block, Block):
                raise ValueError(
                    f"the adapter attaches to timm's pre-norm Block; blocks.{index} of this "
                    f"backbone is a {type(block).__name__}"
                )
            blocks.append(block)
        adapters = [ParallelAdapter(self, backbone) for _ in blocks]
        for adapter, block in zip(adapters, blocks, strict=True):
            adapter.attach(block)
        return nn.ModuleList(adapters)


class ParallelAdapter(nn.Module):
    """One bottleneck parallel to both sublayers of one block."""

    def __init__(self, config: Adapter, backbone: VisionTransformer) -> None:
        super().__init__()
        width, options = backbone.embed_dim, new_parameters(backbone)
        self.scale, self.activation = config.scale, config.activation
        self.down = nn.Linear(width, config.rank, **options)
        self.up = nn.Linear(config.rank, width, **options)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self._update: torch.Tensor | None = None

    def extra_repr(self) -> str:
        return f"scale={self.scale}, activation={self.activation!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update A(x) of (B, N, D) tokens, to be added to the residual stream."""
        parameters = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return gist_kernels.adapter(
            x,
            *(parameter.to(x.dtype) for parameter in parameters),
            scale=self.scale,
            activation=self.activation,
        )

    def weights(self) -> gist_kernels.AdapterWeights:
        """Parameters and settings as the fused sublayers take them."""
        down, up = self.down, self.up
        return gist_kernels.AdapterWeights(
            down.weight, down.bias, up.weight, up.bias, self.scale, self.activation
        )

    def attach(self, block: Block) -> None:
        """Join both sublayers: x is seen where it enters the norm, A(x) added after drop-path."""
        for norm, drop_path in ((block.norm1, block.drop_path1), (block.norm2, block.drop_path2)):
            norm.register_forward_hook(self._at_entry)
            drop_path.register_forward_hook(self._at_exit)

    def _at_entry(self, norm: nn.Module, args: tuple[torch.Tensor], output: object) -> None:
        self._update = self(args[0])

    def _at_exit(self, drop_path: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        update, self._update = self._update, None
        assert update is not None, "a sublayer's exit was reached without its entry"
        return output + update
