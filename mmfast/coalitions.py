"""Subsets of modalities: integers whose bit m is set where modality m is a member, bool masks, and names.

A coalition is an integer where all subsets are listed, as in a table of S = 2^M utilities. Where samples
differ in what they have, masks say so: `<modality>__present` in a batch, `present`, bool [M, N], in calls.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

# End of the key of a batch that says which samples have a modality, bool [N].
PRESENT_SUFFIX = "__present"
# Key of a batch, bool [N, M]: which of its modalities each sample shows in this epoch. What is not shown, if
# it is read at all, loses its features after the encoder; what is lacking (`<m>__present`) goes as zeros.
SHOWN = "coalition"
# Keys of batches and files that are no modality's.
RESERVED = ("label", "split", "group", SHOWN)

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def present_key(modality: str) -> str:
    """Return the key of a batch that says which samples have a modality."""
    return modality + PRESENT_SUFFIX


def rows_key(modality: str) -> str:
    """Return the key of a batch that says which samples' values it holds of a modality, int64 [n].

    Without it a batch of N samples holds those of all; what is not held has features 0.
    """
    # A dot is in no modality's name.
    return modality + ".rows"


def features_key(modality: str) -> str:
    """Return the key of a batch that holds a modality's features, [N, D], where they are known already."""
    return modality + ".features"


def is_reserved(name: str) -> bool:
    """Whether a name cannot be a modality's: it would be taken for another key of a batch or state dict."""
    return name in RESERVED or name.endswith(PRESENT_SUFFIX) or "." in name


def nearly_reserved(name: str, modalities: Collection[str] = ()) -> str:
    """Return the mark of presence whose name is spelled wrong, `<m>__present` of `<m>__presnt`, or "".

    Args:
        name: of an array.
        modalities: names of those there are, whose marks need not have both underscores.
    """
    for before, mark, ending in map(name.rpartition, ("__", "_", "-")):
        is_near = difflib.get_close_matches(ending.lower(), ("present", "presence"), n=1, cutoff=0.8)
        if is_near and before and (mark == "__" or before.rstrip("_") in modalities):
            return present_key(before.rstrip("_"))
    return ""


def num_coalitions(num_modalities: int) -> int:
    """Return S, how many coalitions there are, the empty one among them."""
    return 1 << num_modalities


def everyone(num_modalities: int) -> int:
    """Return the coalition of all modalities."""
    return (1 << num_modalities) - 1


def alone(modality: IntOrTensor) -> IntOrTensor:
    """Return the coalition of one modality, by its index m; of a tensor of indices, each one's."""
    return 1 << modality


def contains(coalition: int, modality: int) -> bool:
    """Whether modality m is a member."""
    return bool(coalition >> modality & 1)


def size(coalition: int) -> int:
    """Return the number of members."""
    return coalition.bit_count()


def name(coalition: int, modalities: Sequence[str]) -> str:
    """Return the members' names: "audio+image"; the empty coalition is "none"."""
    return "+".join(one for m, one in enumerate(modalities) if contains(coalition, m)) or "none"


def all_of(num_modalities: int, device: torch.device | str = "cpu") -> Tensor:  # [S] int64
    """Return all coalitions."""
    return torch.arange(num_coalitions(num_modalities), device=device)


def sizes(num_modalities: int) -> Tensor:  # [S] int64
    """Return the number of members of each coalition, on the CPU."""
    return members(all_of(num_modalities), num_modalities).sum(-1)


def members(
    coalitions: int | Tensor,  # [...]
    num_modalities: int,
    device: torch.device | None = None,
) -> Tensor:  # bool [..., M]
    """Return which modalities are members, on `device`; None: where `coalitions` are."""
    if isinstance(coalitions, Tensor):
        coalitions = coalitions.to(device or coalitions.device, torch.int64)[..., None]
        device = coalitions.device
    return (coalitions >> torch.arange(num_modalities, device=device) & 1).bool()


def of_present(
    present: Tensor,  # bool [M, N]
) -> Tensor:  # [N] int64
    """Return the coalition of the modalities that each sample has."""
    bits = alone(torch.arange(len(present), device=present.device))
    return (present * bits[:, None]).sum(0)


def among_present(
    present: Tensor,  # bool [M, N]
) -> Tensor:  # [N, S] int64
    """Return what is left of each coalition for each sample: those of its members that the sample has."""
    return of_present(present)[:, None] & all_of(len(present), present.device)
