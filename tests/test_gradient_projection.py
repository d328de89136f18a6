"""The projector of a shared head's gradient: its laws, values, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import ops
from support.cases import DTYPES, dtype_name, is_interpreted, laws
from support.numerics import as_plain_float64, assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAWS = laws(30)


def projector_after(features, alpha, dtype=torch.float64, backend="auto"):
    projector = torch.eye(features.shape[1], dtype=dtype, device=features.device)
    for feature in features:
        ops.update_projector_(projector, feature, alpha=alpha, backend=backend)
    return projector


def formula(features, alpha, dtype):
    """Return the projector after the published updates."""
    p = torch.eye(features.shape[1], dtype=dtype, device=features.device)
    for h in features.to(dtype):
        q = p @ h / (alpha + h @ p @ h)
        p = p - torch.outer(q, p @ h)
    return p


def check_step(projector, feature, grad, alpha, backend):
    """One call does to the projector what update_projector_ does, to the bit, and multiplies with that."""
    expected, stepped = projector.clone(), torch.empty_like(projector).copy_(projector)
    ops.update_projector_(expected, feature, alpha=alpha, backend=backend)
    actual = ops.update_and_project_(stepped, feature, grad, alpha=alpha, backend=backend)
    if backend == "reference" or (backend == "cpu" and projector.stride(1) == 1):
        assert torch.equal(stepped, expected)
    # Sums of another kernel go in another order.
    slack = 1e-5 if projector.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(stepped, expected, rtol=0, atol=slack)
    assert torch.equal(stepped, stepped.T)
    assert actual.dtype == grad.dtype
    assert actual.is_contiguous()
    truth, usual = grad.double() @ stepped.double(), grad @ stepped.to(grad.dtype)
    if grad.dtype == torch.float64:
        usual = as_plain_float64(truth, grad.float() @ stepped.float())
    assert_close_to_truth(actual, truth, usual)


def check_all(backend):
    """Every dtype, layout, number of threads, and sizes around the tiles, for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for size in (1, 2, 15, 17, 64, 301):
            draw = torch.Generator().manual_seed(size)
            features = torch.randn(3, size, generator=draw)
            for dtype in DTYPES[:2]:
                projector = projector_after(features, 0.1, dtype, backend)
                assert torch.equal(projector, projector.T)
                assert_close_to_truth(
                    projector, formula(features, 0.1, torch.float64), formula(features, 0.1, dtype)
                )
                wider = torch.cat([projector, projector], 1)[:, 1 : size + 1]
                for rows in (0, 1, 3, 6, 7, 12, 25, 101):
                    for grad_dtype in DTYPES:
                        grad = torch.randn(rows, size, generator=draw).to(grad_dtype)
                        for g, p in (
                            (grad, projector),
                            (grad.T.contiguous().T, wider),
                            (torch.cat([grad, grad], 1)[:, :size], wider.T),
                        ):
                            actual = ops.project_gradient(g, p, backend=backend)
                            truth, usual = g.double() @ p.double(), g @ p.to(grad_dtype)
                            if grad_dtype == torch.float64:
                                usual = as_plain_float64(truth, g.float() @ p.float())
                            assert_close_to_truth(actual, truth, usual)
                        for p in (projector, torch.cat([projector, projector], 1)[:, :size]):
                            check_step(p, features[0], grad.T.contiguous().T, 0.1, backend)


@pytest.mark.usefixtures("restored_threads", "cpu_module")
@pytest.mark.parametrize(("size", "rows"), [(512, 6), (301, 31), (301, 5), (700, 101)])
def test_number_of_threads_changes_no_bit(size, rows):
    features, grad = torch.randn(4, size), torch.randn(rows, size)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        projector = projector_after(features, 0.1, torch.float32, "cpu")
        projected = ops.project_gradient(grad, projector, backend="cpu")
        stepped = ops.update_and_project_(projector, features[0], grad, alpha=0.1, backend="cpu")
        results.append((projector, projected, stepped))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_backward_that_needs_the_old_projector_notices(backend, device):
    projector, weight = torch.eye(3, device=device), torch.randn(2, 3, requires_grad=True, device=device)
    loss = ops.project_gradient(weight, projector, backend=backend).sum()
    ops.update_projector_(projector, torch.randn(3, device=device), alpha=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_by_hand(backend, device):
    # P = I - h h^T / (alpha + |h|^2) with h = (3, 4): |h|^2 = 25.
    projector, feature = torch.eye(2, device=device), torch.tensor([3.0, 4.0], device=device)
    assert ops.update_projector_(projector, feature, alpha=5.0, backend=backend) is None
    torch.testing.assert_close(projector.cpu(), torch.tensor([[0.7, -0.4], [-0.4, 14 / 30]]))


@pytest.mark.parametrize("size", [1, 8, 33])
@pytest.mark.parametrize("feature_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_update_close_to_truth(dtype, feature_dtype, size, backend, device):
    features = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).to(device, feature_dtype)
    actual = projector_after(features, 0.1, dtype, backend)
    assert torch.equal(actual, actual.T)
    assert_close_to_truth(actual, formula(features, 0.1, torch.float64), formula(features, 0.1, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_update_of_several_tiles(dtype, backend, device):
    features = torch.randn(2, 530, generator=torch.Generator().manual_seed(0)).to(device)
    projector = torch.eye(530, 600, dtype=dtype, device=device)[:, :530]
    if dtype == torch.float64:
        # Columns in one piece.
        projector = projector.T.contiguous().T
    for feature in features:
        ops.update_projector_(projector, feature, alpha=0.1, backend=backend)
    assert torch.equal(projector, projector.T)
    assert_close_to_truth(projector, formula(features, 0.1, torch.float64), formula(features, 0.1, dtype))


@LAWS
@given(
    size=st.integers(1, 20),
    num_updates=st.integers(1, 40),
    alpha=st.floats(1e-4, 10),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 1000),
)
def test_laws(size, num_updates, alpha, scale, dtype, seed):
    features = scale * torch.randn(
        num_updates, size, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )
    projector = projector_after(features, alpha, dtype)
    assert torch.equal(projector, projector.T)
    values = torch.linalg.eigvalsh(projector.double())
    slack = 1e-9 if dtype == torch.float64 else 1e-4
    assert values.min() >= -slack
    assert values.max() <= 1 + slack
    last = features[-1]
    unit = last / last.norm()
    # Of the direction just removed at most alpha / (alpha + h^T P h) times what was there remains.
    assert float(unit @ projector @ unit) <= alpha / float(last @ last) + slack


def closed_form(features, alpha):
    """Return (I + sum h h^T / alpha)^-1, what the updates come to, in float64."""
    _, values, directions = torch.linalg.svd(features.double().cpu())
    kept = torch.ones(len(directions)).double()
    # Those next to nothing are what rounding makes of no direction.
    kept[: len(values)] = 1 / (1 + values.where(values > 1e-10 * values[0], 0.0).square() / alpha)
    return (directions.T * kept) @ directions


@pytest.mark.parametrize(("alpha", "scale"), [(0.1, 1.0), (0.1, 3.0), (1e-3, 1.0)])
def test_an_alpha_far_below_the_feature_counts(backend, device, alpha, scale):
    """512 dimensions, features of squared length 256 or 2304: alpha is less than D eps |h|^2."""
    draw = torch.Generator().manual_seed(0)
    features = scale * torch.randn(2 if is_interpreted(backend) else 40, 512, generator=draw).relu()
    actual = projector_after(features.to(device), alpha, torch.float32, backend)
    assert float((actual.cpu() - closed_form(features, alpha)).abs().max()) < 2e-5
    assert torch.linalg.eigvalsh(actual.double()).min() > -1e-6


@pytest.mark.parametrize("alpha", [1e-4, 1e-30, 2.938737e-39])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_the_same_directions_for_ever(backend, device, dtype, alpha):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(3, 24, generator=draw, dtype=dtype)
    features = features[torch.randint(3, (12 if is_interpreted(backend) else 1000,), generator=draw)].to(
        device
    )
    actual = projector_after(features, alpha, dtype, backend)
    expected = closed_form(features, alpha).to(device)
    # Of 3 directions; each update rounds.
    slack = 1e-4 if dtype == torch.float32 else 1e-7
    assert float((actual.double() - expected).abs().max()) < slack
    eigenvalues = torch.linalg.eigvalsh(actual.double())
    assert eigenvalues.min() > -slack / 100
    assert eigenvalues.max() < 1 + slack


def test_an_eigenvalue_below_0_is_taken_towards_it(backend, device):
    # What rounding can leave; subtracted, the term would have made it larger at every call.
    projector = torch.diag(torch.tensor([1.0, -1e-3], device=device))
    feature = torch.tensor([0.0, 1.0], device=device)
    ops.update_projector_(projector, feature, alpha=1e-3, backend=backend)
    torch.testing.assert_close(projector[1, 1].item(), -5e-4, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, x) for x in (1e-30, 1e-22, 1e20, 3e37)]
    + [(torch.float64, x) for x in (1e-310, 1e-170, 1e-22, 1e170, 1e307)],
    ids=str,
)
def test_features_whose_squares_the_dtype_does_not_hold(backend, device, dtype, scale):
    feature = torch.tensor([3.0, 4.0, 0.0], device=device, dtype=dtype)
    projector = torch.eye(3, device=device, dtype=dtype)
    ops.update_projector_(projector, feature * scale, alpha=2.938737e-39, backend=backend)
    # Where squares are below the range of float64, next to nothing goes.
    least = 16 * torch.finfo(dtype).eps
    share = 1 / (max(2.938737e-39 / 25 / scale / scale if scale > 1e-160 else 1e308, least) + 1)
    unit = feature.double().cpu() / 5
    expected = torch.eye(3).double() - share * torch.outer(unit, unit)
    torch.testing.assert_close(projector.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_shows(backend, device, value):
    projector = projector_after(torch.tensor([[1.0, 2.0, value]], device=device), 0.1, torch.float32, backend)
    assert bool(projector.isnan().all())
    projected = ops.project_gradient(torch.eye(3, device=device), projector, backend=backend)
    assert bool(projected.isnan().all())
    grad = torch.tensor([[1.0, value, 0.0], [1.0, 2.0, 3.0]], device=device)
    projected = ops.project_gradient(grad, torch.eye(3, device=device) + 1, backend=backend)
    assert projected.isfinite().all(1).tolist() == [False, True]
    assert torch.equal(projected.isnan(), (grad @ (torch.eye(3, device=device) + 1)).isnan())


def test_a_projector_that_shares_memory_stays_as_it_is(backend, device):
    feature = torch.randn(3, device=device)
    for memory, sizes in ((torch.ones(3, device=device), (1, 0)), (torch.ones(9, device=device), (1, 1))):
        for strides in (sizes, sizes[::-1]):
            projector = memory.as_strided((3, 3), strides)
            with pytest.raises(ValueError, match=r"projector must hold its elements apart in memory, got"):
                ops.update_projector_(projector, feature, alpha=0.1, backend=backend)
            assert bool((memory == 1).all())
    # These are apart, though neither stride spans the other dimension.
    projector = torch.zeros(20, device=device).as_strided((3, 3), (3, 4))
    projector.copy_(torch.eye(3))
    ops.update_projector_(projector, feature, alpha=0.1, backend=backend)
    torch.testing.assert_close(projector, projector_after(feature[None], 0.1, torch.float32, backend))


def test_a_feature_out_of_the_projector(backend, device):
    for at in ((0,), (slice(None), 1)):
        projector = projector_after(torch.randn(4, 33, device=device), 0.1, torch.float32, backend)
        expected = projector.clone()
        ops.update_projector_(expected, projector[at].clone(), alpha=0.1, backend=backend)
        ops.update_projector_(projector, projector[at], alpha=0.1, backend=backend)
        # A product with a column may add in another order.
        torch.testing.assert_close(projector, expected, rtol=0, atol=1e-7)


def test_removed_direction_does_not_pass(backend, device):
    feature = torch.randn(16, dtype=torch.float64, device=device)
    projector = projector_after(feature[None], 1e-9, backend=backend)
    grad = torch.outer(torch.randn(5, dtype=torch.float64, device=device), feature)
    projected = ops.project_gradient(grad, projector, backend=backend)
    assert float(projected.abs().max()) < 1e-8
    orthogonal = torch.randn(16, dtype=torch.float64, device=device)
    orthogonal -= feature * (feature @ orthogonal) / (feature @ feature)
    passed = ops.project_gradient(orthogonal[None], projector, backend=backend)
    torch.testing.assert_close(passed[0], orthogonal)


@pytest.mark.parametrize("projector_dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(1, 1), (6, 64), (7, 33), (40, 70), (9, 130), (0, 5)], ids=str)
def test_project_close_to_truth(shape, dtype, projector_dtype, backend, device):
    grad = torch.randn(shape, device=device).to(dtype)
    projector = projector_after(torch.randn(3, shape[1], device=device), 0.1, projector_dtype)
    actual = ops.project_gradient(grad, projector, backend=backend)
    assert actual.dtype == dtype
    assert_close_to_truth(actual, grad.double() @ projector.double(), grad @ projector.to(dtype))


@pytest.mark.parametrize("projector_dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(1, 1), (6, 64), (7, 33), (3, 100), (40, 70), (9, 130), (6, 192), (0, 5)], ids=str
)
def test_a_step_is_an_update_and_a_product(shape, dtype, projector_dtype, backend, device):
    grad = torch.randn(shape, device=device).to(dtype)
    features = torch.randn(4, shape[1], device=device)
    projector = projector_after(features[:3], 0.1, projector_dtype)
    check_step(projector, features[3].to(dtype), grad, 0.1, backend)
    # The interpreter takes seconds for each.
    if dtype == torch.float32 or backend != "triton":
        # Rows and columns of another distance.
        wider = torch.cat([projector, projector], 1)[:, : shape[1]]
        turned = torch.stack([grad, grad], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 0]
        check_step(wider, features[3], turned, 0.1, backend)
        check_step(wider.T, features[3], grad, 0.1, backend)


@pytest.mark.parametrize("size", [6, 150])
def test_a_step_of_parts_of_the_projector(backend, device, size):
    """What is given out of the projector counts as it was before the call."""
    start = projector_after(torch.randn(2, size, device=device), 0.1, torch.float32)
    expected = start.clone()
    truth = ops.update_and_project_(expected, start[0].clone(), start[:3].clone(), alpha=0.1, backend=backend)
    actual = ops.update_and_project_(start, start[0], start[:3], alpha=0.1, backend=backend)
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual, truth, rtol=0, atol=1e-6)


def test_gradients_of_a_step(backend, device):
    start = projector_after(torch.randn(2, 5, dtype=torch.float64, device=device), 0.1)
    feature = torch.randn(5, dtype=torch.float64, device=device)
    grad = torch.randn(3, 5, dtype=torch.float64, requires_grad=True, device=device)

    def step(grad):
        return ops.update_and_project_(start.clone(), feature, grad, alpha=0.1, backend=backend)

    assert torch.autograd.gradcheck(step, grad)
    assert torch.autograd.gradgradcheck(step, grad)
    torch.testing.assert_close(step(grad), step(grad.detach()))
    # A backward that saved the projector notices its next update.
    projector = start.clone()
    version = projector._version
    loss = ops.update_and_project_(projector, feature, grad, alpha=0.1, backend=backend).sum()
    assert projector._version > version
    ops.update_and_project_(projector, feature, grad.detach(), alpha=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients(backend, device):
    grad = torch.randn(3, 5, dtype=torch.float64, requires_grad=True, device=device)
    # A projector that is not symmetric shows that backward takes its transpose.
    projector = torch.randn(5, 5, dtype=torch.float64, device=device)

    def project(grad):
        return ops.project_gradient(grad, projector, backend=backend)

    assert torch.autograd.gradcheck(project, grad)
    assert torch.autograd.gradgradcheck(project, grad)


def test_layouts(backend, device):
    feature, grad = torch.randn(7, device=device), torch.randn(4, 7, device=device)
    projector = projector_after(torch.randn(2, 7, device=device), 0.1, torch.float32)
    padded = torch.zeros(7, 9, device=device)
    padded[:, 1:8] = projector
    ops.update_projector_(projector, feature, alpha=0.1, backend=backend)
    view = padded[:, 1:8]
    ops.update_projector_(view, torch.stack([feature, feature], 1)[:, 0], alpha=0.1, backend=backend)
    torch.testing.assert_close(view, projector)
    assert bool((padded[:, [0, 8]] == 0).all())
    projected = ops.project_gradient(grad.T.contiguous().T, view, backend=backend)
    torch.testing.assert_close(projected, grad @ projector)


def test_autocast_does_not_lower_precision(backend, device):
    feature, grad = torch.randn(33, device=device), torch.randn(4, 33, device=device)
    expected = projector_after(feature[None], 0.1, torch.float32, backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = projector_after(feature[None], 0.1, torch.float32, backend)
        projected = ops.project_gradient(grad, actual, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(projected, grad @ expected)


def test_compiles(backend, device):
    feature = torch.randn(6, device=device)

    def step(grad):
        projector = torch.eye(6, device=device)
        ops.update_projector_(projector, feature, alpha=0.1, backend=backend)
        return ops.project_gradient(2 * grad, projector, backend=backend).square().sum()

    grad = torch.randn(3, 6, requires_grad=True, device=device)
    expected, actual = step(grad), torch.compile(step, fullgraph=True, backend="aot_eager")(grad)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, grad), torch.autograd.grad(expected, grad))


def test_bad_input():
    projector, feature = torch.eye(4), torch.randn(4)
    with pytest.raises(TypeError, match="projector must have dtype float32 or float64, got bfloat16"):
        ops.update_projector_(projector.bfloat16(), feature, alpha=0.1)
    with pytest.raises(ValueError, match=r"projector must have shape \[D, D\], got \[3, 4\]"):
        ops.update_projector_(projector[:3], feature, alpha=0.1)
    with pytest.raises(ValueError, match=r"mean_feature must have shape \[D\] = \[4\], got \[3\]"):
        ops.update_projector_(projector, feature[:3], alpha=0.1)
    with pytest.raises(ValueError, match="alpha must be positive and finite, got -1"):
        ops.update_projector_(projector, feature, alpha=-1)
    for alpha in (1e-39, 1e39):
        with pytest.raises(ValueError, match=r"alpha must lie between 2.938737e-39 and 3.4028235e\+38"):
            ops.update_projector_(projector, feature, alpha=alpha)
    with pytest.raises(TypeError, match="alpha must be a number, got 'abc'"):
        ops.update_projector_(projector, feature, alpha="abc")
    with pytest.raises(ValueError, match=r"grad must have shape \[C, D\] = \[C, 4\], got \[2, 3\]"):
        ops.project_gradient(torch.randn(2, 3), projector)
    with pytest.raises(TypeError, match="projector must have dtype float32 or float64, got bfloat16"):
        ops.update_and_project_(projector.bfloat16(), feature, projector, alpha=0.1)
    with pytest.raises(ValueError, match=r"grad must have shape \[C, D\] = \[C, 4\], got \[2, 3\]"):
        ops.update_and_project_(projector, feature, torch.randn(2, 3), alpha=0.1)
    with pytest.raises(ValueError, match=r"mean_feature must have shape \[D\] = \[4\], got \[3\]"):
        ops.update_and_project_(projector, feature[:3], projector.clone(), alpha=0.1)
    with pytest.raises(TypeError, match=r"grad must be a torch\.Tensor, got list"):
        ops.update_and_project_(projector, feature, [1.0], alpha=0.1)
    with pytest.raises(ValueError, match="alpha must be positive and finite, got 0"):
        ops.update_and_project_(projector, feature, projector.clone(), alpha=0)
    with pytest.raises(ValueError, match="backend must be"):
        ops.update_and_project_(projector, feature, projector.clone(), alpha=0.1, backend="gpu")
    assert torch.equal(projector, torch.eye(4))


@pytest.mark.parametrize(("size", "scale"), [(15, 1e3), (64, 100.0), (256, 30.0)])
def test_thousands_of_updates_leave_a_projector(backend, device, size, scale):
    draw = torch.Generator().manual_seed(0)
    projector = torch.eye(size, device=device)
    # Triton's interpreter takes 20 to 200 ms for an update.
    for step in range(6 if is_interpreted(backend) else 1000):
        h = scale * torch.randn(size, generator=draw).to(device).relu()
        ops.update_projector_(projector, h, alpha=0.1 ** (1 + step % 50 / 50), backend=backend)
    eigenvalues = torch.linalg.eigvalsh(projector.double())
    assert eigenvalues.min() > -1e-5
    assert eigenvalues.max() < 1 + 1e-5
