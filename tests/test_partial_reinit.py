"""partial_reinit_: every backend against float64, exactness at both ends, torch.library and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast import ops
from mmfast.ops import _partial_reinit_table as tables
from support.cases import DTYPES, dtype_name, is_interpreted
from support.partial_reinit import LAYOUTS, SIZES, apart, bits, check, make

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_all(backend: str) -> None:
    """Every dtype, layout, size and number of threads, for a process started for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for layout in LAYOUTS:
            sizes = [*SIZES, 100_003]
            params = [make(size, dtype, layout=layout) for dtype in DTYPES for size in sizes]
            inits = [make(size, dtype, layout=layout, seed=1) for dtype in DTYPES for size in sizes]
            check(backend, params, inits, [index % 5 / 4 for index in range(len(params))])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.999, 1.0], ids="alpha={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dtypes(backend, device, dtype, alpha):
    params = [make(size, dtype, device) for size in SIZES]
    check(backend, params, [make(size, dtype, device, seed=1) for size in SIZES], alpha)


@pytest.mark.parametrize("size", SIZES, ids="size={}".format)
def test_sizes(backend, device, size):
    check(backend, [make(size, device=device)], [make(size, device=device, seed=1)], 0.3)


@pytest.mark.parametrize("init_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend, device, layout, init_layout):
    params = [make(21, device=device, layout=layout)]
    init = make(21, device=device, layout=init_layout, seed=1)
    init = init if init.shape == params[0].shape else make(21, device=device, layout=layout, seed=1)
    check(backend, params, [init], 0.3)


def test_one_strength_per_tensor_and_mixed_dtypes(backend, device):
    dtypes = [dtype for dtype in DTYPES if _backend.supports(backend, "partial_reinit", dtype)]
    params = [make(50, dtype, device) for dtype in dtypes]
    check(
        backend,
        params,
        [make(50, dtype, device, seed=1) for dtype in dtypes],
        [0.0, 0.1, 0.5, 1.0][-len(dtypes) :],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_zero_changes_no_bit(backend, device, dtype):
    theta = torch.tensor([float("nan"), -0.0, float("inf"), 1.5] * 20, dtype=dtype, device=device)
    before = theta.clone()
    ops.partial_reinit_([theta], [torch.zeros_like(theta)], 0.0, backend=backend)
    assert torch.equal(bits(theta), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_one_restores_every_bit(backend, device, dtype):
    theta_0 = torch.tensor([float("nan"), -0.0, float("inf"), 1.5] * 20, dtype=dtype, device=device)
    theta = torch.full_like(theta_0, float("nan"))
    ops.partial_reinit_([theta], [theta_0], 1.0, backend=backend)
    assert torch.equal(bits(theta), bits(theta_0))


def test_nan_stays_nan_in_between(backend, device):
    theta = torch.tensor([float("nan"), 1.0, 2.0], device=device)
    ops.partial_reinit_(
        [theta], [torch.tensor([0.0, float("nan"), 4.0], device=device)], 0.5, backend=backend
    )
    assert theta.isnan().tolist() == [True, True, False]
    assert theta[2] == 3


def test_by_hand(backend, device):
    theta = torch.tensor([1.0, 2.0, -4.0], device=device)
    ops.partial_reinit_([theta], [torch.tensor([5.0, 2.0, 0.0], device=device)], 0.25, backend=backend)
    assert theta.tolist() == [2.0, 2.0, -3.0]


def test_many_small_tensors(backend, device):
    params = [make(64, device=device, seed=index) for index in range(500)]
    check(backend, params, [make(64, device=device, seed=1000 + index) for index in range(500)], 0.7)


# A block of the Triton kernel is 2048 float32 numbers, in one piece only where it is aligned and full.
@pytest.mark.parametrize("size", [2047, 2048, 2049, 6145], ids="size={}".format)
@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
def test_sizes_around_a_block(backend, device, layout, size):
    sizes = (size, 3, size)
    params = [make(n, device=device, layout=layout) for n in sizes]
    check(backend, params, [make(n, device=device, seed=1) for n in sizes], [0.1, 0.5, 0.9])


def test_lists_that_come_again(backend, device):
    """Plans kept for a list hold its tensors and strengths, more lists than are kept among them."""
    lists = [[make(n, device=device, seed=n), make(64, device=device, seed=n)] for n in range(1, 25)]
    inits = [make(n, device=device, seed=100) for n in (24, 64)]
    for alpha in (0.1, 0.1, 0.7):
        for params in lists:
            check(backend, params, [inits[0][: len(params[0])], inits[1]], alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_a_plan_made_while_a_graph_is_captured(backend, device, dtype, monkeypatch):
    """It is written by kernels, from what they have as arguments, and kept while Python runs."""
    plans: list[Tensor] = []
    monkeypatch.setattr(tables, "_is_capturing", lambda _: True)
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(tables, "_CAPTURED", plans)
    if is_interpreted(backend):
        # Every block goes through the arguments of all tensors, an operation at a time.
        monkeypatch.setattr(_backend.kernels("partial_reinit"), "_TENSORS", 24)
    # More than go along with one launch, one of many records among them.
    params = [make(1 + 20 * index, dtype, device, seed=index) for index in range(130)]
    params[101] = make(1_100_003 if dtype == torch.float32 else 9000, dtype, device)
    inits = [make(len(theta), dtype, device, seed=1000) for theta in params]
    alphas = [index % 5 / 4 for index in range(130)]
    check(backend, params, inits, alphas)
    if backend not in ("triton", "cuda"):
        assert plans == []
        return
    (written,) = plans
    monkeypatch.setattr(tables, "_is_capturing", lambda _: False)
    ops.partial_reinit_(params, inits, alphas, backend=backend)
    (table,) = tables._TABLES.values()
    (copied,) = table.plans.values()
    # Of the last word Triton, whose launches know the dtype, writes the size alone.
    columns = slice(0, 4 if backend == "cuda" else 3)
    assert torch.equal(written[:, columns], copied[:, columns])
    assert torch.equal(written[:, 3] & 0xFFFFFFFF, copied[:, 3] & 0xFFFFFFFF)


def test_a_captured_list_takes_the_plan_of_another_stream(backend, device, monkeypatch):
    """Nothing is written in a graph where an equal list was copied before, and only then."""
    if backend not in ("triton", "cuda"):
        pytest.skip("has no plans")
    plans: list[Tensor] = []
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(tables, "_CAPTURED", plans)
    params, inits = [make(50, device=device)], [make(50, device=device, seed=1)]
    ops.partial_reinit_(params, inits, 0.5, backend=backend)
    (table,) = tables._TABLES.values()
    ((key, plan),) = table.plans.items()
    table.plans = {(*key[:-1], key[-1] + 1): plan}
    monkeypatch.setattr(tables, "_is_capturing", lambda _: True)
    # One strength for all comes with the launch; strengths of their own lie in the records.
    check(backend, params, inits, 0.5)
    check(backend, params, inits, 0.25)
    check(backend, params, inits, [0.25])
    assert plans[0] is plan
    assert plans[1] is plan
    assert plans[2] is not plan
    assert len(table.plans) == 1


def test_a_list_that_stays_as_it_is(backend, device):
    """With alpha = 0 everywhere, or no elements, there is nothing to launch."""
    check(backend, [make(n, device=device) for n in (0, 7)], [make(n, device=device) for n in (0, 7)], 0.0)
    check(backend, [make(0, device=device)], [make(0, device=device)], 0.5)


def test_channels_last(backend, device):
    theta = make(4 * 3 * 5 * 2, device=device).view(4, 3, 5, 2).to(memory_format=torch.channels_last)
    theta_0 = make(4 * 3 * 5 * 2, device=device, seed=1).view(4, 3, 5, 2)
    check(backend, [theta], [theta_0], 0.3)
    check(backend, [theta], [theta_0.to(memory_format=torch.channels_last)], 0.3)
    assert theta.is_contiguous(memory_format=torch.channels_last)


SHARED = {
    "transposed": (lambda w, x, y, z: ([w, w.T], [x, x.T.clone()]), "params[1] and params[0]"),
    "the same": (lambda w, x, y, z: ([w, w.view(-1)], [x, x.view(-1)]), "params[1] and params[0]"),
    "rows": (lambda w, x, y, z: ([x, w[:2], w[1:]], [y, y[:2], y[1:]]), "params[2] and params[1]"),
    "a column": (lambda w, x, y, z: ([w[:, 1], x, w[2]], [y[:, 0], z, y[0]]), "params[2] and params[0]"),
    "another's initial value": (lambda w, x, y, z: ([w, x], [y, w]), "params[0] and init_params[1]"),
    "a part of it": (lambda w, x, y, z: ([w[0], x[0, :2]], [y[0], w[0, 2:]]), "params[0] and init_params[1]"),
    "its own, moved": (lambda w, x, y, z: ([w[:2]], [w[1:]]), "params[0] and init_params[0]"),
    "its own, turned": (lambda w, x, y, z: ([w[:, :3]], [w[:, :3].T]), "params[0] and init_params[0]"),
    "other dtype": (
        lambda w, x, y, z: ([x, w, w.view(torch.float16)[:, :2]], [y, z, z.view(torch.float16)[:, :2]]),
        "params[2] and params[1]",
    ),
    "expanded": (
        lambda w, x, y, z: ([w, x[:1].expand(3, 4)], [y, z]),
        "params[1] must hold its elements apart in memory, got shape [3, 4] with strides [0, 1]",
    ),
    "windows": (
        lambda w, x, y, z: ([w, x.view(-1).unfold(0, 4, 2)], [y, torch.zeros(5, 4, device=w.device)]),
        "params[1] must hold its elements apart in memory, got shape [5, 4] with strides [2, 1]",
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_nothing_is_changed_where_memory_is_shared(backend, device, case):
    tensors = apart(device)
    make_lists, text = SHARED[case]
    params, inits = make_lists(*tensors)
    message = text if "must" in text else f"{text} must not share memory: params are changed in place"
    # Twice, as a plan is kept after the first time.
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.partial_reinit_(params, inits, 0.5, backend=backend)
        assert all(map(torch.equal, tensors, apart(device)))


def test_neighbours_in_memory_are_no_overlap(backend, device):
    """Columns in turn, halves, sizes of 0, initial values shared or the parameter itself."""
    w, x, y, z = apart(device)
    params = [w[:, ::2], w[:, 1::2], x[:1], x[1:], x[1:1], y, x[:0]]
    inits = [z[:, ::2], z[:, 1::2], z[:1], z[1:], z[1:1], y, x[:0]]
    check(backend, params, inits, 0.25)
    assert torch.equal(y, apart(device)[2])


def test_a_parameter_of_strides_that_cross(backend, device):
    theta = torch.zeros(20, device=device).as_strided((3, 3), (3, 4))
    check(backend, [theta], [make(9, device=device).view(3, 3)], 0.5)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda a: torch.tensor(a).double()])
def test_one_strength_per_tensor_of_any_kind(backend, device, kind):
    strengths = [0.0, 0.25, 0.5, 1.0]
    params, expected, inits = apart(device), apart(device), [torch.zeros(3, 4, device=device)] * 4
    ops.partial_reinit_(params, inits, kind(strengths), backend=backend)
    ops.partial_reinit_(expected, inits, strengths, backend=backend)
    assert all(map(torch.equal, params, expected))


ONE_STRENGTH = [1, np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.int64(1)]


@pytest.mark.parametrize("alpha", ONE_STRENGTH, ids=repr)
def test_one_strength_of_any_kind(alpha):
    params = apart("cpu")
    ops.partial_reinit_(params, [torch.zeros(3, 4)] * 4, alpha)
    assert torch.equal(params[0], apart("cpu")[0] * (1 - float(alpha)))


def test_no_tensors(backend):
    ops.partial_reinit_([], [], 0.5, backend=backend)


def test_parameters_of_a_module(backend, device):
    layer = torch.nn.Linear(5, 3, device=device)
    init = [theta.detach().clone() for theta in layer.parameters()]
    version = layer.weight._version
    with torch.no_grad():
        layer.weight.add_(1.0)
    ops.partial_reinit_(list(layer.parameters()), init, 1.0, backend=backend)
    assert all(torch.equal(theta, theta_0) for theta, theta_0 in zip(layer.parameters(), init, strict=True))
    assert layer.weight.requires_grad
    # Autograd must notice a weight changed between forward and backward.
    assert layer.weight._version >= version + 2


def test_compiles_to_one_graph(backend, device):
    init = [make(7, device=device, seed=1)]
    expected, got = [make(7, device=device)], [make(7, device=device)]
    ops.partial_reinit_(expected, init, 0.3, backend=backend)
    torch.compile(lambda params: ops.partial_reinit_(params, init, 0.3, backend=backend), fullgraph=True)(got)
    torch.testing.assert_close(got[0], expected[0])


@pytest.mark.parametrize(
    ("params", "init_params", "alpha", "error", "text"),
    [
        ([torch.zeros(2)], [], 0.5, ValueError, "init_params must hold one tensor per parameter = 1, got 0"),
        (
            [torch.zeros(2)],
            [torch.zeros(3)],
            0.5,
            ValueError,
            r"init_params\[0\] must have shape \[2\], got \[3\]",
        ),
        ([torch.zeros(2)], [torch.zeros(2).double()], 0.5, TypeError, r"init_params\[0\] must have dtype"),
        ([torch.zeros(2).int()], [torch.zeros(2).int()], 0.5, TypeError, r"params\[0\] must have dtype"),
        ([None], [torch.zeros(2)], 0.5, TypeError, r"params\[0\] must be a torch.Tensor, got NoneType"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), ValueError, "alpha must lie in"),
        ([torch.zeros(2)], [torch.zeros(2)], [0.5, 0.5], ValueError, "one per parameter = 1, got 2"),
        ([torch.zeros(2)], [torch.zeros(2)], torch.zeros(2), ValueError, "one per parameter = 1, got 2"),
        (
            [torch.zeros(2)],
            [torch.zeros(2)],
            np.zeros((1, 1)),
            TypeError,
            r"a number or one per parameter, got shape \[1, 1\]",
        ),
        ([torch.zeros(2)], [torch.zeros(2)], None, TypeError, "a number or one per parameter, got None"),
        ([torch.zeros(2)], [torch.zeros(2)], "0.5", TypeError, "a number or one per parameter, got '0.5'"),
        ([torch.zeros(2)], [torch.zeros(2)], 1j, TypeError, "a number or one per parameter, got 1j"),
        ([torch.zeros(2)], [torch.zeros(2)], ["a"], TypeError, r"alpha\[0\] must be a number, got 'a'"),
    ],
    ids=[
        "too-few",
        "shape",
        "dtype",
        "integers",
        "no-tensor",
        "alpha-above-1",
        "alpha-nan",
        "too-many-alphas",
        "too-long-a-tensor",
        "matrix",
        "none",
        "text",
        "complex",
        "text-in-a-list",
    ],
)
def test_errors_name_the_argument(params, init_params, alpha, error, text):
    with pytest.raises(error, match=text):
        ops.partial_reinit_(params, init_params, alpha)
