"""Partial re-initialisation of a list of parameters: against torch._foreach_lerp_ and a loop of lerp_."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import partial_reinit as reference

from .harness import Case, Options, Work
from .peers import assert_close

SIZE = "Numbers in a tensor"
# Number of tensors and numbers in each: few large ones, those of a ResNet-18, many small ones.
SIZES = ((10_000, 64), (62, 2**18), (4, 2**24))
QUICK = ((1_000, 64), (4, 2**20))
ALPHA = 0.3


def cases(options: Options) -> Iterator[Case]:
    """Yield lists of few large and of many small parameters."""
    for count, size in QUICK if options.quick else SIZES:
        params, inits = ([torch.randn(size, device=options.device) for _ in range(count)] for _ in range(2))
        for panel, ours in (
            ("in place", partial(ops.partial_reinit_, params, inits, ALPHA)),
            ("in place, by a plan", partial(ops.ReinitPlan(params, inits).apply_, ALPHA)),
        ):
            yield Case(
                name=f"{count:,} x {size:,}" + (", plan" if "plan" in panel else ""),
                size=size,
                panel=panel,
                ours=ours,
                peers={
                    "_foreach_lerp_": partial(torch._foreach_lerp_, params, inits, ALPHA),
                    "loop of lerp_": partial(_loop, params, inits),
                },
                check=_make_check(options.device),
                work=Work(8 * count * size, 4 * count * size),
            )


def _loop(params: list[Tensor], inits: list[Tensor]) -> None:
    for theta, theta_0 in zip(params, inits, strict=True):
        theta.lerp_(theta_0, ALPHA)


def _make_check(device: str) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        # What is timed changes in place, so copies of other tensors are checked: odd sizes among them.
        starts = [torch.randn(size, device=device) for size in (64, 1001, 70_000)]
        inits = [torch.randn_like(theta) for theta in starts]
        found, planned, plain, truth = ([theta.clone() for theta in starts] for _ in range(4))
        truth = [theta.double() for theta in truth]
        ops.partial_reinit_(found, inits, ALPHA)
        ops.ReinitPlan(planned, inits).apply_(ALPHA)
        torch._foreach_lerp_(plain, inits, ALPHA)
        reference.partial_reinit_(truth, [theta.double() for theta in inits], ALPHA)
        for ours in (found, planned):
            assert_close(tuple(ours), tuple(truth), tuple(plain))

    return check
