"""Which settings of an `Optimization` an integration takes, and which it leaves to the other loop's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from mmfast.errors import did_you_mean, either
from mmfast.training.optimization import Optimization


def taken(
    what: str,
    optimization: Optimization | None,
    settings: Mapping[str, Any],
    names: tuple[str, ...],
    instead: str,
) -> Optimization:
    """Return the settings of a run.

    Args:
        what: takes them, as the sentence begins: "MethodModule".
        optimization: None stands for the defaults.
        settings: fields to set on top of it.
        names: of the fields that are taken.
        instead: what to use in place of the others.

    Raises:
        ValueError: another field is set, or there is none of that name.
    """
    known = [field.name for field in fields(Optimization)]
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{what} has no setting {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
            )
    found = replace(optimization or Optimization(), **settings)
    others = [field for field in fields(found) if field.name not in names]
    wrong = [field.name for field in others if getattr(found, field.name) != _default(field)]
    if wrong:
        raise ValueError(f"{what} does not take {either(wrong)} of Optimization: {instead}")
    return found


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
