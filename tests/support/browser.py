"""A page in headless Chromium: its console, and what it shows, measured by a script."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Sizes of the parts that a page must show, and what leads out of it.
PROBE = """
const size = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
const all = (s) => [...document.querySelectorAll(s)];
document.body.dataset.probe = JSON.stringify({
  sections: Object.fromEntries(all("section").map((e) => [e.id, size(e)])),
  drawings: all("svg, img").map(size),
  pictures: all("img").map((e) => e.naturalWidth),
  texts: Object.fromEntries(all("section").map((e) => [e.id, e.textContent])),
  wide: document.documentElement.scrollWidth - innerWidth,
  background: getComputedStyle(document.body).backgroundColor,
  fetched: performance.getEntriesByType("resource").map((e) => e.name),
});
"""


class Shown(NamedTuple):
    """What a browser made of a page: console messages, and :data:`PROBE`'s values."""

    console: list[str]
    probe: dict[str, Any]


def show(page: Path, scratch: Path, width: int) -> Shown:
    """Open a copy of a page to which a script was added, which its policy must allow for that.

    Skips the test where no Chromium is installed.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    text = page.read_text(encoding="utf-8")
    assert "script" not in re.search(r'content="(default-src[^"]*)"', text)[1]
    probed = text.replace("default-src", "script-src &#x27;unsafe-inline&#x27;; default-src", 1)
    probed = probed.replace("</body>", f"<script>{PROBE}</script></body>")
    copy = scratch / f"{width}.html"
    copy.write_text(probed, encoding="utf-8")
    done = subprocess.run(
        [
            found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-extensions",
            "--enable-logging=stderr", f"--user-data-dir={scratch / 'profile'}",
            f"--window-size={width},900", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe is not None, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(console, json.loads(html.unescape(probe[1])))
