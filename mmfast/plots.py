"""The look of all pictures, and that of a valuation; PNG, readable without colour, without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import figure as _figure
from torch import Tensor

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow is left out, too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#606060"


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
    figure.savefig(path, dpi=DPI)
