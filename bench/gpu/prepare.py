"""Builds what a GPU machine without network is spared: modules, Triton's cache, wheels, into .gpu/."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import parts

MOST_BYTES = 64 * 2**20
# What a machine with torch and pytest tends to lack; both need no more than that machine has.
WHEELS = ("lightning-fabric", "multiviewstacking")
# Of what Triton keeps of a kernel, its intermediate forms, which no launch reads.
INTERMEDIATE = (".ttir", ".ttgir", ".llir", ".ptx", ".source", ".sass")
HERE = Path(__file__).resolve().parent


class TooLargeError(Exception):
    """What would be sent along is over the limit; the text names the sizes."""


def build_modules(python: str, target: Path) -> None:
    """Build the compiled modules for the interpreter, machine code for compute capability 90 and 90a."""
    environment = {"MMFAST_CUDA": "1", "MMFAST_CUDA_ARCHS": os.environ.get("MMFAST_CUDA_ARCHS", "90")}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--disable-pip-version-check", "--target", folder, str(parts.ROOT)]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        _fresh(target)
        for module in sorted(Path(folder, "mmfast").glob("_c*.so")):
            shutil.copy(module, target)


def fill_triton(python: str, target: Path) -> str | None:
    """Fill Triton's cache by running the ops, and pack it; return why not where there is no device."""
    with tempfile.TemporaryDirectory() as work:
        try:
            environment, _ = parts.install(python, Path(work))
            facts = parts.facts_of(python, environment)
        except parts.NotReadyError:
            return "no GPU that torch can use: the kernels are compiled at their first call there"
        if facts["backends"]["triton"] is not None:
            return facts["backends"]["triton"]
        environment["TRITON_CACHE_DIR"] = str(parts.TRITON_FOLDER)
        command = [python, "-P", str(HERE / "checks.py"), "warm"]
        subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    pack_triton(parts.TRITON_FOLDER, target)
    return None


def pack_triton(folder: Path, target: Path) -> None:
    """Pack a cache without the intermediate forms, and without them in the lists of each kernel's files."""
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix in INTERMEDIATE or ".tmp" in path.name:
                continue
            content = path.read_bytes()
            if path.name.startswith("__grp__"):
                group = json.loads(content)
                children = group["child_paths"]
                group["child_paths"] = {
                    k: v for k, v in children.items() if Path(v).suffix not in INTERMEDIATE
                }
                content = json.dumps(group).encode()
            about = tarfile.TarInfo(str(path.relative_to(folder)))
            about.size, about.mode = len(content), 0o755 if path.suffix == ".so" else 0o644
            archive.addfile(about, io.BytesIO(content))


def load_wheels(python: str, target: Path) -> None:
    """Download the small wheels."""
    _fresh(target)
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--only-binary=:all:", "--dest", str(target), *WHEELS], check=True)


def check_size(folder: Path, sent: Iterable[Path] = (), most: int = MOST_BYTES) -> int:
    """Return the bytes in the folder and of the other files that are sent.

    Raises:
        TooLargeError: they are more than may be sent.
    """
    sizes = {
        entry.name: sum(file.stat().st_size for file in (entry, *entry.rglob("*")) if file.is_file())
        for entry in sorted(folder.iterdir())
    }
    sizes["the checkout"] = sum(path.stat().st_size for path in sent if path.is_file())
    total = sum(sizes.values())
    if total > most:
        each = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
        raise TooLargeError(f"{total / 2**20:.1f} MiB are more than {most / 2**20:.0f}: {each}")
    return total


def tracked() -> list[Path]:
    """Return the checkout's files as git lists them; none where this is no checkout."""
    command = ["git", "-C", str(parts.ROOT), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [parts.ROOT / name for name in done.stdout.split("\0") if name]


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu/prepare", description=__doc__)
    parser.add_argument("what", nargs="*", default=[], help="of modules, wheels, triton (default: all)")
    parser.add_argument("--python", default=os.environ.get("PYTHON") or sys.executable)
    arguments = parser.parse_args()
    wanted = arguments.what or ["modules", "wheels", "triton"]
    parts.PARTS.mkdir(exist_ok=True)
    if "modules" in wanted:
        build_modules(arguments.python, parts.PARTS / parts.MODULES)
    if "wheels" in wanted:
        load_wheels(arguments.python, parts.PARTS / parts.WHEELS)
    if "triton" in wanted and (reason := fill_triton(arguments.python, parts.PARTS / parts.TRITON)):
        print(f"Triton's cache is left out: {reason}")
    try:
        total = check_size(parts.PARTS, tracked())
    except TooLargeError as error:
        print(f"bench/gpu/prepare: {error}", file=sys.stderr)
        return 1
    print(f"{parts.PARTS}: with the checkout {total / 2**20:.1f} of {MOST_BYTES // 2**20} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
