"""A transformer block's sublayers with an adapter beside each."""

from __future__ import annotations

from typing import Any

import torch

from gist_kernels import autograd, check
from gist_kernels.activations import ACTIVATIONS
from gist_kernels.autograd import sublayer_operators
from gist_kernels.autograd.attention import served
from gist_kernels.autograd.linear import matmul_dtype
from gist_kernels.autograd.tensors import negated
from gist_kernels.backend import BACKENDS, select, serving
from gist_kernels.check import unknown_name
from gist_kernels.functional.attention import check_lengths, check_rotation
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.quantised import QuantisedWeight, is_quantised
from gist_kernels.tracing import needs_dispatcher, takes_operators
from gist_kernels.weights import (
    AdapterWeights,
    AttentionWeights,
    LinearUpdate,
    MlpWeights,
    NormWeights,
    Rotation,
)

for _backend in BACKENDS:
    if _backend.sublayers is not None:
        sublayer_operators.register(_backend.name, _backend.sublayers)


def adapter_attention(
    x: torch.Tensor,
    norm: NormWeights | None,
    attention: AttentionWeights,
    adapter: AdapterWeights | None = None,
    *,
    num_queries: int | None = None,
    drop_path: torch.Tensor | None = None,
    grad_tokens: tuple[int, int] | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """An attention sublayer with an adapter beside it, one autograd node::

        x + drop_path * (layer_scale * attention(norm(x))) + adapter(x)

    GIST places the adapter so (arXiv:2312.07255). The result is differentiable in x and in the
    tensors of adapter, norm, biases and updates; matrices, layer scale, rotation and
    ``attention.norm`` are frozen.

    A post-norm block (BERT, arXiv:1810.04805) has its norm after the sum. There ``norm`` is None,
    and the caller norms the result: ``F.layer_norm(adapter_attention(x, None, ...), ...)``.

    Args:
        x: (B, N, D), floating point.
        norm: the LayerNorm, tensors of any floating dtype; or None for x itself.
        attention: the attention; matrices and layer scale of x's dtype, biases, updates and
            rotation of any floating one.
        adapter: the bottleneck, tensors of any floating dtype, or None.
        num_queries: compute the result for this many first tokens only; all tokens are keys and
            values. Default: for all.
        drop_path: (B, 1, 1) factors on the sublayer's update, as stochastic depth draws them.
        grad_tokens: ``(start, count)``: compute the gradient of x for these tokens only; it is
            zero elsewhere. For a first block, in front of which one token is trained.
        lengths: (B,), as :func:`prefix_attention` takes them: tokens after a row's length are
            padding, whose attention is 0, so that it has the projection's bias, the residual and
            the adapter. It must be finite: the adapter's gradients sum over all tokens.

    Returns:
        (B, N, D), or (B, num_queries, D), in x's dtype.

    Raises:
        TypeError: a wrong type or dtype, or a quantised matrix.
        ValueError: shapes or devices don't match, a value is out of its range, or a frozen tensor
            requires a gradient.
    """
    _check_block_input(x, norm, adapter, drop_path)
    _check_kind("attention", attention, AttentionWeights)
    width, heads = x.shape[2], attention.num_heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"attention.num_heads must be an integer of at least 1; it is {heads!r}")
    inner = attention.qkv_weight.shape[0] // 3
    if inner < 1 or inner % heads:
        raise ValueError(
            "attention.qkv_weight must have 3 * num_heads * head_dim rows; it has shape "
            f"{tuple(attention.qkv_weight.shape)} and num_heads is {heads}"
        )
    if attention.scale is not None:
        check.finite("attention.scale", attention.scale)
    if lengths is not None:
        check_lengths(lengths, "x", x)
    if attention.rotation is not None:
        check_rotation("attention.rotation", attention.rotation, "x", x, heads, inner // heads)
    _check_weights("attention", attention, x, {
        "qkv_weight": (3 * inner, width), "qkv_bias": (3 * inner,),
        "proj_weight": (width, inner), "proj_bias": (width,), "layer_scale": (width,),
    })  # fmt: skip
    _check_inner_norm("attention.norm", attention.norm, x, inner)
    _check_update("attention.qkv_update", attention.qkv_update, x, width, 3 * inner)
    _check_update("attention.proj_update", attention.proj_update, x, inner, width)
    check.token_count("num_queries", num_queries, x.shape[1])
    if grad_tokens is not None:
        if not isinstance(grad_tokens, tuple) or len(grad_tokens) != 2:
            raise TypeError(f"grad_tokens must be (start, count); it is {grad_tokens!r}")
        start, count = grad_tokens
        if not (start >= 0 and count >= 1 and start + count <= x.shape[1]):
            raise ValueError(
                f"grad_tokens must be (start, count) within x's {x.shape[1]} tokens; "
                f"it is {grad_tokens}"
            )
    return PreparedAttention(norm, attention, adapter).run(
        x, num_queries=num_queries, drop_path=drop_path, grad_tokens=grad_tokens, lengths=lengths
    )


def adapter_mlp(
    x: torch.Tensor,
    norm: NormWeights | None,
    mlp: MlpWeights,
    adapter: AdapterWeights | None = None,
    *,
    drop_path: torch.Tensor | None = None,
) -> torch.Tensor:
    """An MLP sublayer with an adapter beside it, one autograd node::

        x + drop_path * (layer_scale * fc2(act(fc1(norm(x))))) + adapter(x)

    If ``mlp.gated``, ``act(gate) * value`` takes the place of ``act``: fc1 computes both, the gate
    first. With ``mlp.norm``, fc2 reads the norm of that; the norm is frozen. Arguments, result and
    errors are those of :func:`adapter_attention`.
    """
    _check_block_input(x, norm, adapter, drop_path)
    _check_kind("mlp", mlp, MlpWeights)
    if mlp.activation not in ACTIVATIONS:
        raise ValueError(unknown_name("mlp.activation", mlp.activation, ACTIVATIONS))
    if not isinstance(mlp.gated, bool):
        raise TypeError(f"mlp.gated must be True or False; it is {mlp.gated!r}")
    width, inner = x.shape[2], mlp.fc1_weight.shape[0]
    if mlp.gated and inner % 2:
        raise ValueError(
            "mlp.fc1_weight of a gated MLP must have as many rows for the gate as for the value; "
            f"it has shape {tuple(mlp.fc1_weight.shape)}"
        )
    hidden = inner // 2 if mlp.gated else inner
    _check_weights("mlp", mlp, x, {
        "fc1_weight": (inner, width), "fc1_bias": (inner,),
        "fc2_weight": (width, hidden), "fc2_bias": (width,), "layer_scale": (width,),
    })  # fmt: skip
    _check_inner_norm("mlp.norm", mlp.norm, x, hidden)
    _check_update("mlp.fc1_update", mlp.fc1_update, x, width, inner)
    _check_update("mlp.fc2_update", mlp.fc2_update, x, hidden, width)
    return PreparedMlp(norm, mlp, adapter).run(x, drop_path=drop_path)


class _Prepared:
    """A sublayer's weights, for calls that differ in x only.

    ``run`` checks x's dtype and device and nothing else, which is for who makes it. What it makes
    of weights that are read where they lie is kept.
    """

    def __init__(
        self, norm: NormWeights | None, weights: Any, adapter: AdapterWeights | None
    ) -> None:
        self.weights = norm, weights, adapter
        self._kept: autograd.Sublayer | None = None

    def check_input(self, x: torch.Tensor) -> None:
        like = self.weights[1][2]  # the first may be joined in another dtype
        if isinstance(like, QuantisedWeight):  # whose matmuls are of x's dtype
            if x.device != like.device:
                raise ValueError(f"x is on {x.device} and the frozen weight on {like.device}")
            return
        if x.dtype is not like.dtype or x.device != like.device:
            check.alike("x", x, "the frozen weight", like)

    def sublayer(self, kernels: SublayerKernels, dtype: torch.dtype) -> autograd.Sublayer | None:
        """For matmuls in ``dtype``; None where kernels can't read the weights."""
        kept = self._kept
        if kept is None or kept.kernels is not kernels or kept.first.weight.dtype is not dtype:
            if negated(*self.weights):
                return None
            kept = autograd.sublayer_of(kernels, dtype, *self.weights)
            if kept.reads_in_place:
                self._kept = kept
        return kept


class PreparedAttention(_Prepared):
    """:func:`adapter_attention` of given weights."""

    def run(
        self,
        x: torch.Tensor,
        *,
        num_queries: int | None,
        drop_path: torch.Tensor | None,
        grad_tokens: tuple[int, int] | None,
        rotation: Rotation | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``rotation``, unchecked, takes the place of the weights' own."""
        self.check_input(x)
        if grad_tokens is not None and num_queries is not None and num_queries < x.shape[1]:
            # For few queries, kernels compute the gradient of all tokens.
            from gist_kernels.reference.sublayers import constant_outside

            x, grad_tokens = constant_outside(x, *grad_tokens), None
        kernels = select("sublayers", x)
        arguments = x, *self._weights(rotation), num_queries, drop_path, grad_tokens, lengths
        if needs_dispatcher(x, lengths):
            attention = self.weights[1]
            heads, inner = attention.num_heads, attention.qkv_weight.shape[0] // 3
            if (
                kernels is not None
                and attention.norm is None  # which no operator takes
                and takes_operators(*arguments)
                and served(kernels.attention, x, matmul_dtype(x), heads, inner)
            ):
                backend = serving("sublayers", x.device.type, x.dtype)
                return sublayer_operators.adapter_attention(backend, *arguments)
        elif kernels is not None and not negated(x, drop_path, lengths):
            sublayer = self.sublayer(kernels, matmul_dtype(x))
            if sublayer is not None:
                return autograd.adapter_attention(
                    sublayer, x, num_queries, drop_path, grad_tokens, rotation, lengths
                )
        from gist_kernels import reference

        return reference.adapter_attention(*arguments)

    def _weights(self, rotation: Rotation | None) -> tuple[Any, ...]:
        if rotation is None:
            return self.weights
        norm, attention, adapter = self.weights
        return norm, attention._replace(rotation=rotation), adapter


class PreparedMlp(_Prepared):
    """:func:`adapter_mlp` of given weights."""

    def run(self, x: torch.Tensor, *, drop_path: torch.Tensor | None) -> torch.Tensor:
        self.check_input(x)
        kernels = select("sublayers", x)
        arguments = x, *self.weights, drop_path
        if needs_dispatcher(x):
            if kernels is not None and takes_operators(*arguments):
                backend = serving("sublayers", x.device.type, x.dtype)
                return sublayer_operators.adapter_mlp(backend, *arguments)
        elif kernels is not None and not negated(x, drop_path):
            sublayer = self.sublayer(kernels, matmul_dtype(x))
            if sublayer is not None:
                return autograd.adapter_mlp(sublayer, x, drop_path)
        from gist_kernels import reference

        return reference.adapter_mlp(*arguments)


def _check_block_input(
    x: torch.Tensor,
    norm: NormWeights | None,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> None:
    check.floating("x", x)
    check.shape("x", x, (None, None, None), "(B, N, D)")
    width = x.shape[2]
    if width < 1:
        raise ValueError(f"x must have at least one feature; it has shape {tuple(x.shape)}")
    if norm is not None:
        _check_kind("norm", norm, NormWeights)
        check.positive("norm.eps", norm.eps)
        _check_weights("norm", norm, x, {"weight": (width,), "bias": (width,)})
    if drop_path is not None:
        check.shape("drop_path", drop_path, (x.shape[0], 1, 1), "(B, 1, 1)")
        check.alike("drop_path", drop_path, "x", x)
    if adapter is None:
        return
    _check_kind("adapter", adapter, AdapterWeights)
    check.shape("adapter.down_weight", adapter.down_weight, (None, width), "(rank, D)")
    rank = adapter.down_weight.shape[0]
    if rank < 1:
        raise ValueError("adapter.down_weight must have a rank of at least 1")
    shapes = {"down_bias": (rank,), "up_weight": (width, rank), "up_bias": (width,)}
    for name, shape in shapes.items():
        tensor = getattr(adapter, name)
        if tensor is not None:
            check.shape(f"adapter.{name}", tensor, shape, "that fits down_weight and x")
            check.alike(f"adapter.{name}", tensor, "x", x, any_float=True)
    check.alike("adapter.down_weight", adapter.down_weight, "x", x, any_float=True)
    check.finite("adapter.scale", adapter.scale)
    if adapter.activation not in ACTIVATIONS:
        raise ValueError(unknown_name("adapter.activation", adapter.activation, ACTIVATIONS))


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a gist_kernels.{kind.__name__}, not {type(value).__name__}"
        )


def _check_weights(
    group: str,
    weights: NormWeights | AttentionWeights | MlpWeights,
    x: torch.Tensor,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        check.shape(f"{group}.{name}", tensor, shape, "that fits x and the other weights")
        frozen = name == "layer_scale" or len(shape) > 1
        if is_quantised(tensor):
            raise TypeError(
                f"{group}.{name} is a quantised {type(tensor).__name__}; pass a plain tensor. "
                "Only gist.wrap's models take quantised weights in fused sublayers"
            )
        check.alike(f"{group}.{name}", tensor, "x", x, any_float=not frozen)
        if frozen:
            _check_frozen(f"{group}.{name}", tensor)


def _check_inner_norm(name: str, norm: object, x: torch.Tensor, width: int) -> None:
    """Check a frozen norm within a sublayer, or None."""
    if norm is None:
        return
    _check_kind(name, norm, NormWeights)
    assert isinstance(norm, NormWeights)
    check.positive(f"{name}.eps", norm.eps)
    _check_weights(name, norm, x, {"weight": (width,), "bias": (width,)})
    for part in ("weight", "bias"):
        _check_frozen(f"{name}.{part}", getattr(norm, part))


def _check_frozen(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but is frozen here; pass it detached, "
            "or compose the sublayer from PyTorch's operators"
        )


def _check_update(
    name: str, update: LinearUpdate | None, x: torch.Tensor, inputs: int, outputs: int
) -> None:
    if update is None:
        return
    _check_kind(name, update, LinearUpdate)
    if (update.down is None) != (update.up is None):
        raise ValueError(f"{name} must have both down and up, or neither")
    shapes: dict[str, tuple[int | None, ...]] = {"scale": (outputs,)}
    if update.down is not None:
        check.shape(f"{name}.down", update.down, (None, inputs), "(rank, in)")
        shapes["up"] = (outputs, update.down.shape[0])
        check.alike(f"{name}.down", update.down, "x", x, any_float=True)
    for key, shape in shapes.items():
        tensor = getattr(update, key)
        if tensor is not None:
            check.shape(f"{name}.{key}", tensor, shape, "that fits the layer")
            check.alike(f"{name}.{key}", tensor, "x", x, any_float=True)
