"""PEFT methods, one file each: a config dataclass that attaches its module to a backbone."""

from gist.methods.adapter import Adapter
from gist.methods.adaptformer import AdaptFormer
from gist.methods.base import AttachedMethod, FusedParts, Method, Refusal
from gist.methods.convpass import Convpass
from gist.methods.difffit import DiffFit
from gist.methods.fact import FacT
from gist.methods.hooks import Hook
from gist.methods.lora import LoRA
from gist.methods.repadapter import RepAdapter
from gist.methods.selective import BitFit, Full, LayerNormTuning
from gist.methods.ssf import SSF
from gist.methods.vpt import VPT
from gist.validate import check_known

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Adapter, AdaptFormer, LoRA, VPT, SSF, FacT, RepAdapter, Convpass, BitFit, LayerNormTuning,
        DiffFit, Full,
    )
}  # fmt: skip


def method_type(name: str) -> type[Method]:
    """The config class of a method by its name; ValueError with the nearest names otherwise."""
    check_known("method", name, METHODS)
    return METHODS[name]


__all__ = [
    "METHODS",
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "AttachedMethod",
    "BitFit",
    "Convpass",
    "DiffFit",
    "FacT",
    "Full",
    "FusedParts",
    "Hook",
    "LayerNormTuning",
    "LoRA",
    "Method",
    "Refusal",
    "RepAdapter",
    "method_type",
]
