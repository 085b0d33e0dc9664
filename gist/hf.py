"""transformers' Trainer for wrapped models: what it trains, and what it saves.

>>> import gist, gist.hf, timm
>>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> model = gist.hf.ForTrainer(gist.wrap(backbone), gist.GistLoss(kl_weights=(0.75, 0.0)))
>>> model.config.num_labels
10
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import PreTrainedConfig, TrainerCallback
    from transformers.modeling_outputs import ImageClassifierOutput
except ImportError as error:
    raise ImportError(
        "gist.hf needs transformers 5 or newer: pip install 'gist-kernels[hf]'"
    ) from error

from gist.model import saving
from gist.model.loss import GistLoss
from gist.model.wrapped import GistModel, GistOutput

__all__ = ["ForTrainer", "SaveAdapter"]

Loss = Callable[[torch.Tensor | GistOutput, torch.Tensor], torch.Tensor]

IGNORED = -100
"""The label of rows that Trainer does not count."""


class ForTrainer(nn.Module):
    """A wrapped model with its loss, as ``transformers.Trainer(model=...)`` takes it.

    The state dict holds what is trained, and a fingerprint of the frozen backbone. Checkpoints are
    therefore as small as the adapter. They load onto the same backbone only.

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
    main_input_name = "pixel_values"

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

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> ImageClassifierOutput:
        """The loss and the class token's (B, C) logits.

        Args:
            pixel_values: (B, 3, H, W) images.
            labels: (B,) int64 class indices, or (B, C) probabilities. A row of index -100 counts
                nowhere. The mean over a batch of such rows alone is NaN, as in PyTorch. Evaluation
                without labels gives no loss.
            images: another name for ``pixel_values``.
            num_items_in_batch: number of labels in all batches of an optimizer step. The loss is
                then this batch's part of the step's mean; None gives the batch's mean.

        Raises:
            ValueError: no images, or none of the labels that training needs.
        """
        if (pixel_values is None) == (images is None):
            raise ValueError(
                "give the images as pixel_values, or as images; Trainer drops columns of other "
                "names unless TrainingArguments(remove_unused_columns=False)"
            )
        if labels is None and self.model.training:
            raise ValueError(
                "training needs labels. Trainer's label_smoothing_factor and compute_loss_func "
                "keep them from the model; use ForTrainer(model, loss=...) instead, such as "
                "gist.GistLoss(label_smoothing=0.1)"
            )
        output = self.model(pixel_values if images is None else images)
        logits = output.cls_logits if isinstance(output, GistOutput) else output
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        loss = self.loss(output, labels)
        if num_items_in_batch is not None:
            # DataParallel hands each replica its own (1, 1) copy.
            total = torch.as_tensor(num_items_in_batch, device=loss.device).reshape(())
            loss = loss * (labels.ne(IGNORED).sum() / total)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def get_extra_state(self) -> torch.Tensor:
        """The frozen backbone's fingerprint, 32 bytes."""
        digest = bytearray.fromhex(saving.fingerprint_of(self.model))
        return torch.frombuffer(digest, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse what was trained on another backbone. Nothing has been loaded then."""
        if state.tolist() != self.get_extra_state().tolist():
            raise ValueError(
                "backbone does not match: its frozen weights differ from those that the checkpoint "
                "was trained on (other weights, image size or dtype, or other parameters frozen)"
            )

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
        """:func:`gist.load` of a local directory, onto a backbone that is not wrapped.

        Args:
            directory: a checkpoint with :class:`SaveAdapter`, or what :func:`gist.save` wrote.
            backbone: the model that the adapter was trained on.
            loss: as for the class. It is not saved.
            check_weights: refuse a backbone whose frozen weights differ from those in training.
        """
        return cls(saving.load(backbone, directory, check_weights=check_weights), loss)


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
