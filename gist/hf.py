"""transformers' Trainer for wrapped models: what it trains, and what it saves.

>>> import gist, gist.hf, timm
>>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> model = gist.hf.ForTrainer(gist.wrap(backbone), gist.GistLoss(kl_weights=(0.75, 0.0)))
>>> model.config.num_labels
10
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

try:
    from transformers import PreTrainedConfig, TrainerCallback
    from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
    from transformers.utils import SAFE_WEIGHTS_NAME
except ImportError as error:
    raise ImportError(
        "gist.hf needs transformers 5 or newer: pip install 'gist-kernels[hf]'"
    ) from error

from gist.model import saving
from gist.model.loss import GistLoss
from gist.model.wrapped import GistModel, GistOutput

__all__ = ["ForTrainer", "SaveAdapter"]

Loss = Callable[[torch.Tensor | GistOutput, torch.Tensor], torch.Tensor]

Inputs = dict[str, torch.Tensor | None]

IGNORED = -100
"""The label of rows that Trainer does not count."""


class ForTrainer(nn.Module):
    """A wrapped model with its loss, as ``transformers.Trainer(model=...)`` takes it.

    The state dict holds what is trained, the config, and a fingerprint of the frozen backbone.
    Checkpoints are therefore as small as the adapter. They load onto the same backbone only.

    Args:
        model: what :func:`gist.wrap` or :func:`gist.load` returned.
        loss: maps the model's output and the labels to the mean loss of the batch's rows; the
            default is ``GistLoss()``. The output is a :class:`gist.GistOutput` in training with a
            Gist token, else (B, C) logits. Parameters of a module are trained and saved with it.

    Attributes:
        model, loss: as given.
        config: a ``transformers.PreTrainedConfig``: a copy of a transformers backbone's, otherwise
            a new one. Its ``gist`` is ``model.config.to_dict()``. Trainer may write to it.

    Raises:
        TypeError: ``model`` is not a wrapped model, or ``loss`` is no function.
        ValueError: the loss ignores rows that Trainer counts.
    """

    accepts_loss_kwargs = True
    """Trainer passes ``num_items_in_batch``."""

    def __init__(self, model: GistModel, loss: Loss | None = None) -> None:
        super().__init__()
        if not isinstance(model, GistModel):
            raise TypeError(
                f"model must be what gist.wrap returned; it is a {type(model).__name__}. Compile "
                "it by TrainingArguments(torch_compile=True)"
            )
        loss = GistLoss() if loss is None else loss
        if not callable(loss):
            raise TypeError(f"loss must be called with output and labels; it is {loss!r}")
        if isinstance(loss, GistLoss) and loss.ignore_index != IGNORED:
            raise ValueError(
                f"loss.ignore_index is {loss.ignore_index}, but Trainer counts every label except "
                f"{IGNORED}; leave ignore_index at {IGNORED}"
            )
        self.model, self.loss, self.config = model, loss, _config_of(model)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)

    @property
    def main_input_name(self) -> str:
        """The backbone's kind of input: "pixel_values" or "input_ids"."""
        return self.model.family.main_input_name

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> ImageClassifierOutput | SequenceClassifierOutput:
        """The loss and the class token's (B, C) logits.

        A backbone takes images or texts. The output is transformers' for that kind of input.

        Args:
            pixel_values: (B, 3, H, W) images.
            labels: (B,) int64 class indices, or (B, C) probabilities. A row of index -100 counts
                nowhere. The mean over a batch of such rows alone is NaN, as in PyTorch. Evaluation
                without labels gives no loss.
            images: another name for ``pixel_values``.
            num_items_in_batch: number of labels in all batches of an optimizer step. The loss is
                then this batch's part of the step's mean; None gives the batch's mean.
            input_ids: (B, N) int64 words.
            attention_mask: (B, N), 0 for padding; as the backbone takes it.
            token_type_ids, position_ids: (B, N) int64, for backbones that take them.

        Raises:
            ValueError: no input, inputs of the other kind, or none of the labels that training
                needs.
        """
        if labels is None and self.model.training:
            raise ValueError(
                "training needs labels. Trainer's label_smoothing_factor and compute_loss_func "
                "keep them from the model; use ForTrainer(model, loss=...) instead, such as "
                "gist.GistLoss(label_smoothing=0.1)"
            )
        of_images = {"pixel_values": pixel_values, "images": images}
        of_text = {
            "input_ids": input_ids, "attention_mask": attention_mask,
            "token_type_ids": token_type_ids, "position_ids": position_ids,
        }  # fmt: skip
        if self.main_input_name == "input_ids":
            output = self.model(**_text(of_text, of_images))
            result: Any = SequenceClassifierOutput
        else:
            output = self.model(_images(of_images, of_text))
            result = ImageClassifierOutput
        logits = output.cls_logits if isinstance(output, GistOutput) else output
        if labels is None:
            return result(logits=logits)
        loss = self.loss(output, labels)
        if num_items_in_batch is not None:
            # DataParallel hands each replica its own (1, 1) copy.
            total = torch.as_tensor(num_items_in_batch, device=loss.device).reshape(())
            loss = loss * (labels.ne(IGNORED).sum() / total)
        return result(loss=loss, logits=logits)

    def get_extra_state(self) -> torch.Tensor:
        """What :func:`gist.save` writes to config.json, as bytes of JSON."""
        described = json.dumps(saving.describe(self.model)).encode()
        return torch.frombuffer(bytearray(described), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse what was trained on another backbone. Nothing has been loaded then."""
        saving.check_fingerprint(self.model, _described(state)["backbone"]["fingerprint"])

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the blocks' activations in the backward pass rather than keep them.

        The arguments are those of transformers' models.

        Raises:
            ValueError: the backbone's checkpointing has no such option.
        """
        chosen, backbone = activation_checkpointing_kwargs, self.model.family.model
        if hasattr(backbone, "activation_checkpointing_enable"):
            backbone.activation_checkpointing_enable(chosen, every_n_layers, offload)
            return
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers} and offload={offload} are for transformers' "
                "backbones; this one checkpoints every block"
            )
        if hasattr(backbone, "gradient_checkpointing_enable"):  # the name in transformers 5.0
            backbone.gradient_checkpointing_enable(chosen)
        elif chosen in (None, {}, {"use_reentrant": False}):
            self.model.set_grad_checkpointing()
        else:
            raise ValueError(f"timm's checkpointing has no options; remove {chosen}")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The earlier name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def save_pretrained(self, directory: str | os.PathLike[str], **extra: Any) -> None:
        """:func:`gist.save` of the model."""
        saving.save(self.model, directory, **extra)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        backbone: nn.Module,
        loss: Loss | None = None,
        *,
        check_weights: bool = True,
    ) -> ForTrainer:
        """Wrap a fresh backbone with what a local directory holds, in evaluation mode.

        Args:
            directory: a checkpoint of Trainer, what ``trainer.save_model`` wrote, or what
                :func:`gist.save` wrote. gist.save's files are read where both are there.
            backbone: the model that the adapter was trained on, not wrapped.
            loss: as for the class. Trainer's files hold its parameters, gist.save's do not.
            check_weights: refuse a backbone whose frozen weights differ from those in training.

        Raises:
            FileNotFoundError: the directory holds none of these files.
            ValueError: as :func:`gist.load`.
        """
        file = Path(directory) / SAFE_WEIGHTS_NAME
        if (Path(directory) / saving.WEIGHTS_FILE).is_file() or not file.is_file():
            model = saving.load(backbone, directory, check_weights=check_weights)
            return cls(model, loss).eval()
        state = safetensors.torch.load_file(file)
        if "_extra_state" not in state:
            raise ValueError(f"{file} is no checkpoint of gist.hf.ForTrainer")
        described = _described(state.pop("_extra_state"))
        own, of_loss = (
            {n.removeprefix(part): value for n, value in state.items() if n.startswith(part)}
            for part in ("model.", "loss.")
        )
        model = saving.restore(backbone, described, own, file, check_weights=check_weights)
        restored = cls(model, loss)
        module = restored.loss if isinstance(restored.loss, nn.Module) else nn.Module()
        module.load_state_dict(of_loss)
        return restored.eval()


class SaveAdapter(TrainerCallback):
    """Trainer's callback that puts :func:`gist.save`'s two files into every checkpoint.

    :func:`gist.load` then takes the checkpoint's folder. Trainer itself resumes without them. A
    hyperparameter search's checkpoints are left as they are.

    Args:
        extra: further JSON values for config.json, such as ``classes=[...]``.

    Raises:
        TypeError: Trainer's model is not a :class:`ForTrainer`.
        ValueError: before training, if :func:`gist.save` would refuse the model.
    """

    def __init__(self, **extra: Any) -> None:
        self.extra = extra

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        _gist_model(given["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        saving.refuse_added(_gist_model(given["model"]))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.should_save and not state.is_hyper_param_search:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saving.save(_gist_model(given["model"]), folder, **self.extra)


def _gist_model(model: nn.Module) -> GistModel:
    if not isinstance(model, ForTrainer):
        raise TypeError(
            "gist.hf.SaveAdapter needs Trainer(model=gist.hf.ForTrainer(model)); Trainer's model "
            f"is a {type(model).__name__}"
        )
    return model.model


def _images(own: Inputs, others: Inputs) -> torch.Tensor:
    _refuse(others, "images", "pixel_values")
    given = [images for images in own.values() if images is not None]
    if len(given) != 1:
        raise ValueError(
            "give the images as pixel_values, or as images; Trainer drops columns of other "
            "names unless TrainingArguments(remove_unused_columns=False)"
        )
    return given[0]


def _text(own: Inputs, others: Inputs) -> dict[str, torch.Tensor]:
    _refuse(others, "text", "input_ids")
    if own["input_ids"] is None:
        raise ValueError(
            "give the words as input_ids, as a tokenizer names them; Trainer drops columns of "
            "other names unless TrainingArguments(remove_unused_columns=False)"
        )
    return {name: value for name, value in own.items() if value is not None}


def _refuse(others: Inputs, kind: str, name: str) -> None:
    found = [other for other, value in others.items() if value is not None]
    if found:
        raise ValueError(
            f"the backbone takes {kind}, as {name}; remove {', '.join(found)} from the data"
        )


def _described(state: torch.Tensor) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(bytes(state.tolist()))
    return described


def _config_of(model: GistModel) -> PreTrainedConfig:
    backbone: Any = model.family.model
    config = copy.deepcopy(getattr(backbone, "config", None))
    if not isinstance(config, PreTrainedConfig):
        described: dict[str, Any] = {
            "architectures": [type(backbone).__name__],
            "hidden_size": model.embed_dim,
            "num_labels": model.num_classes,
        }
        config = PreTrainedConfig(**described)
    config.gist = model.config.to_dict()
    return config


def _drop_frozen(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner, saved = f"{prefix}model.", set(saving.saved_names(module.model))
    for name in [name for name in state if name.startswith(inner)]:
        if name.removeprefix(inner) not in saved:
            del state[name]


def _miss_no_frozen(module: Any, incompatible: Any) -> None:
    saved, missing = set(saving.saved_names(module.model)), incompatible.missing_keys
    frozen = tuple(f"model.{n}" for n in module.model.state_dict() if n not in saved)
    missing[:] = [name for name in missing if not name.endswith(frozen)]
