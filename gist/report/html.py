"""HTML in which every text is escaped, and the frame of a page that fetches nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("style.css")
# No script, no font, no request: images are data URIs, and the style is in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """HTML that stands in a page as it is; any other string is escaped."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """A text as HTML, for elements and for quoted attributes."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other; what is no :class:`Markup` is escaped."""
    return Markup("".join(map(escaped, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. An attribute ends in _ where it is a keyword of Python, and has _ for -.

    >>> from gist.report.html import tag
    >>> tag("b", "x < y", class_="note")
    '<b class="note">x &lt; y</b>'
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta", "line", "rect", "path", "circle", "polyline"):
        return Markup(f"<{name}{listed}/>")
    return Markup(f"<{name}{listed}>{join(children)}</{name}>")


def table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: str,
    *,
    text_columns: int = 1,
) -> Markup:
    """A table whose first column names its rows.

    Args:
        headings: of the columns.
        rows: their cells.
        caption: what the table shows.
        text_columns: columns from the left that hold text; the others hold numbers.
    """

    def kind(column: int) -> str | None:
        return None if column < text_columns else "number"

    head = [tag("th", h, scope="col", class_=kind(i)) for i, h in enumerate(headings)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind(i)) for i, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    parts = tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body)
    return scrolling(tag("table", *parts), caption)


def scrolling(content: Markup, label: str) -> Markup:
    """Content that scrolls sideways by itself on a narrow screen, by keyboard too."""
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def section(name: str, title: str, *children: object) -> Markup:
    """A section that the page's table of contents can link to."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def details(summary: str, *children: object) -> Markup:
    """A part that is folded away at first."""
    return tag("details", tag("summary", summary), *children)


def settings_table(values: Mapping[str, Any], caption: str) -> Markup:
    """Nested settings as a table, with dotted names."""
    return table(("setting", "value"), flat(values).items(), caption, text_columns=2)


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as texts."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = "none" if value is None else str(value)
    return found


def page(title: str, *children: object) -> bytes:
    """A whole page, in UTF-8; names that are not have their odd bytes escaped."""
    style = STYLE.read_text(encoding="utf-8")
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *children))
    whole = f"<!DOCTYPE html>\n{tag('html', tag('head', *head), body, lang='en')}\n"
    return whole.encode(errors="backslashreplace")
