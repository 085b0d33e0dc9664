"""Files: the cache folder, and writes that never leave half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """``$GIST_CACHE``, or ``~/.cache/gist``."""
    return Path(os.environ.get("GIST_CACHE") or Path.home() / ".cache" / "gist")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder if missing. An error leaves the earlier file whole.

    Raises:
        OSError: the file could not be written; the text names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")  # processes may write at once
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two, by :func:`write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name into an OSError raised inside: the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
