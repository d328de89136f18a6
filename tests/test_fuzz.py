"""Generated calls of every op on every backend against their formulas; tools/fuzz runs them for longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import fuzzing
from fuzzing import judge, moved, tensors
from mmfast import backend as _backend
from support import emulation
from support.stems import EMULATED, has_file

# Generated calls of each op: seconds in all.
EXAMPLES = {"cpu": 60, "reference": 30, "triton": 3, EMULATED: 8}


@pytest.fixture(scope="module")
def thread() -> Iterator[None]:
    """Leave calls this small to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases() -> list[tuple[str, str]]:
    """Return every op with every backend that has a file for it."""

    def has_kernel(op: str, backend: str) -> bool:
        return op == "invalid" or has_file(fuzzing.stem(op), backend)

    return [(op, backend) for backend in EXAMPLES for op in fuzzing.CASES if has_kernel(op, backend)]


@pytest.mark.usefixtures("thread")
@pytest.mark.parametrize(("op", "backend"), cases())
def test_generated_calls_follow_the_formula(op, backend):
    is_emulated, name = backend == EMULATED, "cuda" if backend == EMULATED else backend
    if is_emulated and not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    if backend == "triton" and not _backend.interpreting():
        pytest.skip("the tensors lie on the CPU")

    # Simpler examples are looked for where calls take milliseconds.
    is_slow = backend in ("triton", EMULATED)
    phases = [Phase.generate] if is_slow else [Phase.generate, Phase.shrink]

    @settings(
        max_examples=EXAMPLES[backend], database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def follow(data):
        try:
            fuzzing.run(op, fuzzing.HypothesisDraw(data), name, is_slow)
        except fuzzing.Skip:
            assume(False)

    with emulation.emulated() if is_emulated else nullcontext():
        reason = _backend.why_not(name)
        if reason is not None:
            pytest.skip(reason)
        follow()


@pytest.mark.usefixtures("thread")
@pytest.mark.parametrize("op", [op for op in fuzzing.CASES if op != "invalid"])
def test_cases_run_on_another_device(op):
    """As tools/fuzz lets them on a GPU; here the other device is the same one, but memory of its own."""
    before = getattr(fuzzing.shapley.ops, op)
    with moved.moved_to(torch.device("cpu")):
        assert getattr(fuzzing.shapley.ops, op) is not before
        for case in range(10):
            with suppress(fuzzing.Skip):
                fuzzing.run(op, fuzzing.Draw(op, 5, case), "reference", True)
    assert getattr(fuzzing.shapley.ops, op) is before


@pytest.mark.parametrize("op", fuzzing.CASES)
def test_a_seed_makes_the_same_call_again_and_its_choices_too(op):
    first, second = (fuzzing.Recorded(op, 3, 5) for _ in range(2))
    for draw in (first, second):
        with np.errstate(all="ignore"), suppress(AssertionError, _backend.BackendUnavailableError):
            fuzzing.CASES[op](draw, "reference", True)
    assert first.made == second.made != []


def check(actual, truth, bound=0.0, **options) -> None:
    judge.check(
        "x", torch.tensor(actual), np.array(truth, np.longdouble), bound, dtype=torch.float32, **options
    )


def test_the_judge_tells_classes_apart():
    nan, inf = float("nan"), float("inf")
    check([nan, inf, -inf, 1.0, inf], [nan, inf, -inf, 1.0, 1e39])
    for wrong, right in (
        (nan, 1.0),
        (1.0, nan),
        (inf, -inf),
        (inf, 1.0),
        (-inf, 1e39),
        (3e38, 1e39),
        (0.0, inf),
    ):
        with pytest.raises(AssertionError, match="class"):
            check([1.0, wrong], [1.0, right])
    # Loose: NaN and infinite pass, finite and wrong does not.
    check([nan, inf, 1.0], [1.0, 1.0, 1.0], loose=True)
    with pytest.raises(AssertionError, match="bound"):
        check([2.0], [1.0], loose=True)


def test_the_judge_allows_the_bound_and_one_rounding():
    one = 1 + 2.0**-23
    check([one], [1.0], 2.0**-23)
    check([1.0], [1 + 2.0**-24])
    with pytest.raises(AssertionError, match="bound"):
        check([one], [1.0], 2.0**-25)
    with pytest.raises(AssertionError, match="dtype"):
        judge.check("x", torch.ones(1).double(), np.ones(1, np.longdouble), 1.0, dtype=torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check([1.0], [1.0, 1.0])


def test_changed_memory_is_noticed():
    draw = fuzzing.Draw("x", 0, 0)
    for layout in tensors.LAYOUTS:
        made = tensors.laid_out(draw, torch.arange(12.0).view(3, 4), layout)
        tensors.assert_unchanged(x=made)
        made.base.view(-1)[0] = 5.0
        with pytest.raises(AssertionError, match="x was changed"):
            tensors.assert_unchanged(x=made)
    made = tensors.laid_out(draw, torch.arange(12.0).view(3, 4), "stepped")
    made.tensor.zero_()
    tensors.assert_around_unchanged("x", made)
    made.base.view(-1)[0] = 5.0
    if made.tensor.data_ptr() == made.base.data_ptr():
        made.base.view(-1)[1] = 5.0
    with pytest.raises(AssertionError, match="around x"):
        tensors.assert_around_unchanged("x", made)
