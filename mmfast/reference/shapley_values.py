"""Shapley values of M players from a table of 2^M utilities, as the formula is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype


def _weights(num_players: int, like: Tensor) -> Tensor:
    """Return |R|! (M-|R|-1)! / M! for every coalition R of the other M-1 players, [S / 2]."""
    # Filled in on the device: a table copied to a GPU would wait for it and could not go into a CUDA graph.
    by_size = [
        like.new_full((1,), 1 / (num_players * math.comb(num_players - 1, size)))
        for size in range(num_players)
    ]
    return torch.cat(by_size)[coalition_sizes(2 ** (num_players - 1), like.device)]


def coalition_sizes(num_coalitions: int, device: torch.device) -> Tensor:
    """Return the number of players |s| of every coalition, [S]."""
    sizes = torch.zeros(1, dtype=torch.int64, device=device)
    while len(sizes) < num_coalitions:
        sizes = torch.cat([sizes, sizes + 1])
    return sizes


def shapley_values(
    utilities: Tensor,  # [..., S]
) -> Tensor:  # [..., M]
    """Return the Shapley value of each player: its mean marginal utility over all orders of arrival."""
    dtype = accumulation_dtype(utilities.dtype)
    num_players = utilities.shape[-1].bit_length() - 1
    utilities, result = utilities.to(dtype), utilities.dtype
    # Of utilities near the largest number a quarter, whose differences do not overflow.
    is_large = utilities.abs().amax(-1, keepdim=True) > torch.finfo(dtype).max / 4
    scale = 1 - 0.75 * is_large.to(dtype)
    weights = _weights(num_players, utilities)
    values = []
    for player in range(num_players):
        # Bit `player` of the coalition index splits the table into coalitions without and with the player.
        halves = (scale * utilities).unflatten(-1, (-1, 2, 2**player))
        marginal = (halves[..., 1, :] - halves[..., 0, :]).flatten(-2)
        values.append((weights * marginal).sum(-1))
    return (torch.stack(values, dim=-1) / scale).to(result)


def shapley_values_bwd(
    dphi: Tensor,  # [..., M]
) -> Tensor:  # [..., S]
    """Return the gradient with respect to the utilities: the transposed map."""
    dtype = accumulation_dtype(dphi.dtype)
    num_players = dphi.shape[-1]
    weights = _weights(num_players, dphi.to(dtype))
    dutilities = dphi.new_zeros(*dphi.shape[:-1], 2**num_players, dtype=dtype)
    for player in range(num_players):
        halves = dutilities.unflatten(-1, (-1, 2, 2**player))
        share = (weights * dphi[..., player, None].to(dtype)).unflatten(-1, (-1, 2**player))
        halves[..., 1, :] += share
        halves[..., 0, :] -= share
    return dutilities.to(dphi.dtype)
