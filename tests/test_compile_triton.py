"""tools/compile_triton.py: a kernel that spills, is too large or misses its instructions is reported."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

FILE = Path(__file__).resolve().parent.parent / "tools/compile_triton.py"


@pytest.fixture(scope="module")
def tool():
    return SimpleNamespace(**runpy.run_path(str(FILE), run_name="compile_triton"))


@pytest.mark.parametrize("device", ["80", "90", "100", "120", "gfx942", "gfx950"])
def test_spills_shared_memory_and_instructions_are_judged(tool, device):
    shared = {"80": 163, "90": 227, "100": 227, "120": 99, "gfx942": 64, "gfx950": 160}[device] * 1024
    names = {"90": "wgmma.mma_async", "100": "tcgen05.mma"}
    names |= dict.fromkeys(("gfx942", "gfx950"), "v_mfma_f32_32x32x8_bf16")
    facts = tool.Facts(255, 0, shared, f"  {names.get(device, 'mma.sync')}.aligned x, y;")
    device = tool.DEVICES[device]
    assert tool.problems(facts, device, "warpgroup") == []
    assert tool.problems(facts._replace(spills=4), device, None) == ["spills 4"]
    (problem,) = tool.problems(facts._replace(shared=shared + 1), device, None)
    assert "shared memory" in problem
    (problem,) = tool.problems(facts._replace(assembly="fma.rn.f32 x, y;"), device, "warp")
    assert "no warp matrix instruction" in problem


def test_no_block_has_more_threads_than_a_device_takes(tool):
    """On AMD a warp is 64 threads, so 16 warps are all of a block."""
    for op in sorted(path.stem for path in (FILE.parent.parent / "kernels").glob("[!_]*.py")):
        for device, (target, *_) in tool.DEVICES.items():
            for _, _, _, options, *_ in tool.configurations(op, device):
                assert options["num_warps"] * target.warp_size <= 1024


def test_matrix_instructions_of_a_warp_are_not_those_of_a_group(tool):
    facts = tool.Facts(255, 0, 0, "mma.sync.aligned x, y;")
    assert tool.problems(facts, tool.DEVICES["90"], "warp") == []
    assert len(tool.problems(facts, tool.DEVICES["90"], "warpgroup")) == 1


def test_allowed_spills_may_neither_grow_nor_be_left_over(tool, monkeypatch):
    facts, device = tool.Facts(255, 8, 0, ""), tool.DEVICES["90"]
    assert tool.problems(facts, device, None, 8) == []
    assert tool.problems(facts._replace(spills=4), device, None, 8) == []
    assert tool.problems(facts._replace(spills=12), device, None, 8) == ["spills 12, 8 allowed"]
    (problem,) = tool.problems(facts._replace(spills=0), device, None, 8)
    assert "not needed" in problem
    # By the version, the device, the kernel and its words, whatever their order.
    monkeypatch.setitem(tool.SPILLS, "3.99", {("90", "_some_kernel", "BLOCK=16 fp32"): 8})
    for version, found in (("3.99.1", ("90", "_some_kernel", "BLOCK=16 fp32")), ("3.9.9", None)):
        monkeypatch.setattr("triton.__version__", version)
        assert tool.allowance("_some_kernel", "fp32 N=2 BLOCK=16", "90") == found
        assert tool.allowance("_some_kernel", "fp32 N=2 BLOCK=16", "80") is None
        assert tool.allowance("_some_kernel", "fp32 N=2 BLOCK=162", "90") is None


def test_what_differs_from_bfloat16_in_name_alone_is_compiled_once(tool):
    devices = ["80", "90"]
    listed = [str(item[1:]) for item in tool.configurations("logit_fusion", "80")]
    jobs = {name: [] for name in devices}
    for item, device in tool.distinct(["logit_fusion"], devices):
        jobs[device].append(str(item[1:]))
    assert jobs["80"] == listed
    assert jobs["90"] == [text for text in listed if "fp16" not in text]
    assert len(jobs["90"]) < len(listed)
    # Alone it is compiled wherever it is listed.
    alone = [item for item in tool.configurations("logit_fusion", "80") if "bf16" not in str(item[1:])]
    tool.distinct.__globals__["configurations"] = lambda op, device: alone
    assert len(tool.distinct(["logit_fusion"], devices)) == 2 * len(alone)


def test_a_planted_spill_is_found():
    # The interpreter, which the other tests use, compiles nothing.
    code = """
import compile_triton as tool
from mmfast.kernels.shapley_values import compile_configurations
kernel, types, constants, options, *rest = compile_configurations()[-1]
sound = tool.report((kernel, types, constants, options, *rest), "90", with_loops=True)
assert sound.problems == [] and sound.facts.registers > 24, sound
assert sound.loops.launch == (sound.facts.registers, 32 * options["num_warps"]), sound.loops
assert sound.loops.arch == "90a" and "no loops" in tool.loops.table(sound.loops), sound.loops
(problem,) = tool.report((kernel, types, constants, {**options, "maxnreg": 24}, *rest), "90").problems
assert problem.startswith("spills "), problem
(problem,) = tool.report((kernel, types, {**constants, "M": "?"}, options, *rest), "90").problems
assert problem.startswith("does not compile"), problem
"""
    path = os.pathsep.join([str(FILE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    # Not in the root, whose bare checkout would hide the installed package.
    folder = FILE.parent.parent / "tests"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
