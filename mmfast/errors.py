"""The wording of errors: values of any kind, names spelled wrong, packages that are not installed."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping

_LONGEST = 60


def did_you_mean(
    word: str,
    known: Iterable[str],
) -> str:
    """Return "; did you mean x or y?" with the nearest known names, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def describe(value: object) -> str:
    """Return a value as errors print it: a short one itself, of any other its type and size.

    Numbers of a tensor or an array would bury the sentence, so its shape and dtype stand for it:
    `Tensor [64, 3] of float32`, `ndarray [5] of <U4`, `tuple of 2`.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = type(value).__name__
    if shape is not None and dtype is not None and not isinstance(value, type):
        if len(shape):
            return f"{kind} {list(shape)} of {str(dtype).removeprefix('torch.')}"
        item = getattr(value, "item", None)
        return repr(item()) if item is not None else kind
    if isinstance(value, str | bytes | int | float | complex | None):
        text = repr(value)
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    if isinstance(value, list | tuple | set | Mapping):
        simple = not isinstance(value, Mapping) and all(isinstance(item, int | float | str) for item in value)
        if simple and len(repr(value)) <= _LONGEST:
            return repr(value)
        return f"{kind} of {len(value)}"
    return value.__name__ if isinstance(value, type) else kind


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
