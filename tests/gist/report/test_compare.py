"""gist compare: the table, the paired differences, and the runs it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest

from gist import cli
from gist.report.compare import compare
from gist.report.measures import PairedDifference
from gist.runs.predictions import PREDICTIONS_FILE
from gist.runs.text import KIND


def changed(run: Path, out: Path, old: str, new: str) -> Path:
    """A copy of a run whose predictions have another text."""
    shutil.copytree(run, out)
    text = (out / PREDICTIONS_FILE).read_text()
    assert old in text
    (out / PREDICTIONS_FILE).write_text(text.replace(old, new))
    return out


def right(run: Path) -> np.ndarray:
    with (run / PREDICTIONS_FILE).open(newline="") as file:
        return np.array([row["true"] == row["predicted"] for row in csv.DictReader(file)])


def test_runs_are_compared_image_by_image(a_run, plain_run, capsys):
    assert cli.main(["compare", str(plain_run), str(a_run)]) == 0
    printed = capsys.readouterr().out
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in printed.splitlines() if line[:1] == "|"]
    by_name = {row[0]: row for row in rows}
    for name, run in (("plain", plain_run), ("gist", a_run)):
        results = json.loads((run / "results.json").read_text())
        trained = sum(results["parameters"][part] for part in ("method", "token", "head"))
        assert by_name[name][1:6] == [
            "adapter", "Gist" if name == "gist" else "none", f"{trained:,}",
            f"{100 * results['val_accuracy']:.2f} %", f"{100 * results['test']['accuracy']:.2f} %",
        ]  # fmt: skip
    assert by_name["train.lr"] == ["train.lr", "0.02", "0.001"]
    assert by_name["gist.gist"] == ["gist.gist", "False", "True"]
    assert not any(name.startswith("data") for name in by_name)
    before, after = right(plain_run), right(a_run)
    found = PairedDifference.of(before, after)
    assert by_name["gist - plain"][1:] == [
        f"{100 * (after.mean() - before.mean()):+.2f}",
        f"{100 * found.low:+.2f} to {100 * found.high:+.2f}",
        str((after & ~before).sum()), str((before & ~after).sum()), f"{found.p_value:.2g}",
    ]  # fmt: skip
    assert f"on the same {len(before)} test images" in printed


def test_the_page_shows_the_same(a_run, plain_run, tmp_path):
    out = tmp_path / "comparison.html"
    third = shutil.copytree(a_run, tmp_path / "third <run>")
    runs = [str(run) for run in (plain_run, a_run, third)]
    assert cli.main(["compare", *runs, "--html", str(out)]) == 0
    page = out.read_text()
    assert "third &lt;run&gt; - plain" in page
    assert "The 2 p-values are not corrected for their number." in page
    shown = browser.show(out, tmp_path, 390)
    assert shown.console == []
    assert tuple(shown.probe["sections"]) == ("runs", "settings", "differences")
    assert shown.probe["wide"] <= 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<i>3.png", "<i>33.png", "24 images against 24; only gist has test/"),
        ("\ntest,", "\nval,", "other predicted validation images and gist test images"),
        (",plain,", ',"b & ""c""",', "has another class"),
    ],
)  # fmt: skip
def test_other_images_are_refused_in_words(old, new, message, a_run, tmp_path, capsys):
    other = changed(a_run, tmp_path / "other", old, new)
    assert cli.main(["compare", str(a_run), str(other)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "other and gist can't be compared image by image: " in said
    assert message in said


def test_other_classes_and_missing_files_are_refused(a_run, tmp_path):
    other = shutil.copytree(a_run, tmp_path / "other")
    saved = json.loads((other / "config.json").read_text())
    saved["classes"].append("one more")
    (other / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"their classes differ \(one more\)"):
        compare([a_run, other])
    (other / PREDICTIONS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="gist report .* writes it"):
        compare([a_run, other])
    results = json.loads((other / "results.json").read_text())
    results["config"]["kind"] = KIND  # gist report writes none of texts
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(FileNotFoundError, match="its gist train command writes it"):
        compare([a_run, other])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        compare([a_run, tmp_path])
    for runs in ([a_run], [a_run, a_run]):
        with pytest.raises(ValueError, match="two or more different runs"):
            compare(runs)


def test_items_without_names_need_the_same_data(a_run, tmp_path):
    runs = [shutil.copytree(a_run, tmp_path / name) for name in ("first", "second")]
    for run in runs:
        header, *rows = (run / PREDICTIONS_FILE).read_text().splitlines()
        cells = [next(csv.reader([row])) for row in rows]
        with (run / PREDICTIONS_FILE).open("w", newline="") as file:
            file.write(header + "\n")
            csv.writer(file).writerows(
                [split, f"#{i}", *more] for i, (split, _, *more) in enumerate(cells)
            )
    assert compare(runs).differences[0].difference == 0
    results = json.loads((runs[1] / "results.json").read_text())
    results["config"]["data_fingerprint"] = "another"
    results["complete"] = False
    (runs[1] / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="second and first can't be compared: their data"):
        compare(runs)
    shutil.copy(a_run / PREDICTIONS_FILE, runs[0])
    shutil.copy(a_run / PREDICTIONS_FILE, runs[1])
    assert "second was not trained to its end" in compare(runs).markdown()


def test_names_are_as_long_as_they_must_be(a_run, plain_run, tmp_path):
    first, second = (shutil.copytree(a_run, tmp_path / name / "run|1") for name in "ab")
    found = compare([first, second])
    assert found.names == ["a/run|1", "b/run|1"]
    assert "| a/run\\|1 |" in found.markdown()
    assert found.settings == {}
    assert (found.differences[0].p_value, found.differences[0].difference) == (1.0, 0.0)
