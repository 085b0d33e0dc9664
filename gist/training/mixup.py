"""Mixup and CutMix of a batch, for losses that take class probabilities."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target


class Mixup:
    """timm's Mixup: one draw per batch, images mixed with the batch in reverse order.

    The last of an odd number of images stays as it is. NumPy's global generator makes the draws.

    Args:
        mixup, cutmix: alpha of the Beta distribution the share is drawn from; 0 for off. With both
            on, each batch gets one of them, by a fair coin.
        num_classes: number of classes in the returned probabilities.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        self.num_classes = num_classes
        # The loss does the smoothing.
        self._mix = TimmMixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(
        self, images: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) images, overwritten, and (B,) int64 classes, to images and (B, C)."""
        probabilities = mixup_target(target, self.num_classes)
        even = len(target) // 2 * 2
        if even:
            _, probabilities[:even] = self._mix(images[:even], target[:even])
        return images, probabilities
