"""Plain PyTorch forms of every operation: readable, differentiable by autograd, the tests' oracle.

They take validated arguments: the public functions in ``gist_kernels.loss``,
``gist_kernels.adapter`` and ``gist_kernels.sublayers`` check first.
"""

from collections.abc import Callable
from typing import Any

from gist_kernels.reference.adapter import adapter
from gist_kernels.reference.loss import gist_loss, gist_loss_and_grad
from gist_kernels.reference.sublayers import adapter_attention, adapter_mlp, prefix_attention

OPERATIONS: dict[str, Callable[..., Any]] = {
    "adapter": adapter,
    "adapter_attention": adapter_attention,
    "adapter_mlp": adapter_mlp,
    "bidirectional_kl": gist_loss,
    "gist_loss": gist_loss,
    "gist_loss_and_grad": gist_loss_and_grad,
    "prefix_attention": prefix_attention,
}
