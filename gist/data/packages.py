"""Folders of files that packages of registries carry, read where they were installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NORMAL_PLACES = (Path("/"), Path())


def package_folder(places: Sequence[str], *, python: bool) -> Path | None:
    """The first of some folders that exists, or None if the package is missing.

    Args:
        places: relative paths, looked for below the folders of ``$GIST_DATA``, ``/`` and the
            current folder.
        python: the first place begins with a Python package's name, and may be anywhere on
            ``sys.path``.
    """
    given = os.environ.get("GIST_DATA", "")
    roots = [Path(root) for root in given.split(os.pathsep) if root]
    for root in (*roots, *NORMAL_PLACES):
        for place in places:
            if (root / place).is_dir():
                return root / place
    module = find_spec(places[0].partition("/")[0]) if python else None
    found = module.submodule_search_locations if module is not None else None
    for location in found or ():  # a namespace package has several, and no file of its own
        folder = Path(location).parent / places[0]
        if folder.is_dir():
            return folder
    return None
