"""ReinitPlan: what it does, notices, and is copied with; how lists of tensors are told apart."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast import ops
from mmfast.ops import _partial_reinit_table as tables
from support.cases import DTYPES
from support.partial_reinit import LAYOUTS, SIZES, apart, bits, check, make

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_plan(plan, backend, params, inits, alpha):
    """A plan does what the function does to copies, bit for bit."""
    expected = [theta.detach().clone() for theta in params]
    ops.partial_reinit_(expected, [theta_0.clone() for theta_0 in inits], alpha, backend=backend)
    plan.apply_(alpha)
    assert all(map(torch.equal, map(bits, params), map(bits, expected)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_does_what_the_function_does(backend, device, layout):
    dtypes = [dtype for dtype in DTYPES if _backend.supports(backend, "partial_reinit", dtype)]
    params = [make(size, dtype, device, layout) for dtype in dtypes for size in SIZES]
    inits = [make(size, dtype, device, layout, seed=1) for dtype in dtypes for size in SIZES]
    plan = ops.ReinitPlan(params, inits, backend=backend)
    strengths = [index % 5 / 4 for index in range(len(params))]
    for alpha in (0.25, 0.0, strengths, strengths[::-1], torch.tensor(strengths), 0.5, 1.0):
        check_plan(plan, backend, params, inits, alpha)


def test_transposed_weights_are_no_copies(backend, device):
    params = [make(12, device=device).view(3, 4).t(), make(24, device=device).view(2, 3, 4).permute(2, 0, 1)]
    inits = [make(12, device=device, seed=1).view(3, 4).t()]
    inits.append(make(24, device=device, seed=1).view(2, 3, 4).permute(2, 0, 1))
    for _ in range(2):
        check(backend, params, inits, 0.25)
    assert tables.words_of(params, inits) in tables._TABLES
    # Elements that share a place are refused as before, and other orders are copied.
    check(backend, params, [inits[0].contiguous(), inits[1].contiguous()], 0.25)


MOVES = {
    "data": lambda theta: setattr(theta, "data", theta.detach() + 1),
    "data of other strides": lambda theta: setattr(theta, "data", theta.detach().t()),
    "storage": lambda theta: theta.set_(theta.detach().clone().untyped_storage(), 0, (3, 3), (1, 3)),
    "values": lambda theta: theta.add_(1.0),
}


@pytest.mark.parametrize("which", ["a parameter", "an initial value"])
@pytest.mark.parametrize("move", MOVES)
def test_a_plan_notices_what_has_moved(backend, device, move, which):
    params = [torch.nn.Parameter(make(9, device=device, seed=index).view(3, 3)) for index in range(3)]
    inits = [make(9, device=device, seed=5 + index).view(3, 3) for index in range(3)]
    plan = ops.ReinitPlan(params, inits, backend=backend)
    check_plan(plan, backend, params, inits, 0.25)
    with torch.no_grad():
        MOVES[move]((params if which == "a parameter" else inits)[1])
    for _ in range(2):
        check_plan(plan, backend, params, inits, 0.25)


def test_a_plan_whose_lists_fit_no_more_raises(backend, device):
    params, inits = apart(device, 2), apart(device, 2)
    plan = ops.ReinitPlan(params, inits, backend=backend)
    params[1].resize_(2, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape("init_params[1] must have shape [2, 4], got [3, 4]")):
            plan.apply_(0.5)
    params[1].set_(inits[0])
    with pytest.raises(ValueError, match=re.escape("params[1] and init_params[0] must not share memory")):
        plan.apply_(0.5)
    params[1].data = params[1].double()
    with pytest.raises(TypeError, match=re.escape("init_params[1] must have dtype torch.float64")):
        plan.apply_(0.5)
    params[1].data = torch.ones(3, 4, device=device)
    plan.apply_(1.0)
    assert torch.equal(params[1], inits[1])
    params.append(params[0])
    plan.apply_(1.0)


def test_a_plan_follows_its_modules_to_another_dtype(backend, device):
    layer, start = torch.nn.Linear(5, 3, device=device), torch.nn.Linear(5, 3, device=device)
    plan = ops.ReinitPlan(list(layer.parameters()), list(start.parameters()), backend=backend)
    version = layer.weight._version
    plan.apply_(0.5)
    assert layer.weight._version > version
    assert layer.weight.requires_grad
    layer.half(), start.half()
    check_plan(plan, backend, list(layer.parameters()), list(start.parameters()), 0.5)


@pytest.mark.parametrize("reader", [True, False])
def test_words_tell_lists_apart(reader, monkeypatch):
    """Read in C++, and as Python asks where that is not to be had."""
    if reader and tables._reader() is None:
        pytest.skip("no reader")
    if not reader:
        monkeypatch.setattr(tables, "_reader", lambda: None)
    x, y = torch.zeros(4, 4), torch.zeros(4, 4)
    lists = [([x], [y]), ([y], [x]), ([x, y], []), ([x.t()], [y]), ([x[:2]], [y]), ([x.view(16)], [y])]
    lists += [([x.view(torch.int32)], [y]), ([x[:1]], [y]), ([x[:1, :]], [y[:1]]), ([], []), ([x], [y, x])]
    words = [tables.words_of(*pair) for pair in lists]
    assert None not in words
    for index, pair in enumerate(lists):
        found = [tables.has_words(*pair, other) for other in words]
        # A row of one is the same elements whatever its first stride; the words need not be.
        assert found[index]
        assert sum(found) == 1
    parameter = torch.nn.Parameter(x)
    assert tables.words_of([parameter], [y]) == words[0]
    assert tables.words_of([torch.zeros(2).to_sparse()], []) is None
    assert tables.words_of([None], []) is None

    class Other(Tensor):
        pass

    assert tables.words_of([x.as_subclass(Other)], [y]) is None
    with torch.device("cpu"):
        assert tables.words_of([x], [y]) is None
    assert torch.func.vmap(lambda z: z * (tables.words_of([z], [y]) is None))(x).shape == (4, 4)


def test_plans_are_pickled_and_copied_with_their_tensors(device):
    params, inits = apart(device, 2), apart(device, 2)[::-1]
    plan = ops.ReinitPlan(params, inits)
    again, other = pickle.loads(pickle.dumps((plan, params)))
    again.apply_(1.0)
    assert all(map(torch.equal, other, inits))
    assert all(map(torch.equal, params, apart(device, 2)))
    copied, other = copy.deepcopy((plan, params))
    copied.apply_(1.0)
    assert all(map(torch.equal, other, inits))
    assert all(map(torch.equal, params, apart(device, 2)))
    copy.copy(plan).apply_(1.0)
    assert all(map(torch.equal, params, inits))


def test_a_plan_of_what_inference_mode_made(backend, device):
    with torch.inference_mode():
        params = [make(7, device=device)]
    params.append(make(7, device=device))
    inits = [make(7, device=device, seed=1), make(7, device=device, seed=2)]
    plan, version = ops.ReinitPlan(params, inits, backend=backend), params[1]._version
    with torch.inference_mode():
        check_plan(plan, backend, params, inits, 0.25)
    assert params[1]._version > version


def test_a_plan_compiles_to_one_graph(backend, device):
    params, inits = [make(7, device=device)], [make(7, device=device, seed=1)]
    expected = [params[0].clone()]
    ops.partial_reinit_(expected, inits, 0.3, backend=backend)
    plan = ops.ReinitPlan(params, inits, backend=backend)
    torch.compile(lambda: plan.apply_(0.3), fullgraph=True)()
    torch.testing.assert_close(params[0], expected[0])


def test_a_plan_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params, inits = [torch.ones(3)], [torch.zeros(3)]
        ops.partial_reinit_(params, inits, 0.5)
        ops.ReinitPlan(params, inits).apply_(0.5)


def test_bad_input_of_a_plan():
    x, y = torch.zeros(2), torch.zeros(2)
    with pytest.raises(ValueError, match="init_params must hold one tensor per parameter = 1, got 0"):
        ops.ReinitPlan([x], [])
    with pytest.raises(ValueError, match="params must hold every tensor once, got one twice"):
        ops.ReinitPlan([x, x], [y, y])
    with pytest.raises(ValueError, match=r"params\[0\] and init_params\[1\] must not share memory"):
        ops.ReinitPlan([x, y.clone()], [y, x])
    with pytest.raises(ValueError, match="backend must be"):
        ops.ReinitPlan([x], [y], backend="gpu")
    plan = ops.ReinitPlan([x], [y])
    for alpha, text in ((2, "alpha must lie"), ([0.5, 0.5], "one per parameter = 1, got 2")):
        with pytest.raises(ValueError, match=text):
            plan.apply_(alpha)
    ops.ReinitPlan([], []).apply_(0.5)
    empty = torch.zeros(0)
    for _ in range(2):
        ops.partial_reinit_([torch.zeros(0), empty], [empty, empty], 0.5)
        with pytest.raises(ValueError, match="got one twice"):
            ops.partial_reinit_([empty, empty], [empty, empty], 0.5)
