"""From the words of a command line to methods, settings and data."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from mmfast import data, methods
from mmfast.errors import check_one_of
from mmfast.experiments.setup import Setup
from mmfast.experiments.tuning import Tuning
from mmfast.methods import METHODS, Method
from mmfast.methods.presets import PUBLISHED
from mmfast.ranges import ranges_of
from mmfast.training.optimization import Optimization

# Options of the command line that have another name than their field of Optimization.
_OPTIONS = {"max_epochs": "epochs"}


def parse_methods(text: str) -> list[str]:
    """Return the names in "all" or "a,b,c", each once.

    Raises:
        ValueError: an unknown name, with the nearest ones, or none at all.
    """
    if text.strip() == "all":
        return list(METHODS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f'methods must be "all" or names separated by commas, got {text!r}')
    for name in names:
        methods.make(name)
    return names


def parse_settings(assignments: Iterable[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {method: {option: value}} from texts METHOD.OPTION=VALUE.

    With a single method in `names`, OPTION=VALUE is enough.

    Raises:
        ValueError: no such form, a method that is not among `names`, an unknown method or option, or a value
            that is not of the option's type.
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in assignments:
        left, equals, value = text.partition("=")
        method, dot, option = left.strip().rpartition(".")
        if not dot and len(names) == 1:
            method = names[0]
        if not (equals and method and option):
            raise ValueError(f"set must have the form METHOD.OPTION=VALUE, got {text!r}")
        if method in METHODS and method not in settings:
            raise ValueError(f"set must name one of the methods that run, {', '.join(names)}, got {method!r}")
        hints = typing.get_type_hints(METHODS[method]) if method in METHODS else {}
        if method not in METHODS or option not in {field.name for field in fields(METHODS[method])}:
            # Raises, with the nearest names.
            methods.make(method, **{option: None})
        settings[method][option] = parse_value(f"{method}.{option}", value.strip(), hints[option])
    return settings


def make_methods(text: str, assignments: Iterable[str] = ()) -> list[Method]:
    """Return the methods named in `text` with the options of `assignments`."""
    names = parse_methods(text)
    settings = parse_settings(assignments, names)
    return [methods.make(name, **settings[name]) for name in names]


def parse_value(name: str, text: str, hint: Any) -> Any:
    """Return `text` as a value of type `hint`: bool, int, float, str, a tuple of them, or None where allowed.

    Raises:
        ValueError: the text is no such value; the message names the expected type.
    """
    try:
        return _parse(text, hint)
    except ValueError:
        raise ValueError(f"{name} must be {_describe(hint)}, got {text!r}") from None


def _parse(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = typing.get_args(hint)
        if type(None) in kinds and text.lower() == "none":
            return None
        return _parse(text, next(kind for kind in kinds if kind is not type(None)))
    if typing.get_origin(hint) is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        return tuple(_parse(part, typing.get_args(hint)[0]) for part in parts if part)
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise ValueError(text)
        return known[text.lower()]
    value = hint(text)
    if hint is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(
            "none" if kind is type(None) else _describe(kind) for kind in typing.get_args(hint)
        )
    if typing.get_origin(hint) is tuple:
        return f"{_PLURAL[typing.get_args(hint)[0]]} separated by commas"
    return _SINGULAR[hint]


_SINGULAR = {bool: "true or false", int: "an integer", float: "a finite number", str: "a word"}
_PLURAL = {int: "integers", float: "finite numbers", str: "words", bool: "true or false"}


def parse_modalities(text: str) -> tuple[str, ...]:
    """Return the names in "a,b"; whether the data have them is theirs to say."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_encoders(assignments: Iterable[str]) -> dict[str, str]:
    """Return {modality: kind or encoder} from texts MODALITY=KIND.

    Raises:
        ValueError: no such form, or a modality given twice.
    """
    return _pairs("encoder", "MODALITY=KIND, such as audio=image", assignments)


def parse_scales(assignments: Iterable[str]) -> dict[str, float]:
    """Return {name: factor} from texts NAME=FACTOR.

    Raises:
        ValueError: no such form, or a name given twice.
    """
    found = _pairs("lr_scale", "NAME=FACTOR, such as encoders.text=0.1", assignments)
    return {name: parse_value(f"lr_scale of {name}", factor, float) for name, factor in found.items()}


def _pairs(option: str, form: str, assignments: Iterable[str]) -> dict[str, str]:
    """Return {name: value} from texts NAME=VALUE."""
    found: dict[str, str] = {}
    for text in assignments:
        name, equals, value = (word.strip() for word in text.rpartition("="))
        if not (equals and name and value):
            raise ValueError(f"{option} must have the form {form}, got {text!r}")
        if name in found:
            raise ValueError(f"{option} must be given once for {name}, got {found[name]} and {value}")
        found[name] = value
    return found


def parse_devices(text: str) -> int | str:
    """Return devices as Lightning Fabric takes them: their number, or "auto"."""
    return int(text) if text.isdigit() else text


def make_setup(
    source: str,
    split_seed: int,
    optimization: Optimization,
    devices: str,
    *,
    skip_unreadable: bool = False,
    num_workers: int = 0,
    modalities: str | None = None,
    encoders: Iterable[str] | None = None,
    **settings: Any,
) -> Setup:
    """Return the setup of a command, its data loaded.

    Args:
        source, split_seed, optimization, devices: as Setup and the data take them.
        modalities: "a,b", those to use; None for all.
        encoders: texts MODALITY=KIND.
        settings: further fields of Setup.
    """
    names = None if modalities is None else parse_modalities(modalities)
    kinds = parse_encoders(encoders or ())
    return Setup(
        source=source,
        splits=data.load(
            source,
            seed=split_seed,
            skip_unreadable=skip_unreadable,
            modalities=names,
            encoders=kinds,
            num_workers=num_workers,
        ),
        optimization=optimization,
        modalities=names,
        encoders=kinds,
        devices=parse_devices(devices),
        skip_unreadable=skip_unreadable,
        num_workers=num_workers,
        **settings,
    )


def tuning_of(given: Mapping[str, Any], methods: Sequence[Method]) -> Tuning | None:
    """Return how a comparison tunes its methods, None where it does not.

    Args:
        given: the command's options by the names of its parameters: what is set by one is not drawn.
        methods: of the comparison.
    """
    if given["trials"] is None:
        if given["tune_seeds"] != 1:
            raise ValueError(f"tune_seeds must be given with trials, got {given['tune_seeds']} without")
        return None
    set_here = {name for name in ranges_of(Optimization) if given[_OPTIONS.get(name, name)] is not None}
    own = parse_settings(given["settings"] or (), [method.name for method in methods])
    fixed = {name: sorted(set_here | set(values)) for name, values in own.items()}
    return Tuning(given["trials"], given["tune_seeds"], fixed)


def set_given(base: Optimization, **settings: Any) -> Optimization:
    """Return `base` with the settings that are not None."""
    return replace(base, **{name: value for name, value in settings.items() if value is not None})


def parse_jobs(text: str) -> int | None:
    """Return the number of jobs, None of "auto"."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"jobs must be a number of at least 1 or 'auto', got {text!r}")
    return int(text)


def parse_weights(text: str | None) -> str | tuple[float, ...] | None:
    """Return "balanced", or the numbers in "1,2.5,1"."""
    return text if text in (None, "balanced") else parse_value("class_weights", text, tuple[float, ...])


def setup_of(given: Mapping[str, Any], base: Optimization) -> Setup:
    """Return the setup of a command, its data loaded.

    Args:
        given: the command's options by the names of its parameters, None where one of `base` was not given.
        base: settings to use where none is given.
    """
    settings = {field.name: given[_OPTIONS.get(field.name, field.name)] for field in fields(Optimization)}
    # What may be given several times is an empty list where it is not.
    settings["lr_scale"] = parse_scales(settings["lr_scale"]) if settings["lr_scale"] else None
    settings["freeze"] = tuple(settings["freeze"]) if settings["freeze"] else None
    rest = ["dim", "fusion", "accelerator", "precision", "probe", "skip_unreadable", "modalities"]
    rest += ["num_workers", "eval_batch_size", "data_on_device", "num_nodes"]
    return make_setup(
        given["data"],
        given["split_seed"],
        set_given(base, **settings),
        given["devices"],
        encoders=given["encoder"],
        compile=bool(given["compile"]),
        deterministic=bool(given["deterministic"]),
        class_weights=parse_weights(given["class_weights"]),
        label_smoothing=given["label_smoothing"] or 0.0,
        select=given["select"],
        select_mode=given["select_mode"],
        **{name: given[name] for name in rest},
    )


def method_and_optimization(
    name: str | None, preset: str | None, assignments: Iterable[str]
) -> tuple[Method, Optimization]:
    """Return the method and base settings of one run, by a name, "joint" where None, or a key of PUBLISHED.

    Raises:
        ValueError: an unknown name, or one that is not the preset's.
    """
    if preset is None:
        chosen, base = methods.make(name or "joint"), Optimization()
    else:
        check_one_of("preset", preset, PUBLISHED, suggest=True)
        chosen, published = PUBLISHED[preset]
        base = Optimization(**published)
        if name not in (None, chosen.name):
            raise ValueError(f"method must be {chosen.name} with preset {preset}, got {name!r}")
    return replace(chosen, **parse_settings(assignments, [chosen.name])[chosen.name]), base
