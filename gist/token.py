"""The Gist token: the one trainable token that joins the sequence after the class token."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gist.methods.base import new_parameters


class GistToken(nn.Module):
    """A (1, 1, D) token, inserted at index 1 of the sequence that enters the first block.

    It comes after position embedding and patch dropout, so it has no position and is never
    dropped as a whole. It starts uniform in [-0.5, 0.5], as released (arXiv:2312.07255).
    """

    index = 1

    def __init__(self, backbone: VisionTransformer, dropout: float) -> None:
        super().__init__()
        token = torch.empty(1, 1, backbone.embed_dim, **new_parameters(backbone))
        self.weight = nn.Parameter(token.uniform_(-0.5, 0.5))
        self.dropout = nn.Dropout(dropout)

    def attach(self, backbone: VisionTransformer) -> None:
        backbone.blocks[0].register_forward_pre_hook(self._before_first_block)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) without the Gist token to (B, N + 1, D) with it."""
        gist = self.weight.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        before, after = tokens.tensor_split((self.index,), dim=1)
        return torch.cat((before, self.dropout(gist), after), dim=1)

    def remove(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N + 1, D) with the Gist token to (B, N, D) without it."""
        return torch.cat((tokens[:, : self.index], tokens[:, self.index + 1 :]), dim=1)

    def _before_first_block(
        self, block: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        return (self(args[0]), *args[1:])
