"""The report of a run as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gist.report.collect import Collected, Example, Map
from gist.report.html import (
    Markup,
    details,
    page,
    scrolling,
    section,
    settings_table,
    table,
    tag,
)
from gist.report.measures import Array, most_confused
from gist.report.plots import Line, heat_map, line_chart, reliability_diagram
from gist.runs.predictions import SPLIT_NAMES

BESIDE_CLASSES, NUMBERED_CLASSES, DRAWN_CLASSES = 10, 20, 100
SHORT_NAME = 4  # characters, which a column's heading holds
OPEN_ROWS = 40  # of a table that is not folded away
NOT_DEFINED = "-"
BREAK = Markup("<br>")


def report_page(run: Collected) -> bytes:
    """The whole page, in UTF-8."""
    sections = [_training(run)]
    if run.predictions is not None:
        sections += [_confusion(run), _classes(run), _mistakes(run), _calibration(run)]
        sections.append(_attention(run))
    sections.append(_settings(run))
    titles = (
        ("training", "Training"), ("confusion", "Confusion"), ("classes", "Classes"),
        ("mistakes", "Mistakes"), ("calibration", "Calibration"), ("attention", "Attention"),
        ("settings", "Settings"),
    )  # fmt: skip
    whole = "".join(sections)
    links = [tag("a", title, href=f"#{name}") for name, title in titles if f'id="{name}"' in whole]
    contents = tag("nav", *links, aria_label="Sections")
    return page(run.name, _head(run), contents, *sections)


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return NOT_DEFINED if math.isnan(value) else f"{100 * value:.{digits}f} %"


# ---- the head


def _head(run: Collected) -> Markup:
    config = run.results["config"]
    method = config["gist"].get("method")
    methods = method if isinstance(method, list) else [method]
    names = " + ".join(m["name"] if isinstance(m, Mapping) else str(m) for m in methods if m)
    token = "with a Gist token" if config["gist"].get("gist", True) else "without a Gist token"
    about = f"{config['data']}, {config['model']}, {names or 'classifier only'}, {token}"
    tiles = tag("dl", *(_tile(*tile) for tile in _tiles(run)), class_="tiles")
    return tag("header", tag("h1", run.name), tag("p", about, class_="quiet"), tiles, _which(run))


def _tile(name: str, value: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value))


def _tiles(run: Collected) -> list[tuple[str, str]]:
    results, predictions = run.results, run.predictions
    tiles = []
    if predictions is not None:
        tiles.append((f"{_split(run)} accuracy", percent(float(predictions.correct.mean()), 2)))
        if predictions.gist_predicted is not None:
            gist = predictions.gist_predicted
            tiles.append(
                ("Gist token's accuracy", percent(float((gist == predictions.true).mean()), 2))
            )
            same = float((gist == predictions.predicted).mean())
            tiles.append(("both tokens agree", percent(same)))
    if results["val_accuracy"] is not None and (predictions is None or predictions.split == "test"):
        tiles.append(("validation accuracy", percent(results["val_accuracy"], 2)))
    if run.scores is not None and run.calibration is not None:
        tiles.append(("mean F1", f"{run.scores.means()[2]:.3f}"))
        tiles.append(("calibration error", percent(run.calibration.error)))
    counted = results["parameters"]
    trained = sum(counted[part] for part in ("method", "token", "head"))
    tiles.append(("trained parameters", f"{trained:,}"))
    epochs = len(results["fit"]["history"])
    tiles.append(("best epoch", f"{results['fit']['best_epoch']} of {epochs}"))
    tiles.append(("time", _duration(results["seconds"])))
    return tiles


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _split(run: Collected) -> str:
    assert run.predictions is not None
    return SPLIT_NAMES[run.predictions.split]


def _which(run: Collected) -> Markup:
    """Say which images all figures are about."""
    predictions = run.predictions
    if predictions is None:
        text = "There are no predictions: no figures of single classes or images are shown."
    elif predictions.split == "test":
        text = (
            f"Confusion, classes, mistakes, calibration and attention are those of the "
            f"{len(predictions):,} test images, which selected nothing."
        )
    else:
        text = (
            f"There are no test images. Confusion, classes, mistakes, calibration and attention "
            f"are those of the {len(predictions):,} validation images. The best epoch was chosen "
            "on them, so that these figures are optimistic."
        )
    return tag("p", text, class_="note")


# ---- the training


def _training(run: Collected) -> Markup:
    log, history = run.log, run.results["fit"]["history"]
    steps = log.get("step", [])

    def line(name: str, column: str) -> Line:
        return Line(name, steps, log.get(column, []) or [math.nan] * len(steps))

    charts: list[Markup] = []
    if steps:
        has_terms = any(math.isfinite(v) for v in log.get("kl_cls_gist", []))
        charts.append(line_chart("Loss", [line("loss", "loss")], "step", log=True))
        if has_terms:
            entropies = [
                line("class token", "cls_cross_entropy"), line("Gist token", "gist_cross_entropy"),
            ]  # fmt: skip
            divergences = [
                line("KL(class || Gist)", "kl_cls_gist"), line("KL(Gist || class)", "kl_gist_cls"),
            ]  # fmt: skip
            for title, terms in (("Cross-entropies", entropies), ("KL divergences", divergences)):
                charts.append(line_chart(f"{title}, without weights", terms, "step", log=True))
        charts.append(line_chart("Learning rate", [line("learning rate", "lr")], "step"))
    charts += _epochs(history, run.results["fit"]["best_epoch"])
    rows = [
        (e["epoch"], f"{e['train_loss']:.4f}", _or_dash(e["val_loss"], "{:.4f}"),
         NOT_DEFINED if e["val_accuracy"] is None else percent(e["val_accuracy"], 2),
         f"{e['train_seconds']:.1f} s")
        for e in history
    ]  # fmt: skip
    headings = ("epoch", "training loss", "validation loss", "validation accuracy", "time")
    by_epoch = table(headings, rows, "Measurements of each epoch", text_columns=0)
    return section(
        "training", "Training", tag("div", *charts, class_="charts"),
        details(f"{len(rows)} epochs as a table", by_epoch),
    )  # fmt: skip


def _or_dash(value: float | None, form: str) -> str:
    return NOT_DEFINED if value is None else form.format(value)


def _epochs(history: list[dict[str, Any]], best: int | None) -> list[Markup]:
    epochs = [e["epoch"] for e in history]

    def line(name: str, key: str) -> Line:
        return Line(name, epochs, [math.nan if e[key] is None else e[key] for e in history])

    dot = None
    if best is not None and history[best - 1]["val_accuracy"] is not None:
        dot = (best, history[best - 1]["val_accuracy"], "the epoch kept")
    accuracy = [line("validation", "val_accuracy")]
    losses = [line("training loss", "train_loss"), line("validation cross-entropy", "val_loss")]
    return [
        line_chart("Accuracy", accuracy, "epoch", percent=True, dot=dot),
        line_chart("Loss by epoch", losses, "epoch", log=True),
    ]


# ---- classes


def _confusion(run: Collected) -> Markup:
    assert run.matrix is not None
    matrix, classes = run.matrix, run.classes
    wrong = int(matrix.sum() - np.trace(matrix))
    explained = tag(
        "p",
        f"Each row is a true class, each column a predicted one. {wrong:,} of "
        f"{int(matrix.sum()):,} {_split(run)} images are misclassified.",
    )
    parts: list[Markup] = []
    if len(classes) <= NUMBERED_CLASSES:
        parts.append(_matrix(matrix, classes))
    elif len(classes) <= DRAWN_CLASSES:
        title = (
            f"Confusion matrix of {len(classes)} classes, in the order of the table of classes, "
            "without numbers. The most confused pairs are in the table beside it."
        )
        caption = (
            "Share of each true class: blue where correct, red where wrong; a line every 10 classes"
        )
        parts.append(
            tag("figure", heat_map(matrix, title), tag("figcaption", tag("small", caption)))
        )
    else:
        text = f"A matrix of more than {DRAWN_CLASSES} classes can't be read; it is left out."
        parts.append(tag("p", text))
    pairs = most_confused(matrix)
    if pairs and len(classes) > 2:
        support = matrix.sum(1)
        rows = [
            (classes[p.true], classes[p.predicted], f"{p.images:,}",
             percent(p.images / support[p.true]))
            for p in pairs
        ]  # fmt: skip
        headings = ("true", "predicted", "images", "of the class")
        parts.append(table(headings, rows, "Most confused pairs", text_columns=2))
    # A large matrix with its numbers takes the whole width.
    beside = not BESIDE_CLASSES < len(classes) <= NUMBERED_CLASSES
    both = tag("div", *parts, class_="beside" if beside else None)
    return section("confusion", "Confusion matrix", explained, both)


def _matrix(matrix: Array, classes: Any) -> Markup:
    """The matrix with its numbers; the darker, the larger the share of the true class."""
    corner = tag("td", "true ↓", BREAK, "predicted →", class_="corner quiet")
    head = tag("tr", corner, *(tag("th", name, scope="col", title=name) for name in classes))
    rows = []
    for true, row in enumerate(matrix.tolist()):
        cells = [tag("th", classes[true], scope="row", title=classes[true])]
        for predicted, images in enumerate(row):
            share = images / max(1, sum(row))
            colour = "--accent" if predicted == true else "--wrong"
            style = f"background:rgba(var({colour}),{0.08 + 0.42 * share:.2f})" if images else None
            cells.append(tag("td", images or "", style=style))
        rows.append(tag("tr", *cells))
    kind = "matrix named" if max(map(len, classes)) > SHORT_NAME else "matrix"
    body = tag("table", tag("thead", head), tag("tbody", *rows), class_=kind)
    return scrolling(body, "Confusion matrix")


def _classes(run: Collected) -> Markup:
    assert run.scores is not None
    scores, means = run.scores, run.scores.means()

    def shown(value: float) -> str:
        return NOT_DEFINED if math.isnan(value) else f"{value:.3f}"

    columns = (scores.precision, scores.recall, scores.f1)
    rows: list[tuple[object, ...]] = [
        (name, *(shown(column[label]) for column in columns), f"{scores.support[label]:,}")
        for label, name in enumerate(run.classes)
    ]
    total = int(scores.support.sum())
    rows.append((tag("b", "mean"), *map(shown, means), f"{total:,}"))
    headings = ("class", "precision", "recall", "F1", "images")
    listed = table(headings, rows, f"Scores of each class on the {_split(run)} images")
    if len(rows) > OPEN_ROWS:
        listed = details(f"{len(run.classes)} classes as a table", listed)
    note = tag(
        "p",
        "Precision: correct predictions over all predictions of the class. Recall: correct "
        "predictions over all images of the class. F1: their harmonic mean. A dash: not defined, "
        "without a prediction or an image; left out of the mean.",
        class_="quiet",
    )
    return section("classes", "Classes", listed, note)


# ---- images


def _mistakes(run: Collected) -> Markup:
    assert run.predictions is not None
    wrong = int((~run.predictions.correct).sum())
    if not wrong:
        return section("mistakes", "Worst mistakes", tag("p", "No image is misclassified."))
    text = f"The {len(run.mistakes)} most probable of {wrong:,} misclassifications."
    if all(example.picture is None for example in run.mistakes):
        why = f" Pictures are not shown: {run.no_pictures}." if run.no_pictures else ""
        rows = [
            (e.path, e.true, e.predicted, percent(e.probability), e.gist_predicted or NOT_DEFINED)
            for e in run.mistakes
        ]
        headings = ("item", "true", "predicted", "probability", "Gist token's")
        listed = table(headings, rows, "Worst mistakes", text_columns=3)
        return section("mistakes", "Worst mistakes", tag("p", text + why), listed)
    pictures = tag("ul", *(tag("li", _figure(e)) for e in run.mistakes), class_="pictures")
    return section("mistakes", "Worst mistakes", tag("p", text), pictures)


def _figure(example: Example) -> Markup:
    alt = f"{example.path}: {example.true}, predicted as {example.predicted}"
    picture = (
        tag("img", src=example.picture, alt=alt) if example.picture else tag("p", "can't be read")
    )
    return tag("figure", picture, _caption(example))


def _caption(example: Example) -> Markup:
    said = f"{example.predicted} ({percent(example.probability, 0)})"
    lines = [tag("b", example.true), BREAK, f"predicted {said}"]
    if example.gist_predicted is not None:
        lines += [BREAK, f"Gist token {example.gist_predicted}"]
    return tag("figcaption", *lines, BREAK, tag("small", example.path))


def _calibration(run: Collected) -> Markup:
    calibration = run.calibration
    assert calibration is not None
    bins = len(calibration.images)
    text = tag(
        "p",
        f"Expected calibration error: {percent(calibration.error, 2)}. It is the mean gap between "
        f"accuracy and probability of the predicted class, over {bins} bins of equal width, each "
        "weighted by its images: ECE = Σ |B| / N · |accuracy(B) - probability(B)|, as in ",
        tag("a", "Guo et al., 2017", href="https://arxiv.org/abs/1706.04599", rel="noreferrer"),
        ", equation 3. Bars below the diagonal are overconfident; the red part is the gap.",
    )
    rows = [
        (f"{100 * calibration.edges[i]:.0f} to {percent(calibration.edges[i + 1], 0)}",
         f"{images:,}", percent(calibration.probability[i]), percent(calibration.accuracy[i]))
        for i, images in enumerate(calibration.images.tolist())
        if images
    ]  # fmt: skip
    headings = ("probability", "images", "mean", "accuracy")
    listed = table(headings, rows, "Bins that have images")
    drawn = tag("figure", reliability_diagram(calibration))
    both = tag("div", drawn, listed, class_="beside")
    return section("calibration", "Calibration", text, both)


def _attention(run: Collected) -> Markup:
    if run.no_maps is not None or not run.maps:
        why = run.no_maps or "no image was chosen"
        return section("attention", "Attention", tag("p", f"Not available: {why}."))
    text = (
        "Attention from each token to the patches in the last block, the mean over its heads. Each "
        "map has its own scale, from black to its largest weight. The percentage is the share of "
        "the token's attention that goes to patches; the rest goes to other tokens."
    )
    items = [tag("li", _row_of_maps(shown)) for shown in run.maps]
    return section("attention", "Attention", tag("p", text), tag("ul", *items, class_="maps"))


def _row_of_maps(shown: Map) -> Markup:
    example, seen = shown.example, f"{shown.example.path} as the model sees it"
    image = tag("img", src=example.picture, alt=seen)
    pictures = [tag("figure", image, tag("figcaption", tag("small", "image")))]
    for name, of_token in (("class token", shown.cls), ("Gist token", shown.gist)):
        if of_token is None:
            continue
        source, share = of_token
        alt = f"Attention of the {name} over {example.path}"
        caption = tag("figcaption", tag("small", f"{name}, {percent(share, 0)}"))
        pictures.append(tag("figure", tag("img", src=source, alt=alt), caption))
    how = "correctly" if example.true == example.predicted else f"as {example.predicted}"
    title = f"{example.true}, predicted {how}, {percent(example.probability, 0)}"
    return tag("div", tag("p", title), tag("div", *pictures, class_="row"))


# ---- settings


def _settings(run: Collected) -> Markup:
    results = run.results
    origin: dict[str, Any] = {
        key: results[key]
        for key in ("versions", "machine", "git", "parameters", "img_size", "normalisation")
        if key in results
    }
    origin["images per second in training"] = f"{results['fit']['images_per_second']:.1f}"
    origin["seconds"] = f"{results['seconds']:.1f}"
    both = tag(
        "div",
        settings_table(results["config"], "Settings"),
        settings_table(origin, "Origin of the results"),
        class_="beside",
    )
    return section("settings", "Settings and environment", both)
