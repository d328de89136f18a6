"""Arrays of an `.npz` archive, read block by block.

They are read, not mapped: a mapped file that is cut while it is used ends the program, and reading shows by
the checksum whether the file is damaged. Compressed members are read in the same way.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy

from mmfast.data.features import Block, Features, row_blocks

# What numpy, zipfile and zlib raise for damaged files; zipfile NotImplementedError for methods of compression
# it does not know.
BROKEN = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# Bytes of a member that are read at a time, and that numpy counts in where one ends too early.
_PIECE = 2**18
# Bytes that are read at a time where samples are the last axis in the file. Of a single column each number
# would be written a sample's length after the one before.
_COLUMNS = 2**26


class Member(Features):
    """An array of real numbers in an archive, which stays open as long as this is used.

    Args:
        archive: the archive.
        name: of the file in it.
        key: of the array in errors.
        header: its shape, whether the first axis varies fastest in the file, and its dtype.
        axes: of the array in the file, in the order in which they are given.
    """

    def __init__(
        self,
        archive: zipfile.ZipFile,
        name: str,
        key: str,
        header: tuple[tuple[int, ...], bool, np.dtype],
        axes: Sequence[int] | None = None,
    ) -> None:
        stored, self._fortran, dtype = header
        self._axes = tuple(range(len(stored))) if axes is None else tuple(axes)
        super().__init__([stored[axis] for axis in self._axes], dtype)
        self._archive, self._name, self._key, self._header = archive, name, key, header

    def permute(self, axes: Sequence[int]) -> Member:
        """Return the array with its axes in another order, of which the first stays the first."""
        order = [self._axes[axis] for axis in axes]
        return Member(self._archive, self._name, self._key, self._header, order)

    def blocks(self) -> Iterator[Block]:
        """Yield all numbers once, as often as this is called.

        Raises:
            ValueError: the member is damaged.
        """
        blocks = self._columns() if self._fortran else self._rows()
        while True:
            try:
                block = next(blocks, None)
            except BROKEN as error:
                raise ValueError(f"array {self._key!r} is damaged: {error}") from error
            if block is None:
                return
            yield block

    def _rows(self) -> Iterator[Block]:
        (size, *rest), _, dtype = self._header
        with self._archive.open(self._name) as stream:
            read_header(stream)
            numbers = _Numbers(stream, dtype, size * int(np.prod(rest)))
            for rows in row_blocks(size, dtype.itemsize * int(np.prod(rest))):
                block = numbers.read((rows.stop - rows.start, *rest))
                yield rows, (), block.transpose(self._axes)

    def _columns(self) -> Iterator[Block]:
        """Yield blocks of an array that lies in the file with its axes reversed: the last one comes first."""
        (size, *rest, last), _, dtype = self._header
        per_column = dtype.itemsize * size * int(np.prod(rest))
        place = self._axes.index(len(rest) + 1) - 1
        with self._archive.open(self._name) as stream:
            read_header(stream)
            numbers = _Numbers(stream, dtype, size * int(np.prod(rest)) * last)
            for columns in row_blocks(last, per_column, _COLUMNS):
                count = columns.stop - columns.start
                whole = numbers.read((count, *reversed(rest), size)).T  # [N, ..., count]
                index = (*[slice(None)] * place, columns)
                for rows in row_blocks(size, whole.nbytes // max(1, size)):
                    yield rows, index, whole[rows].transpose(self._axes)


class _Numbers:
    """The numbers of an array, `total` of them, from a stream that stands at the first."""

    def __init__(self, stream: Any, dtype: np.dtype, total: int) -> None:
        self._stream, self._dtype = stream, dtype
        self._done, self._bytes = 0, total * dtype.itemsize

    def read(self, shape: Sequence[int]) -> np.ndarray:  # [shape]
        """Return the next ones; raise what numpy raises where the stream ends before."""
        content = memoryview(bytearray(self._dtype.itemsize * int(np.prod(shape))))
        for piece in row_blocks(len(content), 1, _PIECE):
            read = self._stream.read(piece.stop - piece.start)
            self._done += len(read)
            if len(read) < piece.stop - piece.start:
                begun = self._done // _PIECE * _PIECE
                wanted, got = min(_PIECE, self._bytes - begun), self._done - begun
                raise ValueError(f"EOF: reading array data, expected {wanted} bytes got {got}")
            content[piece] = read
        return np.frombuffer(content, self._dtype).reshape(shape)


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Return the header of the array at a stream's beginning, None where it is of a rare version."""
    read = _HEADERS.get(npy.read_magic(stream))
    return None if read is None else read(stream)
