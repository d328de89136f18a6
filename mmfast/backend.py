"""What can run here, what is chosen, and why not: the only module that imports by name at run time.

Nothing is probed at import. A compiled module, or triton, is looked for when an op first needs it or when
`mmfast info` asks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from mmfast.errors import describe

BACKENDS = ("reference", "cpu", "triton", "cuda")


# What "auto" takes on each kind of device, fastest first: the first that is there and takes the dtype, and
# plain torch where none does. Measured for every op (bench/results): on the CPU ours takes less time than
# torch.compile and the peers, but for many small tensors of partial_reinit_ and the sizes in PLAIN_UP_TO; on
# an H100 cuda took 0.1-1.0 of Triton's time in every op that has both.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class OtherOrder(NamedTuple):
    """Another order for some of an op's calls on a GPU."""

    order: tuple[str, ...]
    itemsize: int  # of the dtypes that are meant
    capability: tuple[int, int]  # from this compute capability on


# From here on Triton multiplies half precision with tcgen05, of which the CUDA kernels know nothing; their
# mma.sync reaches a fraction of that rate.
_TCGEN05 = OtherOrder(("triton", "cuda"), itemsize=2, capability=(10, 0))
# Measured, or following from what a kernel is built on.
_EXCEPTIONS = {"duc_loss": _TCGEN05, "sigmoid_loss": _TCGEN05}


class PlainUpTo(NamedTuple):
    """The sizes up to which plain torch takes less time than a call of ours, for "auto"."""

    rows: int
    columns: int


# By op and kind of device, float32 and float64 only: in half precision plain torch rounds more. Meant are
# one pair alone (unidirectional_info_nce) and project_gradient. Microseconds of plain torch and of ours, the
# first with gradient (d = 128) on two CPU cores: 42 and 48 at N = 16, 60 and 60 at 64, 107 and 99 at 128. On
# a GPU the host's time until all is handed over is all there is at such sizes: the first takes 48 and 86
# (CUDA), the second 1.5 and 30 (Triton).
PLAIN_UP_TO = {
    ("duc_loss", "cpu"): PlainUpTo(64, 512),
    ("duc_loss", "cuda"): PlainUpTo(128, 512),
    ("gradient_projection", "cuda"): PlainUpTo(64, 1024),
}


def is_plain_faster(
    op: str,  # stem of the op's files
    x: torch.Tensor,  # [rows, columns]
) -> bool:
    """Return whether "auto" leaves a call to plain torch: few elements, and as exact.

    Under torch.compile, which would make one graph below the bound and one above it, nothing is left to it.
    """
    device_type = "cpu" if x.is_cpu else x.device.type
    bound = PLAIN_UP_TO.get((op, device_type))
    is_wide = x.dtype in (torch.float32, torch.float64)
    # What is preferred for a while is the backend's, whose reference never holds a large N x N matrix.
    if bound is None or not is_wide or torch.compiler.is_compiling() or _preferred is not None:
        return False
    is_plain = (
        x.shape[0] <= bound.rows
        and x.shape[1] <= bound.columns
        and not torch.is_autocast_enabled(device_type)
        and not _rounds_products()
    )
    if is_plain and _noted is not None:
        _noted.add("reference")
    return is_plain


def _rounds_products() -> bool:
    """Return whether torch may multiply float32 in fewer bits, which would be less exact than ours."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # Set by torch's newer options, whose values take ten times as long to read.
        return True


# What `preferring` names.
_preferred: str | None = None
# What `noting` gathers.
_noted: set[str] | None = None


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


# That of csrc/registry.h. 5: built_by, and nvcc of the cuda module.
_INTERFACE = 5


@functools.cache
def _load_extension(name: str) -> ModuleType | str:
    try:
        module = importlib.import_module(f"mmfast._{name}")
        if getattr(module, "interface", 1) != _INTERFACE:
            return f"the {name} module was built from other sources than these: install mmfast again"
        return module
    except ModuleNotFoundError:
        if reason := bare_checkout():
            return reason
        if not sys.platform.startswith("linux"):
            return f"mmfast compiles nothing on {sys.platform}: every op runs in plain torch"
        switch = f"MMFAST_{name.upper()}=1"
        return f"mmfast was installed without its {name} module: build it with {switch}, which says why not"
    except ImportError as error:
        if "MMFAST_CPU_ISA" in os.environ and name == "cpu":
            # What was asked for and cannot be had must not turn into plain torch without a word.
            raise
        return f"the {name} module does not load: {error}"


def bare_checkout() -> str | None:
    """Return None for what pip installed, else that this is a folder of sources, and the mend, in a sentence.

    The sources hold neither compiled modules nor `mmfast.kernels`, which lies outside of them. An install
    without a compiler has the latter, and one that is editable finds it where it lies.
    """
    if importlib.util.find_spec("mmfast.kernels") is not None:
        return None
    clone = Path(__file__).parent.parent
    # An empty entry of the path is the folder Python was started in.
    installed = [
        package
        for package in (Path(entry or os.curdir, "mmfast") for entry in sys.path)
        if (package / "__init__.py").exists() and (package / "kernels").exists()
    ]
    if not installed:
        return f"{clone} is a bare checkout without kernels: run `pip install -e .` in it"
    here = Path("mmfast", Path(__file__).name)
    is_here = here.exists() and here.samefile(__file__)
    first = "the folder Python was started in" if is_here else "which comes first on Python's path"
    return (
        f"the mmfast installed in {installed[0].parent} is hidden by the bare checkout {clone}, {first}: "
        "leave the clone before you start Python, or run `pip install -e .` in it"
    )


@functools.cache
def _warn_of_bare_checkout() -> None:
    """Say once that plain torch runs for want of an install; where this is one, say nothing."""
    if reason := bare_checkout():
        text = f"plain torch runs in place of mmfast's kernels, many times slower: {reason}"
        warnings.warn(text, stacklevel=1 + _depth())


def _depth() -> int:
    """Return how many frames above the caller's lies the code that called an op: not ours, not torch's."""
    inner = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))
    frame, depth = sys._getframe(1).f_back, 1
    while frame is not None and frame.f_code.co_filename.startswith(inner):
        frame, depth = frame.f_back, depth + 1
    return depth


def extension(name: str) -> ModuleType:
    """Return the compiled module `mmfast._cpu` or `mmfast._cuda`, or raise with the reason it is missing."""
    module = _load_extension(name)
    if isinstance(module, str):
        raise BackendUnavailableError(f"backend {name!r} cannot run: {module}")
    return module


@functools.cache
def kernels(op: str) -> ModuleType:
    """Return the module of Triton kernels `mmfast.kernels.<op>`."""
    return importlib.import_module(f"mmfast.kernels.{op}")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors, instead of on a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if reason := bare_checkout():
        return reason
    if not interpreting() and not torch.cuda.is_available():
        return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def why_not(backend: str) -> str | None:
    """Return None if `backend` can run on this machine, else the reason in one sentence."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _why_not_triton()
    module = _load_extension(backend)
    if isinstance(module, str):
        return module
    # AMD's GPUs, too, are called cuda by torch, and run nothing that nvcc has built.
    if backend == "cuda" and (torch.version.hip is not None or not torch.cuda.is_available()):
        return "no NVIDIA GPU that torch can use"
    return None


# By stem of an op's files, the backends that have a function for each of its raw ops.
_IMPLEMENTED: dict[str, set[str]] = {}


def register(
    op: str,  # stem of the op's files
    backends: Iterable[str],
) -> None:
    """Note which backends have a raw op of `op`: mmfast/ops/_registration.py says so of each."""
    _IMPLEMENTED.setdefault(op, set(BACKENDS)).intersection_update(backends)


def implements(backend: str, op: str) -> bool:
    """Whether `backend` has a kernel for the op of stem `op`: in its table and, of Triton, in a file."""
    if not _IMPLEMENTED:
        importlib.import_module("mmfast.ops")
    if backend not in _IMPLEMENTED.get(op, ("reference",)):
        return False
    return backend != "triton" or importlib.util.find_spec(f"mmfast.kernels.{op}") is not None


def _why_not_here(backend: str, op: str, device_type: str) -> str | None:
    reason = why_not(backend)
    if reason is not None:
        return reason
    if not implements(backend, op):
        return f"there is no {backend} kernel for {op} yet"
    fits = {"cpu": device_type == "cpu", "cuda": device_type == "cuda"}
    fits["triton"] = device_type == ("cpu" if interpreting() else "cuda")
    if not fits.get(backend, True):
        return f"it does not take tensors on {device_type!r}"
    return None


def resolve(
    op: str,  # stem of the op's files
    backend: str,
    device_type: str,  # torch.device.type of the tensors
    dtype: torch.dtype,
) -> str:
    """Return the backend that runs `op`: the one named, or for "auto" the preferred one that can.

    Raises:
        ValueError: `backend` is no backend's name.
        BackendUnavailableError: a backend named by the caller cannot run; the message says why.
    """
    # The interpreter can be switched while Python runs. Reading the environment costs more than the rest:
    # ordinary calls on the CPU, which never take Triton, do without.
    ordinary = device_type == "cpu" and backend != "triton"
    return _resolve(op, backend, device_type, dtype, not ordinary and interpreting(), _preferred)


def choose(
    op: str,  # stem of the op's files
    backend: str,
    tensor: torch.Tensor,
) -> str:
    """Return `resolve` for a tensor's device and dtype."""
    # What a tensor's device is called takes five times as long to learn as whether it is the CPU, where only
    # a call of Triton by name asks whether kernels are interpreted.
    if tensor.is_cpu and backend != "triton":
        return _resolve(op, backend, "cpu", tensor.dtype, False, _preferred)
    return resolve(op, backend, tensor.device.type, tensor.dtype)


def choose_for_all(
    op: str,  # stem of the op's files
    backend: str,
    tensors: Sequence[torch.Tensor],
) -> str:
    """Return `choose` for the tensors of one call, plain torch where they disagree.

    A list over CPU and GPU is one: kernels would each see a part of it.
    """
    if len(tensors) == 1:
        return choose(op, backend, tensors[0])
    devices, dtypes = {tensor.device for tensor in tensors}, {tensor.dtype for tensor in tensors}
    chosen = {
        resolve(op, backend, device.type, dtype) for device, dtype in itertools.product(devices, dtypes)
    }
    return chosen.pop() if len(chosen) == 1 else "reference"


@functools.cache
def _resolve(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    _interpreted: bool,
    preferred: str | None,
) -> str:
    if backend == "auto":
        found = candidates(op, device_type, dtype)
        chosen = preferred if preferred is not None and preferred in found else found[0]
        # Here, behind the cache, where no later call comes by.
        if chosen == "reference" != preferred:
            _warn_of_bare_checkout()
        return _note(chosen)
    check_name(backend)
    reason = _why_not_here(backend, op, device_type)
    if reason is None and not supports(backend, op, dtype):
        reason = f"its {op} kernel does not take {dtype}"
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} cannot run {op}: {reason}")
    return _note(backend)


def _note(chosen: str) -> str:
    if _noted is not None:
        _noted.add(chosen)
    return chosen


def candidates(op: str, device_type: str, dtype: torch.dtype) -> list[str]:
    """Return the backends that can run `op`, the one "auto" takes first, plain torch last."""
    found = [
        name
        for name in _order(op, device_type, dtype)
        if _why_not_here(name, op, device_type) is None and supports(name, op, dtype)
    ]
    return [*found, "reference"]


def _order(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    other = _EXCEPTIONS.get(op)
    if other is None or device_type != "cuda" or dtype.itemsize != other.itemsize:
        return _ORDER.get(device_type, ())
    is_newer = torch.cuda.is_available() and torch.cuda.get_device_capability() >= other.capability
    return other.order if is_newer else _ORDER[device_type]


@contextlib.contextmanager
def preferring(name: str) -> Iterator[None]:
    """Let "auto" take the backend `name` for a while, where it can run the op: to time it beside others."""
    global _preferred
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


@contextlib.contextmanager
def noting() -> Iterator[set[str]]:
    """Gather the backends that run ops for a while, which is what a benchmark says of its figures."""
    global _noted
    before, _noted = _noted, set()
    # What was resolved before must be again to be seen, so that calls pay nothing for this at other times.
    _resolve.cache_clear()
    try:
        yield _noted
    finally:
        _noted = before


def supports(backend: str, op: str, dtype: torch.dtype) -> bool:
    """Whether the kernel of `op` in `backend` computes in `dtype`."""
    if backend == "triton" and interpreting():
        # Triton's interpreter rounds bfloat16 wrongly: a result from it would not be the kernel's.
        return dtype != torch.bfloat16
    return True


def stream_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the index of a GPU tensor's device and the handle of the stream work on it goes to."""
    index = tensor.get_device()
    # What torch.cuda.current_stream wraps in an object, which takes ten times as long.
    return index, torch._C._cuda_getCurrentRawStream(index)


def where(chosen: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a compiled kernel's last arguments: threads, or on a GPU the device and its stream."""
    return (torch.get_num_threads(),) if chosen == "cpu" else stream_of(tensor)


def check_name(backend: str) -> None:
    """Raise ValueError if `backend` names no backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {", ".join(BACKENDS)}, got {describe(backend)}')
