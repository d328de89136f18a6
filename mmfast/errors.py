"""The wording of errors and reprs: values of any kind, names spelled wrong, packages that are missing."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

_LONGEST = 60


def did_you_mean(
    word: str,
    known: Iterable[str],
    meant: Mapping[str, str] | None = None,
    *,
    cutoff: float = 0.4,
) -> str:
    """Return "; did you mean x or y?" with the nearest known names, or nothing where none is near.

    Args:
        word: what was given.
        known: the names there are.
        meant: what certain words mean, however they are spelled.
        cutoff: how near a name must be, from 0 to 1.
    """
    if meant and word in meant:
        near = [meant[word]]
    else:
        near = difflib.get_close_matches(word, list(known), n=2, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def nearest_names(name: object, known: Iterable[str]) -> str:
    """Return the known names in quotes, those of the nearest spelling first: 'audio', 'image'."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=len(names), cutoff=0.5)
    return ", ".join(repr(each) for each in [*close, *(each for each in names if each not in close)])


def check_one_of(
    name: str,
    value: object,
    choices: Collection[str],
    *,
    quoted: bool = False,
    nearest_first: bool = False,
    suggest: bool = False,
) -> None:
    """Raise ValueError unless `value` is one of `choices`.

    Args:
        name: of the argument.
        value: what was given.
        choices: names, or a dict by name.
        quoted: put the choices in quotes.
        nearest_first: and those of the nearest spelling first.
        suggest: end with what was meant, where a choice is near.
    """
    if value in choices:
        return
    listed = ", ".join(map(repr, choices) if quoted else choices)
    if nearest_first:
        listed = nearest_names(value, choices)
    hint = did_you_mean(str(value), choices) if suggest else ""
    raise ValueError(f"{name} must be one of {listed}, got {describe(value)}{hint}")


def unknown_modalities(name: str, got: str, modalities: Iterable[str]) -> ValueError:
    """Return the error of an argument that names modalities which are not there."""
    return ValueError(f"{name} must name modalities among {', '.join(modalities)}, got {got}")


def dtype_name(dtype: object) -> str:
    """Return a dtype of torch or numpy as errors print it: float32."""
    return str(dtype).removeprefix("torch.")


def either(names: Iterable[str]) -> str:
    """Return names as a sentence lists them: adam, adamw or sgd."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def describe(value: object) -> str:
    """Return a value as errors print it: a short one itself, of any other its type and size.

    The elements of a tensor or an array would bury the sentence, so its shape and dtype stand for it:
    `Tensor [64, 3] of float32`, `ndarray [5] of <U4`, `tuple of 2`.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = type(value).__name__
    if shape is not None and dtype is not None and not isinstance(value, type):
        if len(shape):
            return f"{kind} {list(shape)} of {dtype_name(dtype)}"
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


def shown(values: Mapping[str, object]) -> str:
    """Return settings as reprs print them: `lr=0.001, collate_fn=pad`."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in values.items())


def _shown(value: object) -> str:
    if isinstance(value, type) or inspect.isroutine(value):
        # The address of a function says nothing.
        return getattr(value, "__qualname__", describe(value))
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(_shown, (value.func, *value.args)))}, {shown(value.keywords)})"
    if hasattr(value, "shape"):
        return describe(value)
    is_short = len(text := repr(value)) <= _LONGEST and "\n" not in text and " at 0x" not in text
    return text if is_short else describe(value)


def is_same(value: object, other: object) -> bool:
    """Whether two settings are alike, where they can be compared: of tensors no one truth tells."""
    return value is other or (type(value) is type(other) and not hasattr(value, "shape") and value == other)


def changed(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not as they are by default."""
    found = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init and not is_same(value, default):
            found[field.name] = value
    return found


@contextlib.contextmanager
def needs_train(what: str, extra: str = "train") -> Iterator[None]:
    """Turn the failed import of another package into an ImportError that says how to install it.

    Args:
        what: needs the package, as the sentence begins: "mmfast.Trainer".
        extra: of mmfast, with which the package comes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mmfast"):
            raise
        raise ImportError(
            f'{what} needs {package}, which is not installed: pip install "mmfast[{extra}]"', name=error.name
        ) from error
