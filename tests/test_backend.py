"""Which backend runs: the fastest for "auto", the one named or an error that says why not."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmfast import backend, ops
from mmfast.ops import _launch
from mmfast.ops._contrast import REDUCTIONS
from mmfast.ops.additive_shapley import UTILITIES
from mmfast.ops.logit_fusion import SCORES

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.usefixtures("cpu_module")
def test_auto_takes_what_is_preferred_for_a_while():
    with backend.preferring("reference"):
        assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "reference"
        assert backend.resolve("shapley_values", "cpu", "cpu", torch.float32) == "cpu"
        with backend.preferring("cuda"):
            # What cannot run here is not taken.
            assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "cpu"
    assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "cpu"


@pytest.mark.usefixtures("cpu_module")
def test_auto_takes_the_kernel_where_there_is_one():
    for op in ("shapley_values", "partial_reinit"):
        assert backend.resolve(op, "auto", "cpu", torch.float32) == "cpu"


@pytest.mark.usefixtures("cpu_module")
def test_the_kernel_is_what_runs(monkeypatch):
    calls = []
    extension = backend.extension("cpu")

    class Spy:
        def __getattr__(self, name):
            # Reading lists of tensors is no kernel's work.
            if not name.endswith("tensor_words"):
                calls.append(name)
            return getattr(extension, name)

        def __dir__(self):
            # What an op's kernels are found by, and kept.
            return dir(extension)

    monkeypatch.setattr(backend, "extension", lambda name: Spy())
    utilities = torch.rand(3, 4, requires_grad=True)
    ops.shapley_values(utilities).sum().backward()
    ops.partial_reinit_([torch.zeros(3)], [torch.ones(3)], 0.5)
    assert calls == ["shapley_values_fwd", "shapley_values_bwd", "partial_reinit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is there")
def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(backend.BackendUnavailableError, match="backend 'cuda' cannot run shapley_values: "):
        ops.shapley_values(torch.rand(2, 4), backend="cuda")
    with pytest.raises(ValueError, match='backend must be "auto" or one of reference, cpu, triton, cuda'):
        ops.shapley_values(torch.rand(2, 4), backend="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is there")
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_compiled_code_says_why_too():
    features = torch.rand(2, 4, 6)
    calls = {
        "shapley_values": lambda x: ops.shapley_values(x[..., :4], backend="cuda"),
        "duc_loss": lambda x: ops.duc_loss(x, torch.eye(2, 6) > 0, backend="cuda"),
        "logit_fusion": lambda x: ops.entropy_fusion(x, backend="cuda"),
        "class_separability": lambda x: ops.class_moments(x[0], torch.zeros(4).long(), 1, backend="cuda"),
        "partial_reinit": lambda x: ops.partial_reinit_([x], [x.clone()], 0.5, backend="cuda"),
    }
    for op, call in calls.items():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with pytest.raises(backend.BackendUnavailableError) as plain:
            call(features)
        with pytest.raises(backend.BackendUnavailableError, match=f"backend 'cuda' cannot run {op}: ") as got:
            compiled(features)
        assert str(got.value) == str(plain.value)


def test_the_interpreter_is_switched_while_python_runs(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "why_not", lambda name: None)
    # Nothing that was resolved with this answer may stay in the cache.
    monkeypatch.setattr(backend, "_resolve", functools.cache(backend._resolve.__wrapped__))
    for switch, device_type, other in (("1", "cpu", "cuda"), ("0", "cuda", "cpu"), ("1", "cpu", "cuda")):
        monkeypatch.setenv("TRITON_INTERPRET", switch)
        assert backend.resolve("shapley_values", "triton", device_type, torch.float32) == "triton"
        with pytest.raises(backend.BackendUnavailableError, match=f"does not take tensors on '{other}'"):
            backend.resolve("shapley_values", "triton", other, torch.float32)


@pytest.mark.usefixtures("cpu_module")
def test_tensors_elsewhere_are_refused_by_name():
    with pytest.raises(backend.BackendUnavailableError, match="it does not take tensors on 'meta'"):
        backend.resolve("shapley_values", "cpu", "meta", torch.float32)


@pytest.fixture
def on_any_gpu(monkeypatch):
    """As on a machine with a GPU, on which every backend runs."""
    monkeypatch.setattr(backend, "_why_not_here", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_on_a_gpu_auto_takes_what_costs_the_host_least(on_any_gpu, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for op in backend._IMPLEMENTED:
        # Tensor core instructions of half precision that only Triton has.
        is_exception = op in ("duc_loss", "sigmoid_loss") and dtype.itemsize == 2 and capability >= (10, 0)
        order = ["triton", "cuda"] if is_exception else ["cuda", "triton"]
        assert backend.candidates(op, "cuda", dtype) == [*order, "reference"]
    assert backend.candidates("duc_loss", "cpu", dtype) == ["cpu", "reference"]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_codes_of_compiled_modules_are_those_of_python(name):
    module = backend._load_extension(name)
    if isinstance(module, str):
        pytest.skip(module)
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in _launch.DTYPE_CODE)
    assert tuple(_launch.DTYPE_CODE.values()) == tuple(range(len(dtypes)))
    assert module.codes == {
        "dtype": dtypes,
        "reduction": REDUCTIONS,
        "utility": UTILITIES,
        "score": SCORES,
    }


def _matrix(rows, columns, device_type, dtype=torch.float32):
    device = SimpleNamespace(type=device_type)
    return SimpleNamespace(shape=(rows, columns), dtype=dtype, device=device, is_cpu=device_type == "cpu")


@pytest.mark.parametrize(("op", "device_type"), backend.PLAIN_UP_TO)
def test_few_numbers_are_left_to_plain_torch(op, device_type, monkeypatch):
    most = backend.PLAIN_UP_TO[op, device_type]
    is_plain = functools.partial(backend.is_plain_faster, op)
    assert is_plain(_matrix(*most, device_type))
    assert is_plain(_matrix(*most, device_type, torch.float64))
    assert not is_plain(_matrix(most.rows + 1, most.columns, device_type))
    assert not is_plain(_matrix(most.rows, most.columns + 1, device_type))
    assert not is_plain(_matrix(*most, "mps"))
    # Where it would be less exact, or something else was asked for.
    assert not is_plain(_matrix(*most, device_type, torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == device_type)
        assert not is_plain(_matrix(*most, device_type))
    for name in ("triton", "reference"):
        with backend.preferring(name):
            assert not is_plain(_matrix(*most, device_type))
    for wrong in (lambda: "high", lambda: (_ for _ in ()).throw(RuntimeError("mixed options"))):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", wrong)
        assert not is_plain(_matrix(*most, device_type))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_few_rows_projected_by_plain_torch_are_the_same(wants_gradient, monkeypatch):
    monkeypatch.setitem(backend.PLAIN_UP_TO, ("gradient_projection", "cpu"), backend.PlainUpTo(8, 64))
    grad, projector = torch.randn(8, 16), torch.randn(16, 16, requires_grad=True)
    results = []
    for name in ("auto", "reference"):
        leaf = grad.clone().requires_grad_(wants_gradient)
        projected = ops.project_gradient(leaf, projector, backend=name)
        assert projected.requires_grad == wants_gradient
        # The projector is a constant.
        gradients = torch.autograd.grad(projected.sum(), leaf) if wants_gradient else ()
        results.append((projected.detach(), *gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_module_built_before_a_change_is_refused(name, monkeypatch):
    """As after a pull without a new install; its kernels would be called with what they do not know."""
    current, load = backend._load_extension(name), backend._load_extension.__wrapped__
    if not isinstance(current, str):
        assert current.interface == backend._INTERFACE
    for stale in (SimpleNamespace(), SimpleNamespace(interface=backend._INTERFACE + 1)):
        monkeypatch.setattr(backend.importlib, "import_module", lambda _, stale=stale: stale)
        text = f"the {name} module was built from other sources than these: install mmfast again"
        assert load(name) == text
    assert f"kInterface = {backend._INTERFACE};" in (ROOT / "csrc/registry.h").read_text()


def test_cuda_kernels_are_not_for_amd(monkeypatch):
    """torch calls AMD's GPUs cuda, too."""
    monkeypatch.setattr(backend, "_load_extension", lambda _: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend.why_not("cuda") is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.why_not("cuda") == "no NVIDIA GPU that torch can use"
