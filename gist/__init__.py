"""Parameter-efficient fine-tuning with a Gist token (GIST, arXiv:2312.07255) for timm ViTs.

>>> import gist, timm
>>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> model = gist.wrap(backbone, gist.GistConfig(method=gist.Adapter(rank=4)))
>>> gist.count_parameters(model).token
192
"""

try:
    import safetensors  # noqa: F401
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"gist needs {error.name}, which is missing: pip install 'gist-kernels[models]'"
    ) from error

from gist.methods import (
    SSF,
    VPT,
    Adapter,
    AdaptFormer,
    BitFit,
    Convpass,
    DiffFit,
    FacT,
    Full,
    LayerNormTuning,
    LoRA,
    Method,
    RepAdapter,
)
from gist.model.config import GistConfig
from gist.model.describe import available_methods, count_parameters, explain
from gist.model.loss import GistLoss
from gist.model.merge import merge
from gist.model.saving import load, save
from gist.model.unwrap import unwrap
from gist.model.wrapped import GistModel, GistOutput, ParameterCount, wrap

__all__ = [
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "Convpass",
    "DiffFit",
    "FacT",
    "Full",
    "GistConfig",
    "GistLoss",
    "GistModel",
    "GistOutput",
    "LayerNormTuning",
    "LoRA",
    "Method",
    "ParameterCount",
    "RepAdapter",
    "available_methods",
    "count_parameters",
    "explain",
    "load",
    "merge",
    "save",
    "unwrap",
    "wrap",
]
