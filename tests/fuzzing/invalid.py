"""Calls that must raise: each op's valid call with one argument put wrong, and what the error must name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzing.draw import Draw
from fuzzing.tensors import bits
from mmfast import ops
from mmfast.backend import BackendUnavailableError

_N, _M, _C, _D, _S = 5, 3, 4, 6, 8


def _valid() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Return a valid call of every op, all arguments by name."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target = torch.arange(_N) % _C
    effective = torch.tensor([[True, False] * 3, [False, True] * 3, [True] * 6])
    present = torch.ones(_M, _N, dtype=torch.bool)
    square = torch.eye(_D)
    return {
        "shapley_values": (ops.shapley_values, {"utilities": floats(_N, _S)}),
        "coalition_utilities": (
            ops.coalition_utilities,
            {"logits": floats(_N, _S, _C), "labels": target, "utility": "margin"},
        ),
        "additive_shapley": (
            ops.additive_shapley,
            {
                "partial_logits": floats(_M, _N, _C),
                "labels": target,
                "bias": floats(_C),
                "utility": "probability",
            },
        ),
        "unidirectional_info_nce": (
            ops.unidirectional_info_nce,
            {"query": floats(_N, _D), "key": floats(_N, _D), "temperature": 1.0, "reduction": "mean"},
        ),
        "unidirectional_sigmoid_loss": (
            ops.unidirectional_sigmoid_loss,
            {
                "query": floats(_N, _D),
                "key": floats(_N, _D),
                "temperature": 1.0,
                "bias": -1.0,
                "reduction": "mean",
            },
        ),
        "duc_loss": (
            ops.duc_loss,
            {
                "features": [floats(_N, _D) for _ in range(_M)],
                "effective": effective,
                "temperature": 1.0,
                "reduction": "sum",
            },
        ),
        "class_moments": (
            ops.class_moments,
            {"features": floats(_N, _D), "labels": target, "num_classes": _C},
        ),
        "dimension_accuracy": (
            ops.dimension_accuracy,
            {"features": floats(_N, _D), "labels": target, "centroids": floats(_C, _D)},
        ),
        "effective_dimensions": (
            ops.effective_dimensions,
            {"features": floats(_N, _D), "labels": target, "num_classes": _C},
        ),
        "entropy_fusion": (ops.entropy_fusion, {"logits": floats(_M, _N, _C), "present": present}),
        "certainty_fusion": (
            ops.certainty_fusion,
            {"logits": floats(_M, _N, _C), "present": present, "temperature": 1.0},
        ),
        "update_projector_": (
            ops.update_projector_,
            {"projector": square, "mean_feature": floats(_D), "alpha": 0.1},
        ),
        "project_gradient": (ops.project_gradient, {"grad": floats(_C, _D), "projector": square.clone()}),
        "partial_reinit_": (
            ops.partial_reinit_,
            {"params": [floats(3, 2), floats(4)], "init_params": [floats(3, 2), floats(4)], "alpha": 0.3},
        ),
        "kmeans": (
            ops.kmeans,
            {
                "features": floats(_N, _D),
                "num_clusters": 2,
                "init": "k-means++",
                "max_iter": 3,
                "tol": 0.0,
                "seed": 0,
                "num_init": 1,
            },
        ),
        "cluster_purity": (ops.cluster_purity, {"assignments": target, "labels": target}),
    }


_TEMPERATURES = (
    0,
    0.0,
    -1.0,
    float("nan"),
    float("inf"),
    1e-46,
    1e-40,
    1e39,
    1e300,
    1e-300,
    "1",
    None,
    1j,
    [1.0],
    torch.ones(_N),
)
# Wrong values by argument, whatever the op.
_WRONG: dict[str, tuple] = {
    "temperature": _TEMPERATURES,
    "bias": (float("nan"), float("inf"), -1e31, 1e300, "1", None, 1j, True, [1.0], torch.ones(_N)),
    "reduction": ("max", None, 3),
    "utility": ("loss", None, 1),
    "backend": ("gpu", None, ""),
    "num_classes": (0, -1, 2.5, True, None, "4"),
    "num_clusters": (0, -1, _N + 1, 1.5, None, True),
    "init": (
        "random",
        None,
        torch.zeros(3, _D),
        torch.zeros(2, _D + 1),
        torch.full((2, _D), float("nan")),
        torch.zeros(2, _D).int(),
    ),
    "max_iter": (0, -3, 1.5, None),
    "num_init": (0, -3, 1.5, None),
    "tol": (-1.0, float("nan"), float("inf"), "0", None),
    "seed": (1.5, None, 2**64, -(2**63) - 1),
}
_ALPHAS = {
    "update_projector_": (0, -1.0, float("nan"), float("inf"), 1e-46, 1e-40, 1e39, 1e300, "1", None, 1j),
    "partial_reinit_": (
        -0.1,
        1.1,
        float("nan"),
        float("inf"),
        "1",
        None,
        1j,
        [0.5],
        [0.1, 0.2, 0.3],
        [0.1, 2.0],
        [0.1, float("nan")],
    ),
}


def _wrong_tensor(draw: Draw, op: str, name: str, x: Tensor) -> Any:
    """Return what a tensor argument must not be."""
    shapes = [x[None], x[..., None], x.flatten()[0] if x.dim() else x[None, None]]
    if (op, name) == ("shapley_values", "utilities"):
        shapes = [x[..., :0], x[..., :6], x[..., :1], x.flatten()[0]]
    dtypes: list[Any] = [None, 1.5, "x", np.zeros(tuple(x.shape)), x.to(torch.complex64), x.tolist()]
    if x.is_floating_point():
        dtypes += [x.int(), x > 0, x.to(torch.float8_e4m3fn)]
        if name == "projector":
            dtypes += [x.half(), x.bfloat16()]
    elif x.dtype == torch.bool:
        dtypes += [x.int(), x.float()]
    else:
        dtypes += [x.float(), x > 0]
    sizes = [torch.cat([x, x[:1]]), x[:-1]] if x.dim() and name not in _FIRST else []
    if x.dtype == torch.int64 and name != "assignments" and op != "cluster_purity":
        outside = [x.clone() for _ in range(4)]
        outside[0][0], outside[1][-1], outside[2][1], outside[3][2] = -1, _C, 2**40, -(2**63)
        sizes += outside
    elif x.dtype == torch.int64:
        sizes += [torch.where(x == 1, -1, x)]
    if name in ("bias", "present"):
        dtypes = dtypes[1:]
    if name == "features" and op == "kmeans":
        sizes += [torch.where(x > 0, value, x) for value in (float("nan"), float("inf"))]
    return draw.choice([*shapes, *dtypes, *sizes])


# Whose number of rows is the others' measure; a wrong one is said of the others.
_FIRST = (
    "utilities",
    "query",
    "projector",
    "grad",
    "features",
    "centroids",
    "assignments",
    "logits",
    "partial_logits",
)


def _wrong_list(draw: Draw, op: str, name: str, x: list[Tensor]) -> Any:
    """Return what a list of tensors must not be."""
    other = x[-1]
    last = draw.choice(
        [other.flatten()[:2], other[None], other.int(), None, 2.0, other.tolist(), other.to(torch.complex64)]
    )
    wrong: list[Any] = [[*x[:-1], last]]
    if name == "features":
        wrong += [[], None, 3.0, x[0], torch.zeros(0, _N, _D), [*x, x[0]]]
    elif name == "init_params":
        wrong += [x[:1], [*x, x[0]], None, [x[0], other.double()]]
    else:
        base = torch.arange(12.0)
        wrong += [
            [x[0], x[0]],
            # Memory that two share, or one holds twice.
            [base[:6].view(3, 2), base[4:8]],
            [torch.zeros(1).expand(3, 2), other],
            [base.as_strided((3, 2), (1, 1)), other],
        ]
    return draw.choice(wrong)


def _is_valid(op: str, name: str, value: Any) -> bool:
    """Return whether a value that is wrong elsewhere is right here."""
    if op == "shapley_values" and isinstance(value, Tensor):
        return value.dim() > 0 and value.dtype == torch.float32 and value.shape[-1] in (2, 4, 8)
    return name == "present" and value is None


def _memory(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def invalid(draw: Draw, backend: str, small: bool) -> None:
    """One call with one argument put wrong: a ValueError or TypeError that names it, and nothing changed."""
    calls = _valid()
    op = draw.choice(list(calls))
    run, options = calls[op]
    options["backend"] = backend
    name = draw.choice(list(options))
    value = options[name]
    if isinstance(value, Tensor):
        wrong = _wrong_tensor(draw, op, name, value)
    elif isinstance(value, list):
        wrong = _wrong_list(draw, op, name, value)
    else:
        wrong = draw.choice(_ALPHAS[op] if name == "alpha" else _WRONG[name])
    if _is_valid(op, name, wrong):
        return
    options[name] = wrong
    memory = [x for given in options.values() for x in _memory(given)]
    before = [x.clone() for x in memory]
    shown = f"{list(wrong.shape)} {wrong.dtype}" if isinstance(wrong, Tensor) else repr(wrong)
    text = f"{op}({name}={' '.join(shown.split())[:200]})"
    try:
        run(**options)
    except (ValueError, TypeError) as error:
        message = str(error)
        # A wrong number of rows or classes may be said of the argument it does not fit.
        assert any(other in message for other in options), f"{text}: the error names no argument: {message}"
        is_own = not isinstance(wrong, Tensor | list) or wrong == []
        assert not is_own or name in message, f"{text}: the error does not name it: {message}"
    except BackendUnavailableError:
        # The backend has no kernel for this op.
        raise
    except Exception as error:
        raise AssertionError(f"{text} raised {type(error).__name__}: {error}") from None
    else:
        raise AssertionError(f"{text} did not raise")
    for x, was in zip(memory, before, strict=True):
        if x.dtype in (torch.complex64, torch.float8_e4m3fn):
            continue
        assert torch.equal(bits(x.clone()), bits(was)), f"{text} raised, but a tensor was changed"
