"""What tuning may set a field of a dataclass to: declared beside the field, in its metadata.

A field says so in the place of its default:

    lam: float = tuned(1.0, 0.1, 10, log=True)
    shape: str = tuned_among("linear", "linear", "tanh", "power")
    warmup: int = tuned_epoch(5, 0.02, 0.5)

A field without stays as it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

# Digits of what is drawn: as precise as anyone would set by hand, and short enough to be given by hand.
_DIGITS = 3
_KEY = "range"


@dataclass(frozen=True)
class Numbers:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low, high: the ends; where both are integers, so is what lies between.
        log: all factors are alike: between 0.1 and 1 lies as much as between 1 and 10.
    """

    low: float
    high: float
    log: bool = False

    def within(self, max_epochs: int) -> Numbers:
        """Return what it is in a run of so many epochs."""
        return self

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, part: float) -> float:
        """Return the number that lies a part of the way, in [0, 1), from the low end to the high one."""
        if self.is_whole:
            return int(self.low + part * (self.high - self.low + 1))
        if self.log:
            return self.low * (self.high / self.low) ** part
        return self.low + part * (self.high - self.low)

    def value(self, drawn: float) -> Any:
        """Return a drawn number as the field takes it: of few digits, which all results tell in full."""
        if self.is_whole or drawn == 0:
            return drawn
        digits = _DIGITS - 1 - math.floor(math.log10(abs(drawn)))
        return min(max(round(drawn, digits), self.low), self.high)

    def drawn(self, value: Any) -> float | None:
        """Return the number that a field's value is drawn as, None where it lies outside."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and self.low <= value <= self.high else None


@dataclass(frozen=True)
class Choices:
    """Any of some values."""

    values: tuple[Any, ...]

    def within(self, max_epochs: int) -> Choices:
        """Return what it is in a run of so many epochs."""
        return self

    def at(self, part: float) -> Any:
        """Return the value that lies a part of the way, in [0, 1), from the first to the last."""
        return self.values[int(part * len(self.values))]

    def value(self, drawn: Any) -> Any:
        """Return what was drawn."""
        return drawn

    def drawn(self, value: Any) -> Any | None:
        """Return the value, None where it is none of these."""
        return value if value in self.values else None


@dataclass(frozen=True)
class Spacing(Numbers):
    """A number of epochs k, drawn for the tuple of epochs k, 2k, ..., `times` of them."""

    times: int = 1

    def value(self, drawn: float) -> Any:
        """Return the epochs."""
        return tuple(int(drawn) * (number + 1) for number in range(self.times))

    def drawn(self, value: Any) -> float | None:
        """Return k, None where the epochs are no such tuple."""
        value = tuple(value)
        first = value[0] if value else None
        return super().drawn(first) if first is not None and value == self.value(first) else None


@dataclass(frozen=True)
class Epochs:
    """Epochs at which something acts, as parts of all epochs of a stage.

    Attributes:
        low, high: in [0, 1].
        times: None: one epoch; otherwise a tuple of so many, evenly spaced, as Spacing has it.
    """

    low: float
    high: float
    times: int | None = None

    def within(self, max_epochs: int) -> Numbers:
        """Return the epochs that these are in a run of so many; at least epoch 1."""
        low = max(1, round(self.low * max_epochs))
        high = max(low, round(self.high * max_epochs))
        return Numbers(low, high) if self.times is None else Spacing(low, high, times=self.times)


Range = Numbers | Choices | Epochs


def tuned(default: Any, low: float, high: float, *, log: bool = False) -> Any:
    """Return a field of a dataclass that tuning draws from `low` to `high`; see Numbers."""
    return field(default=default, metadata={_KEY: Numbers(low, high, log)})


def tuned_among(default: Any, *values: Any) -> Any:
    """Return a field of a dataclass that tuning chooses among values."""
    return field(default=default, metadata={_KEY: Choices(values)})


def tuned_epoch(default: int, low: float, high: float) -> Any:
    """Return a field that is an epoch, drawn between these parts of all epochs."""
    return field(default=default, metadata={_KEY: Epochs(low, high)})


def tuned_epochs(default: tuple[int, ...], low: float, high: float) -> Any:
    """Return a field that holds epochs k, 2k, ..., with k drawn between these parts of all epochs."""
    return field(default=default, metadata={_KEY: Epochs(low, high, len(default))})


def ranges_of(settings: Any) -> dict[str, Range]:
    """Return the ranges declared in a dataclass, by field."""
    return {each.name: each.metadata[_KEY] for each in fields(settings) if _KEY in each.metadata}
