"""Merging: a plain backbone with the method folded into its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gist.backbones.timm_vit import TimmViT
from gist.fusion.timm_block import hook_owner
from gist.model.precision import half_dtype, in_own_dtype
from gist.model.wrapped import GistModel


def merge(model: GistModel, *, drop_token: bool = False) -> Any:
    """A plain copy of the backbone with the logits of ``model`` in evaluation mode, up to rounding.

    LoRA, SSF, FacT and RepAdapter fold into the weights; a model may have only one method. Methods
    that train the backbone's own parameters have nothing to fold. The Gist token stays as one more
    register token of a timm VisionTransformer.

    Args:
        model: what :func:`gist.wrap` returned.
        drop_token: leave the Gist token out. The result is then not exact, because the class token
            attended to it: measure the accuracy again.

    Returns:
        The copy, in evaluation mode, with all parameters trainable as in a new model.

    Raises:
        ValueError: a method that weights can't express (adapters, prompts), several, or a token
            that the backbone has no place for. ``model`` is unchanged in any case.
    """
    if len(model.attached_methods) > 1:
        raise ValueError("only one method can be merged; this model has several")
    keep_token = model.token is not None and not drop_token
    if keep_token:
        _check_register(model)
    twin = copy.deepcopy(model).eval()
    family, token = twin.family, twin.token
    remove_hooks(twin)
    with torch.no_grad():
        for method in twin.attached_methods:
            method.merge(family)
        if token is not None and keep_token:
            _keep_as_register(family.model, token.weight)
    _in_one_dtype(family.model)
    return family.model.requires_grad_(True)


def remove_hooks(model: GistModel) -> None:
    """Take methods and token off the backbone, which is then as before :func:`gist.wrap`."""
    owners = model.hook_owners
    for part in model.backbone.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if id(hook_owner(hook)) in owners or hook is in_own_dtype:
                    del hooks[key]
    if model.token is not None:
        for module in model.family.prefix_counters:
            module.num_prefix_tokens -= model.token.count


def _in_one_dtype(backbone: nn.Module) -> None:
    """Give what was trained in float32 the dtype of a half backbone again."""
    half = half_dtype(backbone.parameters())
    if half is not None:
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(half)


def _check_register(model: GistModel) -> None:
    family, backbone = model.family, model.family.model
    reason = None
    if type(family) is not TimmViT or not family.has_class_token:
        reason = f"a {type(backbone).__name__} of this kind has no register tokens to join"
    elif not isinstance(backbone.norm_pre, nn.Identity):
        reason = "the backbone's norm before the blocks would change it"
    if reason is not None:
        raise ValueError(
            f"the Gist token can't stay in a plain model, for {reason}; drop_token=True leaves it "
            "out, which is not exact"
        )


def _keep_as_register(backbone: Any, token: torch.Tensor) -> None:
    """The Gist token as the first register token, without a position."""
    count = token.shape[1]
    registers = [token] if backbone.reg_token is None else [token, backbone.reg_token]
    backbone.reg_token = nn.Parameter(torch.cat([r.to(backbone.cls_token) for r in registers], 1))
    position = backbone.pos_embed
    if position is not None and not backbone.no_embed_class:
        none = torch.zeros_like(position[:, :1]).expand(-1, count, -1)
        backbone.pos_embed = nn.Parameter(torch.cat((position[:, :1], none, position[:, 1:]), 1))
    backbone.num_reg_tokens += count
    backbone.num_prefix_tokens += count
