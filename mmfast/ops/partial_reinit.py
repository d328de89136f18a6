"""Soft re-initialisation of a list of parameters towards the values training began with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._checks import FLOATS, check_float, shape_text
from mmfast.ops._partial_reinit_launch import lie_alike, make_table, reinit_op
from mmfast.ops._partial_reinit_table import Table, has_words, keep, known, note_change, words_of

# What a strength may be; a compiler's symbols are numbers, too.
_REAL = (Real, torch.SymFloat, torch.SymInt)


@torch.no_grad()
def partial_reinit_(
    params: Sequence[Tensor],  # P tensors of any shape; changed in place
    init_params: Sequence[Tensor],  # P tensors of the same shapes
    alpha: float | Sequence[float] | Tensor | np.ndarray,
    *,
    backend: str = "auto",
) -> None:
    """Pull every parameter towards its initial value: theta <- (1 - alpha) theta + alpha theta_0, in place.

    Equivalent to, for alpha in (0, 1):

        torch._foreach_lerp_(params, init_params, alpha)

    while alpha = 0 leaves every bit as it was and alpha = 1 copies every bit of `init_params`.

    Args:
        params: sequence of float32, float64, bfloat16 or float16 tensors, any shapes and strides, dtypes may
            be mixed. No element may share memory with another of any parameter.
        init_params: one tensor per parameter, of the same shape, dtype and device. None may share memory with
            a parameter, but for a parameter that is its own initial value.
        alpha: strength in [0, 1]; one number, or one per parameter as list, tuple, 1-D tensor or array. A
            tensor on a GPU is waited for.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: an entry is no tensor of a floating dtype, dtypes of a pair differ, or alpha is neither a
            number nor a list of them.
        ValueError: lengths, shapes or devices differ, alpha lies outside [0, 1], or what is written shares
            memory with something else. Nothing is changed then.

    Source: Wei et al., "Diagnosing and re-learning for balanced multimodal learning", ECCV 2024.
    """
    params, init_params = _listed("params", params), _listed("init_params", init_params)
    # Lists of which all is known; they need no looking at, and no dispatcher, which costs as much.
    table = known(words := words_of(params, init_params))
    if table is None or not table.is_checked:
        _check(params, init_params)
        table = None
    elif table.has_empty:
        _check_once(params)
    _backend.check_name(backend)
    strength = _strength(alpha, len(params))
    if not params:
        return
    if table is None and words is not None:
        table = _new_table(params, init_params)
        if table is not None:
            keep(words, table)
    if table is None or not _run(table, params, strength, backend):
        reinit_op(params, init_params, _for_each(strength, len(params)), backend)


def _new_table(params: list[Tensor], init_params: list[Tensor]) -> Table | None:
    """Return the table of checked lists, None where pairs do not lie alike: they are copied first."""
    if not lie_alike(params, init_params):
        return None
    table = make_table(params, init_params)
    table.is_checked = True
    return table


def _run(table: Table, params: list[Tensor], strength: float | list[float], backend: str) -> bool:
    """Run a kernel without torch's dispatcher; return whether there is one."""
    chosen = table.choose(backend)
    if chosen == "reference":
        return False
    table.run(chosen, params, strength)
    note_change(params)
    return True


def _for_each(strength: float | list[float], count: int) -> list[float]:
    return [strength] * count if isinstance(strength, float) else strength


class ReinitPlan:
    """What `partial_reinit_` finds out about its lists, kept: each `apply_` is one walk over the memory.

        plan = ReinitPlan(params, init_params)
        plan.apply_(alpha)

    is `partial_reinit_(params, init_params, alpha)`, with the checks made and the tables of addresses and
    sizes laid out once, on a GPU in its memory. `apply_` asks every tensor where it lies, in some 45 ns.
    Where one has moved (`p.data = ...`, `module.to(...)`, `resize_`, of a parameter or an initial value), all
    is looked at anew, without a word if the lists still fit and with the errors of `partial_reinit_` if not.

    The plan holds the tensors, not copies of them. It can be pickled and copied: they go along, addresses do
    not. Under `torch.compile`, `torch.func` and modes such as FakeTensorMode `apply_` calls
    `partial_reinit_`.

    Args:
        params: as in `partial_reinit_`.
        init_params: as in `partial_reinit_`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: an entry is no tensor of a floating dtype, or dtypes of a pair differ.
        ValueError: lengths, shapes or devices differ, or what is written shares memory with something else.
    """

    def __init__(
        self,
        params: Sequence[Tensor],  # P tensors of any shape
        init_params: Sequence[Tensor],  # P tensors of the same shapes
        *,
        backend: str = "auto",
    ):
        self._params, self._init_params = _listed("params", params), _listed("init_params", init_params)
        _backend.check_name(backend)
        self._backend = backend
        self._table: Table | None = None
        self._words: Hashable | None = None
        self._look()

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self._params)
        return f"ReinitPlan({len(self._params)} parameters of {size:,} values, backend={self._backend!r})"

    def _look(self) -> None:
        params, init_params = self._params, self._init_params
        self._table, self._words = None, words_of(params, init_params)
        _check(params, init_params)
        if self._words is not None and params:
            self._table = _new_table(params, init_params)

    def apply_(self, alpha: float | Sequence[float] | Tensor | np.ndarray) -> None:
        """Pull every parameter towards its initial value; `alpha` and errors as in `partial_reinit_`."""
        params, init_params = self._params, self._init_params
        if not torch.compiler.is_compiling():
            if not has_words(params, init_params, self._words):
                self._look()
            if self._table is not None:
                strength = _strength(alpha, len(params))
                if _run(self._table, params, strength, self._backend):
                    return
        partial_reinit_(params, init_params, alpha, backend=self._backend)

    def __reduce__(self):
        return _plan_again, (self._params, self._init_params, self._backend)


def _plan_again(params: list[Tensor], init_params: list[Tensor], backend: str) -> ReinitPlan:
    return ReinitPlan(params, init_params, backend=backend)


def _listed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of tensors, got {type(tensors).__name__}") from None


def _strength(alpha: float | Sequence[float] | Tensor | np.ndarray, count: int) -> float | list[float]:
    """Return one strength for all as a number, one for each as a list."""
    if isinstance(alpha, Tensor | np.ndarray):
        if alpha.ndim > 1:
            raise TypeError(
                f"alpha must be a number or one per parameter, got shape {shape_text(alpha.shape)}"
            )
        alpha = alpha.tolist()
    is_one = not isinstance(alpha, Sequence) or isinstance(alpha, str | bytes)
    values: list = [alpha] if is_one else list(alpha)  # type: ignore[arg-type]
    if not set(map(type, values)) <= {float, int}:
        for index, value in enumerate(values):
            if isinstance(value, Tensor) and value.dim() == 0:
                continue
            if isinstance(value, bool | np.bool_) or not isinstance(value, _REAL):
                if is_one:
                    raise TypeError(f"alpha must be a number or one per parameter, got {value!r}")
                raise TypeError(f"alpha[{index}] must be a number, got {value!r}")
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {float(value)}")
    strengths = [float(value) for value in values]
    if is_one:
        return strengths[0]
    if len(strengths) != count:
        raise ValueError(f"alpha must be a number or one per parameter = {count}, got {len(strengths)}")
    return strengths


def _check(params: list[Tensor], init_params: list[Tensor]) -> None:
    if len(params) != len(init_params):
        raise ValueError(
            f"init_params must hold one tensor per parameter = {len(params)}, got {len(init_params)}"
        )
    # One question to all tensors costs a tenth of a look at each; who is wrong is looked for afterwards.
    if not _alike(params, init_params):
        for index, (theta, theta_0) in enumerate(zip(params, init_params, strict=True)):
            _check_pair(index, theta, theta_0)
    _check_once(params)


def _check_once(params: list[Tensor]) -> None:
    if len(set(map(id, params))) < len(params):
        raise ValueError("params must hold every tensor once, got one twice")


def _alike(params: list[Tensor], init_params: list[Tensor]) -> bool:
    """Whether all are tensors of one floating dtype on one device and shapes agree: true of most lists."""
    tensors = params + init_params
    return (
        all(issubclass(kind, Tensor) for kind in set(map(type, tensors)))
        and len(dtypes := {tensor.dtype for tensor in tensors}) == 1
        and dtypes.issubset(FLOATS)
        and len({tensor.device for tensor in tensors}) == 1
        and [theta.shape for theta in params] == [theta_0.shape for theta_0 in init_params]
    )


def _check_pair(index: int, theta: Tensor, theta_0: Tensor) -> None:
    name = f"init_params[{index}]"
    check_float(f"params[{index}]", theta)
    check_float(name, theta_0)
    if theta.shape != theta_0.shape:
        raise ValueError(f"{name} must have shape {shape_text(theta.shape)}, got {shape_text(theta_0.shape)}")
    if theta.dtype != theta_0.dtype:
        raise TypeError(f"{name} must have dtype {theta.dtype}, got {theta_0.dtype}")
    if theta.device != theta_0.device:
        raise ValueError(f"{name} must lie on {theta.device}, got {theta_0.device}")
