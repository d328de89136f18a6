"""The emulation of CUDA notices the faults it is there for, planted in tests/cuda_emulation/faults.cu."""

from __future__ import annotations

import pytest
import torch

from support import emulation
from support.stems import ROOT

FAULTS = ["none", "no barrier", "no second barrier", "tail", "not initialised", "shared tail"]
FAULTS += ["lane missing", "mask without lane", "too much shared", "too much together", "not aligned"]
N = 150


@pytest.fixture(scope="module")
def module():
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    return emulation.EmulatedModule([ROOT / "tests/cuda_emulation/faults.cu"])


def reverse(module, fault: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, x with every piece of 64 reversed, and its sum, as a kernel with this fault computes them."""
    # One allocation more on both sides: memory that is there and is none of the kernel's.
    x, out = (torch.full((N + 16,), 7.0)[8:-8] for _ in range(2))
    x.copy_(torch.arange(float(N)))
    total = torch.empty(1)
    for tensor in (x, out, total):
        module.show(tensor, tensor.data_ptr())
    module.seed = seed
    module.reverse(x.data_ptr(), out.data_ptr(), total.data_ptr(), N, FAULTS.index(fault))
    return x, out, total


def is_right(x: torch.Tensor, out: torch.Tensor, total: torch.Tensor) -> bool:
    reversed_pieces = torch.cat([piece.flip(0) for piece in x.split(64)])
    return torch.equal(out, reversed_pieces) and bool(total == x.sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_right_kernel_is_right_in_every_order(module, seed):
    assert is_right(*reverse(module, "none", seed))


@pytest.mark.parametrize("fault", ["no barrier", "no second barrier", "not initialised"])
def test_a_wrong_result_shows(module, fault):
    assert not is_right(*reverse(module, fault))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "tail",
            r"reverse_kernel: block \(0, 0, 0\), thread \(22, 0, 0\): reads 4 bytes at .*, outside every",
        ),
        ("shared tail", r"thread \(0, 0, 0\): writes 4 bytes at .*, outside every tensor and array"),
        ("lane missing", "reverse_kernel: 31 of 64 threads wait for ever"),
        ("mask without lane", "a lane takes part in a warp's operation whose mask does not name it"),
        ("too much shared", "reverse: invalid configuration argument"),
        ("too much together", "more shared memory than the block may have"),
        ("not aligned", "a pointer that is not aligned as its type is"),
    ],
)
def test_what_cannot_go_on_raises(module, fault, message):
    with pytest.raises(RuntimeError, match=message):
        reverse(module, fault)
    # And leaves nothing behind.
    assert is_right(*reverse(module, "none"))


def test_a_tensor_that_is_gone_is_out_of_bounds(module):
    x, out, total = reverse(module, "none")
    address = x.data_ptr()
    del x
    with pytest.raises(RuntimeError, match="outside every tensor"):
        module.reverse(address, out.data_ptr(), total.data_ptr(), N, 0)


def test_the_number_of_arguments_is_checked(module):
    with pytest.raises(TypeError, match="reverse takes 5 arguments, got 2"):
        module.reverse(1, 2)
