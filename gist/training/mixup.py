"""Mixup and CutMix of a batch, for losses that take class probabilities."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target


class Mixup:
    """timm's Mixup: one draw a batch, images mixed with those of the batch in reverse.

    Of an odd number of images the last one is left as it is. Draws are NumPy's global ones.

    Args:
        mixup, cutmix: alpha of the Beta distribution the share is drawn from; 0 for off. With both
            on, each batch gets one of them, by a fair coin.
        num_classes: of the probabilities that come out.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        self.num_classes = num_classes
        # Smoothing is the loss's.
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
