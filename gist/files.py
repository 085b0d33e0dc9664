"""Files: where what was fetched is kept, and writing that never leaves half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """``$GIST_CACHE``, or ``~/.cache/gist``."""
    return Path(os.environ.get("GIST_CACHE") or Path.home() / ".cache" / "gist")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder if missing, that is either whole or as it was before.

    Raises:
        OSError: it could not be written; the text names it.
    """
    temporary = path.with_name(f".{path.name}.new")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an OSError raised within: that of a full disk comes without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
