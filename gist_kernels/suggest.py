"""Error texts for unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(argument: str, given: str, known: Iterable[str], hint: str = "") -> str:
    """The sentence for a name that is not in ``known``: nearest ones first, all when few.

    >>> from gist_kernels.suggest import unknown_name
    >>> unknown_name("method", "adaptor", ["adapter", "lora"])
    "method: 'adaptor' is not known; did you mean 'adapter'? Known: adapter, lora"
    """
    names = sorted(known)
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    text = f"{argument}: {given!r} is not known"
    if near:
        text += "; did you mean " + " or ".join(map(repr, near)) + "?"
    if len(names) <= 20:
        text += ("" if near else ".") + " Known: " + ", ".join(names)
    return f"{text}{hint}"
