"""A batch as the model's call takes it: images as one tensor, texts as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Inputs = torch.Tensor | Mapping[str, torch.Tensor]


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs there; from pinned memory, without waiting."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model gives for a batch."""
    return model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs)
