"""Does it work on this GPU? Checks in processes with limits, then sanitizers and tests, within 300 s."""

from __future__ import annotations

import shutil
from pathlib import Path

import script
from script import Machine

import parts
from steps import Step

SECONDS = 300
HERE = Path(__file__).resolve().parent
TESTS = parts.ROOT / "tests"
# Cores that the checks leave to the driver's and the compilers' threads.
SPARE = 4
# Tests that reach a GPU and belong to no single op, those that take minutes, and those that no GPU changes.
FIRST = ("every_op", "raw_ops", "transforms", "defaults", "nan_payloads", "small_sizes", "packing")
LONG = (
    *("additive_shapley", "additive_shapley_range", "class_separability", "class_separability_hits"),
    *("class_separability_range", "duc_loss", "duc_loss_range", "duc_loss_tiles"),
    *("every_op", "raw_ops", "trainer"),
)
LAST = (
    *("compile_triton", "cuda_emulated", "data", "data_files", "data_sources", "encoders", "fuzz"),
    *("gpu_scripts", "human_votes", "inspect_cuda", "interrupt", "labels", "launched_kernels", "layout"),
    *("loops", "options", "packaging", "readme", "report"),
)


def stems(backend: str) -> list[str]:
    """Return the ops that have a kernel on the backend."""
    folder, pattern = {"triton": ("kernels", "[a-z]*.py"), "cuda": ("csrc/cuda", "[a-z]*.cu")}[backend]
    found = {path.stem for path in (parts.ROOT / folder).glob(pattern)}
    return sorted(stem for stem in found if (TESTS / f"test_{stem}.py").exists())


def check_steps(python: str, backends: list[str], rehearse: bool) -> list[Step]:
    """Return every (backend, op), then the graphs."""
    extra = ["--rehearse"] if rehearse else []
    pairs = [(backend, stem) for stem in stems("triton") for backend in backends if stem in stems(backend)]
    program = [python, "-P", str(HERE / "checks.py")]
    found = [Step("edge: 48 KiB of shared memory", [*program, "edge", *extra], 60)]
    for what, limit in (("op", 120), ("graph", 90)):
        found += [
            Step(f"{what}: {stem} {backend}", [*program, what, backend, stem, *extra], limit)
            for backend, stem in pairs
        ]
    return found


def sanitizer_steps(python: str, backends: list[str]) -> list[Step]:
    """Return memcheck over all ops, and what is slower on a few samples.

    Not initcheck: parts that were never written are loaded by design.
    """
    tool = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--print-limit", "20"]
    program = [python, "-m", "support.sanitized"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = [
        Step(
            f"memcheck: {stem} {backend}",
            [*tool, "--tool", "memcheck", *program, backend, stem],
            120,
            uncached,
        )
        for backend in backends
        for stem in stems(backend)
    ]
    return found + [
        Step(
            f"{name}: {backend}", [*tool, "--tool", name, *program, backend, "--samples", "20"], 120, uncached
        )
        for name in ("synccheck", "racecheck")
        for backend in backends
    ]


def fuzz_steps(python: str, backends: list[str]) -> list[Step]:
    """Return generated calls against their formulas; Triton compiles for many of them, and gets fewer."""
    cases = {"cuda": ("cuda", "20000"), "triton": ("triton-compiled", "3000")}
    found = []
    for name in backends:
        backend, number = cases[name]
        command = [python, "-P", str(parts.ROOT / "tools" / "fuzz"), "--backend", backend, "--cases", number]
        found.append(Step(f"fuzz: {name}", [*command, "--minutes", "1"], 90))
    return found


def test_steps(python: str) -> list[Step]:
    """Return the test files, those of the ops first, without what shows itself on any machine."""
    command = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "failures"]
    command += ["--disable-warnings", "-rN", "--rootdir", str(parts.ROOT), "-k", "not emulated"]
    names = {path.stem.removeprefix("test_"): path for path in sorted(TESTS.glob("test_*.py"))}
    ops = [name for stem in stems("triton") for name in names if name == stem or name.startswith(f"{stem}_")]
    first = (*ops, *FIRST)
    order = sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))
    return [
        Step(
            f"tests: test_{name}.py",
            [*command, *(["-n", "4"] if name in LONG else []), str(names[name])],
            150,
        )
        for name in order
        if name not in LAST
    ]


def check(machine: Machine) -> None:
    """Run the riskiest kernel alone, then all else side by side."""
    run, python, backends_of = machine.run, machine.python, machine.facts["backends"]
    backends = [name for name in ("cuda", "triton") if backends_of[name] is None]
    riskiest = [python, "-P", str(HERE / "checks.py"), "riskiest"]
    if "cuda" in backends:
        extra = ["--rehearse"] if machine.rehearse else []
        run.step(Step("riskiest: duc_loss cuda", [*riskiest, *extra], 60))
    else:
        run.note("riskiest: duc_loss cuda", backends_of["cuda"])
    # Side by side, so that none waits for cores that the others hold.
    run.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    queue = check_steps(python, backends, machine.rehearse)
    if shutil.which("compute-sanitizer"):
        queue += sanitizer_steps(python, backends)
    else:
        run.note("memcheck", "compute-sanitizer is not installed")
    queue += [*fuzz_steps(python, backends), *test_steps(python)]
    run.together(queue, workers(machine.facts["cores"]))


def workers(cores: int) -> int:
    """Return how many processes run side by side: ten on sixteen cores."""
    return max(1, min(10, cores - SPARE))


if __name__ == "__main__":
    raise SystemExit(script.main("check", __doc__, SECONDS, check))
