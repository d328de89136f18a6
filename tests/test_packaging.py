"""What importing costs, what is installed, and how the compiled modules are chosen and called."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmfast import backend as _backend

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter, outside of Triton's interpreter mode."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MMFAST_CPU_ISA")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",  # where no uninstalled `mmfast` hides the installed one
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def check(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def require_cpu_module() -> None:
    if reason := _backend.why_not("cpu"):
        pytest.skip(reason)


def test_import_loads_neither_triton_nor_what_only_training_needs():
    check("""
import sys
import torch
before = set(sys.modules)
import mmfast
mmfast.ops
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "lightning_fabric", "sklearn", "matplotlib", "pandas", "rich", "typer"}, loaded
assert "mmfast._cpu" not in sys.modules
""")


def test_ops_on_the_cpu_never_import_triton():
    check("""
import sys, torch, mmfast
if torch.cuda.is_available():
    sys.exit(0)
utilities = torch.rand(3, 8, requires_grad=True)
mmfast.ops.shapley_values(utilities).sum().backward()
mmfast.ops.partial_reinit_([torch.rand(3)], [torch.rand(3)], 0.5)
assert "triton" not in sys.modules
""")


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inits = (ROOT / "mmfast").rglob("__init__.py")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert listed == found | {"mmfast.bench", "mmfast.kernels"}


def test_constraints_leave_triton_to_torch():
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert "torch" in pinned
    assert not [name for name in pinned if "triton" in name or "nvidia" in name]


def test_instruction_set_is_overridden():
    require_cpu_module()
    for isa in _backend.extension("cpu").supported_isas():
        code = "import mmfast.backend as b; print(b.extension('cpu').isa())"
        assert check(code, MMFAST_CPU_ISA=isa) == isa


def test_unknown_instruction_set_is_named():
    require_cpu_module()
    done = run("import mmfast.backend as b; b.extension('cpu')", MMFAST_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "MMFAST_CPU_ISA must be baseline, avx2 or avx512, got avx1024" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_loaded():
    require_cpu_module()
    code = """
import mmfast.backend
mmfast.backend.extension("cpu")
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
paths = {path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))}
assert len(paths) == 1, paths
"""
    check(code)


def test_wrong_calls_raise():
    require_cpu_module()
    entry = _backend.extension("cpu").shapley_values_fwd
    with pytest.raises(TypeError, match="shapley_values_fwd takes 8 arguments, got 2"):
        entry(0, 0)
    with pytest.raises(TypeError, match="str"):
        entry("0", 0, 0, 3, 8, 1, 0, 1)
    with pytest.raises(ValueError, match=r"num_players must lie in \[1, 20\], got 21"):
        entry(0, 0, 0, 21, 8, 1, 0, 1)
    with pytest.raises(ValueError, match="unknown dtype code 9"):
        entry(0, 0, 0, 3, 8, 1, 9, 1)


def test_cuda_module_loads_without_a_gpu():
    module = _backend._load_extension("cuda")
    if isinstance(module, str):
        pytest.skip(module)
    assert "90" in module.architectures()
