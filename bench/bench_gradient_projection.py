"""One step of a head's projected gradient, update of P and product with it: against the published formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import gradient_projection as reference

from .harness import Case, Options, Work
from .peers import Missing, assert_close, compiled

SIZE = "Feature dimensions D"
# HTAD has 7, CREMA-D 6; Kinetics-Sounds 31.
NUM_CLASSES = (6, 31)
ALPHA = 0.1


def cases(options: Options) -> Iterator[Case]:
    """Yield D from 64 to 2,048; every contestant updates a projector of its own."""
    dims = (64, 512) if options.quick else (64, 128, 512, 2048)
    for num_classes, dim in itertools.product(NUM_CLASSES, dims):
        h = torch.randn(dim, device=options.device)
        grad = torch.randn(num_classes, dim, device=options.device)
        square = 4 * dim * dim
        yield Case(
            name=f"D={dim:,} C={num_classes}",
            size=dim,
            panel="update and product",
            ours=_on_own_projector(_ours, h, grad),
            peers={
                "both ops": _on_own_projector(_both, h, grad),
                "eager": _on_own_projector(_published, h, grad),
                "torch.compile": _on_own_projector(compiled(_published, options.quick), h, grad),
            },
            check=_make_check(h, grad),
            # P is read and written; the products P h and G P, and the outer product.
            work=Work(square + grad.nbytes, square + grad.nbytes, (4 + 2 * num_classes) * dim * dim),
        )


def _ours(
    projector: Tensor,  # [D, D]
    h: Tensor,  # [D]
    grad: Tensor,  # [C, D]
) -> Tensor:  # [C, D]
    return ops.update_and_project_(projector, h, grad, alpha=ALPHA)


def _both(
    projector: Tensor,  # [D, D]
    h: Tensor,  # [D]
    grad: Tensor,  # [C, D]
) -> Tensor:  # [C, D]
    ops.update_projector_(projector, h, alpha=ALPHA)
    return ops.project_gradient(grad, projector)


def _published(
    projector: Tensor,  # [D, D]
    h: Tensor,  # [D]
    grad: Tensor,  # [C, D]
) -> Tensor:  # [C, D]
    ph = projector @ h
    q = ph / (ALPHA + h @ ph)
    projector -= torch.outer(q, ph)
    return grad @ projector


def _on_own_projector(step: Any, h: Tensor, grad: Tensor) -> Any:
    if isinstance(step, Missing):
        return step
    projector = torch.eye(len(h), device=h.device)
    return lambda: step(projector, h, grad)


def _make_check(
    h: Tensor,  # [D]
    grad: Tensor,  # [C, D]
) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        found, plain = (torch.eye(len(h), device=h.device) for _ in range(2))
        truth, projected = found.double(), grad
        # Three different features, as the timed projector soon has nothing left along its only one.
        for shift in range(3):
            feature = h.roll(shift)
            projected = _ours(found, feature, grad)
            for projector in (plain, truth):
                reference.update_projector_(projector, feature, alpha=ALPHA)
        assert_close((found, projected), (truth, grad.double() @ truth), (plain, grad @ plain))

    return check
