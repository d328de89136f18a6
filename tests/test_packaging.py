"""What importing costs, what is installed, and how the compiled modules are chosen and called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmfast
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
    # A package without the marker has no types for its users, and without the page no report.
    for name in ("mmfast/py.typed", "mmfast/reports/report.html"):
        assert (tmp_path / name).exists()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "csrc/cpu", "csrc/cuda", "kernels", "examples", "tools", ".ci")
    for path in (*folders, "tests", "tests/support", "tests/cuda_emulation"):
        assert {f"{path}/{file.name}" for file in (ROOT / path).iterdir() if file.is_file()} <= names
    assert {
        "setup.py",
        "MANIFEST.in",
        "conftest.py",
        "constraints.txt",
        ".pre-commit-config.yaml",
        "mmfast/py.typed",
        "mmfast/reports/report.html",
    } <= names
    assert not [name for name in names if name.endswith(".so")]


# A compiler that notes what it is told, and knows three architectures.
NOTING = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_75; echo compute_80; echo compute_90; exit; fi
case "$*" in *--version) echo "Cuda compilation tools, release 12.9, V12.9.1"; exit ;; esac
echo "$(basename $0) $*" >>"$(dirname $0)/log"
echo "ptxas info : Compiling entry function 'kernel' for 'sm_80'"
echo "8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"
while [ "$1" != -o ]; do shift; done
: >"$2"
"""
compiles_cuda = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="nothing is compiled elsewhere"
)


class NotedBuild:
    """Builds of the CUDA module by compilers that only note what they are told."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("nvcc", "ccache"):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(NOTING)
            program.chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        into = ("--build-lib", f"{self.folder}/lib", "--build-temp", f"{self.folder}/temp")
        return self.setup_py("build_ext", *into, *words, **environment)

    def setup_py(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return setup_py(
            *words,
            PATH=f"{self.folder}/bin:{os.environ['PATH']}",
            CUDA_HOME=str(self.folder),
            CXX="ccache g++ -m64",
            MMFAST_CPU="0",
            **environment,
        )

    def calls(self, program: str) -> list[str]:
        """Return the command lines of one program, with a space at each end."""
        lines = (self.folder / "bin/log").read_text().splitlines()
        return [f" {line} " for line in lines if line.startswith(program)]


@pytest.fixture
def noted_build(tmp_path) -> NotedBuild:
    pytest.importorskip("ninja")
    return NotedBuild(tmp_path)


@compiles_cuda
@pytest.mark.parametrize("cuda", ["auto", "1"])
def test_the_cuda_build_tells_compilers_what_cxx_says(noted_build, cuda):
    done = noted_build.run(MMFAST_CUDA=cuda)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels spill registers: kernel for sm_80: 8 bytes" in done.stderr
    done = noted_build.run(MMFAST_CUDA=cuda, MMFAST_SPILLS="error")
    assert done.returncode != 0
    assert "CUDA kernels spill registers: kernel for sm_80: 8 bytes" in done.stderr
    calls = noted_build.calls("nvcc")
    assert calls
    for call in calls:
        assert "-ccbin g++ -Xcompiler=-m64 " in call
    assert any("csrc/cuda/module.cpp" in call for call in noted_build.calls("ccache g++ -m64 "))


@compiles_cuda
@pytest.mark.parametrize(
    ("named", "built"),
    [("", ["80", "90"]), ("90", ["90"]), ("9.0, 80", ["80", "90"]), ("80;90;80", ["80", "90"])],
)
def test_the_cuda_build_is_for_the_architectures_named(noted_build, named, built):
    done = noted_build.run(MMFAST_CUDA="1", MMFAST_CUDA_ARCHS=named)
    assert done.returncode == 0, done.stderr
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in built]
    codes.append(f"-gencode=arch=compute_{built[-1]},code=compute_{built[-1]}")
    for call in noted_build.calls("nvcc"):
        named_codes = [word for word in call.split() if word.startswith("-gencode")]
        # What needs one architecture's own instructions has an object of its own.
        one = re.search(r" -c \S+_sm(\w+)\.cu ", call)
        assert named_codes == ([f"-gencode=arch=compute_{one[1]},code=sm_{one[1]}"] if one else codes)
    assert any(" -c csrc/cuda/duc_loss_sm90a.cu " in call for call in noted_build.calls("nvcc"))
    module = next(call for call in noted_build.calls("ccache") if "csrc/cuda/module.cpp" in call)
    assert f"{' '.join(built)}, PTX {built[-1]}" in module
    assert '-DMMFAST_NVCC="12.9"' in module


@compiles_cuda
@pytest.mark.parametrize("program", ["nvcc", "ccache"])
def test_objects_of_another_compiler_are_built_again(noted_build, program):
    def built_again() -> list[str]:
        (noted_build.folder / "bin/log").write_text("")
        done = noted_build.run("--force", MMFAST_CUDA="1")
        assert done.returncode == 0, done.stderr
        calls = [*noted_build.calls("nvcc"), *noted_build.calls("ccache")]
        return sorted(call for call in calls if " -c " in call)

    everything = built_again()
    assert {" nvcc", " ccac"} == {call[:5] for call in everything}
    assert built_again() == []
    path = noted_build.folder / "bin" / program
    path.write_text(path.read_text().replace("12.9.1", "12.9.2"))
    of_cuda = [call for call in everything if call.startswith(" nvcc")]
    # The C++ compiler has a part in nvcc's objects, too.
    assert built_again() == (of_cuda if program == "nvcc" else everything)


@compiles_cuda
@pytest.mark.parametrize(("cuda", "tag"), [("1", "cp311-abi3-linux_"), ("0", "py3-none-any.whl")])
def test_a_wheel_is_for_the_systems_that_run_what_is_in_it(noted_build, cuda, tag):
    folder = noted_build.folder
    words = [
        *("egg_info", "--egg-base", f"{folder}", "build", "--build-base", f"{folder}/build"),
        *("bdist_wheel", "--bdist-dir", f"{folder}/bdist", "--dist-dir", f"{folder}/dist"),
    ]
    done = noted_build.setup_py(*words, MMFAST_CUDA=cuda)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.name.startswith(f"mmfast-{mmfast.__version__}-{tag}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith("/WHEEL"))
        is_pure = b"Root-Is-Purelib: true" in archive.read(about)
    assert is_pure == (cuda == "0")
    assert ("mmfast/_cuda.abi3.so" in names) == (cuda == "1")
    assert "mmfast/kernels/duc_loss.py" in names


@compiles_cuda
@pytest.mark.parametrize("runtime", ["static", "shared"])
def test_the_cuda_runtime_is_linked_as_named(noted_build, runtime):
    done = noted_build.run(MMFAST_CUDA="1", MMFAST_CUDART=runtime)
    assert done.returncode == 0, done.stderr
    assert [call for call in noted_build.calls("nvcc") if f" -cudart {runtime} " in call]


@compiles_cuda
@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"MMFAST_CUDA_ARCHS": "90,91"}, "of 75, 80, 90, got '91'"),
        ({"MMFAST_CUDA_ARCHS": "hopper"}, "MMFAST_CUDA_ARCHS must hold compute capabilities that"),
        ({"MMFAST_CUDA_ARCHS": "75"}, "the kernels need compute capability 80 or more, got 75"),
        ({"MMFAST_CUDART": "dynamic"}, "MMFAST_CUDART must be one of static, shared, got 'dynamic'"),
    ],
)
# What is asked for and cannot be had must not be left out without a word.
@pytest.mark.parametrize("cuda", ["auto", "1"])
def test_wrong_options_of_the_cuda_build_are_refused(noted_build, environment, text, cuda):
    done = noted_build.run(MMFAST_CUDA=cuda, **environment)
    assert done.returncode != 0
    assert text in done.stderr


def test_constraints_leave_triton_to_torch():
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert "torch" in pinned
    assert not [name for name in pinned if "triton" in name or "nvidia" in name]


@pytest.mark.usefixtures("cpu_module")
def test_instruction_set_is_overridden():
    for isa in _backend.extension("cpu").supported_isas():
        code = "import mmfast.backend as b; print(b.extension('cpu').isa())"
        assert check(code, MMFAST_CPU_ISA=isa) == isa


@pytest.mark.usefixtures("cpu_module")
def test_the_best_instruction_set_is_chosen_for_every_function():
    code = """
import mmfast.backend
module = mmfast.backend.extension("cpu")
own = (module.isa, module.supported_isas, module.tensor_words, module.has_tensor_words)
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
@pytest.mark.usefixtures("cpu_module")
def test_every_op_runs_on_several_threads():
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
    "sigmoid_loss": lambda: ops.unidirectional_sigmoid_loss(x[0, :500], x[1, :500]),
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


@pytest.mark.usefixtures("cpu_module")
def test_unknown_instruction_set_is_named():
    done = run("import mmfast.backend as b; b.extension('cpu')", MMFAST_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "MMFAST_CPU_ISA must be baseline, avx2 or avx512, got avx1024" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.usefixtures("cpu_module")
def test_one_openmp_runtime_is_loaded():
    code = """
import mmfast.backend
mmfast.backend.extension("cpu")
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
paths = {path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))}
assert len(paths) == 1, paths
"""
    check(code)


@pytest.mark.usefixtures("cpu_module")
def test_wrong_calls_raise():
    entry = _backend.extension("cpu").shapley_values_fwd
    with pytest.raises(TypeError, match="shapley_values_fwd takes 8 arguments, got 2"):
        entry(0, 0)
    with pytest.raises(TypeError, match="str"):
        entry("0", 0, 8, 8, 1, 0, 0, 1)
    with pytest.raises(ValueError, match=r"num_players must lie in \[1, 20\], got 21"):
        entry(0, 0, 2**21, 8, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="unknown dtype code 9"):
        entry(0, 0, 8, 8, 1, 0, 9, 1)


def test_cuda_module_loads_without_a_gpu():
    module = _backend._load_extension("cuda")
    if isinstance(module, str):
        pytest.skip(module)
    assert "90" in module.architectures()
