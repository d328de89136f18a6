"""SigLIP's sigmoid loss of N queries against N constant keys: against the formula in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops

from .harness import Case, Options, Work
from .peers import DIRECTIONS, Missing, assert_close, bind_all, compiled

SIZE = "Samples N"
SIZES = (16, 64, 512, 4096, 16_384)
CASES = [(n, d, torch.float32) for d in (128, 512) for n in SIZES]
CASES += [(n, 128, torch.bfloat16) for n in SIZES]
QUICK = [(64, 64, torch.float32), (512, 128, torch.float32), (512, 128, torch.bfloat16)]
# Here one N x N matrix takes 17 GB, so only what needs none takes part, once.
MEMORY = (65_536, 128)
# Forward and backward are measured each alone, too, in so many dimensions and below so many samples.
ALONE, LARGE = 128, 16_384
# Samples whose loss and gradient are computed in float64, against all keys.
CHECKED = 256
# Where learning begins, by the paper.
TEMPERATURE, BIAS = 0.1, -10.0


def cases(options: Options) -> Iterator[Case]:
    """Yield N normalised samples in d dimensions with numbers that learn, the memory case last."""
    for num_samples, dim, dtype in QUICK if options.quick else CASES:
        yield from _cases(num_samples, dim, dtype, options)
    if not options.quick:
        yield from _cases(*MEMORY, torch.float32, options, once=True)


def _cases(
    num_samples: int, dim: int, dtype: torch.dtype, options: Options, once: bool = False
) -> Iterator[Case]:
    query, key = (
        F.normalize(torch.randn(num_samples, dim, device=options.device)).to(dtype) for _ in range(2)
    )
    numbers = [torch.tensor(number, device=options.device) for number in (TEMPERATURE, BIAS)]
    inputs = [x.requires_grad_() for x in (query, *numbers)]

    def ours(query: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
        return ops.unidirectional_sigmoid_loss(query, key, temperature=temperature, bias=bias)

    def eager(query: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
        scores = query @ key.T / temperature + bias
        signs = 2 * torch.eye(num_samples, device=query.device, dtype=scores.dtype) - 1
        return -F.logsigmoid(signs * scores).sum(1).mean()

    peers: dict[str, Any] = {"eager": eager, "torch.compile": compiled(eager, options.quick)}
    if num_samples > LARGE:
        size = f"{num_samples**2 * query.element_size() / 1e9:.0f} GB"
        peers = dict.fromkeys(peers, Missing(f"one N x N matrix takes {size}"))
    bytes_of = {"forward": (2, 0), "backward": (1, 1), "both": (2, 1)}
    products = {"forward": 1, "backward": 0, "both": 2}
    for direction in DIRECTIONS if dim == ALONE and num_samples < LARGE else ("both",):
        read, written = (factor * query.nbytes for factor in bytes_of[direction])
        yield Case(
            name=f"N={num_samples:,} d={dim}",
            size=num_samples,
            panel=f"d={dim} {'bfloat16' if dtype == torch.bfloat16 else 'float32'}",
            check=_make_check(query.detach(), key, direction),
            work=Work(read, written, 2 * products[direction] * num_samples**2 * dim),
            dtype=dtype,
            once=once,
            **bind_all(ours, peers, inputs, direction),
        )


def _make_check(
    query: Tensor,  # [N, d]
    key: Tensor,  # [N, d]
    direction: str,
) -> Callable[[Any], None]:
    """Return a check of some samples' losses and gradients, against all keys, and of the mean over all."""

    def check(found: Any) -> None:
        found = (found,) if isinstance(found, Tensor) else found
        num_samples = len(query)
        losses = ops.unidirectional_sigmoid_loss(
            query, key, temperature=TEMPERATURE, bias=BIAS, reduction="none"
        )
        some = torch.linspace(0, num_samples - 1, min(num_samples, CHECKED), device=query.device).long()
        truth, plain = (_rows(query.to(t), key.to(t), some) for t in (torch.float64, query.dtype))
        assert_close(losses[some], truth[0], plain[0])
        if direction != "backward":
            assert_close(found[0], losses.double().mean(), losses.mean())
        if direction != "forward":
            dquery = found[-3]
            assert_close(dquery[some] * num_samples * TEMPERATURE, truth[1], plain[1])

    return check


def _rows(
    query: Tensor,  # [N, d]
    key: Tensor,  # [N, d]
    some: Tensor,  # [n]
) -> tuple[Tensor, Tensor]:  # [n], [n, d]
    """Return some samples' losses, and the gradient of their sum times the temperature, in plain torch."""
    scores = query[some] @ key.T / TEMPERATURE + BIAS
    is_own = torch.arange(len(key), device=key.device) == some[:, None]
    losses = -F.logsigmoid(torch.where(is_own, scores, -scores)).sum(1)
    weights = torch.where(is_own, -(-scores).sigmoid(), scores.sigmoid())
    return losses, weights @ key
