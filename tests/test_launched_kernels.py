"""Every Triton kernel compiles for the arguments that its launchers pass; see launched_kernels.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "kernels"
OPS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def run(cache: Path, *arguments: str) -> str:
    """Run Python here, where Triton compiles and its cache holds nothing, and return what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels_of(path: Path) -> set[str]:
    """Return the kernels of a file, "file.kernel"; its other functions for the GPU are called by them."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        is_jit = isinstance(node, ast.FunctionDef) and any(
            "jit" in ast.unparse(d) for d in node.decorator_list
        )
        if is_jit and node.name.endswith("_kernel"):
            found.add(f"{path.stem}.{node.name}")
    return found


# Whose calls launch the kernels that several ops share.
SHARED = {
    "_class_order.py": ("class_separability", "kmeans"),
    "_contrast_columns.py": ("duc_loss",),
}


def files_of(op: str) -> list[Path]:
    shared = [FOLDER / name for name, ops in SHARED.items() if op in ops]
    return [FOLDER / f"{op}.py", *FOLDER.glob(f"_{op}_*.py"), *shared]


def test_every_kernel_belongs_to_an_op():
    files = {path for op in OPS for path in files_of(op)}
    assert [path for path in FOLDER.glob("*.py") if kernels_of(path) and path not in files] == []


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_what_is_passed(op, tmp_path):
    """Sizes of 1, odd ones and multiples of 16; pointers to 16 bytes and others; every kernel of the op."""
    found = json.loads(run(tmp_path, "-m", "support.launched_kernels", op))
    assert set().union(*map(kernels_of, files_of(op))) <= set(found["kernels"])
    assert not found["failures"], "\n\n".join("\n".join(failure) for failure in found["failures"].items())


PLANTED = """
import torch, triton, triton.language as tl
from support.launched_kernels import Launches

@triton.jit
def _planted_kernel(x_ptr, P):
    tl.store(x_ptr, P.to(tl.int64))

launches = Launches()
x = torch.zeros(4, dtype=torch.int64)
for P in (2, 16, 1):
    _planted_kernel[(1,)](x, P)
assert launches.kernels == {"planted._planted_kernel"}, launches.kernels
(failure,) = launches.failures
assert failure == "_planted_kernel(x_ptr=int64[4], P=1)", failure
assert "no attribute 'to'" in launches.failures[failure], launches.failures
for grid in ((0,), (1, 70_000)):
    launches.failures.clear()
    _planted_kernel[grid](x[1:], 2)
    (failure,) = launches.failures.items()
    where = "_planted_kernel(x_ptr=int64[3] unaligned, P=2)"
    assert failure == (where, f"no GPU takes the grid {grid}"), failure
"""


def test_a_planted_fault_is_found(tmp_path):
    # Triton reads a kernel's text from its file.
    (tmp_path / "planted.py").write_text(PLANTED)
    run(tmp_path, "-c", f"import sys; sys.path[:0] = ['.', {str(tmp_path)!r}]; import planted")
