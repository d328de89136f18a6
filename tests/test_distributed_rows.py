"""What processes gather of each other: rows in the order of the data, merged moments, answers and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmfast import distributed, ops

WORLD_SIZE, NUM_CLASSES = 3, 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
# By length: as many rows in each process, one more in some, none in some, none at all.
LENGTHS = (6, 7, 11, 2, 0)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)


def rows(length: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    values = torch.randint(0, 200, (length, *shape), generator=generator)
    return values % 2 == 0 if dtype == torch.bool else values.to(dtype)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # The last class has no sample at all.
    return torch.randn(50, 6, generator=generator), torch.randint(NUM_CLASSES - 1, (50,), generator=generator)


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def of_rank_one(rank: int) -> int:
    if rank == 1:
        raise FileNotFoundError("no such file")
    return rank


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    gather, results = distributed.gather_rows, {}
    for length in LENGTHS:
        for dtype in DTYPES:
            results[length, dtype] = gather(rows(length, dtype, 3)[rank::WORLD_SIZE])
    results["flat"] = gather(rows(7, torch.float32)[rank::WORLD_SIZE].requires_grad_())
    results["nothing a row"] = gather(rows(7, torch.float32, 0, 3)[rank::WORLD_SIZE])
    results["at strides"] = gather(rows(7, torch.int64, 2, 5).transpose(1, 2)[rank::WORLD_SIZE])
    results["NaN"] = gather(torch.tensor([float("nan"), -0.0, float("inf")])[rank::WORLD_SIZE])
    features, labels = samples()
    own = ops.class_moments(features[rank::WORLD_SIZE], labels[rank::WORLD_SIZE], NUM_CLASSES)
    results["moments"] = tuple(distributed.merge_moments(own))
    results["moments of two"] = tuple(distributed.merge_moments(None if rank == 1 else own))
    results["moments of none"] = distributed.merge_moments(None)
    results["answers"] = distributed.ask_all(lambda: rank**2)
    results["said"] = {
        "shares": said(lambda: gather(torch.zeros(4 if rank == 2 else 2))),
        "shape": said(lambda: gather(torch.zeros(2, 3 if rank == 2 else 4))),
        "dtype": said(lambda: gather(torch.zeros(2, dtype=torch.float64 if rank == 2 else None))),
        "question": said(lambda: distributed.ask_all(lambda: of_rank_one(rank))),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found, in order of rank."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_come_in_the_order_of_the_data(ranks, length):
    for rank in ranks:
        for dtype in DTYPES:
            expected = rows(length, dtype, 3)
            found = rank[length, dtype]
            assert found.dtype == dtype
            assert found.shape == expected.shape
            assert torch.equal(found, expected)


def test_rows_of_any_shape(ranks):
    for rank in ranks:
        assert torch.equal(rank["flat"], rows(7, torch.float32))
        assert not rank["flat"].requires_grad
        assert rank["nothing a row"].shape == (7, 0, 3)
        assert torch.equal(rank["at strides"], rows(7, torch.int64, 2, 5).transpose(1, 2))
        assert [str(x) for x in rank["NaN"].tolist()] == ["nan", "-0.0", "inf"]


def test_moments_are_those_of_all_samples_and_the_same_bits_everywhere(ranks):
    features, labels = samples()
    whole = ops.class_moments(features, labels, NUM_CLASSES)
    torch.testing.assert_close(ranks[0]["moments"], tuple(whole), equal_nan=True)
    for rank in ranks[1:]:
        for one, other in zip(rank["moments"], ranks[0]["moments"], strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_process_without_samples_counts_nothing(ranks):
    features, labels = samples()
    kept = torch.arange(50) % WORLD_SIZE != 1
    two = ops.class_moments(features[kept], labels[kept], NUM_CLASSES)
    for rank in ranks:
        torch.testing.assert_close(rank["moments of two"], tuple(two), equal_nan=True)
        assert rank["moments of none"] is None


def test_what_does_not_fit_raises_in_every_process(ranks):
    for rank in ranks:
        assert rank["answers"] == [0, 1, 4]
        assert rank["said"]["shares"] == (
            "ValueError: processes must have [3, 3, 2] of 8 rows, every W-th each, got [2, 2, 4]"
        )
        assert rank["said"]["shape"] == (
            "ValueError: rows must have one shape and dtype in all processes, "
            "got [4] of float32, [4] of float32, [3] of float32"
        )
        assert rank["said"]["dtype"].endswith("got [] of float32, [] of float32, [] of float64")
    found = [rank["said"]["question"] for rank in ranks]
    assert found[1] == "FileNotFoundError: no such file"
    assert found[0] == found[2] == "RuntimeError: in process 1 of the group: no such file"


def test_alone_there_is_nothing_to_gather():
    own = torch.zeros(3)
    assert distributed.gather_rows(own) is own
    moments = ops.class_moments(*samples(), NUM_CLASSES)
    assert distributed.merge_moments(moments) is moments
    assert distributed.merge_moments(None) is None
    assert distributed.gather_objects("one") == ["one"]
    with pytest.raises(FileNotFoundError):
        distributed.ask_all(lambda: of_rank_one(1))
