"""The Gist token: a trainable token that joins the sequence after the class token."""

from __future__ import annotations

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.methods import hooks
from gist.methods.base import new_parameters
from gist.methods.hooks import Hook


class GistToken(nn.Module):
    """(1, K, D) tokens, K = 1 by default, inserted after the class token before the first block.

    They come after position embedding and patch dropout, so they have no position and are never
    dropped as a whole. Blocks without positions of their own treat all places in the sequence
    alike; after the class token, all prefix tokens are contiguous.

    Attributes:
        index: position of the first one: 1, or 0 without a class token.
        count: K.
    """

    def __init__(
        self, family: BackboneFamily, dropout: float, count: int = 1, init: str = "uniform"
    ):
        super().__init__()
        self.index, self.count = int(family.has_class_token), count
        token = torch.empty(1, count, family.embed_dim, **new_parameters(family.model))
        if init == "uniform":
            token.uniform_(-0.5, 0.5)  # as released (arXiv:2312.07255)
        elif init == "normal":
            token.normal_(0, 0.02)
        elif init == "zeros":
            token.zero_()
        else:
            position = family.class_position
            if position is None:
                raise ValueError("token_init='class' needs a backbone with a class token")
            token.copy_(position.detach().expand_as(token))
        self.weight = nn.Parameter(token)
        self.dropout = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        return f"count={self.count}, index={self.index}"

    def attach(self, family: BackboneFamily) -> None:
        family.blocks[0].register_forward_pre_hook(Hook(self, "enter"))
        family.output_norm.register_forward_hook(Hook(self, "leave"))
        for module in family.prefix_counters:
            module.num_prefix_tokens += self.count

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) without the Gist token to (B, N + K, D) with it."""
        gist = self.weight.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        before, after = tokens.tensor_split((self.index,), dim=1)
        return torch.cat((before, self.dropout(gist), after), dim=1)

    def remove(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N + K, D) with the Gist token to (B, N, D) without it."""
        return torch.cat((tokens[:, : self.index], tokens[:, self.index + self.count :]), dim=1)

    def pick(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N + K, D) to the Gist token, or the mean of several, (B, D)."""
        if self.count == 1:
            return tokens[:, self.index]
        return tokens[:, self.index : self.index + self.count].mean(1)

    def enter(self, block: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Hook before the first block: add the Gist token."""
        return (self(args[0]), *args[1:])

    def leave(self, norm: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
        """Hook after the final norm: keep the tokens for who asks, and remove the Gist token."""
        tokens = hooks.asked_for(self)
        if tokens is None:
            return None
        tokens[:] = [output]
        return self.remove(output)
