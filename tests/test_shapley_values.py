"""shapley_values: every backend against float64, its laws, its gradient, torch.library and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import shapley_values as reference
from support.cases import DTYPES, HALF, dtype_name, is_interpreted, laws
from support.numerics import assert_close_to_truth, assert_rounded_once

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYOUTS = ("contiguous", "transposed", "every-second", "leading-dims", "expanded", "unaligned")
LAWS = laws(30)


def make(num_rows: int, size: int, dtype=torch.float32, device="cpu", layout: str = "contiguous") -> Tensor:
    """Return [num_rows, size] numbers in [0, 1) ("leading-dims": [1, num_rows, size]) laid out as named."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + size)
    x = torch.rand(num_rows, size, generator=generator).to(device, dtype)
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every-second":
        return x.repeat_interleave(2, dim=-1)[:, ::2]
    if layout == "leading-dims":
        return x[None].transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(num_rows, -1)
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(num_rows, size)
    return x


def check_forward(backend: str, utilities: Tensor) -> None:
    truth = reference.shapley_values(utilities.double())
    plain = reference.shapley_values(utilities)
    assert_close_to_truth(ops.shapley_values(utilities, backend=backend), truth, plain)


def check_backward(backend: str, dphi: Tensor, num_players: int) -> None:
    utilities = dphi.new_zeros(*dphi.shape[:-1], 2**num_players).requires_grad_()
    ops.shapley_values(utilities, backend=backend).backward(dphi)
    assert utilities.grad is not None
    truth = reference.shapley_values_bwd(dphi.double())
    assert_close_to_truth(utilities.grad, truth, reference.shapley_values_bwd(dphi))


def check_all(backend: str) -> None:
    """Every dtype, layout and number of players, for a process that was started for one instruction set."""
    for dtype in DTYPES:
        for num_players in (1, 2, 3, 4, 5, 6, 8, 13):
            for num_rows in (1, 2) if num_players == 13 else (1, 37):
                for layout in LAYOUTS:
                    check_forward(backend, make(num_rows, 2**num_players, dtype, layout=layout))
                    check_backward(backend, make(num_rows, num_players, dtype, layout=layout), num_players)


def require_dtype(backend: str, dtype: torch.dtype) -> None:
    if not _backend.supports(backend, "shapley_values", dtype):
        pytest.skip(f"{backend} does not compute in {dtype} here")


@pytest.mark.parametrize("num_players", range(1, 13), ids="M={}".format)
def test_every_number_of_players(backend, device, num_players):
    check_forward(backend, make(5, 2**num_players, device=device))
    check_backward(backend, make(5, num_players, device=device), num_players)


@pytest.mark.parametrize("num_rows", [0, 1, 16, 37], ids="rows={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dtypes_and_sizes(backend, device, dtype, num_rows):
    require_dtype(backend, dtype)
    for num_players in (3, 6):
        check_forward(backend, make(num_rows, 2**num_players, dtype, device))
        check_backward(backend, make(num_rows, num_players, dtype, device), num_players)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_precision_is_rounded_once(backend, device, dtype):
    require_dtype(backend, dtype)
    utilities, dphi = make(9, 2**8, dtype, device), make(9, 8, dtype, device)
    values = ops.shapley_values(utilities, backend=backend)
    assert_rounded_once(values, reference.shapley_values(utilities.double().cpu()))
    dutilities = torch.ops.mmfast.shapley_values_bwd(dphi, backend)
    assert_rounded_once(dutilities, reference.shapley_values_bwd(dphi.double().cpu()))


@pytest.mark.parametrize("num_players", [2, 5, 8], ids="M={}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend, device, layout, num_players):
    check_forward(backend, make(19, 2**num_players, device=device, layout=layout))
    check_backward(backend, make(19, num_players, device=device, layout=layout), num_players)


def test_twenty_players(backend, device):
    if backend == "triton" and _backend.interpreting():
        pytest.skip("2^20 coalitions take minutes in Triton's interpreter")
    check_forward(backend, make(1, 2**20, device=device))
    check_backward(backend, make(1, 20, device=device), 20)


@pytest.mark.usefixtures("restored_threads", "cpu_module")
@pytest.mark.parametrize(("num_players", "num_rows"), [(2, 20_001), (4, 5_003), (8, 401), (14, 3)])
def test_number_of_threads_changes_no_bit(num_players, num_rows):
    utilities, dphi = make(num_rows, 2**num_players), make(num_rows, num_players)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        forward = torch.ops.mmfast.shapley_values_fwd(utilities, "cpu")
        results.append((forward, torch.ops.mmfast.shapley_values_bwd(dphi, "cpu")))
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0])
        assert torch.equal(backward, results[0][1])


def test_two_players_by_hand(backend, device):
    utilities = torch.tensor([[0.0, 1.0, 2.0, 5.0]], device=device)
    expected = torch.tensor([[2.0, 3.0]], device=device)
    assert torch.equal(ops.shapley_values(utilities, backend=backend), expected)


def test_glove_game(backend, device):
    # One left glove (player 0) and two right gloves: a pair is worth 1. Known values 2/3, 1/6, 1/6.
    worth = [float(bool(s & 1) and bool(s & 6)) for s in range(8)]
    values = ops.shapley_values(torch.tensor(worth, device=device), backend=backend)
    torch.testing.assert_close(values.cpu(), torch.tensor([2 / 3, 1 / 6, 1 / 6]))


@LAWS
@given(num_players=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_values_add_up_to_the_whole(backend, device, num_players, seed):
    torch.manual_seed(seed)
    utilities = torch.randn(3, 2**num_players, dtype=torch.float64).to(device)
    total = ops.shapley_values(utilities, backend=backend).sum(-1)
    torch.testing.assert_close(total, utilities[:, -1] - utilities[:, 0])


@LAWS
@given(data=st.data(), num_players=st.integers(2, 8))
def test_exchanged_players_exchange_values(backend, device, data, num_players):
    order = torch.tensor(data.draw(st.permutations(range(num_players))))
    torch.manual_seed(0)
    utilities = torch.randn(2**num_players, dtype=torch.float64)
    coalitions = torch.arange(2**num_players)
    # Player m of the new game is player order[m] of the old one.
    renamed = sum((coalitions >> m & 1) << order[m] for m in range(num_players))
    values = [
        ops.shapley_values(game.to(device), backend=backend) for game in (utilities[renamed], utilities)
    ]
    torch.testing.assert_close(values[0], values[1][order.to(device)])


@LAWS
@given(num_players=st.integers(1, 8), data=st.data())
def test_dummy_player_gets_nothing(backend, device, num_players, data):
    dummy = data.draw(st.integers(0, num_players - 1))
    torch.manual_seed(0)
    utilities = torch.randn(2**num_players, dtype=torch.float64)
    without = torch.arange(2**num_players) & ~(1 << dummy)
    value = ops.shapley_values(utilities[without].to(device), backend=backend)[dummy]
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-14, rtol=0)


@LAWS
@given(num_players=st.integers(1, 8), scale=st.floats(-10, 10))
def test_linear_in_the_game(backend, device, num_players, scale):
    torch.manual_seed(0)
    first, second = torch.randn(2, 2**num_players, dtype=torch.float64).to(device)
    games = (first, second, first + scale * second)
    values = [ops.shapley_values(game, backend=backend) for game in games]
    torch.testing.assert_close(values[2], values[0] + scale * values[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_players", [1, 3, 5], ids="M={}".format)
def test_gradcheck(backend, device, num_players):
    # A kernel is interpreted for every number that is changed, and again for each of its results.
    num_samples = 1 if num_players == 5 and backend == "triton" else 3
    utilities = make(num_samples, 2**num_players, torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: ops.shapley_values(u, backend=backend), utilities)
    assert torch.autograd.gradgradcheck(lambda u: ops.shapley_values(u, backend=backend), utilities)


def test_compiles_to_one_graph(backend, device):
    utilities = make(4, 8, device=device)
    expected, got = utilities.clone().requires_grad_(), utilities.clone().requires_grad_()
    ops.shapley_values(expected, backend=backend).square().sum().backward()
    compiled = torch.compile(lambda u: ops.shapley_values(u, backend=backend).square().sum(), fullgraph=True)
    compiled(got).backward()
    torch.testing.assert_close(got.grad, expected.grad)


def test_the_reference_neither_copies_to_the_device_nor_waits_for_it():
    called = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Spy():
        reference.shapley_values(torch.rand(3, 8))
        reference.shapley_values_bwd(torch.rand(3, 3))
    assert "sum" in called
    # torch.tensor of a list, item() and what has a shape that depends on values.
    assert not called & {"lift_fresh", "_local_scalar_dense", "nonzero"}


def test_autocast_keeps_the_dtype(backend, device):
    utilities = make(4, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.shapley_values(utilities, backend=backend).dtype == torch.float32


@pytest.mark.parametrize(
    ("utilities", "error", "text"),
    [
        ([0.0, 1.0], TypeError, "utilities must be a torch.Tensor, got list"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "utilities must have dtype float32.*got int64"),
        (torch.zeros(()), ValueError, r"utilities must have shape \[..., S\]"),
        (torch.zeros(3, 0), ValueError, r"got \[3, 0\]"),
        (torch.zeros(2, 6), ValueError, r"a power of two.* got 6 in \[2, 6\]"),
        (torch.zeros(2, 1), ValueError, "M from 1 to 20, got S = 1 "),
        (torch.zeros(1).expand(2**21), ValueError, "M from 1 to 20, got S = 2097152 "),
    ],
    ids=["list", "integers", "scalar", "no-coalition", "not-a-power-of-two", "one-coalition", "too-many"],
)
def test_errors_name_the_argument(utilities, error, text):
    with pytest.raises(error, match=text):
        ops.shapley_values(utilities)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be"):
        ops.shapley_values(torch.zeros(4), backend="fast")


@pytest.mark.parametrize("num_players", [1, 3, 5, 8, 13])
@pytest.mark.parametrize("offset", [20.0, 1e4])
def test_a_common_offset_costs_no_digits(backend, device, num_players, offset):
    utilities = (torch.rand(9, 2**num_players) - offset).to(device)
    truth = reference.shapley_values(utilities.double().cpu())
    values = ops.shapley_values(utilities, backend=backend)
    assert_close_to_truth(values, truth, reference.shapley_values(utilities))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_players", [1, 2, 5, 7, 13])
@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
def test_an_infinite_whole_is_shared_by_all(backend, device, num_players, infinity):
    utilities = torch.rand(3, 2**num_players, device=device)
    utilities[1, -1] = infinity
    values = ops.shapley_values(utilities, backend=backend)
    assert (values[1] == infinity).all()
    assert values[[0, 2]].isfinite().all()


def scatter_special(x: Tensor, seed: int) -> Tensor:
    """Put infinities and NaN into all rows but the first two; the row before the last is -inf throughout."""
    generator = torch.Generator().manual_seed(seed)
    inf = float("inf")
    for row in range(2, len(x)):
        numbers = [[inf], [-inf], [inf, -inf], [inf, inf], [-inf, -inf], [float("nan")]][row % 6]
        places = torch.randint(x.shape[1], (len(numbers),), generator=generator)
        x[row, places] = torch.tensor(numbers, dtype=x.dtype)
    x[-2] = -inf
    return x


# The interpreter computes with numpy, which warns.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_players", [1, 2, 3, 4, 5, 7, 9, 13])
def test_infinities_and_nan_as_in_the_formula(backend, device, num_players, dtype):
    require_dtype(backend, dtype)
    if is_interpreted(backend) and (
        num_players == 13 or (dtype != torch.float32 and num_players in (1, 2, 4, 7))
    ):
        pytest.skip("a minute in Triton's interpreter, or the same steps as with 3, 5 and 9 players")
    utilities = scatter_special(make(19, 2**num_players, dtype), num_players)
    # At the empty coalition, too, which kernels take for their origin.
    utilities[-1, 0] = -float("inf")
    dphi = scatter_special(make(19, num_players, dtype), num_players)
    runs = [
        (lambda x: ops.shapley_values(x, backend=backend), reference.shapley_values, utilities),
        (lambda x: torch.ops.mmfast.shapley_values_bwd(x, backend), reference.shapley_values_bwd, dphi),
    ]
    for run, truth, x in runs:
        # Whether rows lie side by side or not, and each row whatever its neighbours hold.
        for laid_out in (x, x.repeat_interleave(2, dim=-1)[:, ::2]):
            result = run(laid_out.to(device)).cpu()
            expected = truth(x.double())
            assert not expected[2:].isfinite().any()
            torch.testing.assert_close(result[2:].double(), expected[2:], equal_nan=True)
            assert torch.equal(result[:2], run(x[:2].to(device)).cpu())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_players", [1, 2, 3, 4, 5, 7, 9, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_sums_do_not_overflow_where_values_do_not(backend, device, num_players, dtype):
    require_dtype(backend, dtype)
    if is_interpreted(backend) and num_players == 13:
        pytest.skip("a minute in Triton's interpreter")
    most = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(num_players)
    signs = 0.9 - 1.8 * torch.randint(2, (6, 2**num_players), generator=generator)
    # A player that adds nearly all there is to any coalition, and one that adds nothing to large numbers.
    signs[0], signs[1] = 0.3 * (2.0 * (torch.arange(2**num_players) & 1) - 1), 0.9
    runs = [
        (
            lambda x: ops.shapley_values(x, backend=backend),
            reference.shapley_values,
            signs,
        ),
        (
            lambda x: torch.ops.mmfast.shapley_values_bwd(x, backend),
            reference.shapley_values_bwd,
            signs[:, :num_players],
        ),
    ]
    for run, truth, x in runs:
        found = run((most * x.double()).to(dtype).to(device)).cpu().double() / most
        expected = truth(x.double())
        expected[expected.abs() > 1] *= torch.inf
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_graph_serves_another_batch_size(backend, device):
    if backend == "triton":
        pytest.skip("the interpreter's kernels are not compiled")
    compiled = torch.compile(lambda u: ops.shapley_values(u, backend=backend).sum(), fullgraph=True)
    for size in (64, 17, 5):
        utilities = torch.rand(size, 8, device=device)
        torch.testing.assert_close(compiled(utilities), ops.shapley_values(utilities).sum())
