"""What tools/wheels says of a wheel that lacks something, and of a machine that does."""

from __future__ import annotations

import os
import runpy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.stems import ROOT

TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "wheels")))


def wheel(folder: Path, *names: str) -> Path:
    """Return an archive of these files, each of a thousand bytes that do not pack."""
    path = folder / "mmfast-0.1.0-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, os.urandom(1000))
    return path


def test_a_whole_wheel_passes(tmp_path):
    TOOL.check_wheel(wheel(tmp_path, "mmfast/_cpu.abi3.so"), cuda=False)
    TOOL.check_wheel(wheel(tmp_path, "mmfast/_cpu.abi3.so", "mmfast/_cuda.abi3.so"), cuda=True)


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        (["mmfast/_cpu.abi3.so"], 10**6, "lacks mmfast/_cuda.abi3.so"),
        (
            ["mmfast/_cpu.abi3.so", "mmfast/_cuda.abi3.so", "mmfast.libs/libgomp.so.1"],
            10**6,
            "carries mmfast.libs/libgomp.so.1",
        ),
        (["mmfast/_cpu.abi3.so", "mmfast/_cuda.abi3.so"], 1500, "has 0.0 MB, more than 0"),
    ],
)
def test_what_a_wheel_must_not_be(tmp_path, names, most, text):
    with pytest.raises(TOOL.WheelError, match=text):
        TOOL.check_wheel(wheel(tmp_path, *names), cuda=True, most=most)


def test_every_architecture_is_demanded():
    wanted = TOOL.wanted_architectures((ROOT / "setup.py").read_text())
    assert wanted == {"sm_80", "sm_90", "sm_90a", "sm_100", "sm_120", "sm_120 PTX"}
    with pytest.raises(TOOL.WheelError, match="names no CUDA_ARCHITECTURES"):
        TOOL.wanted_architectures("CUDA = (80,)")


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(TOOL.WheelError, match="no-such-compiler is not on this machine"):
        TOOL.run("no-such-compiler", "--version")
    with pytest.raises(TOOL.WheelError, match="false ended with status 1"):
        TOOL.run("false")
