"""gist vtab check: a whole tree passes; whatever is wrong with one is said with the file's name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vtab_tree import COUNTS, write_task, write_tree

from gist import cli
from gist.data import DataError
from gist.suites import vtab_check as module
from gist.suites.tasks import VTAB_1K
from gist.suites.vtab_check import check
from gist.suites.vtab_layout import load_task, read_list

(PETS,) = VTAB_1K.choose(["oxford_iiit_pet"])
(CIFAR,) = VTAB_1K.choose(["cifar"])


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write_task(tmp_path / "vtab 1k", PETS)


def faults(folder: Path, **options) -> list[str]:
    return check(folder.parent, PETS, counts=COUNTS, **options).faults


def edit(file: Path, line: int, old: str, new: str) -> None:
    lines = file.read_text().splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new)
    file.write_text("".join(lines))


def test_the_suite_is_the_benchmarks():
    assert Counter(task.group for task in VTAB_1K.tasks) == {
        "natural": 7, "specialized": 4, "structured": 8,
    }  # fmt: skip
    assert len({task.name for task in VTAB_1K.tasks}) == 19
    with pytest.raises(ValueError, match=r"task: 'cifar100' is not known; did you mean 'cifar'"):
        VTAB_1K.choose(["cifar100"])
    assert [t.name for t in VTAB_1K.choose(["dtd", "cifar"])] == ["cifar", "dtd"]


def test_a_whole_tree_passes(tmp_path, monkeypatch, capsys):
    for name, count in COUNTS.items():
        monkeypatch.setitem(module.COUNTS, name, count)
    root = write_tree(tmp_path / "vtab-1k")
    assert cli.main(["vtab", "check", str(root)]) == 0
    printed = capsys.readouterr().out
    for task in VTAB_1K.tasks:
        assert task.name in printed
        assert load_task(root, task).final.fingerprint in printed


def test_full_counts_are_asked_for_on_the_command_line(tmp_path, capsys):
    folder = write_task(
        tmp_path, PETS, {"train800": 800, "val200": 200, "train800val200": 1000}, test=3
    )
    command = ["vtab", "check", str(tmp_path), "--tasks", PETS.name]
    assert cli.main(command) == 0
    last = (folder / "val200.txt").read_text().rstrip().rpartition("\n")
    (folder / "val200.txt").write_text(last[0])
    capsys.readouterr()
    assert cli.main(command) == 2
    said = capsys.readouterr()
    printed = said.out
    assert f"{folder / 'val200.txt'} has 199 usable images; expected 200" in printed
    assert f"{folder / 'train800val200.txt'} has, unlike train800 and val200" in printed
    assert "error: 2 faults" in said.err


def test_both_stages_are_loaded(pets):
    stages = load_task(pets.parent, PETS)
    assert (len(stages.select.train), len(stages.select.val), stages.select.test) == (8, 4, None)
    assert (len(stages.final.train), len(stages.final.test)) == (12, 6)
    assert len(stages.final.classes) == 37
    image, label = stages.select.val[1]
    with Image.open(pets / "images" / "val200" / "000001.png") as expected:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert label == 1


def test_lines_are_split_at_their_last_blank(pets):
    moved = pets / "images" / "train800" / "my cat 7 .png"
    (pets / "images" / "train800" / "000003.png").rename(moved)
    edit(pets / "train800.txt", 3, "000003.png", "my cat 7 .png")
    assert faults(pets) == []
    samples, _ = read_list(pets / "train800.txt", 37)
    assert samples[3] == (moved, 3)
    moved.write_bytes(moved.read_bytes()[:100])
    assert any(fault.startswith(f"{moved} can't be read: ") for fault in faults(pets))
    moved.unlink()
    assert f"{pets / 'train800.txt'}:4: {moved} does not exist" in faults(pets)


def test_a_missing_task_or_list(pets):
    assert faults(pets.parent / "nowhere" / "x") == [
        f"{pets.parent / 'nowhere' / PETS.name}: no such folder"
    ]
    (pets / "val200.txt").unlink()
    assert f"{pets / 'val200.txt'}: No such file or directory" in faults(pets)
    with pytest.raises(DataError, match=r"val200.txt: No such file"):
        load_task(pets.parent, PETS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000002.png 37", "images/test/000002.png is 37; it must be 0 to 36"),
        ("images/test/000002.png -1", "images/test/000002.png is '-1', not an integer from 0"),
        ("images/test/000002.png 1.0", "images/test/000002.png is '1.0', not an integer from 0"),
        ("images/test/000002.png cat", "images/test/000002.png is 'cat', not an integer from 0"),
        ("images/test/000002.png", "'images/test/000002.png' is not an image's path, a blank and"),
        ("images/test/000001.png 1", "images/test/000001.png is listed twice"),
        ("images/test/000009.png 1", "test/000009.png does not exist"),
    ],
)
def test_bad_lines(pets, line, message):
    edit(pets / "test.txt", 2, "images/test/000002.png 2", line)
    (fault,) = (fault for fault in faults(pets) if message in fault)
    assert fault.startswith(f"{pets / 'test.txt'}:3: ")
    with pytest.raises(DataError) as error:
        load_task(pets.parent, PETS)
    assert fault in str(error.value)
    assert check(pets.parent, PETS, counts=COUNTS).fingerprint == ""


def test_lists_that_are_no_text_or_empty(pets):
    (pets / "test.txt").write_bytes(b"\xff\xfe\x00")
    assert f"{pets / 'test.txt'}: is not UTF-8 text" in faults(pets)
    (pets / "test.txt").write_text("\n")
    assert f"{pets / 'test.txt'} has no usable image" in faults(pets)
    with pytest.raises(DataError, match=r"test.txt: empty"):
        load_task(pets.parent, PETS)


@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_unreadable_images(pets, content):
    image = pets / "images" / "test" / "000004.png"
    image.write_bytes(content)
    (fault,) = faults(pets)
    assert fault.startswith(f"{image} can't be read: ")


@pytest.mark.parametrize(
    ("first", "second"), [("train800", "val200"), ("train800", "test"), ("val200", "test")]
)
def test_one_image_in_two_splits(pets, first, second):
    source, copy = (pets / "images" / s / f"{i:06d}.png" for s, i in ((first, 1), (second, 2)))
    with Image.open(source) as image:
        image.save(copy, compress_level=9)  # other bytes, the same pixels
    assert copy.read_bytes() != source.read_bytes()
    expected = f"{copy} of {second} is the same image as {source} of {first}"
    assert expected in faults(pets)
    allowed = check(pets.parent, PETS, counts=COUNTS, allow_duplicates=True)
    assert allowed.warnings == [expected]
    assert expected not in allowed.faults


def test_all_must_be_the_union(pets):
    edit(pets / "train800val200.txt", 5, ".png 1", ".png 2")
    assert faults(pets) == [
        f"{pets / 'train800val200.txt'} lacks {pets / 'images/train800/000005.png'} with label 1",
        f"{pets / 'train800val200.txt'} has, unlike train800 and val200, "
        f"{pets / 'images/train800val200/000005.png'} with label 2",
    ]


def test_the_fingerprint_changes_with_image_label_and_order(pets):
    def mark() -> str:
        found = check(pets.parent, PETS, counts=COUNTS)
        assert found.fingerprint == load_task(pets.parent, PETS).select.fingerprint
        return found.fingerprint

    marks = [mark()]
    image = pets / "images" / "test" / "000000.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    marks.append(mark())
    edit(pets / "test.txt", 0, ".png 0", ".png 5")
    marks.append(mark())
    lines = (pets / "test.txt").read_text().splitlines()
    (pets / "test.txt").write_text("\n".join(lines[::-1]))
    marks.append(mark())
    assert len(set(marks)) == 4


def test_cifar_as_jpeg_is_warned_of(tmp_path):
    folder = write_task(tmp_path, CIFAR)
    assert check(tmp_path, CIFAR, counts=COUNTS).warnings == []
    image = folder / "images" / "test" / "000000.png"  # by content, whatever its name
    with Image.open(image) as opened:
        opened.load()
        opened.save(image, "JPEG")
    report = check(tmp_path, CIFAR, counts=COUNTS)
    assert report.faults == []
    assert report.warnings[0].startswith(f"{image} and 0 others are JPEG")
