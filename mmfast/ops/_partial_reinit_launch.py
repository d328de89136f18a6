"""Where partial re-initialisation runs: memory it may write, the raw op, copies of what has gaps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mmfast.ops._checks import check_apart, overlaps_itself
from mmfast.ops._partial_reinit_table import Table, keep, known, meet, note_change, words_of
from mmfast.ops._registration import define
from mmfast.reference import partial_reinit as _reference


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (reach + 1) * tensor.element_size()


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


def check_memory(params: list[Tensor], init_params: list[Tensor]) -> None:
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


def _dense(params: list[Tensor], init_params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return every pair in one order without gaps: contiguous copies where they are not so themselves."""
    if lie_alike(params, init_params):
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
    addresses = [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, init_params)]
    if meet(addresses, nbytes):
        check_memory(params, init_params)


def make_table(
    params: list[Tensor],  # P tensors, checked
    init_params: list[Tensor],  # P tensors of the same shapes, dtypes and devices
) -> Table:
    """Return the table of pairs that lie alike in memory, having looked that nothing written is shared."""
    table = Table(params, init_params)
    if table.meets():
        check_memory(params, init_params)
    return table


def lie_alike(params: list[Tensor], init_params: list[Tensor]) -> bool:
    """Return whether addresses and sizes are all a kernel must know: every pair in one order without gaps."""
    if all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, init_params)):
        return True
    return all(
        (theta.is_contiguous() and theta_0.is_contiguous())
        or (theta.stride() == theta_0.stride() and _extent(theta) == theta.nbytes and not _is_folded(theta))
        for theta, theta_0 in zip(params, init_params, strict=True)
    )


def _is_folded(tensor: Tensor) -> bool:
    return overlaps_itself(tensor.shape, tensor.stride())


def _run(backend: str) -> Callable:
    """Return what runs on a backend, which knows addresses and sizes alone, for tensors of any strides."""

    def run(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
        table = known(words := words_of(params, init_params))
        if table is not None:
            table.run(backend, params, alphas)
            note_change(params)
            return
        dense, inits = _dense(params, init_params)
        if dense is not params:
            _check_originals(params, init_params, dense, inits)
        table = make_table(dense, inits)
        table.run(backend, dense, alphas)
        if dense is not params:
            for theta, copy in zip(params, dense, strict=True):
                if theta is not copy:
                    theta.copy_(copy)
        elif words is not None:
            keep(words, table)
        note_change(params)

    return run


def _run_reference(params: list[Tensor], init_params: list[Tensor], alphas: list[float]) -> None:
    check_memory(params, init_params)
    _reference.partial_reinit_(params, init_params, alphas)


def _fake(params: list[Tensor], init_params: list[Tensor], alphas: list[float], backend: str) -> None:
    return None


reinit_op = define(
    "partial_reinit",
    "partial_reinit_(Tensor(a!)[] params, Tensor[] init_params, float[] alphas, str backend) -> ()",
    fake=_fake,
    reference=_run_reference,
    cpu=_run("cpu"),
    cuda=_run("cuda"),
    triton=_run("triton"),
    must_agree=True,
)
