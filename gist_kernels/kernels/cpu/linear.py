"""Matmuls with frozen weights on a CPU: by oneDNN where it is the faster library.

For float32, PyTorch's own linear calls MKL, which leaves half of an AMD processor's AVX-512 unused.
The oneDNN that PyTorch carries does not. PyTorch offers it as an operator without a gradient: what
these functions compute are the pieces of one.

The choice follows a rule, not a measurement at run time: two libraries round differently, and noise
must not change a run's results. ``gist bench matmul`` measures what the rule rests on. Other dtypes
are PyTorch's own: for bf16 PyTorch calls oneDNN by itself.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gist_kernels.kernels.cpu.native import native as _native

LIBRARY_VARIABLE = "GIST_KERNELS_MATMUL"
"""Environment variable that names the library of float32 matmuls, read when gist_kernels is
imported."""
LIBRARIES = ("auto", "onednn", "pytorch")

_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_MKLDNN: bool = torch.backends.mkldnn.is_available()


class Rule(NamedTuple):
    """What one kind of processor takes oneDNN for."""

    everything: bool = False
    """Every matmul; the rest doesn't count."""
    large: bool = False
    """Matmuls with more outputs than ``_FEW``, within the two limits below."""
    inputs_to_add: int = 0
    """The fewest inputs of a matmul that is added onto a tensor: with fewer, memory decides."""
    transposed_numbers: float = float("inf")
    """The most numbers of a weight that is read transposed. With AVX2, oneDNN reads such a weight
    where it lies, at up to 12 KB from row to row."""
    few_transposed: int = 8
    """With 2 to so many outputs and a transposed weight, MKL takes 2 to 5 times as long on AMD
    processors."""


# The kinds of processors; all else is unmeasured.
_INTEL = "Intel with AVX-512"
_RULES = {
    "AMD with AVX-512": Rule(large=True, inputs_to_add=64),
    "AMD with AVX-512, oneDNN held to AVX2": Rule(
        large=True, inputs_to_add=256, transposed_numbers=1 << 20
    ),
    _INTEL: Rule(few_transposed=0),
}
# Calling oneDNN costs some 10 us more, as long as so many multiplications take.
_LEAST_MULTIPLICATIONS = 1_500_000
# With so few outputs, the first of a low-rank update say, MKL sums in several parts where oneDNN
# sums in one: half of the error in the same time. With more, MKL takes twice the time.
_FEW = 4


def _kind_of_processor() -> str | None:
    if not _native.processor_has_avx512():
        return None
    if (vendor := _native.processor_vendor()) != "amd":
        return _INTEL if vendor == "intel" else None
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    held = not most.upper().startswith(("AVX512", "AVX10", "DEFAULT", "ALL"))
    return "AMD with AVX-512" + (", oneDNN held to AVX2" if held else "")


def rule_of(library: str) -> Rule:
    """The rule on this processor.

    Raises:
        ValueError: there is no such library, or PyTorch lacks it here.
    """
    if library not in LIBRARIES:
        raise ValueError(f"{LIBRARY_VARIABLE} must be one of {LIBRARIES}, not {library!r}")
    if library == "onednn" and not _has_onednn():
        raise ValueError(
            f"{LIBRARY_VARIABLE}: this PyTorch has no oneDNN for linear layers; take 'pytorch'"
        )
    if library == "auto" and _has_onednn():
        return _RULES.get(_kind_of_processor() or "", Rule())
    return Rule(everything=library == "onednn")


def _has_onednn() -> bool:
    return _linear_pointwise is not None and _MKLDNN


_library = os.environ.get(LIBRARY_VARIABLE) or "auto"
_rule = rule_of(_library)


def detail() -> str:
    """The library of float32 matmuls and the reason for it, in words."""
    if _library != "auto":
        name = {"onednn": "oneDNN", "pytorch": "PyTorch's own library"}[_library]
        return f"float32 matmuls by {name} ({LIBRARY_VARIABLE})"
    if _rule.large:
        return f"float32 matmuls by oneDNN where it is faster ({_kind_of_processor()})"
    return "float32 matmuls by PyTorch's own library"


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, *, adds: bool) -> bool:
    """Whether ``x weight^T``, to be added onto a tensor or not, is oneDNN's."""
    if x.dtype is not torch.float32:
        return False
    outputs, inputs = weight.shape
    if not _rule.everything:
        if x.numel() * outputs < _LEAST_MULTIPLICATIONS:
            return False
        transposed = weight.stride(1) != 1
        fast = (
            _rule.large
            and outputs > _FEW
            and not (transposed and weight.numel() > _rule.transposed_numbers)
            and not (adds and inputs < _rule.inputs_to_add)
        )
        if not fast and not (transposed and 1 < outputs <= _rule.few_transposed):
            return False
    elif not x.numel():
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_onednn()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias`` of (..., I) rows, with a weight of (O, I)."""
    if _by_onednn(x, weight, adds=False):
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def is_pytorchs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`linear` is PyTorch's own, which can write into given memory."""
    return not _by_onednn(x, weight, adds=False)


def by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear` of float32 tensors by oneDNN, whatever the rule says."""
    # It reads a bias as if it were contiguous, whatever its stride.
    bias = None if bias is None else bias.contiguous()
    result: torch.Tensor = _linear_pointwise(x, weight, bias, "none", [], "")
    return result


def add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out + x weight^T`` of (M, I) rows onto (M, O) ones, of x's dtype or float32, which may be
    overwritten."""
    if out.dtype is not x.dtype:
        return out.add_(F.linear(x, weight))
    if _by_onednn(x, weight, adds=True):
        return add_by_onednn(out, x, weight)
    return out.addmm_(x, weight.t())


def add_by_onednn(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """:func:`add_linear` of float32 tensors by oneDNN, whatever the rule says."""
    result: torch.Tensor = _linear_pointwise.binary(x, out, weight, None, "add")
    return result
