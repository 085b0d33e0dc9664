"""Cross-validation: disjoint, stratified folds, and what the command line makes of them."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist import cli
from gist.data import DataError, ImageData, folds
from gist.data.folder import ImageFiles
from gist.data.mnist import Digits
from gist.data.split import Joined, Part


def digits(labels: list[int], first: int = 0) -> Digits:
    pixels = np.arange(first, first + len(labels), dtype=np.uint8)[:, None, None]
    return Digits(np.broadcast_to(pixels, (len(labels), 2, 2)), labels)


def data(train: list[int], val: list[int] | None) -> ImageData:
    return ImageData(
        "x", ("a", "b"), digits(train), digits(val, len(train)) if val else None, None, "f"
    )


def levels(split) -> list[tuple[int, int]]:
    return [(split[i][0].getpixel((0, 0))[0], split[i][1]) for i in range(len(split))]


def test_each_image_tests_once_and_trains_in_all_other_folds():
    whole = data([0, 1, 1] * 7, [0, 0, 1])
    parts = folds(whole, 5)
    everything = sorted(levels(Joined(whole.train, whole.val)))
    assert sorted(pair for part in parts for pair in levels(part.test)) == everything
    for part in parts:
        assert sorted(levels(part.train) + levels(part.test)) == everything
        assert part.val is None
        assert list(part.test.labels) == [label for _, label in levels(part.test)]
        of_class = Counter(part.test.labels)  # 9 and 15 images over 5 folds
        assert of_class[0] in (1, 2, 3)
        assert of_class[1] in (2, 3, 4)
    assert sorted(len(part.test) for part in parts) == [4, 5, 5, 5, 5]
    assert len({part.fingerprint for part in parts}) == 5
    again = folds(whole, 5)
    assert [levels(part.test) for part in again] == [levels(part.test) for part in parts]


def test_too_few_images_and_folds_are_named():
    with pytest.raises(
        DataError, match=r"fewer images of a class than the 3 folds:\s+class 'b' has 2"
    ):
        folds(data([0, 0, 0, 1, 1], None), 3)
    with pytest.raises(ValueError, match="folds must be an integer of at least 2; it is 1"):
        folds(data([0, 1], None), 1)


def test_parts_of_files_are_reduced(tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "x.jpg")
    files = ImageFiles([(tmp_path / "x.jpg", 0)] * 2)
    both = Joined(Part(files, [1]), files)
    assert [both.reduced(37)[i][0].size for i in range(3)] == [(50, 38)] * 3
    assert both[0][0].size == (400, 300)


def test_folds_from_the_command_line(tmp_path: Path, capsys):
    random = np.random.default_rng(0)
    lines = ["path,label"]
    for index in range(9):
        name = f"{index}.png"
        Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / name)
        lines.append(f"{name},{'ab'[index % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    command = ["train", "--data", str(tmp_path / "labels.csv"), "--model", "test_vit", "--folds",
               "3", "--random-weights", "--img-size", "16", "--epochs", "1", "--warmup-epochs", "0",
               "--augment", "none", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = [json.loads((out / f"fold{n}" / "results.json").read_text()) for n in (1, 2, 3)]
    accuracies = [results["test"]["accuracy"] for results in found]
    assert [results["test"]["images"] for results in found] == [3, 3, 3]
    assert [results["fit"]["best_epoch"] for results in found] == [1, 1, 1]
    written = json.loads((out / "folds.json").read_text())
    assert written["accuracies"] == accuracies
    assert written["mean"] == pytest.approx(sum(accuracies) / 3)
    assert written["standard_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"3 folds: {mean:.2%} +- {deviation:.2%} (standard deviation)" in said
    assert (out / "curves.png").is_file()
