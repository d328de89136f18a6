"""Tensors of generated calls: kinds of numbers, dtypes, layouts, and memory that is poisoned around them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fuzzing.draw import Draw
from mmfast import backend as _backend

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KINDS = ("normal", "ties", "offset", "huge", "tiny", "wide", "special", "minus infinity", "equal")
FINITE_KINDS = ("normal", "ties", "offset", "huge", "tiny", "wide", "equal")
LAYOUTS = ("contiguous", "transposed", "expanded", "tail", "stepped", "unaligned")
_EXTENDED = np.longdouble


@dataclass
class Made:
    """What a call was given: a tensor, the memory it lies in, and that memory as it was."""

    tensor: Tensor
    base: Tensor
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.base.clone()


def float_dtype(draw: Draw, backend: str) -> torch.dtype:
    """Return a floating dtype that the backend takes here."""
    return draw.choice(float_dtypes(backend))


def float_dtypes(backend: str) -> list[torch.dtype]:
    """Return the floating dtypes that the backend takes here: Triton's interpreter misreads bfloat16."""
    return [dtype for dtype in FLOATS if _backend.supports(backend, "", dtype)]


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as whole numbers, so that NaN can be compared."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def exact(tensor: Tensor) -> np.ndarray:
    """Return the tensor's very numbers in extended precision (64 bits of mantissa on x86-64)."""
    return tensor.detach().double().numpy().astype(_EXTENDED)


def numbers(draw: Draw, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Return float64 numbers of a kind; `dtype` says what is huge or tiny."""
    random, info = draw.generator(), torch.finfo(dtype)
    x = random.standard_normal(shape) * draw.choice((1.0, 1.0, 0.1, 5.0))
    if kind == "ties":
        x = random.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        x = np.full(shape, random.standard_normal() * 10)
    elif kind == "offset":
        x = x + draw.choice((1e4, -1e4, 300.0, 1e6)) * (1 if dtype != torch.float16 else 1e-2)
    elif kind == "huge":
        share = draw.choice((0.9, 0.3, 0.01, 1e-3))
        x = np.clip(x / 3, -1, 1) * float(info.max) * share
        x = x if draw.chance(0.5) else np.abs(x)
    elif kind == "tiny":
        x = x * float(info.tiny) * draw.choice((1.0, 0.01, 100.0))
    elif kind == "wide":
        reach = np.log10(float(info.max)) / draw.choice((2.0, 4.0, 1.0))
        x = np.sign(x) * 10 ** random.uniform(-reach, reach * 0.98, shape)
    elif kind in ("special", "minus infinity"):
        picks = (
            [-np.inf]
            if kind == "minus infinity"
            else draw.choice(([np.nan], [np.inf], [np.nan, np.inf, -np.inf]))
        )
        chosen = random.choice(np.array(picks), shape)
        x = np.where(random.random(shape) < draw.choice((0.03, 0.2, 0.7)), chosen, x)
    if np.size(x) and draw.chance(0.05):
        x = np.where(random.random(shape) < 0.3, random.choice(np.array([0.0, -0.0]), shape), x)
    return x


def laid_out(draw: Draw, values: Tensor, layout: str | None = None, poison: float = float("nan")) -> Made:
    """Return a tensor of these values in some layout; what lies around it in memory is poison.

    An expanded tensor repeats its first slice along one dimension, so its values are others.
    """
    layout = draw.choice(LAYOUTS) if layout is None else layout
    shape, dims = list(values.shape), values.dim()
    around = poison if values.is_floating_point() else (77 if values.dtype != torch.bool else True)

    def filled(sizes: list[int]) -> Tensor:
        return torch.full(sizes, around, dtype=values.dtype)

    if layout == "transposed" and dims > 1:
        order = list(range(dims))
        first, second = draw.choice([(i, j) for i in order for j in order if i < j])
        base = values.transpose(first, second).clone(memory_format=torch.contiguous_format)
        return Made(base.transpose(first, second), base)
    if layout == "expanded" and dims > 0:
        dim = draw.integer(0, dims - 1)
        base = values.narrow(dim, 0, min(1, shape[dim])).clone(memory_format=torch.contiguous_format)
        return Made(base.expand(shape), base)
    if layout == "tail" and dims > 0:
        # What follows [a:] or [-n:], in every dimension.
        base = filled([size + draw.integer(0, 2) for size in shape])
        view = base[tuple(slice(full - size, None) for full, size in zip(base.shape, shape))]
    elif layout == "stepped" and dims > 0:
        steps = [draw.choice((1, 2, 3)) for _ in shape]
        steps[-1] = draw.choice((2, 1, 3))
        base = filled([size * step for size, step in zip(shape, steps)])
        view = base[tuple(slice(step - 1, None, step) for step in steps)]
    elif layout == "unaligned":
        start = draw.choice((1, 3, 5))
        base = filled([values.numel() + start + 3])
        view = base[start : start + values.numel()].view(shape)
    else:
        base = values.clone()
        return Made(base, base)
    view.copy_(values)
    return Made(view, base)


def floats(
    draw: Draw,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kinds: tuple[str, ...] = KINDS,
    layout: str | None = None,
) -> Made:
    """Return a float tensor; half of them hold ordinary numbers."""
    kind = kinds[0] if draw.chance(0.3) else draw.choice(kinds)
    values = torch.from_numpy(np.asarray(numbers(draw, kind, shape, dtype))).to(dtype)
    return laid_out(draw, values, layout)


def labels(draw: Draw, size: int, num_classes: int) -> Made:
    """Return labels [N] in [0, C) of any integer dtype that holds them."""
    dtype = draw.choice([dtype for dtype in INTEGERS if torch.iinfo(dtype).max >= num_classes])
    values = torch.from_numpy(draw.generator().integers(0, max(num_classes, 1), size)).to(dtype)
    return laid_out(draw, values)


def mask(draw: Draw, shape: tuple[int, ...]) -> Made:
    """Return a mask, of which a share is True."""
    share = draw.choice((0.7, 0.3, 0.0, 1.0))
    return laid_out(draw, torch.from_numpy(draw.generator().random(shape) < share))


def assert_unchanged(**made: Made | None) -> None:
    """Assert that a call left these alone, and the memory around them."""
    for name, one in made.items():
        if one is not None and not torch.equal(bits(one.base), bits(one.before)):
            raise AssertionError(f"{name} was changed")


def assert_around_unchanged(name: str, made: Made) -> None:
    """Assert that what an op changes in place it changes nowhere else."""
    was, now = made.before.clone(), made.base.clone()
    for memory in (was, now):
        memory.as_strided(made.tensor.shape, made.tensor.stride(), made.tensor.storage_offset()).zero_()
    assert torch.equal(bits(was), bits(now)), f"memory around {name} was changed"
