"""Ops: every folder names its files alike, as the table of docs/ops says. Rooms: imports run one way."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from mmfast import backend as _backend
from support.stems import FILES, ROOT, STEMS

OPS_PAGE = ROOT / "docs/ops/index.md"


def stems_of(backend: str) -> set[str]:
    """Return the stems of the files in a backend's folder, of those for one architecture without it."""
    folder, pattern = FILES[backend].rsplit("/", 1)
    files = (ROOT / folder).glob(pattern.format("[!_]*"))
    return {re.sub(r"_sm\d+[a-z]?$", "", path.stem) for path in files} - {"module", "register_limit"}


@pytest.mark.parametrize("backend", FILES)
def test_every_kernel_file_is_an_op(backend):
    assert stems_of(backend) <= STEMS


def test_every_op_has_its_public_function_its_reference_and_its_test():
    assert {path.stem for path in (ROOT / "mmfast/ops").glob("[!_]*.py")} == STEMS
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")} >= STEMS


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_every_kernel_file_is_called_by_its_op(backend):
    # A kernel nobody calls would leave the reference running under its name.
    assert {stem for stem in STEMS if _backend.implements(backend, stem)} == stems_of(backend)


def test_every_op_has_its_benchmark():
    # Besides the ops, the training steps of the methods.
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert files == STEMS | {"train"}


def backend_table() -> dict[str, dict[str, str]]:
    """Return the documentation's table of ops and backends: {op: {backend: "yes" or "-"}}."""
    lines = OPS_PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| functions of"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip().strip("|").split("|")])
    header, _, *body = rows
    return {row[-1]: dict(zip(header[1:-1], row[1:-1], strict=True)) for row in body}


def test_the_table_agrees_with_the_files():
    table = backend_table()
    assert set(table) == STEMS
    for op, cells in table.items():
        assert set(cells) == set(FILES)
        for backend, cell in cells.items():
            expected = "yes" if op in stems_of(backend) else "-"
            assert cell == expected, (
                f"the table says {cell!r} for {op} on {backend}, the files say {expected!r}"
            )


def test_the_table_names_every_function():
    """By the names that users call, not by those of files."""
    from mmfast import ops

    text = OPS_PAGE.read_text()
    table = text[text.index("| functions of") :].split("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    # Of what is no function only the plan runs an op; the others are what ops return.
    assert named == {name for name in ops.__all__ if name[0].islower()} | {"ReinitPlan"}


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


# Rooms of mmfast/, each of which may import those above it: a module that stands alone, or a package.
ROOMS = (
    "errors",
    "ranges",
    "files",
    "columns",
    "coalitions",
    "nests",
    "distributed",
    "objectives",
    "plots",
    "backend",
    "reference",
    "ops",
    "models",
    "data",
    "utilities",
    "contributions",
    "valuation",
    "predictions",
    "export",
    "methods",
    "training",
    "integrations",
    "experiments",
    "reports",
    "comparisons",
    "cli",
)


def modules_of(package: Path) -> dict[str, Path]:
    """Return the files of a package by the names they are imported by."""
    found = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Return the known modules that a file imports: at its top, in functions, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by relative names"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module or "" for name in names}
    return found & known


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, or [] where there is none."""
    left = {name: set(imported) for name, imported in graph.items()}
    while bottom := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in bottom:
            del left[name]
    trail: list[str] = []
    name = next(iter(left), "")
    while name and name not in trail:
        trail.append(name)
        name = min(left[name] & left.keys())
    return trail[trail.index(name) :] if trail else []


def test_imports_run_one_way():
    modules = modules_of(ROOT / "mmfast")
    # The package itself hands on names of all rooms, and asks for none of them before they are used.
    known = set(modules) - {"mmfast", "mmfast.__main__"}
    graph = {name: imports_of(modules[name], known) - {name} for name in known}
    rooms = {name: name.split(".")[1] for name in known}
    assert set(rooms.values()) == set(ROOMS), "a room is missing here, or is there no more"
    wrong = [
        f"{name} imports {imported}"
        for name, imports in sorted(graph.items())
        for imported in sorted(imports)
        if ROOMS.index(rooms[imported]) > ROOMS.index(rooms[name])
    ]
    assert wrong == []
    assert circle(graph) == []


def test_a_circle_of_imports_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) in (["b", "c"], ["c", "b"])
    assert circle({"a": {"b"}, "b": set()}) == []
