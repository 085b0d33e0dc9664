"""What the class token and the Gist token attend to in a backbone's last block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from gist.model.wrapped import GistModel


class UnavailableError(Exception):
    """A model whose attention can't be shown; the text says why."""


class AttentionMaps(NamedTuple):
    """Attention from one token to each patch, (B, rows, columns) float32, mean over the heads.

    A map's sum is the share of the token's attention that patches get. The rest goes to the class
    token, the Gist token, registers and prompts.
    """

    cls: torch.Tensor | None
    """The class token's; None in a model that does not classify by it."""
    gist: torch.Tensor | None
    """The Gist token's, the mean of several; None without one."""


@torch.no_grad()
def attention_maps(model: GistModel, images: torch.Tensor) -> AttentionMaps:
    """The last block's attention for some images, in evaluation mode.

    The block runs by its library's own forward, with its attention computed step by step, so that
    the weights after softmax can be read.

    Args:
        model: is left in evaluation mode.
        images: (B, 3, H, W), normalised, on the model's device.

    Raises:
        UnavailableError: the model has no patches, neither token, or attention of its own kind.
    """
    family = model.family
    if family.token_place != "prefix":
        raise UnavailableError("the model reads text, which has no patches")
    by_class = family.has_class_token and "token" in family.pooling
    if not by_class and model.token is None:
        raise UnavailableError(
            f"the backbone pools by {family.pooling!r} and has no Gist token, so that no token's "
            "attention decides the class"
        )
    model.eval()
    block = family.blocks[-1]
    with _unfused(block), _reading(block) as found:
        model(images)
    weights = _weights(found, len(images))
    height, width = (
        side // stride
        for side, stride in zip(images.shape[2:], family.patch_projection.stride, strict=True)
    )
    first = model.num_prefix_tokens
    if first + height * width > weights.shape[-1]:
        raise UnavailableError("its last block has fewer tokens than the image has patches")

    def of_token(index: int, count: int = 1) -> torch.Tensor:
        rows = weights[:, index : index + count, first : first + height * width]
        return rows.mean(1).unflatten(1, (height, width)).cpu()

    token = model.token
    return AttentionMaps(
        of_token(0) if by_class else None,
        None if token is None else of_token(token.index, token.count),
    )


def _weights(found: list[torch.Tensor], images: int) -> torch.Tensor:
    """(B, N, N) weights, the mean over the heads, among the tensors that a block has shown."""
    for tensor in found:
        square = tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3]
        if square and len(tensor) == images:
            rows = tensor.float().sum(-1)
            if torch.allclose(rows, torch.ones_like(rows), atol=1e-2):
                return tensor.float().mean(1)
    raise UnavailableError("its last block does not show the weights of its attention")


@contextmanager
def _reading(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """All tensors that enter or leave the modules of a block.

    timm's attention gives its weights to a dropout, transformers' returns them.
    """
    found: list[torch.Tensor] = []

    def keep(values: Any) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                found.append(value.detach())

    def enters(module: nn.Module, args: Any) -> None:
        keep(args)

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        keep(output)

    with ExitStack() as stack:
        for part in block.modules():
            stack.callback(part.register_forward_pre_hook(enters).remove)
            stack.callback(part.register_forward_hook(leaves).remove)
        yield found


@contextmanager
def _unfused(block: nn.Module) -> Iterator[None]:
    """Attention step by step: timm's ``fused_attn``, transformers' ``_attn_implementation``."""
    with ExitStack() as stack:
        for part in block.modules():
            for holder, name, value in (
                (part, "fused_attn", False),
                (getattr(part, "config", None), "_attn_implementation", "eager"),
            ):
                if hasattr(holder, name):
                    stack.callback(setattr, holder, name, getattr(holder, name))
                    setattr(holder, name, value)
        yield
