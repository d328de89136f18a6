"""The kernels whose counters bench/gpu.sh has ncu read, each run once: python -m mmfast.bench.profiled."""

from __future__ import annotations

import torch

from mmfast import backend, ops


def main() -> None:
    """Run shapley_values and one pair of the contrastive loss on every GPU backend that has them."""
    device = torch.device("cuda")
    table = torch.randn(2**22, 2**4, device=device)  # [N, S]: 268 MB, more than the caches hold
    query, key = (torch.randn(16_384, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
    query.requires_grad_()
    for name in ("triton", "cuda"):
        if backend.why_not(name) is not None:
            continue
        if backend.implements(name, "shapley_values"):
            ops.shapley_values(table, backend=name)
        if backend.implements(name, "duc_loss"):
            ops.unidirectional_info_nce(query, key, temperature=16.0, backend=name)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
