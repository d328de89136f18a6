"""A valuation of many samples as a table: in files, on the screen and as a picture, never a list of all."""

from __future__ import annotations

import csv
import io
import statistics
import tracemalloc

import pytest
import torch
from rich.console import Console

from mmfast import contributions
from mmfast.reports.tables import show_valuation
from mmfast.valuation import Valuation

SIZE = 1000


def make(size: int = SIZE, names: tuple[str, ...] = ("audio", 'a "b", c', "video")) -> Valuation:
    rng = torch.Generator().manual_seed(0)
    phi = torch.randn(size, len(names), generator=rng)
    if size:
        phi[0] = torch.tensor([0.1, -0.0, 1e-30])
        phi[1] = torch.tensor([float("nan"), float("inf"), -1e30])
    labels = torch.randint(0, 5, (size,), generator=rng)
    return Valuation(phi, labels, names, "margin", torch.rand(2 ** len(names), generator=rng))


def plain(found: Valuation) -> dict[str, list]:
    """Return the table as lists of all samples."""
    table = {"sample": list(range(len(found.labels))), "label": found.labels.tolist()}
    return table | {name: found.contributions[:, m].tolist() for m, name in enumerate(found.modalities)}


@pytest.fixture(params=[7, 250, 10_000])
def rows(request, monkeypatch):
    monkeypatch.setattr(contributions, "_ROWS", request.param)
    return request.param


@pytest.mark.parametrize("size", [0, 2, SIZE])
def test_the_csv_is_that_of_lists_byte_for_byte(tmp_path, rows, size):
    found = make(size)
    found.to_csv(tmp_path / "v.csv")
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(plain(found))
    writer.writerows(zip(*plain(found).values(), strict=True))
    assert (tmp_path / "v.csv").read_bytes() == stream.getvalue().encode()


def test_the_parquet_file_is_that_of_lists(tmp_path, rows):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    found = make()
    found.to_parquet(tmp_path / "v.parquet")
    file = ParquetFile(tmp_path / "v.parquet")
    expected = pyarrow.table(plain(found))
    assert file.schema_arrow == expected.schema
    assert str(file.read().to_pydict()) == str(expected.to_pydict())
    assert file.metadata.num_row_groups == -(-SIZE // rows)


def test_a_table_without_samples(tmp_path):
    from pyarrow.parquet import read_table

    make(0).to_parquet(tmp_path / "v.parquet")
    assert read_table(tmp_path / "v.parquet").num_rows == 0


def test_the_columns_are_lists_of_all_samples():
    assert str(make().columns()) == str(plain(make()))
    # A modality may have the name of a column: it takes its place.
    assert list(make(3, ("sample", "b", "c")).columns()) == ["sample", "label", "b", "c"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_writing_takes_does_not_grow_with_samples(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(contributions, "_ROWS", 500)
    found = make(20_000)
    write = found.to_csv if kind == "csv" else found.to_parquet
    write(tmp_path / "first")
    tracemalloc.start()
    write(tmp_path / "second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 500 rows are 80 kB as lists of floats, all rows 3 MB.
    assert peak < 5e5


@pytest.mark.parametrize("present", [False, True])
def test_the_table_shows_the_statistics_of_the_samples(present):
    rng = torch.Generator().manual_seed(1)
    phi = torch.randn(SIZE, 4, generator=rng)
    mask = torch.rand(SIZE, 4, generator=rng) < 0.6
    mask[:, 2] = False
    mask[1:, 3] = False
    mask[0, 3] = True
    found = Valuation(
        phi,
        torch.zeros(SIZE).long(),
        ("a", "b", "c", "d"),
        "margin",
        torch.rand(16),
        mask if present else None,
    )
    stream = io.StringIO()
    show_valuation(Console(file=stream, width=100), found)
    lines = stream.getvalue().splitlines()
    for m, name in enumerate(found.modalities):
        values = phi[mask[:, m], m].tolist() if present else phi[:, m].tolist()
        words = next(line for line in lines if line.startswith(f"{name} ")).split()
        if not values:
            assert words == [name, "–", "–", "in", "no", "sample"]
            continue
        spread = statistics.stdev(values) if len(values) > 1 else 0
        below = 100 * sum(value < 0 for value in values) / len(values)
        assert words == [name, f"{statistics.fmean(values):.3f}", f"{spread:.3f}", f"{below:.1f}%"]


def test_the_picture_counts_every_sample(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "hist", lambda self, x, bins, weights, **options: drawn.append((x, bins, weights))
    )
    found = make()
    finite = Valuation(found.contributions.nan_to_num(0, 0, 0).clamp(-9, 9), *list(vars(found).values())[1:])
    finite.plot(tmp_path / "v.png")
    assert len(drawn) == 3
    for m, (x, bins, weights) in enumerate(drawn):
        assert len(x) == len(bins) - 1 == 30
        assert weights.sum() == pytest.approx(100)
        own = finite.contributions[:, m].tolist()
        inside = sum(bins[14] <= value < bins[15] for value in own)
        assert weights[14] == pytest.approx(100 * inside / SIZE)
