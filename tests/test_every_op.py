"""What holds for every op: the same bits in every run, no Triton on the CPU, capture in a CUDA graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import FILES, ROOT
from every_op import CALLS
from mmfast import backend as _backend
from mmfast import ops

CASES = [pytest.param(stem, make, id=make.__name__) for stem, makes in CALLS.items() for make in makes]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Which read the device to decide what comes next, or return a Python number.
READING = ("kmeans", "cluster_purity")


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether both hold the same bits; NaN counts as a number."""
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(first, second, strict=True))


def test_every_op_is_called():
    called = {make.__name__ for makes in CALLS.values() for make in makes}
    public = {name.removesuffix("_") for name in ops.__all__ if name[0].islower()}
    assert called == public - {"update_projector", "project_gradient"} | {"gradient_projection"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_thirty_runs_agree_to_the_bit(stem, make, backend, restored_threads):
    if reason := _backend.why_not(backend):
        pytest.skip(reason)
    torch.set_num_threads(2)
    _, call = make(torch.device("cpu"), torch.float32, backend)
    first = [x.clone() for x in call()]
    assert all(same(first, call()) for _ in range(29))


def test_without_triton_every_op_runs_on_the_cpu():
    """As on a machine that has none: an import would fail."""
    program = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from every_op import CALLS\n"
        "for makes in CALLS.values():\n"
        "    for make in makes:\n"
        "        assert make(torch.device('cpu'), torch.float32, 'auto')[1]()\n"
        "assert not [name for name in sys.modules if name.startswith('mmfast.kernels')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_thirty_runs_on_a_gpu_agree_to_the_bit(stem, make, backend, dtype):
    _require(backend, stem)
    _, call = make(torch.device("cuda"), dtype, backend)
    first = [x.clone() for x in call()]
    assert all(same(first, call()) for _ in range(29))


@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("stem", "make"), [case for case in CASES if case.id not in READING])
def test_captured_in_a_graph(stem, make, backend):
    """Replayed on other numbers, a captured call gives what a call gives."""
    _require(backend, stem)
    inputs, call = make(torch.device("cuda"), torch.float32, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for x in inputs:
            x.mul_(-0.5)
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert same(replayed, call())


def _require(backend: str, stem: str) -> None:
    if not (ROOT / FILES[backend].format(stem)).exists():
        pytest.skip(f"{stem} has no {backend} kernel")
    if reason := _backend.why_not(backend):
        pytest.skip(reason)
