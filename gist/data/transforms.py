"""How images become a model's input: presets of timm's transforms, recorded with each run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from gist.validate import check_choice

# A large JPEG is decoded with at least this multiple of the pixels a side that are kept of it.
OVERSAMPLING = 2

# What each preset that augments adds to the backbone's own arguments of create_transform.
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "light": {"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.2},
    "strong": {
        "scale": [0.08, 1.0],
        "hflip": 0.5,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
    },
}
PRESETS = ("vtab", "none", *_AUGMENTATION)


@dataclass(frozen=True)
class Transforms:
    """The transforms of a run's images, as its ``results.json`` records them.

    Both mappings are arguments of timm's ``create_transform``, which rebuilds the transform.

    Args:
        preset: one of :data:`PRESETS`, from which they were made.
        evaluation: resize, crop and normalisation.
        training: the same for training images, drawn at random; None: as in evaluation.
        reduced: decode a JPEG that is far larger than needed at a half, a quarter or an eighth of
            its size.
    """

    preset: str
    evaluation: Mapping[str, Any]
    training: Mapping[str, Any] | None = None
    reduced: bool = True

    @classmethod
    def of(cls, preset: str, data_config: Mapping[str, Any], img_size: int) -> Transforms:
        """The transforms of a preset for a backbone.

        "vtab" resizes each image straight to a square, bicubic, without crop or augmentation.
        "none" keeps the aspect ratio: it resizes and crops the centre, as the backbone's own
        evaluation does. "light" trains on random resized crops of 35 to 100 % of the area, flips
        and mild colour jitter. "strong" trains on crops of 8 to 100 %, flips, RandAugment
        (arXiv:1909.13719) of magnitude 9 and random erasing (arXiv:1708.04896). Both evaluate as
        "none".

        Args:
            preset: one of :data:`PRESETS`.
            data_config: of the backbone, as timm's ``resolve_model_data_config`` returns it.
                "vtab" needs only ``mean`` and ``std``.
            img_size: side of the square input in pixels.

        Raises:
            ValueError: no such preset.
        """
        check_choice("augment", preset, PRESETS)
        common: dict[str, Any] = {
            "input_size": [3, img_size, img_size],
            "mean": list(data_config["mean"]),
            "std": list(data_config["std"]),
        }
        if preset == "vtab":
            squeeze = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
            return cls(preset, {**common, **squeeze}, reduced=False)
        common["interpolation"] = data_config["interpolation"]
        crop = {key: data_config[key] for key in ("crop_pct", "crop_mode")}
        training = None
        if preset in _AUGMENTATION:
            training = {**common, "color_jitter": None, **_AUGMENTATION[preset]}
        return cls(preset, {**common, **crop}, training)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Transforms:
        """The transforms that :meth:`to_dict` described."""
        return cls(**described)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def img_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.evaluation["input_size"][-1])

    def for_evaluation(self) -> Callable[[Image.Image], torch.Tensor]:
        """From an RGB image to uint8 (3, img_size, img_size), which :meth:`normalise` takes."""
        transform: Callable[[Image.Image], torch.Tensor] = create_transform(
            **self.evaluation, normalize=False
        )
        return transform

    def for_training(self) -> Callable[[Image.Image], torch.Tensor]:
        """From an RGB image to normalised float (3, img_size, img_size).

        The global generators of Python, NumPy and PyTorch make the draws.
        """
        assert self.training is not None, "nothing is drawn at random"
        transform: Callable[[Image.Image], torch.Tensor] = create_transform(
            **self.training, is_training=True
        )
        return transform

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """From uint8 levels to the backbone's float input, (..., 3, H, W) each."""
        mean, std = (torch.tensor(self.evaluation[key])[:, None, None] for key in ("mean", "std"))
        return (pixels.float() / 255 - mean) / std

    def least_side(self, *, training: bool = False) -> int | None:
        """Pixels that the shorter side of a decoded image must have; None: decode it in full.

        It is :data:`OVERSAMPLING` times the size that the whole image is resized to. A smallest
        crop keeps at least as many pixels as the input has.
        """
        if not self.reduced:
            return None
        if training and self.training is not None:
            smallest_crop = self.img_size / math.sqrt(self.training["scale"][0])
            return math.ceil(max(OVERSAMPLING * self.img_size, smallest_crop))
        return math.ceil(OVERSAMPLING * self.img_size / self.evaluation["crop_pct"])


@contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """Inside, the global CPU generators draw from a seed; afterwards they are as before.

    Args:
        key: non-negative integers, which are hashed into the seeds.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(list(key)).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    # torch.manual_seed would seed the GPUs' generators too.
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
