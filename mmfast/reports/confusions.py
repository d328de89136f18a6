"""Which classes methods take for which: counts over seeds, recall by class, and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.errors import check_one_of
from mmfast.experiments.file_names import confusion_name
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.summary import Summary, highest
from mmfast.methods import METHODS
from mmfast.plots import DPI, Figure, fonts_for
from mmfast.reports.picture_parts import entitle, short
from mmfast.reports.pictures import Picture

# Classes of a picture, of which more are not readable, and up to which cells hold numbers.
_MOST, _NUMBERED = 30, 15
_WORST = 10


@dataclass(frozen=True, eq=False)
class Confusion:
    """What a method takes test samples of each class for.

    Attributes:
        name, title: of the method.
        class_names: of the C classes.
        counts: int64 [C, C], label by prediction, over all seeds; predictions of NaN are not in it.
        support: int64 [C], test samples of each class.
        recall: float64 [S, C], the share of a class that is predicted right, by seed; NaN without samples.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    counts: np.ndarray
    support: np.ndarray
    recall: np.ndarray

    @property
    def shares(self) -> np.ndarray:  # float64 [C, C]
        """The share of each class that is taken for each; rows of classes without samples are 0."""
        return self.counts / np.maximum(self.support * len(self.recall), 1)[:, None]

    def recall_text(self, c: int) -> str:
        """Return the recall of a class in percent: "mean ± std" over seeds."""
        values = [100 * value for value in self.recall[:, c].tolist()]
        if not self.support[c]:
            return "–"
        text = f"{statistics.fmean(values):.1f}"
        return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.1f}"

    def worst(self, most: int = _WORST) -> list[tuple[int, int]]:
        """Return pairs of label and prediction that differ, by falling share of the label's samples."""
        wrong = self.shares
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [divmod(int(place), len(wrong)) for place in order]
        return [pair for pair in pairs if wrong[pair]]

    def sentence(self) -> str:
        """Return the mistake with the highest share of its label's samples."""
        found = self.worst(1)
        if not found:
            answered = self.counts.sum() == self.support.sum() * len(self.recall)
            return f"{self.title} makes no mistake" + ("" if answered else " where it has a prediction")
        (label, prediction), names = found[0], self.class_names
        return (
            f"{self.title} takes {short(names[label])} for {short(names[prediction])} most often: "
            f"{100 * self.shares[label, prediction]:.0f}% of its samples"
        )


def confused_methods(text: str | None, names: Sequence[str]) -> list[str] | None:
    """Return the methods that an option names: "all", "none", or names separated by commas.

    Args:
        text: the option; None: it is not given, and the default is told by results.
        names: of the methods that are compared.

    Raises:
        ValueError: another name.
    """
    if text is None:
        return None
    if text in ("all", "none"):
        return list(names) if text == "all" else []
    found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in found:
        check_one_of("confusion", name, [*names, "all", "none"], suggest=True)
    return found


def joint_and_best(summaries: Sequence[Summary]) -> list[str]:
    """Return the names of joint training, where it has runs, and of the method of the highest accuracy."""
    ended = [summary for summary in summaries if summary.runs]
    return list(dict.fromkeys([*(s.name for s in ended if s.name == "joint"), highest(ended).name]))


def confusion_of(
    method: str,
    outcomes: Mapping[tuple[str, int], Outcome],
    seeds: Sequence[int],
    class_names: Sequence[str],
) -> Confusion | None:
    """Return the confusions of a method's runs, None where none of them is known."""
    size = len(class_names)
    counts, support, recall = np.zeros((size, size), np.int64), np.zeros(size, np.int64), []
    for seed in seeds:
        if (method, seed) not in outcomes:
            continue
        outcome = outcomes[method, seed]
        predicted, labels = outcome.predicted, outcome.labels
        support = np.bincount(labels[labels >= 0], minlength=size)
        known = (labels >= 0) & (predicted >= 0)
        pairs = labels[known] * size + predicted[known]
        found = np.bincount(pairs, minlength=size * size).reshape(size, size)
        counts += found
        recall.append(np.where(support > 0, found.diagonal() / np.maximum(support, 1), np.nan))
    if not recall:
        return None
    title = METHODS[method].title
    return Confusion(method, title, tuple(class_names), counts, support, np.stack(recall))


def plot_confusion(confusion: Confusion, folder: Path) -> Picture:
    """Write the matrix of shares, label by prediction; of more than 30 classes those mistaken most often."""
    path = folder / confusion_name(confusion.name)
    title, names = confusion.sentence(), confusion.class_names
    chosen, left = _chosen(confusion)
    if left:
        title += f" ({len(chosen)} of {len(names):,} classes, those mistaken most often)"
    with fonts_for([*(names[c] for c in chosen), title]):
        figure = _matrix(confusion, chosen, left)
        entitle(figure, title)
        figure.savefig(path, dpi=DPI)
    worst = [f"{names[y]} for {names[z]} {100 * confusion.shares[y, z]:.0f}%" for y, z in confusion.worst()]
    text = f"Label by prediction. Most frequent mistakes: {'; '.join(worst) or 'none'}."
    return Picture(path.name, title, text, figure)


def _chosen(confusion: Confusion) -> tuple[list[int], bool]:
    """Return the classes of a picture in their order, and whether some are left out."""
    size = len(confusion.class_names)
    if size <= _MOST:
        return list(range(size)), False
    chosen: set[int] = set()
    # Both classes of a mistake, so that it is seen.
    for pair in confusion.worst(_MOST**2):
        if len(chosen | set(pair)) <= _MOST:
            chosen |= set(pair)
    return sorted(chosen or range(_MOST)), True


def _matrix(confusion: Confusion, chosen: Sequence[int], left: bool) -> Figure:
    shares = 100 * confusion.shares[np.ix_(chosen, chosen)]
    headers = [short(confusion.class_names[c], 20) for c in chosen]
    columns = list(headers)
    if left:
        rest = 100 * confusion.shares[chosen].sum(1) - shares.sum(1)
        shares, columns = np.column_stack([shares, rest]), [*columns, "all others"]
    cell = 0.48 if len(chosen) <= _NUMBERED else 0.3
    longest = 0.085 * max(map(len, columns))
    size = (max(4.5, 1.6 + longest + cell * len(columns)), max(3.4, 1.4 + 0.8 * longest + cell * len(chosen)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if len(chosen) <= _NUMBERED:
        for (y, x), value in np.ndenumerate(shares):
            if value >= 0.5:
                color = "white" if value > 50 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
    small: dict[str, Any] = {"fontsize": 9 if len(chosen) <= _NUMBERED else 8}
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", **small)
    axes.set_yticks(range(len(headers)), headers, **small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Prediction")
    axes.set_ylabel("Label")
    seeds = len(confusion.recall)
    over = f"mean over {seeds} seeds" if seeds > 1 else "1 seed"
    figure.colorbar(image, ax=axes, label=f"Samples of the label (%),\n{over}", fraction=0.05)
    return figure
