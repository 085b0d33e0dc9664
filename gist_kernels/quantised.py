"""Frozen weights that torchao has quantised, as the matmuls of a sublayer read them.

Forward is each tensor's own ``F.linear``. The autograd node of that call may keep a dequantised
copy of the weight for backward, as int8's does. A sublayer keeps the quantised tensor only, and
dequantises it once more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

_NF4_MODULE = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
# Where torchao's tensors say what happens to a layer's input before the matmul. None is nothing:
# the layer is then linear in its input.
_OF_INPUT = (
    "act_quant_kwargs", "activation_quantization", "act_pre_scale", "activation_dtype",
)  # fmt: skip


def is_quantised(tensor: object) -> bool:
    """Whether torchao has quantised a tensor. Imports nothing: who has one has torchao."""
    return isinstance(tensor, _kind("torchao.utils", "TorchAOBaseTensor")) or _is_nf4(tensor)


def refusal(weight: torch.Tensor) -> str | None:
    """Why a quantised tensor can't be part of a :class:`QuantisedWeight`, in words that follow its
    type's name; or None."""
    if any(getattr(weight, name, None) is not None for name in _OF_INPUT):
        return "quantise or scale their layer's input too"
    if weight.ndim != 2 or not (_is_nf4(weight) or _dequantises(weight)):
        return "can't be dequantised"
    return None


class QuantisedWeight:
    """The (O, I) weight of a linear layer, or of several with one input, whose outputs are joined.

    It stands in a sublayer's group of weights where a matrix does. Each matmul dequantises for
    itself, and drops what it made.

    Args:
        tensors: (O_i, I), frozen, of one dtype and device, at least one; plain ones too.
        dtype: of the matmuls; None for the tensors' own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> None:
        self.dtype = tensors[0].dtype if dtype is None else dtype
        self._rows = tuple(_Rows(tensor, 0, tensor.shape[0]) for tensor in tensors)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(rows.count for rows in self._rows), self._rows[0].tensor.shape[1]

    @property
    def device(self) -> torch.device:
        return self._rows[0].tensor.device

    @property
    def memory(self) -> list[torch.Tensor]:
        """The tensors that hold the numbers."""
        return [part for rows in self._rows for part in parts_of(rows.tensor).values()]

    def in_dtype(self, dtype: torch.dtype) -> QuantisedWeight:
        """For matmuls in another dtype."""
        return self if dtype is self.dtype else self._with(dtype, self._rows)

    def __getitem__(self, chosen: slice) -> QuantisedWeight:
        """The weight of some outputs."""
        start, stop, _ = chosen.indices(self.shape[0])
        found, first = [], 0
        for rows in self._rows:
            begin, end = max(start - first, 0), min(stop - first, rows.count)
            if begin < end:
                found.append(_Rows(rows.tensor, rows.begin + begin, rows.begin + end))
            first += rows.count
        return self._with(self.dtype, tuple(found))

    def t(self) -> _Transposed:
        return _Transposed(self)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W^T + bias`` of (..., I) rows."""
        if len(self._rows) == 1:
            return F.linear(x, self._rows[0].weight(x.dtype), bias)
        sizes = [rows.count for rows in self._rows]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = [F.linear(x, r.weight(x.dtype), b) for r, b in zip(self._rows, biases, strict=True)]
        return torch.cat(parts, dim=-1)

    def times(self, d_y: torch.Tensor) -> torch.Tensor:
        """``d_y W`` of (M, O) rows."""
        parts = d_y.split([rows.count for rows in self._rows], dim=-1)
        d_x = parts[0] @ self._rows[0].plain(d_y.dtype)
        for part, rows in zip(parts[1:], self._rows[1:], strict=True):
            d_x.addmm_(part, rows.plain(d_y.dtype))
        return d_x

    @classmethod
    def _with(cls, dtype: torch.dtype, rows: tuple[_Rows, ...]) -> QuantisedWeight:
        found = cls.__new__(cls)
        found.dtype, found._rows = dtype, rows
        return found


class _Transposed:
    """``W^T``, by which the gradient of a layer's input is computed."""

    def __init__(self, weight: QuantisedWeight) -> None:
        self.weight = weight

    def linear(self, d_y: torch.Tensor, bias: None) -> torch.Tensor:
        return self.weight.times(d_y)


class _Rows:
    """Rows of a tensor, quantised or not."""

    def __init__(self, tensor: torch.Tensor, begin: int, end: int) -> None:
        self.tensor, self.begin, self.end = tensor, begin, end

    @property
    def count(self) -> int:
        return self.end - self.begin

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """What ``F.linear`` takes beside an input of ``dtype``: quantised where rows of a quantised
        tensor are one."""
        tensor = self.tensor
        if not is_quantised(tensor):
            return self.plain(dtype)
        if self.count == tensor.shape[0]:
            return tensor
        return self.plain(dtype) if _is_nf4(tensor) else tensor[self.begin : self.end]

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, in new memory where the tensor is quantised."""
        found: Any = self.tensor.detach()
        if _is_nf4(found):
            found = found.get_original_weight()[self.begin : self.end]
        elif is_quantised(found):
            part = found if self.count == found.shape[0] else found[self.begin : self.end]
            found = part.dequantize()
        else:
            found = found[self.begin : self.end]
        plain: torch.Tensor = found.to(dtype)
        return plain


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that hold a quantised tensor's numbers, by its names for them; else itself."""
    if not is_quantised(tensor):
        return {"": tensor}
    inside: Any = tensor
    return {name: getattr(inside, name) for name in inside.__tensor_flatten__()[0]}


def _kind(module: str, name: str) -> tuple[type, ...]:
    """A class of torchao's; none where torchao was not imported, or has no such class."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _is_nf4(tensor: object) -> bool:
    return isinstance(tensor, _kind(_NF4_MODULE, "NF4Tensor"))


def _dequantises(tensor: torch.Tensor) -> bool:
    return type(tensor).dequantize is not torch.Tensor.dequantize
