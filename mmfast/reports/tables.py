"""Tables of results for a terminal of any width, and the pictures that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfast import coalitions
from mmfast.experiments.findings import JOINT, Findings, find
from mmfast.experiments.summary import Summary, highest, mean_std
from mmfast.files import write_json
from mmfast.methods import METHODS
from mmfast.reports.verdict import (
    EXPLANATION,
    diverged_sentence,
    early_sentence,
    gap_sentence,
    idle_sentence,
    ranking,
    verdict,
)

if TYPE_CHECKING:
    from mmfast.valuation import Valuation

# Blanks between columns, and the width at which modality names go over to another line; from wide to narrow.
_LAYOUTS = ((2, None), (2, 9), (1, 9))
_Layout = tuple[int, int | None]
_SHOWN_COALITIONS = 16
# Figures that have columns of their own; others are metrics of the user's.
_FIGURES = ("accuracy", "macro_f1", "loss", "modality_accuracy", "contribution")


def show(
    console: Console,
    summaries: Sequence[Summary],
    *,
    data: str,
    out: Path | None = None,
    files: Sequence[str] = (),
    trials: int = 0,
) -> None:
    """Print the table of a comparison, what it says, and where its files are.

    Args:
        console: where to; the layout follows its width.
        summaries: one a method.
        data: description of the data set and its split.
        out: folder of the files.
        files: names of what was written to `out`.
        trials: by which the settings of each method were found; 0: they were given.
    """
    findings = find(summaries)
    for number, table in enumerate(tables(summaries, console.width, findings)):
        if number:
            console.print()
        console.print(table)
    runs = [entry for summary in summaries for entry in summary.runs]
    if own := [name for name in (runs[0]["metrics"] if runs else {}) if name not in _FIGURES]:
        console.print()
        show_figures(console, runs, only=own)
    if runs:
        console.print()
        console.print(Text(note(summaries, findings, trials), style="dim"))
    console.print()
    for sentence in sentences(summaries, findings):
        console.print(Text(sentence))
    console.print(Text(f"Data: {data}."))
    if out is not None:
        # A path is never broken over lines: it is there to be copied.
        console.print(Text(f"Written to {out}: {', '.join(files)}."), soft_wrap=True)


def sentences(summaries: Sequence[Summary], findings: Findings | None = None) -> list[str]:
    """Return what a comparison says in words."""
    findings = find(summaries) if findings is None else findings
    said = verdict(summaries, findings)
    found = (
        diverged_sentence(summaries),
        f"{said} {EXPLANATION}" if said else "",
        ranking(summaries, findings),
        idle_sentence(summaries),
        early_sentence(summaries),
        gap_sentence(summaries),
    )
    return [sentence for sentence in found if sentence]


def note(summaries: Sequence[Summary], findings: Findings, trials: int = 0) -> str:
    """Return what the table's figures are."""
    seeds = max(len(summary.accuracy) for summary in summaries)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    parts = [
        f"Test set, {spread}; accuracy, macro-F1, calibration error (ECE) and each modality alone in %. "
        "Alone by masked: the others' features are zero; own-head: by a head of its own. Contribution: mean "
        "Shapley value under |S| · [correct]."
    ]
    if trials:
        parts.append(f"Settings: tuned, {trials} trial{'s' * (trials > 1)} each.")
    if any(summary.probe for summary in summaries):
        parts.append("Probe: logistic regression on frozen features.")
    if any(summary.missing for summary in summaries):
        parts.append("Without: accuracy when the modality is missing from all test samples.")
    if _costs(summaries):
        parts.append("Cost: seconds of training, over those of Joint.")
    shown = "".join(findings.marks(summary.name) for summary in summaries)
    for mark, meaning in (("*", "better than Joint"), ("†", "better than every simple baseline")):
        if mark in shown:
            parts.append(f"{mark}: {meaning}, at 95% after Holm's correction.")
    return " ".join(parts)


def _costs(summaries: Sequence[Summary]) -> dict[str, str]:
    """Return by method how many times as long it trains as the joint model does; empty without one."""
    joint = next((summary.seconds for summary in summaries if summary.name == JOINT), None)
    if not joint or len(summaries) < 2:
        return {}
    return {s.name: "–" if s.seconds is None else f"{s.seconds / joint:.1f}x" for s in summaries}


def tables(summaries: Sequence[Summary], width: int, findings: Findings | None = None) -> list[Table]:
    """Return the results as tables that fit `width`: one, some more for the modalities, or one per figure."""
    findings = find(summaries) if findings is None else findings
    modalities = list(next((summary.alone for summary in summaries if summary.runs), {}))
    if len(modalities) <= 4:
        kinds = _kinds(summaries)
        for layout in _LAYOUTS:
            columns = _main_columns(summaries, findings)
            columns += _modality_columns(summaries, modalities, kinds, layout[1])
            whole = _table(columns, gap=layout[0])
            if _fits(whole, width):
                return [whole]
        for parts in (1, 2, len(kinds)):
            size = -(-len(kinds) // parts)
            groups = [kinds[start : start + size] for start in range(0, len(kinds), size)]
            for layout in _LAYOUTS:
                split = [_modality_table(summaries, modalities, group, layout) for group in groups]
                if all(_fits(table, width) for table in split):
                    return [*_in_parts(_main_columns(summaries, findings), 1, width), *split]
    main = _in_parts(_main_columns(summaries, findings, numbered=True), 2, width)
    return [*main, *_by_modality(summaries, modalities, width)]


def _in_parts(columns: Sequence[_Column], heading: int, width: int) -> list[Table]:
    """Return one table, or several where it would be cut off, which all begin with the heading columns."""
    for gap in (2, 1):
        if _fits(whole := _table(columns, gap=gap), width):
            return [whole]
    parts: list[list[_Column]] = [[]]
    for column in columns[heading:]:
        if parts[-1] and not _fits(_table([*columns[:heading], *parts[-1], column]), width):
            parts.append([])
        parts[-1].append(column)
    return [_table([*columns[:heading], *part]) for part in parts]


def _fits(table: Table, width: int) -> bool:
    return Console(width=10_000).measure(table).maximum <= width


class _Column(NamedTuple):
    """A column of a table: its header, a cell for each row, and whether it is one of figures."""

    header: str
    cells: Sequence[str | Text]
    figures: bool = True


def _table(columns: Sequence[_Column] = (), *, gap: int = 2) -> Table:
    """Return a table without lines; columns may be added."""
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        justify: Any = "right" if column.figures else "left"
        table.add_column(column.header, justify=justify, no_wrap=True, vertical="bottom")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _main_columns(
    summaries: Sequence[Summary], findings: Findings, *, numbered: bool = False
) -> list[_Column]:
    """Return the columns of what is no modality's; those that would be empty are left out."""
    ended = [summary for summary in summaries if summary.runs]
    best = round(highest(ended).mean_accuracy, 6) if ended else None
    most = max((len(summary.runs) for summary in ended), default=0)
    titles, accuracies = [], []
    for summary in summaries:
        is_best = bool(most) and len(summary.runs) == most and round(summary.mean_accuracy, 6) == best
        total, title = len(summary.runs) + len(summary.diverged), summary.title
        if summary.runs and summary.diverged:
            title += f", {len(summary.runs)} of {total} runs"
        accuracy = mean_std(summary.accuracy) if summary.runs else "diverged"
        titles.append(Text(title, "bold" if is_best else ""))
        accuracies.append(Text(accuracy, "bold" if is_best else ""))
    marks = [findings.marks(summary.name) for summary in summaries]
    costs = _costs(summaries)
    columns = [
        _Column("Method", titles, figures=False),
        _Column("Accuracy", accuracies),
        _Column("", marks if any(marks) else [], figures=False),
        _Column("Macro-F1", [mean_std(s.macro_f1) for s in summaries]),
        _Column(
            "ECE", [_share(s.ece) for s in summaries] if any(s.ece is not None for s in summaries) else []
        ),
        _Column("Cost", [costs[s.name] for s in summaries] if costs else []),
        _Column("s/epoch", [_seconds(s.seconds_per_epoch) for s in summaries]),
    ]
    if numbered:
        columns.insert(0, _Column("", [str(number) for number in range(1, len(summaries) + 1)]))
        columns.append(_Column("alone by", [summary.protocol for summary in summaries], figures=False))
    return [column for column in columns if len(column.cells) == len(summaries)]


def _modality_table(
    summaries: Sequence[Summary], modalities: Sequence[str], kinds: Sequence[str], layout: _Layout
) -> Table:
    titles = _Column("Method", [summary.title for summary in summaries], figures=False)
    return _table([titles, *_modality_columns(summaries, modalities, kinds, layout[1])], gap=layout[0])


# What is told of each modality: how a column is headed, and its cells.
_OF_MODALITIES: dict[str, Callable[[Summary, str], str]] = {
    "alone": lambda summary, name: _share(summary.alone.get(name)),
    "probe": lambda summary, name: _share(summary.probe.get(name)),
    "contrib.": lambda summary, name: _number(summary.contribution.get(name)),
    "without": lambda summary, name: _share(summary.missing.get(name)),
}
# By kind, the title of a table of its own.
_TITLES = {
    "alone": "Each modality alone",
    "probe": "Each modality by probe",
    "contrib.": "Contribution",
    "without": "Without the modality",
}


def _kinds(summaries: Sequence[Summary]) -> list[str]:
    """Return what is known of each modality."""
    known = {"probe": any(s.probe for s in summaries), "without": any(s.missing for s in summaries)}
    return [kind for kind in _OF_MODALITIES if known.get(kind, True)]


def _modality_columns(
    summaries: Sequence[Summary], modalities: Sequence[str], kinds: Sequence[str], wrap: int | None
) -> list[_Column]:
    """Return a column for each modality and kind of figure."""
    columns = []
    for kind in kinds:
        for name in modalities:
            cells = [_OF_MODALITIES[kind](summary, name) for summary in summaries]
            columns.append(_Column(f"{hyphenate(name, wrap)}\n{kind}", cells))
        if kind == "alone":
            columns.append(_Column("by", [summary.protocol for summary in summaries], figures=False))
    return columns


def _by_modality(summaries: Sequence[Summary], modalities: Sequence[str], width: int) -> list[Table]:
    """Return a table per figure: rows are modalities, columns methods, by number where room is short."""
    figures = [
        (_TITLES[kind], [[_OF_MODALITIES[kind](s, m) for s in summaries] for m in modalities])
        for kind in _kinds(summaries)
    ]
    found = []
    for title, rows in figures:
        for headers in ([s.name for s in summaries], [str(n) for n in range(1, len(summaries) + 1)]):
            by_method = zip(headers, zip(*rows, strict=True), strict=True)
            columns = [_Column(header, cells) for header, cells in by_method]
            columns = [_Column(title, modalities, figures=False), *columns]
            if _fits(_table(columns), width):
                break
        found += _in_parts(columns, 1, width)
    return found


def hyphenate(name: str, width: int | None) -> str:
    """Return a name on lines of at most `width` characters, broken at its own separators where it has any."""
    lines = [""]
    for part in name.replace("_", "_\0").replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and width is not None and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        while width is not None and len(part) > width:
            lines[-1:] = [part[: width - 1] + "-", ""]
            part = part[width - 1 :]
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def show_run(console: Console, entry: dict[str, Any], title: str) -> None:
    """Print the test figures of a single run."""
    metrics = entry["metrics"]
    console.print(
        Text(
            f"{title}, seed {entry['seed']}, {entry['epochs']} epochs of {entry['seconds_per_epoch']:.2f} s",
            "bold",
        )
    )
    console.print(
        f"test accuracy {_share(metrics['accuracy'])}%, macro-F1 {_share(metrics['macro_f1'])}%, "
        f"loss {_loss(metrics['loss'])}"
    )
    console.print()
    table = _table()
    table.add_column("Modality")
    table.add_column(f"Alone, {entry['protocol']} (%)", justify="right")
    if "probe" in entry:
        table.add_column("Alone, probe (%)", justify="right")
    table.add_column("Contribution", justify="right")
    for name, alone in metrics["modality_accuracy"].items():
        probed = [_share(entry["probe"][name])] if "probe" in entry else []
        table.add_row(name, _share(alone), *probed, _number(metrics["contribution"][name]))
    console.print(table)


def show_figures(console: Console, runs: Sequence[dict[str, Any]], *, only: Sequence[str] = ()) -> None:
    """Print what `figure_tables` returns."""
    for number, table in enumerate(figure_tables(runs, only=only)):
        if number:
            console.print()
        console.print(table)


def figure_tables(runs: Sequence[dict[str, Any]], *, only: Sequence[str] = ()) -> list[Table]:
    """Return all figures of runs, mean and standard deviation over seeds: one row a method, one table a kind.

    Args:
        runs: entries of a comparison, of any task.
        only: figures to tell; none: all.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        by_method.setdefault(entry["method"], []).extend([entry["metrics"]] if "metrics" in entry else [])
    example = next((found[0] for found in by_method.values() if found), {})
    names = [name for name in example if not only or name in only]
    single = [name for name in names if not isinstance(example[name], dict)]
    kinds = [{name: [name] for name in single}] if single else []
    kinds += [{m: [name, m] for m in example[name]} for name in names if name not in single]
    titles = ["", *(name for name in names if name not in single)] if single else names
    tables = []
    for title, columns in zip(titles, kinds, strict=True):
        table = _table()
        table.add_column(f"Method{title and f', {title}'}")
        for header in columns:
            table.add_column(header, justify="right")
        for method, found in by_method.items():
            table.add_row(METHODS[method].title, *(_over(found, path) for path in columns.values()))
        tables.append(table)
    return tables


def _over(figures: Sequence[dict[str, Any]], path: Sequence[str]) -> str:
    """Return one figure over seeds, found by its name, or those of a table and a modality."""
    values: list[Any] = [*figures]
    for key in path:
        values = [value[key] for value in values]
    return mean_std([value for value in values if value is not None], 1.0, 3)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_valuation(console: Console, valuation: Valuation) -> None:
    """Print mean contributions and the accuracies of the coalitions, the best ones where there are many."""
    table = _table()
    for header in ("Modality", "Mean contribution", "± std over samples", "Negative on"):
        table.add_column(header, justify="left" if header == "Modality" else "right")
    for m, name in enumerate(valuation.modalities):
        column = valuation.column(m).double()
        if not len(column):
            table.add_row(name, "–", "–", "in no sample")
            continue
        spread = float(column.std()) if len(column) > 1 else 0.0
        below = int((column < 0).sum()) / len(column)
        table.add_row(name, f"{float(column.mean()):.3f}", f"{spread:.3f}", f"{100 * below:.1f}%")
    console.print(table)
    console.print()
    header, values = _coalition_figures(valuation)
    ranked = sorted(range(len(values)), key=lambda s: (-values[s], coalitions.size(s), s))
    best = ranked if len(ranked) <= _SHOWN_COALITIONS else ranked[:10]
    everyone = coalitions.everyone(len(valuation.modalities))
    shown = [*best, *(s for s in ranked if s not in best and (s == everyone or coalitions.size(s) == 1))]
    table = _table()
    table.add_column("Coalition")
    table.add_column(header, justify="right", no_wrap=True)
    for s in shown:
        name = "all modalities" if s == everyone else valuation.coalition_name(s)
        figure = f"{values[s]:.3f}" if valuation.coalition_accuracy is None else _share(values[s])
        table.add_row(name.replace("+", " + "), figure)
    console.print(table)
    if len(ranked) > len(shown):
        note = f"The best {len(best)} of {len(ranked):,} coalitions, all modalities, and each alone."
        console.print(Text(note, style="dim"))


def _coalition_figures(valuation: Valuation) -> tuple[str, list[float]]:
    """Return what is said of each coalition, accuracy where there are classes, and the figures."""
    if valuation.coalition_accuracy is not None:
        return "Accuracy (%)", valuation.coalition_accuracy.tolist()
    assert valuation.coalition_value is not None
    return f"Mean {valuation.utility}", valuation.coalition_value.tolist()


def save_valuation(valuation: Valuation, folder: Path, facts: dict[str, Any]) -> list[str]:
    """Write a valuation as tables, a picture and its means with `facts`, and return the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    valuation.to_csv(folder / "valuation.csv")
    valuation.to_parquet(folder / "valuation.parquet")
    valuation.plot(folder / "contributions.png")
    _, values = _coalition_figures(valuation)
    kind = "coalition_value" if valuation.coalition_accuracy is None else "coalition_accuracy"
    figures = {
        "samples": len(valuation.labels),
        "utility": valuation.utility,
        "modalities": valuation.modalities,
        "mean_contribution": valuation.means,
        kind: {valuation.coalition_name(s): value for s, value in enumerate(values)},
    }
    write_json(folder / "coalitions.json", facts | figures)
    return ["valuation.csv", "valuation.parquet", "contributions.png", "coalitions.json"]
