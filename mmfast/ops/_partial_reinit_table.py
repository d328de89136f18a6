"""What a list of pairs comes to once it was looked at: addresses and sizes for the CPU, records on a GPU.

A list is known again by its words: all that address, shape, strides, dtype and device of every tensor say.
"""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import CLASSES, is_ordinary
from mmfast.ops._launch import DTYPE_CODE


@functools.cache
def _reader() -> tuple | None:
    """Return what reads tensors in C++, in a fifth of Python's time, or None where that is not to be had.

    torch 2.10 and later have DLPack's exchange table.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or _backend.why_not("cpu") is not None:
        return None
    module = _backend.extension("cpu")
    return None if module.tensor_words(capsule, [], [], CLASSES) is None else (module, capsule)


def words_of(params: list[Tensor], init_params: list[Tensor]) -> Hashable | None:
    """Return what two lists are known by; None where only the dispatcher knows what to do with them."""
    if not is_ordinary():
        return None
    if (reader := _reader()) is not None:
        module, capsule = reader
        return module.tensor_words(capsule, params, init_params, CLASSES)
    tensors = params + init_params
    if not set(map(type, tensors)).issubset(CLASSES):
        return None
    try:
        return (
            len(params),
            *map(Tensor.data_ptr, tensors),
            *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors),
        )
    except RuntimeError:
        # Sparse, or of a function under torch.func.
        return None


def has_words(params: list[Tensor], init_params: list[Tensor], words: Hashable) -> bool:
    """Return whether `words_of` would return these words."""
    if isinstance(words, bytes) and (reader := _reader()) is not None:
        module, capsule = reader
        return is_ordinary() and module.has_tensor_words(capsule, params, init_params, CLASSES, words)
    return words_of(params, init_params) == words


def note_change(params: list[Tensor]) -> None:
    """Have a backward that saved the old values notice: kernels write behind autograd's back."""
    try:
        torch.autograd.graph.increment_version(params)
    except RuntimeError:
        # What inference mode made has no version.
        torch.autograd.graph.increment_version([theta for theta in params if not theta.is_inference()])


def meet(addresses: Sequence[int], nbytes: Sequence[int]) -> bool:  # [2 P], [P] or [2 P]
    """Whether any two pieces of memory have a byte in common."""
    # Where all are apart, each ends before the next begins, so that both may be sorted for themselves.
    begins = np.sort(np.array(addresses, dtype=np.int64))
    ends = np.array(addresses, dtype=np.int64) + np.resize(np.array(nbytes, dtype=np.int64), len(addresses))
    ends.sort()
    return bool((ends[:-1] > begins[1:]).any())


# A record on a GPU, of which the kernels serve one each: struct Piece of csrc/cuda/partial_reinit.cu.
_PIECE = np.dtype(
    [
        ("theta", np.int64),
        ("theta_0", np.int64),
        ("alpha", np.float64),
        ("count", np.int32),
        ("dtype", np.int32),
    ]
)
# In the place of a strength for all: each record's own.
_OWN = -1.0
# What a table keeps on a device, by strengths and stream, the least recently made first.
_MAX_PLANS = 16
# Plans that captured graphs read at every replay, which nobody can see the end of.
_CAPTURED: list[Tensor] = []


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Table:
    """Addresses and sizes of pairs that lie alike in memory; it holds no tensor but its own records."""

    def __init__(
        self,
        params: list[Tensor],  # P tensors
        init_params: list[Tensor],  # P tensors of the same shapes, dtypes and devices, in the same order
    ):
        # Arrays of Python's: the addresses of NumPy's take microseconds to learn.
        self.addresses = array("q", [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, init_params)])
        self.sizes = array("q", map(Tensor.numel, params))
        self.dtypes = [theta.dtype for theta in params]
        self.devices = [theta.device for theta in params]
        self.codes = array("q", map(DTYPE_CODE.__getitem__, self.dtypes))
        self.itemsizes = array("q", map(Tensor.element_size, params))
        self.kinds = {(device.type, dtype) for device, dtype in zip(self.devices, self.dtypes, strict=True)}
        # Whether the public function has looked at shapes, dtypes and devices, which the raw op does not.
        self.is_checked = False
        # The same tensor twice shows in its address, unless it is empty.
        self.has_empty = 0 in self.sizes
        self.plans: dict[tuple, Tensor] = {}
        self._members: dict[str, list[np.ndarray]] = {}

    def meets(self) -> bool:
        """Whether two of the tensors have a byte in common."""
        return meet(self.addresses, array("q", map(operator.mul, self.sizes, self.itemsizes)))

    def choose(self, backend: str) -> str:
        """Return the backend that runs all pairs, plain torch where they disagree."""
        chosen = {_backend.resolve("partial_reinit", backend, *kind) for kind in self.kinds}
        return chosen.pop() if len(chosen) == 1 else "reference"

    def run(
        self,
        backend: str,
        params: list[Tensor],  # P, those of the table or others in their place
        alpha: float | list[float],  # one strength, or P
    ) -> None:
        """Run the kernel of a backend; autograd hears nothing of it."""
        if backend == "cpu":
            self._run_cpu(alpha)
            return
        for number, members in enumerate(self._groups(backend)):
            own = None if isinstance(alpha, float) else np.array(alpha)[members]
            if alpha == 0:
                continue
            strength = alpha if isinstance(alpha, float) else _OWN
            plan = self._plan(backend, number, own, params[members[0]])
            if backend == "cuda":
                launch = _backend.extension("cuda").partial_reinit
                launch(plan.data_ptr(), len(plan), strength, *_backend.stream_of(plan))
            else:
                _backend.kernels("partial_reinit").partial_reinit_(plan, self.dtypes[members[0]], strength)

    def _run_cpu(self, alpha: float | list[float]) -> None:
        count = len(self.sizes)
        strengths = array("d", [alpha]) * count if isinstance(alpha, float) else array("d", alpha)
        address, length = self.addresses.buffer_info()
        _backend.extension("cpu").partial_reinit(
            address,
            address + length // 2 * self.addresses.itemsize,
            self.sizes.buffer_info()[0],
            strengths.buffer_info()[0],
            self.codes.buffer_info()[0],
            count,
            torch.get_num_threads(),
        )

    def _groups(self, backend: str) -> list[np.ndarray]:
        """Return the places of the tensors that one launch serves, launch by launch."""
        found = self._members.get(backend)
        if found is None:
            members: dict[Hashable, list[int]] = {}
            # A Triton kernel is compiled for one dtype.
            with_dtype = backend == "triton"
            for index, (device, dtype) in enumerate(zip(self.devices, self.dtypes, strict=True)):
                members.setdefault((device, dtype if with_dtype else None), []).append(index)
            found = self._members[backend] = [np.array(part) for part in members.values()]
        return found

    def _plan(
        self,
        backend: str,
        number: int,  # of the launch
        own: np.ndarray | None,  # float64: strengths of its tensors; None: one for all, given at the launch
        first: Tensor,  # of its tensors, on the device
    ) -> Tensor:  # int64 [pieces, 4]
        """Return the records of a launch on the device."""
        stream = _backend.stream_of(first)[1] if first.is_cuda else 0
        key = (backend, number, None if own is None else own.tobytes(), stream)
        is_capturing = _is_capturing(first)
        plan = self.plans.get(key)
        if plan is None and is_capturing:
            # What another stream copied before the capture began is there when a replay reads it.
            plan = next((kept for other, kept in self.plans.items() if other[:-1] == key[:-1]), None)
        if plan is None:
            pieces = self._pieces(backend, self._groups(backend)[number], own)
            words = torch.from_numpy(pieces.view(np.int64)).view(-1, 4)
            if is_capturing:
                # A graph would copy from the host's memory again at each replay; a kernel's arguments it
                # keeps.
                plan = torch.empty_like(words, device=first.device)
                self._write(backend, self._groups(backend)[number], own, words, plan)
            else:
                plan = words.pin_memory().to(first.device, non_blocking=True) if first.is_cuda else words
                while len(self.plans) >= _MAX_PLANS:
                    self.plans.pop(next(iter(self.plans)), None)
                self.plans[key] = plan
        if is_capturing:
            _CAPTURED.append(plan)
        return plan

    def _pieces(
        self,
        backend: str,
        members: np.ndarray,  # places of tensors
        own: np.ndarray | None,  # float64: their strengths
    ) -> np.ndarray:  # [pieces] of _PIECE
        """Return the records of a launch; one that alpha = 0 leaves as it is has none."""
        if backend == "cuda":
            piece_bytes = _backend.extension("cuda").partial_reinit_piece_bytes()
        else:
            piece_bytes = _backend.kernels("partial_reinit").PIECE_BYTES
        addresses = np.array(self.addresses, dtype=np.int64).reshape(2, -1)[:, members]
        sizes, itemsizes, codes = (np.array(x)[members] for x in (self.sizes, self.itemsizes, self.codes))
        alphas = np.ones(len(members)) if own is None else own
        per_piece = piece_bytes // itemsizes
        counts = np.where(alphas == 0, 0, -(-sizes // per_piece))
        owner = np.repeat(np.arange(len(members)), counts)
        start = (np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)) * per_piece[owner]
        pieces = np.empty(len(owner), dtype=_PIECE)
        pieces["theta"], pieces["theta_0"] = addresses[:, owner] + start * itemsizes[owner]
        pieces["alpha"], pieces["dtype"] = alphas[owner], codes[owner]
        pieces["count"] = np.minimum(per_piece[owner], sizes[owner] - start)
        return pieces

    def _write(
        self,
        backend: str,
        members: np.ndarray,  # places of tensors
        own: np.ndarray | None,  # float64: their strengths
        words: Tensor,  # int64 [pieces, 4] on the host
        plan: Tensor,  # int64 [pieces, 4] on the device
    ) -> None:
        """Launch what fills a plan."""
        if backend == "cuda":
            launch = _backend.extension("cuda").partial_reinit_write_plan
            launch(words.data_ptr(), plan.data_ptr(), len(words), *_backend.stream_of(plan))
            return
        count = len(self.sizes)
        _backend.kernels("partial_reinit").write_plan(
            plan,
            self.dtypes[members[0]],
            [self.addresses[i] for i in members],
            [self.addresses[count + i] for i in members],
            [self.sizes[i] for i in members],
            [1.0] * len(members) if own is None else own.tolist(),
        )


# Tables by the words of their lists, the least recently made first: training hands over the same lists in
# every call.
_MAX_TABLES = 16
_TABLES: dict[Hashable, Table] = {}


def known(words: Hashable | None) -> Table | None:
    """Return the table kept for lists of these words."""
    return None if words is None else _TABLES.get(words)


def keep(words: Hashable, table: Table) -> None:
    """Keep a table for lists of these words."""
    while len(_TABLES) >= _MAX_TABLES:
        _TABLES.pop(next(iter(_TABLES)), None)
    _TABLES[words] = table
