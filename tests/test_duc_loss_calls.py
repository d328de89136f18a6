"""duc_loss as it is called: prepared dimensions, layouts, autocast, torch.compile, empty and bad input."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch

from mmfast import ops
from support.duc_loss import make, value_and_gradient

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_one_modality_may_be_a_constant(backend, device):
    features, effective = make((2, 5, 4), device=device)
    expected = value_and_gradient(ops.duc_loss, features, torch.float64, effective=effective)[1]
    for learner in range(2):
        leaves = [feature.clone() for feature in features]
        leaves[learner].requires_grad_()
        ops.duc_loss(leaves, effective, backend=backend).backward()
        torch.testing.assert_close(leaves[learner].grad, expected[learner])


def test_key_of_info_nce_gets_no_gradient(backend, device):
    query, key = torch.randn(2, 8, 4, requires_grad=True, device=device).unbind()
    loss = ops.unidirectional_info_nce(query.detach(), key, backend=backend)
    assert not loss.requires_grad


def test_prepared_dims_and_stacked_features_agree(backend, device):
    features, effective = make((3, 9, 11), device=device)
    expected = ops.duc_loss(features, effective, backend=backend)
    dims = ops.DucDims(effective)
    for same in (features, list(features), tuple(features)):
        torch.testing.assert_close(ops.duc_loss(same, dims, backend=backend), expected, rtol=0, atol=0)
    assert dims.dims(0, 2).tolist() == (effective[0] & ~effective[2]).nonzero().squeeze(1).tolist()
    assert dims.dims(1, 1).tolist() == []
    assert sum(dims.sizes) == len(dims.columns)
    assert "M=3, D=11" in repr(dims)
    effective.fill_(False)
    assert bool(dims.to("cpu").effective.any())


def test_prepared_dims_are_saved_and_loaded():
    dims = ops.DucDims(make((3, 9, 11))[1])
    file = io.BytesIO()
    torch.save({"dims": dims}, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=True)["dims"], copy.deepcopy(dims)):
        assert torch.equal(loaded.effective, dims.effective)
        assert torch.equal(loaded.columns, dims.columns)
        assert loaded.sizes == dims.sizes


@pytest.mark.parametrize(("teacher", "student"), [(2, 0), (0, 2), (-1, 0), (0, -1), (1, 5)])
def test_prepared_dims_of_no_such_pair(teacher, student):
    dims = ops.DucDims(make((2, 4, 5))[1])
    name, got = ("student", student) if 0 <= teacher < 2 else ("teacher", teacher)
    with pytest.raises(IndexError) as caught:
        dims.dims(teacher, student)
    assert f"{name} must lie in [0, M) = [0, 2), got {got}" in str(caught.value)
    with pytest.raises(TypeError, match="teacher must be an integer"):
        dims.dims(True, 0)


@pytest.mark.parametrize("is_inference", [False, True], ids=["", "inference"])
def test_a_change_of_prepared_dims_is_refused(is_inference, backend, device):
    features, effective = make((2, 4, 5), torch.float32, device=device)
    with torch.inference_mode(is_inference):
        dims = ops.DucDims(effective)
        expected = ops.duc_loss(features, dims, backend=backend)
        # The mask itself is free to be changed.
        effective.logical_not_()
        assert torch.equal(ops.duc_loss(features, dims, backend=backend), expected)
        with pytest.raises(AttributeError):
            dims.effective = effective
        for part in (dims, dims.to(device)):
            part.effective.logical_not_()
        for use in (
            lambda: ops.duc_loss(features, dims, backend=backend),
            lambda: dims.dims(0, 1),
            lambda: dims.to("cpu"),
            lambda: copy.deepcopy(dims),
        ):
            with pytest.raises(ValueError, match="changed in place"):
                use()


def test_layouts(backend, device):
    features, effective = make((2, 9, 11), device=device)
    expected = value_and_gradient(
        functools.partial(ops.duc_loss, backend=backend), features, torch.float64, effective=effective
    )
    strided = [feature.T.contiguous().T.requires_grad_() for feature in features]
    loss = ops.duc_loss(strided, effective.T.contiguous().T, backend=backend)
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, strided)), expected)


def test_nothing_to_teach_is_zero_with_zero_gradient(backend, device):
    for num_modalities, effective in ((1, torch.ones(1, 4)), (3, torch.ones(3, 4)), (2, torch.zeros(2, 4))):
        features = torch.randn(num_modalities, 5, 4, requires_grad=True, device=device)
        loss = ops.duc_loss(features, effective.to(device, torch.bool), backend=backend)
        assert loss.item() == 0
        loss.backward()
        assert bool((features.grad == 0).all())


def test_empty_batch_is_as_in_cross_entropy(backend, device):
    features = torch.randn(2, 0, 4, requires_grad=True, device=device)
    effective = torch.eye(2, 4, device=device).bool()
    loss = functools.partial(ops.duc_loss, features, effective, backend=backend)
    assert bool(loss(reduction="mean").isnan())
    assert loss(reduction="sum").item() == 0
    assert loss(reduction="none").shape == (0,)
    loss(reduction="sum").backward()
    assert features.grad.shape == (2, 0, 4)


def test_mixed_dtypes_are_promoted(backend, device):
    features, effective = make((2, 9, 11), torch.float32, device=device)
    mixed = [features[0].bfloat16().requires_grad_(), features[1].clone().requires_grad_()]
    loss = ops.duc_loss(mixed, effective, backend=backend)
    expected = ops.duc_loss([mixed[0].float(), mixed[1]], effective, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [leaf.grad.dtype for leaf in mixed] == [torch.bfloat16, torch.float32]


def test_autocast_does_not_lower_precision(backend, device):
    features, effective = make((2, 33, 20), torch.float32, device=device)
    expected = value_and_gradient(
        functools.partial(ops.duc_loss, backend=backend), features, torch.float32, effective=effective
    )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradient(
            functools.partial(ops.duc_loss, backend=backend), features, torch.float32, effective=effective
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_info_nce_under_autocast(backend, device):
    query, key = make((2, 33, 20), torch.float32, device=device)[0]
    loss = functools.partial(ops.unidirectional_info_nce, backend=backend)

    def value(queries, keys):
        return loss(queries[0], keys)

    expected = value_and_gradient(functools.partial(value, keys=key), [query], torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradient(functools.partial(value, keys=key), [query], torch.float32)
        # What autocast hands over is a mixture.
        mixed = loss(query.bfloat16(), key)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(mixed, loss(query.bfloat16().float(), key), rtol=0, atol=0)


@pytest.mark.parametrize("prepared", [False, True], ids=["mask", "prepared"])
def test_compiles(prepared, backend, device):
    # The other cases compiled the same code: dynamo gives up after eight.
    torch.compiler.reset()
    features, effective = make((2, 16, 8), device=device)
    dims = ops.DucDims(effective) if prepared else effective

    def loss(first, second):
        value = ops.duc_loss([2 * first, second], dims, temperature=3.0, backend=backend)
        return value + ops.unidirectional_info_nce(first, second, backend=backend)

    leaves = [feature.clone().requires_grad_() for feature in features]
    expected, actual = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))
    without_gradient = torch.compile(loss, fullgraph=True, backend="aot_eager")(*features)
    torch.testing.assert_close(without_gradient, expected.detach())


BAD = {
    "no features": (ValueError, lambda x, e: ([], e), {}, "M >= 1 tensors [N, D], got none"),
    "unequal D": (ValueError, lambda x, e: ([x[0], x[1][:, :3]], e), {}, "[N, D] = [4, 5], got [4, 3]"),
    "unequal N": (ValueError, lambda x, e: ([x[0], x[1][:2]], e), {}, "features[1] must have shape"),
    "stack rank": (ValueError, lambda x, e: (x[0], e), {}, "features must have shape [M, N, D], got [4, 5]"),
    "integers": (TypeError, lambda x, e: (x.long(), e), {}, "features[0] must have dtype float32"),
    "effective shape": (ValueError, lambda x, e: (x, e.T), {}, "effective must have shape [M, D] = [2, 5]"),
    "effective dtype": (TypeError, lambda x, e: (x, e.float()), {}, "effective must have dtype bool"),
    "prepared shape": (ValueError, lambda x, e: (x, ops.DucDims(e[:1])), {}, "got [1, 5]"),
    "temperature": (ValueError, lambda x, e: (x, e), {"temperature": 0.0}, "temperature must be positive"),
    "reduction": (ValueError, lambda x, e: (x, e), {"reduction": "max"}, "reduction must be one of 'mean'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, change, options, message = BAD[case]
    with pytest.raises(error) as raised:
        ops.duc_loss(*change(*make((2, 4, 5))), **options)
    assert message in str(raised.value)


def test_bad_pair():
    with pytest.raises(ValueError, match=r"key must have shape \[N, D\] = \[4, 5\], got \[4, 6\]"):
        ops.unidirectional_info_nce(torch.randn(4, 5), torch.randn(4, 6))
