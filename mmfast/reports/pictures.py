"""Pictures of a comparison; PNG, readable without colour, and drawn without a display.

In all of them a black bar is what all modalities reach together, a small dot one seed, and a shape with its
colour a modality.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.lines import Line2D

from mmfast.experiments.file_names import KINDS, PICTURES, picture_name
from mmfast.experiments.findings import Findings, find
from mmfast.experiments.summary import Summary
from mmfast.plots import DPI, GREY, Figure, fonts_for
from mmfast.reports import picture_titles as titles
from mmfast.reports.contribution_curves import contribution_curves
from mmfast.reports.picture_parts import entitle, legend_below, shape_of, short, swarm

# Modalities that are told apart by shapes; more make a grid.
_MOST_SHAPES = 4
_ALL: dict[str, Any] = {"marker": "|", "color": "black", "markersize": 17, "markeredgewidth": 2}


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn.

    Attributes:
        name: of its file.
        title: what it shows, in a sentence.
        text: what can be read there, for those who do not see it.
        figure: it.
    """

    name: str
    title: str
    text: str
    figure: Figure


def draw(kind: str, summaries: Sequence[Summary], findings: Findings | None = None) -> Picture:
    """Draw a picture of summaries that have runs; `kind` is one of `kinds_of`."""
    drawing = _DRAWINGS[kind](summaries, findings or find(summaries))
    with fonts_for([*drawing.names, drawing.title]):
        figure = drawing.figure()
        entitle(figure, drawing.title)
    return Picture(picture_name(kind), drawing.title, drawing.text, figure)


def kinds_of(summaries: Sequence[Summary]) -> list[str]:
    """Return the kinds of pictures that there is something to draw for: probes where there are some."""
    without = set()
    if not any(summary.probe for summary in summaries):
        without.add("probes")
    if len(summaries[0].alone) < 2 or not any(summary.missing for summary in summaries):
        without.add("missing")
    return [kind for kind in KINDS if kind not in without]


def plot_comparison(
    summaries: Sequence[Summary], folder: Path, findings: Findings | None = None
) -> list[Picture]:
    """Write the pictures of a comparison; those of other runs that lie there are replaced or removed."""
    findings = findings or find(summaries)
    pictures = [draw(kind, summaries, findings) for kind in kinds_of(summaries)]
    for name in {*PICTURES} - {picture.name for picture in pictures}:
        (folder / name).unlink(missing_ok=True)
    for picture in pictures:
        # Letters that no font has are told of once, in a sentence.
        with fonts_for([]):
            picture.figure.savefig(folder / picture.name, dpi=DPI)
    return pictures


def letters_missing(names: Sequence[str]) -> str:
    """Return a sentence where names have letters that no installed font has, else ""."""
    with fonts_for(names) as note:
        return note


class _Drawing(NamedTuple):
    """What is to be drawn: title, words for those who do not see it, names that it shows, how."""

    title: str
    text: str
    names: Sequence[str]
    figure: Callable[[], Figure]


def _of_accuracy(summaries: Sequence[Summary], findings: Findings) -> _Drawing:
    """Test accuracy per method: mean, standard deviation, every seed; lines at the baselines."""
    text = _told(summaries, lambda s: f"{100 * s.mean_accuracy:.1f}%", "Test accuracy")
    return _Drawing(titles.accuracy_title(summaries, findings), text, [], lambda: _accuracy(summaries))


def _accuracy(summaries: Sequence[Summary]) -> Figure:
    figure = Figure(figsize=(7.5, 1.9 + 0.4 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    handles = []
    for name, dash in (("joint", "--"), ("unimodal", ":")):
        for summary in summaries:
            if summary.name == name:
                mean = 100 * summary.mean_accuracy
                axes.axvline(mean, color=GREY, linestyle=dash, linewidth=1.3, zorder=1)
                handles.append(Line2D([], [], color=GREY, ls=dash, label=f"{summary.title}, its mean"))
    _method_axis(axes, [summary.title for summary in summaries])
    every = [100 * value for summary in summaries for value in summary.accuracy]
    # About a dot's width, so that no dot hides another.
    width = max(max(every) - min(every), 1.0) / 60
    seeds = max(len(summary.accuracy) for summary in summaries)
    for row, summary in enumerate(summaries):
        values = [100 * value for value in summary.accuracy]
        mean = statistics.fmean(values)
        if len(values) > 1:
            offsets = swarm(values, width)
            step = min(0.16, 0.42 / max(1.0, max(map(abs, offsets))))
            axes.plot(values, [row + step * o for o in offsets], ".", color=GREY, markersize=7, zorder=4)
            spread = statistics.stdev(values)
            axes.errorbar(mean, row, xerr=spread, color="black", capsize=3, linewidth=1.2, zorder=3)
        axes.plot(mean, row, zorder=5, **_ALL)
    over = f"{seeds} seeds" if seeds > 1 else "1 seed"
    axes.set_xlabel(f"Accuracy on the test set (%), {over}")
    if seeds > 1:
        mean_style = _ALL | {"markersize": 12, "linestyle": "-", "linewidth": 1.2}
        handles.insert(0, Line2D([], [], label="mean ± standard deviation", **mean_style))
        handles.insert(1, Line2D([], [], color=GREY, marker=".", linestyle="none", label="one seed"))
    legend_below(figure, handles)
    return figure


def _of_modality_accuracy(summaries: Sequence[Summary], findings: Findings) -> _Drawing:
    """The accuracy of every modality alone per method."""
    return _of_each(
        summaries,
        [summary.alone for summary in summaries],
        title="What each modality reaches alone",
        what="Test accuracy of each modality alone",
        labels=("{} alone", "Modality alone"),
        rows=[f"{summary.title} ({summary.protocol})" for summary in summaries],
    )


def _of_probes(summaries: Sequence[Summary], findings: Findings) -> _Drawing:
    """What linear probes reach on every modality's frozen features."""
    probed = [summary for summary in summaries if summary.probe]
    return _of_each(
        probed,
        [summary.probe for summary in probed],
        title=titles.probe_title(findings),
        what="Test accuracy of a probe of each",
        labels=("probe of {}", "Modality that is probed"),
    )


def _of_missing(summaries: Sequence[Summary], findings: Findings) -> _Drawing:
    """The accuracy with each modality missing at test time."""
    measured = [summary for summary in summaries if summary.missing]
    return _of_each(
        measured,
        [summary.missing for summary in measured],
        title=titles.missing_title(measured),
        what="Test accuracy without each",
        labels=("without {}", "Modality that is missing"),
    )


def _of_each(
    summaries: Sequence[Summary],
    figures: Sequence[Mapping[str, float | None]],
    *,
    title: str,
    what: str,
    labels: tuple[str, str],
    rows: Sequence[str] | None = None,
) -> _Drawing:
    """Return the drawing of a figure of every modality per method: shapes, or a grid for more than four.

    Args:
        summaries: one a method.
        figures: of each method, by modality.
        title: of the picture.
        what: the figures are, in words.
        labels: of a modality's figures in the legend, and of the axis of a grid.
        rows: what methods are called; None: by their titles.
    """
    by_name = {summary.name: each for summary, each in zip(summaries, figures, strict=True)}
    return _Drawing(
        title,
        _told(summaries, lambda s: _listed(by_name[s.name], 100.0), f"{what}, in percent"),
        list(figures[0]),
        lambda: _by_modality(summaries, figures, rows or [s.title for s in summaries], *labels),
    )


def _of_contributions(summaries: Sequence[Summary], findings: Findings) -> _Drawing:
    """The mean contribution of every modality over epochs, and to test samples, a panel a method."""
    text = _told(summaries, lambda s: _listed(s.contribution, 1.0, 2), "Mean contribution on the test set")
    return _Drawing(
        titles.contribution_title(findings),
        text,
        list(summaries[0].contribution),
        lambda: contribution_curves(summaries),
    )


_DRAWINGS: dict[str, Callable[[Sequence[Summary], Findings], _Drawing]] = {
    "accuracy": _of_accuracy,
    "probes": _of_probes,
    "contributions": _of_contributions,
    "missing": _of_missing,
    "modality_accuracy": _of_modality_accuracy,
}


def _by_modality(
    summaries: Sequence[Summary],
    figures: Sequence[Mapping[str, float | None]],
    rows: Sequence[str],
    label: str,
    what: str,
) -> Figure:
    """Return shapes or a grid: one row a method, a shape or a column for each modality, and for all of them.

    Args:
        summaries: one a method.
        figures: for each of them an accuracy by modality.
        rows: for each of them what stands beside it.
        label: of a modality in a legend.
        what: the columns of a grid are.
    """
    if len(figures[0]) <= _MOST_SHAPES:
        return _shapes(summaries, figures, rows, label)
    return _grid(summaries, figures, rows, what)


def _shapes(
    summaries: Sequence[Summary],
    figures: Sequence[Mapping[str, float | None]],
    rows: Sequence[str],
    label: str,
) -> Figure:
    names = list(figures[0])
    figure = Figure(figsize=(7.5, 2.1 + 0.42 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for row, (summary, values) in enumerate(zip(summaries, figures, strict=True)):
        axes.plot(100 * summary.mean_accuracy, row, **_ALL)
        for m, name in enumerate(names):
            if (value := values[name]) is not None:
                # Offsets within the row keep equal figures apart.
                place = row + 0.15 * (m - (len(names) - 1) / 2)
                axes.plot(100 * value, place, markersize=7, linestyle="none", **shape_of(m))
    _method_axis(axes, rows)
    axes.set_xlabel(f"Accuracy on the test set (%), {_over(summaries)}")
    style: dict[str, Any] = {"linestyle": "none", "markersize": 7}
    handles = [
        Line2D([], [], label=label.format(short(name)), **shape_of(m), **style)
        for m, name in enumerate(names)
    ]
    handles.append(Line2D([], [], label="all modalities", **(style | _ALL | {"markersize": 13})))
    legend_below(figure, handles)
    return figure


def _grid(
    summaries: Sequence[Summary],
    figures: Sequence[Mapping[str, float | None]],
    rows: Sequence[str],
    what: str,
) -> Figure:
    names = list(figures[0])
    cells = [
        [math.nan if (value := values[name]) is None else 100 * value for name in names]
        + [100 * summary.mean_accuracy]
        for summary, values in zip(summaries, figures, strict=True)
    ]
    size = (4.4 + 0.62 * (len(names) + 1), 2.9 + 0.4 * len(summaries))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="cividis", aspect="auto")
    low, high = image.get_clim()
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value < (low + high) / 2 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
    # What all modalities reach stands apart.
    axes.axvline(len(names) - 0.5, color="white", linewidth=4)
    headers = [*(short(name, 22) for name in names), "all modalities"]
    axes.set_xticks(range(len(headers)), headers, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(what)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"Accuracy on the test set (%),\n{_over(summaries)}", fraction=0.04)
    return figure


def _over(summaries: Sequence[Summary]) -> str:
    seeds = max(len(summary.accuracy) for summary in summaries)
    return f"mean over {seeds} seeds" if seeds > 1 else "1 seed"


def _told(summaries: Sequence[Summary], figure: Callable[[Summary], str], what: str) -> str:
    """Return the figures of a picture as a sentence."""
    return f"{what}: {'; '.join(f'{summary.title} {figure(summary)}' for summary in summaries)}."


def _listed(figures: Mapping[str, float | None], scale: float, digits: int = 1) -> str:
    known = {name: "unknown" if v is None else f"{scale * v:.{digits}f}" for name, v in figures.items()}
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _method_axis(axes: Any, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
