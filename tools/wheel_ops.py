"""Calls every op of the installed mmfast on the backend cpu and holds the results against plain torch.

    python -P tools/wheel_ops.py [--isa all] [--modules cpu cuda]

Needs torch and mmfast alone. Once for each instruction set of this processor with `--isa all`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from mmfast import backend

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.every_op import CALLS

# Of float64: sums in another order, no more.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def check_ops() -> None:
    """Raise where a call's results, or its gradients, are not those of plain torch."""
    cpu, count = torch.device("cpu"), 0
    for stem, makes in CALLS.items():
        for make in makes:
            results = [make(cpu, torch.float64, name)[1]() for name in ("cpu", "reference")]
            for ours, plain in zip(*results, strict=True):
                torch.testing.assert_close(
                    ours, plain, msg=lambda text, op=stem: f"{op}: {text}", **TOLERANCE
                )
            count += 1
    module = backend.extension("cpu")
    print(f"{count} calls of {len(CALLS)} ops agree with plain torch on {module.isa()} ({module.built_by})")


def check_openmp() -> None:
    """Raise where a second OpenMP runtime is in this process beside torch's."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        found = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
        assert len(found) <= 1, f"several OpenMP runtimes: {', '.join(sorted(found))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=("chosen", "all"), default="chosen")
    parser.add_argument(
        "--modules", nargs="*", choices=("cpu", "cuda"), default=["cpu"], help="must be there"
    )
    arguments = parser.parse_args()
    for name in arguments.modules:
        print(f"mmfast._{name}:", backend.extension(name).__file__)
    if "cuda" in arguments.modules:
        # Its kernels need a GPU; that it loads does not.
        print("machine code for", backend.extension("cuda").architectures())
    if arguments.isa == "chosen":
        check_ops()
        check_openmp()
        return 0
    for isa in backend.extension("cpu").supported_isas():
        environment = os.environ | {"MMFAST_CPU_ISA": isa}
        if subprocess.run([sys.executable, "-P", __file__], env=environment).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
