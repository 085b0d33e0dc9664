"""Images per second of gist's data loader, against a training step on images in memory.

Every call goes through the same number of images. The loaders take them in the order and the
batches of a training. The step is forward, backward and optimiser, on one batch again and again.
Data loading keeps up if the step takes longest.

The last case loads photos of 12 megapixels by two workers: augmented, or squeezed to a square as
by ``gist train --augment vtab``, which decodes them in full. Photos are mosaics of tiles of
scikit-learn's two photographs, at their own resolution. Each call loads the next ones of all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Dataset, Sampler

import gist
from bench.measure import Call, Case, mismatch
from gist.data import Augmented, Draw, Transformed, Transforms, load_folder, prepare
from gist.training.batches import BatchSampler

# Model, side in pixels, batch size, batches a call.
SIZES = {
    "cpu": (("vit_small_patch14_dinov2", 56, 32, 2), ("vit_small_patch14_dinov2", 224, 8, 2)),
    "cuda": (("vit_small_patch14_dinov2", 56, 64, 16), ("vit_base_patch16_224", 224, 64, 8)),
}
CLASSES = 2
JPEG_SIZE = (500, 375)
PHOTOS, PHOTO_SIZE, TILE = 500, (4000, 3000), (400, 300)
PHOTO_QUALITY = 90  # 3.8 MB a photo
PHOTO_BATCHES = 4  # a call
# Levels of 255 by which a reduced decode may change a pixel, on average.
REDUCED_LEVELS = 2.0


def absent(device: torch.device) -> dict[str, str]:
    if _photographs():
        return {}
    return {"photos": "they are made of scikit-learn's images: pip install scikit-learn"}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, side, batch_size, batches in SIZES[device.type]:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), batch_size * batches)
            yield case(Path(folder), name, side, batch_size, dtype, device)
    if _photographs():
        name, side, batch_size, _ = SIZES[device.type][-1]
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), PHOTOS)
            yield photo_case(Path(folder), name, side, batch_size, dtype, device)


def _photographs() -> list[Path]:
    """The photographs that scikit-learn has, if it is installed."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        return []
    return sorted(Path(found.origin).parent.glob("datasets/images/*.jpg"))


def write_photos(folder: Path, photos: int) -> None:
    """Write training images of :data:`PHOTO_SIZE`, and one validation image per class."""
    sources = [np.asarray(Image.open(file)) for file in _photographs()]

    def write(index: int) -> None:
        place = folder / ("train" if index < photos else "val") / str(index % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        photo = _mosaic(sources, np.random.default_rng(index))
        photo.save(place / f"{index:04d}.jpg", quality=PHOTO_QUALITY)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(photos + CLASSES)))


def _mosaic(sources: Sequence[np.ndarray[Any, Any]], random: np.random.Generator) -> Image.Image:
    (width, height), (tile_width, tile_height) = PHOTO_SIZE, TILE
    photo = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, tile_height):
        for left in range(0, width, tile_width):
            source = sources[random.integers(len(sources))]
            y = random.integers(source.shape[0] - tile_height)
            x = random.integers(source.shape[1] - tile_width)
            tile = source[y : y + tile_height, x : x + tile_width]
            photo[top : top + tile_height, left : left + tile_width] = tile
    return Image.fromarray(photo)


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

    pixels = torch.stack([in_memory[index][0] for index in range(batch_size)])

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
            "training step": _steps(backbone, pixels.to(device, dtype), len(images) // batch_size),
        },
        parity=parity,
        images=len(images),
        own=("loader, files", "loader, files, 2 workers"),
    )


def _steps(backbone: torch.nn.Module, pixels: torch.Tensor, count: int) -> Call:
    """``count`` training steps on one batch."""
    model = gist.wrap(backbone).train()
    loss = gist.GistLoss()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=1e-4)
    target = torch.arange(len(pixels), device=pixels.device) % CLASSES

    def steps() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss(model(pixels), target).backward()
            optimizer.step()

    return steps


def photo_case(
    folder: Path,
    name: str,
    side: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """The case of a folder that :func:`write_photos` has filled."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES, img_size=side).to(device, dtype)
    config = resolve_model_data_config(backbone)
    images = load_folder(folder, check=False).train
    light, vtab = (Transforms.of(preset, config, side) for preset in ("light", "vtab"))
    reduced = Transformed(images, light)
    whole = Transformed(images, Transforms("light", light.evaluation, reduced=False))
    pixels = torch.stack([reduced[index][0] for index in range(batch_size)]).to(device, dtype)

    def parity() -> str | None:
        error = max(
            (reduced.pixels(i)[0].float() - whole.pixels(i)[0].float()).abs().mean().item()
            for i in range(batch_size)
        )
        if error <= REDUCED_LEVELS:
            return None
        return f"pixels are off by {error:.2f} levels, where {REDUCED_LEVELS} are allowed"

    def loading(data: Dataset, *, draws: bool) -> Call:
        batches = _NextPhotos(len(images), batch_size, draws=draws)
        loader = DataLoader(
            data,
            batch_sampler=batches,
            num_workers=2,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

        def load() -> None:
            for pixels, target in loader:
                pixels.to(device, non_blocking=True)
                target.to(device, non_blocking=True)

        return load

    return Case(
        sizes={"B": batch_size, "px": side, "MP": PHOTO_SIZE[0] * PHOTO_SIZE[1] // 10**6},
        dtype=dtype,
        calls={
            "photos, light, 2 workers": loading(Augmented(images, light, seed=0), draws=True),
            "photos, squeezed, 2 workers": loading(Transformed(images, vtab), draws=False),
            "training step": _steps(backbone, pixels, PHOTO_BATCHES),
        },
        parity=parity,
        images=PHOTO_BATCHES * batch_size,
        own=("photos, squeezed, 2 workers",),
    )


class _NextPhotos(Sampler):
    """A call's batches: the next photos in turn, of all there are."""

    def __init__(self, photos: int, batch_size: int, *, draws: bool) -> None:
        self.batch_size = batch_size
        self._next = (
            Draw(number % photos, 1 + number // photos, 0) if draws else number % photos
            for number in count()
        )

    def __len__(self) -> int:
        return PHOTO_BATCHES

    def __iter__(self) -> Iterator[list[Any]]:
        for _ in range(PHOTO_BATCHES):
            yield [next(self._next) for _ in range(self.batch_size)]
