"""What the CUDA module's machine code takes and does, without a GPU: python tools/inspect_cuda.py [MODULE].

Reads the installed mmfast._cuda, or the file named, with the cuobjdump that comes with triton. Prints every
kernel's registers, stack and static shared memory for each architecture (from 90 on with the 1,024 bytes that
the system keeps), and which of these instructions it has:

    HMMA      matrix product of a warp                 UBLKCP    bulk copy into shared memory
    HGMMA     matrix product of a warpgroup            LDGSTS    asynchronous copy into shared memory

Fails if a kernel keeps variables in memory, by spills or by arrays it indexes at run time, or lacks
instructions that its file asks for in a line like this:

    // Machine code: duc_hopper_kernel, 90a: HGMMA UBLKCP

With --loops [PATTERN] it prints instead what each loop takes of each pipe, of the kernels in whose "NAME
ARCH" the regular expression is found, and with --json FILE writes the same for programs; tools/loops.py says
how it counts:

    python tools/inspect_cuda.py --loops 'duc_hopper_kernel<__nv_bfloat16, 1, true>'
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

sys.path.insert(0, str(Path(__file__).resolve().parent))

import loops
import machine_code

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("HMMA", "HGMMA", "LDGSTS", "UBLKCP")


class Kernel(NamedTuple):
    name: str  # demangled, with its template's arguments
    arch: str  # "80", "90a"


class Facts(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per block, without what a launch adds


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    """Return readable names without namespaces and parameters."""
    texts = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = {}
    for name, text in zip(names, texts.stdout.splitlines(), strict=True):
        text = text.removeprefix("void ").replace("(anonymous namespace)::", "")
        text = re.sub(r"^(\w+::)+", "", text).replace("mmfast::", "")
        # The parameters begin at the first bracket outside the template's arguments.
        depth = 0
        for index, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0 and index:
                text = text[:index]
                break
        short[name] = re.sub(r"\((?:int|bool)\)", "", text)
    return short


def resources(cuobjdump: str, module: Path) -> dict[tuple[str, str], Facts]:
    """Return what every kernel takes, by mangled name and architecture."""
    found, arch, name = {}, "", ""
    for line in output_of(cuobjdump, "--dump-resource-usage", str(module)).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found[name, arch] = Facts(*map(int, match.groups()))
    return found


def instructions(cuobjdump: str, module: Path) -> dict[tuple[str, str], set[str]]:
    """Return which of SHOWN every kernel has, by mangled name and architecture."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    arch, name = "", ""
    for line in output_of(cuobjdump, "--dump-sass", str(module)).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            name = match[1]
        elif (match := re.match(r"\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z]+)", line)) and match[1] in SHOWN:
            found[name, arch].add(match[1])
    return found


def expectations() -> list[tuple[str, str, set[str]]]:
    """Return what the sources ask for: kernel, architecture, instructions."""
    lines = []
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        for name, archs, wanted in re.findall(
            r"// Machine code: (\w+), ([\w ]+): ([A-Z ]+)$", path.read_text(), re.M
        ):
            lines += [(name, arch, set(wanted.split())) for arch in archs.split()]
    return lines


def missing(found: dict[Kernel, set[str]], wanted: list[tuple[str, str, set[str]]]) -> list[str]:
    """Return what is asked for and not there."""
    problems = []
    for name, arch, names in wanted:
        kernels = [
            kernel
            for kernel in found
            if kernel.arch == arch and kernel.name.split("<")[0].split("::")[-1] == name
        ]
        if not kernels:
            problems.append(f"{name} is not built for {arch}")
        problems += [
            f"{kernel.name} on {arch} has no {' and no '.join(sorted(names - found[kernel]))}"
            for kernel in kernels
            if names - found[kernel]
        ]
    return problems


def loop_reports(
    cuobjdump: str, module: Path, pattern: str, warps: int | None = None
) -> Iterator[loops.Report]:
    """Yield the loops of the kernels in whose "NAME ARCH" the pattern is found, in the module's order."""
    taken = resources(cuobjdump, module)
    names = demangled(sorted({name for name, _ in taken}))
    wanted = {key for key in taken if re.search(pattern, f"{names[key[0]]} {key[1]}")}
    with tempfile.TemporaryDirectory() as folder:
        elf = [cuobjdump, "--extract-elf", "all", str(module.resolve())]
        subprocess.run(elf, cwd=folder, check=True, capture_output=True)
        threads = loops.threads_of(Path(folder))
    chosen = sorted({name for name, _ in wanted})
    # cuobjdump takes about a second for each that is named, 20 for all.
    only = ["--function", ",".join(chosen)] if len(chosen) <= 20 else []
    command = [cuobjdump, "--dump-sass", *only, str(module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for kernel in machine_code.kernels(process.stdout):
            key = kernel.name, kernel.arch
            if key in wanted:
                launch = loops.Launch(taken[key].registers, threads.get(key, 0))
                yield loops.report(names[kernel.name], kernel, launch, warps)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def print_loops(cuobjdump: str, arguments: argparse.Namespace, module: Path) -> int:
    """Print what loops take; return the exit status."""
    found = sorted(
        loop_reports(cuobjdump, module, arguments.loops, arguments.warps),
        key=lambda report: (report.name, int(re.sub(r"\D", "", report.arch))),
    )
    for report in found:
        print(loops.table(report), end="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([loops.as_json(report) for report in found], indent=1) + "\n")
    print(f"{len(found)} kernels")
    return 0 if found else 1


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description="What the CUDA module's machine code takes and does.")
    parser.add_argument("module", nargs="?", type=Path, help="default: the installed mmfast._cuda")
    parser.add_argument(
        "--loops", nargs="?", const="", metavar="PATTERN", help="what loops take of each pipe"
    )
    parser.add_argument(
        "--warps", type=int, help="of a block that run each loop; default: as it is built for"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --loops: write it there, too")
    arguments = parser.parse_args()
    module = arguments.module
    if module is None:
        spec = importlib.util.find_spec("mmfast._cuda")
        if spec is None or spec.origin is None:
            sys.exit("mmfast was installed without its cuda module (MMFAST_CUDA=1 pip install .)")
        module = Path(spec.origin)
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    if arguments.loops is not None:
        return print_loops(cuobjdump, arguments, module)
    taken, had = resources(cuobjdump, module), instructions(cuobjdump, module)
    names = demangled(sorted({name for name, _ in taken}))
    kernels = {Kernel(names[name], arch): (name, arch) for name, arch in taken}
    print(f"{'target':6} {'registers':>9} {'stack':>6} {'shared':>7}  {'instructions':18}  kernel")
    for kernel, key in sorted(kernels.items()):
        facts = taken[key]
        shown = " ".join(sorted(had[key]))
        print(
            f"{kernel.arch:6} {facts.registers:9} {facts.stack:6} {facts.shared:7}  {shown:18}  {kernel.name}"
        )
    problems = [
        f"{kernel.name} on {kernel.arch} keeps {taken[key].stack} bytes of a thread's variables in memory"
        for kernel, key in sorted(kernels.items())
        if taken[key].stack
    ]
    problems += missing({kernel: had[key] for kernel, key in kernels.items()}, expectations())
    print("\n".join([*problems, f"{len(kernels)} kernels, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
