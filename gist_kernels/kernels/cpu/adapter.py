"""LayerNorm and the adapter on CPU tensors: allocates outputs, hands over addresses.

Arguments are those of the public functions after their checks; what is checked again here is what
the native code's memory safety rests on.
"""

from __future__ import annotations

import torch

from gist_kernels.kernels.cpu import memory
from gist_kernels.kernels.cpu.activation import ACTIVATION_CODES
from gist_kernels.kernels.cpu.native import native as _native
from gist_kernels.weights import AdapterWeights, NormWeights

_DTYPE_CODES = {getattr(torch, name): code for name, code in _native.ADAPTER_DTYPES.items()}
_CPU = torch.device("cpu")  # not the default one
_NOTHING = 0
_NO_ROWS = (_NOTHING, 0)


def forward(
    x: torch.Tensor,
    add: torch.Tensor | None,
    norm: NormWeights | None,
    adapter: AdapterWeights | None,
    bias: torch.Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """LayerNorm and adapter of the same rows, each read once.

    Args:
        x: (M, D), contiguous in D; float32, bfloat16, float16 or float64.
        add: (M, D), x's dtype, contiguous in D, may be ``x``; or None for 0.
        norm: LayerNorm to apply, or None.
        adapter: adapter to apply to ``x``, not normalised, or None.
        bias: (D,) or None.
        matmul_dtype: that of ``normed``; None for x's.

    Returns:
        ``(normed, out, z, stats)``: ``normed`` (M, D), ``LayerNorm(x)``; ``out`` (M, D),
        ``add + scale * (act(z) Wu^T + bu) + bias``; ``z`` (M, r), ``x Wd^T + bd``; ``stats``
        (M, 2), each row's mean and 1 / standard deviation. Without norm ``normed`` and ``stats``
        are None, without adapter ``out`` and ``z``. ``z`` and ``stats`` are float32, or float64
        for float64 ``x``.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    accumulate = _accumulate(x)
    of_x = _rows("x", x, x)
    of_add = _NO_ROWS if add is None else of_x if add is x else _rows("add", add, x)
    rows, width = x.shape
    weight, norm_bias = _norm_weights(norm, width, accumulate)
    adapter_weights = _adapter_weights(adapter, width, accumulate)
    bias = _vector("bias", bias, (width,), accumulate)

    normed = stats = out = z = None
    norm_group = adapter_group = None
    if norm is not None:
        normed = memory.empty((rows, width), x.dtype)
        stats = torch.empty((rows, 2), dtype=accumulate, device=_CPU)
        addresses = _address(weight), _address(norm_bias), normed.data_ptr(), stats.data_ptr()
        norm_group = (norm.eps, *addresses)
    if adapter is not None:
        rank = len(adapter[0])
        out = memory.empty((rows, width), x.dtype)
        z = torch.empty((rows, rank), dtype=accumulate, device=_CPU)
        adapter_group = (
            *_settings(adapter),
            *[_address(t) for t in adapter_weights],
            out.data_ptr(),
            z.data_ptr(),
        )
    _native.adapter_forward(
        _DTYPE_CODES[x.dtype],
        (rows, width),
        of_x,
        of_add,
        _address(bias),
        norm_group,
        adapter_group,
        torch.get_num_threads(),
    )
    if normed is not None and matmul_dtype not in (None, x.dtype):
        normed = normed.to(matmul_dtype)
    return normed, out, z, stats


def backward(
    d_out: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    x: torch.Tensor,
    norm: NormWeights | None,
    stats: torch.Tensor | None,
    adapter: AdapterWeights | None,
    z: torch.Tensor | None,
    *,
    pass_through: bool,
    need_dx: bool = True,
) -> tuple[
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """Gradients of :func:`forward`'s ``normed`` and ``out``, each row read once.

    Args:
        d_out: (M, D), x's dtype, contiguous in D; or None, and then there are no gradients of
            the adapter and nothing to pass through.
        d_normed: the same, of ``normed``, in any dtype; or None, and then the norm has no part.
        x: as in forward.
        norm: as in forward; not read without ``d_normed``.
        stats: from forward, with ``d_normed``.
        adapter: as in forward; not read without ``d_out``.
        z: from forward, with ``adapter``.
        pass_through: ``add`` was ``x``, or is another path of the gradient: ``dx`` has ``d_out``.
        need_dx: False for the weights' gradients alone.

    Returns:
        ``(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias)``: ``dx`` (M, D) in x's dtype,
        None without need_dx; the rest in the shapes and dtypes of the weights, None without
        adapter or without that bias.

    Raises:
        ValueError: a shape, dtype or stride is not as above, or stats or z is missing.
    """
    accumulate = _accumulate(x)
    of_x = _rows("x", x, x)
    rows, width = x.shape
    if d_out is None:
        adapter, pass_through = None, False
    if d_normed is None:
        norm = None
    elif norm is None:
        raise ValueError("d_normed needs the norm it is the gradient of")
    of_d_out = _NO_ROWS if d_out is None else _rows("d_out", d_out, x)
    if d_normed is not None and d_normed.dtype is not x.dtype:
        d_normed = d_normed.to(x.dtype)
    of_d_normed = _NO_ROWS if d_normed is None else _rows("d_normed", d_normed, x)
    norm_group = adapter_group = None
    if norm is not None:
        norm_weight, _ = _norm_weights(norm, width, accumulate)
        stats = _kept("stats", stats, (rows, 2), accumulate)
        norm_group = (_address(norm_weight), stats.data_ptr(), of_d_normed)
    gradients: list[torch.Tensor | None] = [None] * 4
    if adapter is not None:
        z = _kept("z", z, (rows, len(adapter[0])), accumulate)
        down_weight, _, up_weight, _ = _adapter_weights(adapter, width, accumulate)
        addresses = _address(down_weight), _address(up_weight), z.data_ptr()
        adapter_group = (*_settings(adapter), *addresses)
        gradients = [
            None if weight is None else torch.empty(weight.shape, dtype=accumulate, device=_CPU)
            for weight in adapter[:4]
        ]

    dx = memory.empty((rows, width), x.dtype) if need_dx else None
    _native.adapter_backward(
        _DTYPE_CODES[x.dtype],
        (rows, width),
        of_x,
        of_d_out,
        pass_through,
        norm_group,
        adapter_group,
        tuple([_address(gradient) for gradient in gradients]),
        _address(dx),
        torch.get_num_threads(),
    )
    if adapter is not None:
        gradients = [
            gradient
            if gradient is None or weight is None or weight.dtype is accumulate
            else gradient.to(weight.dtype)
            for gradient, weight in zip(gradients, adapter[:4], strict=True)
        ]
    d_down_weight, d_down_bias, d_up_weight, d_up_bias = gradients
    return dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias


def _accumulate(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _address(tensor: torch.Tensor | None) -> int:
    return _NOTHING if tensor is None else tensor.data_ptr()


def _rows(name: str, tensor: torch.Tensor, x: torch.Tensor) -> tuple[int, int]:
    """Address and row stride."""
    shape = x.shape
    if tensor.shape != shape or len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"{name} must be (M, D), with the shape of x and D at least 1")
    if tensor.dtype is not x.dtype or x.dtype not in _DTYPE_CODES or not tensor.is_cpu:
        raise ValueError(f"{name} must be a floating-point tensor on the CPU, of x's dtype")
    stride, step = tensor.stride()
    if step != 1 and shape[0] and shape[1] != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous")
    return tensor.data_ptr(), stride


def _vector(
    name: str, weight: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor | None:
    """The weight as the kernels read it: in their arithmetic's dtype, contiguous."""
    if weight is None:
        return None
    if weight.shape != shape or not weight.is_cpu:
        raise ValueError(f"{name} must have shape {shape}, on the CPU")
    if weight.dtype is dtype and weight.is_contiguous():
        return weight
    return weight.to(dtype).contiguous()


def _norm_weights(
    norm: NormWeights | None, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if norm is None:
        return None, None
    return (
        _vector("the norm's weight", norm.weight, (width,), dtype),
        _vector("the norm's bias", norm.bias, (width,), dtype),
    )


def _adapter_weights(
    adapter: AdapterWeights | None, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    if adapter is None:
        return None, None, None, None
    rank = len(adapter[0])
    if rank < 1:
        raise ValueError("the adapter must have a rank of at least 1")
    return (
        _vector("down_weight", adapter.down_weight, (rank, width), dtype),
        _vector("down_bias", adapter.down_bias, (rank,), dtype),
        _vector("up_weight", adapter.up_weight, (width, rank), dtype),
        _vector("up_bias", adapter.up_bias, (width,), dtype),
    )


def _kept(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    if tensor is None or tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise ValueError(f"{name} must be what forward returned for this x")
    return tensor.contiguous()


def _settings(adapter: AdapterWeights) -> tuple[int, int, float]:
    """Rank, activation and scale."""
    return len(adapter[0]), ACTIVATION_CODES[adapter.activation], adapter.scale
