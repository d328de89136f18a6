"""Class moments that cancel, leave the range of their dtype on the way, or are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfast import ops
from support.cases import DTYPES, dtype_name, is_interpreted
from support.class_separability import make, plain_moments

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("order", ["drift", "outlier first", "outlier last"])
def test_moments_do_not_cancel(order, backend, device):
    """The first samples, or those before, are far from the mean of all."""
    x = 1e4 + torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)).to(device)
    if order == "drift":
        x += torch.arange(3000, device=device)[:, None]
    else:
        x[0 if order == "outlier first" else -1] = -1e6
    labels = torch.zeros(3000, dtype=torch.int64, device=device)
    _, mean, var = ops.class_moments(x, labels, 1, backend=backend)
    torch.testing.assert_close(mean[0].double(), x.double().mean(0), rtol=4e-6, atol=0)
    torch.testing.assert_close(var[0].double(), x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_infinite_samples(backend, device):
    x = torch.zeros(200, 2, device=device)
    x[150, 0] = torch.inf
    _, mean, var = ops.class_moments(
        x, torch.zeros(200, dtype=torch.int64, device=device), 1, backend=backend
    )
    assert mean.tolist() == [[torch.inf, 0]]
    assert bool(var[0, 0].isnan())


def test_moments_survive_a_large_mean(backend, device):
    features, labels, num_classes = make((333, 4, 3), torch.float32, device=device)
    _, _, var = ops.class_moments(features + 1e4, labels, num_classes, backend=backend)
    truth = plain_moments((features + 1e4).double(), labels, num_classes)[2]
    torch.testing.assert_close(var.double(), truth, rtol=1e-4, atol=0)


def test_moments_of_half_precision_survive_a_large_mean(backend, device):
    features, labels, num_classes = make((333, 4, 3), device=device)
    features = (features + 1e3).half()
    _, _, var = ops.class_moments(features, labels, num_classes, backend=backend)
    truth = plain_moments(features.double(), labels, num_classes)[2]
    torch.testing.assert_close(var.double(), truth, rtol=4e-6, atol=0)


def check_moments_in_range(x, backend, device, labels=None, num_classes=1, rtol=1e-5):
    """Hold the moments of one column against those of the same numbers times a power of two.

    A mean may be rounded to float64, and the variance be off by the square of that.
    """
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    # Many rows of many columns are several chunks of every kernel.
    rows = x[:, None].repeat(1, 64 if len(x) > 100 else 1).to(device)
    _, mean, var = ops.class_moments(rows, labels.to(device), num_classes, backend=backend)
    scale = 2.0**-600 if x.dtype == torch.float64 else 1.0
    for k in range(num_classes):
        own = x[labels == k].double() * scale
        true_mean = own[0] + (own - own[0]).mean()
        true_var = (own - true_mean).square().mean() / scale / scale
        rounding = (4 * 2.0**-53 * true_mean / scale).square().nan_to_num(posinf=0).item()
        for actual, true, atol in ((mean[k], true_mean / scale, 0), (var[k], true_var, rounding)):
            assert actual.dtype == torch.promote_types(x.dtype, torch.float32)
            expected = true.to(actual.dtype).expand_as(actual)
            torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("number", [1, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_moments_out_of_range_on_the_way(dtype, number, backend, device):
    power, largest = (135, torch.finfo(dtype).max) if dtype == torch.float64 else (0, torch.finfo(dtype).max)
    unit = 10.0**power
    # Variances in range, whose sums of squares are not.
    check_moments_in_range(
        (torch.tensor([1e19, -1e19, 1.2e19, -1.1e19], dtype=torch.float64) * unit).to(dtype).repeat(number),
        backend,
        device,
    )
    # Equal numbers: their sum is out of range, or the square of what a mean of them is rounded by.
    for value in (2.786e26, 2.786e24, 1e38, largest, -largest, largest / 3, 0.1, 1e-38):
        x = torch.full((number + 2,), value, dtype=torch.float64).to(dtype)
        check_moments_in_range(x, backend, device, rtol=0 if dtype != torch.float64 else 1e-15)
        labels = torch.arange(2 * number + 4) % 2
        both = torch.stack((x, torch.zeros_like(x)), 1).flatten()
        check_moments_in_range(both, backend, device, labels, 2, rtol=0 if dtype != torch.float64 else 1e-15)
    # The largest numbers of both signs: the variance is out of range, the mean is not.
    x = torch.tensor([largest, -largest, largest], dtype=torch.float64).to(dtype).repeat(number)
    check_moments_in_range(x, backend, device)


@pytest.mark.parametrize("num_classes", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_moments_of_what_is_no_number(dtype, num_classes, backend, device):
    x = torch.randn(700, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    labels = torch.arange(700) % 3 % num_classes
    infinite = torch.inf
    for row, column, value in ((0, 0, torch.nan), (600, 1, infinite), (3, 2, -infinite), (9, 3, infinite)):
        x[row, column] = value
    x[12, 3], x[labels == 0, 4], x[0, 5] = -infinite, infinite, -0.0
    _, mean, var = ops.class_moments(x.to(device), labels.to(device), num_classes, backend=backend)
    own = x[labels == 0].double()
    for actual, true in ((mean[0], own.mean(0)), (var[0], own.var(0, correction=0))):
        true = torch.where(true.isfinite(), 0, true)
        actual = torch.where(actual.isfinite(), 0, actual).cpu().double()
        torch.testing.assert_close(actual, true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_gradient_of_moments_in_range_is_so_on_the_way(dtype, backend, device):
    # A deviation of 1e20 times 2 dvar is 4e38 before it is divided by the number of samples.
    features = torch.tensor([[1e20], [-1e20], [1e20], [-1e20]], dtype=dtype, device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    count = torch.tensor([4], device=device)
    dmean, dvar, mean = (torch.full((1, 1), value, device=device) for value in (0.0, 2e18, 0.0))
    arguments = (dmean, dvar, features, labels, count, mean, backend)
    actual = torch.ops.mmfast.class_moments_bwd(*arguments)
    torch.testing.assert_close(actual.double(), features.double() * 1e18, rtol=1e-2, atol=0)


def test_merged_moments_stay_in_range():
    for largest in (torch.tensor([[3e38]]), torch.tensor([[1.7e308]], dtype=torch.float64)):
        count, zero = torch.tensor([1]), torch.zeros_like(largest)
        merged = ops.ClassMoments(count, largest, zero).merge(ops.ClassMoments(count, -largest, zero))
        assert merged.mean.item() == 0
        assert merged.var.item() == torch.inf
        # Means 2e19 apart: the square is out of range, a quarter of it is not.
        size = largest.sqrt() * 0.9
        merged = ops.ClassMoments(count, size, zero).merge(ops.ClassMoments(count, -size, zero))
        torch.testing.assert_close(merged.var, size * size, rtol=1e-6, atol=0)
        infinite = torch.full_like(largest, torch.inf)
        for mean in (infinite, -infinite):
            moments = ops.ClassMoments(count, mean, infinite * 0)
            assert moments.merge(moments).mean.item() == mean.item()
            assert moments.merge(ops.ClassMoments(count, zero, zero)).mean.item() == mean.item()
        assert moments.merge(ops.ClassMoments(count, infinite, zero)).mean.isnan().all()


def test_merged_moments_of_very_unequal_numbers():
    one, many = torch.tensor([1]), torch.tensor([2**40 + 1])
    mean, zero = torch.tensor([[1e12]]), torch.tensor([[0.0]])
    for first, second in ((one, many), (many, one)):
        means = (mean, zero) if first is one else (zero, mean)
        merged = ops.ClassMoments(first, means[0], zero).merge(ops.ClassMoments(second, means[1], zero))
        torch.testing.assert_close(merged.var, torch.tensor([[1e24 / 2**40]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e297])
def test_an_outlier_near_the_end_of_range_leaves_the_digits_of_the_mean(scale, backend, device):
    generator = torch.Generator().manual_seed(0)
    features = 1e-5 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    features[0] = -5.962577177
    features *= scale
    labels = torch.zeros(1000, dtype=torch.int64, device=device)
    mean = ops.class_moments(features.to(device), labels, 1, backend=backend).mean[0].cpu()
    truth = features.numpy().astype(np.longdouble).mean(0)
    # 4,000 to 12,000 units where the sum of deviations from the outlier is not corrected.
    assert np.abs((mean.numpy() - truth) / truth).max() < 250 * 2.0**-53


def test_a_million_samples_far_from_zero_keep_their_moments(backend, device):
    # The interpreter takes minutes for a million; a plain sum of 10,000 is 1e7, in steps of 1.
    num_samples = 10_000 if is_interpreted(backend) else 1_000_000
    features = 1000 + torch.randn(num_samples, 1, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.zeros(num_samples, dtype=torch.int64, device=device)
    moments = ops.class_moments(features, labels, 1, backend=backend)
    truth = features.double()
    assert abs(moments.mean.item() - truth.mean().item()) < 1e-4
    assert abs(moments.var.item() - truth.var(unbiased=False).item()) < 1e-5
