"""Compile every Triton kernel ahead of time, without a GPU: python tools/compile_triton.py [--cc 80 90].

Each kernels/<op>.py lists what to compile in `compile_configurations()`. Fails if a kernel does not compile
or if ptxas counts a spilled register.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent


def assemble(source: Path, target: str) -> str:
    """Return what the first of triton's assemblers that takes this PTX says of it; raise if none does."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    complaints = []
    for assembler in (folder / "ptxas", folder / "ptxas-blackwell"):
        if assembler.exists():
            command = [str(assembler), "-v", f"-arch={target}", str(source), "-o", "/dev/null"]
            log = subprocess.run(command, capture_output=True, text=True)
            if log.returncode == 0:
                return log.stderr
            complaints.append(log.stderr.strip())
    raise RuntimeError(f"no assembler takes the PTX: {'; '.join(complaints) or f'none in {folder}'}")


def spilled_bytes(ptx: str) -> int:
    """Return the bytes of registers that ptxas stores to memory for one kernel; raise if it cannot tell."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        log = assemble(source, target[1])
    stores = re.findall(r"(\d+) bytes spill stores", log)
    assert stores, f"no count of spills in what ptxas says: {log}"
    return sum(map(int, stores))


def compile_one(configuration: tuple, capability: int) -> str | None:
    """Compile one configuration and return what is wrong with it, or None."""
    kernel, signature, constants, options = configuration
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    named = f"{kernel.__name__} {' '.join(signature.values())} {constants} cc {capability}"
    try:
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=full, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options=dict(options),
        )
        spilled = spilled_bytes(compiled.asm["ptx"])
    except Exception as error:
        return f"{named}: {error}"
    return f"{named}: spills {spilled} bytes" if spilled else None


def main() -> int:
    """Compile every configuration for every capability; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time, without a GPU.")
    parser.add_argument("--cc", type=int, nargs="+", default=[80, 90, 100, 120], help="compute capabilities")
    parser.add_argument("--ops", nargs="+", help="stems of kernels/, all by default")
    arguments = parser.parse_args()
    stems = arguments.ops or sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
    jobs = []
    for stem in stems:
        module = importlib.import_module(f"mmfast.kernels.{stem}")
        jobs += [
            (item, capability) for item in module.compile_configurations() for capability in arguments.cc
        ]
    with ThreadPoolExecutor(2) as pool:
        problems = [text for text in pool.map(lambda job: compile_one(*job), jobs) if text]
    print(f"{len(jobs) - len(problems)} of {len(jobs)} compiled without spills: {', '.join(stems)}")
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
