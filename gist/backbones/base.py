"""The base class of backbone families: a backbone's blocks and their layers, pooling, classifier.

A subclass of :class:`BackboneFamily` describes one family of models. It holds no state but the
model, so one is made whenever it is needed.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn


class Projection(NamedTuple):
    """Features ``start`` to ``stop`` of a linear layer's output: a packed qkv holds three."""

    layer: nn.Linear
    start: int
    stop: int
    bias_apart: bool = False
    """Whether the layer is without bias, and what calls it adds one to its output."""

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def with_own_bias(self, method: str) -> Projection:
        """This one, for a method that changes the layer's bias.

        Raises:
            ValueError: the bias is not the layer's.
        """
        if self.bias_apart:
            raise ValueError(
                f"{method} changes the biases of queries, keys and values, which this backbone "
                "adds apart from the layer; take LoRA, FacT or an adapter"
            )
        return self


PLAIN_MLP = ("fc1", "fc2")
GATED_MLP = ("gate", "up", "down")


class BlockParts(NamedTuple):
    """The layers of a block: attention's and the MLP's, in pairs."""

    norms: tuple[nn.Module, nn.Module]
    """In a pre-norm block, each reads the residual stream."""
    branch_outputs: tuple[nn.Module, nn.Module]
    """Their outputs are added to the residual stream; both may be one module, called twice."""
    projections: dict[str, Projection]
    """q, k, v, proj, fc1 and fc2, as far as they are plain linear layers, called as modules. A
    gated text MLP has gate, up and down instead of fc1 and fc2."""
    entries: tuple[nn.Module, nn.Module] | None = None
    """In a post-norm block, a module of each sublayer that reads the residual stream."""

    @property
    def readers(self) -> tuple[nn.Module, nn.Module]:
        """Modules called with the residual stream as each sublayer begins, and once in it."""
        return self.norms if self.entries is None else self.entries

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names that a block of this kind gives its projections, in the order of the calls."""
        gated = not self.projections.keys().isdisjoint(GATED_MLP)
        return ("q", "k", "v", "proj", *(GATED_MLP if gated else PLAIN_MLP))


class BackboneFamily(ABC):
    """A backbone with blocks of attention and MLP, and a classifier with a linear last layer."""

    main_input_name: ClassVar[str] = "pixel_values"
    """transformers' name of the input."""
    token_place: ClassVar[str] = "prefix"
    """"prefix": Gist tokens join the tokens before an image's patches. "second": they follow a
    text's first token. "last": they follow the token that the classifier reads. "masked": they
    precede an image's patches, which have a mask."""

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
        projections = self.parts(index).projections
        if name not in projections:
            raise ValueError(
                f"{name!r} of block {index} of this backbone, a "
                f"{type(self.blocks[index]).__name__}, is no plain linear layer to attach to; "
                f"those that are: {', '.join(projections) or 'none'}"
            )
        return projections[name]

    def call_hooked_layers(self) -> None:  # noqa: B027
        """Let every layer that carries hooks be called, where the model may read its weight only.
        :func:`gist.unwrap` undoes it."""

    def last_layers(self, index: int) -> tuple[nn.Linear, nn.Linear]:
        """The last layers of a block's attention and MLP: proj, and fc2 or down.

        Raises:
            ValueError: one is no plain linear layer.
        """
        last = self.parts(index).layer_names[-1]
        return self.projection(index, "proj").layer, self.projection(index, last).layer

    @property
    def norm_types(self) -> tuple[type[nn.Module], ...]:
        """The classes of the model's norms."""
        return nn.LayerNorm, nn.RMSNorm

    # ---- the Gist token

    @property
    def token_init(self) -> str:
        """How the Gist token starts by default, see :class:`gist.GistConfig`."""
        return "uniform"  # as released (arXiv:2312.07255)

    def word_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the embedded words, (D,) each.

        Raises:
            ValueError: the model embeds no words.
        """
        raise ValueError(
            "token_init='words' is for text models; for images take one of 'uniform', 'normal', "
            "'zeros' and 'class'"
        )

    def attach_token(self, hook: Callable[[str], Callable[..., Any]]) -> None:
        """Put the Gist token's hooks on the model: ``hook(name)`` calls its method of that name."""
        self.blocks[0].register_forward_pre_hook(hook("enter"))
        self.output_norm.register_forward_hook(hook("leave"))

    # ---- what is around the blocks

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

    def named_inputs(
        self, images: torch.Tensor | None, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The model's main input, and its others by name, of a call that names any.

        Raises:
            TypeError: the main input is missing, or one is of no use here.
        """
        others = dict(inputs)
        given = others.pop(self.main_input_name, None)
        if (images is None) == (given is None):
            raise TypeError(
                f"give {self.main_input_name} once, by position or by name; got "
                f"{', '.join(inputs) or 'no input'}{'' if images is None else ' and a position'}"
            )
        self.check_inputs(others)
        return (given if images is None else images), others

    def check_inputs(self, others: Mapping[str, Any]) -> None:
        """Refuse inputs beside the main one that the model does not take.

        Raises:
            TypeError: there is such an input.
        """
        if others:
            raise TypeError(
                f"a {type(self.model).__name__} takes images only; remove {', '.join(others)}"
            )

    @abstractmethod
    def features(self, images: torch.Tensor, **others: Any) -> torch.Tensor:
        """All tokens after the final norm, by the model's own forward, hooks included.

        ``others`` are as :meth:`named_inputs` gives them.
        """

    # ---- the classifier

    @property
    @abstractmethod
    def heads(self) -> Sequence[nn.Module]:
        """The classifier's modules, which are trained; as a rule one linear layer."""

    @property
    def logit_layers(self) -> Sequence[nn.Module]:
        """The linear layers of :attr:`heads` that give logits."""
        return self.heads

    def head_copy(self) -> nn.Module:
        """A copy of the classifier for :meth:`classify`.

        Raises:
            ValueError: the classifier has several heads.
        """
        if len(self.heads) > 1:
            raise ValueError("separate_head is not defined for a backbone with two heads")
        return copy.deepcopy(self.heads[0])

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

    def keep_pooling(self, global_pool: str | None) -> None:
        """Raise a ValueError for a pooling other than the model's, which can't be changed."""
        if global_pool not in (None, self.pooling):
            raise ValueError(
                f"global_pool can't be {global_pool!r}: a {type(self.model).__name__} pools by "
                f"{self.pooling!r}"
            )

    @abstractmethod
    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D) tokens, without added ones, to the classifier's (B, F) input."""

    def pool_call(self, features: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """:meth:`pool` for a call with inputs beside the main one."""
        return self.pool(features)

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
        heads = [getattr(head, "original_module", head) for head in self.logit_layers]
        if not new_head and not (heads and all(isinstance(head, nn.Linear) for head in heads)):
            return (
                "has no linear classifier; create it with num_classes=..., or call "
                "gist.wrap(..., num_classes=N), with 0 for features without a classifier"
            )
        shared = self._shared()
        if shared is not None:
            return f"has one module in two places, {shared}; give each its copy.deepcopy"
        if any(part._forward_hooks or part._forward_pre_hooks for part in self.hooked_parts()):
            return "carries hooks on its blocks already (is it wrapped?); wrap a fresh one"
        return None

    def hooked_parts(self) -> Iterator[nn.Module]:
        """Modules, at least one of which carries a hook once the model is wrapped."""
        return (part for block in self.blocks for part in block.modules())

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


def packed(
    layer: Any, names: Sequence[str] = "qkv", *, bias_apart: bool = False
) -> dict[str, Projection]:
    """The projections that one linear layer holds, of the same width each."""
    if type(layer) is not nn.Linear:
        return {}
    width = layer.out_features // len(names)
    return {
        name: Projection(layer, i * width, (i + 1) * width, bias_apart)
        for i, name in enumerate(names)
    }
