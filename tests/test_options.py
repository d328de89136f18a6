"""The words of the command line: method names, --set and presets."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning_fabric")

from mmfast.cli.options import (
    make_methods,
    method_and_optimization,
    parse_methods,
    parse_settings,
    parse_value,
    set_given,
)
from mmfast.methods import DIMML, METHODS, Joint
from mmfast.methods.base import format_value
from mmfast.training.optimization import Optimization


def test_all_methods_in_order():
    assert parse_methods("all") == list(METHODS)


def test_a_list_of_methods_drops_repetitions():
    assert parse_methods("mla, joint,mla") == ["mla", "joint"]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("-1", int, -1),
        ("1e-3", float, 1e-3),
        ("5", float, 5.0),
        ("true", bool, True),
        ("No", bool, False),
        ("tanh", str, "tanh"),
        ("20,40", tuple[int, ...], (20, 40)),
        ("(20, 40,)", tuple[int, ...], (20, 40)),
        ("", tuple[int, ...], ()),
        ("none", tuple[float, ...] | None, None),
        ("0.3,0.7", tuple[float, ...] | None, (0.3, 0.7)),
    ],
)
def test_values_are_read_by_type(text, hint, value):
    assert parse_value("x", text, hint) == value
    assert parse_value("x", format_value(value), hint) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("di-mml.e0=2.5", r"di-mml\.e0 must be an integer, got '2\.5'"),
        ("di-mml.temperature=hot", r"di-mml\.temperature must be a finite number, got 'hot'"),
        ("di-mml.temperature=nan", r"di-mml\.temperature must be a finite number, got 'nan'"),
        ("mla.released=maybe", r"mla\.released must be true or false, got 'maybe'"),
        ("mla.weights=1,x", r"mla\.weights must be finite numbers separated by commas or none, got '1,x'"),
        ("diagnose-relearn.epochs=2;3", r"diagnose-relearn\.epochs must be integers separated by commas"),
        ("di-mml.temprature=1", r"method di-mml has no option 'temprature'; did you mean temperature"),
        ("dimml.e0=1", r"method must be one of .*, got 'dimml'; did you mean di-mml"),
        ("temperature=1", r"set must have the form METHOD\.OPTION=VALUE, got 'temperature=1'"),
        ("di-mml.e0", r"set must have the form METHOD\.OPTION=VALUE, got 'di-mml\.e0'"),
    ],
)
def test_bad_settings_say_what_is_expected(assignment, message):
    with pytest.raises(ValueError, match=message):
        parse_settings([assignment], list(METHODS))


def test_a_setting_must_concern_a_method_that_runs():
    with pytest.raises(ValueError, match="one of the methods that run, joint, mla, got 'di-mml'"):
        parse_settings(["di-mml.e0=1"], ["joint", "mla"])


def test_settings_reach_the_methods():
    joint, di_mml = make_methods("joint,di-mml", ["di-mml.temperature=50", "di-mml.e0=3"])
    assert joint == Joint()
    assert di_mml == DIMML(temperature=50.0, e0=3)


@pytest.mark.parametrize("text", ["", " , "])
def test_no_method_is_an_error(text):
    with pytest.raises(ValueError, match='methods must be "all" or names'):
        parse_methods(text)


def test_a_preset_brings_method_and_settings():
    method, optimization = method_and_optimization(None, "di-mml/crema-d", ["e0=2"])
    assert method == DIMML(temperature=50, fusion_temperature=1, e0=2)
    assert (optimization.max_epochs, optimization.batch_size, optimization.optimizer) == (150, 16, "sgd")
    assert set_given(optimization, max_epochs=3, lr=None).max_epochs == 3


def test_a_preset_and_another_method_exclude_each_other():
    with pytest.raises(ValueError, match="method must be mla with preset mla/published, got 'joint'"):
        method_and_optimization("joint", "mla/published", ())


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean di-mml/crema-d"):
        method_and_optimization(None, "di-mml/cremad", ())


def test_joint_is_the_default():
    assert method_and_optimization(None, None, ()) == (Joint(), Optimization())
