"""How to train: the settings of one training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.optim import get_optimizer_info, list_optimizers

from gist.validate import (
    check_at_least,
    check_between,
    check_choice,
    check_known,
    check_non_negative,
    check_rate,
)

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}
"""Each with the dtype of autocast."""
_FOR_IMAGES = {
    "mixup": "token ids can't be mixed",
    "cutmix": "token ids can't be mixed",
    "cuda_graph": "the batches of a text training differ in length",
}


@dataclass(frozen=True)
class TrainConfig:
    """A timm optimiser, linear warm-up, cosine to ``min_lr``, stepped every batch.

    Args:
        epochs: passes over the training images; the schedule's length.
        stop_after: the epoch of that schedule to end after; 0 for its last.
        patience: epochs in a row without a better validation accuracy that end the training; 0 for
            any number. The schedule stays that of ``epochs``.
        batch_size: images a step, over all processes and parts; the last, smaller batch of an
            epoch is used too.
        lr: peak learning rate.
        head_lr: the classifier's own peak; None for ``lr``. Its warm-up and cosine begin and end
            where those of ``lr`` do.
        weight_decay: decoupled; not applied to biases, norms and the Gist token.
        warmup_epochs: from ``warmup_lr`` up to ``lr``; may be a fraction.
        warmup_lr: where the warm-up starts.
        min_lr: where the cosine ends.
        precision: "fp32"; "tf32" for float32 whose matmuls a GPU rounds to TF32, 10 bits of
            mantissa; or "bf16" for autocast.
        seed: of initialisation, order, dropout and mixing.
        optimizer: a first-order one, as timm's ``create_optimizer_v2`` knows it. Those of Apex and
            bitsandbytes need a GPU and their library.
        accumulate: parts that each process computes its images of a batch in, one after the other:
            less memory, the same step but for rounding and random draws.
        clip_grad_norm: largest 2-norm of all gradients together; 0 for any.
        label_smoothing: in [0, 1), of the cross-entropies.
        mixup, cutmix: alpha of the Beta distribution that shares are drawn from; 0 for off.
        kl_warmup_epochs: the loss's KL terms grow linearly from 0 over these; may be a fraction.
        cuda_graph: on a GPU and in one process, forward, loss and backward are captured in a CUDA
            graph once batches of a size have come some times, and replayed from then on: for steps
            whose launches take Python longer than the work takes the GPU. Not while the KL terms
            grow. A step that can't be captured is launched by Python, with a warning.
        ema: decay, a step, of the moving average of the trainables; 0 for off. Where it is on, the
            averages are what is evaluated and kept.
    """

    epochs: int = 20
    stop_after: int = 0
    patience: int = 0
    batch_size: int = 32
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 1e-4
    warmup_epochs: float = 2.0
    warmup_lr: float = 1e-7
    min_lr: float = 1e-8
    precision: str = "fp32"
    seed: int = 0
    optimizer: str = "adamw"
    accumulate: int = 1
    clip_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    kl_warmup_epochs: float = 0.0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("patience", self.patience, 0)
        for name in (
            "lr", "weight_decay", "warmup_epochs", "clip_grad_norm", "mixup", "cutmix",
            "kl_warmup_epochs",
        ):  # fmt: skip
            check_non_negative(name, getattr(self, name))
        if self.head_lr is not None:
            check_non_negative("head_lr", self.head_lr)
        check_between("stop_after", self.stop_after, 0, self.epochs, "epochs")
        for name in ("label_smoothing", "ema"):
            check_rate(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        names = [str(name) for name in list_optimizers()]
        check_known("optimizer", self.optimizer, names)
        if get_optimizer_info(self.optimizer).second_order:
            raise ValueError(
                f"optimizer {self.optimizer} is a second-order one: it needs second derivatives, "
                "which the kernels do not have; take a first-order one, such as adamw"
            )

    def check_text(self) -> None:
        """Raise a ValueError where a setting has no meaning for texts."""
        for name, reason in _FOR_IMAGES.items():
            if getattr(self, name):
                raise ValueError(f"{name} is for images: {reason}; leave it out")
