"""Torch's default device and dtype are for tensors that users make: no result of an op depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import mmfast
from mmfast import backend as _backend
from mmfast import ops, valuation
from mmfast.data import ArrayDataset, sound, standardize
from mmfast.data.batches import presence
from mmfast.methods.sample_valuation import copy_counts
from mmfast.reference import kmeans
from support import every_op
from support.cases import dtype_name
from support.every_op import CALLS, same
from support.stems import EMULATED, FILES

CASES = [pytest.param(stem, make, id=make.__name__) for stem, makes in CALLS.items() for make in makes]
BACKENDS = pytest.mark.parametrize("backend", [*FILES, EMULATED], indirect=True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("default", DEFAULTS)
@BACKENDS
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_no_op_follows_a_default(stem, make, backend, device, default, dtype, monkeypatch):
    if not _backend.implements(backend, stem):
        pytest.skip(f"{stem} has no {backend} kernel")
    for letter, size in {"N": 20, "D": 6, "C": 4}.items():
        monkeypatch.setattr(every_op, letter, size)
    _, call = make(device, dtype, backend)
    with DEFAULTS[default]():
        actual = [x.clone() for x in call()]
    expected = call()
    assert [(x.device, x.dtype) for x in actual] == [(y.device, y.dtype) for y in expected]
    assert same(actual, expected)


@pytest.mark.parametrize("default", DEFAULTS)
def test_other_ways_through_the_ops(default):
    """What no call above goes through: prepared dimensions, given centroids, merged moments, references."""
    x, labels = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    effective = torch.arange(12).view(2, 6) % 3 == 0

    def call() -> list[torch.Tensor]:
        dims = ops.DucDims(effective)
        moments = ops.class_moments(x[:9], labels[:9], 3).merge(ops.class_moments(x[9:], labels[9:], 3))
        centroids, assignments, inertia, _ = kmeans.kmeans(x, 3, seed=5)
        present = labels.view(2, 10) > 0
        scalars = [
            cluster_purity(labels.flip(0), labels)
            for cluster_purity in (kmeans.cluster_purity, ops.cluster_purity)
        ]
        return [
            ops.duc_loss([x, -x], dims),
            dims.columns,
            ops.unidirectional_info_nce(x, x.flip(0)),
            ops.unidirectional_sigmoid_loss(x, x.flip(0), temperature=x[0, :1].exp(), bias=x[0, 1]),
            *moments,
            *ops.kmeans(x, 3, init=x[:3], num_init=2)[:3],
            *ops.kmeans(x[:1].expand(20, 6), 3)[:3],
            centroids,
            assignments,
            inertia,
            ops.project_gradient(x, x[:6]),
            *ops.entropy_fusion(x.view(2, 10, 6), present=present),
            labels.new_tensor([round(2**40 * value) for value in scalars]),
        ]

    with DEFAULTS[default]():
        actual = call()
    expected = call()
    assert [(y.device, y.dtype) for y in actual] == [(y.device, y.dtype) for y in expected]
    assert same(actual, expected)


@pytest.mark.parametrize("default", DEFAULTS)
def test_data_and_valuation_follow_no_default(default):
    generator = torch.Generator().manual_seed(0)
    arrays = {f"m{m}": torch.randn(30, 5, generator=generator) for m in range(2)}
    labels, model = torch.arange(30) % 3, mmfast.models.build_model({"m0": (5,), "m1": (5,)}, 3, dim=8)
    wave = torch.randn(4000, generator=generator)

    def call() -> list[torch.Tensor]:
        data = ArrayDataset(arrays, labels, present={"m1": labels > 0})
        scaled = standardize.scale(data, standardize.scaling_of(data))
        few = scaled[[-1, 3]]
        counts = copy_counts(few["m0"].abs(), 2.0, torch.Generator("cpu").manual_seed(1))
        features, present = model.encode(few), presence(few, model.modalities)
        phi = valuation.batch_contributions(model, features, few["label"], present)
        mel = sound.log_mel(wave, 8000, num_samples=4000, mels=8)
        return [*few.values(), scaled.subset(slice(2, 5)).labels, counts, phi, mel]

    with DEFAULTS[default]():
        actual = call()
    expected = call()
    assert [(y.device, y.dtype) for y in actual] == [(y.device, y.dtype) for y in expected]
    assert same(actual, expected)
