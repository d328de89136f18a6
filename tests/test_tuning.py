"""Stored tile shapes: asked for by launchers, measured by `mmfast bench --tune`, kept per GPU."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from mmfast import backend
from mmfast.bench import tune
from mmfast.bench.harness import Case, Options, Work
from mmfast.cli.commands import app
from mmfast.kernels import _tuning as tuning
from support import every_op

CPU = torch.device("cpu")
TILES = [{"BLOCK": size} for size in (16, 32, 64, 128)]
# All but those whose kernel has one block shape for everything.
UNTUNED = ("partial_reinit", "reinit_plan", "update_and_project", "cluster_purity")
TUNED = [
    pytest.param(stem, make, id=make.__name__)
    for stem, makes in every_op.CALLS.items()
    for make in makes
    if make.__name__ not in UNTUNED
]


def choose(key="float32", device=CPU):
    return tuning.choose("toy", key, TILES[0], lambda: TILES, device)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An own file of stored choices, and a GPU's name for the CPU."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("MMFAST_TUNING", str(path))
    monkeypatch.setattr(tuning, "name_of", lambda device: f"a {device.type}")
    tuning.stored.cache_clear()
    yield path
    tuning.stored.cache_clear()


def toy_case(call) -> Case:
    return Case("N=1", 1, "toy", call, {}, lambda found: None, Work(4))


def test_the_default_stands_where_nothing_is_stored(file):
    assert choose(device=torch.device("cuda")) == TILES[0]
    assert not file.exists()


def test_what_is_stored_holds_for_its_gpu_and_key(file):
    tune.store(torch.device("cuda"), {("toy", "float32"): TILES[2]})
    tune.store(torch.device("cuda"), {("toy", "float16"): TILES[1]})
    assert choose(device=torch.device("cuda")) == TILES[2]
    assert choose("float16", torch.device("cuda")) == TILES[1]
    assert choose("bfloat16", torch.device("cuda")) == TILES[0]
    # Tile shapes are a GPU's: on the CPU Triton interprets, and the table's serve.
    assert choose() == TILES[0]
    assert json.loads(file.read_text()) == {"a cuda": {"toy float32": TILES[2], "toy float16": TILES[1]}}


def test_what_another_version_stored_is_passed_over(file):
    tune.store(torch.device("cuda"), {("toy", "float32"): {"BLOCK": 64, "num_warps": 4}})
    assert choose(device=torch.device("cuda")) == TILES[0]


def test_an_empty_variable_switches_it_off(monkeypatch):
    monkeypatch.setenv("MMFAST_TUNING", "")
    assert tuning.path() is None
    with pytest.raises(ValueError, match="leaves no file"):
        tune.store(CPU, {})


def test_a_damaged_file_is_named(file):
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tuning\.json is no file of stored tile shapes .* remove it"):
        choose(device=torch.device("cuda"))


def test_the_fastest_candidate_that_runs_is_found(file):
    seconds = {16: 4e-3, 32: 1e-3, 64: 2e-3}

    def call():
        block = choose()["BLOCK"]
        if block == 128:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(seconds[block])

    printed = io.StringIO()
    console = Console(width=200, file=printed)
    found = tune.tune({"toy": [toy_case(call)]}, Options(quick=True), console)
    assert found == {("toy", "float32"): {"BLOCK": 32}}
    assert "BLOCK=32" in printed.getvalue()
    assert choose() == TILES[0]


def test_a_wrong_candidate_is_none(file):
    def check(block):
        assert block == 16

    def call():
        block = choose()["BLOCK"]
        time.sleep(1e-3 if block == 16 else 1e-4)
        return block

    case = replace(toy_case(call), check=check)
    assert tune.tune({"toy": [case]}, Options(quick=True), Console(file=io.StringIO())) == {}


def test_a_default_that_fails_is_an_error(file):
    def call():
        if choose() == TILES[0] and calls:
            raise RuntimeError("broken")
        calls.append(1)

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="broken"):
        tune.tune({"toy": [toy_case(call)]}, Options(quick=True), Console(file=io.StringIO()))


def test_neighbours_are_half_as_large_and_twice_as_large():
    found = tuning.neighbours({"BLOCK": 16, "num_warps": 16}, least=16)
    assert found == [{"BLOCK": block, "num_warps": warps} for block in (16, 32) for warps in (8, 16)]


@pytest.mark.parametrize(("stem", "make"), TUNED)
def test_every_choice_is_asked_for_and_any_answer_is_right(stem, make, file, monkeypatch):
    if reason := backend.why_not("triton"):
        pytest.skip(reason)
    if backend.interpreting():
        # Several of the smallest tiles are enough.
        monkeypatch.setattr(every_op, "N", 200)
    device = torch.device("cpu" if backend.interpreting() else "cuda")
    _, call = make(device, torch.float32, "triton")
    with tuning.session() as session:
        expected = [x.clone() for x in call()]
        assert session.asked
        assert {op for op, _ in session.asked} == {stem}
        assert all(len(candidates) > 1 for candidates in session.asked.values())
        # The smallest of all sizes, on a GPU, too, where the largest need not fit.
        session.forced = {key: min(each, key=lambda c: [*c.values()]) for key, each in session.asked.items()}
        assert any(config != session.asked[key][0] for key, config in session.forced.items())
        asked = list(session.asked)
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
        assert list(session.asked) == asked


def test_without_a_gpu_there_is_nothing_to_tune():
    result = CliRunner().invoke(app, ["bench", "--tune", "--device", "cpu"])
    assert result.exit_code == 2
    assert "tuning needs a GPU" in result.stderr
