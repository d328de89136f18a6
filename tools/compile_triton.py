"""Compile every Triton kernel ahead of time, without a GPU: python tools/compile_triton.py [--ops kmeans].

Each kernels/<op>.py lists in `compile_configurations()`, or in `compile_configurations(target)` where tiles
depend on the device, tuples of

    kernel, {argument: type}, {constexpr: value}, {option: value}[, "warp" or "warpgroup"]

A type that ends in ":16" says, as for triton.tools.compile, that the argument is a multiple of 16; an
argument that is a tuple has a tuple of types. The last item asks for matrix instructions: of a warp, or those
of a group of four warps where a device has them.

Prints a table. Fails if a kernel does not compile, spills registers, takes more shared memory than a block of
threads can have, or multiplies without the instructions it asks for. What one version of Triton spills and
others do not stands in SPILLS; it fails, too, when that grows or is not needed any more.

With --loops [PATTERN] it compiles for NVIDIA's devices what the regular expression is found in, of "KERNEL
DEVICE CONFIGURATION", prints what each loop takes of each pipe, and with --json FILE writes the same for
programs; tools/loops.py says how it counts:

    python tools/compile_triton.py --ops duc_loss --loops '90 .*bf16.*BLOCK_D=128'
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent))

import loops
import machine_code

ROOT = Path(__file__).resolve().parent.parent


class Device(NamedTuple):
    target: GPUTarget
    shared: int  # bytes a block of threads can have
    warp: str  # a matrix instruction of a warp, as the assembly has it
    warpgroup: str  # the same of a group of warps, as a regular expression


DEVICES = {
    "80": Device(GPUTarget("cuda", 80, 32), 163 << 10, r"\bmma\.sync", r"\bmma\.sync"),
    "90": Device(GPUTarget("cuda", 90, 32), 227 << 10, r"\bmma\.sync|\bwgmma", r"\bwgmma\.mma_async"),
    "100": Device(GPUTarget("cuda", 100, 32), 227 << 10, r"\bmma\.sync|\btcgen05\.mma", r"\btcgen05\.mma"),
    "120": Device(GPUTarget("cuda", 120, 32), 99 << 10, r"\bmma\.sync", r"\bmma\.sync"),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, r"\bv_mfma_", r"\bv_mfma_"),
    "gfx950": Device(GPUTarget("hip", "gfx950", 64), 160 << 10, r"\bv_mfma_", r"\bv_mfma_"),
}


# By version of Triton, then by device, kernel and words of the configuration: bytes that may be spilled.
# Smaller tiles would not, and would do more work everywhere else.
SPILLS: dict[str, dict[tuple[str, str, str], int]] = {
    "3.6": {
        ("80", "_additive_shapley_bwd_kernel", "ACC=fp64 UTILITY=3 BLOCK_C=2048"): 32,
        ("90", "_additive_shapley_bwd_kernel", "ACC=fp32 UTILITY=3 BLOCK_C=2048"): 4,
        ("90", "_duc_loss_fwd_kernel", "fp32 PRECISION=ieee BLOCK_D=64 BLOCK_N=16 BLOCK_K=32"): 16,
        ("90", "_duc_loss_fwd_kernel", "fp16 BLOCK_D=256 BLOCK_N=128"): 104,
        ("100", "_additive_shapley_bwd_kernel", "ACC=fp32 UTILITY=3 BLOCK_C=2048"): 4,
        ("100", "_duc_loss_fwd_kernel", "ACC=fp64"): 12,
        ("90", "_sigmoid_loss_fwd_kernel", "fp32 fp64 PRECISION=ieee BLOCK_D=64 BLOCK_N=16"): 4,
        ("100", "_sigmoid_loss_fwd_kernel", "ACC=fp64"): 4,
        ("120", "_sigmoid_loss_fwd_kernel", "bf16 BLOCK_C=64 WIDE=True"): 8,
        ("120", "_sigmoid_loss_fwd_kernel", "fp32 fp64 PRECISION=ieee BLOCK_D=64 WIDE=True"): 4,
        ("120", "_additive_shapley_bwd_kernel", "ACC=fp32 UTILITY=3 BLOCK_C=2048"): 8,
        ("120", "_duc_loss_fwd_kernel", "fp32 PRECISION=ieee BLOCK_D=64 BLOCK_N=16 BLOCK_K=32"): 8,
    },
    "3.9": {
        ("90", "_sigmoid_loss_fwd_kernel", "ACC=fp64"): 8,
        ("100", "_sigmoid_loss_fwd_kernel", "ACC=fp64"): 16,
        ("120", "_sigmoid_loss_fwd_kernel", "bf16 BLOCK_D=128 WIDE=False BLOCK_N=128 HAS_RESIDUAL=True"): 8,
        ("120", "_sigmoid_loss_fwd_kernel", "bf16 BLOCK_C=64 WIDE=True"): 24,
        ("120", "_sigmoid_loss_fwd_kernel", "PRECISION=tf32"): 20,
    },
}


class Facts(NamedTuple):
    """What the assembler says of one kernel."""

    registers: int  # per thread
    spills: int  # bytes, or on AMD registers
    shared: int  # bytes
    assembly: str
    binary: bytes = b""  # for NVIDIA's devices


class Report(NamedTuple):
    kernel: str
    configuration: str
    device: str
    facts: Facts | None  # None: it did not compile
    seconds: float
    problems: list[str]
    loops: loops.Report | None = None  # where asked for


def leaves(kinds: Iterable) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the types of arguments, of a tuple all that are in it, each with its place."""
    for index, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from (((index, *path), part) for path, part in leaves(kind))
        else:
            yield (index,), kind


def plain(kind: Any) -> Any:
    """Return a type, or a tuple of types, without what is said of the values."""
    return tuple(map(plain, kind)) if isinstance(kind, tuple) else kind.split(":")[0]


def text_of(configuration: tuple) -> str:
    """Return types, constants and options of a configuration on one line."""
    _, signature, constants, options, *_ = configuration
    # The types of pointers tell one kernel's configurations from another's, those of numbers do not.
    kinds = [kind for _, kind in leaves(signature.values())]
    types = dict.fromkeys(kind[1:].split(":")[0] for kind in kinds if kind.startswith("*"))
    values = {name: value for name, value in {**constants, **options}.items() if value is not None}
    return " ".join([*types, *(f"{name}={value}" for name, value in values.items())])


def compiled(configuration: tuple, device: Device) -> Facts:
    """Compile one configuration for one device."""
    kernel, signature, constants, options, *_ = configuration
    kinds = [signature.get(name, "constexpr") for name in kernel.arg_names]
    types = dict(zip(kernel.arg_names, map(plain, kinds), strict=True))
    attributes = {path: [["tt.divisibility", 16]] for path, kind in leaves(kinds) if kind.endswith(":16")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    log, knobs = io.StringIO(), triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # Triton assembles the kernel anyway: it is to print what ptxas says. Of one out of its cache it says
        # nothing.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        result = triton.compile(source, target=device.target, options=dict(options))
    if device.target.backend == "hip":
        assembly = result.asm["amdgcn"]
        registers = re.findall(r"\.vgpr_count: *(\d+)", assembly)
        # Scalar registers spill to lanes of vector registers, not to memory.
        spills = re.findall(r"\.vgpr_spill_count: *(\d+)", assembly)
    else:
        assembly = result.asm["ptx"]
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    if not registers or not spills:
        raise RuntimeError(f"the assembler does not say how many registers it used: {log.getvalue()}")
    binary = result.asm.get("cubin", b"")
    return Facts(max(map(int, registers)), sum(map(int, spills)), result.metadata.shared, assembly, binary)


def loops_of(facts: Facts, name: str) -> loops.Report:
    """Return what the loops of a compiled kernel take.

    Args:
        facts: of the kernel, its binary among them.
        name: for people.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(facts.binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (kernel,) = machine_code.kernels(listing.splitlines())
    threads = loops.launches(facts.binary).get(kernel.name, 0)
    return loops.report(name, kernel, loops.Launch(facts.registers, threads))


def allowance(kernel: str, configuration: str, device: str) -> tuple[str, str, str] | None:
    """Return the key of what may be spilled under this Triton, None where there is none."""
    words = set(configuration.split())
    for key in _allowances():
        if key[:2] == (device, kernel) and words.issuperset(key[2].split()):
            return key
    return None


def _allowances() -> dict[tuple[str, str, str], int]:
    return SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})


def problems(facts: Facts, device: Device, instructions: str | None, allowed: int = 0) -> list[str]:
    """Return what is wrong with a compiled kernel.

    Args:
        facts: of the kernel.
        device: it is compiled for.
        instructions: None, "warp" or "warpgroup".
        allowed: bytes it may spill, and is known to.
    """
    found = []
    if facts.spills > allowed:
        found.append(f"spills {facts.spills}" + (f", {allowed} allowed" if allowed else ""))
    elif allowed and not facts.spills:
        found.append(f"spills nothing: the {allowed} bytes allowed in SPILLS are not needed")
    if facts.shared > device.shared:
        found.append(f"takes {facts.shared} bytes of shared memory, the device has {device.shared}")
    if instructions is not None:
        wanted = device.warp if instructions == "warp" else device.warpgroup
        if not re.search(wanted, facts.assembly):
            found.append(f"has no {instructions} matrix instruction ({wanted})")
    return found


def report(configuration: tuple, device: str, with_loops: bool = False) -> Report:
    """Compile one configuration and judge it."""
    started = time.perf_counter()
    facts, found, text, taken = None, [], text_of(configuration), None
    try:
        facts = compiled(configuration, DEVICES[device])
        key = allowance(configuration[0].__name__, text, device)
        instructions = configuration[4] if len(configuration) > 4 else None
        found = problems(facts, DEVICES[device], instructions, _allowances()[key] if key else 0)
        if with_loops:
            taken = loops_of(facts, f"{configuration[0].__name__} {text}")
    except Exception as error:
        found.append(f"does not compile: {error}")
    seconds = time.perf_counter() - started
    # Assembly is long and has been read.
    facts = facts and facts._replace(assembly="", binary=b"")
    return Report(configuration[0].__name__, text, device, facts, seconds, found, taken)


def configurations(op: str, device: str) -> list[tuple]:
    """Return what the kernels of an op list for this device."""
    listed: Any = importlib.import_module(f"mmfast.kernels.{op}").compile_configurations
    target = DEVICES[device].target
    return listed(target.arch) if inspect.signature(listed).parameters else listed()


def _in_bfloat16(configuration: tuple) -> str:
    """Return all of a configuration as text, with bfloat16 in place of float16."""
    kernel, *parts = configuration
    return f"{kernel.__name__} {parts}".replace("fp16", "bf16").replace(".float16", ".bfloat16")


def distinct(ops: Iterable[str], devices: Sequence[str]) -> list[tuple[tuple, str]]:
    """Return what is to compile: configurations with their devices.

    Float16 differs from bfloat16 in its conversions alone: what is listed for both is compiled in float16 for
    the first device only.
    """
    jobs = []
    for op in ops:
        for device in devices:
            listed = configurations(op, device)
            texts = [f"{kernel.__name__} {parts}" for kernel, *parts in listed]
            for item, text in zip(listed, texts, strict=True):
                twin = _in_bfloat16(item)
                if device == devices[0] or text == twin or twin not in texts:
                    jobs.append((item, device))
    return jobs


# Kernels cannot be pickled: processes that are forked find them here.
_JOBS: list[tuple[tuple, str]] = []


def _run_job(index: int) -> Report:
    return report(*_JOBS[index])


def _run_job_with_loops(index: int) -> Report:
    return report(*_JOBS[index], with_loops=True)


def print_loops(jobs: list[tuple[tuple, str]], pattern: str, path: Path | None) -> int:
    """Compile what the pattern is found in and print what its loops take; return the exit status."""
    for item, device in jobs:
        is_nvidia = DEVICES[device].target.backend == "cuda"
        if is_nvidia and re.search(pattern, f"{item[0].__name__} {device} {text_of(item)}"):
            _JOBS.append((item, device))
    found, bad = [], []
    workers, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for row in pool.map(_run_job_with_loops, range(len(_JOBS))):
            bad += [f"{row.kernel} on {row.device} {text}: {row.configuration}" for text in row.problems]
            if row.loops is not None:
                found.append(row.loops)
                print(loops.table(row.loops), end="\n\n", flush=True)
    if path is not None:
        path.write_text(json.dumps([loops.as_json(item) for item in found], indent=1) + "\n")
    print("\n".join([*bad, f"{len(found)} kernels, {len(bad)} problems"]))
    return 1 if bad or not found else 0


def main() -> int:
    """Compile every configuration for every device; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time, without a GPU.")
    parser.add_argument("--targets", nargs="+", choices=DEVICES, default=list(DEVICES), help="devices")
    parser.add_argument("--ops", nargs="+", help="stems of kernels/, all by default")
    parser.add_argument(
        "--loops", nargs="?", const="", metavar="PATTERN", help="what loops take of each pipe"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --loops: write it there, too")
    arguments = parser.parse_args()
    ops = arguments.ops or sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
    if arguments.loops is not None:
        return print_loops(distinct(ops, arguments.targets), arguments.loops, arguments.json)
    _JOBS.extend(distinct(ops, arguments.targets))
    started = time.perf_counter()
    print(f"{'kernel':31} {'target':6} {'registers':>9} {'shared':>7} {'spills':>6} {'s':>5}  configuration")
    workers, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")
    bad = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for row in pool.map(_run_job, range(len(_JOBS))):
            values = ("-", "-", "-") if row.facts is None else row.facts[:1] + row.facts[2:0:-1]
            numbers = "{:>9} {:>7} {:>6}".format(*values)
            print(f"{row.kernel:31} {row.device:6} {numbers} {row.seconds:5.1f}  {row.configuration}")
            bad += [f"{row.kernel} on {row.device} {text}: {row.configuration}" for text in row.problems]
    seconds = time.perf_counter() - started
    if not arguments.ops:
        used = {allowance(item[0].__name__, text_of(item), device) for item, device in _JOBS}
        unused = [key for key in _allowances() if key[0] in arguments.targets and key not in used]
        bad += [f"SPILLS names {' '.join(key)}, which is not compiled" for key in unused]
    print("\n".join([*bad, f"{len(_JOBS)} compiled in {seconds:.0f} s, {len(bad)} problems"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
