"""timm's training script for wrapped models: the task that its loop trains and its saver keeps.

>>> import gist, gist.timm_task, timm, torch
>>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> task = gist.timm_task.GistTask(gist.wrap(backbone))
>>> sorted(task(torch.randn(2, 3, 224, 224), torch.tensor([3, 8])))
['cls_cross_entropy', 'gist_cross_entropy', 'kl_cls_gist', 'kl_gist_cls', 'loss', 'output']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

try:
    # The second is not used here: timm.task of earlier releases lacks it.
    from timm.task import ClassificationTask, resume_task_checkpoint  # noqa: F401
except ImportError as error:
    raise ImportError("gist.timm_task needs timm 1.0.27 or newer: pip install -U timm") from error

from gist.model import saving
from gist.model.containers import gist_model_of
from gist.model.loss import GistLoss
from gist.model.wrapped import GistModel, GistOutput

__all__ = ["GistTask"]


class GistTask(ClassificationTask):
    """A wrapped model with its loss, for the loop, saver and evaluation of timm's train.py.

    A checkpoint holds what is trained and a fingerprint of the frozen backbone. It loads onto the
    same backbone only.

    Args:
        model: what :func:`gist.wrap` or :func:`gist.load` returned.
        criterion: maps the model's output and the targets to the mean loss of a batch; the default
            is ``GistLoss()``. The output is a :class:`gist.GistOutput` in training with a Gist
            token, else (B, C) logits. Targets are (B,) int64 class indices, or the (B, C)
            probabilities of timm's Mixup.
        device, dtype, verbose: as for timm's tasks.

    Raises:
        TypeError: ``model`` is not a wrapped model, or ``criterion`` is PyTorch's or timm's, which
            would not take the logits of two tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., torch.Tensor] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        wrapped = gist_model_of(model)
        criterion = GistLoss() if criterion is None else criterion
        library = type(criterion).__module__.partition(".")[0]
        if wrapped.token is not None and library in ("torch", "timm"):
            raise TypeError(
                f"criterion {type(criterion).__name__} takes the logits of one token; leave it "
                "out, or pass gist.GistLoss, such as gist.GistLoss(label_smoothing=0.1)"
            )
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)

    @property
    def model(self) -> GistModel:
        """The wrapped model, within DistributedDataParallel or ``torch.compile`` too."""
        return gist_model_of(self.trainable_module)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """A training step's forward.

        Args:
            input: (B, 3, H, W) images.
            target: see the class.

        Returns:
            ``loss``, to be differentiated; ``output``, the class token's (B, C) logits; and with a
            Gist token and :class:`gist.GistLoss` its four terms, unweighted, without gradient.
        """
        output, criterion = self.trainable_module(input), self.criterion
        if not isinstance(output, GistOutput):
            return {"loss": criterion(output, target), "output": output}
        # A subclass may compute another loss, which has no terms.
        if isinstance(criterion, GistLoss) and type(criterion).forward is GistLoss.forward:
            loss, terms = criterion.with_terms(output, target)
            return {"loss": loss, "output": output.cls_logits, **terms._asdict()}
        return {"loss": criterion(output, target), "output": output.cls_logits}

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The trained parameters, without the classifier's if ``exclude_head``."""
        heads = {id(p) for p in self.model.head_parameters()} if exclude_head else set()
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in heads]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The frozen backbone's fingerprint, which is the moving average's too."""
        return {"fingerprint": saving.fingerprint_of(self.model)}

    def get_checkpoint_state(
        self, ema: bool = False, unwrap_fn: Callable[..., nn.Module] = unwrap_model
    ) -> dict[str, Any]:
        """timm's entries of a checkpoint, without the frozen backbone."""
        saved = set(saving.saved_names(self.model))
        state = super().get_checkpoint_state(ema, unwrap_fn)
        for key in state.keys() & {"state_dict", "state_dict_ema"}:
            state[key] = {name: value for name, value in state[key].items() if name in saved}
        return state

    def load_checkpoint_state(
        self,
        state_dict: dict[str, torch.Tensor],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Load :meth:`get_checkpoint_state`, or all of a model's parameters.

        Raises:
            ValueError: the frozen weights are not those of the training.
            RuntimeError: parameters are missing or unknown.
        """
        if task_state is not None:
            saving.check_fingerprint(self.model, task_state["fingerprint"])
            saved = set(saving.saved_names(self.model))
            frozen = {n: v for n, v in self.model.state_dict().items() if n not in saved}
            state_dict = {**frozen, **state_dict}
        super().load_checkpoint_state(state_dict, task_state, ema, strict)
