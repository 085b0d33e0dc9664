"""The base class of backbone families: a backbone's blocks and their layers, pooling, classifier.

A subclass of :class:`BackboneFamily` describes one family of models. It holds no state but the
model, so one is made whenever it is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn


class Projection(NamedTuple):
    """Features ``start`` to ``stop`` of a linear layer's output: a packed qkv holds three."""

    layer: nn.Linear
    start: int
    stop: int

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start


class BlockParts(NamedTuple):
    """The layers of a pre-norm block: attention's and the MLP's, in pairs."""

    norms: tuple[nn.Module, nn.Module]
    """Each reads the residual stream."""
    branch_outputs: tuple[nn.Module, nn.Module]
    """Their outputs are added to the residual stream; both may be one module, called twice."""
    projections: dict[str, Projection]
    """q, k, v, proj, fc1 and fc2, as far as they are plain linear layers, called as modules."""


class BackboneFamily(ABC):
    """A backbone with blocks of pre-norm attention and MLP, and a linear classifier."""

    def __init__(self, model: Any) -> None:
        self.model = model

    # ---- blocks

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]: ...

    @abstractmethod
    def parts(self, index: int) -> BlockParts:
        """The layers of one block.

        Raises:
            ValueError: the block is of another kind.
        """

    def projection(self, index: int, name: str) -> Projection:
        """One of :attr:`BlockParts.projections`.

        Raises:
            ValueError: it is no plain linear layer.
        """
        found = self.parts(index).projections.get(name)
        if found is None:
            raise ValueError(
                f"{name!r} of block {index} of this backbone, a "
                f"{type(self.blocks[index]).__name__}, is no plain linear layer to attach to"
            )
        return found

    # ---- what is around them

    @property
    @abstractmethod
    def embed_dim(self) -> int: ...

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, registers."""

    @property
    @abstractmethod
    def has_class_token(self) -> bool: ...

    @property
    @abstractmethod
    def class_position(self) -> torch.Tensor | None:
        """The class token with its position, (D,), or None."""

    @property
    @abstractmethod
    def patch_projection(self) -> nn.Conv2d: ...

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is built for."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""

    @property
    @abstractmethod
    def pooling(self) -> str: ...

    @property
    def reads_only_prefix(self) -> bool:
        """Whether the classifier reads only the first token of the last block's output."""
        return self.pooling == "token"

    @property
    def prefix_counters(self) -> Sequence[Any]:
        """Modules within the blocks whose ``num_prefix_tokens`` must include the added tokens."""
        return ()

    @property
    @abstractmethod
    def output_norm(self) -> nn.Module:
        """The module whose output :meth:`features` returns; an identity in some models."""

    @abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """All tokens after the final norm, by the model's own forward, hooks included."""

    # ---- the classifier

    @property
    @abstractmethod
    def heads(self) -> Sequence[nn.Module]:
        """The classifier's layers; as a rule one."""

    @property
    def unread(self) -> Sequence[nn.Module]:
        """Modules that the model has and the logits do not depend on."""
        return ()

    @property
    @abstractmethod
    def num_classes(self) -> int: ...

    def logits(self, output: Any) -> torch.Tensor:
        """The (B, C) logits in what calling the model returns."""
        logits: torch.Tensor = output
        return logits

    @abstractmethod
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes remove it. None keeps the pooling."""

    @abstractmethod
    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D) tokens, without added ones, to the classifier's (B, F) input."""

    def pool_token(self, token: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The classifier's input with ``token``, (B, D), in place of the pooled tokens."""
        return token

    @abstractmethod
    def classify(self, pooled: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        """(..., F) to (..., C) logits, by ``head`` if given, else by the model's own classifier."""

    def pre_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """(..., F) to the input of the classifier's last linear layer."""
        return pooled

    # ---- training

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks' activations in the backward pass, or keep them."""

    @property
    def needs_input_gradients(self) -> bool:
        """Whether blocks are checkpointed so that only a gradient of their input reaches them."""
        return False

    # ---- checks

    def refusal(self, gist: bool, new_head: bool = False) -> str | None:
        """Why the model can't be wrapped, or None; ``new_head`` if its classifier is replaced."""
        # HF PEFT keeps a trained copy beside the original, in a module of its own.
        heads = [getattr(head, "original_module", head) for head in self.heads]
        if not new_head and not (heads and all(isinstance(head, nn.Linear) for head in heads)):
            return (
                "has no linear classifier; create it with num_classes=..., or call "
                "gist.wrap(..., num_classes=N), with 0 for features without a classifier"
            )
        shared = self._shared()
        if shared is not None:
            return f"has one module in two places, {shared}; give each its copy.deepcopy"
        # Whatever wrap attaches hangs on a block or within one.
        parts = (part for block in self.blocks for part in block.modules())
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return "carries hooks on its blocks already (is it wrapped?); wrap a fresh one"
        return None

    def _shared(self) -> str | None:
        """Two places with one module, on which the hooks for both would meet; or None."""
        places: dict[int, str] = {}
        for index, block in enumerate(self.blocks):
            layers: list[tuple[str, nn.Module]] = [(f"block {index}", block)]
            with suppress(ValueError):  # a block of another kind, which some configs take
                parts = self.parts(index)
                layers += [(f"norm {i + 1} of block {index}", n) for i, n in enumerate(parts.norms)]
                # q, k and v may be parts of one layer.
                unique = {id(p.layer): (name, p.layer) for name, p in parts.projections.items()}
                layers += [(f"{name} of block {index}", layer) for name, layer in unique.values()]
            for place, layer in layers:
                earlier = places.setdefault(id(layer), place)
                if earlier != place:
                    return f"{earlier} and {place}"
        return None


def projections(by_name: dict[str, Any], **others: Any) -> dict[str, Projection]:
    found = {}
    for name, layer in (by_name | others).items():
        if isinstance(layer, Projection):
            found[name] = layer
        elif type(layer) is nn.Linear:
            found[name] = Projection(layer, 0, layer.out_features)
    return found
