"""Charts as inline SVG, whose colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gist.report.html import Markup, join, tag
from gist.report.measures import Array, Calibration

WIDTH, HEIGHT = 360, 220  # drawn about as large as the text beside it, on a phone too
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 10, 34
POINTS = 240  # of a line; more are averaged
MATRIX_SIDE = 400
SHADES = 8


@dataclass(frozen=True)
class Line:
    """A named line: ``y`` by ``x``, of the same length. Values that are nan are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def finite(self) -> tuple[Array, Array]:
        """(N,) x and y, at most :data:`POINTS`: means of stretches of equal length."""
        x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
        kept = np.isfinite(x) & np.isfinite(y)
        x, y = x[kept], y[kept]
        if len(x) > POINTS:
            parts = np.array_split(np.arange(len(x)), POINTS)
            x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
        return x, y


@dataclass(frozen=True)
class _Axis:
    """A linear or logarithmic scale between two places of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: Array | float) -> Array:
        low, high, places = self.low, self.high, np.asarray(values, np.float64)
        if self.log:
            low, high, places = math.log10(low), math.log10(high), np.log10(places)
        scaled: Array = self.start + (places - low) / (high - low) * (self.end - self.start)
        return scaled

    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _nice_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + i) * step for i in range(count + 1)]


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**p for p in range(first, last + 1) for f in factors]
        ticks = [t for t in ticks if low <= t * (1 + 1e-9) and t <= high * (1 + 1e-9)]
        if len(ticks) >= 3 or factors == (1, 2, 5):
            break
    return ticks[:: max(1, len(ticks) // 5)]


def _limits(lines: Sequence[tuple[Array, Array]], log: bool) -> tuple[float, float]:
    values = np.concatenate([y for _, y in lines])
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.15, high * 1.15
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin if low < 0 or low > margin else 0.0, high + margin


def _number(value: float) -> str:
    """A tick's or a caption's number, without more digits than it needs."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    *,
    percent: bool = False,
    log: bool = False,
    dot: tuple[float, float, str] | None = None,
) -> Markup:
    """A figure with up to four lines, told apart by colour and by dashes, and their legend.

    Args:
        title: the figure's caption.
        lines: those without a value are left out.
        x_name: what the horizontal axis counts.
        percent: y is in [0, 1], and shown in %.
        log: y has a logarithmic scale, if its values are positive and span a factor of ten.
        dot: a marked point, x and y, and what it is.
    """
    drawn = [(line.name, *line.finite()) for line in lines]
    drawn = [(name, x, y) for name, x, y in drawn if len(x)]
    if not drawn:
        return Markup("")
    lowest, highest = min(y.min() for *_, y in drawn), max(y.max() for *_, y in drawn)
    log = log and lowest > 0 and highest >= 10 * lowest
    ends = min(x.min() for _, x, _ in drawn), max(x.max() for _, x, _ in drawn)
    if ends[0] == ends[1]:
        ends = ends[0] - 0.5, ends[1] + 0.5
    across = _Axis(*ends, LEFT, WIDTH - RIGHT)
    up = _Axis(*_limits([(x, y) for _, x, y in drawn], log), HEIGHT - BOTTOM, TOP, log)

    def shown(value: float) -> str:
        return f"{_number(100 * value)} %" if percent else _number(value)

    curves = []
    for number, (_, x, y) in enumerate(drawn, start=1):
        places = zip(across.at(x), up.at(y), strict=True)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        curves.append(tag("polyline", points=points, class_=f"line line{number}"))
        if len(x) == 1:
            a, b = points.split(",")
            curves.append(tag("circle", cx=a, cy=b, r=3, class_="dot"))
    if dot is not None:
        place = across.at(dot[0]), up.at(dot[1])
        curves.append(tag("circle", cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=4, class_="dot"))
    factor, unit = (100, " %") if percent else (1, "")

    def exact(value: float) -> str:
        return f"{factor * value:.4g}{unit}"

    said = "; ".join(f"{name}: from {exact(y[0])} to {exact(y[-1])}" for name, _, y in drawn)
    label = f"{title}, by {x_name}. {said}."
    if dot is not None:
        label += f" Marked: {dot[2]}, {exact(dot[1])}."
    svg = tag(
        "svg", _axes(across, up, x_name, shown), *curves,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label,
    )  # fmt: skip
    legend = [_legend(number, name) for number, (name, *_) in enumerate(drawn, start=1)]
    if dot is not None:
        mark = tag("svg", tag("circle", cx=13, cy=5, r=4, class_="dot"),
                   viewBox="0 0 26 10", aria_hidden="true")  # fmt: skip
        legend.append(tag("span", mark, dot[2]))
    return tag("figure", tag("figcaption", title), svg, tag("div", *legend, class_="legend"))


def _legend(number: int, name: str) -> Markup:
    line = tag("line", x1=0, y1=5, x2=26, y2=5, class_=f"line line{number}")
    return tag("span", tag("svg", line, viewBox="0 0 26 10", aria_hidden="true"), name)


def _axes(across: _Axis, up: _Axis, x_name: str, shown: object) -> Markup:
    parts = []
    for tick in up.ticks():
        y = f"{up.at(tick):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis"))
        text = shown(tick)  # type: ignore[operator]
        parts.append(tag("text", text, x=LEFT - 5, y=y, dy="0.35em", text_anchor="end"))
    for tick in across.ticks():
        x = f"{across.at(tick):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=up.start, y2=up.start + 4, class_="axis"))
        parts.append(tag("text", _number(tick), x=x, y=up.start + 15, text_anchor="middle"))
    middle = (across.start + across.end) / 2
    parts.append(tag("text", x_name, x=middle, y=HEIGHT - 3, text_anchor="middle"))
    return join(parts)


def reliability_diagram(calibration: Calibration) -> Markup:
    """Accuracy by predicted probability, with the gap to the diagonal, and images per bin."""
    side, low = 300, 60
    across = _Axis(0, 1, LEFT, LEFT + side)
    up, count = _Axis(0, 1, TOP + side, TOP), _Axis(0, 1, TOP + side + low + 30, TOP + side + 30)
    most = max(1, int(calibration.images.max()))
    parts, gaps = [], []
    for index, images in enumerate(calibration.images.tolist()):
        if not images:
            continue
        x = float(across.at(calibration.edges[index]))
        width = float(across.at(calibration.edges[index + 1])) - x
        accuracy, probability = calibration.accuracy[index], calibration.probability[index]
        top, between = sorted(float(up.at(value)) for value in (accuracy, probability))
        sizes = {"x": f"{x + 1:.1f}", "width": f"{width - 2:.1f}"}
        height = up.start - float(up.at(accuracy))
        parts.append(tag("rect", y=f"{up.at(accuracy):.1f}", height=f"{height:.1f}",
                         class_="bar", **sizes))  # fmt: skip
        gaps.append(tag("rect", y=f"{top:.1f}", height=f"{between - top:.1f}",
                        class_="gap", **sizes))  # fmt: skip
        tall = (count.start - count.end) * images / most
        parts.append(tag("rect", y=f"{count.start - tall:.1f}", height=f"{tall:.1f}",
                         class_="bar", **sizes))  # fmt: skip
    for tick in (0, 0.25, 0.5, 0.75, 1):
        place, y, name = f"{across.at(tick):.1f}", f"{up.at(tick):.1f}", f"{100 * tick:.0f} %"
        parts.append(tag("line", x1=across.start, x2=across.end, y1=y, y2=y, class_="axis"))
        parts.append(tag("text", name, x=LEFT - 5, y=y, dy="0.35em", text_anchor="end"))
        parts.append(tag("text", name, x=place, y=count.start + 15, text_anchor="middle"))
    parts += [
        tag("line", x1=across.start, x2=across.end, y1=up.start, y2=up.end, class_="ideal"),
        tag("text", f"{most:,}", x=LEFT - 5, y=count.end + 8, text_anchor="end"),
        tag("text", "0", x=LEFT - 5, y=count.start, text_anchor="end"),
        tag("text", "images", x=LEFT + 4, y=count.end - 4),
        tag("text", "probability of the predicted class", x=LEFT + side / 2, y=count.start + 31,
            text_anchor="middle"),
    ]  # fmt: skip
    label = (
        "Reliability diagram: accuracy by probability of the predicted class. Expected "
        f"calibration error {calibration.error:.2%}. The numbers are in the table below."
    )
    height = count.start + 36
    return tag(
        "svg", *parts, *gaps, class_="reliability",
        viewBox=f"0 0 {LEFT + side + 18} {height:.0f}", role="img", aria_label=label,
    )  # fmt: skip


def heat_map(matrix: Array, title: str) -> Markup:
    """A confusion matrix of many classes, without numbers: each row is divided by its sum.

    Correct predictions have another colour than wrong ones. The darker, the larger the share.
    """
    classes = len(matrix)
    side = MATRIX_SIDE / classes
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    level = np.ceil(shares * SHADES).astype(int)
    parts = []
    for right in (True, False):
        on_diagonal = np.eye(classes, dtype=bool)
        for shade in range(1, SHADES + 1):
            cells = np.argwhere((level == shade) & (on_diagonal == right))
            if not len(cells):
                continue
            edge = f"h{side:.3g}v{side:.3g}h-{side:.3g}z"
            path = "".join(f"M{c * side:.1f} {r * side:.1f}{edge}" for r, c in cells.tolist())
            kind = "right" if right else "wrong"
            opacity = f"{0.15 + 0.85 * shade / SHADES:.2f}"
            parts.append(tag("path", d=path, class_=kind, fill_opacity=opacity))
    tens = [i * side for i in range(0, classes + 1, 10)]
    lines = "".join(f"M{t:.1f} 0V{MATRIX_SIDE}M0 {t:.1f}H{MATRIX_SIDE}" for t in tens)
    return tag(
        "svg", *parts, tag("path", d=lines, class_="grid"),
        viewBox=f"0 0 {MATRIX_SIDE} {MATRIX_SIDE}", role="img", aria_label=title,
    )  # fmt: skip
