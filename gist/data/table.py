"""Tables of labelled items: CSV, tab-separated values and JSON Lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist.data.base import DataError, ImageData
from gist.data.folder import SPLITS, Sample, data_of_files

SUFFIXES = (".csv", ".jsonl")
COLUMNS = ("path", "label")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is short of long texts
Row = tuple[int, Mapping[str, Any]]


def load_table(file: Path, *, check: bool = True) -> ImageData:
    """Images that a CSV file or a file of JSON Lines names.

    Columns, or keys: ``path``, relative to the file's folder; ``label``, a class's name; and
    optionally ``split``: train, val or test. Without a row of val, a fifth of each class is set
    apart for validation, the same in every run. Other columns are ignored. Blank lines are skipped.

    Args:
        file: UTF-8, its suffix one of :data:`SUFFIXES`. A CSV file starts with its columns' names.
        check: as :func:`gist.data.load_folder` takes it. Without a check, too, each file must
            exist.

    Raises:
        DataError: a missing column; rows without path or label, with another split, with a file
            that does not exist or that another row has too; unreadable images; fewer than two
            classes: all that was found, a line each, with the row's line in the file.
    """
    rows, faults = read_rows(file, COLUMNS)
    named: dict[str, list[tuple[Path, str]]] = {"train": []}
    line_of: dict[str, int] = {}
    for line, row in rows:
        where = f"{file}:{line}"
        path, label, split = (cell(row.get(key)) for key in (*COLUMNS, "split"))
        place = file.parent / path
        is_file = os.path.isfile(place)
        real = os.path.realpath(place) if is_file else path  # by .. and links, a file has many
        if None in row:
            faults.append(f"{where}: more fields than columns; quote a field that holds a comma")
        elif not path or not label:
            faults.append(f"{where}: no {'label' if path else 'path'}")
        elif not is_name(row.get("label")):
            faults.append(f"{where}: {no_name(label)}")
        elif "split" in row and split not in SPLITS:
            faults.append(f"{where}: the split is {split!r}; it must be one of {', '.join(SPLITS)}")
        elif real in line_of:
            faults.append(f"{where}: {path} is in line {line_of[real]} too")
        elif not is_file:
            faults.append(f"{where}: {place} does not exist")
        else:
            named.setdefault(split or "train", []).append((place, label))
        line_of.setdefault(real, line)
    classes = sorted({label for split in named.values() for _, label in split})
    if len(classes) < 2 and not faults:
        faults.append(f"{file} has {len(classes)} classes; at least 2 are needed")
    if faults:  # before any image is read
        raise DataError(f"{file} can't be trained on:\n  " + "\n  ".join(faults))
    number = {name: label for label, name in enumerate(classes)}
    samples: dict[str, list[Sample]] = {
        split: [(place, number[label]) for place, label in of_split]
        for split, of_split in named.items()
    }
    return data_of_files(file, classes, samples, [], check=check)


def cell(value: Any) -> str:
    """A row's value as text, without white space around it."""
    return "" if value is None else str(value).strip()


def is_name(label: Any) -> bool:
    """Whether a row's label can name a class: text, or an integer or a Boolean of JSON."""
    return isinstance(label, str | int)  # bool is an int


def no_name(label: str) -> str:
    """What is wrong with a label that :func:`is_name` refuses."""
    return f"the label is {label}; it must be a string or an integer"


def read_rows(file: Path, columns: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Rows with the lines in the file that they end in, and a line per row that is none.

    Args:
        file: UTF-8; .csv, .tsv or JSON Lines, by its suffix.
        columns: those that must be there.

    Raises:
        DataError: a missing column, bytes that are not UTF-8, or a table that can't be read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream, _long_fields():
            delimiter = _DELIMITERS.get(file.suffix.lower())
            if delimiter is None:
                return _json_rows(stream, file, columns)
            return _csv_rows(stream, file, columns, delimiter), []
    except UnicodeDecodeError as error:
        raise not_utf8(file) from error
    except csv.Error as error:
        raise DataError(f"{file} can't be read: {error}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def not_utf8(file: Path) -> DataError:
    """The error that names the lines of a file that can't be decoded."""
    lines = []
    for number, content in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            lines.append(f"{file}:{number}: byte {error.start + 1} is {content[error.start]:#04x}")
    return DataError(f"{file} can't be read: it must be UTF-8\n  " + "\n  ".join(lines))


def _csv_rows(
    stream: Iterator[str], file: Path, columns: Sequence[str], delimiter: str
) -> list[Row]:
    reader = csv.DictReader(stream, strict=True, delimiter=delimiter)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    _check_columns(reader.fieldnames, file, columns)
    repeated = [name for name in columns if list(reader.fieldnames).count(name) > 1]
    if repeated:
        raise DataError(f"{file} has the column {repeated[0]} more than once")
    rows: list[Row] = []
    try:
        rows += ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        start = rows[-1][0] + 1 if rows else 2
        raise DataError(
            f"{file} can't be read: {error}, in the row that starts in line {start}; a quote may "
            "not be closed there"
        ) from error
    return rows


def _json_rows(
    stream: Iterator[str], file: Path, columns: Sequence[str]
) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    faults = []
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            faults.append(f"{file}:{line}: no JSON: {error}")
            continue
        if isinstance(row, dict):
            rows.append((line, row))
        else:
            faults.append(f"{file}:{line}: not an object with the keys {', '.join(columns)}")
    if rows:
        _check_columns(rows[0][1], file, columns)
    return rows, faults


def _check_columns(names: Any, file: Path, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(
            f"{file} has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(map(str, names)) or 'none'}"
        )
