"""The picture of contributions over epochs: one panel a method, the epochs kept, and the test set beside."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from mmfast.experiments.summary import Summary
from mmfast.plots import COLORS, GREY, Figure
from mmfast.reports.picture_parts import legend_below, shape_of, short, swarm

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_TEST: dict[str, Any] = {"marker": "<", "linestyle": "none", "markersize": 7, "clip_on": False}


def contribution_curves(summaries: Sequence[Summary]) -> Figure:
    """Return the figure, without a title.

    Lines are means over seeds on validation data. The epoch whose weights a seed keeps is marked on them by
    the shape of the modality, where results tell it; what these weights give on the test set, as in the
    table, stands at the right edge.
    """
    modalities = list(summaries[0].contribution)
    columns = len(summaries) if len(summaries) <= 4 else math.ceil(len(summaries) / 2)
    rows = math.ceil(len(summaries) / columns)
    figure = Figure(figsize=(max(6.0, 0.5 + 2.6 * columns), 1.7 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(summaries) :]:
        panel.remove()
    for summary, axes in zip(summaries, panels.flat, strict=False):
        _panel(axes, summary, modalities)
    for place, axes in enumerate(panels.flat[: len(summaries)]):
        if place + columns >= len(summaries):
            axes.set_xlabel("Epoch")
        if place % columns == 0:
            axes.set_ylabel("Mean contribution")
    legend_below(figure, _handles(summaries, modalities))
    return figure


def _panel(axes: Any, summary: Summary, modalities: Sequence[str]) -> None:
    stages = [entry["stage"] for entry in summary.runs[0]["history"]]
    for epoch in range(1, len(stages)):
        if stages[epoch] != stages[epoch - 1]:
            axes.axvline(epoch + 0.5, color=GREY, linewidth=1, linestyle=":")
    last = max(len(entry["history"]) for entry in summary.runs)
    edge = last + max(0.5, 0.06 * last)
    size = 6 if len(modalities) <= 4 else 4
    for m, name in enumerate(modalities):
        curve = _over_epochs(summary, name)
        axes.plot(list(curve), list(curve.values()), **_line(m))
        kept = [entry.get("kept_epochs", {}).get(name) for entry in summary.runs]
        places = [epoch for epoch in kept if epoch in curve]
        axes.plot(
            places, [curve[epoch] for epoch in places], linestyle="none", markersize=size, **shape_of(m)
        )
    _test_figures(axes, summary, edge, 0.06 * last)
    axes.set_xlim(right=edge)
    axes.set_title(summary.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _test_figures(axes: Any, summary: Summary, edge: float, step: float) -> None:
    """Mark the contributions to test samples at an edge; those that lie on another go a step inwards."""
    found = {m: value for m, value in enumerate(summary.contribution.values()) if value is not None}
    low, high = axes.get_ylim()
    for (m, value), offset in zip(
        found.items(), swarm(list(found.values()), 0.02 * (high - low)), strict=True
    ):
        inwards = 2 * abs(offset) - (offset > 0)
        axes.plot(edge - step * inwards, value, color=COLORS[m % len(COLORS)], zorder=5, **_TEST)


def _line(m: int) -> dict[str, Any]:
    dash = _DASHES[m // len(COLORS) % len(_DASHES)]
    return {"color": COLORS[m % len(COLORS)], "linestyle": dash, "linewidth": 1.6}


def _handles(summaries: Sequence[Summary], modalities: Sequence[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], label=short(name), **_line(m), marker=shape_of(m)["marker"], markersize=6)
        for m, name in enumerate(modalities)
    ]
    runs = [entry for summary in summaries for entry in summary.runs]
    has_kept = any(entry.get("kept_epochs") for entry in runs)
    shape = "; shape: the epoch a seed keeps" if has_kept else ""
    handles.append(Line2D([], [], color="black", linewidth=1.6, label=f"line: validation set{shape}"))
    handles.append(Line2D([], [], color="black", label="test set, as in the table", **_TEST))
    if any(len({entry["stage"] for entry in run["history"]}) > 1 for run in runs):
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="the next stage begins"))
    return handles


def _over_epochs(summary: Summary, modality: str) -> dict[int, float]:
    """Return the contribution's mean over seeds by epoch, counted from 1 over all stages."""
    curves = [
        [entry["val"]["contribution"][modality] for entry in run["history"] if "val" in entry]
        for run in summary.runs
    ]
    means = {}
    # Of seeds that stopped early the others go on.
    for epoch, values in enumerate(itertools.zip_longest(*curves), 1):
        if known := [value for value in values if value is not None]:
            means[epoch] = statistics.fmean(known)
    return means
