"""The C++ kernels of a processor that this machine has not, in the place of `mmfast._cpu`.

$MMFAST_TEST_FOREIGN is the command that runs them: an emulator and the program of tests/foreign, as
tools/aarch64 builds it. Every call's tensors, those whose `data_ptr` was asked for and that are still alive,
are copied there and back.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shlex
import struct
import subprocess
import sys
import weakref
from array import array
from typing import Any

from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops import _partial_reinit_table

VARIABLE = "MMFAST_TEST_FOREIGN"


class ForeignModule:
    """What `mmfast._cpu` is, in another process."""

    def __init__(self, command: list[str]) -> None:
        self.interface = _backend._INTERFACE
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Address -> what lives there, and its bytes.
        self._shown: dict[int, tuple[weakref.ref, int]] = {}
        self._tables: set[int] = set()
        for index in range(self._integer()):
            name = self._read(self._integer()).decode()
            is_real = self._read(self._integer())
            setattr(self, name, functools.partial(self._call, name, index, is_real))

    def isa(self) -> str:
        """Return the name of the instruction set, which decides nothing."""
        return "foreign"

    def supported_isas(self) -> list[str]:
        """Return that there is no choice."""
        return [self.isa()]

    def show(self, tensor: Tensor, address: int) -> None:
        """Let calls touch the elements of `tensor` while it lives."""
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_bytes = (extent + 1) * tensor.element_size() if tensor.numel() else 0
        known = self._shown.get(address)
        if address == 0:
            return
        if known is None or known[0]() is None or known[1] < num_bytes:
            self._shown[address] = (weakref.ref(tensor), num_bytes)

    def show_table(self, table: array, address: int) -> None:
        """Let calls read numbers, and addresses of tensors, in an array while it lives."""
        self._shown[address] = (weakref.ref(table), len(table) * table.itemsize)
        self._tables.add(address)

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(count)
        if len(found) < count:
            raise RuntimeError(f"the emulated process ended with status {self._process.wait()}")
        return found

    def _integer(self) -> int:
        return struct.unpack("<q", self._read(8))[0]

    def _call(self, name: str, index: int, is_real: bytes, *values: Any) -> int | tuple[int, ...] | None:
        if len(values) != len(is_real):
            raise TypeError(f"{name} takes {len(is_real)} arguments, got {len(values)}")
        self._shown = {at: known for at, known in self._shown.items() if known[0]() is not None}
        self._tables &= self._shown.keys()
        places: dict[int, int] = {}  # address -> number of its piece
        packed = []
        for value, real in zip(values, is_real, strict=True):
            address = None if real else self._piece_of(value)
            if address is None:
                packed.append(struct.pack("<qd" if real else "<qq", -1, value))
            else:
                packed.append(struct.pack("<qq", places.setdefault(address, len(places)), value - address))
        links = []
        for table in [address for address in places if address in self._tables]:
            words = struct.unpack(f"<{self._shown[table][1] // 8}q", self._memory(table))
            for number, word in enumerate(words):
                if (address := self._piece_of(word)) is not None:
                    target = places.setdefault(address, len(places))
                    links.append(struct.pack("<4q", places[table], 8 * number, target, word - address))
        sent = [self._memory(address) for address in places]
        request = [struct.pack("<qq", index, len(sent))]
        for data in sent:
            request += [struct.pack("<q", len(data)), data]
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join([*request, struct.pack("<q", len(links)), *links, *packed]))
        self._process.stdin.flush()
        error = self._read(self._integer()).decode()
        results = struct.unpack(f"<{(count := self._integer())}q", self._read(8 * count))
        for address, before in zip(places, sent, strict=True):
            after = self._read(len(before))
            if after != before and address not in self._tables:
                ctypes.memmove(address, after, len(after))
        if error:
            raise ValueError(error)
        return None if not results else results[0] if len(results) == 1 else results

    def _memory(self, address: int) -> bytes:
        return ctypes.string_at(address, self._shown[address][1])

    def _piece_of(self, value: int) -> int | None:
        """Return where what lives at an address begins, if anything that was shown does."""
        if value in self._shown:
            return value
        for address, (_, size) in self._shown.items():
            if address < value < address + size:
                return address
        return None


def put_in_place() -> None:
    """Let the backend "cpu" be what $MMFAST_TEST_FOREIGN runs, if that is set, until the process ends."""
    if VARIABLE not in os.environ:
        return
    module = ForeignModule(shlex.split(os.environ[VARIABLE]))
    data_ptr, load_extension = Tensor.data_ptr, _backend._load_extension

    class Table(array):
        def buffer_info(self) -> tuple[int, int]:
            address, length = super().buffer_info()
            module.show_table(self, address)
            return address, length

        def __mul__(self, count: int) -> Table:
            return Table(self.typecode, super().__mul__(count))

    def shown_data_ptr(tensor: Tensor) -> int:
        address = data_ptr(tensor)
        if tensor.device.type == "cpu":
            module.show(tensor, address)
        return address

    Tensor.data_ptr = shown_data_ptr  # type: ignore[method-assign]
    _backend._load_extension = lambda name: module if name == "cpu" else load_extension(name)
    importlib.import_module("mmfast.ops")
    for name, loaded in list(sys.modules.items()):
        if name.startswith("mmfast.ops.") and vars(loaded).get("array") is array:
            loaded.array = Table  # type: ignore[attr-defined]
    # Lists of tensors are read by data_ptr, too.
    _partial_reinit_table._reader = lambda: None
