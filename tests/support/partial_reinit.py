"""Tensors for the tests of partial_reinit_."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import partial_reinit as reference
from support.numerics import assert_close_to_truth

SIZES = (0, 1, 15, 16, 64, 1001)


LAYOUTS = ("contiguous", "transposed", "every-second", "unaligned")


def make(size: int, dtype=torch.float32, device="cpu", layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Return `size` normal numbers, as [size] or, "transposed", [size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(3, size, generator=generator).to(device, dtype).t()
    if layout == "every-second":
        return torch.randn(2 * size, generator=generator).to(device, dtype)[::2]
    if layout == "unaligned":
        return torch.randn(size + 1, generator=generator).to(device, dtype)[1:]
    return torch.randn(size, generator=generator).to(device, dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def apart(device, count=4, dtype=torch.float32):
    return [make(12, dtype, device, seed=index).view(3, 4) for index in range(count)]


def check(backend: str, params: list[Tensor], init_params: list[Tensor], alpha: float | list[float]) -> None:
    truth = [theta.double() for theta in params]
    plain = [theta.clone() for theta in params]
    reference.partial_reinit_(truth, [theta_0.double() for theta_0 in init_params], alpha)
    reference.partial_reinit_(plain, init_params, alpha)
    before = [theta_0.clone() for theta_0 in init_params]
    ops.partial_reinit_(params, init_params, alpha, backend=backend)
    for theta, true, expected in zip(params, truth, plain, strict=True):
        assert_close_to_truth(theta, true, expected)
    for theta_0, unchanged in zip(init_params, before, strict=True):
        assert torch.equal(theta_0, unchanged)
