"""transformers' vision transformers from a local folder, as ``save_pretrained`` writes it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from gist.backbones.checkpoint import choose_prefix, flatten, read_checkpoint, stripped
from gist.backbones.transformers_vit import TRANSFORMERS_MODELS, TransformersViT
from gist.files import new_folder

PREFIX = "hf:"
PROCESSOR_FILE = "preprocessor_config.json"
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
_ANCHOR = "embeddings.cls_token"  # the name that tells a prefix


def create(
    folder: Path,
    *,
    num_classes: int,
    img_size: int | None = None,
    pretrained: bool = False,
    weights: Path | None = None,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A model for image classification, float32, with ``num_classes`` outputs.

    Its ``pretrained_cfg`` holds what ``preprocessor_config.json`` says, in timm's terms: mean and
    standard deviation, interpolation, and the share of an image that is cropped.

    Args:
        folder: has config.json and preprocessor_config.json; with ``pretrained`` the weights, too.
        img_size: side in pixels; None for the config's. The position grid is resampled to it.
        pretrained: load the folder's weights.
        weights: a checkpoint file to load instead.
        drop_path_rate: stochastic depth rate of the last block, for a model that has it.

    Raises:
        ValueError: a folder of another kind of model, a size that does not fit, or weights of
            another model.
        ImportError: transformers is missing.
    """
    config, kind = _config(folder)
    config.num_labels = num_classes
    if drop_path_rate:
        if not hasattr(config, "drop_path_rate"):
            raise ValueError(f"{kind.__name__} has no stochastic depth; drop_path must be 0")
        config.drop_path_rate = drop_path_rate
    wanted = config.image_size if img_size is None else img_size
    if not (pretrained or weights):
        config.image_size = wanted
        model = kind(config)
    else:
        model = _with_weights(kind, config, folder, weights)
        if wanted != config.image_size:
            model = _resized(model, wanted)
    processor = json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8"))
    mean, std = _normalisation(processor, folder)
    model.pretrained_cfg = {
        "input_size": (3, wanted, wanted), "mean": mean, "std": std, **_resizing(processor),
    }  # fmt: skip
    return model


def save(model: Any, folder: Path, *, like: Path) -> None:
    """Write a model, and the image processor of ``like``, so that both load from ``folder``.

    Raises:
        FileExistsError: there is such a folder already.
    """
    with new_folder(folder) as temporary:
        with quiet():
            model.save_pretrained(temporary)
        shutil.copy(like / PROCESSOR_FILE, temporary)


def patch_size(folder: Path) -> int:
    """Side of a patch in pixels."""
    patch: int = _config(folder)[0].patch_size
    return patch


def _config(folder: Path) -> tuple[Any, Any]:
    """The config, with sides as numbers, and the class that it describes."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES,
        )
    except ImportError as error:
        raise ImportError(
            "a model from a folder (hf:FOLDER) needs transformers: pip install 'transformers>=5'"
        ) from error
    for file in ("config.json", PROCESSOR_FILE):
        if not (folder / file).is_file():
            raise ValueError(
                f"model: {folder} has no {file}; hf: takes a local folder to which the model and "
                "its image processor were saved by save_pretrained"
            )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = NAMES.get(config.model_type, config.model_type)
    if name not in TRANSFORMERS_MODELS:
        raise ValueError(
            f"model: {folder} holds a {name}; GIST takes {', '.join(TRANSFORMERS_MODELS)}"
        )
    if config.num_channels != 3:
        raise ValueError(f"model: {folder} takes {config.num_channels} channels; images have 3")
    for key in ("image_size", "patch_size"):
        setattr(config, key, _square(getattr(config, key), key, folder))
    return config, getattr(transformers, name)


def _square(value: Any, name: str, folder: Path) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"model: {folder} has the {name} {value}; GIST takes squares")
    return int(sides.pop())


def _resizing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Interpolation, crop percentage and crop mode. timm's defaults take the place of what lacks.

    A processor that crops nothing resizes each image straight to a square.
    """
    found: dict[str, Any] = {}
    if processor.get("resample") in range(len(_RESAMPLING)):
        found["interpolation"] = _RESAMPLING[processor["resample"]]
    size = processor.get("size")
    if processor.get("do_center_crop") and isinstance(size, dict) and "shortest_edge" in size:
        crop = processor.get("crop_size", size["shortest_edge"])
        side = crop["height"] if isinstance(crop, dict) else crop
        found |= {"crop_pct": min(1.0, side / size["shortest_edge"]), "crop_mode": "center"}
    elif isinstance(size, int) or (isinstance(size, dict) and "height" in size):
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def _normalisation(
    processor: Mapping[str, Any], folder: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of levels in [0, 1]."""
    scaled = processor.get("do_rescale", True)
    if not scaled or abs(255 * processor.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        raise ValueError(f"{folder / PROCESSOR_FILE} does not scale levels by 1/255, as GIST does")
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for key in ("image_mean", "image_std"):
        if not isinstance(processor.get(key), list) or len(processor[key]) != 3:
            raise ValueError(f"{folder / PROCESSOR_FILE} has no {key} of three channels")
    return tuple(processor["image_mean"]), tuple(processor["image_std"])


def _with_weights(kind: Any, config: Any, folder: Path, file: Path | None) -> nn.Module:
    """The model with the folder's or a file's weights; its classifier is new unless it fits."""
    source = folder if file is None else file
    state = None if file is None else _state_of(file, kind)
    try:
        with quiet():
            model, report = kind.from_pretrained(
                folder if file is None else None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{source} can't be read as weights of this model: {error}") from error
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    head_is_whole = True
    for fault, names in (
        ("lacks", set(report["missing_keys"])),
        ("has misshapen", misshapen),
        ("has other", set(report["unexpected_keys"])),
    ):
        head_is_whole &= not any(name.startswith("classifier.") for name in names)
        # The pooler belongs to models without a classifier.
        body = {n for n in names if not n.startswith("classifier.") and "pooler.dense." not in n}
        if body:
            listed = ", ".join(sorted(body)[:4]) + (", ..." if len(body) > 4 else "")
            raise ValueError(
                f"{source} holds another model's weights: it {fault} parameters ({listed})"
            )
    if not head_is_whole:
        TransformersViT(model).reset_classifier(config.num_labels)
    return model


def _state_of(file: Path, kind: Any) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, without what stands before the model's own names."""
    try:
        flat = dict(flatten(read_checkpoint(file)))
    except Exception as error:  # unpickling raises whatever a damaged file leads to
        raise ValueError(f"{file} can't be read as a checkpoint: {error}") from error
    base = kind.base_model_prefix + "."
    found = [name[: -len(_ANCHOR)].removesuffix(base) for name in flat if name.endswith(_ANCHOR)]
    return stripped(flat, choose_prefix(found, file)) if found else flat


def _resized(model: Any, size: int) -> nn.Module:
    """The model for images of ``size``: its grid resampled, bicubic and antialiased as in timm."""
    config = copy.deepcopy(model.config)
    config.image_size = size
    twin = type(model)(config)
    grid = size // config.patch_size
    state = model.state_dict()
    name = f"{model.base_model_prefix}.embeddings.position_embeddings"
    state[name] = resample_abs_pos_embed(state[name], [grid, grid], num_prefix_tokens=1)
    twin.load_state_dict(state)
    return twin


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report and progress bar: what they say is checked here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
