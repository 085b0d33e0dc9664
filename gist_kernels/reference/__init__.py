"""Every operation in plain PyTorch: readable, differentiable by autograd, the tests' oracle.

The functions take checked arguments; the public functions in ``gist_kernels.functional`` check
them.
"""

from gist_kernels.reference.adapter import adapter
from gist_kernels.reference.attention import attention, prefix_attention
from gist_kernels.reference.divergence import jensen_shannon
from gist_kernels.reference.linear_loss import linear_logits
from gist_kernels.reference.loss import gist_loss, gist_loss_and_grad
from gist_kernels.reference.sublayers import adapter_attention, adapter_mlp

__all__ = [
    "adapter",
    "adapter_attention",
    "adapter_mlp",
    "attention",
    "gist_loss",
    "gist_loss_and_grad",
    "jensen_shannon",
    "linear_logits",
    "prefix_attention",
]
