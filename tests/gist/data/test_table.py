"""Tables of images: what is read, and every bad row by its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gist.data import DataError, load_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(12):
        file = tmp_path / "photos" / f"{index}, a.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(file)
    return tmp_path


def table(root: Path, *rows: str, columns: str = "path,label", name: str = "animals.csv") -> str:
    (root / name).write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return str(root / name)


def level(split, index: int) -> int:
    return split[index][0].getpixel((0, 0))[0]


def row(index: int, *more: str) -> str:
    return ",".join([f'"photos/{index}, a.png"', *more])


def test_a_csv_with_splits(root):
    rows = [row(0, "train", "ox", "7"), row(1, "train", "a cat", "7"), row(2, "val", "ox", "7"),
            "", row(3, "test", "a cat", "7")]  # fmt: skip
    data = load_data(table(root, *rows, columns="path,split,label,age"))
    assert (data.name, data.classes) == ("animals", ("a cat", "ox"))
    assert [(level(s, i), s[i][1]) for s in (data.train, data.val, data.test) for i in range(len(s))
            ] == [(0, 1), (1, 0), (2, 1), (3, 0)]  # fmt: skip


def test_a_fifth_of_each_class_is_set_apart_without_val(root):
    rows = [row(i, "ab"[i % 2]) for i in range(10)] + [row(11, "a")]
    data = load_data(table(root, *rows))
    assert (len(data.train), len(data.val), data.test) == (9, 2, None)
    assert sorted(data.val.labels) == [0, 1]
    seen = [level(s, i) for s in (data.train, data.val) for i in range(len(s))]
    assert sorted(seen) == [*range(10), 11]
    again = load_data(table(root, *rows))
    assert (again.val.samples, again.fingerprint) == (data.val.samples, data.fingerprint)


def test_json_lines_are_a_csv_with_other_quotes(root):
    rows = [(0, "1", "train"), (1, "2", "train"), (2, "2", "val")]
    csv = load_data(table(root, *(row(i, *more) for i, *more in rows), columns="path,label,split"))
    lines = [{"path": f"photos/{i}, a.png", "label": int(n), "split": s} for i, n, s in rows]
    (root / "x.JSONL").write_text("\n\n".join(map(json.dumps, lines)))
    found = load_data(str(root / "x.JSONL"))
    assert found.classes == csv.classes == ("1", "2")
    assert found.fingerprint == csv.fingerprint
    assert found.train.samples == csv.train.samples


def test_a_byte_order_mark_and_blanks_in_the_header_are_passed_over(root):
    file = table(root, row(0, "a"), row(1, "a"), row(2, "b"), row(3, "b"), columns="path, label")
    Path(file).write_text(Path(file).read_text(), encoding="utf-8-sig")
    assert load_data(file).classes == ("a", "b")


def faults(file: str, **options) -> list[str]:
    with pytest.raises(DataError) as error:
        load_data(file, **options)
    return str(error.value).splitlines()


@pytest.mark.parametrize("check", [True, False])
def test_every_bad_row_is_named_by_its_line(root, check):
    file = table(
        root,
        row(0, "a", "train"),
        row(1, "", "train"),
        ",a,train",
        row(2, "a", "validation"),
        row(0, "b", "val"),
        '"photos/none.png",b,train',
        "photos/3, a.png,b,train",
        row(4, "b"),
        columns="path,label,split",
    )
    assert faults(file, check=check) == [
        f"{file} can't be trained on:",
        f"  {file}:3: no label",
        f"  {file}:4: no path",
        f"  {file}:5: the split is 'validation'; it must be one of train, val, test",
        f"  {file}:6: photos/0, a.png is in line 2 too",
        f"  {file}:7: {root}/photos/none.png does not exist",
        f"  {file}:8: more fields than columns; quote a field that holds a comma",
        f"  {file}:9: the split is ''; it must be one of train, val, test",
    ]


def test_a_file_by_another_path_is_the_same_file(root):
    (root / "photos" / "link.png").symlink_to("0, a.png")
    rows = [row(0, "a"), '"photos/../photos/0, a.png",b', "photos/link.png,b", row(1, "b")]
    file = table(root, *rows)
    assert faults(file)[1:] == [
        f"  {file}:3: photos/../photos/0, a.png is in line 2 too",
        f"  {file}:4: photos/link.png is in line 2 too",
    ]


def test_a_path_that_no_file_can_have_is_named_with_its_line(root):
    long = "x" * 5000
    file = table(root, row(0, "a"), f"{long},a", "a\0.png,a")
    assert faults(file)[1:] == [
        f"  {file}:3: {root}/{long} does not exist",
        f"  {file}:4: {root}/a\0.png does not exist",
    ]


def test_a_label_that_names_no_class_is_refused(root):
    labels = [True, 1, "1.0", float("nan"), 1.0, ["a"]]
    lines = [{"path": f"photos/{i}, a.png", "label": label} for i, label in enumerate(labels)]
    (root / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [line.partition("x.jsonl:")[2] for line in faults(str(root / "x.jsonl"))[1:]] == [
        "4: the label is nan; it must be a string or an integer",
        "5: the label is 1.0; it must be a string or an integer",
        "6: the label is ['a']; it must be a string or an integer",
    ]


def test_a_column_that_comes_twice_is_refused(root):
    file = table(root, row(0, "a", "b"), columns="path,label,label")
    assert faults(file) == [f"{file} has the column label more than once"]


def test_a_quote_that_is_not_closed_is_named_with_its_line(root):
    file = table(root, row(0, "a"), '"photos/1, a.png,a', row(2, "b"))
    (found,) = faults(file)
    assert "in the row that starts in line 3; a quote may not be closed" in found


def test_bad_lines_of_json_are_named(root):
    file = root / "x.jsonl"
    good = {"path": "photos/0, a.png", "label": "a"}
    file.write_text(f"{json.dumps(good)}\n[1]\n{{\n")
    found = faults(str(file))
    assert found[1] == f"  {file}:2: not an object with the keys path, label"
    assert found[2].startswith(f"  {file}:3: no JSON: ")


@pytest.mark.parametrize(
    ("columns", "message"),
    [("file,label", "has no column path; its columns are file, label"),
     ("path", "has no column label; its columns are path"),
     ("", "has no column path and no column label; its columns are none")],
)  # fmt: skip
def test_a_missing_column_is_named(root, columns, message):
    file = table(root, row(0, "a"), columns=columns)
    assert faults(file) == [f"{file} {message}"]


def test_an_unreadable_image_a_class_without_training_and_one_class_are_named(root):
    (root / "photos" / "1, a.png").write_bytes(b"no image")
    rows = [row(i, "ab"[i % 2], "train") for i in range(4)]
    file = table(root, *rows, columns="path,label,split")
    assert any(f"{root}/photos/1, a.png can't be read" in line for line in faults(file))
    rows = [row(0, "a", "train"), row(2, "b", "train"), row(3, "c", "val")]
    assert faults(table(root, *rows, columns="path,label,split"))[1:] == [
        "  train has no image of class 'c'"
    ]
    assert "has 1 classes; at least 2" in faults(table(root, row(0, "a"), row(2, "a")))[1]


def test_what_is_no_text_or_not_there(root):
    (root / "x.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    assert faults(str(root / "x.csv")) == [
        f"{root}/x.csv can't be read: it must be UTF-8",
        f"  {root}/x.csv:2: byte 1 is 0xff",
    ]
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_data(str(root / "none.csv"))
