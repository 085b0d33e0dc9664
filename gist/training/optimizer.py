"""The optimizer of a training: timm's, with a learning rate of its own for the classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from gist.model.wrapped import GistModel
from gist.training.config import TrainConfig


def create_optimizer(model: GistModel, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer of what the model trains, at ``config.lr`` and ``config.head_lr``.

    Each parameter group has its peak learning rate, which a scheduler of timm's takes as its own.

    Raises:
        ValueError: the optimizer needs a library or a device that is not here, or the model trains
            no classifier that ``head_lr`` could be for.
    """
    options: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.head_lr is not None:
        options = {"param_group_fn": partial(_groups, config=config)}
    try:
        return create_optimizer_v2(model, config.optimizer, lr=config.lr, **options)
    except (AssertionError, ImportError) as error:  # what timm raises without Apex, say
        raise ValueError(f"optimizer {config.optimizer} can't be used here: {error}") from error


def _groups(model: GistModel, config: TrainConfig) -> list[dict[str, Any]]:
    """timm's parameter groups, each split in two: the classifier's part comes last."""
    heads = {id(p) for p in model.head_parameters() if p.requires_grad}
    if not heads:
        raise ValueError(
            f"head_lr is {config.head_lr}, but the model trains no classifier; leave head_lr out"
        )
    groups = param_groups_weight_decay(
        model, config.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )

    def part(group: dict[str, Any], of_head: bool) -> dict[str, Any]:
        own = [p for p in group["params"] if (id(p) in heads) == of_head]
        return {**group, "params": own, "lr": config.head_lr if of_head else config.lr}

    parts = [part(group, of_head) for of_head in (False, True) for group in groups]
    return [group for group in parts if group["params"]]
