"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$GIST_CACHE``, or ``~/.cache/gist``."""
    return Path(os.environ.get("GIST_CACHE") or Path.home() / ".cache" / "gist")
