"""Shapley values of tables of utilities: against torch.mm with the weights, and a compiled fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import shapley_values as reference

from .harness import Case, Options, Work
from .peers import DIRECTIONS, bind_all, check_against, compiled, optional

SIZE = "Coalitions S = 2^M"
# M: N; a table of 64 MB, more than the caches hold.
ROWS = {m: 2**24 >> m for m in range(2, 13)}
QUICK = {2: 2**18, 6: 2**14, 12: 2**8}


def cases(options: Options) -> Iterator[Case]:
    """Yield all passes for M from 2 to 12, and few tables against shapiq, which takes a game at a time."""
    for num_players, num_rows in (QUICK if options.quick else ROWS).items():
        v = torch.randn(num_rows, 2**num_players, device=options.device, requires_grad=True)
        weights = reference.shapley_values(torch.eye(2**num_players, device=options.device))  # [S, M]
        peers = {
            "torch.mm": lambda v, weights=weights: torch.mm(v, weights),
            "torch.compile": compiled(make_fold(num_players, options.device), options.quick),
        }
        yield from _passes(v, peers)
    small = torch.randn(100, 2**4, device=options.device, requires_grad=True)
    yield from _passes(small, {"shapiq": optional("shapiq", "shapiq", _shapiq)}, ("forward",), "100 tables")


def _passes(
    v: Tensor,  # [N, S]
    peers: dict[str, Any],
    directions: tuple[str, ...] = DIRECTIONS,
    panel: str = "",
) -> Iterator[Case]:
    num_rows, num_coalitions = v.shape
    num_players = num_coalitions.bit_length() - 1
    table, values = v.nbytes, 4 * num_rows * num_players
    work = {"forward": Work(table, values), "backward": Work(values, table)}
    work["both"] = Work(table + values, table + values)
    for direction in directions:
        yield Case(
            name=f"M={num_players} N={num_rows:,}",
            size=num_coalitions,
            panel=panel,
            check=check_against(reference.shapley_values, (v,), direction, num_rows),
            work=work[direction],
            **bind_all(ops.shapley_values, peers, (v,), direction),
        )


def make_fold(num_players: int, device: str) -> Callable[[Tensor], Tensor]:
    """Return the fold in plain torch: every step sums the table over one more bit, 2 S additions a row."""
    by_size = [1 / (num_players * math.comb(num_players - 1, k)) for k in range(num_players)] + [0.0]
    sizes = [s.bit_count() for s in range(2**num_players)]
    without = torch.tensor([by_size[k] for k in sizes], device=device)  # [S]
    within = without + torch.tensor([by_size[k - 1] if k else 0.0 for k in sizes], device=device)  # [S]

    def fold(
        v: Tensor,  # [N, S]
    ) -> Tensor:  # [N, M]
        shared = (v * without).sum(-1)
        table, halves = v * within, []
        for _ in range(num_players):
            pairs = table.unflatten(-1, (-1, 2))
            halves.append(pairs[..., 1].sum(-1))
            table = pairs.sum(-1)
        return torch.stack(halves, -1) - shared[:, None]

    return fold


def _shapiq(shapiq: object) -> Callable[[Tensor], list]:
    from shapiq.game_theory.exact import ExactComputer

    def values(
        v: Tensor,  # [N, S]
    ) -> list:
        bits = 1 << torch.arange(v.shape[1].bit_length() - 1)
        rows = v.detach().cpu().numpy()
        games = (lambda coalitions, row=row: row[coalitions @ bits.numpy()] for row in rows)
        return [ExactComputer(game, len(bits))("SV") for game in games]

    return values
