"""Which backend runs: the fastest for "auto", the one named or an error that says why not."""

from __future__ import annotations

import pytest
import torch

from mmfast import backend, ops


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


def test_tensors_elsewhere_are_refused_by_name():
    with pytest.raises(backend.BackendUnavailableError, match="it does not take tensors on 'meta'"):
        backend.resolve("shapley_values", "cpu", "meta", torch.float32)
