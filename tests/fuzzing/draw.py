"""Where the choices of a generated call come from: a seed, or hypothesis, which can shrink them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# Around the vectors of every instruction set (4 to 16 numbers, unrolled by up to 4) and the tiles of a GPU.
SIZES = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    13,
    15,
    16,
    17,
    23,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    97,
    127,
    128,
    129,
    200,
    257,
    300,
)


class Draw:
    """Choices from a seed, which is all that a case is: tools/fuzz prints it for one that fails."""

    def __init__(self, op: str, seed: int, case: int) -> None:
        self.random = np.random.default_rng([zlib.crc32(op.encode()), seed, case])

    def integer(self, low: int, high: int) -> int:
        """Return a whole number of [low, high]; low is the simplest."""
        return int(self.random.integers(low, high + 1))

    def choice(self, values: Sequence[T]) -> T:
        """Return one of the values; the first is the simplest."""
        return values[self.integer(0, len(values) - 1)]

    def chance(self, share: float) -> bool:
        """Return True in about this share of the calls; False is the simplest."""
        return self.integer(0, 99) >= 100 - round(100 * share)

    def size(self, most: int, least: int = 1, zero: float = 0.04) -> int:
        """Return a size, more often a small one: 0 in a share of the cases, else from `least` to `most`."""
        if zero and self.chance(zero):
            return 0
        sizes = [size for size in SIZES if least <= size <= most]
        return sizes[min(self.integer(0, len(sizes) - 1), self.integer(0, len(sizes) - 1))]

    def generator(self) -> np.random.Generator:
        """Return a generator for the numbers of a tensor, of which none is worth shrinking."""
        return np.random.default_rng(self.integer(0, 2**31))


class HypothesisDraw(Draw):
    """The same choices made by hypothesis."""

    def __init__(self, data: Any) -> None:
        from hypothesis import strategies

        self._integers, self._data = strategies.integers, data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(self._integers(low, high))


class Replay(Draw):
    """A list of choices instead of random ones, what is missing the simplest: to shrink a case that fails."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.given, self.made = list(choices), []

    def integer(self, low: int, high: int) -> int:
        place = len(self.made)
        value = min(max(self.given[place] if place < len(self.given) else low, low), high)
        self.made.append(value)
        return value


class Recorded(Draw):
    """A seeded draw that keeps what it chose."""

    def __init__(self, op: str, seed: int, case: int) -> None:
        super().__init__(op, seed, case)
        self.made: list[int] = []

    def integer(self, low: int, high: int) -> int:
        self.made.append(super().integer(low, high))
        return self.made[-1]


def _kind(text: str) -> str:
    """Return what a failure says without its numbers."""
    return re.sub(r"-?\d[\d.e+-]*", "#", text)


def shrunk(
    found: tuple[str, list[int]],
    failure: Callable[[list[int]], tuple[str, list[int]] | None],
    rounds: int = 4,
) -> tuple[str, list[int]]:
    """Return simpler choices that fail alike, and what they fail with: each made smaller while it can be."""
    kind = _kind(found[0])
    for _ in range(rounds):
        before = found[1]
        place = 0
        while place < len(found[1]):
            value = found[1][place]
            for smaller in dict.fromkeys((0, 1, value // 2, value - 1)):
                if not 0 <= smaller < value:
                    continue
                again = failure([*found[1][:place], smaller, *found[1][place + 1 :]])
                if again is not None and _kind(again[0]) == kind:
                    found = again
                    break
            place += 1
        if found[1] == before:
            break
    return found
