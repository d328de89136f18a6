"""Which backend runs: the fastest for "auto", the one named or an error that says why not."""

from __future__ import annotations

import functools

import pytest
import torch

from mmfast import backend, ops


def test_auto_takes_what_is_preferred_for_a_while():
    with backend.preferring("reference"):
        assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "reference"
        assert backend.resolve("shapley_values", "cpu", "cpu", torch.float32) == "cpu"
        with backend.preferring("cuda"):
            # What cannot run here is not taken.
            assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "cpu"
    assert backend.resolve("shapley_values", "auto", "cpu", torch.float32) == "cpu"


def test_auto_takes_the_kernel_where_there_is_one():
    for op in ("shapley_values", "partial_reinit"):
        assert backend.resolve(op, "auto", "cpu", torch.float32) == "cpu"


def test_the_kernel_is_what_runs(monkeypatch):
    calls = []
    extension = backend.extension("cpu")

    class Spy:
        def __getattr__(self, name):
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


def test_tensors_elsewhere_are_refused_by_name():
    with pytest.raises(backend.BackendUnavailableError, match="it does not take tensors on 'meta'"):
        backend.resolve("shapley_values", "cpu", "meta", torch.float32)
