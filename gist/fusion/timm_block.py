"""timm's Block as fused sublayers, where it matches them.

A Block is two pre-norm sublayers. ``gist_kernels.adapter_attention`` and ``adapter_mlp`` compute
them, with the adapter beside each. A block with anything else in it runs by its own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import nn

import gist_kernels as gk
from gist.methods.base import AttachedMethod, FusedParts, LayerUpdate, Refusal
from gist.methods.hooks import is_owned
from gist.untouched import calls_own_forward, hooks_of, is_plain, written_forward
from gist_kernels.functional.sublayers import PreparedAttention, PreparedMlp

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
# What the fused sublayers take the place of. A class's forward may be replaced.
_FORWARDS = {
    kind: written_forward(kind)
    for kind in (
        Block, Attention, Mlp, LayerNorm, LayerScale, DropPath, nn.LayerNorm, nn.Linear,
        nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU,
    )
}  # fmt: skip


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sublayers(NamedTuple):
    """A block's sublayers, for calls that differ in their tokens only."""

    attention: PreparedAttention
    mlp: PreparedMlp


class Plan(NamedTuple):
    """How a block runs as fused sublayers."""

    sublayers: Callable[[], Sublayers]
    """Gives those of a call: methods may compute weights from their parameters."""


def plan(
    block: Any, index: int, methods: Sequence[AttachedMethod], hook_owners: Collection[int]
) -> Plan | Refusal:
    """How a block runs as fused sublayers, or why it runs by its own forward.

    Args:
        block: the block.
        index: its number in the backbone.
        methods: the modules attached to the backbone.
        hook_owners: the ids of the modules, methods and token, whose hooks the fused sublayers
            replace. A hook of any other module runs only in the block's own forward.
    """
    reason = _block_refusal(block, hook_owners)
    if reason is not None:
        return Refusal(reason)
    parts = _joined(methods, index)
    if isinstance(parts, Refusal):
        return parts
    if not _fits(parts, block.attn.qkv.weight):
        return Refusal("its method's parameters are not plain tensors beside its weights")
    if all(type(tensor) is nn.Parameter for tensor in _tensors(parts)) and not parts.updates:
        sublayers = _sublayers(block, parts)
        return Plan(lambda: sublayers)

    def computed() -> Sublayers:
        parts = _joined(methods, index)
        assert not isinstance(parts, Refusal)
        return _sublayers(block, parts)

    return Plan(computed)


def _joined(methods: Sequence[AttachedMethod], index: int) -> FusedParts | Refusal:
    """All methods' parts in a block."""
    attention: gk.AdapterWeights | None = None
    mlp: gk.AdapterWeights | None = None
    updates: dict[str, LayerUpdate] = {}
    for method in methods:
        parts = method.fused(index)
        if isinstance(parts, Refusal):
            return parts
        if (attention and parts.attention) or (mlp and parts.mlp):
            return Refusal("it has two adapters beside one sublayer")
        changed = parts.updates or {}
        if updates.keys() & changed.keys():
            return Refusal("two methods change one of its layers")
        attention, mlp = attention or parts.attention, mlp or parts.mlp
        updates |= changed
    return FusedParts(attention, mlp, updates)


def _sublayers(block: Any, parts: FusedParts) -> Sublayers:
    attn, mlp, updates = block.attn, block.mlp, parts.updates or {}
    dtype = attn.qkv.weight.dtype
    qkv, qkv_update = _linear(attn.qkv, updates.get("qkv"))
    proj, proj_update = _linear(attn.proj, updates.get("proj"))
    fc1, fc1_update = _linear(mlp.fc1, updates.get("fc1"))
    fc2, fc2_update = _linear(mlp.fc2, updates.get("fc2"))
    activation = _activation(mlp.act)
    assert activation is not None
    attention = gk.AttentionWeights(
        *qkv,
        *proj,
        attn.num_heads,
        # timm's own call of PyTorch's attention leaves it the default.
        None if attn.fused_attn else attn.scale,
        _layer_scale(block.ls1),
        qkv_update,
        proj_update,
    )
    return Sublayers(
        PreparedAttention(
            _norm(block.norm1, updates.get("norm1"), dtype), attention, parts.attention
        ),
        PreparedMlp(
            _norm(block.norm2, updates.get("norm2"), dtype),
            gk.MlpWeights(
                *fc1,
                *fc2,
                activation,
                _layer_scale(block.ls2),
                fc1_update=fc1_update,
                fc2_update=fc2_update,
            ),
            parts.mlp,
        ),
    )


def run(
    block: Any,
    plan: Plan,
    x: torch.Tensor,
    *,
    num_queries: int | None,
    grad_tokens: tuple[int, int] | None,
) -> torch.Tensor:
    """Run a timm Block as :func:`plan` says.

    Args:
        x: (B, N, D) tokens.
        num_queries: compute only the first tokens of the output; None for all.
        grad_tokens: compute x's gradient only for these tokens: start and count.
    """
    sublayers = plan.sublayers()
    x = sublayers.attention.run(
        x,
        num_queries=num_queries,
        drop_path=_drop_path(block.drop_path1, x),
        grad_tokens=grad_tokens,
    )
    return sublayers.mlp.run(x, drop_path=_drop_path(block.drop_path2, x))


def _block_refusal(block: Any, hook_owners: Collection[int]) -> str | None:
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
    for part in block.modules():
        kind = type(part)
        if not calls_own_forward(part) or kind.forward is not _FORWARDS.get(kind, kind.forward):
            return f"its {kind.__name__} has a forward of its own"
        if not all(is_owned(hook, hook_owners) for hook in hooks_of(part)):
            return "it carries hooks that are not gist's"
    if any(weight.requires_grad for weight in _frozen(block)):
        return "it has trainable matrices of its own"
    return _weights_refusal(block)


def _weights_refusal(block: Any) -> str | None:
    like = block.attn.qkv.weight
    for weight in block.parameters():
        if type(weight) is not nn.Parameter:
            return f"its weights are {type(weight).__name__}s"
        if weight.device != like.device:
            return "its weights are on several devices"
        if weight.dtype not in _DTYPES:
            return f"its weights are {weight.dtype}"
    if any(weight.dtype is not like.dtype for weight in _frozen(block)):
        return "its matrices are of several dtypes"
    if block.norm1.eps <= 0 or block.norm2.eps <= 0:
        return "its norm has no positive eps"
    return None


def _tensors(parts: FusedParts) -> list[torch.Tensor]:
    groups = (parts.attention or (), parts.mlp or (), *(parts.updates or {}).values())
    return [value for group in groups for value in group if isinstance(value, torch.Tensor)]


def _fits(parts: FusedParts, like: torch.Tensor) -> bool:
    """Whether the methods' tensors are plain ones on a block's device."""
    return all(is_plain(t) and t.device == like.device for t in _tensors(parts))


def _frozen(block: Any) -> Iterator[torch.Tensor]:
    """The weights for which the fused sublayers compute no gradient."""
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        yield layer.weight
    for scale in (block.ls1, block.ls2):
        if isinstance(scale, LayerScale):
            yield scale.gamma


def _linear(
    layer: nn.Linear, update: LayerUpdate | None
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], gk.LinearUpdate | None]:
    """A layer's weight and bias, and the trained update beside them."""
    if update is None:
        return (layer.weight, layer.bias), None
    bias = _shifted(layer.bias, update, layer.weight.dtype)
    return (layer.weight, bias), gk.LinearUpdate(update.scale, update.down, update.up)


def _shifted(
    bias: torch.Tensor | None, update: LayerUpdate, dtype: torch.dtype
) -> torch.Tensor | None:
    """``scale * bias + shift``."""
    scale, shift = (None if t is None else t.to(dtype) for t in update[:2])
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
    if attn.qkv.out_features != 3 * attn.num_heads * attn.head_dim:
        return "its attention's heads don't make up its projection"
    if not math.isfinite(attn.scale):
        return "its attention's scale is not finite"
    return _dropout_refusal("attention", attn, attn.attn_drop, attn.proj_drop)


def _mlp_refusal(mlp: Any) -> str | None:
    if type(mlp) is not Mlp:
        return f"its MLP is a {type(mlp).__name__}"
    if not type(mlp.fc1) is type(mlp.fc2) is nn.Linear:
        return "its MLP's layers are not plain linears"
    if type(mlp.norm) is not nn.Identity:
        return "its MLP is normalised within"
    if _activation(mlp.act) is None:
        return f"its MLP's activation is a {type(mlp.act).__name__}"
    return _dropout_refusal("MLP", mlp, mlp.drop1, mlp.drop2)


def _dropout_refusal(name: str, owner: nn.Module, *parts: Any) -> str | None:
    for part in parts:
        if type(part) not in (nn.Dropout, nn.Identity):
            return f"its {name}'s dropout is a {type(part).__name__}"
        # Attention asks its own training flag for the dropout of its probabilities.
        if getattr(part, "p", 0) and (part.training or owner.training):
            return f"its {name} has dropout"
    return None


def _activation(act: nn.Module) -> str | None:
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(act))


def _norm(norm: Any, update: LayerUpdate | None, dtype: torch.dtype) -> gk.NormWeights:
    weight, bias = norm.weight, norm.bias
    if update is not None:
        bias = _shifted(bias, update, dtype)
        if update.scale is not None:
            scale = update.scale.to(dtype)
            weight = scale if weight is None else scale * weight
    return gk.NormWeights(weight, bias, norm.eps)


def _layer_scale(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _drop_path(part: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The factors that timm's drop_path would draw for x, in timm's order."""
    if not isinstance(part, DropPath) or part.drop_prob == 0 or not part.training:
        return None
    keep = 1 - part.drop_prob
    factors = x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and part.scale_by_keep else factors
