"""Class moments: values, gradients, merging, layouts, bad input; and what moments and accuracies share."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import ops
from mmfast.ops import _class_separability_launch
from mmfast.reference import class_separability as reference
from support.cases import DTYPES, HALF, dtype_name, is_interpreted
from support.class_separability import LAWS, SHAPES, make, plain_moments
from support.numerics import assert_close_to_truth, assert_rounded_once

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_moments(features, labels, num_classes, backend):
    actual = ops.class_moments(features, labels, num_classes, backend=backend)
    wide = torch.promote_types(features.dtype, torch.float32)
    count, *truths = plain_moments(features.double(), labels, num_classes)
    assert torch.equal(actual.count, count)
    for mine, truth, plain in zip(
        actual[1:], truths, plain_moments(features.to(wide), labels, num_classes)[1:], strict=True
    ):
        assert_close_to_truth(mine, truth, plain)


def check_gradient(features, labels, num_classes, backend):
    """Half precision is rounded once, from float32."""
    wide = torch.promote_types(features.dtype, torch.float32)
    count, mean, _ = reference.class_moments(features, labels, num_classes)
    generator = torch.Generator().manual_seed(2)
    dmean, dvar = torch.randn(2, *mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
    results = [
        raw(dmean.to(dtype), dvar.to(dtype), features.to(kept), labels, count, mean.to(dtype))
        for raw, dtype, kept in (
            (lambda *args: torch.ops.mmfast.class_moments_bwd(*args, backend), wide, features.dtype),
            (reference.class_moments_bwd, torch.float64, torch.float64),
            (reference.class_moments_bwd, wide, features.dtype),
        )
    ]
    assert_close_to_truth(*results)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_precision_gradient_is_rounded_once(dtype, backend, device):
    features, labels, num_classes = make((64, 16, 8), dtype, device=device)
    moments = ops.class_moments(features.double(), labels, num_classes)
    dmean, dvar = torch.randn(2, *moments.mean.shape, generator=torch.Generator().manual_seed(2)).to(device)
    arguments = (dmean, dvar, features, labels, moments.count, moments.mean.float())
    actual = torch.ops.mmfast.class_moments_bwd(*arguments, backend)
    truth = reference.class_moments_bwd(*(x.double() if x.is_floating_point() else x for x in arguments))
    assert_rounded_once(actual, truth)


def check_all(backend):
    """Every dtype, layout, width of a tile and number of threads, for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for dtype in DTYPES:
            for shape in ((0, 5, 3), (1, 1, 1), (37, 16, 50), (1100, 131, 7)):
                features, labels, num_classes = make(shape, dtype)
                wider = torch.cat([features, features, features.new_zeros(len(features), 1)], 1)
                for x in (features, features.T.contiguous().T, wider[:, shape[1] : -1]):
                    check_moments(x, labels, num_classes, backend)
                    check_gradient(x, labels, num_classes, backend)
                    for centroids in (features[:num_classes], make((num_classes, shape[1], 2))[0]):
                        if len(centroids) == num_classes:
                            hits = torch.ops.mmfast.dimension_hits(x, labels, centroids, backend)
                            assert torch.equal(hits, reference.dimension_hits(x, labels, centroids))


@pytest.mark.usefixtures("restored_threads", "cpu_module")
@pytest.mark.parametrize("shape", [(20_001, 40, 3), (4_001, 65, 200), (100_003, 3, 2)], ids=str)
def test_number_of_threads_changes_no_bit(shape):
    features, labels, num_classes = make(shape, torch.float32)
    raw, results = torch.ops.mmfast, []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        count, mean, var = raw.class_moments_fwd(features, labels, num_classes, "cpu")
        dfeatures = raw.class_moments_bwd(mean, var, features, labels, count, mean, "cpu")
        results.append((count, mean, var, dfeatures, raw.dimension_hits(features, labels, mean, "cpu")))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 3)], ids=str)
def test_moments_close_to_truth(shape, dtype, backend, device):
    features, labels, num_classes = make(shape, dtype, device=device)
    check_moments(features, labels, num_classes, backend)
    check_gradient(features, labels, num_classes, backend)


# Of the CUDA kernel a block takes 64 samples, or 16 of each of up to 128 classes, a warp 512 bytes of a row.
@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        (torch.float32, "contiguous", (600, 9, 40)),
        (torch.float32, "unaligned", (100, 9, 130)),
        (torch.float32, "contiguous", (200, 260, 3)),
        (torch.float32, "unaligned", (200, 260, 3)),
        (torch.float16, "rows apart", (200, 260, 3)),
        (torch.float32, "rows apart", (70, 1030, 2)),
        (torch.float64, "contiguous", (70, 520, 2)),
        (torch.bfloat16, "contiguous", (70, 520, 9)),
    ],
    ids=str,
)
def test_many_classes_and_wide_rows(dtype, shape, layout, backend, device):
    features, labels, num_classes = make(shape, dtype, device=device)
    if layout != "contiguous":
        wider = torch.cat([features, features.new_full((len(features), 8), torch.nan)], 1)
        wider = wider.roll(1, 1) if layout == "unaligned" else wider
        features = wider[:, 1:-7] if layout == "unaligned" else wider[:, :-8]
    check_moments(features, labels, num_classes, backend)
    check_gradient(features, labels, num_classes, backend)
    centroids = make((num_classes, shape[1], 2), torch.float32, device=device)[0]
    hits = torch.ops.mmfast.dimension_hits(features, labels, centroids, backend)
    assert torch.equal(hits, reference.dimension_hits(features, labels, centroids))


@pytest.mark.parametrize("num_classes", [5, 130], ids="C={}".format)
def test_labels_that_name_no_class_are_left_out(num_classes, backend, device, monkeypatch):
    if backend in ("reference", "cpu"):
        pytest.skip("labels on a CPU are checked")
    monkeypatch.setattr(_class_separability_launch, "check_label_range", lambda *_: None)
    features, labels, _ = make((100, 9, num_classes), torch.float32)
    outside = torch.arange(100) % 7 == 3
    wrong = labels.masked_fill(outside, -1).masked_fill(torch.arange(100) % 14 == 3, num_classes).to(device)
    features = features.to(device)
    raw, known = torch.ops.mmfast, ~outside.to(device)
    expected = reference.class_moments(features[known], wrong[known], num_classes)
    count, mean, var = raw.class_moments_fwd(features, wrong, num_classes, backend)
    torch.testing.assert_close((count, mean, var), expected, equal_nan=True)
    hits = raw.dimension_hits(features, wrong, mean, backend)
    assert torch.equal(hits, reference.dimension_hits(features[known], wrong[known], mean))
    dfeatures = raw.class_moments_bwd(mean, var, features, wrong, count, mean, backend)
    assert not dfeatures[~known].any()


def test_moments_by_hand(backend, device):
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [7.0, 2.0]], device=device)
    count, mean, var = ops.class_moments(features, torch.tensor([0, 0, 2], device=device), 3, backend=backend)
    assert count.tolist() == [2, 0, 1]
    assert mean[[0, 2]].tolist() == [[2, 0], [7, 2]]
    assert var[[0, 2]].tolist() == [[1, 0], [0, 0]]
    assert bool(mean[1].isnan().all())
    assert bool(var[1].isnan().all())


@LAWS
@given(
    first=st.integers(0, 20),
    second=st.integers(0, 20),
    num_classes=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_merged_moments_are_those_of_all_samples(first, second, num_classes, seed):
    features, labels, _ = make((first + second, 3, num_classes), seed=seed)
    parts = [
        ops.class_moments(features[rows], labels[rows], num_classes)
        for rows in (slice(first), slice(first, None))
    ]
    merged, whole = parts[0].merge(parts[1]), ops.class_moments(features, labels, num_classes)
    torch.testing.assert_close(tuple(merged), tuple(whole), equal_nan=True)


def test_merged_moments_pass_gradients_around_empty_classes():
    # Class 0 has samples in the first set only, class 1 in the second only, class 2 in both, class 3 nowhere.
    features = make((8, 2, 2))[0].requires_grad_()
    labels = torch.tensor([0, 0, 2, 2, 1, 2, 1, 2])

    def moments(features):
        first, second = (
            ops.class_moments(features[rows], labels[rows], 4) for rows in (slice(4), slice(4, 8))
        )
        return [moment[:3] for moment in first.merge(second)[1:]]

    assert torch.autograd.gradcheck(moments, features)
    parts = [
        ops.ClassMoments(torch.tensor(count), *torch.tensor(moment).repeat(2, 1, 1).requires_grad_().unbind())
        for count, moment in (([2, 0, 0], [[1.0], [torch.nan], [torch.nan]]),) * 2
    ]
    merged = parts[0].merge(parts[1])
    gradients = torch.autograd.grad((merged.mean + merged.var).nansum(), [*parts[0][1:], *parts[1][1:]])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_moments_are_saved_and_loaded():
    moments = ops.class_moments(*make((12, 3, 3))[:2], 3)
    file = io.BytesIO()
    torch.save({"moments": moments}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["moments"]
    assert type(loaded) is ops.ClassMoments
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(loaded, moments, strict=True))


def test_moments_gradient(backend, device):
    features, labels, num_classes = make((12, 3, 3), device=device)
    features[3:5] *= 2

    def moments(features):
        return ops.class_moments(features, labels, num_classes, backend=backend)[1:]

    assert torch.autograd.gradcheck(moments, features.requires_grad_(), fast_mode=is_interpreted(backend))


def test_gradients_of_moments_may_begin_anywhere(backend, device):
    features = torch.randn(40, 8, device=device, requires_grad=True)
    labels = torch.arange(40, device=device) % 3
    moments = ops.class_moments(features, labels, 3, backend=backend)
    gradients = torch.randn(1 + 2 * 24, device=device)
    views = [gradients[1 + 24 * i : 25 + 24 * i].view(3, 8) for i in range(2)]
    results = [
        torch.autograd.grad((moments.mean, moments.var), features, grads, retain_graph=True)[0]
        for grads in (views, [view.clone() for view in views])
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


# Of the Triton kernels a block takes 64 samples of one class, 32 of all classes, 64 dimensions.
@pytest.mark.parametrize("sizes", [(63, 64), (65, 0, 128), (129, 1, 2)], ids=str)
@pytest.mark.parametrize("num_dims", [64, 65], ids="D={}".format)
def test_classes_around_a_block(num_dims, sizes, backend, device):
    labels = torch.repeat_interleave(torch.tensor(sizes, device=device))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    features = make((len(labels), num_dims, 1), torch.float32, device=device)[0]
    check_moments(features, labels, len(sizes), backend)
    check_gradient(features, labels, len(sizes), backend)
    centroids = reference.class_moments(features, labels, len(sizes))[1]
    hits = torch.ops.mmfast.dimension_hits(features, labels, centroids, backend)
    assert torch.equal(hits, reference.dimension_hits(features, labels, centroids))


def test_chunks_of_samples_give_the_whole(monkeypatch):
    features, labels, num_classes = make((333, 8, 5))
    moments = ops.class_moments(features, labels, num_classes, backend="reference")
    accuracy = ops.dimension_accuracy(features, labels, moments.mean, backend="reference")
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 100)
    again = ops.class_moments(features, labels, num_classes, backend="reference")
    torch.testing.assert_close(tuple(again), tuple(moments))
    again = ops.dimension_accuracy(features, labels, moments.mean, backend="reference")
    assert torch.equal(again, accuracy)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8], ids=dtype_name)
def test_layouts_and_label_dtypes(label_dtype, backend, device):
    features, labels, num_classes = make((64, 9, 5), label_dtype=label_dtype, device=device)
    strided = features.T.contiguous().T
    spread = torch.stack([labels, labels], 1)[:, 0]
    expected = ops.class_moments(features, labels.long(), num_classes, backend=backend)
    actual = ops.class_moments(strided, spread, num_classes, backend=backend)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    centroids = expected.mean.T.contiguous().T
    accuracy = ops.dimension_accuracy(strided, spread, centroids, backend=backend)
    assert torch.equal(accuracy, ops.dimension_accuracy(features, labels, expected.mean, backend=backend))


def test_autocast(backend, device):
    features, labels, num_classes = make((64, 9, 5), torch.float32, device=device)
    expected = ops.class_moments(features, labels, num_classes, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = ops.class_moments(features, labels, num_classes, backend=backend)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


def test_compiles(backend, device):
    features, labels, num_classes = make((64, 9, 5), device=device)

    def everything(features):
        moments = ops.class_moments(2 * features, labels, num_classes, backend=backend)
        accuracy = ops.dimension_accuracy(features, labels, moments.mean, backend=backend)
        effective = ops.effective_dimensions(features, labels, num_classes, backend=backend)
        return moments.mean.square().sum() + moments.var.sum(), accuracy, effective

    features.requires_grad_()
    expected = everything(features)
    actual = torch.compile(everything, fullgraph=True, backend="aot_eager")(features)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(result[0], features) for result in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_empty_batch(backend, device):
    features, labels = torch.randn(0, 3, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    accuracy = ops.dimension_accuracy(features, labels, torch.randn(2, 3, device=device), backend=backend)
    assert bool(accuracy.isnan().all())
    with pytest.raises(ValueError, match=r"features must hold at least one sample, got \[0, 3\]"):
        ops.effective_dimensions(features, labels, 2, backend=backend)


def test_bad_input():
    features, labels, num_classes = make((6, 3, 2))
    with pytest.raises(ValueError, match=r"features must have shape \[N, D\], got \[3\]"):
        ops.class_moments(features[0], labels, num_classes)
    with pytest.raises(ValueError, match=r"labels must have shape \[N\] = \[6\], got \[5\]"):
        ops.class_moments(features, labels[:5], num_classes)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, C\) = \[0, 2\), got values from 2"):
        ops.effective_dimensions(features, labels * 0 + 2, num_classes)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ops.class_moments(features, labels, 0)
    with pytest.raises(TypeError, match=r"num_classes must be an integer, got 2\.0"):
        ops.class_moments(features, labels, 2.0)
    with pytest.raises(ValueError, match=r"centroids must have shape \[C, D\] = \[C, 3\], got \[2, 4\]"):
        ops.dimension_accuracy(features, labels, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"centroids must hold a class with samples, got none finite"):
        ops.dimension_accuracy(features, labels, torch.full((2, 3), torch.nan))
    moments = ops.class_moments(features, labels, num_classes)
    with pytest.raises(
        ValueError, match=r"other must have moments of shape \[C, D\] = \[2, 3\], got \[4, 3\]"
    ):
        moments.merge(ops.class_moments(features, labels, 4))
