"""What the pictures of a comparison share: titles, legends, names that fit, dots that hide no other."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from mmfast.plots import COLORS, MARKERS, Figure

# Letters of a title, and of a legend, that fit an inch.
_TITLE, _LEGEND = 10.5, 13.5
_LONGEST = 28


def entitle(figure: Figure, title: str) -> None:
    """Put a title over a figure, in as many lines as it takes."""
    lines = wrapped(title, max(30, int(_TITLE * figure.get_figwidth())))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def wrapped(text: str, width: int) -> list[str]:
    """Return a text on lines of at most `width` letters; those of Chinese and the like count twice."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _width(lines[-1]) + 1 + _width(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """Put a legend under a figure, with as many columns as its longest entry lets it have."""
    if not handles:
        return
    longest = max(_width(handle.get_label()) for handle in handles) + 5
    most = max(1, int(_LEGEND * figure.get_figwidth() / longest))
    rows = math.ceil(len(handles) / most)
    columns = math.ceil(len(handles) / rows)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * (rows - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def short(name: str, longest: int = _LONGEST) -> str:
    """Return a name with its middle left out where it is long: beginnings and ends tell names apart."""
    if len(name) <= longest:
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[-end:]}"


def shape_of(m: int) -> dict[str, Any]:
    """Return the shape and colour of modality m, in all pictures."""
    return {"marker": MARKERS[m % len(MARKERS)], "color": COLORS[m % len(COLORS)]}


def swarm(values: Sequence[float], width: float) -> list[float]:
    """Return by how many steps each value is moved aside, so that none within `width` is on another."""
    offsets = [0.0] * len(values)
    placed: list[tuple[float, float]] = []
    for place in sorted(range(len(values)), key=lambda i: values[i]):
        near = {offset for value, offset in placed if abs(value - values[place]) < width}
        step = 0
        # 0, 1, -1, 2, -2, ...
        while (offset := (step + 1) // 2 * (1 if step % 2 else -1)) in near:
            step += 1
        offsets[place] = float(offset)
        placed.append((values[place], offsets[place]))
    return offsets
