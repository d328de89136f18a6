"""Some of the modalities, and each taken as something else than its shape says: data, models, commands."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.cli.flags import Encoders
from mmfast.data import Splits, overview
from mmfast.data.views import KINDS, VIEWS, choose
from mmfast.experiments.runs import PlannedRun, restore
from mmfast.experiments.setup import Setup
from mmfast.experiments.subprocesses import train_arguments
from mmfast.methods import Joint
from mmfast.models import FrameMean, GRUEncoder, ResNet18, SmallCNN, build_model, encoder_for
from mmfast.models.build import ENCODERS

FAST = ["--epochs", "1", "--dim", "4", "--accelerator", "cpu"]
N = 90
SHAPES = {"vector": (4,), "sequence": (5, 2), "image": (2, 3, 4), "video": (3, 2, 4, 5)}


def arrays():
    rng = np.random.default_rng(0)
    return {kind: rng.normal(size=(N, *shape)) * 3 + 1 for kind, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "four.npz"
    present = np.arange(N) % 5 > 0
    np.savez(path, label=np.arange(N) % 3, sequence__present=present, **arrays())
    return path


def plain():
    return Splits.from_arrays(arrays(), np.arange(N) % 3, standardize=False)


def invoke(command, npz, out, *words):
    given = ["--data", str(npz), "--out", str(out), *FAST, *words]
    return CliRunner().invoke(app, [command, *given], env={"COLUMNS": "100"})


def compare(npz, out, *words):
    return invoke("compare", npz, out, "--methods", "joint", "--seeds", "1", *words)


@pytest.mark.parametrize("names", [("image",), ("video", "vector"), ("sequence", "image", "video", "vector")])
def test_modalities_are_those_named_in_that_order(npz, names):
    splits, whole = data.load(npz, modalities=names), data.load(npz)
    assert splits.modalities == names
    assert build_model(splits.shapes, 3).modalities == names
    assert f"{names[0]} {list(SHAPES[names[0]])}" in splits.description
    assert ("vector" in splits.description) == ("vector" in names)
    assert set(splits.scaling) == set(names)
    assert ("sequence" in splits.test.present) == ("sequence" in names)
    for name in names:
        assert torch.equal(splits.train.arrays[name], whole.train.arrays[name])
    assert torch.equal(splits.train.labels, whole.train.labels)


# What each element of the view is of the array x [N, ...].
EXPECTED = {
    ("vector", "sequence"): lambda x: x.reshape(N, 4, 1),
    ("sequence", "vector"): lambda x: x.reshape(N, 10),
    ("sequence", "image"): lambda x: x.reshape(N, 1, 5, 2),
    ("image", "vector"): lambda x: x.reshape(N, 24),
    ("image", "sequence"): lambda x: np.stack([x[..., step].reshape(N, 6) for step in range(4)], 1),
    ("video", "vector"): lambda x: x.reshape(N, 120),
    ("video", "sequence"): lambda x: x.reshape(N, 3, 40),
    ("video", "image"): lambda x: x.reshape(N, 6, 4, 5),
}


def test_every_view_is_expected():
    assert set(VIEWS) == set(EXPECTED)


@pytest.mark.parametrize(("is_a", "wanted"), VIEWS)
def test_a_view_holds_the_same_numbers_and_is_scaled_as_what_it_is_taken_for(is_a, wanted):
    splits = choose(plain(), None, {is_a: wanted})
    viewed = EXPECTED[is_a, wanted](arrays()[is_a]).astype(np.float32)
    direct = Splits.from_arrays(arrays() | {is_a: viewed}, np.arange(N) % 3)
    scaled = splits.standardize()
    assert scaled.description == direct.description
    assert scaled.scaling == direct.scaling
    for part in ("train", "val", "test"):
        found, right = (getattr(each, part).arrays for each in (scaled, direct))
        assert all(torch.equal(found[name], right[name]) for name in SHAPES)
    assert dict(zip(SHAPES, [m.kind for m in overview(scaled).modalities], strict=True))[is_a] == wanted


@pytest.mark.parametrize("wanted", [*KINDS, *ENCODERS])
@pytest.mark.parametrize("is_a", KINDS)
def test_every_other_view_is_refused_with_those_there_are(is_a, wanted):
    kinds = [wanted] if wanted in KINDS else [KINDS[rank - 1] for rank in ENCODERS[wanted]]
    if is_a in kinds:
        assert choose(plain(), None, {is_a: wanted}).shapes[is_a] == SHAPES[is_a]
    elif (is_a, kinds[0]) in VIEWS:
        assert overview(choose(plain(), [is_a], {is_a: wanted})).modalities[0].kind == kinds[0]
    else:
        possible = " or ".join([is_a, *(other for one, other in VIEWS if one == is_a)])
        text = f"{is_a} {list(SHAPES[is_a])} must be taken as {possible}, got '{wanted}'"
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            choose(plain(), None, {is_a: wanted})


def test_help_lists_every_view():
    text = " ".join(Encoders.__metadata__[0].help.split())
    for is_a, said in (
        ("vector", "A vector [D] goes as sequence [D, 1];"),
        ("sequence", "a sequence [T, F] as vector or image [1, T, F];"),
        ("image", "an image [C, H, W] as vector or sequence [W, C H], its columns the steps;"),
        ("video", "a video [T, C, H, W] as vector, sequence [T, C H W] or image [T C, H, W]."),
    ):
        assert said in text
        assert all((f" {kind}" in said) for one, kind in VIEWS if one == is_a)
    assert all(name in text for name in (*KINDS, *ENCODERS))


@pytest.mark.parametrize(
    ("modalities", "encoders", "text"),
    [
        (
            ["vektor"],
            {},
            r"modalities must name modalities among vector, .*, got 'vektor'; did you mean vector",
        ),
        ([], {}, "modalities must hold at least one name, got none"),
        (["image", "image"], {}, "modalities must be named once each, got image, image"),
        (None, {"imag": "vector"}, r"encoder must name modalities among .*, got 'imag'; did you mean image"),
        (["vector"], {"image": "vector"}, "encoder must name modalities among vector, got 'image'"),
        (
            None,
            {"image": "vectr"},
            r"encoder of image must be one of vector, .*, got 'vectr'; did you mean vector",
        ),
    ],
)
def test_names_that_are_wrong(modalities, encoders, text):
    with pytest.raises(ValueError, match=text):
        choose(plain(), modalities, encoders)


def test_standardised_data_are_not_taken_as_something_else():
    with pytest.raises(ValueError, match="splits must not be standardised yet"):
        choose(plain().standardize(), ["image"])


@pytest.mark.parametrize(
    ("shape", "name", "kind"),
    [((5, 2), "gru", GRUEncoder), ((3, 8, 8), "resnet18", ResNet18), ((1, 200, 200), "cnn", SmallCNN)],
)
def test_an_encoder_by_name(shape, name, kind):
    assert type(encoder_for(shape, 4, encoder=name)) is kind
    assert type(build_model({"a": shape, "b": (3,)}, 2, encoders={"a": name}).encoders["a"]) is kind


def test_an_encoder_of_images_goes_over_the_frames_of_video():
    encoder = encoder_for((2, 3, 8, 8), 4, encoder="resnet18")
    assert isinstance(encoder, FrameMean)
    assert isinstance(encoder.encoder, ResNet18)


@pytest.mark.parametrize(
    ("shape", "name"), [((5, 2), "mlp"), ((4,), "cnn"), ((3, 8, 8), "gru"), ((4,), "mpl")]
)
def test_an_encoder_that_does_not_take_the_shape(shape, name):
    with pytest.raises(ValueError, match=rf"encoder of a \[.*\] must be one of .*, got '{name}'"):
        encoder_for(shape, 4, encoder=name, name="a")
    with pytest.raises(ValueError, match="encoders must name modalities among a, got b"):
        build_model({"a": shape}, 2, encoders={"b": name})


CHOICE = ("--modalities", "video,sequence,image", "--encoder", "sequence=image", "--encoder", "video=gru")


@pytest.fixture(scope="module")
def chosen(npz, tmp_path_factory):
    """The folder and output of a comparison of some modalities, taken as something else."""
    out = tmp_path_factory.mktemp("out") / "chosen"
    result = compare(npz, out, *CHOICE)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_table_shows_what_was_chosen(chosen):
    table = chosen[1][: chosen[1].index("\n\n")]
    rows = [
        line.split()
        for line in table.splitlines()
        if line.startswith(("video", "sequence", "image", "vector"))
    ]
    assert [row[0] for row in rows] == ["video", "sequence", "image"]
    assert [" ".join(row[1:-5]) for row in rows] == ["[3, 40]", "[1, 5, 2]", "[2, 3, 4]"]
    assert [row[-5:-3] for row in rows] == [
        ["sequence", "GRUEncoder"],
        ["image", "SmallCNN"],
        ["image", "SmallCNN"],
    ]


def test_valuation_of_such_a_model_takes_the_same(npz, chosen, tmp_path):
    folder = chosen[0] / "runs" / "joint-seed0"
    trainer, splits, _ = restore(folder)
    expected = data.load(
        npz, modalities=("video", "sequence", "image"), encoders={"sequence": "image", "video": "gru"}
    )
    assert splits.shapes == expected.shapes == {"video": (3, 40), "sequence": (1, 5, 2), "image": (2, 3, 4)}
    assert torch.equal(splits.test.arrays["sequence"], expected.test.arrays["sequence"])
    assert type(trainer.learner.model.encoders["video"]) is GRUEncoder
    result = CliRunner().invoke(app, ["valuate", "--model", str(folder), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "coalitions.json").read_text())
    assert facts["modalities"] == ["video", "sequence", "image"]
    entry = json.loads((chosen[0] / "results.json").read_text())["runs"][0]
    assert facts["coalition_accuracy"]["video+sequence+image"] == pytest.approx(entry["metrics"]["accuracy"])


def test_data_without_a_chosen_modality_are_refused(chosen):
    with pytest.raises(ValueError, match=r"data must have modalities video \[3, 40\], .*, got audio \[36\]"):
        restore(chosen[0] / "runs" / "joint-seed0", "htad")


def test_the_same_choice_goes_on_and_another_is_another_configuration(npz, chosen):
    assert "1 of 1 runs: already in" in compare(npz, chosen[0], *CHOICE).stdout
    same = "video [3, 40], sequence [1, 5, 2], image [2, 3, 4] there, "
    for words, differs in (
        ((), "shapes is " + same + "vector [4], sequence [5, 2], image [2, 3, 4], video [3, 2, 4, 5] here"),
        (
            ("--modalities", "sequence,video,image", *CHOICE[2:]),
            "shapes is " + same + "sequence [1, 5, 2], video [3, 40], image [2, 3, 4] here",
        ),
        ((*CHOICE[:-1], "video=conv"), "encoders is video gru there, video conv here"),
        ((*CHOICE[:-1], "video=sequence"), "encoders is video gru there, none here"),
    ):
        result = compare(npz, chosen[0], *words)
        assert result.exit_code == 2
        assert differs in result.stderr


def test_a_run_of_another_choice_is_not_resumed(npz, tmp_path):
    assert invoke("train", npz, tmp_path, "--modalities", "vector,image").exit_code == 0
    result = invoke("train", npz, tmp_path, "--modalities", "image,vector", "--resume")
    assert result.exit_code == 2
    assert "must be of a run with" in result.stderr
    assert invoke("train", npz, tmp_path, "--modalities", "vector,image", "--resume").exit_code == 0


def test_a_process_of_its_own_gets_the_same_choice(npz, tmp_path, monkeypatch):
    names, encoders = ("video", "image"), {"video": "image", "image": "resnet18"}
    setup = Setup(
        str(npz),
        data.load(npz, modalities=names, encoders=encoders),
        accelerator="cpu",
        modalities=names,
        encoders=encoders,
    )
    seen = {}

    def look(setup, method, seed, out_dir, **options):
        seen["setup"] = setup
        raise ValueError("seen")

    monkeypatch.setattr("mmfast.experiments.runs.make_run", look)
    assert CliRunner().invoke(app, train_arguments(setup, PlannedRun(Joint(), 0, 1), tmp_path)).exit_code == 2
    assert seen["setup"].modalities == names
    assert seen["setup"].encoders == encoders
    assert seen["setup"].splits.shapes == setup.splits.shapes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--encoder", "image"),
            "encoder must have the form MODALITY=KIND, such as audio=image, got 'image'",
        ),
        (("--encoder", "image=vector", "--encoder", "image=cnn"), "encoder must be given once for image"),
        (("--modalities", " , "), "modalities must hold at least one name, got none"),
        (("--modalities", "vector,imgae"), "got 'imgae'; did you mean image"),
        (("--encoder", "vector=video"), "vector [4] must be taken as vector or sequence, got 'video'"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_choice_that_is_wrong_stops_a_command(npz, tmp_path, command, words, message):
    result = invoke(command, npz, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_samples_without_any_chosen_modality_are_counted(npz):
    said = [text for text in overview(data.load(npz, modalities=("sequence",))).warnings if "none of" in text]
    assert said == ["18 samples have none of the modalities: all that answers there is a constant."]
    assert not any("none of" in text for text in overview(data.load(npz)).warnings)


def test_one_modality_alone_can_be_compared(npz, tmp_path):
    words = (
        "--set",
        "frozen-unimodal.head_epochs=1",
        "--set",
        "di-mml.head_epochs=1",
        "--set",
        "di-mml.e0=1",
    )
    result = invoke("compare", npz, tmp_path, "--modalities", "vector", "--seeds", "1", *words)
    assert result.exit_code == 0, result.output


def test_arrays_that_are_left_out_may_hold_anything(tmp_path):
    path = tmp_path / "mixed.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path, label=np.arange(40) % 2, a=rng.random((40, 3)), id=np.arange(40), b=np.full((40, 2), np.nan)
    )
    assert data.load(path, modalities=["a"]).modalities == ("a",)
    with pytest.raises(ValueError, match=r"id must have shape|b must be finite"):
        data.load(path)
