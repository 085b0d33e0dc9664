"""A pre-norm block as fused sublayers, of whatever library it is.

A family of backbones says what a block consists of, by :class:`BlockLayers`. It is computed by
``gist_kernels.adapter_attention`` and ``adapter_mlp``, with the adapter beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import gist_kernels as gk
from gist.fusion.layers import (
    BlockLayers,
    DropPath,
    Forwards,
    Linears,
    OwnAttention,
    Scores,
)
from gist.fusion.sharding import Sharding, class_of, is_shard
from gist.methods.base import AttachedMethod, FusedParts, LayerUpdate, Refusal
from gist.methods.hooks import is_owned
from gist.untouched import calls_own_forward, hooks_of, is_plain
from gist_kernels.functional.sublayers import PreparedAttention, PreparedMlp
from gist_kernels.quantised import is_quantised
from gist_kernels.quantised import refusal as quantised_refusal

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Sublayers(NamedTuple):
    """A block's sublayers, for calls that differ in their tokens only."""

    attention: PreparedAttention | None
    """None where the block's own always runs."""
    mlp: PreparedMlp


class Plan(NamedTuple):
    """How a block runs as fused sublayers."""

    sublayers: Callable[[], Sublayers]
    """Gives those of a call: methods may compute weights from their parameters."""
    drop_paths: tuple[DropPath | None, DropPath | None]
    norms_after: tuple[Any, Any] | None = None
    """The LayerNorms behind a post-norm block's sublayers."""
    own_attention: OwnAttention | None = None
    sharding: Sharding | None = None
    """What gathers the block's weights for a call."""


def plan(
    block: nn.Module,
    layers_of: Callable[[nn.Module], BlockLayers | Refusal],
    index: int,
    methods: Sequence[AttachedMethod],
    hook_owners: Collection[int],
    forwards: Forwards,
) -> Plan | Refusal:
    """How a block runs as fused sublayers, or why it runs by its own forward.

    Args:
        block: the block.
        layers_of: gives what it consists of, or why it can't be said.
        index: its number in the backbone.
        methods: the modules attached to the backbone.
        hook_owners: the ids of the modules, methods and token, whose hooks the fused sublayers
            replace. A hook of any other module runs only in the block's own forward.
        forwards: those of the classes that the block may consist of.
    """
    layers = layers_of(block)
    if isinstance(layers, Refusal):
        return layers
    sharding = Sharding.of(block)
    reason = (
        _modules_refusal(block, sharding, hook_owners, forwards)
        or _weights_refusal(block, layers, sharding)
    )  # fmt: skip
    if reason is not None:
        return Refusal(reason)
    parts = _joined(methods, index)
    if isinstance(parts, Refusal):
        return parts
    updated = set(parts.updates or ())
    if layers.post_norm and not updated.isdisjoint(("norm1", "norm2")):
        return Refusal("its method changes a norm that follows a sublayer")
    if layers.norms[0] is None and "norm1" in updated:
        return Refusal("its method changes a norm that it is without")
    norms_after = layers.norms if layers.post_norm else None
    if not _fits(parts, layers.qkv.weights[0]):
        return Refusal("its method's parameters are not plain tensors beside its weights")
    in_place = all(each.read_in_place for each in (layers.qkv, layers.fc1))
    if (
        in_place
        and sharding is None
        and not parts.updates
        and all(type(tensor) is nn.Parameter for tensor in _tensors(parts))
    ):
        sublayers = _sublayers(layers, parts, gathered=False)
        return Plan(lambda: sublayers, layers.drop_paths, norms_after, layers.own_attention)

    def computed() -> Sublayers:
        # A sharded block has other tensors once they are gathered.
        now, parts = layers if sharding is None else layers_of(block), _joined(methods, index)
        assert not isinstance(now, Refusal)
        assert not isinstance(parts, Refusal)
        return _sublayers(now, parts, gathered=sharding is not None)

    return Plan(computed, layers.drop_paths, norms_after, layers.own_attention, sharding)


def run(
    plan: Plan,
    x: torch.Tensor,
    *,
    num_queries: int | None,
    grad_tokens: tuple[int, int] | None,
    rotation: gk.Rotation | None,
    lengths: torch.Tensor | None = None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """Run a block as :func:`plan` says.

    Args:
        x: (B, N, D) tokens.
        num_queries: compute only the first tokens of the output; None for all.
        grad_tokens: compute x's gradient only for these tokens: start and count.
        rotation: the rotary positions of queries and keys.
        lengths: (B,), each row's number of tokens before its padding; None without padding.
        scores: for the block's own attention, in place of the fused one and its arguments.
    """
    forward = partial(
        _run, plan,
        num_queries=num_queries, grad_tokens=grad_tokens, rotation=rotation, lengths=lengths,
        scores=scores,
    )  # fmt: skip
    output: torch.Tensor = forward(x) if plan.sharding is None else plan.sharding.call(forward, x)
    return output


def _run(
    plan: Plan,
    x: torch.Tensor,
    *,
    num_queries: int | None,
    grad_tokens: tuple[int, int] | None,
    rotation: gk.Rotation | None,
    lengths: torch.Tensor | None,
    scores: Scores | None,
) -> torch.Tensor:
    sublayers, norms = plan.sublayers(), plan.norms_after
    of_attention, of_mlp = plan.drop_paths
    if scores is not None:
        assert plan.own_attention is not None
        x = plan.own_attention.run(x, scores, num_queries)
    else:
        assert sublayers.attention is not None
        x = sublayers.attention.run(
            x,
            num_queries=num_queries,
            drop_path=None if of_attention is None else of_attention(x),
            grad_tokens=grad_tokens,
            rotation=rotation,
            lengths=lengths,
        )
        if norms is not None:
            x = _normed(x, norms[0])
    x = sublayers.mlp.run(x, drop_path=None if of_mlp is None else of_mlp(x))
    return x if norms is None else _normed(x, norms[1])


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    weight, bias = (None if t is None else t.to(x.dtype) for t in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


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


def _sublayers(layers: BlockLayers, parts: FusedParts, gathered: bool) -> Sublayers:
    updates = parts.updates or {}
    dtype = layers.qkv.weights[0].dtype
    attention, own = None, layers.own_attention
    if own is None or not own.always:
        attention = _attention(layers, parts.attention, updates, dtype, gathered)
    fc1, fc1_update = _linear(layers.fc1, updates.get("fc1"), gathered)
    fc2, fc2_update = _linear(layers.fc2, updates.get("fc2"), gathered)
    norm = layers.norms[1]
    return Sublayers(
        attention,
        PreparedMlp(
            None if layers.post_norm else _norm(norm, updates.get("norm2"), dtype),
            gk.MlpWeights(
                *fc1,
                *fc2,
                layers.activation,
                layers.layer_scales[1],
                fc1_update,
                fc2_update,
                layers.gated,
                _inner_norm(layers.mlp_norm, dtype),
            ),
            parts.mlp,
        ),
    )


def _attention(
    layers: BlockLayers,
    adapter: gk.AdapterWeights | None,
    updates: Mapping[str, LayerUpdate],
    dtype: torch.dtype,
    gathered: bool,
) -> PreparedAttention:
    qkv, qkv_update = _linear(layers.qkv, updates.get("qkv"), gathered)
    proj, proj_update = _linear(layers.proj, updates.get("proj"), gathered)
    norm, scale = layers.norms[0], layers.layer_scales[0]
    bare = layers.post_norm or norm is None
    return PreparedAttention(
        None if bare else _norm(norm, updates.get("norm1"), dtype),
        gk.AttentionWeights(
            *qkv,
            *proj,
            layers.num_heads,
            layers.scale,
            scale,
            qkv_update,
            proj_update,
            norm=_inner_norm(layers.attention_norm, dtype),
        ),
        adapter,
    )


def _modules_refusal(
    block: nn.Module, sharding: Sharding | None, hook_owners: Collection[int], forwards: Forwards
) -> str | None:
    if sharding is not None and torch.compiler.is_compiling():
        return "it is sharded and traced"
    known = () if sharding is None else sharding.hooks
    part: nn.Module
    for part in block.modules():
        kind = class_of(part)
        if not calls_own_forward(part) or kind.forward is not forwards.get(kind, kind.forward):
            return f"its {kind.__name__} has a forward of its own"
        if not all(hook in known or is_owned(hook, hook_owners) for hook in hooks_of(part)):
            return "it carries hooks that are not gist's"
    return None


def _weights_refusal(
    block: nn.Module, layers: BlockLayers, sharding: Sharding | None
) -> str | None:
    frozen, like = layers.frozen, layers.qkv.weights[0]
    if any(weight.requires_grad for weight in frozen):
        return "it has trainable matrices of its own"
    for name, norm in layers.inner_norms.items():
        if any(p.requires_grad for p in norm.parameters()):
            return f"its {name}'s norm is trained"
    matrices = {id(weight) for weight in layers.matrices}
    for weight in block.parameters():
        if type(weight) is not nn.Parameter and not (sharding is not None and is_shard(weight)):
            if id(weight) not in matrices or not is_quantised(weight):
                return f"its weights are {type(weight).__name__}s"
            reason = quantised_refusal(weight)
            if reason is not None:
                return f"its {type(weight).__name__}s {reason}"
        if weight.device != like.device:
            return "its weights are on several devices"
        if weight.dtype not in _DTYPES:
            return f"its weights are {weight.dtype}"
    if any(weight.dtype is not like.dtype for weight in frozen):
        return "its matrices are of several dtypes"
    norms = *layers.norms, *layers.inner_norms.values()
    if any(norm is not None and norm.eps <= 0 for norm in norms):
        return "its norm has no positive eps"
    return None


def _tensors(parts: FusedParts) -> list[torch.Tensor]:
    groups = (parts.attention or (), parts.mlp or (), *(parts.updates or {}).values())
    return [value for group in groups for value in group if isinstance(value, torch.Tensor)]


def _fits(parts: FusedParts, like: torch.Tensor) -> bool:
    """Whether the methods' tensors are plain ones on a block's device."""
    return all(is_plain(t) and t.device == like.device for t in _tensors(parts))


def _linear(
    layer: Linears, update: LayerUpdate | None, gathered: bool
) -> tuple[tuple[Any, torch.Tensor | None], gk.LinearUpdate | None]:
    """A layer's weight and bias, and the trained update beside them."""
    weight = layer.matrix(gathered)
    if update is None:
        return (weight, layer.bias), None
    bias = _shifted(layer.bias, update, layer.weights[0].dtype)
    return (weight, bias), gk.LinearUpdate(update.scale, update.down, update.up)


def _norm(norm: Any, update: LayerUpdate | None, dtype: torch.dtype) -> gk.NormWeights:
    weight, bias = norm.weight, norm.bias
    if update is not None:
        bias = _shifted(bias, update, dtype)
        if update.scale is not None:
            scale = update.scale.to(dtype)
            weight = scale if weight is None else scale * weight
    return gk.NormWeights(weight, bias, norm.eps)


def _inner_norm(norm: Any, dtype: torch.dtype) -> gk.NormWeights | None:
    return None if norm is None else _norm(norm, None, dtype)


def _shifted(
    bias: torch.Tensor | None, update: LayerUpdate, dtype: torch.dtype
) -> torch.Tensor | None:
    """``scale * bias + shift``."""
    scale, shift = (None if t is None else t.to(dtype) for t in update[:2])
    if bias is None or scale is None:
        return bias if shift is None else shift if bias is None else bias + shift
    return scale * bias if shift is None else torch.addcmul(shift, scale, bias)
