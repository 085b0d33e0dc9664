"""Save and load the trained parameters: ``adapter.safetensors`` and ``config.json``.

The frozen backbone is not saved. Its fingerprint is, so that parameters trained on one backbone are
not silently loaded onto another.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from gist.backbones.families import family_of
from gist.files import write_atomically, write_json
from gist.model.config import GistConfig
from gist.model.wrapped import GistModel, wrap

FORMAT = 1
WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"


def save(model: GistModel, directory: str | os.PathLike[str], **extra: Any) -> None:
    """Write the trained parameters and the config into ``directory``, which is made if missing.

    Each file is written beside its final place and then renamed: a full disk or a crash leaves the
    earlier file whole.

    Args:
        model: what :func:`gist.wrap` returned.
        directory: gets adapter.safetensors and config.json.
        extra: further JSON values for config.json, such as ``classes=[...]``.
    """
    directory = Path(directory)
    state = {name: p.cpu().contiguous() for name, p in model.trainable_state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "gist": model.config.to_dict(),
        "num_classes": model.num_classes,
        "backbone": _describe(model.backbone, model.config),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        **extra,
    }
    write_atomically(directory / WEIGHTS_FILE, weights)
    write_json(directory / CONFIG_FILE, config)


def load(
    backbone: nn.Module,
    directory: str | os.PathLike[str],
    *,
    check_weights: bool = True,
) -> GistModel:
    """Wrap a fresh backbone with what :func:`save` wrote; the model is in evaluation mode.

    The classifier is part of what was saved: the backbone's own is replaced where its number of
    classes differs.

    Args:
        backbone: the model that the adapter was trained on, not wrapped. If HF PEFT adapted it,
            adapt it again by the same config.
        directory: where :func:`save` wrote.
        check_weights: refuse a backbone whose frozen weights differ from those in training. Set
            False for a backbone that differs on purpose, such as a bfloat16 copy.

    Raises:
        FileNotFoundError: the directory lacks a file.
        ValueError: another format, another or differently built backbone, or files that don't
            belong together. The backbone is unchanged then.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}; is it what gist.save wrote?")
    try:
        saved = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE} is not valid JSON: {error}") from error
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{directory / CONFIG_FILE} has format {saved.get('format')!r}; "
            f"this version reads format {FORMAT}"
        )
    weights = (directory / WEIGHTS_FILE).read_bytes()
    if hashlib.sha256(weights).hexdigest() != saved["weights_sha256"]:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} is damaged or not the one that {CONFIG_FILE} describes"
        )
    config = GistConfig.from_dict(saved["gist"])
    family = family_of(backbone)
    _check_match(_describe(backbone, config), saved["backbone"], check_weights)
    if family.num_classes != saved["num_classes"]:
        family.reset_classifier(saved["num_classes"])
    model = wrap(backbone, config)
    state = safetensors.torch.load(weights)
    expected = model.trainable_state_dict().keys()
    if state.keys() != expected:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} holds other parameters than {CONFIG_FILE} describes: "
            f"{sorted(state.keys() ^ expected)[:4]}"
        )
    model.load_state_dict(state, strict=False)
    return model.eval()


def _describe(backbone: nn.Module, config: GistConfig) -> dict[str, Any]:
    family = family_of(backbone)
    # A backbone made without timm.create_model has no pretrained_cfg.
    origin: Any = getattr(family.model, "pretrained_cfg", None) or {}
    return {
        "architecture": origin.get("architecture", type(family.model).__name__),
        "embed_dim": family.embed_dim,
        "depth": len(family.blocks),
        "num_prefix_tokens": family.num_prefix_tokens,
        "global_pool": family.pooling,
        "fingerprint": _fingerprint(backbone, config),
    }


def _fingerprint(backbone: nn.Module, config: GistConfig) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors that are not trained."""
    family = family_of(backbone)
    trained = {id(p) for method in config.methods for p in method.trained(family)}
    trained |= {id(p) for head in family.heads for p in head.parameters()}
    if family.model is not backbone:
        trained |= {id(p) for p in backbone.parameters() if p.requires_grad}
    own = {id(parameter): name for name, parameter in backbone.named_parameters()}
    left_out = {own[parameter] for parameter in trained if parameter in own}
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_match(given: dict[str, Any], saved: dict[str, Any], check_weights: bool) -> None:
    for key in ("embed_dim", "depth", "num_prefix_tokens", "global_pool"):
        if given[key] != saved[key]:
            raise ValueError(
                f"backbone does not match: this {given['architecture']} has {key} {given[key]!r}, "
                f"the saved adapter was trained on a {saved['architecture']} with {saved[key]!r}"
            )
    if check_weights and given["fingerprint"] != saved["fingerprint"]:
        raise ValueError(
            f"backbone does not match: its frozen weights differ from those of the "
            f"{saved['architecture']} that the adapter was trained on (other weights, image size "
            "or dtype); pass check_weights=False if that is meant"
        )
