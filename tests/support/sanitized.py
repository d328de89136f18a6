"""GPU kernels once, forward and backward: compute-sanitizer python -m support.sanitized [BACKEND [STEM]]."""

from __future__ import annotations

import argparse

import torch

from mmfast import backend as _backend
from support import every_op
from support.stems import FILES, ROOT


def main() -> None:
    """Run each call on each GPU backend that has the op."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", nargs="?", choices=("triton", "cuda"))
    parser.add_argument("stem", nargs="?", choices=tuple(every_op.CALLS))
    parser.add_argument("--samples", type=int, default=every_op.N)
    arguments = parser.parse_args()
    every_op.N = arguments.samples
    device = torch.device("cuda")
    for backend in [arguments.backend] if arguments.backend else ["triton", "cuda"]:
        if _backend.why_not(backend) is not None:
            continue
        for stem in [arguments.stem] if arguments.stem else every_op.CALLS:
            if not (ROOT / FILES[backend].format(stem)).exists():
                continue
            for make in every_op.CALLS[stem]:
                for dtype in (torch.float32, torch.bfloat16):
                    make(device, dtype, backend)[1]()
                    torch.cuda.synchronize()
                    print(backend, make.__name__, dtype, flush=True)


if __name__ == "__main__":
    main()
