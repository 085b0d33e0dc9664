"""The Gist token: a trainable token that joins the sequence after the class token."""

from __future__ import annotations

from functools import partial

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

    in_evaluation = True
    """Whether other tokens see the Gist token, so that evaluation needs it."""

    def __init__(
        self, family: BackboneFamily, dropout: float, count: int = 1, init: str | None = None
    ):
        super().__init__()
        self.index, self.count = int(family.has_class_token), count
        token = torch.empty(1, count, family.embed_dim, **new_parameters(family.model))
        init = init or family.token_init
        if init == "uniform":
            token.uniform_(-0.5, 0.5)  # as released (arXiv:2312.07255)
        elif init == "words":
            mean, std = family.word_statistics()
            token.normal_().mul_(std.to(token)).add_(mean.to(token))
        elif init == "normal":
            token.normal_(0, 0.02)
        elif init == "zeros":
            token.zero_()
        else:
            position = family.class_position
            assert position is not None  # gist.model.checks
            token.copy_(position.detach().expand_as(token))
        self.weight = nn.Parameter(token)
        self.dropout = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        return f"count={self.count}, index={self.index}"

    def attach(self, family: BackboneFamily) -> None:
        """Join a backbone by hooks, where its family says."""
        family.attach_token(partial(Hook, self))
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
        """Hook after the final norm: hand the Gist token to who asks, and remove it."""
        answer = hooks.asked_for(self)
        if answer is None:
            return None
        kept = self.remove(output)
        answer[:] = [self.pick(output), kept]
        return kept
