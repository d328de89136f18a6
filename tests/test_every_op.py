"""What holds for every op: the same bits in every run, no Triton on the CPU, capture in a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfast import backend as _backend
from mmfast import ops
from support import every_op
from support.cases import dtype_name
from support.every_op import CALLS, READING, same
from support.stems import FILES, ROOT

CASES = [pytest.param(stem, make, id=make.__name__) for stem, makes in CALLS.items() for make in makes]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_op_is_called():
    called = {make.__name__ for makes in CALLS.values() for make in makes}
    public = {name.removesuffix("_") for name in ops.__all__ if name[0].islower()}
    together = {"update_projector", "project_gradient"}
    assert called == public - together | {"gradient_projection", "reinit_plan", "kmeans_assign"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_thirty_runs_agree_to_the_bit(stem, make, backend, restored_threads):
    if reason := _backend.why_not(backend):
        pytest.skip(reason)
    torch.set_num_threads(2)
    _, call = make(torch.device("cpu"), torch.float32, backend)
    first = [x.clone() for x in call()]
    assert all(same(first, call()) for _ in range(29))


@pytest.mark.parametrize(("stem", "make"), CASES)
@pytest.mark.usefixtures("cpu_module")
def test_number_of_threads_changes_no_bit(stem, make, restored_threads):
    """At sizes that differ from op to op, the ops' own tests have this, too."""
    _, call = make(torch.device("cpu"), torch.float32, "cpu")
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append([x.clone() for x in call()])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.usefixtures("cpu_module")
def test_every_instruction_set(isa):
    """What the ops' own files check, in a process that is started for one instruction set."""
    if isa not in _backend.extension("cpu").supported_isas():
        pytest.skip(f"this processor does not support {isa}")
    program = (
        "import importlib, mmfast.backend, numpy\n"
        f"assert mmfast.backend.extension('cpu').isa() == {isa!r}\n"
        f"for stem in {sorted(CALLS)}:\n"
        "    print(stem, flush=True)\n"
        "    importlib.import_module(f'test_{stem}').check_all('cpu')\n"
        # Instructions of MMX, left in use, make NaN of every long double afterwards.
        "    assert numpy.longdouble(2) + 1 == 3\n"
    )
    here = Path(__file__).parent
    # Three threads on two cores must not wait for each other by spinning.
    environment = {**os.environ, "MMFAST_CPU_ISA": isa, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_without_triton_every_op_runs_on_the_cpu():
    """As on a machine that has none: an import would fail."""
    program = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from support.every_op import CALLS\n"
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
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
    assert same(every_op.replayed(inputs, call), call())


def _require(backend: str, stem: str) -> None:
    if not (ROOT / FILES[backend].format(stem)).exists():
        pytest.skip(f"{stem} has no {backend} kernel")
    if reason := _backend.why_not(backend):
        pytest.skip(reason)


def _differentiable_calls():
    labels, effective = torch.arange(200) % 3, torch.tensor([[True, True, False], [False, False, True]])
    partial, table = (2, 200, 3), (200, 4, 3)
    return {
        "duc_loss": ((200, 3), lambda x, b: ops.duc_loss([x, x.detach()], effective, backend=b)),
        "info_nce": ((200, 3), lambda x, b: ops.unidirectional_info_nce(x, x.detach(), backend=b)),
        "sigmoid": ((200, 3), lambda x, b: ops.unidirectional_sigmoid_loss(x, x.detach(), backend=b)),
        "class_moments": ((200, 3), lambda x, b: ops.class_moments(x, labels, 3, backend=b).var.sum()),
        "additive_shapley": (
            partial,
            lambda z, b: ops.additive_shapley(z, labels, utility="probability", backend=b)[:, 0].sum(),
        ),
        "coalition_utilities": (
            table,
            lambda z, b: ops.coalition_utilities(z, labels, utility="probability", backend=b).sum(),
        ),
        "entropy_fusion": (partial, lambda z, b: ops.entropy_fusion(z, backend=b)[0].sum()),
        "certainty_fusion": (partial, lambda z, b: ops.certainty_fusion(z, backend=b)[0].sum()),
    }


def test_results_without_gradients_are_the_same():
    """Where no gradient is asked for, a raw op is called without autograd's Function around it."""
    labels, effective = torch.arange(200) % 3, torch.tensor([[True, True, False], [False, False, True]])
    calls = {
        name: (shape, lambda x, op=op: op(x, "auto")) for name, (shape, op) in _differentiable_calls().items()
    }
    calls["shapley_values"] = ((200, 8), ops.shapley_values)
    calls["project_gradient"] = ((200, 3), lambda x: ops.project_gradient(x, torch.ones(3, 3)))
    calls["moments"] = ((200, 3), lambda x: ops.class_moments(x, labels, 3).mean)
    calls["both ways"] = (
        (200, 3),
        lambda x: ops.duc_loss([x, 2 * x], ops.DucDims(effective), reduction="none"),
    )
    for name, (shape, op) in calls.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        recorded = op(x.clone().requires_grad_())
        assert recorded.requires_grad, name
        with torch.no_grad():
            hidden = op(x.clone().requires_grad_())
        for result in (op(x), hidden):
            assert not result.requires_grad, name
            assert torch.equal(result, recorded.detach()), name
