"""Tables of results for a terminal of any width, and the pictures that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfast import coalitions
from mmfast.experiments.summary import (
    Summary,
    diverged_sentence,
    idle_sentence,
    mean_std,
    neglect_sentence,
    ranking_sentence,
)
from mmfast.files import write_json
from mmfast.methods import METHODS

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
    num_test: int | None = None,
    out: Path | None = None,
    files: Sequence[str] = (),
) -> None:
    """Print the table of a comparison, what it says, and where its files are.

    Args:
        console: where to; the layout follows its width.
        summaries: one a method.
        data: description of the data set and its split.
        num_test: samples of its test part.
        out: folder of the files.
        files: names of what was written to `out`.
    """
    for number, table in enumerate(tables(summaries, console.width)):
        if number:
            console.print()
        console.print(table)
    runs = [entry for summary in summaries for entry in summary.runs]
    if own := [name for name in (runs[0]["metrics"] if runs else {}) if name not in _FIGURES]:
        console.print()
        show_figures(console, runs, only=own)
    if runs:
        console.print()
        console.print(Text(_note(summaries), style="dim"))
    console.print()
    for sentence in (
        diverged_sentence(summaries),
        neglect_sentence(summaries, num_test),
        ranking_sentence(summaries),
        idle_sentence(summaries),
    ):
        if sentence:
            console.print(Text(sentence))
    console.print(Text(f"Data: {data}."))
    if out is not None:
        # A path is never broken over lines: it is there to be copied.
        console.print(Text(f"Written to {out}: {', '.join(files)}."), soft_wrap=True)


def _note(summaries: Sequence[Summary]) -> str:
    """Return what the table's figures are."""
    seeds = max(len(summary.accuracy) for summary in summaries)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    note = (
        f"Test set, {spread}; accuracy, macro-F1 and each modality alone in %. Alone by masked: the others' "
        "features are zero; own-head: by a head of its own. Contribution: mean Shapley value under "
        "|S| · [correct]."
    )
    if any(summary.probe for summary in summaries):
        note += " Probe: logistic regression on frozen features."
    return note


def tables(summaries: Sequence[Summary], width: int) -> list[Table]:
    """Return the results as tables that fit `width`: one, a second for the modalities, or one per figure."""
    modalities = list(next((summary.alone for summary in summaries if summary.runs), {}))
    if len(modalities) <= 4:
        for layout in _LAYOUTS:
            whole = _whole_table(summaries, modalities, layout)
            if _fits(whole, width):
                return [whole]
        for layout in _LAYOUTS:
            split = _modality_table(summaries, modalities, layout)
            if _fits(split, width):
                return [_main_table(summaries), split]
    return [_main_table(summaries, numbered=True), *_by_modality(summaries, modalities, width)]


def _fits(table: Table, width: int) -> bool:
    return Console(width=10_000).measure(table).maximum <= width


def _table(*, gap: int = 2) -> Table:
    return Table(box=None, padding=(0, gap, 0, 0), header_style="bold", pad_edge=False)


def _main_columns(
    summaries: Sequence[Summary], table: Table, *, numbered: bool = False
) -> list[list[str | Text]]:
    """Add the columns of what is no modality's, and return the rows' cells."""
    if numbered:
        table.add_column("", justify="right", vertical="bottom")
    table.add_column("Method", no_wrap=True, vertical="bottom")
    for name in ("Accuracy", "Macro-F1"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    best = max((round(summary.mean_accuracy, 6) for summary in summaries if summary.runs), default=None)
    rows: list[list[str | Text]] = []
    for number, summary in enumerate(summaries, 1):
        is_best = bool(summary.runs) and round(summary.mean_accuracy, 6) == best
        accuracy = mean_std(summary.accuracy) if summary.runs else "diverged"
        total, title = len(summary.runs) + len(summary.diverged), summary.title
        if summary.runs and summary.diverged:
            title += f", {len(summary.runs)} of {total} runs"
        row: list[str | Text] = [str(number)] if numbered else []
        row += [Text(text, "bold" if is_best else "") for text in (title, accuracy)]
        rows.append([*row, mean_std(summary.macro_f1)])
    return rows


def _main_table(summaries: Sequence[Summary], *, numbered: bool = False) -> Table:
    table = _table()
    rows = _main_columns(summaries, table, numbered=numbered)
    table.add_column("s/epoch", justify="right", vertical="bottom")
    if numbered:
        table.add_column("alone by", no_wrap=True)
    for row, summary in zip(rows, summaries, strict=True):
        protocol = [summary.protocol] if numbered else []
        table.add_row(*row, _seconds(summary.seconds_per_epoch), *protocol)
    return table


def _whole_table(summaries: Sequence[Summary], modalities: Sequence[str], layout: _Layout) -> Table:
    table = _table(gap=layout[0])
    rows = _main_columns(summaries, table)
    figures = _modality_columns(summaries, table, modalities, layout[1])
    table.add_column("s/epoch", justify="right", vertical="bottom")
    for row, cells, summary in zip(rows, figures, summaries, strict=True):
        table.add_row(*row, *cells, _seconds(summary.seconds_per_epoch))
    return table


def _modality_table(summaries: Sequence[Summary], modalities: Sequence[str], layout: _Layout) -> Table:
    table = _table(gap=layout[0])
    table.add_column("Method", no_wrap=True, vertical="bottom")
    figures = _modality_columns(summaries, table, modalities, layout[1])
    for summary, cells in zip(summaries, figures, strict=True):
        table.add_row(summary.title, *cells)
    return table


def _modality_columns(
    summaries: Sequence[Summary], table: Table, modalities: Sequence[str], wrap: int | None
) -> list[list[str]]:
    """Add a column per modality and figure, and return the rows' cells."""
    kinds = ["alone", *(["probe"] if any(s.probe for s in summaries) else []), "contrib."]
    for kind in kinds:
        for name in modalities:
            table.add_column(f"{hyphenate(name, wrap)}\n{kind}", justify="right", vertical="bottom")
        if kind == "alone":
            table.add_column("by", no_wrap=True, vertical="bottom")
    rows = []
    for summary in summaries:
        cells = [*(_share(summary.alone.get(m)) for m in modalities), summary.protocol]
        if "probe" in kinds:
            cells += [_share(summary.probe.get(m)) for m in modalities]
        rows.append([*cells, *(_number(summary.contribution.get(m)) for m in modalities)])
    return rows


def _by_modality(summaries: Sequence[Summary], modalities: Sequence[str], width: int) -> list[Table]:
    """Return a table per figure: rows are modalities, columns methods, by number where room is short."""
    figures = [
        ("Each modality alone", [[_share(s.alone.get(m)) for s in summaries] for m in modalities]),
        ("Contribution", [[_number(s.contribution.get(m)) for s in summaries] for m in modalities]),
    ]
    if any(summary.probe for summary in summaries):
        probed = [[_share(s.probe.get(m)) for s in summaries] for m in modalities]
        figures.insert(1, ("Each modality by probe", probed))
    found = []
    for title, rows in figures:
        for headers in ([s.name for s in summaries], [str(n) for n in range(1, len(summaries) + 1)]):
            table = _table()
            table.add_column(title)
            for header in headers:
                table.add_column(header, justify="right", no_wrap=True)
            for name, cells in zip(modalities, rows, strict=True):
                table.add_row(name, *cells)
            if _fits(table, width):
                break
        found.append(table)
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
    """Print all figures of runs, mean and standard deviation over seeds: one row a method, one table a kind.

    Args:
        console: where to.
        runs: entries of a comparison, of any task.
        only: figures to print; none: all.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        by_method.setdefault(entry["method"], []).extend([entry["metrics"]] if "metrics" in entry else [])
    example = next((found[0] for found in by_method.values() if found), {})
    names = [name for name in example if not only or name in only]
    single = [name for name in names if not isinstance(example[name], dict)]
    tables = [{name: [name] for name in single}] if single else []
    tables += [{m: [name, m] for m in example[name]} for name in names if name not in single]
    titles = ["", *(name for name in names if name not in single)] if single else names
    for number, (title, columns) in enumerate(zip(titles, tables, strict=True)):
        if number:
            console.print()
        table = _table()
        table.add_column(f"Method{title and f', {title}'}")
        for header in columns:
            table.add_column(header, justify="right")
        for method, found in by_method.items():
            table.add_row(METHODS[method].title, *(_over(found, path) for path in columns.values()))
        console.print(table)


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
