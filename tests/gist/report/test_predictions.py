"""predictions.csv: what the model gives for each image, and names of any kind."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gist.data import folds, load_data, prepare
from gist.runs.predictions import COLUMNS, PREDICTIONS_FILE, Predictions, paths_of
from gist.runs.run import load_run, transforms_of


def test_a_run_keeps_what_both_tokens_predict(a_run, folder):
    with (a_run / PREDICTIONS_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    data, model = load_data(str(folder)), load_run(a_run)
    files = sorted(folder.glob("test/*/*"))
    assert [folder / row["path"] for row in rows] == files
    assert [row["true"] for row in rows] == [file.parent.name for file in files]
    assert {row["split"] for row in rows} == {"test"}

    pixels = torch.stack([image for image, _ in prepare(data.test, transforms_of(a_run))])
    model.token.dropout.p = 0.0
    with torch.no_grad():
        both = [logits.softmax(1).max(1) for logits in model.train()(pixels)]
    for (probability, label), before in zip(both, ("", "gist_"), strict=True):
        said = [data.classes.index(row[before + "predicted"]) for row in rows]
        assert said == label.tolist()
        probabilities = [float(row[before + "probability"]) for row in rows]
        assert probabilities == pytest.approx(probability.tolist(), rel=1e-4)
    results = json.loads((a_run / "results.json").read_text())
    right = [row["true"] == row["predicted"] for row in rows]
    assert results["test"]["accuracy"] == pytest.approx(np.mean(right))


def test_without_a_token_its_columns_are_empty(plain_run):
    classes = json.loads((plain_run / "config.json").read_text())["classes"]
    found = Predictions.read(plain_run, classes)
    assert found is not None
    assert found.gist_predicted is None
    assert found.gist_probability is None


def test_any_name_survives(tmp_path):
    classes = ('a,"b"', os.fsdecode(b"caf\xe9"), "line\nbreak")
    paths = (os.fsdecode(b"\xff.png"), "x,y.png", "carriage\rreturn.png")
    labels, others = np.array([0, 1, 2]), np.array([2, 1, 0])
    probability = np.array([0.1, 1.0, 0.123456789])
    written = Predictions("val", classes, paths, labels, others, probability, others, probability)
    written.write(tmp_path)
    read = Predictions.read(tmp_path, classes)
    for name in vars(written):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert read.correct.tolist() == [False, True, False]
    assert Predictions.read(tmp_path / "absent", classes) is None
    with pytest.raises(ValueError, match="does not hold this run's predictions"):
        Predictions.read(tmp_path, ["another"])


def test_paths_are_found_within_parts_of_splits(folder):
    data = load_data(str(folder))
    (first, *_) = folds(data, 3)
    found = paths_of(first.test, folder)
    assert {Path(path).parts[0] for path in found} == {"train", "val"}
    assert [(folder / path).parent.name for path in found] == [
        data.classes[label] for label in first.test.labels
    ]
    assert paths_of(load_data("digits").val)[:2] == ["#0", "#1"]
