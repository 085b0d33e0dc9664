"""Transforms of images: what each preset does and draws, and JPEGs decoded at a smaller size."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from gist.data import (
    PRESETS,
    Augmented,
    Draw,
    Preloaded,
    Transformed,
    Transforms,
    prepare,
    prepare_training,
)
from gist.data.folder import ImageFiles
from gist.data.images import decode
from gist.data.mnist import Digits

CONFIG = {
    "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bilinear",
    "crop_pct": 0.8, "crop_mode": "center",
}  # fmt: skip
MEAN, STD = (torch.tensor(CONFIG[key])[:, None, None] for key in ("mean", "std"))


class Pictures:
    """Images in memory, all of label 1."""

    def __init__(self, *images: Image.Image) -> None:
        self.images, self.labels = images, [1] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], 1


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    return noise(9, 7, seed).resize((width, height), Image.Resampling.BICUBIC)


def normalised(image: Image.Image) -> torch.Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def test_vtab_squeezes_to_a_square():
    image = noise(50, 30)
    found, label = Transformed(Pictures(image), Transforms.of("vtab", CONFIG, 16))[0]
    expected = normalised(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(found, expected)
    assert label == 1


@pytest.mark.parametrize("preset", ["none", "light", "strong"])
def test_evaluation_keeps_the_aspect_ratio_and_crops_the_centre(preset):
    image = noise(50, 30)
    found, _ = Transformed(Pictures(image), Transforms.of(preset, CONFIG, 16))[0]
    resized = image.resize((33, 20), Image.Resampling.BILINEAR)  # 16 / 0.8 on the shorter side
    expected = normalised(resized.crop((8, 2, 24, 18)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_recorded_rebuilds_the_transforms(preset):
    transforms = Transforms.of(preset, CONFIG, 16)
    recorded = json.loads(json.dumps(transforms.to_dict()))
    again = Transforms.from_dict(recorded)
    image = Pictures(noise(50, 30))
    expected = Transformed(image, transforms)[0][0]
    assert torch.equal(Transformed(image, again)[0][0], expected)
    # In a program without gist, timm alone does.
    torch.testing.assert_close(create_transform(**recorded["evaluation"])(image[0][0]), expected)
    assert again.img_size == 16
    if transforms.training is not None:
        draw = Draw(0, 3, 0)
        ours, theirs = (Augmented(image, t, seed=5)[draw][0] for t in (transforms, again))
        assert torch.equal(ours, theirs)


def test_presets_without_draws_are_held_in_memory():
    images = Pictures(noise(50, 30))
    for preset in ("vtab", "none"):
        train = prepare_training(images, Transforms.of(preset, CONFIG, 16), 0)
        assert isinstance(train, Preloaded)
    transforms = Transforms.of("light", CONFIG, 16)
    assert isinstance(prepare_training(images, transforms, 0), Augmented)
    assert isinstance(prepare(images, transforms), Preloaded)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="augment must be one of vtab, none, light, strong; it is"):
        Transforms.of("weak", CONFIG, 16)


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_an_item_depends_only_on_seed_and_draw(preset):
    images = Pictures(noise(50, 30), noise(40, 40, 1))
    transforms = Transforms.of(preset, CONFIG, 16)
    data = Augmented(images, transforms, seed=7)
    draws = [Draw(i, epoch, repeat) for i in (0, 1) for epoch in (1, 2) for repeat in (0, 1)]
    first = {draw: data[draw][0] for draw in draws}
    random.random(), np.random.random(), torch.rand(3)
    for draw in reversed(draws):
        assert torch.equal(data[draw][0], first[draw])
    found = [*first.values(), Augmented(images, transforms, seed=8)[draws[0]][0]]
    assert all(not torch.equal(a, b) for n, a in enumerate(found) for b in found[:n]), (
        "two draws gave the same image"
    )
    assert data[draws[0]][0].shape == (3, 16, 16)


def test_draws_leave_the_global_generators_as_they_were():
    data = Augmented(Pictures(noise(50, 30)), Transforms.of("strong", CONFIG, 16), seed=-1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for epoch in range(1, 9):
        data[Draw(0, epoch, 0)]
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


def test_training_images_are_cropped_and_flipped():
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[:] = np.arange(64)[None, :, None] * 4  # bright on the right
    training = Transforms.of("light", CONFIG, 16).training
    assert training is not None
    plain = Transforms.of("light", CONFIG, 16).evaluation
    transforms = Transforms("light", plain, {**training, "color_jitter": None})
    data = Augmented(Pictures(Image.fromarray(ramp)), transforms, seed=0)
    levels = torch.stack([(data[Draw(0, e, 0)][0] * STD + MEAN).mean((0, 1)) for e in range(200)])
    flipped = levels[:, 0] > levels[:, -1]
    assert 60 < flipped.sum() < 140
    # The crop's share of the width, from the slope; its height is up to 4/3 as large a share.
    width = (levels[:, -1] - levels[:, 0]).abs() * (255 / 4 / 64) * (16 / 15)
    assert 0.4 < width.min() < 0.65
    assert width.max() > 0.9


def test_strong_erases_a_quarter_of_the_images():
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    data = Augmented(Pictures(grey), Transforms.of("strong", CONFIG, 32), seed=0)
    # RandAugment of a grey image has few levels, erased pixels are normal noise.
    erased = [len(data[Draw(0, epoch, 0)][0].unique()) > 60 for epoch in range(200)]
    assert 30 < sum(erased) < 70


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [((800, 600), 75, (100, 75)), ((800, 600), 76, (200, 150)), ((800, 600), 151, (400, 300)),
     ((800, 600), 301, (800, 600)), ((60, 50), 200, (60, 50)), ((81, 65), 16, (21, 17))],
)  # fmt: skip
def test_a_jpeg_is_decoded_at_the_smallest_size_that_does(size, least, expected):
    assert decode(jpeg(smooth(*size)), least).size == expected
    assert decode(jpeg(smooth(*size))).size == size


def test_a_smaller_jpeg_is_upright_too_and_other_formats_are_whole():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    assert decode(jpeg(smooth(800, 600), exif=exif), 75).size == (75, 100)
    assert decode(jpeg(smooth(800, 600).convert("CMYK")), 75).size == (100, 75)
    buffer = io.BytesIO()
    smooth(80, 60).save(buffer, "PNG")
    assert decode(buffer.getvalue(), 10).size == (80, 60)


def test_a_cut_jpeg_is_a_fault_at_any_size():
    data = jpeg(noise(400, 300))
    for least in (1, 100, None):
        with pytest.raises(OSError, match="truncated"):
            decode(data[: len(data) // 2], least)


def test_sides_that_decoded_images_need():
    light, strong = (Transforms.of(name, CONFIG, 100) for name in ("light", "strong"))
    assert light.least_side() == strong.least_side() == 250  # 2 * 100 / 0.8
    assert light.least_side(training=True) == 200
    assert strong.least_side(training=True) == 354  # 100 / sqrt(0.08): the smallest crop
    assert Transforms.of("vtab", CONFIG, 100).least_side() is None


@pytest.fixture
def photo(tmp_path: Path) -> ImageFiles:
    (tmp_path / "x.jpg").write_bytes(jpeg(smooth(1600, 1200, seed=3)))
    return ImageFiles([(tmp_path / "x.jpg", 0)])


def test_a_photo_far_larger_than_needed_is_reduced_with_almost_the_same_pixels(photo):
    transforms = Transforms.of("none", CONFIG, 64)
    data = Transformed(photo, transforms)
    assert data.split[0][0].size == (400, 300)  # half that were too few for 160
    whole = Transformed(photo, Transforms("none", transforms.evaluation, reduced=False))
    assert whole.split[0][0].size == (1600, 1200)
    found, expected = (d.pixels(0)[0].float() for d in (data, whole))
    assert (found - expected).abs().max() <= 3  # of 255 levels
    assert photo[0][0].size == (1600, 1200)


def test_vtabs_pixels_are_those_of_the_whole_photo(photo):
    found = Transformed(photo, Transforms.of("vtab", CONFIG, 64)).pixels(0)[0]
    expected = photo[0][0].resize((64, 64), Image.Resampling.BICUBIC)
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_images_in_memory_have_no_smaller_size():
    digits = Digits(np.zeros((2, 28, 28), np.uint8), [0, 1])
    assert Transformed(digits, Transforms.of("none", CONFIG, 8)).split is digits
