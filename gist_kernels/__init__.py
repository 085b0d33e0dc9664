"""Fused loss and adapter operations for parameter-efficient fine-tuning with a Gist token.

Every operation has a plain PyTorch reference (``gist_kernels.reference``), which is also its
oracle in the tests, and is served by the fastest backend that can take the call. See
:func:`backends` for what is available here, and :func:`use_backend` to choose.
"""

from gist_kernels.adapter import adapter
from gist_kernels.backend import BackendInfo, backends, use_backend
from gist_kernels.loss import (
    GistLossTerms,
    bidirectional_kl,
    gist_loss,
    gist_loss_and_grad,
    split_heads,
)

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "GistLossTerms",
    "adapter",
    "backends",
    "bidirectional_kl",
    "gist_loss",
    "gist_loss_and_grad",
    "split_heads",
    "use_backend",
]
