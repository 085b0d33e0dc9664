"""The sublayers as operators, see :mod:`gist_kernels.autograd.operators`.

A frozen matrix arrives in the dtype of the matmuls: the tracer sees its conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gist_kernels.autograd import equations, shapes
from gist_kernels.autograd.attention import (
    ROTATION_OPTIONS,
    ROTATION_TABLES,
    flat_rotation,
    rotation_of,
)
from gist_kernels.autograd.equations import AttentionSaved, MlpSaved, Needs, PrefixSaved
from gist_kernels.autograd.linear import FrozenLinear, LinearParts, matmul_dtype
from gist_kernels.autograd.operators import Operation
from gist_kernels.autograd.trained import AdapterParts, NormParts, Sublayer, Trained
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.weights import AdapterWeights, AttentionWeights, MlpWeights, NormWeights


def adapter_attention(
    backend: str,
    x: torch.Tensor,
    norm: NormWeights | None,
    weights: AttentionWeights,
    adapter: AdapterWeights | None,
    num_queries: int | None,
    drop_path: torch.Tensor | None,
    grad_tokens: tuple[int, int] | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_attention`."""
    qkv, proj = (weights[:2], weights.qkv_update), (weights[2:4], weights.proj_update)
    tensors, numbers = _flat(x, norm, qkv, proj, weights.layer_scale, drop_path, adapter)
    sin, cos, *rotation = flat_rotation(weights.rotation)
    scale = None if weights.scale is None else float(weights.scale)
    arguments = *tensors, sin, cos, lengths, *numbers, weights.num_heads, scale, *rotation
    if num_queries is None or num_queries >= x.shape[1]:
        operator = _OPERATORS[backend, "adapter_attention"]
        result = operator(*arguments, grad_tokens)
    else:
        operator = _OPERATORS[backend, "adapter_attention_of_few"]
        result = operator(*arguments, num_queries)
    out: torch.Tensor = result[0]
    return out


def adapter_mlp(
    backend: str,
    x: torch.Tensor,
    norm: NormWeights | None,
    weights: MlpWeights,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_mlp`."""
    fc1, fc2 = (weights[:2], weights.fc1_update), (weights[2:4], weights.fc2_update)
    tensors, numbers = _flat(x, norm, fc1, fc2, weights.layer_scale, drop_path, adapter)
    weight, bias, eps = weights.norm or (None, None, None)
    options = weights.activation, weights.gated, None if eps is None else float(eps)
    operator = _OPERATORS[backend, "adapter_mlp"]
    out: torch.Tensor = operator(*tensors, weight, bias, *numbers, *options)[0]
    return out


def register(backend: str, load: Callable[[], SublayerKernels]) -> None:
    """Define a backend's operators."""
    for operation in _OPERATIONS:
        operator = operation.register(backend, load, shapes.of_sublayers(load))
        _OPERATORS[backend, operation.name] = operator


_OPERATORS: dict[tuple[str, str], Any] = {}

# ---- flat arguments: x, what may be trained in Trained's order, what is frozen, numbers


def _flat(
    x: torch.Tensor,
    norm: NormWeights | None,
    first: Any,
    last: Any,
    layer_scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    adapter: AdapterWeights | None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors, and the numbers."""
    dtype = matmul_dtype(x)
    of_adapter = (None, None, None, None) if adapter is None else adapter[:4]
    scale, activation = (1.0, "identity") if adapter is None else adapter[4:]
    parts, matrices = [], []
    for (weight, bias), update in (first, last):
        parts += [bias, *((None, None, None) if update is None else update)]
        matrices.append(weight.detach().to(dtype))
    frozen = *matrices, layer_scale, drop_path
    *of_norm, eps = (None, None, None) if norm is None else norm
    numbers = None if eps is None else float(eps), float(scale), activation
    return (x, *of_adapter, *of_norm, *parts, *frozen), numbers


def _attention_of(kernels: SublayerKernels, tensors: Any, options: Any) -> Any:
    """Sublayer, x, and num_queries or grad_tokens."""
    *tensors, sin, cos, lengths = tensors
    first, last, layer_scale, _ = tensors[-4:]
    *options, num_heads, scale, start, half, own = options
    rotation = rotation_of((sin, cos), (start, half))
    weights = AttentionWeights(
        first, None, last, None, num_heads, scale, layer_scale, rotation=rotation
    )
    return *_sublayer(kernels, weights, tensors, options, lengths), own


def _mlp_of(kernels: SublayerKernels, tensors: Any, options: Any) -> Any:
    """Sublayer and x."""
    *tensors, norm_weight, norm_bias = tensors
    first, last, layer_scale, _ = tensors[-4:]
    *options, activation, gated, eps = options
    norm = None if eps is None else NormWeights(norm_weight, norm_bias, eps)
    weights = MlpWeights(first, None, last, None, activation, layer_scale, gated=gated, norm=norm)
    return _sublayer(kernels, weights, tensors, options)


def _sublayer(
    kernels: SublayerKernels, weights: Any, tensors: Any, options: Any, lengths: Any = None
) -> Any:
    x, *flat = tensors[:-4]
    first, last, _, drop_path = tensors[-4:]
    eps, scale, activation = options
    trained = Trained.from_flat(flat)
    adapter = None
    if trained.adapter.down_weight is not None:
        adapter = AdapterWeights(*trained.adapter, scale, activation)
    sublayer = Sublayer(
        kernels,
        None if eps is None else NormWeights(*trained.norm, eps),
        weights,
        FrozenLinear.of(kernels.linear, first, trained.first),
        FrozenLinear.of(kernels.linear, last, trained.last),
        adapter,
        drop_path,
        lengths,
    )
    return sublayer, x


def _needs(needs: Sequence[bool]) -> Needs:
    return Needs(needs[0], Trained.from_flat(needs[1:]))


# ---- the operators


def _all_forward(kernels: Any, tensors: Any, options: Any) -> Any:
    sublayer, x, tokens = _attention_of(kernels, tensors, options)
    return equations.all_attention_forward(sublayer, x, tokens, False)[:2]


def _all_backward(
    kernels: Any, tensors: Any, options: Any, saved: Any, needs: Any, d_out: torch.Tensor
) -> Any:
    sublayer, x, tokens = _attention_of(kernels, tensors, options)
    d_x, grads = equations.all_attention_backward(
        sublayer, x, tokens, AttentionSaved._make(saved), None, _needs(needs), d_out
    )
    return d_x, *grads.flat()


def _few_forward(kernels: Any, tensors: Any, options: Any) -> Any:
    sublayer, x, count = _attention_of(kernels, tensors, options)
    return equations.few_attention_forward(sublayer, x, count, False)[:2]


def _few_backward(
    kernels: Any, tensors: Any, options: Any, saved: Any, needs: Any, d_out: torch.Tensor
) -> Any:
    sublayer, x, count = _attention_of(kernels, tensors, options)
    d_x, grads = equations.few_attention_backward(
        sublayer, x, count, PrefixSaved._make(saved), None, _needs(needs), d_out
    )
    return d_x, *grads.flat()


def _mlp_forward(kernels: Any, tensors: Any, options: Any) -> Any:
    return equations.mlp_forward(*_mlp_of(kernels, tensors, options))


def _mlp_backward(
    kernels: Any, tensors: Any, options: Any, saved: Any, needs: Any, d_out: torch.Tensor
) -> Any:
    sublayer, x = _mlp_of(kernels, tensors, options)
    d_x, grads = equations.mlp_backward(sublayer, x, MlpSaved._make(saved), _needs(needs), d_out)
    return d_x, *grads.flat()


def _operation(
    name: str,
    layers: tuple[str, str],
    tables: tuple[str, ...],
    options: tuple[str, ...],
    saved: tuple[str, ...],
    forward: Any,
    backward: Any,
) -> Operation:
    beside = [f"{layer}_{part}" for layer in layers for part in LinearParts._fields]
    return Operation(
        name,
        trained=(
            "Tensor x",
            *(f"Tensor? adapter_{part}" for part in AdapterParts._fields),
            *(f"Tensor? norm_{part}" for part in NormParts._fields),
            *(f"Tensor? {part}" for part in beside),
        ),
        frozen=(
            *(f"Tensor {layer}_weight" for layer in layers),
            *("Tensor? layer_scale", "Tensor? drop_path", *tables),
        ),
        options=("float? norm_eps", "float adapter_scale", "str adapter_activation", *options),
        saved=saved,
        forward=forward,
        backward=backward,
    )


_QKV_PROJ = ("qkv", "proj"), (*ROTATION_TABLES, "Tensor? lengths")
_HEADS = "int num_heads", "float? scale", *ROTATION_OPTIONS
_INNER_NORM = "Tensor? inner_norm_weight", "Tensor? inner_norm_bias"
_OPERATIONS = (
    _operation(
        "adapter_attention", *_QKV_PROJ, (*_HEADS, "SymInt[]? grad_tokens"),
        AttentionSaved._fields, _all_forward, _all_backward,
    ),
    _operation(
        "adapter_attention_of_few", *_QKV_PROJ, (*_HEADS, "SymInt num_queries"),
        PrefixSaved._fields, _few_forward, _few_backward,
    ),
    _operation(
        "adapter_mlp", ("fc1", "fc2"), _INNER_NORM,
        ("str activation", "bool gated", "float? inner_norm_eps"),
        MlpSaved._fields, _mlp_forward, _mlp_backward,
    ),
)  # fmt: skip
