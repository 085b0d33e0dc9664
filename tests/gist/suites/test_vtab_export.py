"""gist vtab export: the layout, without loss, without duplicates, from every kind of source."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist import cli
from gist.data import ImageData
from gist.data.mnist import Digits
from gist.suites.tasks import VTAB_1K
from gist.suites.vtab_check import check
from gist.suites.vtab_export import export, torchvision_data
from gist.suites.vtab_layout import load_task

(TASK,) = VTAB_1K.choose(["kitti"])  # four classes
COUNTS = {"train800": 8, "val200": 4, "train800val200": 12}


def digits(count: int, seed: int, size: int = 4) -> Digits:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
    return Digits(pixels, (np.arange(count) % 4).tolist())


def contents(split) -> list[bytes]:
    return [split[i][0].tobytes() + bytes([split[i][1]]) for i in range(len(split))]


def exported(root: Path, source, **options):
    counts = export(source, root / TASK.name, train=8, val=4, **options)
    found = check(root, TASK, counts=COUNTS)
    assert (found.faults, found.warnings) == ([], [])
    assert counts == found.images
    return load_task(root, TASK)


def test_a_pool_is_split_and_nothing_is_lost(tmp_path):
    pool = digits(20, seed=1)
    stages = exported(tmp_path / "a", (pool, None))
    written = contents(stages.final.train) + contents(stages.final.test)
    assert sorted(written) == sorted(contents(pool))
    assert sorted(stages.select.train.labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(stages.select.val.labels) == [0, 1, 2, 3]
    assert {path.suffix for path, _ in stages.final.test.samples} == {".png"}
    again = exported(tmp_path / "b", (pool, None))
    assert again.final.fingerprint == stages.final.fingerprint
    other = exported(tmp_path / "c", (pool, None), seed=1)
    assert other.final.fingerprint != stages.final.fingerprint
    assert len(exported(tmp_path / "d", (pool, None), test=3).final.test) == 3


def test_a_fixed_test_set_stays_one_and_is_never_trained_on(tmp_path):
    pool, test = digits(20, seed=1), digits(6, seed=2)
    pool.pixels[5] = test.pixels[1]  # with its label, 1
    pool.pixels[7] = pool.pixels[3]  # twice in the pool, label 3
    pool.pixels[9] = pool.pixels[10]  # with two labels
    stages = exported(tmp_path, (pool, test))
    assert sorted(contents(stages.final.test)) == sorted(contents(test))
    used = contents(stages.final.train)
    assert len(set(used)) == 12
    assert not {pool.pixels[i].tobytes() for i in (5, 9)} & {
        np.asarray(stages.final.train[i][0])[..., 0].tobytes() for i in range(12)
    }
    assert len(exported(tmp_path / "some", (pool, test), test=4).final.test) == 4


def test_an_image_data_gives_its_train_and_val_as_the_pool(tmp_path):
    data = ImageData("d", tuple("abcd"), digits(9, 1), digits(8, 2), digits(5, 3), "")
    stages = exported(tmp_path / "a", data)
    assert set(contents(stages.final.train)) <= {*contents(data.train), *contents(data.val)}
    assert sorted(contents(stages.final.test)) == sorted(contents(data.test))
    stages = exported(tmp_path / "b", replace(data, test=None))
    assert len(stages.final.test) == 5  # what is left of 17


def test_nothing_is_overwritten_nor_left_half_done(tmp_path, monkeypatch):
    out = tmp_path / TASK.name
    with pytest.raises(ValueError, match="12 images are too few for 13"):
        export((digits(12, 1), None), out, train=8, val=4)
    assert list(tmp_path.iterdir()) == []
    saves = []

    def full(self, path, **options):
        saves.append(path)
        if len(saves) == 9:
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        export((digits(20, 1), None), out, train=8, val=4)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists already; nothing is overwritten"):
        export((digits(20, 1), None), out, train=8, val=4)
    assert list(out.iterdir()) == []


def test_a_folder_of_images_by_the_command(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name, count in (("cats", 700), ("dogs and more", 400)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(
                tmp_path / "photos" / name / f"{index}.png"
            )
    (camelyon,) = VTAB_1K.choose(["patch_camelyon"])
    out = tmp_path / "vtab" / camelyon.name
    command = ["vtab", "export", str(tmp_path / "photos"), str(out)]
    assert cli.main(command) == 0
    assert "train800 800, val200 200, train800val200 1,000, test 100" in " ".join(
        capsys.readouterr().out.split()
    )
    assert check(out.parent, camelyon).faults == []
    labels = load_task(out.parent, camelyon).final.test.labels
    assert abs(sum(labels) - 100 * 400 / 1100) < 1
    assert cli.main(command) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_with_a_train_flag(tmp_path):
    parts = {"train": digits(20, 1, size=28), "t10k": digits(6, 2, size=28)}
    for name, data in parts.items():
        raw = tmp_path / "data" / "MNIST" / "raw"
        idx(raw / f"{name}-images-idx3-ubyte", data.pixels)
        idx(raw / f"{name}-labels-idx1-ubyte", np.array(data.labels))
    stages = exported(tmp_path / "out", torchvision_data("MNIST", tmp_path / "data"))
    assert sorted(contents(stages.final.test)) == sorted(contents(parts["t10k"]))
    assert set(contents(stages.final.train)) <= set(contents(parts["train"]))


def test_torchvision_with_named_splits(tmp_path):
    data, root = digits(26, 1), tmp_path / "data" / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index in range(26):
        name = f"class{data.labels[index]}/{index}.png"
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        data[index][0].save(root / "images" / name)
        lists["train" if index < 20 else "test"].append(name)
    for split, names in lists.items():
        (root / "labels" / f"{split}1.txt").write_text("\n".join(names))
    stages = exported(tmp_path / "out", torchvision_data("DTD", tmp_path / "data"))
    assert sorted(contents(stages.final.test)) == sorted(contents(data)[20:])


def test_torchvision_without_splits(tmp_path):
    data = digits(20, 1)
    for index in range(20):
        file = tmp_path / "data/eurosat/2750" / f"class{data.labels[index]}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        data[index][0].save(file)
    stages = exported(tmp_path / "out", torchvision_data("EuroSAT", tmp_path / "data"))
    written = contents(stages.final.train) + contents(stages.final.test)
    assert sorted(written) == sorted(contents(data))


def test_torchvision_names_and_files_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"'CIFAR1000' is not known; did you mean 'CIFAR10"):
        torchvision_data("CIFAR1000", tmp_path)
    with pytest.raises(RuntimeError, match="not found"):
        torchvision_data("CIFAR100", tmp_path)
