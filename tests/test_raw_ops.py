"""Every raw op under torch.ops.mmfast, in every backend, for inputs laid out in memory in every way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mmfast import backend as _backend
from mmfast.reference.duc_loss import split_dims
from support import every_op
from support.cases import dtype_name
from support.every_op import CALLS, same
from support.numerics import CONSTANTS, error_against
from support.stems import EMULATED, FILES

CASES = [pytest.param(stem, make, id=make.__name__) for stem, makes in CALLS.items() for make in makes]
BACKENDS = pytest.mark.parametrize("backend", [*FILES, EMULATED], indirect=True)
# Those that take milliseconds for a call.
FAST = ("reference", "cpu")


class RawCalls(TorchDispatchMode):
    """Keeps one call of each raw op while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[torch._ops.OpOverload, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmfast":
            detached = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs or {}))
            self.calls.setdefault(function, detached)
        return function(*args, **(kwargs or {}))


def _raw_calls(stem: str, make: every_op.Make, backend: str, device: torch.device, dtype: torch.dtype):
    """Return one call of each raw op behind a public op."""
    if not _backend.implements(backend, stem):
        pytest.skip(f"{stem} has no {backend} kernel")
    if not _backend.supports(backend, stem, dtype):
        pytest.skip(f"its kernel does not take {dtype} here")
    _, call = make(device, dtype, backend)
    with RawCalls() as raw:
        call()
    assert raw.calls
    return raw.calls.items()


def _sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    for letter, size in ({"N": 20, "D": 6, "C": 4} | sizes).items():
        monkeypatch.setattr(every_op, letter, size)


# The size of a letter that is not as usual. A fifth of N is what the pairwise losses take.
SMALL = [("N", 0), ("N", 1), ("N", 5), ("D", 0), ("D", 1), ("C", 1), ("M", 0), ("M", 1)]


def test_every_raw_op_is_called(monkeypatch):
    _sizes(monkeypatch)
    called, options = set(), ("reference", torch.device("cpu"), torch.float32)
    for case in CASES:
        called |= {op.name() for op, _ in _raw_calls(*case.values, *options)}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmfast::")}
    assert called == registered


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
@BACKENDS
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_as_torch_library_wants_them(stem, make, backend, device, dtype, monkeypatch):
    """Every call in float64, one of each op in half precision."""
    _sizes(monkeypatch)
    for op, (args, kwargs) in _raw_calls(stem, make, backend, device, dtype):
        assert not kwargs
        for call in _calls(op, args) if dtype == torch.float64 else [args]:
            torch.library.opcheck(op, call)


# Calls of raw ops that public ops do not make: arguments by name, made from those of support/every_op.py.
VARIANTS: dict[str, list[Callable[[dict], dict]]] = {
    "shapley_values_fwd": [lambda a: {"utilities": a["utilities"].unflatten(0, (4, 5))}],
    "shapley_values_bwd": [lambda a: {"dphi": a["dphi"].unflatten(0, (4, 5))}],
    "additive_shapley_fwd": [lambda a: {"bias": None}, lambda a: {"bias": a["bias"].double()}],
    "additive_shapley_bwd": [lambda a: {"bias": None}, lambda a: {"bias": a["bias"].double()}],
    "duc_loss_fwd": [
        # Twice as many keys as queries, whose own are the second half.
        lambda a: {
            "keys": [torch.cat([x, x]) for x in a["features"]],
            "offset": len(a["features"][0]),
            "reduction": "none",
        },
        lambda a: dict(zip(("columns", "sizes"), split_dims(a["effective"]), strict=True)),
        lambda a: {"with_residual": False},
    ],
    "info_nce_fwd": [lambda a: {"reduction": "none"}, lambda a: {"with_residual": False}],
    "logit_fusion_fwd": [lambda a: {"present": None}],
    "logit_fusion_bwd": [lambda a: {"present": None}],
}


def _calls(op: torch._ops.OpOverload, args: tuple) -> list[tuple]:
    """Return the arguments of a call, and of the same op's other calls."""
    named = dict(zip([argument.name for argument in op._schema.arguments], args, strict=True))
    if "max_iter" in named:
        # Lloyd's iterations take the interpreter a second each.
        named["max_iter"] = 2
    changes = [change(named) for change in VARIANTS.get(op._schema.name.split("::")[1], [])]
    return [tuple({**named, **change}.values()) for change in ({}, *changes)]


def _permuted(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Lay the dimensions out in memory in another order, if there are so many."""

    def permute(x: Tensor) -> Tensor:
        if x.dim() != len(order):
            return x
        back = [order.index(dim) for dim in range(len(order))]
        return x.permute(order).contiguous().permute(back)

    return permute


def _every_second(x: Tensor) -> Tensor:
    # What lies between is seen at once where it is read.
    between = torch.full([2 * size for size in x.shape], 97, dtype=torch.int64, device=x.device).to(x.dtype)
    if x.is_floating_point():
        between.fill_(torch.nan)
    return between[(slice(None, None, 2),) * x.dim()].copy_(x)


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    """Repeat a dimension's first entry with stride 0."""

    def expand(x: Tensor) -> Tensor:
        has_it = dim < x.dim() and x.numel() > 0
        return x.narrow(dim, 0, 1).clone().expand_as(x) if has_it else x

    return expand


LAYOUTS = {
    # Of matrices the only other order, of others the reverse one; then all others of three dimensions.
    "column-major": lambda x: _permuted(tuple(range(x.dim()))[::-1])(x),
    **{f"order {order}": _permuted(order) for order in [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)]},
    "every second": _every_second,
    "offset": _offset,
    **{f"expanded {dim}": _expanded(dim) for dim in range(3)},
    "one number": lambda x: x.flatten()[:1].clone().expand(x.shape) if x.numel() else x,
}
OVERLAPPING = [name for name in LAYOUTS if name.startswith(("expanded", "one"))]


def _written(op: torch._ops.OpOverload) -> list[int]:
    """Return the places of the arguments an op writes into."""
    infos = [argument.alias_info for argument in op._schema.arguments]
    return [index for index, info in enumerate(infos) if info is not None and info.is_write]


def _copied(x: Tensor) -> Tensor:
    """Return a copy with the same strides; of numbers that share memory none: nothing writes them."""
    if 0 in x.stride():
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _results(op: torch._ops.OpOverload, args: tuple) -> list[Tensor]:
    """Return what a call returns, and what it wrote into."""
    written = [args[index] for index in _written(op)]
    return [x for x in tree_flatten((op(*args), written))[0] if isinstance(x, Tensor)]


def _check(op: torch._ops.OpOverload, args: tuple, backend: str, promises: bool = True) -> None:
    """Assert that a call's results lie in memory as promised and are those of contiguous arguments."""
    with FakeTensorMode() as mode:
        fakes = [
            x for x in tree_flatten(op(*tree_map_only(Tensor, mode.from_tensor, args)))[0] if x is not None
        ]
    expected = _results(
        op, tree_map_only(Tensor, lambda x: x.clone(memory_format=torch.contiguous_format), args)
    )
    actual = _results(op, tree_map_only(Tensor, _copied, args))
    for fake, result in zip(fakes, actual, strict=False):
        assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)
    for x, y in zip(expected, actual, strict=True):
        assert x.shape == y.shape
        if x.is_floating_point() and (backend == "reference" or x.is_cuda):
            # A product of matrices adds in another order where they lie otherwise; so does what Triton
            # compiles for other strides.
            assert torch.equal(x.isnan(), y.isnan())
            assert error_against(x.nan_to_num(7.0), y.nan_to_num(7.0)) <= CONSTANTS[x.dtype]
        else:
            assert same([x], [y])
    if promises:
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, tree_map_only(Tensor, _copied, args), {}, test_utils=utilities)


def _strides(args: object) -> list[tuple]:
    return [(x.shape, x.stride(), x.storage_offset()) for x in tree_flatten(args)[0] if isinstance(x, Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@BACKENDS
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_layouts(stem, make, backend, device, layout, monkeypatch):
    """All tensors of a call in one layout, and one after the other."""
    _sizes(monkeypatch)
    for op, (first, kwargs) in _raw_calls(stem, make, backend, device, torch.float32):
        assert not kwargs
        fixed = _written(op) if layout in OVERLAPPING else []
        calls = _calls(op, first)
        for args in calls:
            laid_out = [tree_map_only(Tensor, LAYOUTS[layout], arg) for arg in args]
            changed = [
                i for i, arg in enumerate(laid_out) if i not in fixed and _strides(arg) != _strides(args[i])
            ]
            choices = [changed] if changed else []
            if len(changed) > 1 and (backend in FAST or layout == "column-major"):
                choices += [[index] for index in changed]
            for choice in choices:
                mixed = [laid_out[i] if i in choice else arg for i, arg in enumerate(args)]
                promises = choice is changed and (
                    backend in FAST or (args is calls[0] and layout in ("column-major", "offset"))
                )
                _check(op, tuple(mixed), backend, promises)


@pytest.mark.parametrize(("letter", "size"), SMALL, ids=lambda value: str(value))
@BACKENDS
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_small_sizes(stem, make, backend, device, letter, size, monkeypatch):
    """Sizes of 0 and 1, where strides say nothing; public ops refuse others (tests/test_small_sizes.py)."""
    _sizes(monkeypatch)
    usual = {op: _strides(args) for op, (args, _) in _raw_calls(stem, make, backend, device, torch.float32)}
    _sizes(monkeypatch, **{letter: size})
    try:
        calls = _raw_calls(stem, make, backend, device, torch.float32)
    except ValueError:
        pytest.skip("refused")
    for op, (args, _) in calls:
        if _strides(args) == usual[op]:
            continue
        for layout in ("offset", "column-major", "every second", "expanded 0"):
            free = [index for index in range(len(args)) if index not in _written(op)]
            laid_out = [
                tree_map_only(Tensor, LAYOUTS[layout], arg) if i in free else arg
                for i, arg in enumerate(args)
            ]
            _check(op, tuple(laid_out), backend, promises=layout == "offset")
