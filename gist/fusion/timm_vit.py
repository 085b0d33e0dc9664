"""The fused forward of a whole timm VisionTransformer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from gist.fusion import timm_block
from gist.fusion.patch_embedding import embed_patches
from gist.methods.base import AttachedMethod, Refusal
from gist.methods.hooks import is_owned
from gist.untouched import calls_own_forward, hooks_of, is_own, written_forward
from gist_kernels.tracing import autocast_enabled, exporting, under_transform, watched

_FORWARDS = {
    name: written_forward(VisionTransformer, name)
    for name in ("forward", "forward_features", "forward_head")
}
_SEQUENTIAL = written_forward(nn.Sequential)
# Parameters that come after the patch embedding.
_LATER = ("blocks.", "norm.", "fc_norm.", "head.", "attn_pool.")


class InsertedTokens(Protocol):
    """Tokens that join the sequence before the first block."""

    index: int
    """Position of the first one."""
    count: int

    def __call__(self, tokens: torch.Tensor, /) -> torch.Tensor:
        """(B, N, D) to (B, N + count, D)."""


def refusal(model: Any, hook_owners: Collection[int]) -> Refusal | None:
    """Why no block of a backbone is fused, so that the backbone runs by its own call; or None.

    ``hook_owners`` is as :func:`gist.fusion.timm_block.plan` takes it. Hooks of others within a
    block concern that block only; any other may read what the fused forward leaves out.
    """
    if exporting():
        return Refusal("it is traced by torch.export")
    if torch._C._get_tracing_state() is not None:
        return Refusal("it is traced by torch.jit.trace")
    if watched():
        return Refusal("a TorchDispatchMode watches its operators")
    if not isinstance(model, VisionTransformer):
        return Refusal(f"it is a {type(model).__name__}")
    for name, own in _FORWARDS.items():
        if getattr(type(model), name) is not own:
            return Refusal(f"{type(model).__name__} has a {name} of its own")
        if not is_own(model, name):
            return Refusal(f"its {name} was replaced")
    if model._compiled_call_impl is not None:
        return Refusal("it was compiled in place")
    if type(model.blocks).forward is not _SEQUENTIAL:
        return Refusal("its blocks are not a plain nn.Sequential")
    for part in _outside_blocks(model):
        if not calls_own_forward(part):
            return Refusal(f"its {type(part).__name__} has a forward of its own")
        if not all(is_owned(hook, hook_owners) for hook in hooks_of(part)):
            return Refusal("it carries hooks that are not gist's outside of its blocks")
    return None


def _outside_blocks(model: Any) -> Iterator[nn.Module]:
    yield model
    for name, child in model.named_children():
        if name == "blocks":
            yield child
        else:
            yield from child.modules()


class ModelPlan(NamedTuple):
    """How a backbone runs."""

    refusal: Refusal | None
    """Why it runs by its own call as a whole; the other fields are then empty."""
    blocks: Sequence[timm_block.Plan | Refusal] = ()
    """How each block runs."""
    embedding: Sequence[nn.Parameter] = ()
    """The parameters before the first block."""


def plan(model: Any, methods: Sequence[AttachedMethod], hook_owners: Collection[int]) -> ModelPlan:
    """How a backbone runs, as things stand at the call.

    Args:
        model: the backbone.
        methods, hook_owners: as :func:`gist.fusion.timm_block.plan` takes them.
    """
    whole = refusal(model, hook_owners)
    if whole is not None:
        return ModelPlan(whole)
    return ModelPlan(
        None,
        [
            timm_block.plan(block, index, methods, hook_owners)
            for index, block in enumerate(model.blocks)
        ],
        [p for name, p in model.named_parameters() if not name.startswith(_LATER)],
    )


def features(
    model: Any,
    plan: ModelPlan,
    images: torch.Tensor,
    methods: Sequence[AttachedMethod],
    token: InsertedTokens | None,
    num_read: int | None,
) -> torch.Tensor:
    """The tokens after the final norm.

    Args:
        model: the timm VisionTransformer.
        plan: what :func:`plan` gave for it, without a refusal of the whole.
        images: (B, 3, H, W).
        methods: the modules attached to the backbone.
        token: the Gist token, or None.
        num_read: only the first tokens are read, so that the last block computes no others; None
            for all.

    Gradients that lead only to frozen patch embeddings are not computed.
    """
    frozen = not (
        images.requires_grad
        or under_transform()  # whose tangents no flag tells of
        or any(p.requires_grad for p in plan.embedding)
        or any(method.reaches_embedding for method in methods)
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        x = model.patch_drop(model._pos_embed(embed_patches(model.patch_embed, images)))
        x = model.norm_pre(x)
    if autocast_enabled(x.device.type):
        x = x.to(next(model.parameters()).dtype)  # where no float32 position has been added
    # Of the first block's input, only the Gist token then needs a gradient.
    grad_tokens = None
    if frozen and token is not None and not any(method.appended_tokens for method in methods):
        grad_tokens = token.index, token.count
    last = len(model.blocks) - 1

    def run(index: int, x: torch.Tensor) -> torch.Tensor:
        block = model.blocks[index]
        how = plan.blocks[index]
        if isinstance(how, Refusal):
            return block(x)
        if index == 0 and token is not None:
            x = token(x)
        for method in methods:
            x = method.before_block(index, x)
        x = timm_block.run(
            block, how, x,
            num_queries=num_read if index == last else None,
            grad_tokens=grad_tokens if index == 0 else None,
        )  # fmt: skip
        if index == last and num_read is None:
            for method in methods:
                x = method.after_blocks(x)
        return x

    for index in range(last + 1):
        if model.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(run, index, x, use_reentrant=False)
        else:
            x = run(index, x)
    return model.norm(x)
