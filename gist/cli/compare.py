"""``gist compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gist.cli.common import add_command, console
from gist.files import write_atomically
from gist.report.compare import compare


def register(commands: Any) -> None:
    """Add the command to the parser of ``gist``."""
    parser = add_command(
        commands, "compare", _compare, "runs side by side, and their differences image by image"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS",
                        help="two or more folders; all are compared with the first")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="write a page; default: print Markdown")  # fmt: skip


def _compare(arguments: argparse.Namespace) -> None:
    found = compare(arguments.runs)
    if arguments.html is None:
        console.print(found.markdown(), highlight=False, soft_wrap=True)
        return
    write_atomically(arguments.html, found.html())
    console.print(f"Comparison: {arguments.html}", highlight=False, soft_wrap=True)
