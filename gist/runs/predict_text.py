"""Predictions of a finished run for new texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from gist.backbones.text_folder import load_tokenizer
from gist.data import DataError
from gist.data.table import cell, not_utf8, read_rows
from gist.data.text import TEXT_SUFFIXES, Texts, Tokenised
from gist.model.saving import CONFIG_FILE
from gist.runs.run import finished_results, is_text_run, load_run
from gist.training.inputs import call, to_device

STANDARD_INPUT = "-"
# So many batches of texts are sorted by length together.
BATCHES_AT_ONCE = 16


class TextPrediction(NamedTuple):
    """The most probable class of a text, by the class token's logits."""

    text: str
    label: str
    probability: float


def read_new_texts(
    sources: Sequence[str], standard_input: TextIO, faults: list[str]
) -> Iterator[str]:
    """The texts of files, and of standard input's lines for "-".

    A table (:data:`gist.data.text.TEXT_SUFFIXES`) has a column, or key, ``text``. Any other file
    has a text a line. Blank lines are skipped.

    Args:
        sources: paths, or "-".
        standard_input: read line by line.
        faults: gets a line for each row that has no text.

    Raises:
        FileNotFoundError: no such file: before the first text.
        DataError: a file that is not UTF-8, or a table without the column.
    """
    absent = [path for path in sources if path != STANDARD_INPUT and not Path(path).is_file()]
    if absent:
        raise FileNotFoundError(f"no such file of texts: {', '.join(absent)}")
    return _read(sources, standard_input, faults)


def _read(sources: Sequence[str], standard_input: TextIO, faults: list[str]) -> Iterator[str]:
    for source in sources:
        file = Path(source)
        if source == STANDARD_INPUT:
            yield from filter(None, (line.strip() for line in standard_input))
        elif file.suffix.lower() in TEXT_SUFFIXES:
            rows, wrong = read_rows(file, ("text",))
            faults += wrong
            for line, row in rows:
                text = cell(row["text"]) if isinstance(row.get("text"), str) else ""
                if text:
                    yield text
                else:
                    faults.append(f"{file}:{line}: no text")
        else:
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise not_utf8(file) from error
            yield from filter(None, map(str.strip, lines))


def predict_texts(
    directory: Path, texts: Iterable[str], *, device: str = "cpu", batch_size: int = 32
) -> Iterator[TextPrediction]:
    """Predict texts with a run's model and tokenizer, cut where the run's own texts were cut.

    Args:
        directory: a finished run's, on texts.
        texts: none of them empty. They are read some batches ahead.
        device: where to compute.
        batch_size: texts per forward, which are of similar lengths.

    Yields:
        One prediction per text, in the given order.

    Raises:
        FileNotFoundError: no finished run: before the first prediction.
        ValueError: the run is on images.
    """
    if not is_text_run(directory):
        raise ValueError(f"{directory} holds a run on images; predict images with it")
    model = load_run(directory).to(device)
    classes = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["classes"]
    recorded = finished_results(directory)["tokenizer"]
    tokenizer = load_tokenizer(Path(recorded["folder"]))
    padding = model.backbone.config.pad_token_id
    waiting = iter(texts)
    while some := list(islice(waiting, BATCHES_AT_ONCE * batch_size)):
        tokenised = Tokenised(
            Texts(some, [0] * len(some)), tokenizer, recorded["max_length"], padding
        )
        order = sorted(range(len(some)), key=tokenised.lengths.__getitem__)
        found: dict[int, TextPrediction] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs, _ = tokenised.collate([tokenised[i] for i in batch])
            with torch.no_grad():
                logits = call(model, to_device(inputs, torch.device(device))).float()
            probabilities, labels = logits.softmax(1).max(1)
            for i, label, probability in zip(
                batch, labels.tolist(), probabilities.tolist(), strict=True
            ):
                found[i] = TextPrediction(some[i], classes[label], probability)
        yield from (found[i] for i in range(len(some)))


def raise_faults(faults: Sequence[str]) -> None:
    """Raise a DataError that lists what could not be predicted, if anything."""
    if faults:
        raise DataError("not predicted:\n  " + "\n  ".join(faults))
