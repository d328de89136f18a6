"""Checks of kernels on a GPU, one line of JSON each: checks.py riskiest|edge|op|graph|warm [BACKEND STEM].

Judged by the rule of tests/support/numerics.py. `--rehearse` repeats little and judges nothing.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import steps
from mmfast import backend, ops
from mmfast.reference import duc_loss as duc_reference
from support import every_op, numerics
from support.cases import DTYPES, dtype_name

SIZES = (1500, 20, 1)
RUNS = 30
DEVICE = torch.device("cuda")
# After these errors no call of the process works any more.
_FATAL = ("illegal memory access", "launch failure", "misaligned", "illegal instruction", "hardware", "lost")


class Report:
    """Writes what each check found, at once."""

    def __init__(self, rehearsal: bool):
        self.rehearsal = rehearsal
        self.wrong = 0
        path = os.environ.get("MMFAST_GPU_RESULTS")
        self.path = Path(path) if path else None

    def check(self, name: str, run: Callable[[], dict]) -> None:
        """Run one check; what it raises is its result. One that costs the device's context ends all."""
        begun = time.perf_counter()
        entry: dict = {"check": name, "ok": True}
        fatal = False
        try:
            entry |= run()
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            entry |= {"ok": False, "error": f"{type(error).__name__}: {text}"}
            fatal = any(words in text for words in _FATAL)
            if self.rehearsal and isinstance(error, AssertionError):
                entry["ok"] = True
        entry |= {"seconds": round(time.perf_counter() - begun, 3), "rehearsal": self.rehearsal}
        if self.path is not None:
            steps.append(self.path, entry)
        print(entry, flush=True)
        self.wrong += not entry["ok"]
        if fatal:
            raise SystemExit(
                f"the device's context is lost after {name}; the rest of this process did not run"
            )


def judge(actual: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> float:
    """Assert the rule of every result, and return the largest error.

    Whole numbers are those of float64; where rounding decides which of two is nearer, those of plain torch in
    the tested dtype are as right.
    """
    largest = 0.0
    for mine, right, usual in zip(actual, truth, plain, strict=True):
        if mine.is_floating_point():
            numerics.assert_close_to_truth(mine, right, usual)
            largest = max(largest, numerics.error_against(right, mine))
            continue
        assert mine.shape == right.shape, f"shape {list(mine.shape)}, expected {list(right.shape)}"
        differing = int(((mine != right) & (mine != usual)).sum())
        assert not differing, f"{differing} of {mine.numel()} elements are those of neither"
    return largest


def rounded(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return every_op's random numbers rounded to `dtype`, whatever dtype is asked for: one input for all."""

    def random(*shape: int, device: torch.device, dtype: torch.dtype, _rounding=dtype) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(_rounding).to(DEVICE, dtype)

    return random


def calls(stem: str, backend_name: str) -> Iterator[tuple[str, every_op.Make, torch.dtype, int]]:
    """Yield name, call, dtype and number of samples of every check of an op."""
    for make in every_op.CALLS[stem]:
        for dtype in DTYPES:
            if not backend.supports(backend_name, stem, dtype):
                continue
            for num_samples in SIZES:
                name = f"{make.__name__} {backend_name} {dtype_name(dtype)} N={num_samples}"
                yield name, make, dtype, num_samples


def check_op(stem: str, name: str, report: Report) -> None:
    """Check an op on a backend: against float64, and that runs agree to the bit."""
    for title, make, dtype, num_samples in calls(stem, name):
        every_op.N, every_op._random = num_samples, rounded(dtype)

        def run(make=make, dtype=dtype) -> dict:
            try:
                truth = make(DEVICE, torch.float64, "reference")[1]()
                plain = make(DEVICE, dtype, "reference")[1]()
            except ValueError as refused:
                # Such as more clusters than samples: then it must be refused here, too.
                try:
                    make(DEVICE, dtype, name)[1]()
                except ValueError:
                    return {"refused": str(refused)[:200]}
                raise AssertionError("not refused, as the reference does") from refused
            plain = [x.clone() for x in plain]
            # A Python number among the results becomes float32 whatever went in.
            truth = [x.double() if x.is_floating_point() else x.clone() for x in truth]
            call = make(DEVICE, dtype, name)[1]
            first = [x.clone() for x in call()]
            torch.cuda.synchronize()
            repeats = 1 if report.rehearsal else RUNS - 1
            differing = sum(not every_op.same(first, call()) for _ in range(repeats))
            assert not differing, f"{differing} of {repeats} runs differ from the first"
            if make.__name__ == "kmeans":
                return {"error": _judge_kmeans(make(DEVICE, dtype, name)[0][0], first, truth, plain)}
            return {"error": judge(first, truth, plain)}

        report.check(title, run)


def _judge_kmeans(
    features: Tensor,  # [N, D]
    found: list[Tensor],
    truth: list[Tensor],
    plain: list[Tensor],
) -> float:
    """Assert the rule of the inertia: near ties may go another way, and clusters with them."""
    inertia = []
    for results in (found, truth, plain):
        centroids = next(x for x in results if x.ndim == 2).double()
        inertia.append(torch.cdist(features.double(), centroids).min(1).values.square().sum().item())
    mine, right, usual = (torch.tensor(value, dtype=torch.float64) for value in inertia)
    assert math.isfinite(inertia[0]), "centroids are not finite"
    # The results are float32 at least, whatever went in.
    limit = numerics.allowed_error(right, usual, torch.float32)
    error = numerics.error_against(right, mine)
    assert error <= limit, f"inertia is {error:.1e} off that of float64, at most {limit:.1e} allowed"
    return error


def check_graph(stem: str, name: str, report: Report) -> None:
    """Capture calls in CUDA graphs, each before it ran otherwise, and replay them on other numbers."""
    for title, make, dtype, num_samples in calls(stem, name):
        if make.__name__ in every_op.READING or dtype == torch.float64:
            continue
        every_op.N, every_op._random = num_samples, rounded(dtype)

        def run(make=make, dtype=dtype) -> dict:
            inputs, call = make(DEVICE, dtype, name)
            torch.cuda.synchronize()
            assert every_op.same(every_op.replayed(inputs, call), call()), "a replay differs from a call"
            return {}

        report.check(f"graph: {title}", run)


def check_riskiest(report: Report) -> None:
    """Check duc_loss in CUDA C++ where Hopper's wgmma computes it."""
    for num_samples in (300, 4096):
        for dim in (64, 128, 256, 512):
            for dtype in (torch.bfloat16, torch.float16):
                title = f"info_nce cuda {dtype_name(dtype)} N={num_samples} d={dim}"
                report.check(title, functools.partial(_info_nce, num_samples, dim, dtype, report.rehearsal))


def _info_nce(num_samples: int, dim: int, dtype: torch.dtype, rehearsal: bool) -> dict:
    generator = torch.Generator(device="cuda").manual_seed(num_samples + dim)
    query, key = (
        torch.randn(num_samples, dim, device="cuda", generator=generator).to(dtype) for _ in range(2)
    )
    temperature = math.sqrt(dim)

    def call(loss: Callable[..., Tensor], wide: torch.dtype, **options) -> list[Tensor]:
        leaf = query.to(wide).requires_grad_()
        out = loss(leaf, key.to(wide), temperature=temperature, **options)
        return [out.detach(), *torch.autograd.grad(out, leaf, torch.full_like(out, num_samples))]

    found = call(ops.unidirectional_info_nce, dtype, backend="cuda")
    torch.cuda.synchronize()
    for number in range(1 if rehearsal else RUNS - 1):
        again = call(ops.unidirectional_info_nce, dtype, backend="cuda")
        assert every_op.same(found, again), f"run {number + 2} differs from the first"
    truth = call(duc_reference.unidirectional_info_nce, torch.float64)
    plain = call(duc_reference.unidirectional_info_nce, dtype)
    return {"error": judge(found, truth, plain)}


def check_edge(report: Report) -> None:
    """Check the sizes at a limit: additive_shapley in float64 with exactly 48 KiB of shared memory."""

    def run(name: str) -> dict:
        generator = torch.Generator().manual_seed(0)
        partial = torch.randn(16, 64, 8, generator=generator, dtype=torch.float64).cuda()
        labels = torch.randint(8, (64,), generator=generator).cuda()
        truth, found = (
            ops.additive_shapley(partial, labels, utility="log_probability", backend=on)
            for on in ("reference", name)
        )
        torch.cuda.synchronize()
        return {"error": judge([found], [truth], [truth])}

    for name in ("cuda", "triton"):
        if backend.why_not(name) is None:
            report.check(f"additive_shapley {name} float64 M=16 C=8", functools.partial(run, name))


def warm() -> None:
    """Run every Triton kernel that the checks take, so that Triton's cache holds it."""
    report = Report(rehearsal=True)
    for stem in every_op.CALLS:
        if not backend.implements("triton", stem):
            continue
        for title, make, dtype, num_samples in calls(stem, "triton"):
            every_op.N = num_samples

            def run(make=make, dtype=dtype) -> dict:
                make(DEVICE, dtype, "triton")[1]()
                return {}

            report.check(f"warm: {title}", run)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("riskiest", "edge", "op", "graph", "warm"))
    parser.add_argument("which", nargs="*")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.rehearse)
    if arguments.what == "op":
        name, stem = arguments.which
        check_op(stem, name, report)
    elif arguments.what == "graph":
        name, stem = arguments.which
        check_graph(stem, name, report)
    elif arguments.what == "warm":
        warm()
    else:
        {"riskiest": check_riskiest, "edge": check_edge}[arguments.what](report)
    raise SystemExit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
