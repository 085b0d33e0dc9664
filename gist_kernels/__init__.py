"""Fused loss and adapter operations for parameter-efficient fine-tuning with a Gist token.

Every operation has a plain PyTorch reference (``gist_kernels.reference``), which is also its
oracle in the tests, and is served by the fastest backend that can take the call. See
:func:`backends` for what is available here, and :func:`use_backend` to choose.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gist_kernels.autograd.casts import cached_casts
from gist_kernels.backend import BackendInfo, backends, use_backend
from gist_kernels.functional.adapter import adapter
from gist_kernels.functional.attention import prefix_attention
from gist_kernels.functional.divergence import bidirectional_kl, jensen_shannon
from gist_kernels.functional.linear_loss import (
    linear_bidirectional_kl,
    linear_gist_loss,
    linear_jensen_shannon,
)
from gist_kernels.functional.logits import split_heads
from gist_kernels.functional.loss import GistLossTerms, gist_loss, gist_loss_and_grad
from gist_kernels.functional.sublayers import adapter_attention, adapter_mlp
from gist_kernels.weights import (
    AdapterWeights,
    AttentionWeights,
    HeadWeights,
    LinearUpdate,
    MlpWeights,
    NormWeights,
    Rotation,
)

if TYPE_CHECKING:
    from gist_kernels import compat
    from gist_kernels import reference as reference

__version__ = "0.1.0"

__all__ = [
    "AdapterWeights",
    "AttentionWeights",
    "BackendInfo",
    "GistLossTerms",
    "HeadWeights",
    "LinearUpdate",
    "MlpWeights",
    "NormWeights",
    "Rotation",
    "adapter",
    "adapter_attention",
    "adapter_mlp",
    "backends",
    "bidirectional_kl",
    "cached_casts",
    "compat",
    "gist_loss",
    "gist_loss_and_grad",
    "jensen_shannon",
    "linear_bidirectional_kl",
    "linear_gist_loss",
    "linear_jensen_shannon",
    "prefix_attention",
    "split_heads",
    "use_backend",
]

# Imported when first asked for. The public functions stay eager: their modules register the
# operators, which a program saved by torch.export needs before it is loaded.
_LAZY = ("compat", "reference")

if not TYPE_CHECKING:  # a checker would take any name for an attribute

    def __getattr__(name):
        if name in _LAZY:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_LAZY})
