"""Pictures of a comparison; PNG, readable without colour, and drawn without a display."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from mmfast.experiments.summary import Summary
from mmfast.plots import COLORS, DPI, GREY, MARKERS, Figure

# File names of the pictures of a comparison.
PICTURES = ("accuracy.png", "modality_accuracy.png", "contributions.png")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


def plot_comparison(summaries: Sequence[Summary], folder: Path) -> list[str]:
    """Write the pictures of a comparison and return their file names."""
    for draw, name in zip(FIGURES.values(), PICTURES, strict=True):
        draw(summaries).savefig(folder / name, dpi=DPI)
    return list(PICTURES)


def accuracy_figure(summaries: Sequence[Summary]) -> Figure:
    """Draw test accuracy per method: mean, standard deviation, every seed; lines at the baselines."""
    figure = Figure(figsize=(7.5, 1.5 + 0.36 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    bars = {s.name: 100 * s.mean_accuracy for s in summaries if s.name in ("joint", "unimodal")}
    for name, color, dash in (("joint", COLORS[0], "--"), ("unimodal", COLORS[1], ":")):
        if name in bars:
            title = next(s.title for s in summaries if s.name == name)
            axes.axvline(bars[name], color=color, linestyle=dash, linewidth=1.4, label=title, zorder=1)
    seeds = max(len(s.accuracy) for s in summaries)
    for row, summary in enumerate(summaries):
        values = [100 * value for value in summary.accuracy]
        if len(values) > 1:
            axes.scatter(
                values,
                [row] * len(values),
                s=16,
                facecolors="none",
                edgecolors=GREY,
                linewidths=0.8,
                zorder=2,
            )
            axes.errorbar(
                statistics.fmean(values),
                row,
                xerr=statistics.stdev(values),
                color="black",
                capsize=3,
                zorder=3,
            )
        axes.plot(statistics.fmean(values), row, "o", color="black", markersize=6, zorder=4)
    _method_axis(axes, [summary.title for summary in summaries])
    spread = f", mean ± standard deviation and each of {seeds} seeds" if seeds > 1 else ""
    axes.set_xlabel(f"Test accuracy (%){spread}")
    if bars:
        figure.legend(loc="outside upper right", ncols=len(bars), frameon=False)
    return figure


def modality_accuracy_figure(summaries: Sequence[Summary]) -> Figure:
    """Draw the accuracy of every modality alone per method: dots, or a coloured grid for more than four."""
    modalities = list(summaries[0].alone)
    draw = _dots if len(modalities) <= 4 else _grid
    return draw(summaries, modalities)


def _dots(summaries: Sequence[Summary], modalities: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.5, 1.8 + 0.42 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for row, summary in enumerate(summaries):
        # Offsets within the row keep equal figures apart.
        offsets = [0.13 * (m - (len(modalities) - 1) / 2) for m in range(len(modalities))]
        for m, name in enumerate(modalities):
            value = summary.alone[name]
            if value is None:
                continue
            axes.plot(
                100 * value,
                row + offsets[m],
                MARKERS[m],
                markersize=7,
                markeredgecolor=COLORS[m],
                markerfacecolor=COLORS[m] if summary.protocol == "own-head" else "white",
                markeredgewidth=1.5,
            )
        axes.plot(100 * summary.mean_accuracy, row, "|", color="black", markersize=17, markeredgewidth=1.8)
    _method_axis(axes, [summary.title for summary in summaries])
    axes.set_xlabel("Test accuracy (%), mean over seeds")
    style: dict[str, Any] = {"linestyle": "none", "markersize": 7, "markeredgewidth": 1.5}
    handles = [
        Line2D([], [], marker=MARKERS[m], color=COLORS[m], label=f"{name} alone", **style)
        for m, name in enumerate(modalities)
    ]
    handles.append(
        Line2D([], [], marker="|", color="black", label="all modalities", **(style | {"markersize": 14}))
    )
    for protocol, face in (("own-head", GREY), ("masked", "white")):
        if any(summary.protocol == protocol for summary in summaries):
            shape = Line2D(
                [], [], marker="o", color=GREY, markerfacecolor=face, label=f"alone: {protocol}", **style
            )
            handles.append(shape)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / 2), frameon=False
    )
    return figure


def _grid(summaries: Sequence[Summary], modalities: Sequence[str]) -> Figure:
    rows = [
        [math.nan if (value := summary.alone[name]) is None else 100 * value for name in modalities]
        for summary in summaries
    ]
    figure = Figure(figsize=(3.2 + 0.6 * len(modalities), 2.1 + 0.4 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, cmap="cividis", aspect="auto")
    low, high = image.get_clim()
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if not math.isnan(value):
                dark = value < (low + high) / 2
                axes.text(
                    x,
                    y,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=9,
                )
    axes.set_xticks(range(len(modalities)), modalities, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(summaries)), [f"{s.title} ({s.protocol})" for s in summaries])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="Accuracy alone (%)", fraction=0.04)
    axes.set_title("Each modality alone on the test set, mean over seeds", fontsize=11, loc="left")
    return figure


def contributions_figure(summaries: Sequence[Summary]) -> Figure:
    """Draw the mean contribution of every modality to validation samples over epochs, one panel a method."""
    modalities = list(summaries[0].contribution)
    columns = len(summaries) if len(summaries) <= 4 else math.ceil(len(summaries) / 2)
    rows = math.ceil(len(summaries) / columns)
    legend_columns = min(len(modalities), 2 * columns, 6)
    legend_height = 0.3 * math.ceil(len(modalities) / legend_columns)
    size = (max(5.0, 0.5 + 2.6 * columns), 0.6 + legend_height + 2.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(summaries) :]:
        panel.remove()
    for summary, axes in zip(summaries, panels.flat, strict=False):
        for m, name in enumerate(modalities):
            epochs, means = _over_epochs(summary, name)
            axes.plot(
                epochs,
                means,
                marker="o" if len(epochs) == 1 else None,
                color=COLORS[m % len(COLORS)],
                linestyle=_DASHES[m // len(COLORS) % len(_DASHES)],
                linewidth=1.6,
                label=name,
            )
        stages = [entry["stage"] for entry in summary.runs[0]["history"]]
        for epoch in range(1, len(stages)):
            if stages[epoch] != stages[epoch - 1]:
                axes.axvline(epoch + 0.5, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(summary.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "Epoch (dotted line: the next stage begins)" if _has_stages(summaries) else "Epoch", fontsize=10
    )
    figure.supylabel("Mean contribution, validation set", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=legend_columns, frameon=False)
    return figure


# What draws each picture, by what it shows.
FIGURES = {
    "accuracy": accuracy_figure,
    "modality_accuracy": modality_accuracy_figure,
    "contributions": contributions_figure,
}


def _has_stages(summaries: Sequence[Summary]) -> bool:
    return any(len({entry["stage"] for entry in s.runs[0]["history"]}) > 1 for s in summaries)


def _over_epochs(summary: Summary, modality: str) -> tuple[list[int], list[float]]:
    """Return epochs counted from 1 over all stages, and the contribution's mean over seeds."""
    curves = [[entry["val"]["contribution"][modality] for entry in run["history"]] for run in summary.runs]
    epochs, means = [], []
    for epoch, values in enumerate(zip(*curves, strict=False), 1):
        known = [value for value in values if value is not None]
        if known:
            epochs.append(epoch)
            means.append(statistics.fmean(known))
    return epochs, means


def _method_axis(axes: Any, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
