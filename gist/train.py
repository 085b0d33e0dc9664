"""One training: fit a wrapped model's trainables, keep the epoch that validates best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, Dataset

from gist.loss import GistLoss
from gist.model import GistModel

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, linear warm-up, cosine to ``min_lr``, stepped every batch.

    Args:
        epochs: passes over the training images.
        batch_size: images a step; the last, smaller batch of an epoch is used too.
        lr: peak learning rate.
        weight_decay: decoupled; not applied to biases, norms and the Gist token.
        warmup_epochs: from ``warmup_lr`` up to ``lr``; may be a fraction.
        warmup_lr, min_lr: where the schedule starts and ends.
        precision: "fp32", or "bf16" for autocast.
        seed: of initialisation, order and dropout.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: float = 2.0
    warmup_lr: float = 1e-7
    min_lr: float = 1e-8
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; it is {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number, at least 0; it is {value}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy in [0, 1] and mean cross-entropy of the class token's logits."""

    accuracy: float
    loss: float
    images: int
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """What one finished epoch measured."""

    epoch: int
    train_loss: float
    val_accuracy: float
    val_loss: float
    train_seconds: float


@dataclass
class FitResult:
    """The course of a training. The model then holds the trainables of ``best_epoch``."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int | None = None
    images_per_second: float = math.nan
    """Training throughput: images seen over the seconds spent in training steps."""
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    model: GistModel,
    train: Dataset[Any],
    val: Dataset[Any],
    config: TrainConfig,
    *,
    loss: GistLoss | None = None,
    workers: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> FitResult:
    """Train what :func:`gist.wrap` left trainable and keep the best epoch on ``val``.

    Args:
        model: on the device to train on.
        train, val: items are a float (3, H, W) image, normalised, and an int class.
        config: the schedule.
        loss: default :class:`gist.GistLoss` with the published weights.
        workers: loader processes.
        on_step: called with the step's number from 1 and its loss.
        on_epoch: called with each finished epoch.

    Returns:
        The history. Ctrl-C ends the training early with ``interrupted`` set and the best finished
        epoch kept.

    Raises:
        FloatingPointError: the loss is not finite; it names the step.
    """
    device = next(model.parameters()).device
    loss = loss if loss is not None else GistLoss()
    torch.manual_seed(config.seed)
    loader = DataLoader(
        train,
        batch_size=config.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(config.seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * len(loader)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=config.min_lr,
        warmup_t=min(round(config.warmup_epochs * len(loader)), steps - 1),
        warmup_lr_init=config.warmup_lr,
        t_in_epochs=False,
    )
    half = PRECISIONS[config.precision]

    result, best, best_state, step = FitResult(), (-1.0, -math.inf), None, 0
    images_seen, seconds = 0, 0.0
    try:
        for epoch in range(1, config.epochs + 1):
            model.train()
            start, total = time.perf_counter(), 0.0
            epoch_images = 0
            for images, target in loader:
                schedule.step_update(step)
                images, target = images.to(device, non_blocking=True), target.to(device)
                with torch.autocast(device.type, half, enabled=half is not None):
                    value = loss(model(images), target)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                step += 1
                current = value.item()
                if not math.isfinite(current):
                    raise FloatingPointError(
                        f"the loss is {current} at step {step} (epoch {epoch}); "
                        "lower the learning rate"
                    )
                total += current * len(target)
                epoch_images += len(target)
                if on_step is not None:
                    on_step(step, current)
            elapsed = time.perf_counter() - start
            images_seen, seconds = images_seen + epoch_images, seconds + elapsed
            measured = evaluate(model, val, batch_size=config.batch_size, workers=workers)
            finished = Epoch(epoch, total / epoch_images, measured.accuracy, measured.loss, elapsed)
            result.history.append(finished)
            result.images_per_second = images_seen / seconds
            if (measured.accuracy, -measured.loss) > best:
                best, result.best_epoch = (measured.accuracy, -measured.loss), epoch
                best_state = {k: v.clone() for k, v in model.trainable_state_dict().items()}
            if on_epoch is not None:
                on_epoch(finished)
    except KeyboardInterrupt:
        result.interrupted = True
    if best_state is not None:
        model.load_state_dict(best_state, strict=False)
    return result


@torch.no_grad()
def evaluate(
    model: GistModel, data: Dataset[Any], *, batch_size: int = 32, workers: int = 0
) -> Evaluation:
    """Accuracy and cross-entropy over every item of ``data`` once; leaves ``model`` in eval."""
    model.eval()
    device = next(model.parameters()).device
    correct, total, count = 0, 0.0, 0
    start = time.perf_counter()
    for images, target in DataLoader(data, batch_size=batch_size, num_workers=workers):
        target = target.to(device)
        logits = model(images.to(device)).float()
        correct += int((logits.argmax(1) == target).sum())
        total += F.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
    return Evaluation(correct / count, total / count, count, count / (time.perf_counter() - start))
