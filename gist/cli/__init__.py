"""The ``gist`` command."""

try:
    import accelerate  # noqa: F401
    import PIL  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"the gist command needs {error.name}, which is missing: pip install 'gist-kernels[train]'"
    ) from error

from gist.cli.main import main

__all__ = ["main"]
