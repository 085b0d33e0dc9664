"""Transformer blocks by fused sublayers where they match, by their own forward where not.

timm's Block is two pre-norm sublayers, which ``gist_kernels.adapter_attention`` and ``adapter_mlp``
compute with the adapter beside each. What they don't compute is left to the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import nn

import gist_kernels as gk
from gist.methods.base import AttachedMethod, FusedParts, LayerUpdate

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def plan(
    block: nn.Module, index: int, attached: Sequence[AttachedMethod], owned: Collection[int]
) -> FusedParts | str:
    """What the methods add to a block that runs fused, or why it goes its own way.

    ``attached`` are the model's methods, ``owned`` the ids of the modules that belong to them or to
    the token: hooks of any other owner are run by the block's own forward alone.
    """
    if type(block) is not Block:
        return f"it is a {type(block).__name__}"
    part: Any
    for part in (block.norm1, block.norm2):
        if not (type(part) in (nn.LayerNorm, LayerNorm) and len(part.normalized_shape) == 1):
            return f"its norm is a {type(part).__name__}"
    for part in (block.ls1, block.ls2):
        if type(part) not in (nn.Identity, LayerScale):
            return f"its layer scale is a {type(part).__name__}"
    for part in (block.drop_path1, block.drop_path2):
        if type(part) not in (nn.Identity, DropPath):
            return f"its drop-path is a {type(part).__name__}"
    inner = _attention_refusal(block.attn) or _mlp_refusal(block.mlp)
    if inner is not None:
        return inner
    if any(weight.requires_grad for weight in _frozen(block)):
        return "it has trainable matrices of its own"
    if any(id(owner(hook)) not in owned for hook in _hooks(block)):
        return "it carries hooks that are not gist's"
    parts = FusedParts()
    for method in attached:
        found = method.fused(index)
        if isinstance(found, str):
            return found
        if any(a is not None and b is not None for a, b in zip(parts[:2], found[:2], strict=True)):
            return "it has two adapters beside one sublayer"
        if parts.updates.keys() & found.updates.keys():
            return "two methods change one of its layers"
        parts = FusedParts(
            parts.attention or found.attention,
            parts.mlp or found.mlp,
            {**parts.updates, **found.updates},
        )
    return parts


def run(
    block: Any,
    parts: FusedParts,
    x: torch.Tensor,
    *,
    num_queries: int | None,
    grad_tokens: tuple[int, int] | None,
) -> torch.Tensor:
    """A timm Block with what :func:`plan` gave: (B, N, D) tokens to as many, or to the first ones
    alone."""
    attn, mlp, updates = block.attn, block.mlp, parts.updates
    qkv, of_qkv = _linear(attn.qkv, updates.get("qkv"))
    proj, of_proj = _linear(attn.proj, updates.get("proj"))
    x = gk.adapter_attention(
        x,
        _norm(block.norm1, updates.get("norm1")),
        gk.AttentionWeights(
            *qkv, *proj, attn.num_heads, attn.scale, _layer_scale(block.ls1), of_qkv, of_proj
        ),
        parts.attention,
        num_queries=num_queries,
        drop_path=_drop_path(block.drop_path1, x),
        grad_tokens=grad_tokens,
    )
    activation = _activation(mlp.act)
    assert activation is not None
    fc1, of_fc1 = _linear(mlp.fc1, updates.get("fc1"))
    fc2, of_fc2 = _linear(mlp.fc2, updates.get("fc2"))
    return gk.adapter_mlp(
        x,
        _norm(block.norm2, updates.get("norm2")),
        gk.MlpWeights(*fc1, *fc2, activation, _layer_scale(block.ls2), of_fc1, of_fc2),
        parts.mlp,
        drop_path=_drop_path(block.drop_path2, x),
    )


def _frozen(block: Any) -> Iterator[torch.Tensor]:
    """The weights whose gradients the fused sublayers don't compute."""
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        yield layer.weight
    for scale in (block.ls1, block.ls2):
        if isinstance(scale, LayerScale):
            yield scale.gamma


def _linear(
    layer: nn.Linear, change: LayerUpdate | None
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], gk.LinearUpdate | None]:
    """A layer's weight and bias, and what is trained beside them."""
    if change is None:
        return (layer.weight, layer.bias), None
    bias = _shifted(layer.bias, change, layer.weight.dtype)
    return (layer.weight, bias), gk.LinearUpdate(change.scale, change.down, change.up)


def _shifted(
    bias: torch.Tensor | None, change: LayerUpdate, dtype: torch.dtype
) -> torch.Tensor | None:
    """``scale * bias + shift``."""
    scale, shift = (None if t is None else t.to(dtype) for t in change[:2])
    if bias is None or scale is None:
        return bias if shift is None else shift if bias is None else bias + shift
    return scale * bias if shift is None else torch.addcmul(shift, scale, bias)


def _attention_refusal(attn: Any) -> str | None:
    if type(attn) is not Attention:
        return f"its attention is a {type(attn).__name__}"
    if attn.gate is not None:
        return "its attention is gated"
    for part, name in ((attn.q_norm, "queries"), (attn.k_norm, "keys"), (attn.norm, "output")):
        if type(part) is not nn.Identity:
            return f"its attention normalises its {name}"
    if not type(attn.qkv) is type(attn.proj) is nn.Linear:
        return "its attention's projections are not plain linears"
    if attn.training and (attn.attn_drop.p or attn.proj_drop.p):
        return "its attention has dropout"
    return None


def _mlp_refusal(mlp: Any) -> str | None:
    if type(mlp) is not Mlp:
        return f"its MLP is a {type(mlp).__name__}"
    if not type(mlp.fc1) is type(mlp.fc2) is nn.Linear:
        return "its MLP's layers are not plain linears"
    if type(mlp.norm) is not nn.Identity:
        return "its MLP is normalised within"
    if _activation(mlp.act) is None:
        return f"its MLP's activation is a {type(mlp.act).__name__}"
    if mlp.training and (mlp.drop1.p or mlp.drop2.p):
        return "its MLP has dropout"
    return None


def _activation(act: nn.Module) -> str | None:
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(act))


def _hooks(module: nn.Module) -> Iterator[object]:
    for part in module.modules():
        yield from part._forward_hooks.values()
        yield from part._forward_pre_hooks.values()
        yield from part._backward_hooks.values()
        yield from part._backward_pre_hooks.values()


def owner(hook: object) -> object:
    """The module whose method a hook is, or the hook."""
    if isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", hook)


def _norm(norm: Any, change: LayerUpdate | None) -> gk.NormWeights:
    weight, bias = norm.weight, norm.bias
    if change is not None and weight is not None:
        bias = _shifted(bias, change, weight.dtype)
        weight = weight if change.scale is None else change.scale.to(weight.dtype) * weight
    return gk.NormWeights(weight, bias, norm.eps)


def _layer_scale(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _drop_path(part: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The factors that timm's drop_path would draw for x, in the same order."""
    if not isinstance(part, DropPath) or part.drop_prob == 0 or not part.training:
        return None
    keep = 1 - part.drop_prob
    factors = x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and part.scale_by_keep else factors
