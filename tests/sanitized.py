"""Every op's GPU kernels once, forward and backward, for compute-sanitizer: python tests/sanitized.py."""

from __future__ import annotations

import torch

from conftest import FILES, ROOT
from every_op import CALLS
from mmfast import backend as _backend


def main() -> None:
    """Run each call on each GPU backend that has the op."""
    device = torch.device("cuda")
    for backend in ("triton", "cuda"):
        if _backend.why_not(backend) is not None:
            continue
        for stem, makes in CALLS.items():
            if not (ROOT / FILES[backend].format(stem)).exists():
                continue
            for make in makes:
                for dtype in (torch.float32, torch.bfloat16):
                    make(device, dtype, backend)[1]()
                    torch.cuda.synchronize()
                    print(backend, make.__name__, dtype, flush=True)


if __name__ == "__main__":
    main()
