"""Save and load the trained parameters: ``adapter.safetensors`` and ``config.json``.

The frozen backbone is not saved. Its fingerprint is, so that parameters trained on one backbone are
not silently loaded onto another.

Format 1 holds the parameters that the config trains. Format 2 also names those that are trained
beside them, and those that the config trains and the user has frozen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from gist.backbones.base import BackboneFamily
from gist.backbones.families import family_of
from gist.files import to_json, write_together
from gist.model.config import GistConfig
from gist.model.containers import gist_model_of, is_replicated, is_sharded, whole
from gist.model.unwrap import unwrap
from gist.model.wrapped import GistModel, wrap
from gist_kernels.quantised import parts_of

FORMAT = 2
WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"


def save(model: nn.Module, directory: str | os.PathLike[str], **extra: Any) -> None:
    """Write the trained parameters and the config into ``directory``, which is made if missing.

    Both files are written beside their final places and then renamed: a full disk leaves the
    earlier ones, which belong together.

    Parameters that the config trains are saved in any case, and so are others of the backbone that
    are trained now. :func:`load` restores which are trained. What was trained and then frozen again
    counts as the backbone's own: freeze it after saving.

    Args:
        model: what :func:`gist.wrap` returned, also within DistributedDataParallel or
            ``torch.compile``, or sharded by ``fully_shard``. A sharded model is gathered: call this
            in every process. The first process writes, for DistributedDataParallel too.
        directory: gets adapter.safetensors and config.json.
        extra: further JSON values for config.json, such as ``classes=[...]``.

    Raises:
        ValueError: parameters or buffers were added to the model after :func:`gist.wrap`. They
            could not be loaded.
    """
    replicated, directory, model = is_replicated(model), Path(directory), gist_model_of(model)
    refuse_added(model)
    values = model.state_dict()  # sharded parameters are sharded again
    state = {name: whole(values[name]) for name in saved_names(model)}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    config = {**describe(model), "weights_sha256": digest, **extra}
    sharded, processes = is_sharded(model), torch.distributed
    together = processes.is_available() and processes.is_initialized()
    try:
        if not together or processes.get_rank() == 0 or not (replicated or sharded):
            files = {WEIGHTS_FILE: weights, CONFIG_FILE: to_json(config)}
            write_together({directory / name: content for name, content in files.items()})
    finally:
        if together and sharded:
            processes.barrier()  # the files are there for all


def describe(model: GistModel) -> dict[str, Any]:
    """JSON values by which :func:`restore` puts trained parameters onto a fresh backbone."""
    parameters = dict(model.named_parameters())
    adapted, beside = model.adapted_names(), _beside(model)
    frozen = [name for name in adapted if not parameters[name].requires_grad]
    return {
        "format": FORMAT if beside or frozen else 1,
        "gist": model.config.to_dict(),
        "num_classes": _classes(model.family),
        "backbone": _describe(model.backbone, model.config, beside),
        "versions": {library.__name__: library.__version__ for library in _libraries(model)},
        **({"also_trained": beside, "frozen": frozen} if beside or frozen else {}),
    }


def load(
    backbone: nn.Module,
    directory: str | os.PathLike[str],
    *,
    check_weights: bool = True,
) -> GistModel:
    """Wrap a fresh backbone with what :func:`save` wrote; the model is in evaluation mode.

    The classifier is part of what was saved: the backbone's own is replaced where its number of
    classes differs. Parameters are trained or frozen as they were when saved.

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
            raise FileNotFoundError(
                f"{directory} has no {name}; is it what gist.save wrote? "
                "gist.hf.ForTrainer.from_pretrained reads what Trainer wrote"
            )
    try:
        saved = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE} is not valid JSON: {error}") from error
    _check_format(saved, directory / CONFIG_FILE)
    weights = (directory / WEIGHTS_FILE).read_bytes()
    if hashlib.sha256(weights).hexdigest() != saved["weights_sha256"]:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} is damaged or not the one that {CONFIG_FILE} describes"
        )
    state = safetensors.torch.load(weights)
    return restore(backbone, saved, state, directory / WEIGHTS_FILE, check_weights=check_weights)


def restore(
    backbone: nn.Module,
    saved: dict[str, Any],
    state: dict[str, torch.Tensor],
    source: Path,
    *,
    check_weights: bool = True,
) -> GistModel:
    """Wrap a fresh backbone with trained parameters, as :func:`load` says.

    Args:
        backbone: the model that they were trained on, not wrapped.
        saved: what :func:`describe` returned.
        state: the parameters of :func:`saved_names`, by name.
        source: the file that they are from, for errors.
        check_weights: refuse a backbone whose frozen weights differ from those in training.
    """
    _check_format(saved, source)
    config = GistConfig.from_dict(saved["gist"])
    family, beside = family_of(backbone), saved.get("also_trained", [])
    own = {f"backbone.{name}" for name, _ in backbone.named_parameters()}
    if not own.issuperset(beside):
        raise ValueError(
            f"backbone does not match: it lacks {sorted(set(beside) - own)[:4]}, which the saved "
            "adapter trained"
        )
    _check_match(_describe(backbone, config, beside), saved["backbone"], check_weights)
    classes = saved["num_classes"]
    # A head that was reset is no longer the one that HF PEFT had put there.
    lacking = {name for name in state if name.startswith("backbone.")} - own
    if classes and (family.num_classes != classes or (family.model is not backbone and lacking)):
        family.reset_classifier(classes)
    model = wrap(backbone, config, num_classes=None if classes else 0)
    try:
        _fill(model, state, beside, source)
    except Exception:
        unwrap(model)
        raise
    trained = set(model.adapted_names()).union(beside).difference(saved.get("frozen", []))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model.eval()


def _libraries(model: GistModel) -> list[Any]:
    """torch, timm, and transformers if the backbone is one of its models."""
    by_transformers = type(model.family.model).__module__.startswith("transformers.")
    return [torch, timm, *([sys.modules["transformers"]] if by_transformers else [])]


def _classes(family: BackboneFamily) -> int:
    """The classifier's outputs, also where the user put it in place of the backbone's."""
    outputs: int = getattr(family.logit_layers[0], "out_features", family.num_classes)
    return outputs


def refuse_added(model: GistModel) -> None:
    """Raise :func:`save`'s ValueError for what was added to the model after :func:`gist.wrap`."""
    added = model.added_names()
    if added:
        raise ValueError(
            f"gist.load could not make what was added after gist.wrap: {', '.join(added[:4])}; "
            "add it to the backbone before gist.wrap, or remove it and save it by torch.save"
        )


def _check_format(saved: dict[str, Any], source: Path) -> None:
    if saved.get("format") not in (1, FORMAT):
        raise ValueError(
            f"{source} has format {saved.get('format')!r}; this version reads formats 1 to {FORMAT}"
        )


def _fill(
    model: GistModel, state: dict[str, torch.Tensor], beside: Sequence[str], source: Path
) -> None:
    expected = set(model.adapted_names()).union(beside)
    if state.keys() != expected:
        raise ValueError(
            f"{source} holds other parameters than its config describes: "
            f"{sorted(state.keys() ^ expected)[:4]}"
        )
    model.load_state_dict(state, strict=False)


def _beside(model: GistModel) -> list[str]:
    """Names of the parameters that are trained, and not by the config."""
    adapted = set(model.adapted_names())
    return [n for n, p in model.named_parameters() if p.requires_grad and n not in adapted]


def saved_names(model: GistModel) -> list[str]:
    """Names of the parameters that :func:`save` writes."""
    return [*model.adapted_names(), *_beside(model)]


def fingerprint_of(model: GistModel) -> str:
    """SHA-256, in hexadecimal, of what the backbone holds beside :func:`saved_names`."""
    return _fingerprint(model.backbone, model.config, _beside(model))


def check_fingerprint(model: GistModel, trained_on: str) -> None:
    """Raise a ValueError unless ``trained_on`` is the :func:`fingerprint_of` the model."""
    if trained_on != fingerprint_of(model):
        raise ValueError(
            "backbone does not match: its frozen weights differ from those that the checkpoint "
            "was trained on (other weights, image size or dtype, or other parameters frozen)"
        )


def _describe(backbone: nn.Module, config: GistConfig, beside: Sequence[str]) -> dict[str, Any]:
    family = family_of(backbone)
    # A backbone made without timm.create_model has no pretrained_cfg.
    origin: Any = getattr(family.model, "pretrained_cfg", None) or {}
    return {
        "architecture": origin.get("architecture", type(family.model).__name__),
        "embed_dim": family.embed_dim,
        "depth": len(family.blocks),
        "num_prefix_tokens": family.num_prefix_tokens,
        "global_pool": family.pooling,
        "fingerprint": _fingerprint(backbone, config, beside),
    }


def _fingerprint(backbone: nn.Module, config: GistConfig, beside: Sequence[str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors that the saved file lacks. A
    quantised one counts by the tensors within it."""
    family = family_of(backbone)
    trained = {id(p) for method in config.methods for p in method.trained(family)}
    trained |= {id(p) for head in family.heads for p in head.parameters()}
    if family.model is not backbone:
        trained |= {id(p) for p in backbone.parameters() if p.requires_grad}
    named = backbone.named_parameters(remove_duplicate=False)  # a shared one has several names
    left_out = {name for name, parameter in named if id(parameter) in trained}
    left_out |= {name.removeprefix("backbone.") for name in beside}
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if name not in left_out:
            for inner, part in parts_of(tensor).items():
                title = f"{name}.{type(tensor).__name__}.{inner}" if inner else name
                digest.update(f"{title} {part.dtype} {tuple(part.shape)}\n".encode())
                # A tensor of no dimensions has no view in another dtype.
                content: Any = whole(part).reshape(-1).view(torch.uint8).numpy()
                digest.update(content)
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
