"""The CUDA kernels compiled as C++ and run on the CPU: what the backend `cuda-emulated` of the tests is.

tests/cuda_emulation says how. Here the library is built, once for each state of the sources, and put in the
place of `mmfast._cuda` for a test. Kernels may touch those bytes only that belong to a tensor whose
`data_ptr` was asked for and that is still alive; outputs begin as NaN.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops import _partial_reinit_table

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "tests/cuda_emulation", ROOT / "csrc/cuda"]
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-DMMFAST_EMULATED", "-g1", "-w"]
FLAGS += [f"-I{folder}" for folder in (ROOT / "csrc", *SOURCES)]
# The compiler announces every access; nothing of its own library is linked.
CHECKED = ["-O1", "-fsanitize=thread,alignment", "--param", "tsan-instrument-func-entry-exit=0", "-x", "c++"]


def compiler() -> list[str]:
    """Return the command of the C++ compiler, empty if there is none or the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return []
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else []


def _folder(kernels: list[Path]) -> Path:
    """Return where the library of these kernels lies: a new folder for every change."""
    digest = hashlib.sha256(repr((compiler(), FLAGS, CHECKED, kernels)).encode())
    folders = [ROOT / "csrc", *SOURCES]
    headers = [path for folder in folders for path in folder.iterdir()]
    for path in sorted(path for path in headers if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return Path(tempfile.gettempdir()) / f"mmfast-cuda-emulated-{os.getuid()}-{digest.hexdigest()[:16]}"


def _compile(source: Path, folder: Path) -> str:
    target = folder / f"{source.stem}.o"
    flags = CHECKED if source.suffix == ".cu" else ["-O2"]
    command = [*compiler(), *FLAGS, *flags, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return str(target)


def build(kernels: list[Path]) -> Path:
    """Return the library, compiled if need be; processes that ask at the same time wait for one."""
    import fcntl  # not on Windows

    folder = _folder(kernels)
    library = folder / "emulated.so"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = [*sorted(SOURCES[0].glob("*.cpp")), *kernels]
            try:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    objects = list(pool.map(lambda source: _compile(source, folder), sources))
                partial = folder / "partial.so"
                command = [*compiler(), "-shared", "-Wl,-z,defs", *objects, "-o", str(partial)]
                subprocess.run(command, check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"the emulated CUDA kernels do not compile:\n{error.stderr}") from None
            partial.rename(library)
    return library


class _Entry(ctypes.Structure):
    """struct Entry of csrc/registry.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("isa", ctypes.c_int),
        ("num_arguments", ctypes.c_int),
        ("num_results", ctypes.c_int),
        ("is_real", ctypes.POINTER(ctypes.c_bool)),
        ("call", ctypes.c_void_p),
    )


class _Argument(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double))


class EmulatedModule:
    """What `mmfast._cuda` is, on CPU tensors.

    Attributes:
        compute_capability: the major number that launchers see.
        num_sms: multiprocessors that they see; few, so that persistent blocks loop.
        seed: of the order in which threads and blocks run.
    """

    def __init__(self, kernels: list[Path]) -> None:
        self.compute_capability, self.num_sms, self.seed = 8, 2, 0
        self._shown: list[tuple[weakref.ref, int, int]] = []
        self._library = ctypes.CDLL(str(build(kernels)))
        self._library.mmfast_emulated_entry.restype = ctypes.POINTER(_Entry)
        index = 0
        while entry := self._library.mmfast_emulated_entry(index):
            name = entry.contents.name.decode()
            setattr(self, name, functools.partial(self._call, entry))
            index += 1

    def show(self, tensor: Tensor, address: int) -> None:
        """Let kernels touch the elements of `tensor` while it lives."""
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_bytes = (extent + 1) * tensor.element_size() if tensor.numel() else 0
        self._shown.append((weakref.ref(tensor), address, num_bytes))

    def _call(self, entry, *values: float) -> int | tuple[int, ...] | None:
        record = entry.contents
        if len(values) != record.num_arguments:
            name = record.name.decode()
            raise TypeError(f"{name} takes {record.num_arguments} arguments, got {len(values)}")
        arguments, results = (_Argument * len(values))(), (ctypes.c_int64 * record.num_results)()
        for index, value in enumerate(values):
            setattr(arguments[index], "real" if record.is_real[index] else "integer", value)
        self._shown = [shown for shown in self._shown if shown[0]() is not None]
        ranges = [number for _, *numbers in self._shown for number in numbers]
        text = ctypes.create_string_buffer(1000)
        status = self._library.mmfast_emulated_call(
            entry,
            arguments,
            results,
            (ctypes.c_int64 * len(ranges))(*ranges),
            ctypes.c_int64(len(self._shown)),
            self.compute_capability,
            self.num_sms,
            self.seed,
            text,
            ctypes.c_int64(len(text)),
        )
        if status:
            raise (ValueError if status == 1 else RuntimeError)(text.value.decode())
        return None if not results else results[0] if len(results) == 1 else tuple(results)


@functools.cache
def _module() -> EmulatedModule:
    return EmulatedModule(sorted((ROOT / "csrc/cuda").glob("*.cu")))


@contextmanager
def emulated() -> Iterator[EmulatedModule]:
    """Let the backend "cuda" run on CPU tensors, in the emulation, for a while."""
    module = _module()
    module.compute_capability, module.num_sms, module.seed, module._shown = 8, 2, 0, []
    data_ptr, why_not, why_not_here = Tensor.data_ptr, _backend.why_not, _backend._why_not_here
    load_extension = _backend._load_extension
    deterministic = torch.are_deterministic_algorithms_enabled()

    def shown_data_ptr(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        if tensor.device.type == "cpu":
            module.show(tensor, address)
        return address

    def why_not_emulated(_backend_name: str, op: str, *_: object) -> str | None:
        return None if _backend.implements("cuda", op) else f"there is no cuda kernel for {op}"

    def without(function: Callable, instead: Callable) -> Callable:
        """Return `function` but for the backend "cuda"."""
        return lambda backend, *rest: (instead if backend == "cuda" else function)(backend, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "data_ptr", shown_data_ptr)
        patch.setattr(_backend, "why_not", without(why_not, lambda _: None))
        patch.setattr(_backend, "_why_not_here", without(why_not_here, why_not_emulated))
        patch.setattr(_backend, "_load_extension", without(load_extension, lambda _: module))
        patch.setattr(_backend, "stream_of", lambda tensor: (0, 0))
        # Lists of tensors are read by data_ptr, too.
        patch.setattr(_partial_reinit_table, "_reader", lambda: None)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        _backend._resolve.cache_clear()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield module
        finally:
            torch.use_deterministic_algorithms(deterministic)
    _backend._resolve.cache_clear()
