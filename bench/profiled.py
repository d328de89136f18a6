"""The kernels whose counters bench/gpu/measure has ncu read: python -m mmfast.bench.profiled [OP]."""

from __future__ import annotations

import sys

import torch

from mmfast import backend, ops


def main(wanted: str | None = None) -> None:
    """Run shapley_values and one pair of the loss once, or one of them, on each GPU backend that has it."""
    device = torch.device("cuda")
    table = torch.randn(2**22, 2**4, device=device)  # [N, S]: 268 MB, more than the caches hold
    query, key = (torch.randn(16_384, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
    query.requires_grad_()
    for name in ("triton", "cuda"):
        if backend.why_not(name) is not None:
            continue
        if wanted in (None, "shapley_values") and backend.implements(name, "shapley_values"):
            ops.shapley_values(table, backend=name)
        if wanted in (None, "duc_loss") and backend.implements(name, "duc_loss"):
            ops.unidirectional_info_nce(query, key, temperature=16.0, backend=name)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:2])
