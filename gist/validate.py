"""Checks of settings. Each raises a ValueError that names the setting, its value and its range."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.check import unknown_name


def check_count(name: str, value: object, at_least: int = 1) -> None:
    """An integer of at least ``at_least``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; it is {value!r}")


def check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}; it is {value}")


def check_between(name: str, value: float, low: float, high: float, high_name: str) -> None:
    """From ``low`` to ``high``, both included; ``high_name`` is the setting that gives ``high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high_name}, {high}; it is {value}")


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; it is {value}")


def check_non_negative(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number, at least 0; it is {value}")


def check_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); it is {value}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """One of a few words, all of which the error lists."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; it is {value!r}")


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """One of many names; the error suggests the nearest."""
    known = list(known)
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))


def check_activation(name: str) -> None:
    check_known("activation", name, ACTIVATIONS)
