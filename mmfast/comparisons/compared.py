"""What a comparison from Python has found: runs, a table, a verdict, pictures."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from mmfast.data.overview import Overview
from mmfast.errors import check_one_of, did_you_mean
from mmfast.experiments.file_names import FILES, KINDS, REPORT
from mmfast.experiments.findings import Findings, find
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.results import RESULTS, TUNING, Results
from mmfast.experiments.summary import Summary, mean_std, summarize
from mmfast.experiments.tuning import Tuned
from mmfast.files import plain
from mmfast.methods import METHODS
from mmfast.plots import DPI, Figure
from mmfast.reports.confusions import confused_methods
from mmfast.reports.kept_files import write_files
from mmfast.reports.notebook import as_html
from mmfast.reports.pictures import draw, kinds_of
from mmfast.reports.tables import figure_tables, note, sentences, show, show_figures, tables
from mmfast.reports.tuning_tables import show_tuned, tuned_note, tuned_table
from mmfast.reports.verdict import diverged_sentence
from mmfast.training.figures import TALLIES

if TYPE_CHECKING:
    import pandas

# Letters of a line, where tables are printed or a notebook shows them.
_WIDTH = 110


@dataclass(frozen=True, eq=False)
class About:
    """What runs are of, which files tell beside them.

    Attributes:
        told: versions, machine, data and configuration, as results.json has them.
        class_names: of the C classes; empty of other tasks.
        test_keys: [N] by which the data tell their test samples; None where they do not.
        overview: how each modality was read; None where a program gives the data.
    """

    told: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    test_keys: np.ndarray | None = None
    overview: Overview | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison has found; printed, it is the table with the sentences that it supports.

    Attributes:
        runs: one entry a run: "method", "seed", "metrics" on the test set, "history", seconds; "diverged",
            why, in place of figures where a loss was NaN or infinite. Of classes also "ece", the calibration
            error, "missing", the accuracy without each modality, and "probe", that of a linear probe.
        task: of the runs.
        data: description of the data.
        num_test: samples that were tested on.
        out: folder of results.json and the runs, None where nothing was written.
        outcomes: what runs make of each test sample, by method and seed; of classes alone. Those in a folder
            are read when they are asked for.
        tuned: by method what trials have found: `settings`, the best, and all `trials`; empty without.
        about: what the runs are of.
    """

    runs: list[dict[str, Any]]
    task: str
    data: str
    num_test: int
    out: Path | None = None
    outcomes: Mapping[tuple[str, int], Outcome] = field(default_factory=dict, repr=False)
    tuned: Mapping[str, Tuned] = field(default_factory=dict, repr=False)
    about: About = field(default_factory=About, repr=False)

    @cached_property
    def summaries(self) -> list[Summary]:
        """One a method, figures over seeds; of classes alone.

        Raises:
            ValueError: the task has no accuracies.
        """
        if self.task != "multiclass":
            raise ValueError(f"summaries are of task='multiclass', got {self.task!r}: see `table` and `runs`")
        return summarize(self.runs, outcomes=self.outcomes)

    @cached_property
    def findings(self) -> Findings:
        """What the runs support, in numbers, of neglect and use of modalities and differences of methods."""
        return find(self.summaries)

    def figures(self, name: str) -> dict[str, list[float]]:
        """Return a figure of the test set by method, one value a seed, such as "accuracy".

        Raises:
            KeyError: the runs have no such figure.
        """
        found: dict[str, list[float]] = {}
        for entry in self.runs:
            values = found.setdefault(entry["method"], [])
            if "metrics" in entry:
                if not isinstance(entry["metrics"].get(name), int | float):
                    known = [key for key, value in entry["metrics"].items() if isinstance(value, int | float)]
                    raise KeyError(
                        f"{name!r} is no figure of the runs, which are {', '.join(known)}"
                        + did_you_mean(name, known)
                    )
                values.append(entry["metrics"][name])
        return found

    def table(self) -> pandas.DataFrame:
        """Return the figures of the test set, one row a method, which is the index; accuracies are in [0, 1].

        Columns are `runs`, the number of those that have figures, and `diverged`, of those that have none;
        `protocol`, how a modality alone is measured; each figure of the task, such as `accuracy`, `macro_f1`
        and `loss`, metrics of your own and, of classes, `ece`; for each modality `<modality>__alone`, the
        figure that it reaches alone, `<modality>__contribution`, its mean Shapley value, and of classes
        `<modality>__missing`, the accuracy without it, and `<modality>__probe`; `seconds` of training and
        `seconds_per_epoch`. All are means over seeds, and beside each stands its standard deviation, with
        `_std` at the end of its name: NaN where there is one seed. A figure that no run has is NaN.
        """
        import pandas

        rows = {name: self._row(entries) for name, entries in self._by_method().items()}
        # Methods that diverged lack most columns, and may come first.
        columns = list(dict.fromkeys(key for row in sorted(rows.values(), key=len)[::-1] for key in row))
        return pandas.DataFrame(list(rows.values()), list(rows), columns).rename_axis("method")

    def _by_method(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in self.runs:
            found.setdefault(entry["method"], []).append(entry)
        return found

    def _row(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ended = [entry for entry in entries if "metrics" in entry]
        row: dict[str, Any] = {"runs": len(ended), "diverged": len(entries) - len(ended)}
        if ended:
            row["protocol"] = ended[0]["protocol"]
        flat = [_flat(entry, self._main) for entry in ended]
        for name in dict.fromkeys(key for figures in flat for key in figures):
            values = [figures[name] for figures in flat if figures.get(name) is not None]
            row[name] = statistics.fmean(values) if values else math.nan
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        return row

    @property
    def _main(self) -> str:
        """The figure that stands for accuracy."""
        return TALLIES[self.task].names[0]

    @property
    def verdict(self) -> str:
        """What the figures support in words, a line a sentence or two; none is stronger than the runs are."""
        return "\n".join(self._sentences())

    def _sentences(self) -> list[str]:
        if self.task == "multiclass":
            return sentences(self.summaries, self.findings)
        lost = diverged_sentence(summarize([entry for entry in self.runs if "diverged" in entry]))
        found = {name: [v for v in values if v is not None] for name, values in self._figures().items()}
        found = {name: values for name, values in found.items() if values}
        if not found:
            return [lost] if lost else []
        best = max(found, key=lambda name: statistics.fmean(found[name]))
        return [
            *([lost] if lost else []),
            f"Highest {self._main}: {METHODS[best].title}, {mean_std(found[best], 1.0, 3)}. Whether methods "
            "differ, and whether one neglects a modality, is told of classes alone.",
        ]

    def _figures(self) -> dict[str, list[float | None]]:
        """Return by method what stands for accuracy, None where it is not defined."""
        return {
            name: [entry["metrics"][self._main] for entry in entries if "metrics" in entry]
            for name, entries in self._by_method().items()
        }

    def plot(self, kind: str = "accuracy", path: str | Path | None = None) -> Figure:
        """Return a picture as a figure of matplotlib, which a notebook shows by itself.

        Args:
            kind: "accuracy": of each method; "probes": of linear probes of each modality; "contributions": of
                each modality over epochs; "missing": accuracy without each modality; "modality_accuracy": of
                each alone.
            path: of a file to write it to, whose ending says what kind: .png, .pdf, .svg.

        Raises:
            ValueError: an unknown kind, a task without accuracies, or no run has figures.
        """
        check_one_of("kind", kind, KINDS, quoted=True, suggest=True)
        if self.task != "multiclass":
            raise ValueError(f"plot is of task='multiclass', got {self.task!r}: table() has its figures")
        ended = [summary for summary in self.summaries if summary.runs]
        if not ended:
            raise ValueError("plot needs a run that has figures, got none: all diverged")
        if kind not in kinds_of(ended):
            raise ValueError(f"plot has nothing to draw for kind {kind!r}: no run tells of it")
        figure = draw(kind, ended, self.findings).figure
        if path is not None:
            figure.savefig(path, dpi=DPI)
        return figure

    def write(
        self, folder: str | Path | None = None, *, confusion: Sequence[str] | str | None = None
    ) -> list[Path]:
        """Write what one can keep of it, and return the files: the report first, one page of HTML.

        The others are results.json, results.csv, a row a run, predictions.parquet, a row a run and test
        sample, and the pictures, which the report holds, too.

        Args:
            folder: where to; None: the `out_dir` of the comparison.
            confusion: methods whose confusion matrices are drawn, "all" or "none"; None: joint training and
                the best method.

        Raises:
            ValueError: a task without accuracies, no run that has figures, no folder, or one that holds
                results of other data or settings, or other figures of these runs.
        """
        if self.task != "multiclass":
            raise ValueError(f"write is of task='multiclass', got {self.task!r}: table() has its figures")
        if not any(summary.runs for summary in self.summaries):
            raise ValueError("write needs a run that has figures, got none: all diverged")
        if folder is None and self.out is None:
            raise ValueError("folder must be given where the comparison has no out_dir, got None")
        out = Path(folder if folder is not None else self.out or "")
        if out.exists() and not out.is_dir():
            raise ValueError(f"folder must be a folder, {out} is a file")
        if not isinstance(confusion, str | None):
            confusion = ",".join(confusion)
        confused = confused_methods(confusion, list(self._by_method()))
        out.mkdir(parents=True, exist_ok=True)
        results = self._results_in(out)
        cautions: list[str] = []
        write_files(
            results,
            self.summaries,
            self.outcomes,
            self.about.class_names,
            keys=self.about.test_keys,
            confused=confused,
            overview=self.about.overview,
            tell=cautions.append,
        )
        for caution in cautions:
            warnings.warn(caution, stacklevel=2)
        return [path for name in (REPORT, RESULTS, *FILES[1:]) if (path := out / name).exists()]

    def _results_in(self, folder: Path) -> Results:
        """Return the results of a folder with these runs among them.

        Raises:
            ValueError: the folder holds others in their place, such as of another model.
        """
        results, mine = Results(folder, plain(dict(self.about.told))), plain(self.runs)
        results.open()
        for entry in mine:
            there = results.find(entry["method"], entry["seed"])
            # As JSON: NaN is NaN there.
            if there is not None and json.dumps(there.get("metrics")) != json.dumps(entry.get("metrics")):
                which = f"{entry['method']} with seed {entry['seed']}"
                raise ValueError(f"{folder} holds another run of {which}: give another folder")
        results.hold(mine)
        return results

    def text(self, width: int = _WIDTH) -> str:
        """Return the tables and sentences for a terminal of some width; `print` takes 110."""
        file = StringIO()
        console = Console(file=file, width=width, highlight=False)
        if self.tuned:
            show_tuned(console, list(self.tuned.values()), self._tune_seeds)
            console.print()
        if self.task == "multiclass":
            show(console, self.summaries, data=self.data, trials=self._trials)
        else:
            show_figures(console, self.runs)
            console.print()
            for sentence in self._sentences():
                console.print(sentence, markup=False)
            console.print(f"Data: {self.data}.", markup=False, soft_wrap=True)
        if self.out is not None:
            console.print(f"Written to {self.out}: {RESULTS}, runs.", markup=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        counts = f"{len(self.runs)} run{'s' * (len(self.runs) != 1)} of {', '.join(self._by_method())}"
        return f"Comparison({counts}{'' if self.out is None else f', {str(self.out)!r}'})"

    @property
    def _trials(self) -> int:
        """By which the settings of each method were found; 0: they were given."""
        return max((len(tuned.trials) for tuned in self.tuned.values()), default=0)

    @property
    def _tune_seeds(self) -> Sequence[int]:
        return self.about.told["configuration"][TUNING]["seeds"]

    def _repr_html_(self) -> str:
        if self.task == "multiclass":
            found = tables(self.summaries, _WIDTH, self.findings)
            has_runs = any(s.runs for s in self.summaries)
            about = [note(self.summaries, self.findings, self._trials)] if has_runs else []
        else:
            found, about = figure_tables(self.runs), []
        if self.tuned:
            tuned = list(self.tuned.values())
            found, about = [*found, tuned_table(tuned)], [*about, tuned_note(tuned, self._tune_seeds)]
        return as_html(found, about, [*self._sentences(), f"Data: {self.data}."])


def _flat(entry: Mapping[str, Any], main: str) -> dict[str, Any]:
    """Return a run's figures by the names of columns."""
    metrics = dict(entry["metrics"])
    of_modalities = {"alone": metrics.pop(f"modality_{main}")}
    for name in [name for name, value in metrics.items() if isinstance(value, dict)]:
        of_modalities[name.replace("modality_", "alone_")] = metrics.pop(name)
    of_modalities |= {name: entry[name] for name in ("missing", "probe") if name in entry}
    found = metrics | ({"ece": entry["ece"]} if "ece" in entry else {})
    found |= {f"{m}__{name}": value for name, by in of_modalities.items() for m, value in by.items()}
    return found | {name: entry[name] for name in ("seconds", "seconds_per_epoch")}
