"""The fused forward of a whole backbone, of whatever library it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gist_kernels as gk
from gist.fusion import block as fused_block
from gist.fusion.block import Plan
from gist.fusion.layers import BlockLayers, Forwards, Scores
from gist.methods.base import AttachedMethod, Refusal
from gist.methods.hooks import is_owned
from gist.untouched import calls_own_forward, hooks_of
from gist_kernels.tracing import autocast_enabled, exporting, under_transform, watched


class Embedded(NamedTuple):
    """What enters the blocks."""

    tokens: torch.Tensor
    """(B, N, D), which enter the first one."""
    rotary: Any = None
    """What the family's own blocks take as rotary positions."""
    tables: Any = None
    """The same for :meth:`FusedBackbone.rotation`, made once for all blocks."""


class FusedBackbone(ABC):
    """How a family's forward is taken apart, so that its blocks can run as fused sublayers.

    It holds no state but the model, so one is made whenever it is needed.
    """

    FORWARDS: ClassVar[Forwards]
    """Those of the classes that a block may consist of."""
    EXPORTS_WHOLE: ClassVar[bool] = True
    """Whether torch.export traces the model's own call; otherwise each block's."""
    ALL_BLOCKS: ClassVar[bool] = False
    """Whether the model runs by its own call if one of its blocks is not fused."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]: ...

    @abstractmethod
    def refusal(self) -> Refusal | None:
        """Why this model's forward is not the one that :meth:`embed` and the others retell."""

    @abstractmethod
    def layers(self, block: nn.Module) -> BlockLayers | Refusal:
        """What a block consists of, or why it runs by its own forward."""

    @abstractmethod
    def is_later(self, parameter: str) -> bool:
        """Whether a parameter of the model, by its name, comes after what :meth:`embed` does."""

    def call_refusal(self, images: torch.Tensor, others: Mapping[str, Any]) -> Refusal | None:
        """Why a call with inputs beside the main one runs by the model's own forward, or None."""
        return None

    def lengths(self, **others: Any) -> torch.Tensor | None:
        """(B,), each row's number of tokens before its padding; None without padding."""
        return None

    @abstractmethod
    def embed(self, images: torch.Tensor, **others: Any) -> Embedded:
        """(B, 3, H, W) images, or (B, N) words, to what enters the blocks.

        ``others`` are inputs that :meth:`call_refusal` has not refused.
        """

    def scores(
        self, embedded: Embedded, added_tokens: int, lengths: torch.Tensor | None, **others: Any
    ) -> Sequence[Scores | None]:
        """For each block what its own attention takes; None where the fused one runs.

        ``lengths`` count the ``added_tokens`` of gist's, ``embedded`` has none of them.
        """
        return [None] * len(self.blocks)

    def run_block(self, index: int, x: torch.Tensor, embedded: Embedded) -> torch.Tensor:
        """A block by its own call, hooks included."""
        output: torch.Tensor = self.blocks[index](x)
        return output

    def rotation(
        self, index: int, embedded: Embedded, added_tokens: int
    ) -> gk.Rotation | Refusal | None:
        """The rotary positions of a block's queries and keys.

        ``added_tokens`` of gist's stand among the prefix tokens; embedded has none of them.

        A refusal, where they are not what the kernels take, lets the block run by its own call.
        """
        return None

    @abstractmethod
    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """What follows the last block, up to the features."""

    @property
    @abstractmethod
    def checkpointed(self) -> bool:
        """Whether the blocks' activations are recomputed in the backward pass."""

    def recomputes(self, index: int) -> bool:
        """Whether one block's activations are."""
        return self.checkpointed

    def parts_outside_blocks(self) -> Iterator[nn.Module]:
        """The modules whose hooks run only in the model's own forward."""
        within = {id(part) for block in self.blocks for part in block.modules()}
        return (part for part in self.model.modules() if id(part) not in within)


class InsertedTokens(Protocol):
    """Tokens that join the sequence before the first block."""

    index: int
    """Position of the first one."""
    count: int

    def __call__(self, tokens: torch.Tensor, /) -> torch.Tensor:
        """(B, N, D) to (B, N + count, D)."""


class BackbonePlan(NamedTuple):
    """How a backbone runs."""

    refusal: Refusal | None
    """Why it runs by its own call as a whole; the other fields are then empty."""
    backbone: FusedBackbone | None = None
    blocks: Sequence[Plan | Refusal] = ()
    """How each block runs."""
    embedding: Sequence[nn.Parameter] = ()
    """The parameters before the first block."""


_EXPORTED = Refusal("it is traced by torch.export")


def refusal(backbone: FusedBackbone | Refusal, hook_owners: Collection[int]) -> Refusal | None:
    """Why no block of a backbone is fused, so that the backbone runs by its own call; or None.

    ``hook_owners`` is as :func:`gist.fusion.block.plan` takes it. Hooks of others within a block
    concern that block only; any other may read what the fused forward leaves out.
    """
    if exporting() and (isinstance(backbone, Refusal) or backbone.EXPORTS_WHOLE):
        return _EXPORTED
    if torch._C._get_tracing_state() is not None:
        return Refusal("it is traced by torch.jit.trace")
    if watched():
        return Refusal("a TorchDispatchMode watches its operators")
    if isinstance(backbone, Refusal):
        return backbone
    if backbone.model._compiled_call_impl is not None:
        return Refusal("it was compiled in place")
    own = backbone.refusal()
    if own is not None:
        return own
    for part in backbone.parts_outside_blocks():
        if not calls_own_forward(part):
            return Refusal(f"its {type(part).__name__} has a forward of its own")
        if not all(is_owned(hook, hook_owners) for hook in hooks_of(part)):
            return Refusal("it carries hooks that are not gist's outside of its blocks")
    return None


def plan(
    backbone: FusedBackbone | Refusal,
    methods: Sequence[AttachedMethod],
    hook_owners: Collection[int],
) -> BackbonePlan:
    """How a backbone runs, as things stand at the call.

    Args:
        backbone: what :func:`gist.fusion.families.fused_backbone` gave.
        methods, hook_owners: as :func:`gist.fusion.block.plan` takes them.
    """
    whole = refusal(backbone, hook_owners)
    if whole is not None:
        return BackbonePlan(whole)
    assert not isinstance(backbone, Refusal)
    blocks = [
        _EXPORTED
        if exporting()
        else fused_block.plan(
            block, backbone.layers, index, methods, hook_owners, backbone.FORWARDS
        )
        for index, block in enumerate(backbone.blocks)
    ]
    if backbone.ALL_BLOCKS:
        for index, block in enumerate(blocks):
            if isinstance(block, Refusal):
                return BackbonePlan(Refusal(f"block {index} can't be fused: {block.reason}"))
    embedding = [p for name, p in backbone.model.named_parameters() if not backbone.is_later(name)]
    return BackbonePlan(None, backbone, blocks, embedding)


def features(
    plan: BackbonePlan,
    images: torch.Tensor,
    methods: Sequence[AttachedMethod],
    token: InsertedTokens | None,
    num_read: int | None,
    **others: Any,
) -> torch.Tensor:
    """The tokens after the final norm.

    Args:
        plan: what :func:`plan` gave, without a refusal of the whole.
        images: (B, 3, H, W), or (B, N) words.
        methods: the modules attached to the backbone.
        token: the Gist token, or None.
        num_read: only the first tokens are read, so that the last block computes no others; None
            for all.
        others: further inputs, which :meth:`FusedBackbone.call_refusal` has not refused.

    Gradients that lead only to frozen patch embeddings are not computed.
    """
    backbone = plan.backbone
    assert backbone is not None
    frozen = not (
        images.requires_grad
        or under_transform()  # whose tangents no flag tells of
        or any(p.requires_grad for p in plan.embedding)
        or any(method.reaches_embedding for method in methods)
    )
    # Before gradients are off: in compiled code, a refused mask raises here.
    lengths = backbone.lengths(**others)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        embedded = backbone.embed(images, **others)
    x = embedded.tokens
    if autocast_enabled(x.device.type):
        # Where no float32 position has been added.
        x = x.to(next(backbone.model.parameters()).dtype)
    # Of the first block's input, only the Gist token then needs a gradient.
    grad_tokens = None
    if frozen and token is not None and not any(method.appended_tokens for method in methods):
        grad_tokens = token.index, token.count
    last = len(plan.blocks) - 1
    added_tokens = 0 if token is None else token.count
    if lengths is not None:
        lengths = lengths + added_tokens
    scores = backbone.scores(embedded, added_tokens, lengths, **others)

    def run(index: int, x: torch.Tensor) -> torch.Tensor:
        how, rotation = plan.blocks[index], backbone.rotation(index, embedded, added_tokens)
        if isinstance(how, Refusal) or isinstance(rotation, Refusal):
            return backbone.run_block(index, x, embedded)
        if index == 0 and token is not None:
            x = token(x)
        for method in methods:
            x = method.before_block(index, x)
        x = fused_block.run(
            how, x,
            num_queries=num_read if index == last else None,
            grad_tokens=grad_tokens if index == 0 else None,
            rotation=rotation,
            lengths=lengths, scores=scores[index],
        )  # fmt: skip
        if index == last and num_read is None:
            for method in methods:
                x = method.after_blocks(x)
        return x

    for index in range(last + 1):
        if torch.is_grad_enabled() and backbone.recomputes(index):
            x = checkpoint(run, index, x, use_reentrant=False)
        else:
            x = run(index, x)
    return backbone.norm(x)
