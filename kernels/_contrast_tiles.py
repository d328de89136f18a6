"""Tiles of the contrastive losses' main kernels, by device, dtype and width, and those that tuning tries."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._common import _cdiv
from ._tuning import choose, size_class


class _Tile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Tiles of half precision: by compute capability (from this one on) or vendor, then by the dimensions of a
# tile, most queries first. Chosen so that nothing spills and all fits; none has been timed.
_SMALL = {  # 99 KiB of shared memory
    64: [_Tile(128, 64, 8, 2), _Tile(64, 64, 4, 2)],
    128: [_Tile(128, 32, 8, 3), _Tile(64, 32, 4, 2)],
    256: [_Tile(64, 32, 8, 2)],
}
_HALF: dict[int | str, dict[int, list[_Tile]]] = {
    80: {
        64: [_Tile(128, 64, 8, 3), _Tile(64, 64, 4, 3)],
        128: [_Tile(128, 32, 8, 3), _Tile(64, 32, 4, 3)],
        256: [_Tile(64, 32, 8, 2)],
    },
    86: _SMALL,
    90: {
        64: [_Tile(128, 128, 8, 3), _Tile(64, 64, 4, 3)],
        128: [_Tile(128, 64, 8, 3), _Tile(64, 64, 4, 3)],
        256: [_Tile(128, 64, 8, 3), _Tile(64, 64, 8, 3)],
    },
    100: {
        64: [_Tile(128, 64, 8, 3), _Tile(64, 64, 4, 3)],
        128: [_Tile(128, 64, 8, 3), _Tile(64, 64, 4, 3)],
        256: [_Tile(64, 64, 8, 2)],
    },
    120: _SMALL,
    "gfx": {64: [_Tile(64, 64, 4, 2)], 128: [_Tile(128, 32, 4, 2)]},
}
_HALF_WIDE = _Tile(64, 64, 8, 2)
# The same of float32 where it is not rounded to tf32; off tensor cores fewer queries are as good as many.
_FLOAT32 = {64: [_Tile(64, 32, 8, 2), _Tile(16, 32, 4, 2)], 128: [_Tile(32, 32, 8, 2), _Tile(16, 32, 4, 2)]}
_TF32 = _Tile(64, 32, 8, 2)
_FLOAT64 = _Tile(32, 16, 4, 2)
_INTERPRETED = _Tile(128, 64, 4, 2)
# How fast tiles of so many queries are expected to be; guesses until they are timed.
_RATE = {128: 1.0, 64: 0.8, 32: 0.5, 16: 0.3}


def _choices(
    target: int | str,  # compute capability, AMD's name of an architecture, or "interpreter"
    dtype: torch.dtype,
    precision: str,  # of float32, "ieee" or "tf32"
    width: int,
) -> tuple[dict, list[_Tile]]:
    """Return the constants that all tiles for this width have in common, and these tiles."""
    block_d = max(64, triton.next_power_of_2(width))
    if target == "interpreter":
        # It takes its time by the operation, whatever the size of a tile.
        wide = dtype.itemsize > 2 or width > 256
        return {"BLOCK_D": min(256, block_d), "BLOCK_C": 64, "WIDE": wide}, [_INTERPRETED]
    if dtype == torch.float64:
        return {"BLOCK_D": 64, "BLOCK_C": 16, "WIDE": True}, [_FLOAT64]
    if dtype == torch.float32:
        # Whole operands would fill the registers, so they are taken in short pieces.
        block_d = min(128, block_d)
        tiles, block_c = (_FLOAT32[block_d], 16) if precision == "ieee" else ([_TF32], 32)
        return {"BLOCK_D": block_d, "BLOCK_C": block_c, "WIDE": True}, tiles
    known = [capability for capability in _HALF if isinstance(capability, int)]
    if isinstance(target, str):
        family: int | str = "gfx"
    else:
        family = max((capability for capability in known if capability <= target), default=86)
    if block_d not in _HALF[family]:
        return {"BLOCK_D": 256 if family in (90, 100) else 128, "BLOCK_C": 64, "WIDE": True}, [_HALF_WIDE]
    return {"BLOCK_D": block_d, "BLOCK_C": 16, "WIDE": False}, _HALF[family][block_d]


def _candidates(tiles: list[_Tile]) -> list[dict]:
    """Return what tuning is to try: the table's tiles, and their neighbours that a device may refuse."""
    queries = {number for tile in tiles for number in (tile.queries // 2, tile.queries)}
    keys = {number for tile in tiles for number in (tile.keys // 2, tile.keys, 2 * tile.keys)}
    shapes = itertools.product(sorted(queries), sorted(keys), (4, 8), (2, 3, 4))
    return [_Tile(*shape)._asdict() for shape in shapes if shape[0] >= 16 and shape[1] >= 16]


def _arguments(tile: _Tile) -> tuple[dict, dict]:
    """Return constants and options of a tile."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return {"BLOCK_N": tile.queries, "BLOCK_K": tile.keys}, options


@functools.cache
def _machine(device: torch.device) -> tuple[int | str, int]:
    """Return architecture and number of SMs."""
    if device.type != "cuda":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName, properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: on tensor cores only where the user lets torch do so."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _chosen(
    op: str,  # stem of the op's files
    queries: Tensor,  # packed
    part: str,  # "loss" or "both"
    sizes: tuple[int, int, int],  # pairs, queries of each, columns of the widest
    common: dict,
    tiles: list[_Tile],  # and what they have in common, from `_choices`
) -> tuple[int, dict, dict]:
    """Return in how many parts the residual's columns are split, and constants and options of the tile."""
    num_pairs, num_queries, width = sizes
    num_splits = 1 if part == "loss" else _cdiv(width, common["BLOCK_D"])
    _, num_sms = _machine(queries.device)

    def duration(tile: _Tile) -> float:
        num_programs = num_splits * num_pairs * _cdiv(num_queries, tile.queries)
        return _cdiv(num_programs, num_sms) * tile.queries / _RATE[tile.queries]

    # Queries by powers of four: what counts is how many programs there are for the SMs.
    size = size_class(num_pairs * num_queries)
    precision = _precision(queries.dtype)
    key = f"{queries.dtype} {precision} d={common['BLOCK_D']}{'+' * common['WIDE']} {part} {size}"
    default = min(tiles, key=duration)._asdict()
    chosen = choose(op, key, default, lambda: _candidates(tiles), queries.device)
    return num_splits, *_arguments(_Tile(**chosen))


def _compiled_cases(target: int | str) -> list[tuple[torch.dtype, str, int, bool]]:
    """Return dtype, precision, width and whether with residual of what stands for all that is compiled."""
    cases = [(torch.bfloat16, "ieee", width, True) for width in (64, 128, 256, 512)]
    cases += [(torch.float32, "ieee", 64, True), (torch.float32, "ieee", 128, True)]
    cases += [(torch.float16, "ieee", 256, True), (torch.float64, "ieee", 64, True)]
    cases += [(torch.bfloat16, "ieee", 128, False)]
    if not isinstance(target, str):
        cases += [(torch.float32, "tf32", 128, True)]
    return cases
