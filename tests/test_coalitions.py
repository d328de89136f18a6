"""Coalitions as integers, as masks and as names: each against what it says of sets."""

from __future__ import annotations

from itertools import combinations

import torch

from mmfast import coalitions

NAMES = ("audio", "image", "text")


def subsets() -> dict[int, set[int]]:
    """Return the sets of members of every coalition of three, by its integer."""
    found = [set(chosen) for size in range(4) for chosen in combinations(range(3), size)]
    return {sum(2**m for m in chosen): chosen for chosen in found}


def test_every_coalition_is_its_set():
    assert coalitions.all_of(3).tolist() == sorted(subsets())
    for coalition, chosen in subsets().items():
        assert {m for m in range(3) if coalitions.contains(coalition, m)} == chosen
        assert coalitions.size(coalition) == len(chosen) == int(coalitions.sizes(3)[coalition])
        mask = coalitions.members(coalition, 3)
        assert set(mask.nonzero().flatten().tolist()) == chosen
        assert torch.equal(mask, coalitions.members(torch.tensor(coalition, dtype=torch.uint8), 3))
        assert coalitions.of_present(mask[:, None]).tolist() == [coalition]
    assert coalitions.members(coalitions.all_of(3), 3).shape == (8, 3)
    assert subsets()[coalitions.everyone(3)] == {0, 1, 2}
    assert subsets()[coalitions.alone(2)] == {2}
    assert coalitions.alone(torch.tensor([0, 2])).tolist() == [1, 4]


def test_names():
    assert coalitions.name(5, NAMES) == "audio+text"
    assert coalitions.name(0, NAMES) == "none"


def test_what_is_left_of_a_coalition_among_those_present():
    present = torch.tensor([[True, False], [True, True], [False, False]])  # [M, N]
    found = coalitions.among_present(present)
    assert found.shape == (2, 8)
    for sample, has in enumerate(({0, 1}, {1})):
        assert [subsets()[s] for s in found[sample].tolist()] == [subsets()[s] & has for s in range(8)]
