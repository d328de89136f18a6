"""What a run needs of its machine: an mmfast with its compiled modules, Triton's cache, facts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What `prepare` leaves and a run looks for.
PARTS = ROOT / ".gpu"
MODULES, WHEELS, TRITON = "modules", "wheels", "triton.tar.gz"
# Triton's cache holds absolute paths, so it lies in the same place where it is filled and where it is used.
TRITON_FOLDER = Path("/tmp/mmfast-gpu/triton")
BUILD_SECONDS = 200

_INSTALLED = (
    "import mmfast.bench, mmfast.kernels, mmfast.backend as b, os; "
    "print(os.path.realpath(b.__file__)); print(b.why_not('cuda') or '')"
)
_FACTS = """
import json, os, platform, shutil, subprocess, sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} can use no GPU here")
from mmfast import backend
facts = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
properties = torch.cuda.get_device_properties(0)
facts |= {"capability": list(torch.cuda.get_device_capability()), "memory": properties.total_memory}
facts |= {"multiprocessors": properties.multi_processor_count}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    facts["triton"] = None
facts["backends"] = {name: backend.why_not(name) for name in backend.BACKENDS}
facts["programs"] = {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "cuda-gdb")}
try:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv"]
    facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
except (OSError, subprocess.TimeoutExpired) as error:
    facts["nvidia_smi"] = str(error)
print(json.dumps(facts))
"""


class NotReadyError(Exception):
    """Nothing can be run here; the text is the one sentence the user reads."""


def install(python: str, work: Path) -> tuple[dict[str, str], str]:
    """Return the environment in which `python` finds this checkout's mmfast, and where that comes from.

    Taken is what `prepare` built, else what is installed from this checkout, else a build in `work`.
    """
    environment = {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "MMFAST_TUNING": ""}
    paths = [str(ROOT / "tests"), str(ROOT / "bench" / "gpu")]
    if outside := os.environ.get("PYTHONPATH"):
        paths.append(outside)
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Python's stable interface: any interpreter takes them.
    modules = sorted((PARTS / MODULES).glob("*.abi3.so"))
    if modules:
        site = work / "site"
        _overlay(site, modules)
        for wheel in sorted((PARTS / WHEELS).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *paths])
        if (PARTS / TRITON).exists():
            unpack_triton(PARTS / TRITON)
            environment["TRITON_CACHE_DIR"] = str(TRITON_FOLDER)
        return environment, f"prepared ({', '.join(module.name for module in modules)})"
    found = (_output(python, _INSTALLED, environment) or "").splitlines()
    if found and Path(found[0]).is_relative_to(ROOT) and not any(found[1:]):
        return environment, "installed from this checkout"
    site = work / "site"
    nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    environment["MMFAST_CUDA"] = "1" if nvcc else "0"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(site), str(ROOT)]
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotReadyError(f"the build took more than {BUILD_SECONDS} s: run bench/gpu/prepare") from None
    if done.returncode:
        raise NotReadyError(f"mmfast could not be built: {' '.join(command)} failed")
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *paths])
    return environment, "built here"


def facts_of(python: str, environment: dict[str, str]) -> dict:
    """Return the machine's facts as the child sees them.

    Raises:
        NotReadyError: torch finds no GPU, or mmfast does not import.
    """
    text = _output(python, _FACTS, environment, loud=True)
    if text is None:
        raise NotReadyError(f"torch of {python} finds no GPU, or mmfast does not import; nothing was run")
    return json.loads(text.splitlines()[-1])


def unpack_triton(archive: Path) -> None:
    """Lay Triton's cache where the paths inside it point."""
    TRITON_FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(TRITON_FOLDER, filter="data")


def _overlay(site: Path, modules: list[Path]) -> None:
    """Make an mmfast of links to the checkout and to the compiled modules, as an install lays it out."""
    package = site / "mmfast"
    package.mkdir(parents=True)
    for entry in (ROOT / "mmfast").iterdir():
        # A module built for another place would hide the one that was prepared.
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in ("kernels", "bench"):
        (package / name).symlink_to(ROOT / name)
    for module in modules:
        (package / module.name).symlink_to(module)


def _output(
    python: str, program: str, environment: dict[str, str] | None = None, loud: bool = False
) -> str | None:
    try:
        done = subprocess.run(
            [python, "-P", "-c", program],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return None
    if done.returncode and loud:
        print(done.stderr.strip()[-2000:], file=sys.stderr)
    return done.stdout.strip() if done.returncode == 0 else None
