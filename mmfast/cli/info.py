"""What is installed and which backend can run: plain text, from the core package alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import pkgutil
import platform
import re
import sys
from pathlib import Path

import torch

import mmfast
from mmfast import backend

# What `pip install "mmfast[train]"` brings; a test holds it to pyproject.toml.
TRAIN_EXTRA = (
    "cloudpickle",
    "jinja2",
    "joblib",
    "lightning-fabric",
    "matplotlib",
    "multiviewstacking",
    "optuna",
    "pandas",
    "pyarrow",
    "rich",
    "scikit-learn",
    "scipy",
    "soundfile",
    "tensorboard",
    "torchmetrics",
    "typer",
)


def text(width: int = 80) -> str:
    """Return the report of `mmfast info`."""
    sections = {
        "versions": _versions(),
        "build": _build(),
        "extra [train]": _extra(),
        "machine": _machine(),
        "backends": _backends(width),
    }
    blocks = []
    for title, lines in sections.items():
        longest = max(len(name) for name, _ in lines)
        rows = [f"  {name:<{longest}}  {value}" for name, value in lines]
        blocks.append("\n".join([title, *rows]))
    return "\n\n".join(blocks)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[tuple[str, str]]:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return [
        ("mmfast", f"{mmfast.__version__} in {Path(mmfast.__file__).parent}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("torch", torch.__version__ + cuda),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
    ]


def _build() -> list[tuple[str, str]]:
    """Return what was installed, and by which compilers the modules were made."""
    lines = [("installed as", _installed_as())]
    for name in ("cpu", "cuda"):
        try:
            module = backend.extension(name)
        except backend.BackendUnavailableError:
            # Why stands among the backends.
            lines.append((f"{name} module", "not available"))
            continue
        made = f"{module.built_by}, nvcc {module.nvcc()}" if name == "cuda" else module.built_by
        code = f"; machine code for {module.architectures()}" if name == "cuda" else ""
        lines.append((f"{name} module", made + code))
    return lines


def _installed_as() -> str:
    """Return the kind of the install: a wheel by its tags, or a folder of sources."""
    try:
        installed = importlib.metadata.distribution("mmfast")
    except importlib.metadata.PackageNotFoundError:
        return "nothing: a folder of sources, found by Python's path"
    about = json.loads(installed.read_text("direct_url.json") or "{}")
    if about.get("dir_info", {}).get("editable"):
        return f"editable, of {about['url']}"
    tags = re.findall(r"^Tag: (\S+)", installed.read_text("WHEEL") or "", flags=re.MULTILINE)
    return f"wheel {', '.join(tags)}" if tags else "a folder without a wheel's record"


def _extra() -> list[tuple[str, str]]:
    found = [(package, _version(package)) for package in TRAIN_EXTRA]
    if any(version == "not installed" for _, version in found):
        found.append(("to install", 'pip install "mmfast[train]"'))
    return found


def _machine() -> list[tuple[str, str]]:
    try:
        instructions = backend.extension("cpu").isa()
    except backend.BackendUnavailableError:
        instructions = "unknown: mmfast's cpu module tells"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("platform", platform.platform()),
        ("processor", processor()),
        ("instruction set", instructions),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS or torch.set_num_threads changes it)"),
        ("GPUs", ", ".join(gpus) or "none that torch can use"),
    ]


def processor() -> str:
    """Return the name of the CPU and its architecture."""
    # Only Linux has this file, and there are sandboxes that hide it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def ops() -> list[str]:
    """Return the stems of all ops."""
    from mmfast import ops as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[:1] != "_")


def _backends(width: int) -> list[tuple[str, str]]:
    stems, lines = ops(), []
    for name in backend.BACKENDS:
        reason = backend.why_not(name)
        if reason is not None:
            lines.append((name, f"not available: {reason}"))
            continue
        have = [op for op in stems if backend.implements(name, op)]
        listed = "all ops" if have == stems else ", ".join(have) or "no op yet"
        indent = "\n" + " " * 13
        lines.append((name, f"available: {_wrap(listed, width - 24, indent)}"))
    return lines


def _wrap(text: str, width: int, indent: str) -> str:
    import textwrap

    return indent.join(textwrap.wrap(text, max(width, 30)))
