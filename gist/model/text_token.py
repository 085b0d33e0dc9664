"""The Gist token among a text's words, or the patches of images of many shapes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from gist.methods import hooks
from gist.model.token import GistToken

_BY_POSITION = ("input_ids", "attention_mask")
"""What a model without its classifier is given by position."""


class EncoderToken(GistToken):
    """Gist tokens behind an encoder's first token, which every word sees.

    They follow the embedding, so they have no position and no token type. Where attention itself
    has positions, they have the first token's.
    """

    mask: ClassVar[str] = "attention_mask"
    by_position: ClassVar[tuple[str, ...]] = _BY_POSITION

    def extend_mask(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the model without its classifier: let all words see the Gist tokens."""
        inputs = _named(args, kwargs, self.by_position)
        mask = inputs.get(self.mask)
        if mask is not None:
            seen = mask.new_ones(len(mask), self.count)
            before, after = mask.tensor_split((self.index,), dim=1)
            inputs[self.mask] = torch.cat((before, seen, after), dim=1)
        return (), inputs

    def extend_positions(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the same: give the Gist tokens the first token's position."""
        inputs = _named(args, kwargs)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        inputs["position_ids"] = positions[:, self._sources(ids.shape[1], ids.device)]
        return (), inputs

    def extend_distances(
        self, bias: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Hook before an embedding of (N + K, N + K) buckets of distances: the same for those."""
        buckets = args[0]
        sources = self._sources(len(buckets) - self.count, buckets.device)
        return (buckets[sources[:, None], sources], *args[1:])

    def _sources(self, length: int, device: torch.device) -> torch.Tensor:
        """For each of N + K tokens, the one of N whose position it has."""
        columns = torch.arange(length + self.count, device=device)
        return (columns - self.count).clamp(min=0)

    def enter_embedding(
        self, embedding: nn.Module, args: object, output: torch.Tensor
    ) -> torch.Tensor:
        """Hook after the embedding: add the Gist tokens."""
        return self(output)

    def leave_encoder(self, encoder: nn.Module, args: object, output: Any) -> Any:
        """Hook after the model without its classifier, as :meth:`GistToken.leave`."""
        answer = hooks.asked_for(self)
        if answer is None:
            return None
        features = output[0]
        answer[:] = [self.pick(features), self.remove(features)]
        return _with_features(output, answer[1])


class PatchToken(EncoderToken):
    """Gist tokens before the patches of images of many shapes, which a mask tells from padding."""

    mask: ClassVar[str] = "pixel_attention_mask"
    by_position: ClassVar[tuple[str, ...]] = ("pixel_values", mask, "spatial_shapes")


class DecoderToken(GistToken):
    """Gist tokens right behind the token that a decoder's classifier reads.

    That is the last one which is not padding, in each row. The Gist tokens see all words; no word
    sees them, for attention is causal. So they join a call only if asked for: in training.
    """

    in_evaluation = False

    def extra_repr(self) -> str:
        return f"count={self.count}, behind the last token"

    def forward(self, tokens: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) to (B, N + K, D), the Gist tokens at the end, or all in a (B, N + K) order."""
        gist = self.dropout(self.weight.to(tokens.dtype).expand(len(tokens), -1, -1))
        joined = torch.cat((tokens, gist), dim=1)
        return joined if order is None else _columns(joined, order)

    def extend_inputs(
        self, config: Any, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook before the model without its classifier: mask and positions with the tokens."""
        if hooks.asked_for(self) is None:
            return None
        inputs = _named(args, kwargs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        positions = inputs.get("position_ids")
        start = self._start(config, ids)
        order = self._order(ids, start)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), self.count)), dim=1)
            inputs["attention_mask"] = mask.gather(1, order)
        # Positions that count up are right by default. Others need a mask beside them: without
        # one, transformers takes positions that don't count up for those of packed sequences.
        if positions is not None:
            positions = positions.expand(len(ids), -1)
            behind = torch.arange(1, self.count + 1, device=ids.device)
            own = positions.gather(1, start - 1) + behind
            inputs["position_ids"] = torch.cat((positions, own), dim=1).gather(1, order)
        inputs["use_cache"] = False
        return (), inputs

    def enter_embedding(
        self,
        config: Any,
        embedding: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        """Hook after the embedding: add the Gist tokens to each row in its place."""
        if hooks.asked_for(self) is None:
            return None
        joined: torch.Tensor = self(output, self._order(args[0], self._start(config, args[0])))
        return joined

    def leave_decoder(
        self,
        config: Any,
        encoder: nn.Module,
        args: object,
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Hook after the model without its classifier, as :meth:`GistToken.leave`."""
        answer = hooks.asked_for(self)
        if answer is None:
            return None
        features, ids = output[0], kwargs["input_ids"]
        gist = self._start(config, ids) + torch.arange(self.count, device=ids.device)
        # The classifier reads what stands before the Gist tokens; behind them is padding.
        answer[:] = [_columns(features, gist).mean(1), features[:, : -self.count]]
        return _with_features(output, answer[1])

    def _start(self, config: Any, ids: torch.Tensor) -> torch.Tensor:
        """(B, 1) columns of the first Gist token, by the rule of transformers' classifiers."""
        padding = config.get_text_config().pad_token_id
        if padding is None:
            return torch.full((len(ids), 1), ids.shape[1], device=ids.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        return (columns * (ids != padding)).argmax(1, keepdim=True) + 1

    def _order(self, ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """(B, N + K) columns of [N tokens, K Gist tokens] in the order of the sequence."""
        length, count = ids.shape[1], self.count
        columns = torch.arange(length + count, device=ids.device)
        behind = torch.where(columns < start + count, length - start + columns, columns - count)
        return torch.where(columns < start, columns, behind)


TOKENS: dict[str, type[GistToken]] = {
    "prefix": GistToken,
    "second": EncoderToken,
    "last": DecoderToken,
    "masked": PatchToken,
}
"""The class of the Gist token by the place that a family gives it."""


def _named(
    args: tuple[Any, ...], kwargs: dict[str, Any], by_position: tuple[str, ...] = _BY_POSITION
) -> dict[str, Any]:
    return {**dict(zip(by_position, args, strict=False)), **kwargs}


def _columns(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(B, M, D) of (B, N, D) tokens: the chosen (B, M) columns of each row."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))


def _with_features(output: Any, features: torch.Tensor) -> Any:
    """A model's output with other last features: a tuple, or one of transformers' classes."""
    if isinstance(output, tuple):
        return (features, *output[1:])
    output.last_hidden_state = features
    return output
