"""Predictions as a file of their own, of torch.export or ONNX, which runs where mmfast is not installed."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.coalitions import members, name, present_key
from mmfast.data.batches import Entries
from mmfast.data.reader import evaluation_batches, reader_of
from mmfast.data.standardize import Scaling, factors, scaled
from mmfast.errors import check_one_of, describe, needs_train
from mmfast.nests import mapped, tensors
from mmfast.ops._registration import FUNCTIONS

KINDS = (".pt2", ".onnx")
PRESENT, LOGITS = "present", "logits"
# Where a file tells its classes and inputs: a file within .pt2, a property of the model in .onnx.
NOTE = "mmfast.json"
# How far logits may be from those of the model, as a share of the largest one, but of 1 at least. Other
# kernels add up in another order, which changes some of float32's seven digits: of logits up to 10 the fifth.
TOLERANCE = 1e-4
# Samples of the example, and of the batches that an exported file is checked by.
_EXAMPLE, _CHECKED = 3, (1, 2, 5, 16)


class _Input:
    """Stands in a nest for a tensor that is an input."""


class _Prediction(nn.Module):
    """The prediction of a learner as one function of tensors.

    Args:
        learner: predicts.
        forms: by modality what its encoder takes, with `_Input` in place of tensors.
        scaling: what is standardised before.
        dtype: of the model.
    """

    def __init__(self, learner: Any, forms: Mapping[str, Any], scaling: Scaling, dtype: torch.dtype) -> None:
        super().__init__()
        self.learner, self.forms, self.dtype = learner, dict(forms), dtype
        self.scaled = tuple(scaling)
        for m, (mean, inverse, rank) in enumerate(scaling.values()):  # type: ignore[misc]
            shift, factor = factors(rank, mean, inverse)
            self.register_buffer(f"shift{m}", shift)
            self.register_buffer(f"factor{m}", factor)

    def forward(
        self,
        inputs: dict[str, Tensor],  # by name [N, ...]
        present: Tensor,  # bool [N, M]
    ) -> Tensor:  # [N, C]
        batch: dict[str, Any] = {}
        for m, (modality, form) in enumerate(self.forms.items()):
            value = _filled(form, modality, inputs)
            if modality in self.scaled:
                number = self.scaled.index(modality)
                shift, factor = self.get_buffer(f"shift{number}"), self.get_buffer(f"factor{number}")
                value = ((value.float() - shift) * factor).to(self.dtype)
            batch[modality] = value
            batch[present_key(modality)] = present[:, m]
        return self.learner.predict(batch).float()


def export(learner: Any, path: str | Path, example: Any | None = None, *, standardized: bool = False) -> Path:
    """Write the prediction of a learner to a file; `Learner.export` says what the arguments are."""
    path = Path(path)
    check_one_of("path", path.suffix, KINDS)
    if path.suffix == ".onnx":
        with needs_train("export to .onnx", extra="export"):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
    if PRESENT in learner.modalities:
        raise ValueError(f"no modality may be called {PRESENT!r}, which is an input of the exported file")
    # Another device and dtype are the copy's alone; features that are kept for training stay where they are.
    learner = copy.deepcopy(learner, {id(learner._kept): {}}).cpu().eval().requires_grad_(False)
    dtype = next(p.dtype for p in learner.parameters() if p.is_floating_point())
    if dtype in (torch.bfloat16, torch.float16):
        learner, dtype = learner.float(), torch.float32
    nests = _example(learner, example, dtype)
    inputs = {key: x for modality, nest in nests.items() for key, x in _flat(nest, modality).items()}
    scaling = {} if standardized else _scaling(learner, nests)
    forms = {modality: mapped(lambda _: _Input(), nest) for modality, nest in nests.items()}
    module = _Prediction(learner, forms, scaling, dtype).eval()
    if example is None:
        inputs |= {modality: _raw(inputs[modality], *scaling[modality]) for modality in scaling}
    note = {
        "modalities": list(learner.modalities),
        "classes": None if learner.class_names is None else list(learner.class_names),
        "inputs": [*inputs, PRESENT],
        "standardizes": list(scaling),
    }
    with _quietly(), torch.no_grad():
        program = _program(module, inputs)
        _write(path, program, module, inputs, json.dumps(note))
    return path


def _write(path: Path, program: Any, module: _Prediction, inputs: Mapping[str, Tensor], note: str) -> None:
    """Write a file whole, or not at all where it does not predict as the model does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, as large models in .onnx have their weights in a second file, which is found by its name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        draft = Path(folder, path.name)
        if path.suffix == ".pt2":
            torch.export.save(program, draft, extra_files={NOTE: note})
            run: Callable | None = torch.export.load(draft).module()
        else:
            _save_onnx(program, draft, list(inputs), note)
            run = _onnx_runner(draft)
        if run is not None:
            _check(run, module, inputs)
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)


def _program(module: _Prediction, inputs: dict[str, Tensor]) -> Any:
    """Return the graph of the prediction for any number of samples, of operators of torch alone."""
    size = torch.export.Dim("N", min=1)
    present = members(torch.arange(_EXAMPLE), len(module.forms)).logical_not()  # bool [N, M]
    try:
        program = torch.export.export(
            module, (inputs, present), dynamic_shapes=({key: {0: size} for key in inputs}, {0: size})
        )
    except Exception as error:
        raise ValueError(
            f"the model must be such that torch.export can follow it: {_sentence(error)}"
        ) from error
    table = _plain_torch()
    # Only where it must be, as all is traced anew.
    is_needed = any(_is_in(table, node) for node in program.graph.nodes)
    return program.run_decompositions(table) if is_needed else program


def _is_in(table: Mapping[Any, Callable], node: Any) -> bool:
    """Whether the table has something else for a node of a graph."""
    if node.target is not torch.ops.aten.masked_fill.Scalar:
        return node.target in table
    return node.args[0].meta["val"].dtype == torch.bool


def _plain_torch() -> dict[Any, Callable]:
    """Return operators that files do without, mmfast's own above all, with what computes the same."""

    def without_backend(function: Callable, *arguments: Any) -> Any:
        return function(*arguments[:-1])

    return {torch.ops.aten.masked_fill.Scalar: _filled_by_logic} | {
        getattr(torch.ops.mmfast, op).default: functools.partial(without_backend, table["reference"])
        for op, table in FUNCTIONS.items()
    }


def _filled_by_logic(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Fill a bool tensor without choosing among bools, for which ONNX's runtimes have no kernel."""
    if x.dtype != torch.bool:
        return NotImplemented
    return x | mask if value else x & ~mask


def _save_onnx(program: Any, path: Path, names: Sequence[str], note: str) -> None:
    try:
        found = torch.onnx.export(
            program, dynamo=True, input_names=[*names, PRESENT], output_names=[LOGITS], verbose=False
        )
    except Exception as error:
        if (operator := _missing_operator(error)) is not None:
            raise ValueError(
                f"the model must be made of operators that ONNX has, got {operator}, which it has not: "
                "export to .pt2, or give the encoder another operator"
            ) from error
        raise ValueError(f"the model cannot be written as ONNX: {_sentence(error)}") from error
    assert found is not None
    found.model.metadata_props[NOTE] = note
    found.save(path)


def _onnx_runner(path: Path) -> Callable | None:
    """Return what runs an .onnx file, None without the package for it."""
    try:
        import onnxruntime
    except ImportError:
        warnings.warn(
            f"onnxruntime is not installed, so {path.name} was not checked against the model: "
            'pip install "mmfast[export]"',
            stacklevel=5,
        )
        return None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"the model must be made of operators that onnxruntime has, it is not written: {_sentence(error)}"
        ) from error
    known = {value.name for value in session.get_inputs()}

    def run(inputs: Mapping[str, Tensor], present: Tensor) -> Tensor:
        given = {key: x.numpy() for key, x in {**inputs, PRESENT: present}.items() if key in known}
        return torch.from_numpy(session.run([LOGITS], given)[0])

    return run


def _check(run: Callable, module: _Prediction, inputs: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a file gives the model's logits, for several sizes and what is present."""
    names = tuple(module.forms)
    rng = torch.Generator().manual_seed(0)
    for size in _CHECKED:
        rows = torch.arange(size) % _EXAMPLE
        # Beginning with all: with few modalities 16 samples show every coalition.
        present = ~members(torch.arange(size), len(names))
        if len(names) > 4:
            present[2:] = torch.rand(present[2:].shape, generator=rng) < 0.5
        batch = {key: x[rows] for key, x in inputs.items()}
        expected, found = module(batch, present), run(batch, present)
        bound = TOLERANCE * max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
        same = torch.isclose(found, expected, rtol=0, atol=bound, equal_nan=True)
        if not same.all():
            row = int((~same.all(1)).nonzero()[0])
            coalition = sum(1 << m for m in range(len(names)) if present[row, m])
            difference = float((found - expected)[row].abs().max())
            raise ValueError(
                f"the exported file must predict as the model does, within {bound:.2g}, got logits that "
                f"differ by {difference:.2g} for a sample with the modalities {name(coalition, names)}: it "
                "is not written"
            )


def _example(
    learner: Any, example: Any | None, dtype: torch.dtype
) -> dict[str, Any]:  # modality -> [3, ...], or a nest of such
    """Return what the encoders take of some samples."""
    if example is None:
        if learner.shapes is None or set(learner.shapes) != set(learner.modalities):
            raise ValueError(
                "example must be given, a batch or a data set of such samples as the model takes: the shapes "
                "of what it was trained on are not known"
            )
        rng = torch.Generator().manual_seed(0)
        return {
            key: torch.randn(_EXAMPLE, *learner.shapes[key], generator=rng).to(dtype)
            for key in learner.modalities
        }
    batch = example if isinstance(example, Mapping) else _first_batch(learner, example)
    found = {}
    for modality in learner.modalities:
        if modality not in batch or not any(True for _ in tensors(batch[modality])):
            got = ", ".join(map(repr, batch)) or "no key"
            raise ValueError(f"example must hold samples with {modality}, as tensors, got {got}")
        # Where some samples lack it these are the values of the others, which do as well.
        found[modality] = mapped(_few, batch[modality])
    return found


def _few(x: Tensor) -> Tensor:  # [n, ...] -> [3, ...]
    if len(x) == 0:
        raise ValueError("example must hold at least one sample, got none")
    return x.detach().cpu()[torch.arange(_EXAMPLE) % len(x)]


def _first_batch(learner: Any, dataset: Any) -> Mapping[str, Any]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, str):
        raise TypeError(f"example must be a batch or a data set, got {describe(dataset)}")
    plain = getattr(dataset, "evaluation", dataset)
    few = Entries(plain, torch.arange(min(_EXAMPLE, len(plain))))
    reader = replace(reader_of(learner), num_workers=0)
    return next(evaluation_batches(learner, few, reader=reader), {})


def _scaling(learner: Any, nests: Mapping[str, Any]) -> Any:
    """Return by modality mean, inverse standard deviation, and the rank of what they belong to."""
    found = {}
    for modality, (mean, inverse) in (learner.scaling or {}).items():
        if modality in nests:
            # Raises for what does not fit.
            found[modality] = (mean, inverse, scaled(modality, nests[modality], mean, inverse).ndim)
    return found


def _raw(
    x: Tensor,  # [N, ...]
    mean: list[float],
    inverse: list[float],
    rank: int,
) -> Tensor:  # [N, ...]
    """Return features of which standardising makes `x`; a constant one is 0 then."""
    shift, factor = factors(rank, mean, inverse)
    return shift + x / torch.where(factor == 0, 1.0, factor)


def _flat(nest: Any, place: str) -> dict[str, Tensor]:
    """Return the tensors of a nest by their names: "audio", "text.ids", "pair.0"."""
    if isinstance(nest, Tensor):
        return {place: nest}
    items: Any = nest.items() if isinstance(nest, Mapping) else ()
    if isinstance(nest, list | tuple):
        items = enumerate(nest)
    return {key: x for inner, value in items for key, x in _flat(value, f"{place}.{inner}").items()}


def _filled(form: Any, place: str, inputs: Mapping[str, Tensor]) -> Any:
    """Return the nest of inputs that `_flat` took apart."""
    if isinstance(form, _Input):
        return inputs[place]
    if isinstance(form, Mapping):
        return {key: _filled(value, f"{place}.{key}", inputs) for key, value in form.items()}
    if isinstance(form, list | tuple):
        values = [_filled(value, f"{place}.{i}", inputs) for i, value in enumerate(form)]
        return type(form)(*values) if hasattr(form, "_fields") else type(form)(values)
    return form


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Let torch tell nothing of packages it does without, and trace attention by operators of its own."""
    fast, level = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # Recurrent layers of torch's own do so.
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
            yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _causes(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _missing_operator(error: Exception) -> str | None:
    """Return the operator of torch for which ONNX has none, where an error says so."""
    for text in _causes(error):
        if "No ONNX function found" in text and (found := re.search(r"op='([^']+)'", text)):
            return found[1].removesuffix(".default")
    return None


def _sentence(error: Exception) -> str:
    """Return what an error says in its first words."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line or type(error).__name__).rstrip(".:")
