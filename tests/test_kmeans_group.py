"""K-means and purity over a process group: three gloo processes, some without rows, against one with all."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import kmeans as reference

WORLD_SIZE, NUM_DIMS, NUM_CLUSTERS = 3, 6, 5
SHARES = {"unequal": [300, 37, 163], "one empty": [0, 260, 240]}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# From a start, one iteration after the other: the inertia must fall.
STEPS = 6

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)


def make(spread: float, dtype: torch.dtype = torch.float32, offset: float = 0.0):
    generator = torch.Generator().manual_seed(7)
    centres = 4 * torch.randn(NUM_CLUSTERS, NUM_DIMS, generator=generator)
    labels = torch.randint(NUM_CLUSTERS, (500,), generator=generator)
    noise = spread * torch.randn(500, NUM_DIMS, generator=generator)
    return (centres[labels] + noise + offset).to(dtype), labels


# Samples and start of clusters that run empty: three in turn, as far samples are taken away.
FEW = torch.tensor([[0.0], [0.1], [10.0], [10.1], [50.0], [51.0], [200.0]])
FEW_START = torch.tensor([[5.0], [1000.0], [2000.0], [3000.0]])
# Fewer different samples than clusters.
ALIKE = torch.tensor([[1.0], [1.0], [2.0], [1.0], [2.0], [2.0], [1.0]])


def clusterings(split, group=None) -> dict:
    """Return clusterings of samples of which `split` gives this process's, by a name of each."""
    kmeans = functools.partial(ops.kmeans, group=group)
    found = {}
    for shares in SHARES:
        for name, dtype in DTYPES.items():
            apart, _ = make(0.1, dtype)
            found["apart", shares, name] = kmeans(split(apart, shares), NUM_CLUSTERS, num_init=3, seed=2)
        near, _ = make(2.5, torch.float64)
        found["near", shares] = kmeans(split(near, shares), 12, init=near[:12], tol=0.0)
        found["reference", shares] = reference.kmeans(
            split(near, shares), 12, init=near[:12], tol=0.0, group=group
        )
        found["few seeds", shares] = kmeans(split(near, shares), 9, seed=4)
    near, _ = make(2.5)
    for step in range(1, STEPS):
        found["step", step] = kmeans(split(near, "unequal"), 8, init=near[:8], max_iter=step, tol=0.0)
    found["empty"] = kmeans(split(FEW, [3, 0, 4]), 4, init=FEW_START)
    found["alike"] = kmeans(split(ALIKE, [2, 4, 1]), 5)
    found["no dimensions"] = kmeans(split(FEW[:, :0], [3, 0, 4]), 2)
    found["huge"] = kmeans(split(make(0.1)[0] * 2.0**100, "unequal"), NUM_CLUSTERS, num_init=3, seed=2)
    far, _ = make(0.05, offset=1e4)
    found["far away"] = kmeans(split(far, "unequal"), NUM_CLUSTERS, num_init=3)
    return found


def purities(split, group=None) -> dict:
    assignments = torch.tensor([0, 0, 0, 3, 3, 1])
    labels = torch.tensor([2, 2, 0, 1, 2, 1], dtype=torch.int32)
    wide = torch.tensor([7, 7, 7, 10**12, 10**12, 2**62]), torch.tensor([10**12, 3, 10**12, 3, 2**62, 2**62])
    functions = {"op": ops.cluster_purity, "reference": reference.cluster_purity}
    return {
        (str(sizes), name, kind): purity(split(a, sizes), split(y, sizes), group=group)
        for sizes in ([2, 3, 1], [0, 6, 0])
        for name, (a, y) in {"narrow": (assignments, labels), "wide": wide}.items()
        for kind, purity in functions.items()
    }


def bad_calls(rank: int, group: dist.ProcessGroup) -> dict:
    """What only the second process does wrong: each must raise in all, and none may wait."""
    x = torch.rand(4, NUM_DIMS)
    y = torch.zeros(4, dtype=torch.int64)
    is_bad = rank == 1
    kmeans, purity = (
        functools.partial(ops.kmeans, group=group),
        functools.partial(ops.cluster_purity, group=group),
    )
    return {
        "NaN": lambda: kmeans(x / 0 if is_bad else x, 2),
        "no tensor": lambda: kmeans(None if is_bad else x, 2),
        "dtype": lambda: kmeans(x.double() if is_bad else x, 2),
        "dimensions": lambda: kmeans(x[:, :-1] if is_bad else x, 2),
        "clusters": lambda: kmeans(x, 3 if is_bad else 2),
        "too many clusters": lambda: kmeans(x, 13),
        "no cluster": lambda: kmeans(x, 0),
        "init": lambda: kmeans(x, 2, init=x[:2] if is_bad else "k-means++"),
        "iterations": lambda: kmeans(x, 2, max_iter=5 if is_bad else 7),
        "option": lambda: kmeans(x, 2, tol=-1 if is_bad else 0),
        "backend": lambda: kmeans(x, 2, backend="cuda" if is_bad else "reference"),
        "negative label": lambda: purity(y, y - 1 if is_bad else y),
        "shapes": lambda: purity(y, y[:1] if is_bad else y),
        "no sample": lambda: purity(y[:0], y[:0]),
        "group": lambda: ops.kmeans(x, 2, group="world"),
        "another's group": lambda: ops.kmeans(x, 2, group=dist.GroupMember.NON_GROUP_MEMBER),
    }


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    group = dist.group.WORLD

    def split(rows: torch.Tensor, shares: str | list[int]) -> torch.Tensor:
        return rows.split(SHARES[shares] if isinstance(shares, str) else shares)[rank]

    results = {"kmeans": clusterings(split, group), "purity": purities(split, group)}
    results["again"] = clusterings(split, group)
    results["bad"] = {name: said(call) for name, call in bad_calls(rank, group).items()}
    pair = dist.new_group([0, 2])
    if rank != 1:
        x, _ = make(0.1)
        results["pair"] = ops.kmeans(x[rank // 2 :: 2], NUM_CLUSTERS, group=pair, num_init=3)
    torch.save({key: _plain(value) for key, value in results.items()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _plain(found):
    """Return named tuples as tuples, which torch.load takes."""
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    return tuple(found) if isinstance(found, tuple) else found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found, in order of rank."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def alone() -> dict:
    return clusterings(lambda rows, _: rows)


def whole(ranks: list[dict], case) -> tuple:
    """Return a clustering with all processes' assignments, of which everything else must be the same bits."""
    parts = [rank["kmeans"][case] for rank in ranks]
    for other in parts[1:]:
        assert torch.equal(parts[0][0], other[0])
        assert torch.equal(parts[0][2], other[2])
        assert parts[0][3] == other[3]
    return parts[0][0], torch.cat([part[1] for part in parts]), *parts[0][2:]


CASES = [
    *(("apart", shares, dtype) for shares in SHARES for dtype in DTYPES),
    *((kind, shares) for kind in ("near", "reference", "few seeds") for shares in SHARES),
    *(("step", step) for step in range(1, STEPS)),
    *(("empty",), ("no dimensions",), ("huge",), ("far away",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_as_one_process_with_all_rows(ranks, alone, case):
    key = case if len(case) > 1 else case[0]
    centroids, assignments, inertia, num_iter = whole(ranks, key)
    expected = alone[key]
    rtol = 1e-10 if centroids.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(inertia, expected[2], rtol=rtol, atol=0)
    assert torch.equal(assignments, expected[1])
    torch.testing.assert_close(centroids, expected[0], rtol=rtol, atol=1e-4)
    assert centroids.dtype == expected[0].dtype
    assert num_iter == expected[3]


def test_every_process_has_the_same_bits_in_every_run(ranks):
    for rank in ranks:
        for case, found in rank["kmeans"].items():
            again = rank["again"][case]
            assert all(map(torch.equal, found[:3], again[:3])), case
            assert found[3] == again[3]
            assert torch.equal(found[0], ranks[0]["kmeans"][case][0]), case


@pytest.mark.parametrize("shares", SHARES)
def test_laws(ranks, shares):
    features, labels = make(2.5, torch.float64)
    centroids, assignments, inertia, _ = whole(ranks, ("near", shares))
    distance = torch.cdist(features, centroids).square()
    torch.testing.assert_close(distance.gather(1, assignments[:, None])[:, 0], distance.amin(1))
    torch.testing.assert_close(inertia, distance.amin(1).sum())
    for cluster in range(12):
        torch.testing.assert_close(centroids[cluster], features[assignments == cluster].mean(0))
    apart = whole(ranks, ("apart", shares, "float32"))[1]
    assert ops.cluster_purity(apart, labels) == 1


def test_inertia_never_rises(ranks):
    inertia = [float(whole(ranks, ("step", step))[2]) for step in range(1, STEPS)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(inertia))
    assert inertia[-1] < 0.95 * inertia[0]


def test_empty_clusters_take_the_farthest_samples_of_all(ranks):
    centroids, assignments, *_ = whole(ranks, "empty")
    assert sorted(centroids.flatten().tolist()) == pytest.approx([5.05, 50, 51, 200], rel=1e-4)
    assert len(assignments.unique()) == 4


def test_fewer_different_samples_than_clusters(ranks):
    centroids, assignments, inertia, num_iter = whole(ranks, "alike")
    assert inertia == 0
    assert torch.equal(centroids[assignments], ALIKE)
    assert num_iter < 300


def test_of_some_processes(ranks):
    _, labels = make(0.1)
    first, second = (ranks[rank]["pair"] for rank in (0, 2))
    assert torch.equal(first[0], second[0])
    assert ops.cluster_purity(torch.cat([first[1], second[1]]), torch.cat([labels[::2], labels[1::2]])) == 1


def test_purity(ranks):
    expected = purities(lambda rows, _: rows)
    assert all(rank["purity"] == expected for rank in ranks)
    assert sorted(set(expected.values())) == [4 / 6]


BAD = {
    "NaN": "ValueError: features must be finite, got 24 NaN or infinite values",
    "no tensor": "TypeError: features must be a torch.Tensor, got NoneType",
    "option": "ValueError: tol must be finite and not negative, got -1",
    "backend": "BackendUnavailableError: backend 'cuda' cannot run kmeans",
    "negative label": "ValueError: labels must not be negative, got -1",
    "shapes": "ValueError: labels must have shape [N] = [4], got [1]",
}
BAD_IN_ALL = {
    "dtype": "ValueError: the dtype of features must be the same in all processes of the group, "
    "got float32, float64, float32",
    "dimensions": "ValueError: the number of features' dimensions must be the same in all processes of the "
    "group, got 6, 5, 6",
    "clusters": "ValueError: num_clusters must be the same in all processes of the group, got 2, 3, 2",
    "too many clusters": "ValueError: num_clusters must lie in [1, N] = [1, 12], got 13 "
    "for processes of 4, 4, 4",
    "no cluster": "ValueError: num_clusters must be at least 1, got 0",
    "init": "ValueError: init must be the same in all processes of the group, "
    "got k-means++, centroids, k-means++",
    "iterations": "ValueError: max_iter must be the same in all processes of the group, got 7, 5, 7",
    "no sample": "ValueError: labels must hold at least one sample in some process of the group, got none",
    "group": "TypeError: group must be a process group that this process is in, got 'world'",
    "another's group": "TypeError: group must be a process group that this process is in, got -100",
}


@pytest.mark.parametrize("case", [*BAD, *BAD_IN_ALL])
def test_bad_input_raises_in_every_process(ranks, case):
    found = [rank["bad"][case] for rank in ranks]
    if case in BAD_IN_ALL:
        assert all(text.startswith(BAD_IN_ALL[case]) for text in found), found
        return
    assert found[1].startswith(BAD[case])
    kind, text = found[1].split(": ", 1)
    kind = "RuntimeError" if kind == "BackendUnavailableError" else kind
    assert found[0] == found[2] == f"{kind}: in process 1 of the group: {text}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_one_assignment_in_chunks(dtype, backend, device, monkeypatch):
    """What kmeans takes of a backend over a group, by samples about an offset far from them."""
    if not _backend.supports(backend, "kmeans", dtype):
        pytest.skip("its kernel does not take this dtype here")
    features = make(2.5, dtype)[0].to(device)
    wide = features.to(torch.promote_types(dtype, torch.float32))
    offset, centroids = wide.mean(0) + 1, wide[:9] - wide.mean(0) - 1
    centroids[8] = 1000
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 900)
    nearest, total, count = torch.ops.mmfast.kmeans_assign(features, offset, centroids, backend)
    assert torch.equal(nearest, torch.cdist(wide - offset, centroids).argmin(1))
    assert torch.equal(count, torch.bincount(nearest, minlength=9))
    assert total.dtype == torch.float64
    expected = torch.stack([(wide - offset)[nearest == k].double().sum(0) for k in range(9)])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_a_group_of_one_is_alone(tmp_path, backend, device):
    if dist.is_initialized():
        pytest.skip("a group is there already")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        features = make(2.5)[0][:60].to(device)
        found = ops.kmeans(features, 3, group=dist.group.WORLD, backend=backend, max_iter=3)
        purity = ops.cluster_purity(found.assignments, found.assignments % 2, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    expected = ops.kmeans(features, 3, backend=backend, max_iter=3)
    assert all(map(torch.equal, found[:3], expected[:3]))
    assert purity == ops.cluster_purity(found.assignments, found.assignments % 2)
