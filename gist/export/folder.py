"""The folder of an export: the model, what prepares its images, and the check against the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gist.data import ImageData, Transforms, load_data
from gist.data.base import DataError, Images, Transformed
from gist.export import classify
from gist.export.formats import FORMATS, Exported
from gist.files import naming, new_folder, to_json
from gist.model.saving import CONFIG_FILE
from gist.model.wrapped import GistModel
from gist.runs.card import code
from gist.runs.run import load_run, read_results, transforms_of
from gist.validate import check_choice, check_count

LIMIT = 1e-3
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
BATCH_SIZE = 32


class Check(NamedTuple):
    """An export's logits beside the run's, on the same images.

    Attributes:
        split: "test", or "val" where the run's data has no test images.
        images: compared.
        of: images in the split.
        difference: largest absolute difference of two logits.
        largest: largest absolute logit of the run's.
        agreeing: images with the same class from both.
    """

    split: str
    images: int
    of: int
    difference: float
    largest: float
    agreeing: int

    def __str__(self) -> str:
        return (
            f"{self.images:,} of {self.of:,} {self.split} images: logits differ by at most "
            f"{self.difference:.2g} (largest logit {self.largest:.3g}), same class for "
            f"{self.agreeing:,} of {self.images:,}"
        )


def export_run(
    run: Path, format: str, out: Path, *, data: str | None = None, images: int = 256
) -> Check:
    """Write a finished run's model as a folder that runs without gist, and check it on images.

    The folder gets the model, ``preprocessing.json`` (the recorded transform and the classes),
    ``classify.py``, which uses both, and ``README.md``. The model is loaded again from the folder
    as ``classify.py`` loads it. Everything runs on the CPU, in float32.

    Args:
        run: the folder of a finished run on images.
        format: "onnx", "exported" (``torch.export``) or "timm".
        out: a new folder. It appears only after the check.
        data: what to check on, as :func:`gist.data.load_data` takes it; default: the run's.
        images: how many to check on at most: test images, else validation images, evenly spaced.

    Raises:
        FileNotFoundError: ``run`` holds no finished run.
        FileExistsError: ``out`` exists.
        ValueError: an unknown format; a run on texts; a transform or a model that the format can't
            hold; data without test and validation images.
        DataError: an image that can't be read.
        ImportError: a package of the format is missing; the text names the extra that brings it.
        ArithmeticError: a logit differs by more than :data:`LIMIT` of the largest.
        OSError: a file can't be written; the text names it.
    """
    check_choice("format", format, tuple(FORMATS))
    check_count("images", images)
    results = read_results(run)
    if results is not None and "normalisation" not in results:
        raise ValueError(f"{run} is no run on images; gist export takes those only")
    transforms = transforms_of(run)
    classes = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))["classes"]
    settings = preprocessing(transforms, classes)
    with new_folder(out) as folder:
        assert results is not None  # transforms_of raises
        config = results["config"]
        model = load_run(run)
        write = FORMATS[format].prepare(Exported(model, config["model"], transforms, classes))
        # Unchecked: an image that is needed and can't be read is named when it is read.
        split, pool = _held_out(load_data(data or config["data"], check=False))
        pixels = _decoded(pool, transforms, images)
        write(folder)
        _write(folder / "preprocessing.json", to_json(settings))
        with naming(folder / "classify.py"):
            shutil.copyfile(classify.__file__, folder / "classify.py")
        check = _check(model, classify.load_model(folder), pixels, split, len(pool))
        if not check.difference <= LIMIT * check.largest:  # NaN is refused too
            raise ArithmeticError(
                f"nothing was written: the exported model is not the run's. {check}; the limit is "
                f"{LIMIT:g} of the largest logit"
            )
        _write(folder / "README.md", _readme(run, format, settings, check).encode())
    return check


def preprocessing(transforms: Transforms, classes: list[str]) -> dict[str, Any]:
    """What ``preprocessing.json`` holds: the evaluation transform in plain numbers.

    Raises:
        ValueError: a crop mode or an interpolation that ``classify.py`` lacks.
    """
    evaluation = transforms.evaluation
    check_choice("crop_mode", evaluation["crop_mode"], ("center", "squash"))
    check_choice("interpolation", evaluation["interpolation"], INTERPOLATIONS)
    size = transforms.img_size
    return {
        "size": size,
        "resize_to": int(size / evaluation["crop_pct"]),
        "keep_aspect": evaluation["crop_mode"] == "center",
        "interpolation": evaluation["interpolation"],
        "mean": evaluation["mean"],
        "std": evaluation["std"],
        "jpeg_least_side": transforms.least_side(),
        "classes": classes,
    }


def _held_out(data: ImageData) -> tuple[str, Images]:
    if data.test is not None:
        return "test", data.test
    if data.val is not None:
        return "val", data.val
    raise ValueError(f"{data.name} has neither test nor validation images to check an export on")


def _decoded(split: Images, transforms: Transforms, count: int) -> torch.Tensor:
    """Float (count, 3, S, S): evenly spaced images of a split, as the run evaluates them."""
    inputs = Transformed(split, transforms)
    count = min(count, len(inputs))
    try:
        return torch.stack([inputs[i * len(inputs) // count][0] for i in range(count)])
    except DataError as error:
        raise DataError(f"nothing was written: {error}") from error


@torch.no_grad()
def _check(
    model: GistModel,
    exported: Callable[[Any], Any],
    pixels: torch.Tensor,
    split: str,
    of: int,
) -> Check:
    """Compare both models. The first batch is of one image, so that another size is tried too."""
    batches = [b for b in (pixels[:1], *pixels[1:].split(BATCH_SIZE)) if len(b)]
    expected = torch.cat([model(batch) for batch in batches])
    found = torch.cat([torch.from_numpy(exported(batch.numpy())) for batch in batches])
    return Check(
        split,
        images=len(pixels),
        of=of,
        difference=float((found - expected).abs().max()),
        largest=float(expected.abs().max()),
        agreeing=int((found.argmax(1) == expected.argmax(1)).sum()),
    )


def _write(path: Path, content: bytes) -> None:
    with naming(path):
        path.write_bytes(content)


def _readme(run: Path, format: str, settings: Mapping[str, Any], check: Check) -> str:
    kind, size, classes = FORMATS[format], settings["size"], len(settings["classes"])
    return f"""# {code(run.resolve().name)} as {kind.title}

    pip install {kind.packages}
    python classify.py photo.jpg    # image, class, probability

In Python, in this folder:

```python
from classify import classify

for label, probability in classify(["photo.jpg"]):
    print(label, probability)
```

## Files

{kind.about}

- Input `images`: float32 (batch, 3, {size}, {size}), any batch size, prepared as
  `preprocessing.json` says: `resize_to` is the shorter side in pixels (both sides without
  `keep_aspect`), then the centre is cropped. Levels from 0 to 1 are normalised.
- Output `logits`: float32 (batch, {classes:,}), the class token's logits, before the softmax.
- `classify.py` prepares images, runs the model and takes the softmax.

## Check

{check}.
The limit was {LIMIT:g} of the largest logit. The export was loaded as `classify.py` loads it, on
the CPU.

## Limits

- Images with more than 8 bits a channel are refused.
- Every image gets one of the {classes:,} classes, whatever it shows.
- `README.md` of the run says what was trained on what, and how accurate it is.
"""
