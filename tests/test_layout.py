"""One op, one stem: every folder names its files alike, and the README's table says which files there are."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from support.stems import FILES, ROOT, STEMS


def stems_of(backend: str) -> set[str]:
    """Return the stems of the files in a backend's folder, of those for one architecture without it."""
    folder, pattern = FILES[backend].rsplit("/", 1)
    files = (ROOT / folder).glob(pattern.format("[!_]*"))
    return {re.sub(r"_sm\d+a?$", "", path.stem) for path in files} - {"module"}


@pytest.mark.parametrize("backend", FILES)
def test_every_kernel_file_is_an_op(backend):
    assert stems_of(backend) <= STEMS


def test_every_op_has_its_public_function_its_reference_and_its_test():
    assert {path.stem for path in (ROOT / "mmfast/ops").glob("[!_]*.py")} == STEMS
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")} >= STEMS


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_every_kernel_file_is_called_by_its_op(backend):
    # A kernel nobody calls would leave the reference running under its name.
    for stem in stems_of(backend):
        assert f'"{backend}"' in (ROOT / f"mmfast/ops/{stem}.py").read_text(), stem


def test_every_op_has_its_benchmark():
    # Besides the ops, the training steps of the methods.
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert files == STEMS | {"train"}


def backend_table() -> dict[str, dict[str, str]]:
    """Return README's table of ops and backends: {op: {backend: "yes" or "-"}}."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| functions of"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip().strip("|").split("|")])
    header, _, *body = rows
    return {row[-1]: dict(zip(header[1:-1], row[1:-1], strict=True)) for row in body}


def test_readme_table_agrees_with_the_files():
    table = backend_table()
    assert set(table) == STEMS
    for op, cells in table.items():
        assert set(cells) == set(FILES)
        for backend, cell in cells.items():
            expected = "yes" if op in stems_of(backend) else "-"
            assert cell == expected, f"README says {cell!r} for {op} on {backend}, the files say {expected!r}"


def test_readme_table_names_every_function():
    """By the names that users call, not by those of files."""
    from mmfast import ops

    text = (ROOT / "README.md").read_text()
    table = text[text.index("| functions of") :].split("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {name for name in ops.__all__ if name[0].islower()}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_only_torch_and_triton(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    assert names - sys.stdlib_module_names <= {"torch", "triton"}


@pytest.mark.parametrize("path", ["csrc/cpu/module.cpp", "csrc/cuda/module.cpp", "csrc/bind.h", "setup.py"])
def test_no_op_is_named_where_all_are_built(path):
    text = (ROOT / path).read_text()
    assert [stem for stem in STEMS if stem in text] == []
