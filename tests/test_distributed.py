"""The contrastive losses over a process group: two gloo processes against one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmfast import ops
from mmfast.reference import duc_loss as reference

WORLD_SIZE, NUM_DIMS = 2, 11

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)


def make(num_modalities: int, dtype: torch.dtype, num_samples: int = 12):
    generator = torch.Generator().manual_seed(num_modalities)
    features = torch.randn(num_modalities, num_samples, NUM_DIMS, generator=generator).to(dtype)
    return features, torch.rand(num_modalities, NUM_DIMS, generator=generator) > 0.5


def run(function, features: torch.Tensor, effective: torch.Tensor, group=None, **options):
    leaves = [feature.clone().requires_grad_() for feature in features]
    loss = function(leaves, effective, temperature=2.0, group=group, **options)
    return loss.detach(), torch.stack(torch.autograd.grad(loss.sum(), leaves))


def sigmoid(features: torch.Tensor, group=None, **options):
    leaves = [features[0].clone(), *(torch.tensor(x, dtype=features.dtype) for x in (0.5, -1.0))]
    query, temperature, bias = (leaf.requires_grad_() for leaf in leaves)
    loss = ops.unidirectional_sigmoid_loss(
        query, features[1], temperature=temperature, bias=bias, group=group, **options
    )
    return loss.detach(), *torch.autograd.grad(loss, [query, temperature, bias])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    group = dist.group.WORLD
    results = {}
    for num_modalities in (2, 3):
        for dtype in (torch.float64, torch.bfloat16):
            features, effective = make(num_modalities, dtype)
            # Equal halves; then 5 rows for the first process and 7 for the second, to be summed.
            mine = features.chunk(WORLD_SIZE, dim=1)[rank]
            unequal = features.split([5, 7], dim=1)[rank]
            key = (num_modalities, dtype)
            results[*key, "mean"] = run(ops.duc_loss, mine, ops.DucDims(effective), group)
            results[*key, "reference"] = run(reference.duc_loss, mine, effective, group)
            results[*key, "sum"] = run(ops.duc_loss, unequal, effective, group, reduction="sum")
            results[*key, "none"] = run(ops.duc_loss, unequal, effective, group, reduction="none")
    features, _ = make(2, torch.float64)
    query = features[0].chunk(WORLD_SIZE)[rank].clone().requires_grad_()
    loss = ops.unidirectional_info_nce(query, features[1].chunk(WORLD_SIZE)[rank], group=group)
    loss.backward()
    results["pair"] = (loss.detach(), query.grad)
    results["sigmoid"] = sigmoid(features.chunk(WORLD_SIZE, dim=1)[rank], group)
    results["sigmoid, unequal"] = sigmoid(features.split([5, 7], dim=1)[rank], group, reduction="sum")
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process computed, in order of rank."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("num_modalities", [2, 3], ids=["M2", "M3"])
class TestWholeBatch:
    def test_mean_of_losses_and_averaged_gradients(self, ranks, num_modalities, dtype):
        features, effective = make(num_modalities, dtype)
        loss, gradient = run(ops.duc_loss, features, effective)
        for kind in ("mean", "reference") if dtype == torch.float64 else ("mean",):
            losses, gradients = zip(*(rank[num_modalities, dtype, kind] for rank in ranks), strict=True)
            torch.testing.assert_close(sum(losses) / WORLD_SIZE, loss)
            # A process's rows enter the average over processes with weight 1 / W.
            torch.testing.assert_close(torch.cat(gradients, dim=1) / WORLD_SIZE, gradient)

    def test_unequal_batches_sum_to_the_whole(self, ranks, num_modalities, dtype):
        features, effective = make(num_modalities, dtype)
        loss, gradient = run(ops.duc_loss, features, effective, reduction="sum")
        losses, gradients = zip(*(rank[num_modalities, dtype, "sum"] for rank in ranks), strict=True)
        torch.testing.assert_close(sum(losses), loss)
        torch.testing.assert_close(torch.cat(gradients, dim=1), gradient)
        rows = torch.cat([rank[num_modalities, dtype, "none"][0] for rank in ranks])
        torch.testing.assert_close(rows, run(ops.duc_loss, features, effective, reduction="none")[0])


def test_info_nce(ranks):
    features, _ = make(2, torch.float64)
    query = features[0].clone().requires_grad_()
    loss = ops.unidirectional_info_nce(query, features[1])
    loss.backward()
    torch.testing.assert_close(sum(rank["pair"][0] for rank in ranks) / WORLD_SIZE, loss.detach())
    gathered = torch.cat([rank["pair"][1] for rank in ranks])
    torch.testing.assert_close(gathered / WORLD_SIZE, query.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sigmoid_loss(ranks, reduction):
    whole = sigmoid(make(2, torch.float64)[0], reduction=reduction)
    parts = [rank["sigmoid" if reduction == "mean" else "sigmoid, unequal"] for rank in ranks]
    divisor = WORLD_SIZE if reduction == "mean" else 1
    loss, query, temperature, bias = zip(*parts, strict=True)
    found = [sum(loss), torch.cat(query), sum(temperature), sum(bias)]
    torch.testing.assert_close([x / divisor for x in found], list(whole))
