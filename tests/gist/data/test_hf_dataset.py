"""Folders that Hugging Face's datasets saved."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist.data import DataError, Transformed, Transforms, load_data, prepare
from gist.data.hf_dataset import SavedImages, is_saved_dataset


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="which is missing: pip install datasets"):
        load_data(str(tmp_path))
    assert not is_saved_dataset(tmp_path.parent)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def rows(datasets, tmp_path: Path, count: int, first: int = 0, **columns):
    """PNGs of one grey level each, in two classes."""
    files = []
    for index in range(first, first + count):
        file = tmp_path / "files" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(file)
        files.append(str(file))
    columns = columns or {"label": [index % 2 for index in range(count)]}
    return datasets.Dataset.from_dict({"image": files, **columns}).cast_column(
        "image", datasets.Image()
    )


def levels(split) -> list[tuple[int, int]]:
    return [(split[i][0].getpixel((0, 0))[0], split[i][1]) for i in range(len(split))]


def test_a_dict_of_splits(datasets, tmp_path):
    parts = {"train": rows(datasets, tmp_path, 4), "validation": rows(datasets, tmp_path, 3, 20)}
    saved = datasets.DatasetDict(parts).cast_column("label", datasets.ClassLabel(names=["b", "a"]))
    saved.save_to_disk(str(tmp_path / "my set"))
    data = load_data(str(tmp_path / "my set"))
    assert (data.name, data.classes, data.test) == ("my set", ("b", "a"), None)
    assert levels(data.train) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert levels(data.val) == [(20, 0), (21, 1), (22, 0)]
    again = load_data(str(tmp_path / "my set"))
    assert again.fingerprint == data.fingerprint
    unread = load_data(str(tmp_path / "my set"), check=False)
    assert unread.fingerprint.startswith("unread-")


def test_one_split_is_split_and_words_are_classes(datasets, tmp_path):
    saved = rows(datasets, tmp_path, 10, labels=["ox", "cat"] * 5)
    saved.save_to_disk(str(tmp_path / "set"))
    data = load_data(str(tmp_path / "set"))
    assert data.classes == ("cat", "ox")
    assert (len(data.train), len(data.val)) == (8, 2)
    assert sorted(levels(data.train) + levels(data.val)) == [(i, 1 - i % 2) for i in range(10)]
    pixels, _ = prepare(data.val, Transforms.of("vtab", {"mean": [0] * 3, "std": [1] * 3}, 4))[0]
    assert pixels.shape == (3, 4, 4)


def test_large_jpegs_are_reduced_here_too(datasets, tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "x.jpg")
    saved = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.jpg")]})
    saved = saved.cast_column("image", datasets.Image(decode=False))
    images = SavedImages(saved, "image", [0], "train")
    config = {"mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic", "crop_pct": 1.0,
              "crop_mode": "center"}  # fmt: skip
    assert Transformed(images, Transforms.of("none", config, 16)).split[0][0].size == (50, 38)


def test_faults_are_named(datasets, tmp_path):
    def fault(saved, name: str) -> str:
        folder = str(tmp_path / name)
        saved.save_to_disk(folder)
        with pytest.raises(DataError) as error:
            load_data(folder)
        return str(error.value)

    assert "one column of type ClassLabel, or named label; it has 0. Its columns are image" in (
        fault(rows(datasets, tmp_path, 2, kind=[0, 1]), "unlabelled")
    )
    image = rows(datasets, tmp_path, 4)
    both = datasets.DatasetDict(train=image, extra=image)
    assert "has the splits train, extra; train is needed" in fault(both, "extra")
    assert "has 1 classes; at least 2" in fault(rows(datasets, tmp_path, 4, label=[1] * 4), "one")


def test_an_unreadable_row_is_named(datasets, tmp_path):
    saved = rows(datasets, tmp_path, 4)
    broken = saved.cast_column("image", datasets.Image(decode=False)).map(
        lambda row, index: {"image": {"bytes": b"no image" if index == 2 else row["image"]["bytes"],
                                      "path": row["image"]["path"]}}, with_indices=True,
    )  # fmt: skip
    parts = datasets.DatasetDict(
        train=broken.cast_column("image", datasets.Image()), val=rows(datasets, tmp_path, 2, 9)
    )
    parts.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"set, train, row 2 can't be read: cannot identify"):
        load_data(str(tmp_path / "set"))
