"""Merging: a plain backbone with the method folded into its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.backbones.families import family_of
from gist.backbones.timm_vit import TimmViT
from gist.model.containers import gist_model_of, is_sharded
from gist.model.precision import half_dtype
from gist.model.unwrap import unwrap
from gist.model.wrapped import GistModel
from gist_kernels.quantised import is_quantised


def merge(model: nn.Module, *, drop_token: bool = False) -> Any:
    """A plain copy of the backbone with the logits of ``model`` in evaluation mode, up to rounding.

    LoRA, SSF, FacT, RepAdapter and DiffFit fold into the weights; a model may have only one method.
    Methods that only train the backbone's own parameters have nothing to fold. Layers that share a
    weight get one each. What HF PEFT has put into the backbone is merged by its own
    ``merge_and_unload``. The Gist token stays as one more register token of a timm
    VisionTransformer. A text decoder's logits never depend on it, so that it is left out.

    Args:
        model: what :func:`gist.wrap` returned, also within DistributedDataParallel or
            ``torch.compile``.
        drop_token: leave the Gist token out. The result is then not exact, because the class token
            attended to it: measure the accuracy again.

    Returns:
        The copy, in evaluation mode, with all parameters trainable as in a new model.

    Raises:
        ValueError: a method that weights can't express (adapters, prompts), several, a token that
            the backbone has no place for, quantised weights, or parameters sharded over processes.
            ``model`` is unchanged in any case.
    """
    model = gist_model_of(model)
    if is_sharded(model):
        raise ValueError(
            "a model sharded by fully_shard can't be merged; gist.save it, and merge what "
            "gist.load makes of it on a fresh backbone"
        )
    _ = model.family  # raises where the backbone has been given back
    quantised = [n for n, p in model.backbone.named_parameters() if is_quantised(p)]
    if quantised:
        raise ValueError(
            f"quantised weights can't be merged into, such as {quantised[0]}; gist.save the model, "
            "and merge what gist.load(..., check_weights=False) makes of it on the backbone before "
            "it was quantised"
        )
    if len(model.attached_methods) > 1:
        raise ValueError("only one method can be merged; this model has several")
    model._check_hooks()
    # A decoder's evaluation is without the token.
    keep_token = model.token is not None and model.token.in_evaluation and not drop_token
    if keep_token:
        _check_register(model)
    twin = copy.deepcopy(model).eval()
    by_peft, methods, token = _is_peft(twin), twin.attached_methods, twin.token
    backbone = unwrap(twin)
    if by_peft:
        backbone = _merged_by_peft(backbone)
    family = family_of(backbone)
    with torch.no_grad():
        if methods:
            _untie(backbone)
        for method in methods:
            method.merge(family)
        if token is not None and keep_token:
            _keep_as_register(backbone, token.weight)
    _head_in_half(family)
    return backbone.requires_grad_(True)


def _is_peft(model: GistModel) -> bool:
    return model.family.model is not model.backbone


def _merged_by_peft(backbone: Any) -> Any:
    """The base model of HF PEFT's, with its adapters in the weights."""
    kinds = ", ".join(str(config.peft_type.value) for config in backbone.peft_config.values())
    for name, part in backbone.named_modules():
        if type(part).__module__ == "peft.tuners.oft.layer" and isinstance(
            getattr(part, "base_layer", None), nn.Conv2d
        ):
            raise ValueError(
                f"HF PEFT's OFT of the convolution {name} rotates the input's overlapping windows, "
                "which no kernel expresses, though PEFT merges it; use the wrapped model"
            )
    try:
        plain = backbone.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ValueError(
            f"HF PEFT can't merge its {kinds} into this backbone: {error}; use the wrapped model"
        ) from error
    left = [n for n, part in plain.named_modules() if type(part).__module__.startswith("peft.")]
    if left:
        raise ValueError(
            f"HF PEFT's merge_and_unload leaves its modules for {kinds} in the backbone: "
            f"{', '.join(left[:4])}; use the wrapped model"
        )
    return plain


def _untie(backbone: nn.Module) -> None:
    """Give layers that share a parameter one each: what is folded into them differs."""
    seen: set[int] = set()
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.clone()))
            seen.add(id(parameter))


def _head_in_half(family: BackboneFamily) -> None:
    """Give a classifier that was trained in float32 the dtype of a half backbone."""
    head = [parameter for head in family.heads for parameter in head.parameters()]
    ids = {id(parameter) for parameter in head}
    half = half_dtype(p for p in family.model.parameters() if id(p) not in ids)
    if half is not None:
        for parameter in head:
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
