"""The benchmark harness: checks come first, missing peers are named, files hold what they are said to."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from mmfast import backend, ops
from mmfast.bench import (
    bench_logit_fusion,
    bench_train,
    clock,
    harness,
    host,
    host_cases,
    main,
    peers,
    report,
)
from mmfast.bench.harness import Case, Figure, Limits, Options, Row, Work
from mmfast.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent
QUICK = Options(quick=True)
LIMITS = Limits(copy=2e10, read=1e10, matrix={"float32": 1e11, "bfloat16": 2e11})


def toy(**changes) -> Case:
    x = torch.randn(1000)
    case = Case(
        name="N=1000",
        size=1000,
        panel="toy",
        ours=lambda: x.exp(),
        peers={
            "twice": lambda: (x.exp(), x.exp()),
            "absent": peers.Missing("not installed (pip install absent)"),
        },
        check=lambda found: None,
        work=Work(4000, 4000),
    )
    return replace(case, **changes)


def text_of(printed) -> str:
    file = io.StringIO()
    printed(Console(width=200, file=file))
    return file.getvalue()


def test_ours_and_the_peers_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    options, clock_ = Options(quick=True), clock.Clock(torch.device("cpu"))
    turns = harness.interleaved(calls, dict.fromkeys("abc", 1.0), clock_, options)
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert {len(seconds) for seconds in turns.values()} == {3}


def test_a_row_holds_times_ratios_and_the_limit():
    row = harness.measure(toy(), LIMITS, QUICK)
    assert row.ratios["twice"] == pytest.approx(row.peers["twice"].seconds / row.ours.seconds)
    assert row.missing == {"absent": "not installed (pip install absent)"}
    assert (row.limit, row.limit_seconds) == ("copy", 8000 / 2e10)
    assert row.percent == pytest.approx(100 * row.limit_seconds / row.ours.seconds)
    low, high = row.ours.quartiles
    assert 0 < low <= row.ours.seconds <= high


def test_the_limit_is_that_of_exponentials_where_they_take_longest():
    registers = {"exponential": {"float32": 1e9}, "logarithm": {"float32": 5e8}}
    limits = replace(LIMITS, registers=registers)
    work = harness.Work(1000, 1000, exponentials=1000, logarithms=500)
    assert limits.nearest(work, torch.float32) == ("exp", pytest.approx(2e-6))
    # What was not measured of a dtype bounds nothing.
    assert limits.nearest(work, torch.float64)[0] == "copy"
    multiplied = replace(work, operations=10**6)
    assert limits.nearest(multiplied, torch.float32) == ("matrix", pytest.approx(1e-5))
    limits = replace(limits, registers=registers | {"multiply_add": {"float32": 2e11}})
    assert limits.nearest(multiplied, torch.float32) == ("fma", pytest.approx(5e-6))
    assert limits.nearest(multiplied, torch.bfloat16)[0] == "matrix"


@pytest.mark.usefixtures("cpu_module")
def test_registers_are_measured_by_kind_and_dtype():
    rates = harness._measure_registers(clock.Clock(torch.device("cpu")))
    assert set(rates) == {"exponential", "logarithm", "multiply_add"}
    assert all(rate > 1e6 for found in rates.values() for rate in found.values())


def test_a_row_names_the_backend_that_ran():
    def backend_of(ours) -> str:
        return harness.measure(toy(ours=ours, peers={}), LIMITS, QUICK).backend

    utilities, few = torch.rand(5, 4), torch.rand(8, 4)
    wide = torch.rand(3, 4, requires_grad=True)
    kept = []

    def backward():
        # The forward pass comes with the first call alone.
        kept.append(kept[0] if kept else ops.shapley_values(wide, backend="reference").sum())
        return torch.autograd.grad(kept[0], wide, retain_graph=True)

    ours = backend.resolve("shapley_values", "auto", "cpu", torch.float32)
    for _ in range(2):
        assert backend_of(lambda: ops.shapley_values(utilities)) == ours
        assert backend_of(lambda: ops.shapley_values(utilities, backend="reference")) == "reference"
        # So few numbers are left to plain torch before a backend is looked for.
        assert backend_of(lambda: ops.unidirectional_info_nce(few, few)) == "reference"
    assert backend_of(backward) == "reference"
    assert backend_of(lambda: utilities.exp()) == "none"
    assert harness.ran({"reference", "cpu"}) == "reference + cpu"
    assert backend._noted is None


def test_a_wrong_result_stops_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(harness, "interleaved", lambda *_: pytest.fail("timed a wrong result"))

    def check(found):
        assert found.sum() < 0, "error 1.0e+00 against float64"

    with pytest.raises(harness.WrongResultError, match=r"wrong result in N=1000, forward: error 1\.0e"):
        harness.measure(toy(check=check), LIMITS, QUICK)


def test_a_peer_that_fails_is_named_and_ours_is_not_forgiven():
    def fail():
        raise RuntimeError("no kernel for this device")

    row = harness.measure(toy(peers={"broken": fail}), LIMITS, QUICK)
    assert row.missing == {"broken": "failed: RuntimeError: no kernel for this device"}
    with pytest.raises(RuntimeError, match="no kernel"):
        harness.measure(toy(ours=fail), LIMITS, QUICK)


def test_our_other_backends_are_peers_and_checked(monkeypatch):
    monkeypatch.setattr(backend, "candidates", lambda *_: ["triton", "cuda", "reference"])

    def check(found):
        assert found not in wrong, "error 1.0e+00 against float64"

    for wrong in ([], ["cuda"]):
        mine = toy(ours=lambda: backend._preferred, check=check, peers={})
        (case,) = harness.with_rivals("toy", [mine], QUICK)
        row = harness.measure(case, LIMITS, QUICK)
        if wrong:
            assert "error 1.0e+00 against float64" in row.missing["mmfast, cuda"]
        else:
            assert set(row.peers) == {"mmfast, cuda"}
    # Where some sizes are left to plain torch, ours is not always the first backend.
    (pair,) = harness.with_rivals("duc_loss", [toy(peers={})], Options(device="cuda"))
    assert set(pair.peers) == {"mmfast, triton", "mmfast, cuda"}
    (train,) = harness.with_rivals("train", [toy(peers={})], QUICK)
    assert train.peers == {}


def test_a_long_call_is_made_once():
    calls = []
    harness.measure(toy(ours=lambda: calls.append(1), peers={}, once=True), LIMITS, QUICK)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("work", "dtype", "limit", "seconds"),
    [
        (Work(1000, 1000), torch.float32, "copy", 2000 / 2e10),
        (Work(1000, 10), torch.float32, "read", 1010 / 1e10),
        (Work(1000, 1000, 10**9), torch.float32, "matrix", 1e-2),
        (Work(1000, 1000, 10**9), torch.bfloat16, "matrix", 5e-3),
        (Work(1000, 1000, 10**9), torch.float64, "copy", 2000 / 2e10),
    ],
)
def test_the_nearest_limit(work, dtype, limit, seconds):
    assert LIMITS.nearest(work, dtype) == (limit, pytest.approx(seconds))


def test_directions_agree_with_autograd():
    x, y = torch.randn(5, requires_grad=True), torch.randn(5)
    call = lambda x, y: (x * y).sum()  # noqa: E731
    forward, backward, both = (peers.bind(call, (x, y), direction) for direction in peers.DIRECTIONS)
    assert not forward().requires_grad
    torch.testing.assert_close(backward(), (y,))
    torch.testing.assert_close(backward(), (y,))
    torch.testing.assert_close(both(), ((x * y).sum().detach(), y))
    assert x.grad is None
    assert peers.bind(peers.Missing("why"), (x, y), "both") == "why"


def test_the_check_finds_a_gradient_that_is_slightly_wrong():
    x = torch.randn(3000, 4, requires_grad=True)
    check = peers.check_against(lambda x: x.square(), (x,), "both", 3000)
    found = (x.detach().square(), 2 * x.detach())
    check(found)
    with pytest.raises(AssertionError, match="against float64, at most"):
        check((found[0], found[1] * (1 + 1e-5)))


def test_a_missing_package_is_named_with_the_command_that_brings_it():
    assert (
        peers.optional("no_such_module", "no-such", lambda module: module)
        == "not installed (pip install no-such)"
    )
    assert peers.optional("math", "math", lambda module: module.pi) == pytest.approx(3.14159, abs=1e-5)
    assert isinstance(peers.on_gpu("cpu", "math", "math", lambda module: module.pi), peers.Missing)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
def test_peak_memory_is_what_a_call_takes_beyond_its_inputs():
    x = torch.ones(2**22)  # 16 MiB
    _, seconds, peak = clock.Clock(torch.device("cpu")).first_call(lambda: (x + 1).sum())
    assert seconds > 0
    if peak is None:
        pytest.skip("the system does not tell the peak")
    assert 15e6 < peak < 25e6


def row_of(size: int, **changes) -> Row:
    figure = Figure(1e-3, (0.9e-3, 1.2e-3), 5_000_000)
    row = Row(
        case=f"N={size}",
        direction="forward",
        dtype="float32",
        size=size,
        panel="toy",
        ours=figure,
        peers={"eager": Figure(3e-3, (3e-3, 3e-3), None)},
        missing={"shapiq": "not installed (pip install shapiq)"},
        work=Work(8_000_000, 2_000_000, 50_000_000),
        limit="copy",
        limit_seconds=5e-4,
        ratios={"eager": 3.0},
        backend="cpu",
    )
    return replace(row, **changes)


def test_the_table_says_all_and_names_what_is_missing():
    text = text_of(lambda console: report.print_table(console, "toy", [row_of(10), row_of(100)]))
    line = next(line for line in text.splitlines() if "N=100" in line)
    assert line.split() == ["N=100", "forward", "cpu", "1", "10.0", "50", "50", "copy", "5.0", "3.00"]
    assert "plain torch" not in text
    assert "missing: shapiq: not installed (pip install shapiq)" in text


def test_the_table_says_where_plain_torch_ran():
    rows = [row_of(10), row_of(100, backend="reference"), row_of(1000, backend="reference + cpu")]
    text = text_of(lambda console: report.print_table(console, "toy", rows))
    named = [line.partition("forward")[2].split("  ")[1] for line in text.splitlines() if "N=" in line]
    assert named == ["cpu", "reference (plain torch)", "reference (plain torch) + cpu"]
    assert "2 of 3 rows: plain torch ran in our call, no kernel of ours" in text


def test_rows_survive_their_file():
    row = row_of(10)
    assert report.row_of(report.entry(row)) == row
    # Files of earlier runs do not tell.
    old = report.entry(row)
    del old["backend"]
    assert report.row_of(old).backend == "?"


def test_the_picture_is_written(tmp_path):
    rows = [row_of(10), row_of(100), row_of(10, panel="other", direction="both")]
    report.plot("toy", rows, "Samples N", tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"


def test_many_panels_show_the_fullest_pass_only():
    rows = [
        row_of(size, panel=str(family), direction=direction)
        for family in range(5)
        for direction in peers.DIRECTIONS
        for size in (100, 10)
    ]
    panels = report._panels(rows)
    assert list(panels) == [f"{family}, forward and backward" for family in range(5)]
    assert [row.size for row in panels["0, forward and backward"]] == [10, 100]


@pytest.fixture
def tiny(monkeypatch):
    """One small shape of one op, and limits that need no measuring."""
    monkeypatch.setattr(bench_logit_fusion, "QUICK", ((2, 8, 3), (2, 16, 3)))
    monkeypatch.setattr(harness, "measure_limits", lambda options: LIMITS)


def test_the_command_writes_a_table_a_json_and_a_picture(tiny, tmp_path):
    words = ["bench", "logit_fusion", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "entropy M=2 N=8 C=3" in result.stdout
    assert "missing: torch.compile" in result.stdout
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("-logit_fusion-quick.json")
    assert path.name in result.stdout
    assert (tmp_path / "logit_fusion.png").exists()
    found = json.loads(path.read_text())
    assert found["options"] == {"quick": True, "device": "cpu", "fresh_memory": False}
    machine = found["machine"]
    assert machine["threads"] == torch.get_num_threads()
    # A build's own mark, as in 2.11.0+cu130, is not in every package's metadata.
    assert machine["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"processor", "cores", "instruction_set", "system", "date", "load_average_before"} <= set(machine)
    assert machine["limits"]["copy"] == LIMITS.copy
    rows = found["ops"]["logit_fusion"]
    assert {row["direction"] for row in rows} == set(peers.DIRECTIONS)
    for row in rows:
        assert row["ratios"]["eager"] == pytest.approx(
            row["peers"]["eager"]["seconds"] / row["ours"]["seconds"]
        )
        assert "torch.compile" in row["missing"]
        assert row["backend"] == backend.resolve("logit_fusion", "auto", "cpu", torch.float32)


def test_the_command_stops_at_a_wrong_result(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "entropy_fusion", lambda logits: (2 * logits.sum(0), None))
    result = CliRunner().invoke(app, ["bench", "logit_fusion", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "wrong result in entropy M=2 N=8 C=3, forward: error" in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_op_and_device_are_named():
    result = CliRunner().invoke(app, ["bench", "duc_los"])
    assert result.exit_code == 2
    assert "got 'duc_los'; did you mean duc_loss or sigmoid_loss?" in result.stderr
    result = CliRunner().invoke(app, ["bench", "duc_loss", "--device", "tpu"])
    assert result.exit_code == 2
    assert "device must be cpu or cuda, got 'tpu'" in result.stderr


@pytest.mark.parametrize("op", [op for op in main.available() if op != "train"])
def test_the_first_case_of_every_op_is_right(op, restored_threads):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = next(iter(main.load(op).cases(QUICK)))
    case.check(case.ours())
    assert case.work.read > 0
    assert main.load(op).SIZE


@pytest.mark.parametrize("method", ["mla", "di-mml"])
def test_a_training_step_is_the_published_one(method, restored_threads):
    from mmfast import methods

    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = bench_train._step(methods.make(method), QUICK)
    for _ in range(2):
        case.check(case.ours())
    for peer in case.peers.values():
        peer()


def test_pytest_benchmark_times_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "bench/bench_gradient_projection.py",
        f"--benchmark-json={tmp_path}/found.json",
    ]
    # Side by side with other tests the plugin measures nothing.
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-k", "64"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'D=64 C=31, forward'" in done.stdout
    assert "6 passed, 2 skipped" in done.stdout
    # The clone is where this was started, the installed package is what was measured.
    by = backend.resolve("gradient_projection", "auto", "cpu", torch.float32)
    assert f"mmfast: {harness.spelled(by)}" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert [row["extra_info"] for row in found] == [{"backend": by}, {}, {}] * 2


def test_what_calls_cost_the_host(tmp_path):
    words = ["bench", "shapley_values", "class_separability", "--host", "--quick", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*-host-quick.json")
    found = json.loads(file.read_text())
    figures = {(f["op"], f["direction"], f["contestant"]): f for f in found["host"]}
    ours = {"cpu"} if backend.why_not("cpu") is None else set()
    assert {contestant for *_, contestant in figures} == {"eager", *ours}
    assert {op for op, *_ in figures} == {
        "shapley_values",
        "class_moments",
        "dimension_accuracy",
        "effective_dimensions",
    }
    assert all(f["microseconds"] > 0 and f["launches"] is None for f in figures.values())
    if ours:
        # One result, or three of which two have gradients.
        assert figures["shapley_values", "forward", "cpu"]["allocations"] == 1
        assert figures["class_moments", "forward", "cpu"]["allocations"] == 3
    assert "dimension_accuracy" in result.output


def test_a_peer_that_does_not_run_has_no_host_figure():
    def fail(*_):
        raise RuntimeError("no library for this device")

    case = next(iter(host_cases.host_cases("cpu")))
    missing = {}
    figures = host._measure(replace(case, eager=fail), "forward", QUICK, missing)
    assert missing == {"shapley_values": "no library for this device"}
    contestants = [figure.contestant for figure in figures]
    assert contestants == host.contestants(case, "cpu")[1:]
    if contestants:
        with pytest.raises(RuntimeError, match="no library"):
            host._measure(replace(case, ours=fail), "forward", QUICK, {})


def test_every_op_has_a_host_case():
    names = {case.name.partition(",")[0].partition(" ")[0] for case in host_cases.host_cases("cpu")}
    public = {name for name in ops.__all__ if name[0].islower()}
    assert names == public - {"cluster_purity"}


def test_launches_are_counted_by_a_named_function(tmp_path, monkeypatch):
    compiler = shutil.which("gcc") or pytest.skip("no C compiler")
    source, library = tmp_path / "count.c", tmp_path / "count.so"
    source.write_text("static long n; void launch(void) { n += 3; } long launches(void) { return n; }")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setenv("MMFAST_LAUNCH_COUNTER", f"{library}:launches")
    assert host._launches(ctypes.CDLL(str(library)).launch) == 3
