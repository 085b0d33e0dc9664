"""Checkpoint files of many layouts as the state dict of one timm vision transformer."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict, eva, vision_transformer
from timm.models.eva import Eva
from torch import nn

from gist.backbones.families import family_of

State = dict[str, torch.Tensor]
# Where trainings keep the weights beside an optimizer's state; the averaged weights come first.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Of a teacher and its student, the teacher is evaluated; of a MoCo pair, the trained encoder.
_PREFERRED = ("state_dict_ema.", "model_ema.", "teacher.", "base_encoder.", "encoder_q.")
_ANCHOR = "patch_embed.proj.weight"  # the name that tells a prefix


def load_weights(backbone: nn.Module, file: Path) -> None:
    """Load a checkpoint into a timm ``backbone``, wholly or not at all.

    timm's own conversions apply: other projects' names, and resampling of the position grid. If the
    parameters have a common prefix ("module.", "backbone.", "teacher.backbone.", ...), it is
    stripped. What lies outside the prefix, such as a projection head, is not part of the model.
    The classifier is loaded if all of it is there and fits; else the new one stays.

    Warns:
        UserWarning: several prefixes fit, and one of them was chosen.

    Raises:
        ValueError: the file can't be read, or holds another model's weights. ``backbone`` is
            unchanged then.
    """
    try:
        if file.suffix == ".npz":
            _load_npz(backbone, file)
            return
        checkpoint = read_checkpoint(file)
        state, faults = _convert(_weights_of(checkpoint), backbone)
    except Exception as error:  # unpickling and conversion raise whatever a damaged file leads to
        raise ValueError(f"{file} can't be read as a checkpoint of this model: {error}") from error
    if faults:
        state = _below_a_prefix(checkpoint, backbone, file, faults)
    backbone.load_state_dict(state, strict=False)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a .safetensors file or of one that torch.save wrote. No code in it is run."""
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    # Many trainings save their options beside the weights; a Namespace only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of parameters")
    return dict(content)


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of nested dictionaries, with their keys joined by dots."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")


def stripped(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The tensors below a prefix, without it."""
    return {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}


def choose_prefix(fitting: list[str], file: Path) -> str:
    """One of several prefixes below which a whole model lies.

    Raises:
        ValueError: nothing says which.
    """
    if len(fitting) == 1:
        return fitting[0]
    for preferred in _PREFERRED:
        chosen = [prefix for prefix in fitting if preferred in prefix]
        if len(chosen) == 1:
            others = ", ".join(repr(prefix) for prefix in fitting if prefix != chosen[0])
            warnings.warn(
                f"{file}: the weights below {chosen[0]!r} are used, not those below {others}",
                UserWarning,
                stacklevel=2,
            )
            return chosen[0]
    listed = ", ".join(map(repr, fitting))
    raise ValueError(
        f"{file} holds several models that fit, below the prefixes {listed}; save one of them "
        "in a file of its own"
    )


def _weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    for key in _KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            return clean_state_dict(checkpoint[key])
    return clean_state_dict(dict(checkpoint))


def _below_a_prefix(
    checkpoint: Mapping[str, Any], backbone: nn.Module, file: Path, faults: str
) -> State:
    """The state below the one prefix that explains the whole model.

    Raises:
        ValueError: none does; it names the prefixes found.
    """
    flat = dict(flatten(checkpoint))
    found: dict[str, State] = {}
    reasons = []
    for prefix in sorted(name[: -len(_ANCHOR)] for name in flat if name.endswith("." + _ANCHOR)):
        try:
            state, reason = _convert(stripped(flat, prefix), backbone)
        except Exception as error:  # conversions of another model's weights raise anything
            state, reason = {}, str(error)
        if reason:
            reasons.append(f"below the prefix {prefix!r} it {reason}")
        else:
            found[prefix] = state
    if not found:
        faults = "; ".join(reasons) or f"it {faults}"
        raise ValueError(f"{file} holds another model's weights: {faults}")
    return found[choose_prefix(list(found), file)]


def _convert(state: dict[str, Any], backbone: nn.Module) -> tuple[State, str]:
    """A state dict in timm's names and shapes, and how it differs from ``backbone``'s, or ""."""
    convert: Callable[..., State] = vision_transformer.checkpoint_filter_fn
    if isinstance(backbone, Eva):
        convert = eva.checkpoint_filter_fn
    elif any(".gamma_1" in name for name in state):  # DeiT III's own names
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", n): t for n, t in state.items()}
    state = convert(state, backbone)
    own = backbone.state_dict()
    heads = _head_names(backbone, own)
    fits = all(name in state and state[name].shape == own[name].shape for name in heads)
    prefixes = tuple({name.partition(".")[0] + "." for name in heads})
    if not fits:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
        own = {name: tensor for name, tensor in own.items() if name not in heads}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    for fault, names in (("lacks", missing), ("has other", unexpected), ("has misshapen", shapes)):
        if names:
            listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            return state, f"{fault} parameters ({listed})"
    return state, ""


def _head_names(backbone: nn.Module, own: Mapping[str, Any]) -> set[str]:
    heads = {id(p) for head in family_of(backbone).heads for p in head.parameters()}
    return {name for name, p in backbone.named_parameters() if id(p) in heads and name in own}


def _load_npz(backbone: Any, file: Path) -> None:
    if not hasattr(backbone, "load_pretrained"):
        raise ValueError(f"a {type(backbone).__name__} has no .npz layout")
    # timm silently ignores an .npz's additional blocks.
    with np.load(file) as archive:
        found = {m[1] for name in archive.files if (m := re.search(r"encoderblock_(\d+)/", name))}
    if found and len(found) != len(backbone.blocks):
        raise ValueError(f"it has {len(found)} blocks, the model {len(backbone.blocks)}")
    backbone.load_pretrained(str(file))
