"""Plain PyTorch forms of every operation: readable, differentiable by autograd, the tests' oracle.

They take validated arguments: the public functions in ``gist_kernels.loss`` and
``gist_kernels.adapter`` check first.
"""

from collections.abc import Callable
from typing import Any

from gist_kernels.reference.adapter import adapter
from gist_kernels.reference.loss import gist_loss, gist_loss_and_grad

OPERATIONS: dict[str, Callable[..., Any]] = {
    "adapter": adapter,
    "bidirectional_kl": gist_loss,
    "gist_loss": gist_loss,
    "gist_loss_and_grad": gist_loss_and_grad,
}
