"""Where partial re-initialisation runs: memory it may write, plans on a GPU, kernels of each backend."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Callable, Hashable, Iterator

import numpy as np
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._checks import check_apart
from mmfast.ops._launch import DTYPE_CODE
from mmfast.ops._registration import define
from mmfast.reference import partial_reinit as _reference


def _pointers(params: list[Tensor], init_params: list[Tensor]) -> np.ndarray:  # int64 [2, P]
    return np.array([[*map(Tensor.data_ptr, params)], [*map(Tensor.data_ptr, init_params)]], dtype=np.int64)


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (reach + 1) * tensor.element_size()


def _meet(pointers: np.ndarray, nbytes: np.ndarray) -> bool:  # int64 [2, P], int64 [P] or [2, P]
    """Whether any two pieces of memory have a byte in common."""
    return _overlap(pointers.tobytes(), nbytes.tobytes())


# Training hands over the same lists in every call.
@functools.lru_cache(maxsize=16)
def _overlap(addresses: bytes, lengths: bytes) -> bool:
    pointers, nbytes = (np.frombuffer(x, dtype=np.int64) for x in (addresses, lengths))
    # Where all are apart, each ends before the next begins, so that both may be sorted for themselves.
    begins, ends = np.sort(pointers), pointers + np.resize(nbytes, pointers.shape)
    ends.sort()
    return bool((ends[:-1] > begins[1:]).any())


# Steps of NumPy's search for an element that two tensors share; most need none.
_MAX_WORK = 10**6


class _Span:
    """A tensor's place in memory as NumPy takes it, which reads none of it."""

    def __init__(self, name: str, tensor: Tensor):
        shape, strides = tensor.shape, tensor.stride()
        item = tensor.element_size()
        self.name = name
        self.begin = tensor.data_ptr()
        self.end = self.begin + _extent(tensor)
        self.__array_interface__ = {
            "version": 3,
            "data": (self.begin, True),
            "shape": tuple(shape),
            "strides": tuple(stride * item for stride in strides),
            "typestr": f"|V{item}",
        }

    def meets(self, other: _Span) -> bool:
        """Whether an element of both is in the same place; also where that is too hard to tell."""
        if self.begin >= other.end or other.begin >= self.end:
            return False
        try:
            return np.shares_memory(np.asarray(self), np.asarray(other), max_work=_MAX_WORK)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True


def _check_memory(params: list[Tensor], init_params: list[Tensor]) -> None:
    """Raise ValueError where what is written shares memory with something else of the call."""
    spans = []
    for index, (theta, theta_0) in enumerate(zip(params, init_params, strict=True)):
        check_apart(f"params[{index}]", theta)
        spans.append((_Span(f"params[{index}]", theta), True, index))
        spans.append((_Span(f"init_params[{index}]", theta_0), False, index))
    current: list[tuple[_Span, bool, int]] = []
    for span, is_written, index in sorted(spans, key=lambda entry: entry[0].begin):
        current = [entry for entry in current if entry[0].end > span.begin]
        for other, is_other_written, other_index in current:
            if not (is_written or is_other_written) or not span.meets(other):
                continue
            is_pair = index == other_index and is_written != is_other_written
            if is_pair and span.__array_interface__ == other.__array_interface__:
                continue
            names = " and ".join(sorted((span.name, other.name), reverse=True))
            raise ValueError(f"{names} must not share memory: params are changed in place")
        current.append((span, is_written, index))


def _run_cpu(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
    # Arrays of Python's: the addresses of NumPy's take microseconds to learn.
    pointers = array("q", [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, init_params)])
    sizes = array("q", map(Tensor.numel, params))
    codes = array("q", [DTYPE_CODE[theta.dtype] for theta in params])
    nbytes = array("q", map(operator.mul, sizes, map(Tensor.element_size, params)))
    if _overlap(pointers.tobytes(), nbytes.tobytes()):
        _check_memory(params, init_params)
    strengths, (address, count) = array("d", alphas), pointers.buffer_info()
    _backend.extension("cpu").partial_reinit(
        address,
        address + count // 2 * pointers.itemsize,
        sizes.buffer_info()[0],
        strengths.buffer_info()[0],
        codes.buffer_info()[0],
        len(params),
        torch.get_num_threads(),
    )


# A record of a plan, of which the GPU kernels serve one each: struct Piece of csrc/cuda/partial_reinit.cu.
_PIECE = np.dtype(
    [
        ("theta", np.int64),
        ("theta_0", np.int64),
        ("alpha", np.float64),
        ("count", np.int32),
        ("dtype", np.int32),
    ]
)
# Plans on the device by what they hold, where, and the stream they were copied on, the least recently made
# first.
_MAX_PLANS = 16
_PLANS: dict[tuple, Tensor] = {}
# Plans that captured graphs read at every replay, which nobody can see the end of.
_CAPTURED: list[Tensor] = []


def _pieces(
    pointers: np.ndarray,  # int64 [2, P]: addresses of theta and theta_0
    sizes: np.ndarray,  # int64 [P]
    itemsizes: np.ndarray,  # int64 [P]
    codes: np.ndarray,  # int64 [P]
    alphas: np.ndarray,  # float64 [P]
    piece_bytes: int,
) -> np.ndarray:  # [pieces] of _PIECE
    """Return the records of all tensors; one that alpha = 0 leaves as it is has none."""
    per_piece = piece_bytes // itemsizes
    counts = np.where(alphas == 0, 0, -(-sizes // per_piece))
    owner = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)) * per_piece[owner]
    pieces = np.empty(len(owner), dtype=_PIECE)
    pieces["theta"], pieces["theta_0"] = pointers[:, owner] + start * itemsizes[owner]
    pieces["alpha"], pieces["dtype"] = alphas[owner], codes[owner]
    pieces["count"] = np.minimum(per_piece[owner], sizes[owner] - start)
    return pieces


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _plan(
    params: list[Tensor],  # P tensors on one device, dense in memory
    init_params: list[Tensor],  # P tensors in the same order in memory
    alphas: list[float],  # P
    piece_bytes: int,  # of a tensor that a record stands for
    write: Callable,  # takes the plan, its records on the host and the three lists; launches what fills it
) -> Tensor:  # int64 [pieces, 4]
    """Return the records on the device; the key holds all they follow from, so none can be out of date."""
    device = params[0].device
    place, stream = _backend.stream_of(params[0]) if device.type == "cuda" else (-1, 0)
    contents = (
        *map(Tensor.data_ptr, params),
        *map(Tensor.data_ptr, init_params),
        *map(Tensor.numel, params),
        *(DTYPE_CODE[theta.dtype] for theta in params),
        *alphas,
    )
    key = (contents, piece_bytes, place, stream)
    is_capturing = _is_capturing(params[0])
    plan = _PLANS.get(key)
    if plan is None and is_capturing:
        # What another stream copied before the capture began is there when a replay reads it.
        plan = next((kept for other, kept in _PLANS.items() if other[:-1] == key[:-1]), None)
    if plan is not None:
        if is_capturing:
            _CAPTURED.append(plan)
        return plan
    table = [contents[start : start + len(params)] for start in range(0, len(contents), len(params))]
    pointers, sizes, codes = (np.array(rows, dtype=np.int64) for rows in (table[:2], table[2], table[3]))
    itemsizes = np.array([theta.element_size() for theta in params], dtype=np.int64)
    # Once for a plan: what its key holds decides it.
    if _meet(pointers, sizes * itemsizes):
        _check_memory(params, init_params)
    pieces = _pieces(pointers, sizes, itemsizes, codes, np.array(alphas), piece_bytes)
    words = torch.from_numpy(pieces.view(np.int64)).view(-1, 4)
    if is_capturing:
        # A graph would copy from the host's memory again at each replay; a kernel's arguments it keeps.
        plan = torch.empty_like(words, device=device)
        write(plan, words, params, init_params, alphas)
        _CAPTURED.append(plan)
        return plan
    plan = words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words
    while len(_PLANS) >= _MAX_PLANS:
        _PLANS.pop(next(iter(_PLANS)), None)
    _PLANS[key] = plan
    return plan


def _by(
    key: Callable[[Tensor], Hashable],
    params: list[Tensor],
    init_params: list[Tensor],
    alphas: list[float],
) -> Iterator[tuple[list[Tensor], list[Tensor], list[float]]]:
    """Yield the three lists in parts whose parameters agree in `key`."""
    members: dict[Hashable, list[int]] = {}
    for index, theta in enumerate(params):
        members.setdefault(key(theta), []).append(index)
    for part in members.values():
        yield [params[i] for i in part], [init_params[i] for i in part], [alphas[i] for i in part]


def _groups(
    key: Callable[[Tensor], Hashable],
    params: list[Tensor],
    init_params: list[Tensor],
    alphas: list[float],
) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    """Return the parts of `_by`; of several, which look at their own memory alone, all is looked at first."""
    groups = list(_by(key, params, init_params, alphas))
    if len(groups) > 1:
        nbytes = np.array([theta.nbytes for theta in params], dtype=np.int64)
        if _meet(_pointers(params, init_params), nbytes):
            _check_memory(params, init_params)
    return groups


def _run_triton(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
    kernels = _backend.kernels("partial_reinit")
    for members in _groups(lambda theta: (theta.device, theta.dtype), params, init_params, alphas):
        plan = _plan(*members, kernels.PIECE_BYTES, kernels.write_plan)
        kernels.partial_reinit_(plan, members[0][0].dtype)


def _write_cuda(plan: Tensor, words: Tensor, *_: list) -> None:  # int64 [pieces, 4] each
    launch = _backend.extension("cuda").partial_reinit_write_plan
    launch(words.data_ptr(), plan.data_ptr(), len(words), *_backend.stream_of(plan))


def _run_cuda(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
    module = _backend.extension("cuda")
    for members in _groups(lambda theta: theta.device, params, init_params, alphas):
        plan = _plan(*members, module.partial_reinit_piece_bytes(), _write_cuda)
        module.partial_reinit(plan.data_ptr(), len(plan), *_backend.stream_of(plan))


def _dense(params: list[Tensor], init_params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return every pair in one order without gaps: contiguous copies where they are not so themselves."""
    if all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, init_params)):
        return params, init_params
    dense, inits = [], []
    for theta, theta_0 in zip(params, init_params, strict=True):
        layout = torch.contiguous_format
        if theta.dim() == 4 and theta.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        dense.append(theta.contiguous(memory_format=layout))
        inits.append(theta_0.contiguous(memory_format=layout))
    return dense, inits


def _check_originals(
    params: list[Tensor],
    init_params: list[Tensor],
    dense: list[Tensor],  # the same or copies, as `_dense` returns them
    inits: list[Tensor],
) -> None:
    """Raise ValueError where what is written shares memory, which copies of it need not show."""
    nbytes = []
    for originals, copies in ((params, dense), (init_params, inits)):
        for tensor, copy in zip(originals, copies, strict=True):
            nbytes.append(copy.nbytes if tensor is copy else _extent(tensor))
    for index, (theta, copy) in enumerate(zip(params, dense, strict=True)):
        if theta is not copy:
            check_apart(f"params[{index}]", theta)
    if _meet(_pointers(params, init_params), np.array(nbytes, dtype=np.int64).reshape(2, -1)):
        _check_memory(params, init_params)


def _on_dense(run: Callable) -> Callable:
    """Return `run`, which knows only addresses and sizes, for tensors that may have gaps in memory."""

    def run_dense(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
        dense, inits = _dense(params, init_params)
        if dense is not params:
            _check_originals(params, init_params, dense, inits)
        run(dense, inits, alphas)
        if dense is not params:
            for theta, copy in zip(params, dense, strict=True):
                if theta is not copy:
                    theta.copy_(copy)
        # The kernel writes behind autograd's back; a backward that saved the old values must notice.
        if any(map(Tensor.is_inference, params)):
            params = [theta for theta in params if not theta.is_inference()]
        torch.autograd.graph.increment_version(params)

    return run_dense


def _run_reference(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
    _check_memory(params, init_params)
    _reference.partial_reinit_(params, init_params, alphas)


def _fake(params: list[Tensor], init_params: list[Tensor], alphas: list[float], backend: str) -> None:
    return None


reinit_op = define(
    "partial_reinit",
    "partial_reinit_(Tensor(a!)[] params, Tensor[] init_params, float[] alphas, str backend) -> ()",
    fake=_fake,
    reference=_run_reference,
    cpu=_on_dense(_run_cpu),
    cuda=_on_dense(_run_cuda),
    triton=_on_dense(_run_triton),
    must_agree=True,
)
