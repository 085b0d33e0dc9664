"""report.html of a tiny run: its figures, what a browser shows of it, and where it is refused."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest

from gist import cli
from gist.cli import report as command
from gist.report import REPORT_FILE, write_report
from gist.report.collect import read_log
from gist.report.plots import Line, heat_map, line_chart
from gist.runs.predictions import PREDICTIONS_FILE, Predictions

SECTIONS = ("training", "confusion", "classes", "mistakes", "calibration", "attention", "settings")
ABOUT_IMAGES = SECTIONS[1:-1]


def text_of(run: Path) -> str:
    return (run / REPORT_FILE).read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[str]]]:
    """The texts of all tables' cells, row by row."""
    return [
        [
            [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(CELL, row, re.S)]
            for row in re.findall("<tr>(.*?)</tr>", found, re.S)
        ]
        for found in re.findall("<table.*?</table>", page, re.S)
    ]


CELL = "<t[hd][^>]*>(.*?)</t[hd]>"


def predictions(run: Path) -> list[dict[str, str]]:
    with (run / PREDICTIONS_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_its_figures_are_those_of_scikit_learn(a_run):
    metrics = pytest.importorskip("sklearn.metrics")
    rows, page = predictions(a_run), text_of(a_run)
    classes = json.loads((a_run / "config.json").read_text())["classes"]
    true, said = ([row[name] for row in rows] for name in ("true", "predicted"))
    (matrix,) = (t for t in tables(page) if t[0][0].startswith("true ↓"))
    assert matrix[0][1:] == classes
    expected = metrics.confusion_matrix(true, said, labels=classes)
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]] == expected.tolist()

    (scores,) = (
        t for t in tables(page) if t[0] == ["class", "precision", "recall", "F1", "images"]
    )
    columns = metrics.precision_recall_fscore_support(
        true, said, labels=classes, zero_division=np.nan
    )
    for name, row, values in zip(classes, scores[1:], zip(*columns, strict=True), strict=False):
        shown = ["-" if np.isnan(value) else f"{value:.3f}" for value in values[:3]]
        assert row == [name, *shown, str(values[3])]

    error = 0.0
    for low in np.arange(15) / 15:
        inside = [row for row in rows if low < float(row["probability"]) <= low + 1 / 15]
        if inside:
            right = np.mean([row["true"] == row["predicted"] for row in inside])
            gap = abs(right - np.mean([float(row["probability"]) for row in inside]))
            error += len(inside) / len(rows) * gap
    assert f"Expected calibration error: {100 * error:.2f} %" in page
    accuracy = np.mean([row["true"] == row["predicted"] for row in rows])
    assert f"<dt>test accuracy</dt><dd>{100 * accuracy:.2f} %</dd>" in page
    gist = np.mean([row["true"] == row["gist_predicted"] for row in rows])
    assert f"<dt>Gist token&#x27;s accuracy</dt><dd>{100 * gist:.2f} %</dd>" in page


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_part_and_fetches_nothing(width, a_run, tmp_path):
    shown = browser.show(a_run / REPORT_FILE, tmp_path, width)
    assert shown.console == []
    probe = shown.probe
    assert tuple(probe["sections"]) == SECTIONS
    for name, (wide, high) in probe["sections"].items():
        assert wide > 0.8 * min(width, 1128), name
        assert high > 100, name
    assert all(wide > 5 and high > 5 for wide, high in probe["drawings"])
    wrong = sum(row["true"] != row["predicted"] for row in predictions(a_run))
    maps = min(
        3, len({row["true"] for row in predictions(a_run) if row["true"] == row["predicted"]})
    )
    assert len(probe["pictures"]) == min(24, wrong) + 3 * (maps + min(2, wrong))
    assert min(probe["pictures"]) > 0  # all are decoded
    assert probe["wide"] <= 0  # the page itself does not scroll sideways
    assert all(url.startswith("data:image/jpeg;base64,") for url in probe["fetched"])
    assert "<script>alert(1)<" in probe["texts"]["classes"]  # as a text
    assert "<i>0.png" in probe["texts"]["attention"] + probe["texts"]["mistakes"]


def test_a_browser_would_report_a_script_and_a_request(a_run, tmp_path):
    """The test above can fail: the policy stops both, and the console says so."""
    page = tmp_path / "page.html"
    bad = "<img src='http://127.0.0.1:9/x.png'/><p onclick='x' id=x>.</p><style>@import 'y'</style>"
    page.write_text(text_of(a_run).replace("</main>", f"{bad}</main>"))
    console = browser.show(page, tmp_path, 800).console
    assert len(console) >= 2
    assert "Content Security Policy" in "".join(console)


def test_no_text_of_a_user_becomes_markup(a_run, folder):
    page = text_of(a_run)
    assert "<script" not in page
    assert "<i>" not in page
    assert "b &amp; &quot;c&quot;" in page
    assert page.count("http") == page.count("http-equiv") + page.count('href="https://arxiv.org/')
    assert not re.findall(
        r"<img(?![^>]* alt=\"[^\"]+\")|<svg(?![^>]*(aria-label|aria-hidden))", page
    )
    assert len(page.encode()) < 1_000_000


def test_curves_are_those_of_the_log(a_run):
    page, log = text_of(a_run), read_log(a_run)
    for name, column in (
        ("class token", "cls_cross_entropy"), ("Gist token", "gist_cross_entropy"),
        ("KL(class || Gist)", "kl_cls_gist"), ("KL(Gist || class)", "kl_gist_cls"),
        ("learning rate", "lr"), ("loss", "loss"),
    ):  # fmt: skip
        said = re.search(rf"{re.escape(name)}: from ([\d.e-]*\d) to ([\d.e-]*\d)[;.]", page)
        assert said is not None, name
        expected = [log[column][0], log[column][-1]]
        assert [float(value) for value in said.groups()] == pytest.approx(expected, rel=1e-3), name


def test_a_run_without_a_token_has_no_terms_and_one_map(plain_run, tmp_path):
    run = shutil.copytree(plain_run, tmp_path / "run")
    assert not (run / REPORT_FILE).exists()  # --no-report
    (run / PREDICTIONS_FILE).unlink()  # as in a run of an earlier version
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    assert (run / PREDICTIONS_FILE).read_bytes() == (plain_run / PREDICTIONS_FILE).read_bytes()
    page = text_of(run)
    assert "KL(" not in page
    assert "Attention of the class token" in page
    assert "Gist token</small>" not in page
    assert "without a Gist token" in page


def test_data_and_model_that_are_gone_are_said_to_be(a_run, folder, tmp_path, capsys):
    run = shutil.copytree(a_run, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["config"]["data"] = str(tmp_path / "moved")
    results["config"]["weights"] = str(tmp_path / "gone.safetensors")
    (run / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "the report shows none of the run's data: " in said
    assert "the report has no attention: " in said
    page = text_of(run)
    assert "<img" not in page
    assert "Not available: the run&#x27;s data could not be read" in page
    assert 'id="confusion"' in page
    (run / PREDICTIONS_FILE).unlink()
    write_report(run)
    assert not any(f'id="{name}"' in text_of(run) for name in ABOUT_IMAGES)
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        write_report(tmp_path)


def test_other_images_than_those_predicted_are_not_shown(a_run, folder, tmp_path):
    run = shutil.copytree(a_run, tmp_path / "run")
    moved = shutil.copytree(folder, tmp_path / "photos")
    next(moved.glob("test/plain/*")).unlink()
    results = json.loads((run / "results.json").read_text())
    results["config"]["data"] = str(moved)
    (run / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    assert "the run&#x27;s data has other images now" in text_of(run)
    assert "<img" not in text_of(run)


def test_a_failure_keeps_the_run(folder, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(command, "write_report", fails)
    out = tmp_path / "out"
    options = ["--model", "test_vit", "--random-weights", "--img-size", "32", "--epochs", "1"]
    arguments = ["train", "--data", str(folder), "--out", str(out), *options, "--device", "cpu"]
    assert cli.main([*arguments, "--workers", "0"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the run is complete, but its report could not be written: ZeroDivisionError" in said
    assert f"gist report {out} tries again" in said
    assert json.loads((out / "results.json").read_text())["complete"]
    assert (out / "adapter.safetensors").is_file()
    assert (out / PREDICTIONS_FILE).is_file()


@pytest.mark.parametrize("classes", [2, 20, 21, 100, 101])
def test_any_number_of_classes_is_readable(classes, a_run, tmp_path):
    run = shutil.copytree(a_run, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    names = tuple(f"class {label}" for label in range(classes))
    (run / "config.json").write_text(json.dumps({**saved, "classes": names}))
    random = np.random.default_rng(0)
    true = random.integers(0, classes, 600)
    predicted = np.where(random.random(600) < 0.7, true, (true + 1) % classes)
    paths = tuple(f"{index}.png" for index in range(600))
    Predictions("val", names, paths, true, predicted, random.random(600)).write(run)
    write_report(run)
    page = text_of(run)
    assert ('class="matrix' in page) == (classes <= 20)
    assert ("Confusion matrix of" in page) == (20 < classes <= 100)
    assert ("can&#x27;t be read; it is left out" in page) == (classes > 100)
    assert ("Most confused pairs" in page) == (classes > 2)
    assert "so that these figures are optimistic" in page
    assert len(page) < 500_000


def test_the_drawn_matrix_has_a_cell_for_each_entry():
    matrix = np.diag([4, 0, 8])
    matrix[0, 2], matrix[1, 0] = 4, 3
    drawn = heat_map(matrix, "a title")
    right = re.findall(r'<path d="([^"]*)" class="right" fill-opacity="([\d.]*)"', drawn)
    wrong = re.findall(r'<path d="([^"]*)" class="wrong" fill-opacity="([\d.]*)"', drawn)
    # Shares of 1/2 and 1, in eighths: opacities 0.15 + 0.85 * 4 / 8 and 1. Class 1 has no image.
    assert [(opacity, path.count("M")) for path, opacity in right] == [("0.57", 1), ("1.00", 1)]
    assert [re.findall(r"M([\d.]+) ([\d.]+)h", path) for path, _ in wrong] == [
        [("266.7", "0.0")], [("0.0", "133.3")],
    ]  # fmt: skip


def test_a_line_is_drawn_to_scale():
    nan = float("nan")
    chart = line_chart(
        "t", [Line("a <b", [0, 1, 2], [1, 10, 100]), Line("b", [0], [nan])], "x", log=True
    )
    (points,) = re.findall(r'points="([^"]*)"', chart)
    places = np.array([[float(v) for v in point.split(",")] for point in points.split()])
    assert places[:, 0] == pytest.approx([44, 194, 344])
    heights = places[:, 1]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)  # log
    assert heights[0] > heights[2]
    assert "a &lt;b: from 1 to 100" in chart
    long = line_chart("t", [Line("a", range(5000), [float(i % 7) for i in range(5000)])], "x")
    assert len(re.search(r'points="([^"]*)"', long)[1].split()) == 240
    assert line_chart("t", [Line("a", [0], [nan])], "x") == ""
