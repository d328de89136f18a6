"""The samples by class, as the Triton kernels of class moments and k-means order them."""

from __future__ import annotations

import importlib

import pytest
import torch

from mmfast import backend as _backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# Tiles have 128 labels; the scan takes 4 blocks and 16 classes at a time, the order 128 classes.
ORDERS = [
    (torch.int64, sizes, most_blocks)
    for sizes in [(1, 1), (128, 1), (129, 2), (300, 16), (700, 17), (300, 130)]
    for most_blocks in (1, 3, 1024)
]
ORDERS += [
    (dtype, (300, 16), most_blocks) for dtype in (torch.int32, torch.uint8) for most_blocks in (1, 1024)
]


@pytest.mark.parametrize(("label_dtype", "sizes", "most_blocks"), ORDERS, ids=str)
def test_triton_orders_as_a_stable_sort(sizes, most_blocks, label_dtype, monkeypatch):
    if _backend.why_not("triton") is not None:
        pytest.skip("triton cannot run here")
    num_samples, num_classes = sizes
    common = importlib.import_module("mmfast.kernels._class_order")
    monkeypatch.setattr(common, "_MOST_OWN_TILES", 1)
    monkeypatch.setattr(common, "_MOST_BLOCKS", most_blocks)
    # Several steps of the scan, too.
    monkeypatch.setattr(common, "_SCAN_BLOCKS", {"BLOCK_B": 4, "BLOCK_C": 16})
    device = "cpu" if _backend.interpreting() else "cuda"
    generator = torch.Generator().manual_seed(0)
    # Some name no class: beyond the last one, and below 0 where the type has such numbers.
    low = 0 if label_dtype == torch.uint8 else -2
    labels = torch.randint(low, num_classes + 3, (2 * num_samples,), generator=generator)
    labels = labels.to(device, label_dtype)[::2]
    found = common._by_class(labels, num_classes, 8)
    # The interpreter runs one block after another, in one order.
    again = found if _backend.interpreting() else common._by_class(labels, num_classes, 8)
    known = ((labels >= 0) & (labels < num_classes)).nonzero().squeeze(1)
    expected = known[labels[known].long().sort(stable=True).indices]
    count = labels[known].long().bincount(minlength=num_classes)
    assert torch.equal(found.order[: len(known)], expected)
    assert torch.equal(again.order[: len(known)], expected)
    assert torch.equal(found.count, count)
    for edges, sizes in zip(found.edges, (count, (count + 7) // 8), strict=True):
        assert edges[0] == 0
        assert torch.equal(edges[1:], sizes.cumsum(0))


def test_a_table_of_many_classes_stays_small():
    share = pytest.importorskip("mmfast.kernels._class_order")._share
    for num_samples in (1, 512, 513, 20_000, 10**7, 2**31):
        for num_classes in (1, 10, 1000, 10**6, 10**8):
            num_blocks, tiles = share(num_samples, num_classes)
            assert num_blocks * tiles * 128 >= num_samples > (num_blocks - 1) * tiles * 128
            assert num_blocks == 1 or num_blocks * num_classes <= max(2**22, 4 * num_samples)
