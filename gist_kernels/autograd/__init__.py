"""Autograd nodes and registered operators, around kernels that are handed down: no backend is known
here."""

from gist_kernels.autograd.adapter import adapter, adapter_operator
from gist_kernels.autograd.adapter import register as register_adapter
from gist_kernels.autograd.attention import (
    prefix_attention,
    prefix_attention_operator,
    served,
)
from gist_kernels.autograd.attention import register as register_attention
from gist_kernels.autograd.casts import cached_casts
from gist_kernels.autograd.divergence import jensen_shannon
from gist_kernels.autograd.divergence import register as register_divergence
from gist_kernels.autograd.linear_chunks import GistRows, JensenShannonRows, LogitOptions
from gist_kernels.autograd.linear_loss import linear_loss
from gist_kernels.autograd.linear_loss import register as register_linear_loss
from gist_kernels.autograd.loss import (
    eager_gist_loss,
    eager_gist_loss_and_grad,
    gist_loss,
    gist_loss_and_grad,
)
from gist_kernels.autograd.loss import register as register_loss
from gist_kernels.autograd.sublayers import adapter_attention, adapter_mlp, sublayer_of
from gist_kernels.autograd.trained import Sublayer

__all__ = [
    "GistRows",
    "JensenShannonRows",
    "LogitOptions",
    "Sublayer",
    "adapter",
    "adapter_attention",
    "adapter_mlp",
    "adapter_operator",
    "cached_casts",
    "eager_gist_loss",
    "eager_gist_loss_and_grad",
    "gist_loss",
    "gist_loss_and_grad",
    "jensen_shannon",
    "linear_loss",
    "prefix_attention",
    "prefix_attention_operator",
    "register_adapter",
    "register_attention",
    "register_divergence",
    "register_linear_loss",
    "register_loss",
    "served",
    "sublayer_of",
]
