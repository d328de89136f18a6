"""What the processes of a data-parallel run tell each other, beside gradients; alone, nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfast.errors import dtype_name

T = TypeVar("T")


class Moments(Protocol):
    """What `ops.ClassMoments` is to this module: tensors, and how those of others are merged in."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def merge(self, other: Any) -> Any: ...


M = TypeVar("M", bound=Moments)


def world() -> dist.ProcessGroup | None:
    """Return the group of all processes of the run, or None where there is one alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@torch.no_grad()
def sum_over_processes(
    values: Tensor,  # any shape
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # same shape
    """Return the sum of a tensor over a group, by default all processes; nothing flows back through it."""
    values = values.detach().clone()
    group = world() if group is None else group
    if group is None:
        return values
    summed = _reachable(values, group)
    dist.all_reduce(summed, group=group)
    return summed.to(values.device)


@torch.no_grad()
def of_first_process(
    values: Tensor,  # any shape, the same in every process
    group: dist.ProcessGroup,
) -> Tensor:  # same shape
    """Return the tensor of a group's first process: what all go on with, bit for bit."""
    sent = _reachable(values.detach().clone(), group)
    dist.broadcast(sent, group=group, group_src=0)
    return sent.to(values.device)


def share_of_batch(
    present: Tensor,  # bool [..., N]
) -> Tensor:  # [...]
    """Return the part of the whole batch, over all processes, for which `present` holds, and never 0.

    A process's mean over its N samples of a loss that is 0 where not present, divided by this share, averages
    over processes to the mean over the present samples of the whole batch. Where none is, the loss is 0.
    """
    samples = torch.full_like(present[..., 0], present.shape[-1], dtype=torch.float32)
    found, samples = sum_over_processes(torch.stack([present.sum(-1).float(), samples]))
    return found.clamp(min=1) / samples


def min_over_processes(number: int) -> int:
    """Return the least number of all processes."""
    return min(gather_objects(number))


@torch.no_grad()
def max_over_processes(
    values: Tensor,  # any shape
) -> Tensor:  # same shape
    """Return the largest of all processes, element by element."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, how: Any) -> Tensor:
    if (group := world()) is None:
        return values
    numbers = values.to(torch.uint8) if values.dtype == torch.bool else values.clone()
    found = _reachable(numbers, group)
    dist.all_reduce(found, op=how, group=group)
    return found.to(values.device, values.dtype)


def check_agreement(what: str, number: int, remedy: str = "give each the same data, in full") -> None:
    """Raise in every process unless all have the same number; one that went on would wait for ever."""
    found = gather_objects(number)
    if len(set(found)) > 1:
        counts = ", ".join(map(str, found))
        raise ValueError(f"processes must agree on the number of {what}, got {counts}: {remedy}")


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return a plain value of each process of a group, by default of all, in order of rank."""
    group = world() if group is None else group
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def ask_all(question: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each process of a group answers, in order of rank.

    Raises:
        Exception: in this process its question's own error, in the others one of the same kind that names the
            rank: whoever went on alone would wait for ever.
    """
    answer: Any = None
    failure: Exception | None = None
    try:
        answer = question()
    except Exception as error:
        failure = error
    kind = next((kind for kind in (TypeError, ValueError) if isinstance(failure, kind)), RuntimeError)
    found = gather_objects((answer, None if failure is None else (kind, str(failure))), group)
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(found):
        if said is not None:
            raise said[0](f"in process {rank} of the group: {said[1]}")
    return [answer for answer, _ in found]


def gather_equal(
    own: Tensor,  # any shape, the same in every process
    group: dist.ProcessGroup,
) -> Tensor:  # [W, ...] for W processes
    """Return the tensors of all processes of a group, bit for bit, in order of rank."""
    num_processes = dist.get_world_size(group)
    if own.numel() == 0:
        return own.new_empty(num_processes, *own.shape)
    # As bytes: backends know few dtypes.
    sent = _reachable(own.detach().contiguous().reshape(-1).view(torch.uint8), group)
    gathered = sent.new_empty(num_processes, sent.numel())
    dist.all_gather(list(gathered), sent, group=group)
    return gathered.to(own.device).view(own.dtype).reshape(num_processes, *own.shape)


def gather_parts(
    own: Tensor,  # [n, ...], n may differ from process to process
    sizes: list[int],  # of all processes
    group: dist.ProcessGroup,
) -> Tensor:  # [W, most, ...]; what lies beyond a process's rows is 0
    """Return the rows of all processes of a group, in order of rank, padded to the most of one."""
    mine = own.new_zeros(max(sizes), *own.shape[1:])
    mine[: len(own)] = own.detach()
    return gather_equal(mine, group)


@torch.no_grad()
def gather_rows(
    own: Tensor,  # [n, ...]
) -> Tensor:  # [N, ...]
    """Return the rows of all processes in the order of the data, of which process r of W has r, r + W, ...

    Any dtype, bit for bit, on the device of `own`; alone its argument.

    Raises:
        ValueError: in every process, where rows differ in shape or dtype, or a process has more or fewer of
            them than that share.
    """
    if (group := world()) is None:
        return own
    facts = gather_objects((len(own), (list(own.shape[1:]), dtype_name(own.dtype))), group)
    sizes = [size for size, _ in facts]
    if any(kind != facts[0][1] for _, kind in facts):
        kinds = ", ".join(f"{shape} of {dtype}" for _, (shape, dtype) in facts)
        raise ValueError(f"rows must have one shape and dtype in all processes, got {kinds}")
    num_rows, num_processes = sum(sizes), len(sizes)
    shares = [len(range(rank, num_rows, num_processes)) for rank in range(num_processes)]
    if sizes != shares:
        raise ValueError(f"processes must have {shares} of {num_rows} rows, every W-th each, got {sizes}")
    return gather_parts(own, sizes, group).transpose(0, 1).flatten(0, 1)[:num_rows]


@torch.no_grad()
def merge_moments(moments: M | None, device: torch.device | None = None) -> M | None:
    """Return the class moments of all processes' samples, the same bits in each of them.

    They are merged in order of rank, in main memory, as no two kinds of device round alike.

    Args:
        moments: of this process's samples; None where it has none. Alone it is returned as it is.
        device: where the result lies; by default where `moments` lie, or in main memory for None.

    Returns:
        The merged moments, or None where no process has any.
    """
    if world() is None:
        return moments
    device = device or (torch.device("cpu") if moments is None else next(iter(moments)).device)
    found = gather_objects(None if moments is None else _moved(moments, torch.device("cpu")))
    parts = [part for part in found if part is not None]
    if not parts:
        return None
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return _moved(merged, device)


def _moved(moments: M, device: torch.device) -> M:
    return type(moments)(*(tensor.detach().to(device) for tensor in moments))


def _reachable(
    values: Tensor,  # any shape
    group: dist.ProcessGroup,
) -> Tensor:  # the same
    """Return a tensor where the group's backend takes it: NCCL on a GPU alone, gloo in main memory."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    kind = values.device.type
    if kind == "cpu":
        return values if "cpu" in backends else values.to(next(iter(backends)))
    return values if backends.get(kind, "gloo") != "gloo" else values.cpu()


def broadcast_from_first(value: Any) -> Any:
    """Return the first process's value, plain or a tensor on the CPU, in every process.

    What a method decides from features, which differ in their last bits from process to process, is decided
    once: a difference of one copy would go unnoticed, a larger one would make processes wait for each other.
    """
    if (group := world()) is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=group)
    return values[0]


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers, as data-parallel training does before each forward.

    Batch-norm statistics differ by process after the last batch of an epoch, and what is decided from
    features in eval mode must not.
    """
    if (group := world()) is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0, group=group)


def rank_and_size() -> tuple[int, int]:
    """Return which of how many processes this one is."""
    group = world()
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
