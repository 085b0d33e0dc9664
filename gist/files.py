"""Files: where what was fetched is kept, and writing that never leaves half a file."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$GIST_CACHE``, or ``~/.cache/gist``."""
    return Path(os.environ.get("GIST_CACHE") or Path.home() / ".cache" / "gist")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder if missing, that is either whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
