"""A wrapped model's evaluation graph, as ``torch.jit.script`` takes it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import gist_kernels


class Scripted(nn.Module):
    """(B, 3, H, W) images to the (B, C) logits of a model in evaluation mode.

    TorchScript can't compile hooks of other modules, so the graph is a trace. It raises where a
    trace would be wrong: in training mode, and for images of another size.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int, int]) -> None:
        super().__init__()
        like = next(model.parameters())
        images = torch.zeros(2, *size, device=like.device, dtype=like.dtype)
        reference: Any = gist_kernels.use_backend("reference")
        with torch.no_grad(), reference, warnings.catch_warnings():
            # They warn of sizes that become constants: all but the batch's, see forward.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            self.traced = torch.jit.trace(model, images, check_trace=False)
        self.channels, self.height, self.width = size
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("this graph is of evaluation mode; train the model it was made from")
        if [self.channels, self.height, self.width] != list(images.shape[1:]):
            raise RuntimeError("this graph is of another image size; script the model for this one")
        return self.traced(images)
