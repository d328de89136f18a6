"""The scripts for a GPU machine keep their limits and leave files that can be read; no GPU is needed here."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from mmfast import backend
from support import every_op

pytest.importorskip("matplotlib")

from mmfast.bench import bench_logit_fusion
from mmfast.bench.harness import Figure, Limits, Options, Row, Work
from mmfast.bench.report import entry

GPU = Path(__file__).resolve().parent.parent / "bench" / "gpu"


OPS = ["shapley_values", "class_separability", "kmeans", "duc_loss", "gradient_projection"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def make_run(tmp_path, seconds=60.0, **options):
    import steps

    return steps, steps.Run(tmp_path / "out", tmp_path / "logs", seconds, {}, **options)


def test_a_step_that_hangs_is_killed_with_its_children_and_reported(tmp_path):
    steps, run = make_run(tmp_path)
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    hanging = (
        f"import subprocess as s, sys; print('begun', flush=True); s.run([sys.executable, '-c', {child!r}])"
    )
    begun = time.monotonic()
    assert not run.step(steps.Step("op: hangs", python(hanging), 1.0))
    assert time.monotonic() - begun < 2.5
    assert run.step(steps.Step("op: works", python("print(1)"), 20))
    assert not run.step(steps.Step("op: fails", python("raise SystemExit('no kernel')"), 20))
    assert not run.close()
    states = {line["step"]: line["state"] for line in steps.read(tmp_path / "out" / steps.STEPS)}
    assert states == {"op: hangs": "stopped", "op: works": "passed", "op: fails": "failed"}
    failures = (tmp_path / "out" / steps.FAILURES).read_text()
    assert "not through after 1 s" in failures
    assert "begun" in failures
    assert "no kernel" in failures
    time.sleep(max(0, 3.5 - (time.monotonic() - begun)))
    assert not alive.exists()


def test_the_whole_keeps_to_its_seconds_and_says_what_did_not_run(tmp_path, monkeypatch):
    import steps

    monkeypatch.setattr(steps, "CLOSING", 0.5)
    _, run = make_run(tmp_path, seconds=3.0)
    sleeping = [steps.Step(f"op: {number}", python("import time; time.sleep(30)"), 20) for number in range(3)]
    run.together(sleeping, workers=1)
    run.close()
    assert run.passed() < 4
    assert run.states == {"op: 0": "stopped", "op: 1": "not run", "op: 2": "not run"}
    assert "not run: op: 1, 2" in (tmp_path / "out" / steps.SUMMARY).read_text()


def test_few_files_come_back_and_an_earlier_run_is_not_among_them(tmp_path):
    for turn in range(2):
        steps, run = make_run(tmp_path)
        program = "import os, steps; steps.append(os.environ['MMFAST_GPU_RESULTS'], {'n': 1})"
        environment = {"PYTHONPATH": str(GPU)}
        run.together([steps.Step(f"op: {n}", python(program), 20, environment) for n in range(3)], workers=3)
        run.note("ncu", "ncu is not installed")
        assert run.close(), turn
    files = list((tmp_path / "out").rglob("*"))
    assert len(files) <= 6  # measure adds ncu.csv and what calls cost the host
    assert all(file.is_file() and file.stat().st_size <= 2**24 for file in files)
    assert steps.read(tmp_path / "out" / steps.RESULTS) == 3 * [{"n": 1}]
    with tarfile.open(tmp_path / "out" / steps.LOGS) as archive:
        assert len(archive.getnames()) == 3


def test_a_line_cut_off_at_the_end_is_left_out_and_no_other(tmp_path):
    import steps

    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": ')
    assert steps.read(path) == [{"a": 1}]
    path.write_text('{"a": \n{"a": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        steps.read(path)


def recorded(folder: Path, rehearsal: bool = False) -> Path:
    import steps

    folder.mkdir()
    limits = {"copy": 3e12, "read": 3e12, "matrix": {"float32": 5e13, "bfloat16": 8e14}}
    machine = {"gpu": "NVIDIA Example", "date": "2026-11-27T10:00:00+00:00", "limits": limits}
    options = {"quick": False, "device": "cuda", "fresh_memory": False}
    run = {"limits": limits, "machine": machine, "options": options}
    (folder / steps.FACTS).write_text(
        json.dumps({"rehearsal": rehearsal, "mmfast": "built here", "run": run})
    )
    for selection, size, peer, seconds in (
        ("all", 1000, "mmfast, cuda", 1e-5),
        ("all", 8000, "mmfast, cuda", 4e-5),
        ("compiled", 1000, "torch.compile", 6e-5),
    ):
        figure, other = Figure(2e-5, (1e-5, 3e-5), 100), Figure(seconds, (seconds, seconds), None)
        row = Row(
            *(f"N={size}", "forward", "float32", size, "entropy", figure, {peer: other}, {}),
            *(Work(4000, 400), "copy", 1e-5, {peer: seconds / 2e-5}),
        )
        line = {"op": "logit_fusion", "case": row.case, "pass": row.direction, "selection": selection}
        line |= {"ours": "triton", "rehearsal": rehearsal, "row": entry(row)}
        steps.append(folder / steps.RESULTS, line)
    (folder / "nvidia-example-2026-11-27-host.json").write_text("{}")
    step = {"step": "ncu", "state": "not run", "seconds": 0, "why": "ncu is not installed"}
    steps.append(folder / steps.STEPS, step)
    return folder


def test_a_line_names_the_backend_that_ran(monkeypatch):
    import rows

    monkeypatch.setattr(bench_logit_fusion, "QUICK", ((2, 8, 3),))
    limits = Limits(copy=2e10, read=1e10, matrix={"float32": 1e11})
    with backend.preferring("reference"):
        line = next(rows.rows("logit_fusion", "all", limits, Options(quick=True), rehearsal=False))
    # Not the one that was likely to.
    assert (line["ours"], line["row"]["backend"]) == ("reference", "reference")


def test_collect_writes_the_json_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    import collect

    folder, out = recorded(tmp_path / "came"), tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["collect", str(folder), "--out", str(out)])
    assert collect.main_() == 0
    content = json.loads((out / "nvidia-example-2026-11-27.json").read_text())
    assert content["format"] == 1
    first, second = content["ops"]["logit_fusion"]
    assert first["ratios"] == {"mmfast, cuda": 0.5, "torch.compile": pytest.approx(3)}
    assert second["ratios"] == {"mmfast, cuda": 2.0}
    assert (out / "nvidia-example-2026-11-27-logit_fusion.png").stat().st_size > 1000
    assert (out / "nvidia-example-2026-11-27-host.json").read_text() == "{}"
    printed = capsys.readouterr().out
    assert "| `logit_fusion` entropy, forward, float32 | N=1000, N=8000 | triton | 0.02 ms | 50% |" in printed
    assert "logit_fusion: cuda takes 0.5-2 of auto's time; faster in 1 of 2 cases" in printed
    assert "not run: ncu: ncu is not installed" in printed


@pytest.mark.parametrize("what", ["rehearsal", "empty"])
def test_collect_refuses_what_holds_no_results(what, tmp_path, monkeypatch, capsys):
    import collect

    folder = tmp_path / "came"
    if what == "rehearsal":
        recorded(folder, rehearsal=True)
    else:
        folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["collect", str(folder), "--out", str(tmp_path / "results")])
    assert collect.main_() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {"rehearsal": "holds a rehearsal", "empty": "holds no results"}[what] in error
    assert not (tmp_path / "results").exists()


def test_prepare_refuses_what_is_too_large_with_the_sizes(tmp_path):
    import prepare

    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "_cuda.so").write_bytes(bytes(3 * 2**20))
    (tmp_path / "triton.tar.gz").write_bytes(bytes(2**20))
    assert prepare.check_size(tmp_path, most=4 * 2**20) == 4 * 2**20
    with pytest.raises(
        prepare.TooLargeError, match=r"4\.0 MiB are more than 3: modules 3\.0, triton.tar.gz 1\.0"
    ):
        prepare.check_size(tmp_path, most=3 * 2**20)


def test_a_packed_cache_names_only_the_files_it_holds(tmp_path):
    import prepare

    kernel = tmp_path / "cache" / "KEY"
    kernel.mkdir(parents=True)
    names = [f"k.{suffix}" for suffix in ("cubin", "json", "ptx", "ttir", "source")]
    for name in names:
        (kernel / name).write_text("{}")
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": {n: str(kernel / n) for n in names}}))
    prepare.pack_triton(tmp_path / "cache", tmp_path / "packed.tar.gz")
    with tarfile.open(tmp_path / "packed.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["KEY/__grp__k.json", "KEY/k.cubin", "KEY/k.json"]
        group = json.load(archive.extractfile("KEY/__grp__k.json"))
    assert sorted(group["child_paths"]) == ["k.cubin", "k.json"]


def test_the_steps_name_every_op_and_program_there_is():
    import check
    import measure

    from mmfast.bench import main

    assert set(measure.OPS) == set(main.available()) - {"train"}
    names = [step.name for step in check.check_steps("python3", ["cuda", "triton"], False)]
    for op in measure.OPS:
        for name, file in (("cuda", f"csrc/cuda/{op}.cu"), ("triton", f"kernels/{op}.py")):
            is_there = (GPU.parent.parent / file).exists()
            assert is_there == (f"op: {op} {name}" in names) == (f"graph: {op} {name}" in names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("stem", OPS)
@pytest.mark.usefixtures("cpu_module")
def test_checks_pass_what_is_right_and_catch_what_is_not(stem, tmp_path, monkeypatch):
    import checks

    import steps

    monkeypatch.setattr(checks, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(checks, "RUNS", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("MMFAST_GPU_RESULTS", str(tmp_path / "lines"))
    for name in ("N", "_random"):
        monkeypatch.setattr(every_op, name, getattr(every_op, name))
    report = checks.Report(rehearsal=False)
    checks.check_op(stem, "cpu", report)
    lines = steps.read(tmp_path / "lines")
    assert [line["check"] for line in lines if not line["ok"]] == []
    assert len(lines) >= 12
    one = torch.ones(3)
    with pytest.raises(AssertionError, match="against float64"):
        checks.judge([one * 1.1], [one.double()], [one])
