"""Data sets of package registries: their splits on the real files, or on files made like them."""

from __future__ import annotations

import gzip
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from marks import slow_where
from PIL import Image

from gist import cli
from gist.data import ImageData, load_data
from gist.data.images import read_image
from gist.data.offline import SOURCES
from gist.data.offline_text import TEXT_SOURCES
from gist.data.split import distinct, pixel_digest, stratified
from gist.suites.tasks import OFFLINE

SIZES = {
    "mnist-1k": (10, 800, 200, 2000), "digits": (10, 800, 200, 797),
    "fashion-mnist-1k": (10, 800, 200, 2000), "openclipart-1k": (16, 800, 200, 2000),
    "tuxpaint-stamps": (8, 400, 100, None), "textile": (3, 800, 200, 1000),
    "emoji": (9, 800, 200, None),
}  # fmt: skip


def contents(data: ImageData) -> list[tuple[bytes, int]]:
    return [
        (pixel_digest(split[i][0]), split[i][1])
        for split in (data.train, data.val, data.test)
        for i in range(len(split))
    ]


def check_splits(data: ImageData, sizes: tuple[int, int, int, int | None]) -> None:
    """Sizes; no image twice; each class's share in each split; the same when loaded again."""
    classes, train, val, test = sizes
    assert (len(data.classes), len(data.train), len(data.val)) == (classes, train, val)
    if test is not None:
        assert len(data.test) == test
    seen = contents(data)
    assert len({digest for digest, _ in seen}) == len(seen)
    assert data.train[0][0].mode == "RGB"
    for split in (data.val, data.test):
        for label, count in Counter(data.train.labels).items():
            share = count / len(data.train)
            # At most one image off in each split: 1/800 of the training images' share.
            assert abs(split.labels.count(label) - share * len(split)) < 2 + len(split) / train
    again = load_data(data.name)
    assert again.fingerprint == data.fingerprint
    for split, same in ((data.train, again.train), (data.val, again.val), (data.test, again.test)):
        assert split.labels == same.labels


@pytest.mark.parametrize("name", slow_where(lambda name: name == "openclipart-1k", SIZES))
def test_a_data_set_that_is_here(name):
    if SOURCES[name].find() is None:
        pytest.skip(f"{name} is not here: {SOURCES[name].get}")
    data = load_data(name)
    assert data.name == name
    check_splits(data, SIZES[name])


def test_digits_are_the_same_for_everyone():
    pytest.importorskip("sklearn")
    assert load_data("digits").fingerprint == "26442d20411e48f4"


def test_the_suite_is_these():
    assert set(SIZES) == set(SOURCES) == {task.name for task in OFFLINE.tasks}


def picture(path: Path, random: np.random.Generator, size: int = 4, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255
    Image.fromarray(pixels.squeeze(), mode).save(path, compress_level=0)


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GIST_DATA", f"{tmp_path / 'none'}:{tmp_path}")
    return tmp_path


def test_emoji(packages):
    random, table = np.random.default_rng(0), []
    folder = packages / "emoji-datasource-google"
    categories = ["Component"] + [f"category {i}" for i in range(9)]
    for number in range(1200):
        name = f"{number:x}.png"
        picture(folder / "img/google/64" / name, random, mode="RGBA")
        table.append({"image": name, "category": categories[number % 10]})
    table.append({"image": "absent.png", "category": "category 1"})
    images = folder / "img" / "google" / "64"
    images.joinpath("15.png").write_bytes(images.joinpath("b.png").read_bytes())  # 21 and 11: once
    images.joinpath("16.png").write_bytes(images.joinpath("c.png").read_bytes())  # 22 and 12: once
    images.joinpath("17.png").write_bytes(images.joinpath("e.png").read_bytes())  # two labels
    (folder / "emoji.json").write_text(json.dumps(table))
    data = load_data("emoji")
    check_splits(data, (9, 800, 200, 1080 - 1000 - 4))
    assert "Component" not in data.classes
    assert pixel_digest(read_image(images / "e.png")) not in dict(contents(data))
    assert pixel_digest(read_image(images / "b.png")) in dict(contents(data))


def test_openclipart(packages):
    random = np.random.default_rng(0)
    folder = packages / "usr/share/openclipart/png"
    for number in range(3600):
        label = number % 17
        if label == 16 and number % 2:  # the smallest of 17 classes
            label = 0
        # "unsorted" has most.
        top = "unsorted" if number % 10 == 0 else f"class{label:02d}"
        picture(folder / top / "sub" / f"{number}.png", random, size=3)
    large = folder / "class00" / "bomb.png"
    header = struct.pack(">II5B", 40_000, 40_000, 8, 2, 0, 0, 0)
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header)
    (folder / "class01" / "link.png").symlink_to(folder / "class01" / "sub" / "1.png")
    data = load_data("openclipart-1k")
    check_splits(data, SIZES["openclipart-1k"])
    assert data.classes == tuple(f"class{i:02d}" for i in range(16))


def test_tuxpaint_stamps(packages):
    random, tops = np.random.default_rng(0), Counter()
    folder = packages / "tuxpaint" / "stamps"
    for number in range(900):
        top = f"class{number % 9}" if number % 30 else "class0"
        tops[top] += 1
        picture(folder / top / f"{number}.png", random)
    (folder / "class2" / "link.png").symlink_to(folder / "class1" / "1.png")  # not a second label
    data = load_data("tuxpaint-stamps")
    largest = dict(tops.most_common(8))
    assert data.classes == tuple(sorted(largest))
    check_splits(data, (8, 400, 100, sum(largest.values()) - 500))


def test_fashion_mnist(packages):
    random = np.random.default_rng(0)
    folder = packages / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    train, test = (random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (1200, 3000))
    test[:900] = train[:900]
    arrays = {"train": train, "t10k": test}
    for part in arrays:
        labels = np.arange(len(arrays[part])) % 10
        for kind, array in (("images-idx3", arrays[part]), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = gzip.compress(head + array.astype(np.uint8).tobytes(), compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    data = load_data("fashion-mnist-1k")
    assert data.classes[9] == "ankle boot"
    check_splits(data, SIZES["fashion-mnist-1k"])
    pixels, label = np.asarray(data.train[0][0])[..., 0], data.train[0][1]
    (index,) = (i for i, image in enumerate(train) if np.array_equal(image, pixels))
    assert label == index % 10


def test_transparency_shows_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)  # black, of which the first is invisible
    pixels[0, 1:, 3] = (255, 51)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "x.png"))[0, :, 0], [255, 0, 204]
    )


def test_stratified_splits():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    parts = stratified(labels, (40, 10, None))
    assert [len(part) for part in parts] == [40, 10, 50]
    assert sorted(i for part in parts for i in part) == list(range(100))
    for part in parts:
        for label, share in ((0, 0.5), (1, 0.3), (2, 0.2)):
            assert abs(sum(labels[i] == label for i in part) - share * len(part)) <= 1
    assert stratified(labels, (40, 10, None)) == parts
    assert stratified(labels, (40, 10, None), seed=1) != parts
    assert [len(part) for part in stratified(labels, (40, 10, 20))] == [40, 10, 20]
    with pytest.raises(ValueError, match="100 images are too few for 101"):
        stratified(labels, (60, 40, None))


def test_distinct_contents():
    assert distinct([b"a", b"b", b"a", b"c", b"d", b"c"], [0, 0, 0, 1, 1, 0]) == [0, 1, 4]


def test_what_is_not_here_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("gist.data.offline.Source.find", lambda self: None)
    with pytest.raises(ImportError, match="npm install emoji-datasource-google"):
        load_data("emoji")
    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    sources = {**SOURCES, **TEXT_SOURCES}
    for source in sources.values():
        assert source.get in printed
    assert printed.count("not here") == len(sources) == 11
