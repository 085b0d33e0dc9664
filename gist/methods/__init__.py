"""PEFT methods, one file each: a config dataclass that attaches its modules to a backbone."""

from gist.methods.adapter import Adapter
from gist.methods.base import Method
from gist_kernels.suggest import unknown_name

METHODS: dict[str, type[Method]] = {method.name: method for method in (Adapter,)}


def method_type(name: str) -> type[Method]:
    """The config class of a method by its name; ValueError with the nearest names otherwise."""
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Adapter", "Method", "method_type"]
