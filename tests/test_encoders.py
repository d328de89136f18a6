"""Encoders: the one a shape gets, the shapes they map, their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.models import (
    MLP,
    FrameMean,
    GRUEncoder,
    MultimodalModel,
    ResNet18,
    SmallCNN,
    TemporalConv,
    build_model,
    encoder_for,
)

SMALL = {
    "mlp": (lambda: MLP(9, 6), (9,)),
    "mlp-one-layer": (lambda: MLP(9, 6, hidden=()), (9,)),
    "mlp-deep": (lambda: MLP(9, 6, hidden=(8, 5), dropout=0.5), (9,)),
    "conv": (lambda: TemporalConv(4, 6), (11, 4)),
    "conv-one-step": (lambda: TemporalConv(4, 6, dropout=0.1), (1, 4)),
    "conv-odd-channels": (lambda: TemporalConv(1, 6, channels=(7, 10)), (5, 1)),
    "gru": (lambda: GRUEncoder(4, 6), (11, 4)),
    "gru-layers": (lambda: GRUEncoder(4, 6, hidden=5, num_layers=2, dropout=0.1), (3, 4)),
    "cnn": (lambda: SmallCNN(1, 6), (1, 28, 28)),
    "cnn-one-pixel": (lambda: SmallCNN(3, 6), (3, 1, 1)),
    "cnn-odd": (lambda: SmallCNN(3, 6, channels=(8,), dropout=0.1), (3, 13, 7)),
    "resnet": (lambda: ResNet18(1, 6), (1, 33, 17)),
    "resnet-small-stem": (lambda: ResNet18(2, 6, small_stem=True, dropout=0.1), (2, 9, 9)),
    "video": (lambda: FrameMean(SmallCNN(3, 6)), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", SMALL)
def test_maps_any_number_of_samples_to_features(case):
    torch.manual_seed(0)
    make, shape = SMALL[case]
    encoder = make()
    for num_samples in (0, 1, 3):
        features = encoder.eval()(torch.randn(num_samples, *shape))
        assert features.shape == (num_samples, encoder.dim) == (num_samples, 6)
        assert features.isfinite().all()
    # A last batch of one sample trains.
    encoder.train()(torch.randn(1, *shape)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("case", [case for case in SMALL if not case.startswith("resnet")])
def test_samples_do_not_depend_on_their_companions(case):
    torch.manual_seed(0)
    make, shape = SMALL[case]
    encoder, x = make().eval().double(), torch.randn(4, *shape, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((9,), {}, MLP),
        ((50, 9), {}, TemporalConv),
        ((50, 9), {"temporal": "gru"}, GRUEncoder),
        ((1, 28, 28), {}, SmallCNN),
        ((3, 95, 200), {}, SmallCNN),
        ((1, 96, 96), {}, ResNet18),
        ((3, 224, 128), {}, ResNet18),
        ([2, 3, 32, 32], {}, FrameMean),
        (torch.Size([3, 3, 112, 112]), {}, FrameMean),
    ],
)
def test_encoder_for_chooses_by_shape(shape, options, expected):
    encoder = encoder_for(shape, 5, dropout=0.1, **options)
    assert type(encoder) is expected
    assert encoder.dim == 5
    encoder.check_input(torch.zeros(2, *shape))
    if expected is FrameMean:
        assert type(encoder.encoder) is (ResNet18 if shape[-1] >= 96 else SmallCNN)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.1 for module in encoder.modules())


def test_build_model_covers_every_kind_of_array():
    torch.manual_seed(0)
    shapes = {"vector": [4], "sequence": [6, 3], "image": [1, 8, 8], "video": [2, 3, 8, 8]}
    model = build_model(shapes, 5, dim=12, fusion="gated")
    assert isinstance(model, MultimodalModel)
    assert (model.modalities, model.dims) == (tuple(shapes), (12,) * 4)
    batch = {name: torch.randn(3, *shape) for name, shape in shapes.items()}
    assert model(batch).shape == (3, 5)
    # Length, height and width are free at run time.
    batch |= {"sequence": torch.randn(3, 9, 3), "image": torch.randn(3, 1, 11, 5)}
    assert model(batch).shape == (3, 5)


@pytest.mark.parametrize("image", [SmallCNN(3, 6), ResNet18(3, 6)], ids=["cnn", "resnet"])
def test_video_is_the_mean_of_its_frames(image):
    encoder = FrameMean(image).double().eval()
    x = torch.randn(2, 3, 3, 12, 10, dtype=torch.float64)
    frames = torch.stack([image(x[:, t]) for t in range(3)])
    torch.testing.assert_close(encoder(x), frames.mean(0))


def test_resnet_has_the_published_names_sizes_and_initialisation():
    torch.manual_seed(0)
    model = ResNet18(3, 512)
    # 11,689,512 parameters with the 1000-class layer, 513,000 of them in it.
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 513_000
    state = model.state_dict()
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer4.1.bn2.bias": (512,),
    }.items():
        assert state[name].shape == shape
    assert not any(name.startswith(("projection", "layer1.0.downsample")) for name in state)
    weight = state["layer4.1.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert state["layer3.0.bn1.weight"].eq(1).all()
    grey = ResNet18(1, 64)
    assert grey.conv1.weight.shape == (64, 1, 7, 7)
    assert grey.projection.weight.shape == (64, 512)


def test_resnet_halves_the_image_five_times():
    model, shapes = ResNet18(3, 512).eval(), {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    model(torch.zeros(1, 3, 64, 96))
    assert shapes == {
        "conv1": (64, 32, 48),
        "maxpool": (64, 16, 24),
        "layer1": (64, 16, 24),
        "layer2": (128, 8, 12),
        "layer3": (256, 4, 6),
        "layer4": (512, 2, 3),
    }


@pytest.mark.parametrize("case", ["mlp", "conv", "gru", "cnn"])
def test_fits_a_small_set_in_a_few_epochs(case):
    torch.manual_seed(0)
    make, shape = SMALL[case]
    labels = torch.arange(96) % 3
    patterns = torch.randn(3, *shape)
    if case == "cnn":
        # Horizontal stripes, vertical stripes, chequers: what convolutions tell apart at any position.
        row, column = torch.arange(28)[:, None] % 2, torch.arange(28)[None] % 2
        patterns = torch.stack([row + 0 * column, column + 0 * row, row ^ column])[:, None].float()
    x = patterns[labels] + 0.5 * torch.randn(96, *shape)
    model = MultimodalModel({"x": make()}, 6, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for rows in torch.randperm(96).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model({"x": x[rows]}), labels[rows]).backward()
            optimizer.step()
    assert (model({"x": x}).argmax(1) == labels).float().mean() > 0.9


BAD = {
    "rank": (lambda: MLP(3, 4)(torch.zeros(2, 1, 3)), ValueError, r"\[N, D\] = \[N, 3\], got \[2, 1, 3\]"),
    "features": (lambda: MLP(3, 4)(torch.zeros(2, 4)), ValueError, r"= \[N, 3\], got \[2, 4\]"),
    "channels": (
        lambda: SmallCNN(1, 4)(torch.zeros(2, 3, 8, 8)),
        ValueError,
        r"\[N, C, H, W\] = \[N, 1, H, W\], got \[2, 3, 8, 8\]",
    ),
    "no-steps": (
        lambda: TemporalConv(3, 4)(torch.zeros(2, 0, 3)),
        ValueError,
        r"\[N, T, 3\], got \[2, 0, 3\]",
    ),
    "frames": (
        lambda: FrameMean(SmallCNN(1, 4))(torch.zeros(2, 1, 8, 8)),
        ValueError,
        r"\[N, T, C, H, W\] = \[N, T, 1, H, W\], got \[2, 1, 8, 8\]",
    ),
    "dtype": (lambda: MLP(3, 4)(torch.zeros(2, 3).long()), TypeError, "floating dtype, got int64"),
    "list": (lambda: MLP(3, 4)([[1.0, 2.0, 3.0]]), TypeError, "input must be a torch.Tensor, got list"),
    "dim": (lambda: MLP(3, 0), ValueError, "dim must be at least 1, got 0"),
    "dim-type": (lambda: MLP(3, 4.0), TypeError, "dim must be an int, got float"),
    "dropout": (lambda: MLP(3, 4, dropout=1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    "kernel": (lambda: TemporalConv(3, 4, kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
    "blocks": (lambda: SmallCNN(3, 4, channels=()), ValueError, "channels must hold at least one block"),
    "video-of": (lambda: FrameMean(MLP(3, 4)), TypeError, "encoder must be an image Encoder, got MLP"),
    "five": (
        lambda: encoder_for([1] * 5, 4, name="scan"),
        ValueError,
        r"scan must have samples .* got \[1, 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


def test_a_size_is_no_shape():
    with pytest.raises(TypeError, match=r"^audio must have a shape, such as \[20\], got 20$"):
        build_model({"audio": 20}, 3)
