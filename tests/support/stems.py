"""One op, one stem: which ops there are, and where each has a file for each backend."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where an op's file stands for each backend; test_layout.py holds the folders to it.
FILES = {
    "reference": "mmfast/reference/{}.py",
    "cpu": "csrc/cpu/{}.cpp",
    "triton": "kernels/{}.py",
    "cuda": "csrc/cuda/{}.cu",
}
# The CUDA kernels once more, run on the CPU.
EMULATED = "cuda-emulated"
STEMS = frozenset(path.stem for path in (ROOT / "mmfast/reference").glob("[!_]*.py"))


def has_file(op: str, backend: str) -> bool:
    """Return whether an op has a file for a backend."""
    return (ROOT / FILES["cuda" if backend == EMULATED else backend].format(op)).exists()


def op_of(file: str) -> str:
    """Return the op of test_<op>.py or test_<op>_<subject>.py; of another file what follows "test_"."""
    name = Path(file).stem.removeprefix("test_")
    return next((stem for stem in STEMS if name == stem or name.startswith(f"{stem}_")), name)
