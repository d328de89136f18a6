"""tools/inspect_cuda.py: a kernel that lacks the instructions its file asks for is reported."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from support.stems import ROOT

pytest.importorskip("triton", reason="its cuobjdump reads the machine code")


@pytest.fixture(scope="module")
def tool() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tools/inspect_cuda.py"), run_name="inspect_cuda"))


def test_what_is_missing_is_named(tool):
    half, wide = tool.Kernel("a_kernel<__half, 3>", "90a"), tool.Kernel("a_kernel<float, 3>", "90a")
    other = tool.Kernel("another_kernel", "80")
    wanted = [("a_kernel", "90a", {"HGMMA", "UBLKCP"})]
    complete = {half: {"HGMMA", "UBLKCP"}, wide: {"HGMMA", "UBLKCP", "LDGSTS"}, other: set()}
    assert tool.missing(complete, wanted) == []
    assert tool.missing(complete | {wide: {"UBLKCP"}}, wanted) == ["a_kernel<float, 3> on 90a has no HGMMA"]
    assert tool.missing({other: set()}, wanted) == ["a_kernel is not built for 90a"]


def test_the_sources_ask_for_the_matrix_units(tool):
    asked = {(name, arch): names for name, arch, names in tool.expectations()}
    assert asked["duc_hopper_kernel", "90a"] == {"HGMMA", "UBLKCP"}
    assert {arch for name, arch in asked if name == "duc_mma_kernel"} == {"80", "90", "100", "120"}


def test_names_lose_namespaces_and_parameters(tool):
    name = "_ZN6mmfast3duc12_GLOBAL__N_112small_kernelIfLi3EEEvPKf"
    assert tool.demangled([name]) == {name: "small_kernel<float, 3>"}


SOURCE = """
template <int n>
__global__ void __launch_bounds__(64) power(float* x, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < n; ++j) x[i] = __expf(x[i]) * x[i];
}
template __global__ void power<2>(float*, int);
template __global__ void power<3>(float*, int);
"""


def test_loops_are_printed_and_written(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source, module, written = (tmp_path / name for name in ("power.cu", "power.o", "loops.json"))
    source.write_text(SOURCE)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    subprocess.run([nvcc, *targets, "-c", "-o", str(module), str(source)], check=True)
    command = [sys.executable, "-P", str(ROOT / "tools/inspect_cuda.py"), str(module)]
    options = ["--loops", "power<3> 90", "--json", str(written)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("power<3>\n  90, ")
    assert "blocks of 64 threads" in done.stdout
    assert done.stdout.endswith("\n1 kernels\n")
    (kernel,) = json.loads(written.read_text())
    assert (kernel["kernel"], kernel["arch"], kernel["threads"]) == ("power<3>", "90", 64)
    (loop,) = [loop for loop in kernel["loops"] if loop["always"]["instructions"]["special"]]
    assert (loop["warps"], loop["always"]["instructions"]["special"]) == (2, 3)
    assert loop["always"]["cycles"]["special"] == 3 * 8
    # Of a name that is not there nothing is printed.
    absent = subprocess.run([*command, "--loops", "absent"], capture_output=True, text=True)
    assert (absent.returncode, absent.stdout) == (1, "0 kernels\n")
