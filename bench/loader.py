"""Images per second of gist's data loader, against a training step on images in memory.

Every call goes through the same number of images. The loaders take them in the order and the
batches of a training. The step is forward, backward and optimiser, on one batch again and again.
Data loading keeps up if the step takes longest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Dataset

import gist
from bench.measure import Call, Case, mismatch
from gist.data import Transformed, Transforms, load_folder, prepare
from gist.training.batches import BatchSampler

# Model, side in pixels, batch size, batches a call.
SIZES = {
    "cpu": (("vit_small_patch14_dinov2", 56, 32, 2), ("vit_small_patch14_dinov2", 224, 8, 2)),
    "cuda": (("vit_small_patch14_dinov2", 56, 64, 16), ("vit_base_patch16_224", 224, 64, 8)),
}
CLASSES = 2
JPEG_SIZE = (500, 375)


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, side, batch_size, batches in SIZES[device.type]:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), batch_size * batches)
            yield case(Path(folder), name, side, batch_size, dtype, device)


def write_images(folder: Path, images: int) -> None:
    """Write training images, and one validation image per class: JPEGs as smooth as photographs."""
    random = np.random.default_rng(0)
    for index in range(images + CLASSES):
        split = "train" if index < images else "val"
        place = folder / split / str(index % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        coarse.resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(place / f"{index}.jpg")


def case(
    folder: Path,
    name: str,
    side: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """The case of a folder that :func:`write_images` has filled with whole batches."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES, img_size=side).to(device, dtype)
    config = resolve_model_data_config(backbone)
    images = load_folder(folder, check=False).train
    transforms = Transforms.of("vtab", config, side)
    files, in_memory = Transformed(images, transforms), prepare(images, transforms)

    def loading(data: Dataset, workers: int) -> Call:
        order = BatchSampler(len(images), batch_size, seed=0)
        loader = DataLoader(
            data,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        epochs = count(1)

        def epoch() -> torch.Tensor:
            order.start(next(epochs))
            for pixels, target in loader:
                loaded = pixels.to(device, non_blocking=True)
                target.to(device, non_blocking=True)
            return loaded

        return epoch

    model = gist.wrap(backbone).train()
    loss = gist.GistLoss()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=1e-4)
    pixels = torch.stack([in_memory[index][0] for index in range(batch_size)]).to(device, dtype)
    target = torch.arange(batch_size, device=device) % CLASSES

    def steps() -> None:
        for _ in range(len(images) // batch_size):
            optimizer.zero_grad()
            loss(model(pixels), target).backward()
            optimizer.step()

    def parity() -> str | None:
        ours, theirs = loading(in_memory, 0)(), loading(files, 0)()
        return mismatch({"images": (ours, theirs)}, relative=0.0)

    return Case(
        sizes={"B": batch_size, "px": side},
        dtype=dtype,
        calls={
            "loader, in memory": loading(in_memory, 0),
            "loader, files": loading(files, 0),
            "loader, files, 2 workers": loading(files, 2),
            "training step": steps,
        },
        parity=parity,
        images=len(images),
    )
