"""tools/inspect_cuda.py: a kernel that lacks the instructions its file asks for is reported."""

from __future__ import annotations

import runpy
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
