"""The look of all pictures, their fonts, and that of a valuation; PNG, readable without colour or display."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import figure as _figure
from matplotlib import font_manager
from torch import Tensor

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow is left out, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#606060"
# Letters that a sentence on missing fonts shows.
_SHOWN_LETTERS = 6


@contextlib.contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[str]:
    """Draw with fonts that have the letters of all texts; yield a sentence where none installed has, else "".

    What matplotlib draws with comes first, others help out where it lacks a letter.
    """
    letters = frozenset(
        letter for text in texts for letter in text if unicodedata.category(letter)[0] not in "CZ"
    )
    families, missing = _families(letters)
    usual = matplotlib.rcParams["font.family"]
    # A $ in a name is no formula.
    settings: Any = {"font.family": [*usual, *families], "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        yield _missing_sentence(missing)


@functools.lru_cache(maxsize=8)
def _families(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return families of installed fonts for the letters that the usual font lacks, and what none has."""
    usual = font_manager.findfont(font_manager.FontProperties())
    missing = letters - _letters_of(usual)
    if not missing:
        return (), frozenset()
    # Fonts that were installed after matplotlib has looked for the first time.
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(Exception):
            font_manager.fontManager.addfont(path)
    offered: dict[str, frozenset[str]] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=_plainness):
        # The font of boxes, which has one for every letter.
        if entry.name not in offered and not entry.name.startswith("Last Resort"):
            offered[entry.name] = _letters_of(entry.fname) & missing
    chosen: list[str] = []
    while missing and offered:
        best = max(offered, key=lambda name: len(offered[name] & missing))
        if not offered[best] & missing:
            break
        missing -= offered[best]
        chosen.append(best)
    return tuple(chosen), missing


def _plainness(entry: Any) -> tuple[bool, bool, bool, str]:
    """Return by what fonts are ordered: upright, of usual weight and without serifs first."""
    return entry.style != "normal", entry.weight not in (400, "normal"), "Sans" not in entry.name, entry.name


def _letters_of(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except Exception:
        # A file that is no font, or one that matplotlib does not read.
        return frozenset()


def _missing_sentence(missing: frozenset[str]) -> str:
    if not missing:
        return ""
    letters = sorted(missing)
    scripts = dict.fromkeys(unicodedata.name(letter, "unnamed").split()[0] for letter in letters)
    named = ", ".join(name if name.isupper() and len(name) <= 3 else name.capitalize() for name in scripts)
    shown = " ".join(letters[:_SHOWN_LETTERS]) + " ..." * (len(letters) > _SHOWN_LETTERS)
    return (
        f"Pictures show boxes in place of {shown} ({named}): no installed font has these letters. Install "
        "one that does, such as Noto (packages fonts-noto-core and fonts-noto-cjk of Debian), and draw again"
    )


class Figure(_figure.Figure):
    """A figure that notebooks show by themselves, whether or not pyplot is in use."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def plot_valuation(
    contributions: Tensor,  # [N, M]
    present: Tensor | None,  # bool [N, M]
    modalities: Sequence[str],  # M modalities
    utility: str,
    path: Path,
) -> None:
    """Write a histogram of the contributions per sample, one panel a modality, on common axes."""
    with fonts_for(modalities) as note:
        if note:
            warnings.warn(note, stacklevel=3)
        _valuation(contributions, present, modalities, utility).savefig(path, dpi=DPI)


def _valuation(
    contributions: Tensor,  # [N, M]
    present: Tensor | None,  # bool [N, M]
    modalities: Sequence[str],
    utility: str,
) -> Figure:
    import numpy as np

    columns = min(len(modalities), 4)
    rows = math.ceil(len(modalities) / columns)
    figure = Figure(figsize=(max(4.5, 0.6 + 2.6 * columns), 0.9 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(modalities) :]:
        panel.remove()
    low, high = float(contributions.min()), float(contributions.max())
    # Values of few modalities lie on a grid of 1 / 2: bins centred on it show them as they are.
    edges: Any = np.arange(low - 0.125, high + 0.25, 0.25)
    if len(modalities) > 2 or utility not in ("cardinality", "correct"):
        edges = np.linspace(low, max(high, low + 1e-6), 31)
    for m, (name, axes) in enumerate(zip(modalities, panels.flat, strict=False)):
        values = (contributions[:, m] if present is None else contributions[present[:, m], m]).numpy()
        axes.spines[["top", "right"]].set_visible(False)
        if len(values) == 0:
            axes.set_title(f"{name}: in no sample", fontsize=10)
            continue
        counts = np.histogram(values, edges)[0]
        axes.hist(edges[:-1], edges, weights=100 * counts / len(values), color=COLORS[0], alpha=0.85)
        axes.axvline(values.mean(), color=COLORS[1], linewidth=1.8, linestyle="--")
        axes.set_title(f"{name}: mean {values.mean():.2f}", fontsize=10)
    figure.supxlabel(f"Contribution to a sample ({utility}; dashed: mean)", fontsize=10)
    figure.supylabel("Samples (%)", fontsize=10)
    return figure
