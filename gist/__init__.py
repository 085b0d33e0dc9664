"""Parameter-efficient fine-tuning with a Gist token (GIST, arXiv:2312.07255) for timm ViTs.

>>> import gist, timm
>>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> model = gist.wrap(backbone, gist.GistConfig(method=gist.Adapter(rank=4)))
>>> gist.count_parameters(model).token
192
"""

from gist.checkpoint import load, save
from gist.config import GistConfig
from gist.loss import GistLoss
from gist.methods import Adapter, Method
from gist.model import GistModel, GistOutput, ParameterCount, count_parameters, explain, wrap

__all__ = [
    "Adapter",
    "GistConfig",
    "GistLoss",
    "GistModel",
    "GistOutput",
    "Method",
    "ParameterCount",
    "count_parameters",
    "explain",
    "load",
    "save",
    "wrap",
]
