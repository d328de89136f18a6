"""duc_loss: every tile and path of the kernels, keys of other processes, threads, memory."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import backend as _backend
from mmfast import ops
from support import emulation
from support.cases import DTYPES, HALF, dtype_name
from support.duc_loss import make, value_and_gradient
from support.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_part_of_keys(
    dtype,
    backend,
    num_queries,
    num_keys,
    num_dims,
    offset,
    device="cpu",
    temperature=2.0,
    with_residual=True,
):
    """Loss and residual of queries whose own keys are in the midst of all keys, and the same in float64."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(num_queries, num_dims, generator=generator) * 2 / num_dims**0.5
    key = torch.randn(num_keys, num_dims, generator=generator) * 2 / num_dims**0.5
    arguments = (temperature, offset, "none", with_residual)
    results = []
    wide = torch.promote_types(dtype, torch.float32)
    for kind, name in ((dtype, backend), (torch.float64, "reference"), (wide, "reference")):
        inputs = (query.to(device, dtype).to(kind), key.to(device, dtype).to(kind))
        loss, residual = torch.ops.mmfast.info_nce_fwd(*inputs, *arguments, name)
        # That of float16 is in float32 until it has its factors: it is rounded here as the gradient is there.
        results.append((loss, residual.to(kind)))
    for mine, true, simple in zip(*results, strict=True):
        assert_close_to_truth(mine, true, simple.to(mine.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "sizes", [(37, 200, 20, 0), (37, 200, 48, 101), (65, 129, 300, 64), (3, 130, 64, 127)], ids=str
)
def test_queries_are_a_part_of_the_keys(sizes, dtype, backend, device):
    check_part_of_keys(dtype, backend, *sizes, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_many_keys_of_few_queries(dtype, backend, device):
    if dtype != torch.float64:
        check_part_of_keys(dtype, backend, 20, 1100, 70, 1000, device)
        return
    # The order of so long a sum shows in float64, which has no wider truth.
    features, effective = make((3, 1100, 12), dtype, device=device)
    keys, queries = list(features), list(features[:, 1000:1020])
    arguments = (keys, effective, None, [], 2.0, 1000, "none", True)
    expected = torch.ops.mmfast.duc_loss_fwd(queries, *arguments, "reference")
    torch.testing.assert_close(torch.ops.mmfast.duc_loss_fwd(queries, *arguments, backend), expected)


@pytest.mark.parametrize("num_dims", [40, 100, 200, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_every_tile_of_the_triton_kernel(dtype, num_dims, monkeypatch):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    if not _backend.interpreting():
        pytest.skip("tiles made for other devices need not fit this one")
    module = _backend.kernels("duc_loss")
    tried = []
    for target in (80, 86, 90, 100, "gfx942", "gfx950", "gfx942:sramecc+:xnack-"):
        common, tiles = module._choices(target, dtype, "ieee", num_dims)
        for tile in tiles:
            sizes = (common, tile.queries, tile.keys)
            if sizes not in tried:
                tried.append(sizes)
                monkeypatch.setattr(module, "_choices", lambda *_, only=(common, [tile]): only)
                num_queries = tile.queries + 7
                check_part_of_keys(dtype, "triton", num_queries, num_queries + 2 * tile.keys, num_dims, 30)
                monkeypatch.undo()
    assert tried


@pytest.mark.parametrize("num_dims", [40, 100, 200, 300, 520])
@pytest.mark.parametrize("compute_capability", [8, 9])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_every_path_of_the_cuda_kernel(dtype, compute_capability, num_dims):
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    with emulation.emulated() as module:
        module.compute_capability = compute_capability
        # Several tiles of every kernel, so that stages are filled again; more than 512 keys are split.
        check_part_of_keys(dtype, "cuda", 70, 330 if dtype == torch.float16 else 600, num_dims, 101)


@pytest.fixture
def hopper():
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    with emulation.emulated() as module:
        module.compute_capability = 9
        yield module


# Four tiles of keys, positive ones in the second and third: the others are full, and without masks. Exponents
# of a row reach 3, 300, 3,000 and 30,000, of which the last are subtracted before they are scaled.
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("temperature", [2.0, 1e-2, 1e-3, 1e-4, 1e-9])
@pytest.mark.parametrize(
    ("dtype", "num_dims"), [(torch.bfloat16, 40), (torch.float16, 40), (torch.bfloat16, 100)]
)
@pytest.mark.usefixtures("hopper")
def test_full_tiles_on_hopper(dtype, num_dims, temperature, with_residual):
    check_part_of_keys(dtype, "cuda", 70, 512, num_dims, 230, "cpu", temperature, with_residual)


# Five blocks of 128 queries, of which the emulated kernels sweep the last in two parts: a thread block takes
# one of these items, some, or all.
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(
    ("num_dims", "dtype"),
    [(64, torch.float16), *((size, torch.bfloat16) for size in (64, 128, 256, 512))],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_blocks_take_several_items_on_hopper(dtype, num_dims, with_residual, hopper):
    check_part_of_keys(dtype, "cuda", 520, 530, num_dims, 10, with_residual=with_residual)
    query, key = (torch.randn(rows, num_dims).to(dtype) / 8 for rows in (520, 530))
    results = []
    for num_sms in (1000, 1):
        hopper.num_sms = num_sms
        results.append(torch.ops.mmfast.info_nce_fwd(query, key, 2.0, 10, "none", with_residual, "cuda"))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# Six pairs of one kernel, or of several, or some of them without columns: 18 blocks of queries, of which the
# emulated kernels sweep the last two in parts, on Hopper and where the last pair has up to 512 columns.
@pytest.mark.parametrize(
    ("compute_capability", "numbers", "is_prepared"),
    [
        (9, (70, 90, 65), True),
        (9, (70, 90, 65), False),
        (9, (70, 90, 0), False),
        (9, (20, 90, 65), True),
        (9, (5, 9, 520), True),
        (8, (70, 90, 65), True),
        (8, (70, 90, 65), False),
    ],
    ids=str,
)
def test_blocks_take_items_of_several_pairs(compute_capability, numbers, is_prepared, hopper):
    hopper.compute_capability = compute_capability
    effective = torch.zeros(3, sum(numbers), dtype=torch.bool)
    for modality, number in enumerate(numbers):
        effective[modality, sum(numbers[:modality]) :][:number] = True
    keys = list((torch.randn(3, 520, sum(numbers)) / 6).bfloat16())
    features = [key[100:400] for key in keys]
    dims = ops.DucDims(effective)
    columns, sizes = (dims.columns, list(dims.sizes)) if is_prepared else (None, [])
    arguments = (effective, columns, sizes, 2.0, 100, "none", True)
    results = []
    for num_sms in (1000, 1):
        hopper.num_sms = num_sms
        results.append(torch.ops.mmfast.duc_loss_fwd(features, keys, *arguments, "cuda"))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    truth, simple = (
        torch.ops.mmfast.duc_loss_fwd(
            [x.to(kind) for x in features], [x.to(kind) for x in keys], *arguments, "reference"
        )
        for kind in (torch.float64, torch.float32)
    )
    for mine, true, usual in zip(results[0], truth, simple, strict=True):
        assert_close_to_truth(mine, true, usual.to(mine.dtype))


def test_exponentials_beside_the_special_functions():
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    module = emulation.EmulatedModule([emulation.ROOT / "tests/cuda_emulation/exponentials.cu"])
    special = torch.tensor([0.0, -1.0, -126.0, -127.0, -300.0, float("-inf"), float("nan")])
    x = torch.cat([special, torch.linspace(-130, 0.5, 20001)])
    found = torch.empty_like(x)
    for tensor in (x, found):
        module.show(tensor, tensor.data_ptr())
    module.exponentials(x.data_ptr(), found.data_ptr(), len(x))
    assert found[:6].tolist() == [1.0, 0.5, 2.0**-126, 0.0, 0.0, 0.0]
    assert bool(found[6].isnan())
    truth = x.double().exp2()
    # Two units in the last place, and below the normal range as good as nothing.
    assert bool(((found - truth).abs() <= 2.0**-22 * truth + 2.0**-126)[7:].all())


# Scores of 2,048 and a little more, exact in float32, of which every tile has larger ones than those before.
@pytest.mark.parametrize("num_keys", [512, 1100])
@pytest.mark.parametrize("compute_capability", [8, 9])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_a_maximum_that_grows_under_large_scores(dtype, compute_capability, num_keys, hopper):
    hopper.compute_capability = compute_capability
    query = torch.tensor([64.0, 1.0]).expand(16, 2)
    key = torch.stack([torch.full((num_keys,), 32.0), (torch.arange(num_keys) // 32) / 8], 1)
    arguments = (1 / 1.3, 5, "none", True)
    found = torch.ops.mmfast.info_nce_fwd(query.to(dtype), key.to(dtype), *arguments, "cuda")[0]
    truth = torch.ops.mmfast.info_nce_fwd(query.double(), key.double(), *arguments, "reference")[0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("compute_capability", [8, 9])
def test_a_loss_of_nothing_is_zero(compute_capability, with_residual, hopper):
    # Every sample is its own key, in a direction of its own.
    hopper.compute_capability = compute_capability
    features = torch.cat([7.0 * torch.eye(60), -7.0 * torch.eye(60)]).bfloat16()
    arguments = (0.0173, 0, "none", with_residual, "cuda")
    loss = torch.ops.mmfast.info_nce_fwd(features, features, *arguments)[0]
    assert loss.tolist() == [0.0] * 120


# One key after the other, so that each way to take an exponential is met.
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.usefixtures("hopper")
def test_special_scores_of_full_tiles_on_hopper(with_residual):
    generator = torch.Generator().manual_seed(6)
    query, key = torch.randn(2, 384, 40, generator=generator).bfloat16()
    query = query[:3].abs()
    arguments = (2.0, 0, "none", with_residual, "cuda")
    for place in range(256, 276):
        changed = key.clone()
        changed[place, 3] = float("nan")
        assert bool(torch.ops.mmfast.info_nce_fwd(query, changed, *arguments)[0].isnan().all())
        # Scores of -infinity count for nothing, as those do that are too small for their exponential.
        changed[place] = float("-inf")
        small = key.clone()
        small[place] = -1e4
        found, expected = (
            torch.ops.mmfast.info_nce_fwd(query, keys, *arguments)[0] for keys in (changed, small)
        )
        assert torch.equal(found, expected)
        assert bool(found.isfinite().all())


# Capability and residual decide the main kernel, a prepared mask what lies where: every pair of the three.
@pytest.mark.parametrize(
    ("compute_capability", "with_residual", "is_prepared"),
    [(8, False, False), (8, True, True), (9, False, True), (9, True, False)],
)
@pytest.mark.parametrize("sizes", [(40, 100, 60), (200, 300, 100), (0, 520, 520)], ids=str)
def test_pairs_of_different_widths_in_the_cuda_kernel(compute_capability, sizes, with_residual, is_prepared):
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    first, second, third = sizes
    effective = torch.zeros(3, 530, dtype=torch.bool)
    # The first teaches what the second and the third lack, the second what the third lacks.
    effective[0, : max(first, second)] = True
    effective[1, first : first + third] = True
    effective[2, second : max(first, second)] = True
    generator = torch.Generator().manual_seed(5)
    features = (torch.randn(3, 150, 530, generator=generator) / 10).bfloat16()
    dims = ops.DucDims(effective)
    columns, numbers = (dims.columns, list(dims.sizes)) if is_prepared else (None, [])
    arguments = ([], effective, columns, numbers, 2.0, 0, "none", with_residual)
    results = []
    with emulation.emulated() as module:
        module.compute_capability = compute_capability
        for kind, name in (
            (torch.bfloat16, "cuda"),
            (torch.float64, "reference"),
            (torch.float32, "reference"),
        ):
            inputs = [feature.to(kind) for feature in features]
            results.append(torch.ops.mmfast.duc_loss_fwd(inputs, *arguments, name))
    for mine, true, simple in zip(*results, strict=True):
        assert_close_to_truth(mine, true, simple.to(mine.dtype))


@pytest.mark.usefixtures("restored_threads", "cpu_module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 201, 40), (2, 515, 130)], ids=str)
def test_number_of_threads_changes_no_bit(shape, dtype):
    features, effective = make(shape, dtype)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        options = ([], effective, None, [], 2.0, 0, "mean", True, "cpu")
        results.append(torch.ops.mmfast.duc_loss_fwd(list(features), *options))
    for loss, residuals in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(residuals, results[0][1])


@pytest.mark.usefixtures("cpu_module")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_samples", [0, 1, 64, 65])
def test_one_small_pair_on_the_cpu_is_plain_torch(num_samples, reduction, monkeypatch):
    module = importlib.import_module("mmfast.ops.duc_loss")
    raw, taken = module.info_nce_op, []
    monkeypatch.setattr(module, "info_nce_op", lambda *args: taken.append(1) or raw(*args))
    query, key = make((2, num_samples, 6), torch.float32)[0]
    results = []
    for backend in ("auto", "cpu"):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        loss = ops.unidirectional_info_nce(*leaves, temperature=2.0, reduction=reduction, backend=backend)
        loss.sum().backward()
        assert leaves[1].grad is None
        results.append((loss.detach(), leaves[0].grad))
    torch.testing.assert_close(*results, equal_nan=True)
    # Once by name, and by "auto" where the kernel is the faster.
    assert len(taken) == (2 if num_samples > 64 else 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = ops.unidirectional_info_nce(query, key, temperature=2.0, reduction=reduction)
    torch.testing.assert_close(exact, results[1][0], rtol=0, atol=0, equal_nan=True)
    assert len(taken) == (3 if num_samples > 64 else 2)


@pytest.mark.parametrize("taught", [(70, 0), (40, 30), (1, 0, 33)], ids=str)
def test_triton_takes_memory_for_the_columns_there_are(taught):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    kernels, device = _backend.kernels("duc_loss"), "cpu" if _backend.interpreting() else "cuda"
    num_modalities, num_samples, num_dims = len(taught), 100, 70
    # A modality alone is effective in its columns, which it teaches all others.
    effective = torch.zeros(num_modalities, num_dims, dtype=torch.bool, device=device)
    for modality, number in enumerate(taught):
        effective[modality, sum(taught[:modality]) :][:number] = True
    features = list(torch.randn(num_modalities, num_samples, num_dims, device=device))
    fitted = (num_modalities - 1) * sum(-(-number // 16) * 16 for number in taught)
    whole = num_modalities * (num_modalities - 1) * 80
    found = []
    for sizes, columns in ((ops.DucDims(effective).sizes, fitted), ((), whole)):
        allocated = []

        class Spy(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, allocated=allocated):
                out = function(*args, **(kwargs or {}))
                if "empty" in str(function) or "zeros" in str(function):
                    allocated.append(out.numel())
                return out

        with Spy():
            results = kernels.duc_loss_fwd(features, features, effective, sizes, 1.0, 0, "none", True)
        found.append(results)
        # Queries, keys and their residuals; besides, a few numbers of each pair's samples and dimensions.
        least = 3 * num_samples * columns + results[1].numel()
        pairs = num_modalities * (num_modalities - 1)
        assert least <= sum(allocated) <= least + pairs * (num_samples + num_dims + 2)
    # Not bit by bit: tiles of another width sum in another order.
    options = (effective, None, [], 1.0, 0, "none", True, "reference")
    truth, plain = (
        torch.ops.mmfast.duc_loss_fwd([x.to(dtype) for x in features], [], *options)
        for dtype in (torch.float64, torch.float32)
    )
    for results in found:
        for mine, right, usual in zip(results, truth, plain, strict=True):
            assert_close_to_truth(mine, right, usual)


def test_chunks_of_queries_give_the_whole(monkeypatch):
    features, effective = make((2, 33, 12))
    op = functools.partial(ops.duc_loss, effective=effective, backend="reference")
    expected = value_and_gradient(op, features, torch.float64)
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 33 * 5)
    torch.testing.assert_close(value_and_gradient(op, features, torch.float64), expected)
