"""Fused loss and adapter operations for parameter-efficient fine-tuning with a Gist token.

Every operation has a plain PyTorch reference (``gist_kernels.reference``), which is also its
oracle in the tests, and is served by the fastest backend that can take the call. See
:func:`backends` for what is available here, and :func:`use_backend` to choose.
"""

from gist_kernels import compat
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
)

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
    "adapter",
    "adapter_attention",
    "adapter_mlp",
    "backends",
    "bidirectional_kl",
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
