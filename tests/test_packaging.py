"""What importing costs, what is installed, and how the compiled modules are chosen and called."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from mmfast import backend as _backend

ROOT = Path(__file__).resolve().parent.parent
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


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


def setup_py(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with `environment` in place of what else would choose compilers."""
    pytest.importorskip("setuptools")
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("CXX", "CUDA", "MMFAST"))
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def test_metadata_and_source_distribution_need_no_compiler(tmp_path):
    commands = [
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
        "sdist",
        "-d",
        tmp_path,
    ]
    done = setup_py(*map(str, commands), PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    # A package without the marker has no types for its users.
    assert (tmp_path / "mmfast/py.typed").exists()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("csrc/cpu", "csrc/cuda", "kernels", "tests", "examples", "tools", ".ci"):
        assert {f"{path}/{file.name}" for file in (ROOT / path).iterdir() if file.is_file()} <= names
    assert {
        "setup.py",
        "MANIFEST.in",
        "constraints.txt",
        ".pre-commit-config.yaml",
        "mmfast/py.typed",
    } <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is compiled elsewhere")
def test_the_cuda_build_by_compilers_that_only_note_what_they_are_told(tmp_path):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    script = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_80; exit; fi
echo "$(basename $0) $*" >>"$(dirname $0)/log"
echo "ptxas info : Compiling entry function 'kernel' for 'sm_80'"
echo "8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"
while [ "$1" != -o ]; do shift; done
: >"$2"
"""
    for name in ("nvcc", "ccache"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CUDA_HOME": str(tmp_path),
        "CXX": "ccache g++ -m64",
        "MMFAST_CPU": "0",
    }
    command = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    for cuda in ("auto", "1"):
        done = setup_py(*command, "--force", **environment, MMFAST_CUDA=cuda)
        assert done.returncode == 0, done.stderr
        assert "CUDA kernels spill registers: kernel for sm_80: 8 bytes" in done.stderr
        done = setup_py(*command, **environment, MMFAST_CUDA=cuda, MMFAST_SPILLS="error")
        assert done.returncode != 0
        assert "CUDA kernels spill registers: kernel for sm_80: 8 bytes" in done.stderr
    log = (tmp_path / "bin/log").read_text().splitlines()
    calls = [line for line in log if line.startswith("nvcc")]
    assert calls
    for call in calls:
        assert "-ccbin g++ -Xcompiler=-m64 " in call
    assert any(line.startswith("ccache g++ -m64 ") and "csrc/cuda/module.cpp" in line for line in log)


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


def test_the_best_instruction_set_is_chosen_for_every_function():
    require_cpu_module()
    code = """
import mmfast.backend
module = mmfast.backend.extension("cpu")
own = (module.isa, module.supported_isas)
builds = {entry.__doc__ for entry in vars(module).values() if callable(entry) and entry not in own}
print(module.isa(), module.supported_isas()[-1], *builds)
"""
    flags = {flag for line in CPUINFO.splitlines() if line.startswith("flags") for flag in line.split()}
    best = "baseline"
    if {"popcnt", "avx2", "fma", "f16c"} <= flags:
        best = "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "avx2"
    assert check(code).split() == [best, best, best]
    for isa in _backend.extension("cpu").supported_isas():
        assert check(code, MMFAST_CPU_ISA=isa).split() == [isa, best, isa]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc/self/task")
def test_every_op_runs_on_several_threads():
    require_cpu_module()
    # A child without threads of its own is forked for every call: what it has afterwards the kernel started.
    code = """
import os
import torch
from mmfast import backend, ops
torch.set_num_threads(1)
backend.extension("cpu")
x, y = torch.randn(2, 4000, 64), torch.randint(8, (4000,))
init = x[0, :8].clone()
calls = {
    "shapley_values": lambda: ops.shapley_values(x),
    "coalition_utilities": lambda: ops.coalition_utilities(x[0].view(4000, 8, 8), y),
    "additive_shapley": lambda: ops.additive_shapley(x, y),
    "duc_loss": lambda: ops.unidirectional_info_nce(x[0, :500], x[1, :500]),
    "class_moments": lambda: ops.class_moments(x[0], y, 8),
    "dimension_accuracy": lambda: ops.dimension_accuracy(x[0], y, init),
    "kmeans": lambda: ops.kmeans(x[0], 8, init=init, max_iter=2),
    "logit_fusion": lambda: ops.entropy_fusion(x),
    "partial_reinit_": lambda: ops.partial_reinit_([x[0]], [x[1]], 0.5),
    "update_projector_": lambda: ops.update_projector_(torch.eye(400), x[0, :400, 0], alpha=0.1),
    "project_gradient": lambda: ops.project_gradient(x.view(-1, 400)[:6], torch.eye(400)),
}
for name, call in calls.items():
    child = os.fork()
    if child == 0:
        # torch itself stays on one thread, the kernels are told three.
        torch.get_num_threads = lambda: 3
        call()
        os._exit(len(os.listdir("/proc/self/task")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, name
"""
    check(code, OMP_NUM_THREADS="1")


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
