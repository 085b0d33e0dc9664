"""Labelled texts: tables of them, and texts as a model's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from gist.data.base import DataError, Labelled, LabelledData, fingerprint
from gist.data.folder import SPLITS
from gist.data.split import split_off_val, too_few_to_split
from gist.data.table import cell, is_name, no_name, read_rows

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_COLUMNS = ("text", "label")


class Texts(Dataset[tuple[str, int]]):
    """Texts in memory, with their labels."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.texts, self.labels = list(texts), list(labels)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.texts[index], self.labels[index]


@dataclass(frozen=True)
class TextData(LabelledData):
    """Texts in splits that share their classes: items are a text and an int label."""

    item: ClassVar[str] = "text"

    def repeated(self) -> dict[str, int]:
        """How many texts of val and of test are texts of train too, where any are."""
        trained = {self.train[i][0] for i in range(len(self.train))}
        found = {}
        for name, split in (("val", self.val), ("test", self.test)):
            if split is not None:
                found[name] = sum(split[i][0] in trained for i in range(len(split)))
        return {name: count for name, count in found.items() if count}


def read_texts(source: Path) -> TextData:
    """Texts and labels of a table, or of a folder with a table for each split.

    Columns, or keys: ``text``; ``label``, a class's name; and in a single table optionally
    ``split``: train, val or test. A folder holds ``train`` and optionally ``val`` and ``test``,
    each with one of :data:`TEXT_SUFFIXES`. Without val, a fifth of each class is set apart for
    validation, the same in every run. Other columns are ignored. Blank lines are skipped.

    Args:
        source: the table, UTF-8, its suffix one of :data:`TEXT_SUFFIXES`, or the folder. A table
            that is not JSON Lines starts with its columns' names.

    Raises:
        FileNotFoundError: there is no such table.
        DataError: a missing column; bytes that are not UTF-8; rows with an empty text, without a
            label or with another split; fewer than two classes: all that was found, a line each,
            with the row's line in the file.
    """
    rows: dict[str, list[tuple[str, str]]] = {"train": []}
    faults: list[str] = []
    if source.is_dir():
        for split, file in _tables(source).items():
            rows[split] = [(text, label) for text, label, _ in _labelled(file, faults, split)]
    else:
        for text, label, split in _labelled(source, faults):
            rows.setdefault(split, []).append((text, label))
    classes = sorted({label for of_split in rows.values() for _, label in of_split})
    if len(classes) < 2 and not faults:
        faults.append(f"{source} has {len(classes)} classes; at least 2 are needed")
    number = {name: label for label, name in enumerate(classes)}
    splits = {
        split: Texts([text for text, _ in of_split], [number[label] for _, label in of_split])
        for split, of_split in rows.items()
    }
    if "val" not in splits:
        faults += too_few_to_split(splits["train"].labels, classes, TextData.item)
    if faults:
        raise DataError(f"{source} can't be trained on:\n  " + "\n  ".join(faults))
    name = source.resolve().stem if source.is_file() else source.resolve().name
    return text_data(name, classes, splits)


def text_data(name: str, classes: Sequence[str], splits: Mapping[str, Texts]) -> TextData:
    """Texts of known classes.

    Args:
        name: as :class:`LabelledData` has it.
        classes: their names.
        splits: "train", and optionally "val" and "test". Without "val", a fifth of each class of
            train is set apart.
    """
    splits = dict(splits)
    if "val" not in splits:
        pool = splits["train"]
        for split, indices in zip(("train", "val"), split_off_val(pool.labels), strict=True):
            splits[split] = Texts(
                [pool.texts[i] for i in indices], [pool.labels[i] for i in indices]
            )
    mark = fingerprint(
        part
        for split in SPLITS
        if split in splits
        for text, label in zip(splits[split].texts, splits[split].labels, strict=True)
        for part in (f"{split} {classes[label]}".encode(), text.encode("utf-8", "surrogatepass"))
    )
    return TextData(name, tuple(classes), splits["train"], splits["val"], splits.get("test"), mark)


def _tables(folder: Path) -> dict[str, Path]:
    """The table of each split in a folder."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = [folder / (split + suffix) for suffix in TEXT_SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} has {' and '.join(f.name for f in files)}; keep one")
        if files:
            found[split] = files[0]
    if "train" not in found:
        listed = ", ".join("train" + suffix for suffix in TEXT_SUFFIXES)
        raise DataError(f"{folder} has none of {listed}")
    return found


def _labelled(
    file: Path, faults: list[str], split: str | None = None
) -> Iterator[tuple[str, str, str]]:
    """Text, label and split of each row; what is wrong with others is added to ``faults``.

    Args:
        split: of all rows; None: as the rows say, or train.
    """
    rows, wrong = read_rows(file, TEXT_COLUMNS)
    faults += wrong
    for line, row in rows:
        where, text = f"{file}:{line}", row.get("text")
        label, of_row = cell(row.get("label")), cell(row.get("split"))
        if None in row:
            faults.append(f"{where}: more fields than columns; quote a text that has delimiters")
        elif text is not None and not isinstance(text, str):
            faults.append(f"{where}: the text is {text!r}, no string")
        elif not cell(text):
            faults.append(f"{where}: the text is empty")
        elif not label:
            faults.append(f"{where}: no label")
        elif not is_name(row.get("label")):
            faults.append(f"{where}: {no_name(label)}")
        elif split is None and "split" in row and of_row not in SPLITS:
            known = ", ".join(SPLITS)
            faults.append(f"{where}: the split is {of_row!r}; it must be one of {known}")
        else:
            yield cell(text), label, split or of_row or "train"


class Tokenised(Dataset[tuple[torch.Tensor, int]]):
    """Texts as token ids, made once and kept in memory.

    Items are int64 (N,) ids, of N at most ``max_length``, and an int label. :meth:`collate` makes a
    batch of them.

    Args:
        split: texts and labels, such as a :class:`Texts`.
        tokenizer: one of transformers'.
        max_length: tokens at most, special ones included. Longer texts are cut at their end.
        padding: the id that fills short rows of a batch, which for a decoder is the model's
            ``config.pad_token_id``. None: :func:`padding_of` the tokenizer.

    Attributes:
        lengths: tokens of each text.
        cut: how many texts were cut.

    Raises:
        DataError: a text without any token.
        ValueError: as :func:`padding_of`.
    """

    def __init__(
        self, split: Labelled, tokenizer: Any, max_length: int, padding: int | None = None
    ) -> None:
        texts = [split[i][0] for i in range(len(split))]
        self.labels = [int(label) for label in split.labels]
        self.padding = padding_of(tokenizer) if padding is None else padding
        # Without truncation first: the tokens of a text say whether it is cut.
        ids = list(tokenizer(texts, verbose=False)["input_ids"]) if texts else []
        self.cut = 0
        for index, text in enumerate(texts):
            if len(ids[index]) > max_length:
                self.cut += 1
                ids[index] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            elif not ids[index]:
                raise DataError(f"the text {text[:40]!r} has no token")
        self.lengths = [len(of_text) for of_text in ids]
        self._ends = list(accumulate(self.lengths))
        self._ids = torch.tensor([i for of_text in ids for i in of_text], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        end = self._ends[index]
        return self._ids[end - self.lengths[index] : end].long(), self.labels[index]

    def collate(
        self, items: Sequence[tuple[torch.Tensor, int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch: ``input_ids`` and ``attention_mask``, int64 (B, N), and int64 (B,) labels.

        N is the longest text's. Shorter texts are padded on the right.
        """
        ids = [of_text for of_text, _ in items]
        return padded(ids, self.padding), torch.tensor([label for _, label in items])


def padding_of(tokenizer: Any) -> int:
    """The id that fills short rows of a batch: of padding, or else of the end of sequence.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for padding in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if padding is not None:
            return int(padding)
    raise ValueError(
        "the tokenizer has neither a padding token nor an end of sequence; set its pad_token"
    )


def padded(ids: Sequence[torch.Tensor], padding: int) -> dict[str, torch.Tensor]:
    """(N_i,) ids each, to ``input_ids`` and ``attention_mask``, int64 (B, max N_i)."""
    rows = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(of_text) for of_text in ids])
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    return {"input_ids": rows, "attention_mask": mask.long()}
