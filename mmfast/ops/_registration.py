"""One definition per raw op: its schema, its shapes, and the function of each backend that has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmfast import backend as _backend
from mmfast.ops import _autograd

_LIBRARY = torch.library.Library("mmfast", "FRAGMENT")
# By name of a raw op and backend: the function that runs it.
FUNCTIONS: dict[str, dict[str, Callable]] = {}
# By name of a raw op: what the dispatcher calls, for calls without it.
RUN: dict[str, Callable] = {}


def define(
    stem: str,  # of the op's files
    schema: str,  # "name(Tensor x, ..., str backend) -> Tensor"
    *,
    fake: Callable,
    reference: Callable,
    cpu: Callable | None = None,
    cuda: Callable | None = None,
    triton: Callable | None = None,
    refuses: Mapping[str, Callable] | None = None,
    by: str | None = None,
    must_agree: bool = False,
) -> torch._ops.OpOverload:
    """Define the raw op `torch.ops.mmfast.<name>` and return it, to be called in less time than by its name.

    Raw ops carry no autograd formula: the public function wraps them in an autograd.Function, which costs
    about half of what `torch.library.register_autograd` does per call.

    Args:
        stem: of the op's files, by which `mmfast.backend` knows what each backend can do.
        schema: as torch.library has it; its last argument is `str backend`.
        fake: takes the schema's arguments and returns tensors of the results' shapes and dtypes.
        reference, cpu, cuda, triton: what runs on a backend; each takes the schema's arguments but the last.
        refuses: by backend a function of the same arguments that returns why its kernel cannot take them, as
            the end of a sentence, or None. "auto" then goes on to the next.
        by: the argument whose device and dtype decide which backend runs: a tensor, or the first of a list.
            None: the first argument.
        must_agree: look at all of the list, and leave it to plain torch where they disagree.
    """
    name = schema.split("(")[0]
    functions = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
    table = {backend: function for backend, function in functions.items() if function is not None}
    FUNCTIONS[name] = table
    _backend.register(stem, table)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.mmfast, name).default
    arguments = op._schema.arguments
    place = 0 if by is None else [argument.name for argument in arguments].index(by)
    choose: Callable = _backend.choose
    if must_agree:
        choose = _backend.choose_for_all
    elif arguments[place].type.kind() == "ListType":
        choose = _choose_by_first

    refused = dict(refuses or {})

    def run(*args):
        return table[choose(stem, args[-1], args[place])](*args[:-1])

    def run_unless_refused(*args):
        backend, given = args[-1], args[:-1]
        chosen = choose(stem, backend, args[place])
        if chosen not in refused or not (reason := refused[chosen](*given)):
            return table[chosen](*given)
        if chosen == backend:
            raise _backend.BackendUnavailableError(f"backend {chosen!r} cannot run {stem}: {reason}")
        found = _backend.candidates(stem, args[place].device.type, args[place].dtype)
        return next(table[other] for other in found if not refused.get(other, _takes_all)(*given))(*given)

    RUN[name] = run if refuses is None else run_unless_refused
    _LIBRARY.impl(name, RUN[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_LIBRARY)
    _register_vmap(op, name)
    return op


def _choose_by_first(stem: str, backend: str, tensors: Sequence[Tensor]) -> str:
    return _backend.choose(stem, backend, tensors[0])


def _takes_all(*_: object) -> None:
    """Refuse no call."""


def _register_vmap(op: torch._ops.OpOverload, name: str) -> None:
    """Let vmap call the op once for each member of the batch."""
    written = [argument.alias_info is not None for argument in op._schema.arguments]

    def of_batch(info, in_dims, *args):
        for is_written, dims in zip(written, in_dims):
            # One tensor for all members would be changed by one after the other.
            if is_written and any(dim is None for dim in pytree.tree_flatten(dims)[0]):
                raise RuntimeError(f"vmap: what {name} changes in place must have a batch dimension, too")
        return _autograd.looped(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(f"mmfast::{name}", of_batch, lib=_LIBRARY)
