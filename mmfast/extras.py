"""Errors that say which extra brings a package that is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_train(what: str) -> Iterator[None]:
    """Turn the failed import of another package into an ImportError that says how to install it.

    Args:
        what: needs the package, as the sentence begins: "mmfast.Trainer".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mmfast"):
            raise
        raise ImportError(
            f'{what} needs {package}, which is not installed: pip install "mmfast[train]"', name=error.name
        ) from error
